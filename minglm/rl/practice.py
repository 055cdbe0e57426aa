"""What a step learns from: problems that the curriculum draws, attempted in groups, the groups that say something kept."""

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from minglm.rl.curriculum import Curriculum, Drawn
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
    drawn: list[Drawn] = field(default_factory=list)  # the problem of each in `judged`
    rounds: int = 0
    without_spread: int = 0  # groups that were left out for that
    numbers: dict[str, Any] = field(default_factory=dict)  # what else the step's record is to tell

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

    def add(self, group: list[Trajectory], drawn: Drawn, by_spread: bool) -> None:
        """Attempts at one problem. by_spread: keep no group without a spread of rewards."""
        judged = [one for one in group if one.verdict is not None]
        self.judged += judged
        self.drawn += [drawn] * len(judged)
        if len(judged) < len(group):
            self.failed += [one for one in group if one.verdict is None]
            return
        self.whole.append(group)
        rewards = [one.verdict.reward for one in group]
        if by_spread and max(rewards) - min(rewards) <= SPREAD:
            self.without_spread += 1
        else:
            self.kept.append(group)

    def tell(self, curriculum: Curriculum, step: int) -> None:
        """The curriculum learns from every attempt with a verdict. Raises RLError where none has one."""
        if not self.judged:
            reasons = Counter(str(one.failure) for one in self.failed).most_common(3)
            raise RLError(
                f"step {step}: all {len(self.failed)} attempts have failed, by no fault of the policy's; nothing was learnt or "
                f"lost. Most often: {'; '.join(f'{reason} ({count} times)' for reason, count in reasons)}"
            )
        curriculum.learn([pool for pool, _ in self.drawn], [one.verdict.reward for one in self.judged])
        shown: dict[Drawn, list[bool]] = {}
        for drawn, one in zip(self.drawn, self.judged, strict=True):
            shown.setdefault(drawn, []).append(one.pathological)
        for drawn, own in shown.items():
            curriculum.learn_pathologies(drawn, own)


def practise(rollouts: Rollouts, curriculum: Curriculum, sampling: Sampling, seed: int, step: int) -> Practice:
    """Groups with a spread of rewards, as many as `sampling` wants if its rounds suffice (dynamic sampling, DAPO, 2503.14476);
    with one round all groups in which no attempt has failed. The curriculum learns from every attempt with a verdict.

    Raises RLError where no attempt has one.
    """
    found, drawn = Practice(), 0
    while found.rounds < sampling.rounds and (missing := sampling.groups - len(found.kept)) > 0:
        problems = curriculum.draw(step, drawn, missing)
        asked = [
            Asked(
                problem,
                random.Random(f"{seed} {step} {drawn + number} {attempt}").getrandbits(62),
                rollouts.limits.in_mode_of(sampling, step + drawn + number),
            )
            for number, (_, problem) in enumerate(problems)
            for attempt in range(sampling.group_size)
        ]
        drawn += missing
        found.rounds += 1
        attempts = rollouts.collect(asked)
        for (one, _), group in zip(problems, groups_of(attempts, sampling.group_size), strict=True):
            found.add(list(group), one, sampling.rounds > 1)
    found.tell(curriculum, step)
    return found
