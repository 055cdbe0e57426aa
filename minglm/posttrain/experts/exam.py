"""How good a model is at held-out problems, in each mode: one attempt at each problem, the same draws for every model."""

import json
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minglm.chat import MODES, has_thought
from minglm.checkpoint import write_folder_atomically
from minglm.config import ConfigError
from minglm.evals.interval import Estimate, mean, share
from minglm.posttrain.experts.policy import Placed, Policy, different
from minglm.posttrain.experts.recipe import Exam
from minglm.rl.recipe import RLRecipe
from minglm.rl.rollout import Asked
from minglm.tasks.task import HELD_OUT

RECORDS = "attempts.json"


class Questions(NamedTuple):
    """Held-out problems without one in common: those that judge models, and those that choose among them on the way."""

    judging: list[Placed]
    choosing: list[Placed]


class Sat(NamedTuple):
    """One attempt: where the problem is from, the mode, the reward (None: its environment failed), the tokens that the model
    wrote, whether it has thought, and how the attempt ended."""

    family: str
    level: int
    mode: str
    reward: float | None
    tokens: int
    thought: bool
    end: str


def questions(levels: Mapping[str, tuple[int, ...]], exam: Exam, seed: int) -> Questions:
    """`exam.problems` of each pool for either purpose; of a pool that holds fewer, each has half. Raises ConfigError for one
    without two problems."""
    found = Questions([], [])
    for family, some in levels.items():
        for level in some:
            own = different({family: (level,)}, HELD_OUT, seed, 2 * exam.problems)
            if len(own) < 2:
                raise ConfigError(f"experts: {family}, difficulty {level}: {len(own)} held-out problems; wanted two at least")
            found.judging.extend(own[::2])
            found.choosing.extend(own[1::2])
    return found


def sit(model: Path, recipe: RLRecipe, asked: Sequence[Placed], exam: Exam, folder: Path, about: str) -> list[Sat]:
    """The model's attempts at all problems in all modes, by the recipe's lengths and rewards; kept in `folder`, which is read
    instead when it is there."""
    if not (folder / RECORDS).is_file():
        policy = Policy(model, recipe)
        found = []
        for mode in MODES:
            seeded = [
                Asked(one.problem, random.Random(f"exam {mode} {number}").getrandbits(62)) for number, one in enumerate(asked)
            ]
            attempts = policy.attempt(seeded, mode, exam.temperature, about)
            found += [
                Sat(
                    at.family,
                    at.level,
                    mode,
                    one.verdict and one.verdict.reward,
                    one.length,
                    has_thought(one.response),
                    one.end,
                )
                for at, one in zip(asked, attempts, strict=True)
            ]
        with write_folder_atomically(folder) as aside:
            lines = ",\n".join(json.dumps(one) for one in found)
            (aside / RECORDS).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return [Sat(*one) for one in json.loads((folder / RECORDS).read_text(encoding="utf-8"))]


def rewards(sat: Iterable[Sat]) -> list[float]:
    """Of the attempts that have one."""
    return [one.reward for one in sat if one.reward is not None]


def summary(sat: Sequence[Sat]) -> dict[str, Any] | None:
    """Reward and tokens with their 95% intervals, and shares; None where no attempt has a verdict."""
    judged = [one for one in sat if one.reward is not None]
    if not judged:
        return None
    return {
        "reward": share(rewards(judged)).numbers,
        "tokens": mean([one.tokens for one in judged]).numbers,
        "thought": statistics.fmean(one.thought for one in judged),
        "malformed": statistics.fmean(one.end == "malformed" for one in judged),
        "problems": len(judged),
        "failed": len(sat) - len(judged),
    }


def score(sat: Sequence[Sat], domain_of: Mapping[str, str]) -> float:
    """The mean over domains of the mean reward in all modes: a domain with many families counts no more than one with few."""
    domains = dict.fromkeys(domain_of.values())
    found = (rewards(one for one in sat if domain_of[one.family] == domain) for domain in domains)
    return statistics.fmean(statistics.fmean(own) for own in found if own)


def difference(before: Sequence[Sat], after: Sequence[Sat]) -> Estimate:
    """By how much the reward rises from one model to another at the same problems, problem by problem."""
    pairs = zip(before, after, strict=True)
    return mean([new.reward - old.reward for old, new in pairs if old.reward is not None and new.reward is not None])
