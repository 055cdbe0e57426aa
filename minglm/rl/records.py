"""What a run writes down of its attempts: the numbers of a step for metrics.jsonl, and every attempt as text."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minglm.evals.passes import pass_at
from minglm.files import write_text_atomically
from minglm.rl.practice import Practice
from minglm.rl.recipe import RLRecipe
from minglm.rl.rewards import by_source
from minglm.rl.rollout import Trajectory
from minglm.tokenizer import Tokenizer


def passes(groups: Sequence[Sequence[Trajectory]]) -> dict[str, float]:
    """pass@1, 2, 4, ... up to the size of a group, the mean over groups; solved is a reward of 1. Empty without groups."""
    size = min(map(len, groups), default=0)
    ks = [2**power for power in range(size.bit_length())]
    solved = [sum(one.verdict.reward >= 1 for one in group) for group in groups]
    return {str(k): statistics.fmean(pass_at(k, len(g), c) for g, c in zip(groups, solved, strict=True)) for k in ks}


def record_of(practice: Practice) -> dict[str, Any]:
    """The numbers of what a step has sampled; rewards and lengths are means over attempts with a verdict."""
    judged = practice.judged
    return {
        "reward": statistics.fmean(one.verdict.reward for one in judged),
        "reward_by_family": by_family(judged),
        "reward_by_source": by_source(judged),
        "pass_at": passes(practice.whole),
        "length": statistics.fmean(one.length for one in judged),
        "turns": statistics.fmean(one.turns for one in judged),
        "ends": dict(Counter(one.end for one in judged)),
        "pathological": statistics.fmean(one.pathological for one in judged),
        "attempts": len(judged),
        "trained_on": len(practice.trajectories),
        "rounds": practice.rounds,
        "groups_without_spread": practice.without_spread,
        "failed": len(practice.failed),
        "failures": practice.failures,
    }


class StepTokens(NamedTuple):
    """What a step has cost, in tokens: those that the policy chose, and those that went through the trainer or a teacher,
    prompts and results of tools included."""

    generated_tokens: int
    trained_tokens: int
    teacher_tokens: int

    @property
    def compute(self) -> int:
        """In tokens of a forward pass: a backward pass is about two."""
        return self.generated_tokens + 3 * self.trained_tokens + self.teacher_tokens


def tokens_of(practice: Practice, recipe: RLRecipe) -> StepTokens:
    trained = recipe.passes * sum(len(one.ids) for one in practice.trajectories)
    generated = sum(one.length for one in (*practice.judged, *practice.failed))
    return StepTokens(generated, trained, trained if recipe.teachers else 0)


def by_family(judged: Sequence[Trajectory]) -> dict[str, float]:
    """The mean reward of each family's attempts."""
    rewards: dict[str, list[float]] = {}
    for one in judged:
        rewards.setdefault(one.problem.family, []).append(one.verdict.reward)
    return {family: statistics.fmean(own) for family, own in rewards.items()}


def write_rollouts(trajectories: Sequence[Trajectory], tokenizer: Tokenizer, folder: Path, step: int) -> None:
    """What was asked and answered, one attempt a line, in step-N.jsonl; an attempt that has failed has no reward. The file is
    there when it is complete."""
    folder.mkdir(exist_ok=True)
    lines = (
        json.dumps(
            {
                "family": one.problem.family,
                "messages": one.problem.messages,
                "response": one.response,
                "text": tokenizer.decode(one.ids),
                "reward": one.verdict and one.verdict.reward,
                "parts": one.parts,
                "reasons": one.verdict.reasons if one.verdict else (str(one.failure),),
                "end": one.end,
                "length": one.length,
            }
        )
        for one in trajectories
    )
    write_text_atomically(folder / f"step-{step}.jsonl", "".join(f"{line}\n" for line in lines))


def rollout_files(folder: Path) -> dict[int, Path]:
    """By step, the first one first."""
    return dict(sorted((int(path.stem.removeprefix("step-")), path) for path in folder.glob("step-*.jsonl")))


def forget_rollouts(folder: Path, step: int) -> None:
    """Those behind `step`, which are done again otherwise or not at all."""
    for number, path in rollout_files(folder).items():
        if number > step:
            path.unlink()
