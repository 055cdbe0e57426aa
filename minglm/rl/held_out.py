"""How good a policy is at problems that it never trains on: one attempt at each."""

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from minglm.config import ConfigError
from minglm.data.sources import HELD_OUT
from minglm.evals.interval import Estimate, mean
from minglm.rl.practice import RLError
from minglm.rl.recipe import RLRecipe, Sampling
from minglm.rl.rewards import by_source
from minglm.rl.rollout import Asked, Rollouts, Trajectory
from minglm.tasks import FAMILIES
from minglm.tasks.task import Problem, different_problems


class HeldOut(NamedTuple):
    """rewards: the mean of "all" and of each family with its 95% interval; of attempts with a verdict, as is all else."""

    rewards: dict[str, Estimate]
    judged: list[Trajectory]
    failed: int

    def record(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {
            "rewards": {name: estimate.numbers for name, estimate in self.rewards.items()},
            "by_source": by_source(self.judged),
            "length": statistics.fmean(one.length for one in self.judged),
            "ends": dict(Counter(one.end for one in self.judged)),
            "pathological": statistics.fmean(one.pathological for one in self.judged),
            "failed": self.failed,
        }

    def __str__(self) -> str:
        return ", ".join(f"{name} {estimate.text()}" for name, estimate in self.rewards.items())


def attempt_held_out(rollouts: Rollouts, sampling: Sampling, asked: Sequence[Problem]) -> HeldOut:
    """One attempt at each, the same draws every time, in the modes of `sampling` in turn. Families of which every attempt has
    failed are left out; raises RLError where all have."""
    limits = rollouts.limits
    attempts = rollouts.collect(
        [Asked(problem, number, limits.in_mode_of(sampling, number)) for number, problem in enumerate(asked)]
    )
    judged = [one for one in attempts if one.verdict is not None]
    if not judged:
        raise RLError(f"all {len(attempts)} attempts at held-out problems have failed, one of them by {attempts[0].failure}")
    rewards = {"all": [one.verdict.reward for one in judged]}
    for one in judged:
        rewards.setdefault(one.problem.family, []).append(one.verdict.reward)
    return HeldOut({name: mean(own) for name, own in rewards.items()}, judged, len(attempts) - len(judged))


def set_aside(recipe: RLRecipe) -> tuple[list[Problem], list[Problem]]:
    """Different held-out problems: those that judge the run, and others, by which a dynamic temperature is chosen; as many of
    each family, or as there are. Raises ConfigError where there are no others."""
    judging, choosing, count = [], [], recipe.evaluation_problems
    for family, levels in recipe.tasks.levels.items():
        chooses = bool(recipe.sampling.temperatures)
        own = different_problems(FAMILIES[family], HELD_OUT, recipe.seed, (1 + chooses) * count, levels)
        if chooses and len(own) <= count:
            raise ConfigError(
                f"sampling.temperatures: {family} has no held-out problems to choose by beside the {count} that judge; "
                "wanted fewer evaluation_problems, or more difficulties"
            )
        judging, choosing = [*judging, *own[:count]], [*choosing, *own[count:]]
    return judging, choosing
