"""What a step learns from: problems that the curriculum draws, attempted in groups, the groups that say something kept."""

import random
from collections import Counter
from dataclasses import dataclass, field

from minglm.rl.curriculum import Curriculum, Pool
from minglm.rl.objective import SPREAD
from minglm.rl.recipe import Sampling
from minglm.rl.rollout import Asked, Rollouts, Trajectory, groups_of


class RLError(RuntimeError):
    """A run that cannot go on: no attempt of a step has a verdict."""


@dataclass
class Practice:
    """What a step has sampled. kept: whole groups to train on, in order. Every attempt is in `judged` or in `failed`."""

    kept: list[list[Trajectory]] = field(default_factory=list)
    judged: list[Trajectory] = field(default_factory=list)
    failed: list[Trajectory] = field(default_factory=list)  # without a verdict, left out with their groups
    whole: list[list[Trajectory]] = field(default_factory=list)  # groups in which none has failed
    pools: list[Pool] = field(default_factory=list)  # of each in `judged`
    rounds: int = 0
    without_spread: int = 0  # groups that were left out for that

    @property
    def trajectories(self) -> list[Trajectory]:
        return [one for group in self.kept for one in group]

    @property
    def groups(self) -> list[int]:
        """Of each of `trajectories`, its group's number."""
        return [number for number, group in enumerate(self.kept) for _ in group]

    @property
    def failures(self) -> dict[str, int]:
        """How many attempts have failed, by kind."""
        return dict(Counter(one.failure.kind for one in self.failed))


def practise(rollouts: Rollouts, curriculum: Curriculum, sampling: Sampling, seed: int, step: int) -> Practice:
    """Groups with a spread of rewards, as many as `sampling` wants if its rounds suffice (dynamic sampling, DAPO, 2503.14476);
    with one round all groups in which no attempt has failed. The curriculum learns from every attempt with a verdict.

    Raises RLError where no attempt has one.
    """
    found, drawn = Practice(), 0
    while found.rounds < sampling.rounds and (missing := sampling.groups - len(found.kept)) > 0:
        problems = curriculum.draw(step, drawn, missing)
        asked = [
            Asked(problem, random.Random(f"{seed} {step} {drawn + number} {attempt}").getrandbits(62))
            for number, (_, problem) in enumerate(problems)
            for attempt in range(sampling.group_size)
        ]
        drawn += missing
        found.rounds += 1
        attempts = rollouts.collect(asked)
        for (pool, _), group in zip(problems, groups_of(attempts, sampling.group_size), strict=True):
            _sort(found, list(group), pool, sampling.rounds > 1)
    if not found.judged:
        reasons = Counter(str(one.failure) for one in found.failed).most_common(3)
        raise RLError(
            f"step {step}: all {len(found.failed)} attempts have failed, by no fault of the policy's; nothing was learnt or "
            f"lost. Most often: {'; '.join(f'{reason} ({count} times)' for reason, count in reasons)}"
        )
    curriculum.learn(found.pools, [one.verdict.reward for one in found.judged])
    return found


def _sort(found: Practice, group: list[Trajectory], pool: Pool, by_spread: bool) -> None:
    judged = [one for one in group if one.verdict is not None]
    found.judged += judged
    found.pools += [pool] * len(judged)
    if len(judged) < len(group):
        found.failed += [one for one in group if one.verdict is None]
        return
    found.whole.append(group)
    rewards = [one.verdict.reward for one in group]
    if by_spread and max(rewards) - min(rewards) <= SPREAD:
        found.without_spread += 1
    else:
        found.kept.append(group)
