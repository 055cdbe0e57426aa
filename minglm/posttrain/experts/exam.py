"""How good a model is at held-out problems, in each mode: one attempt at each problem, the same draws for every model.

exams/MODEL/attempts.json            every attempt, as numbers
exams/MODEL/conversations.json       of each pool and mode the attempt at its first problem, as text
"""

import json
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from minglm.chat import MODES, OPENS_THINKING, has_thought
from minglm.config import ConfigError
from minglm.evals.interval import Estimate, mean, share
from minglm.files import write_folder_atomically
from minglm.posttrain.experts.policy import Placed, Policy, different
from minglm.posttrain.experts.recipe import Exam
from minglm.rl.recipe import RLRecipe
from minglm.rl.rollout import Asked, Trajectory
from minglm.tasks.agents.calling import CallCount, count_calls
from minglm.tasks.task import HELD_OUT
from minglm.tokenizer import Tokenizer

RECORDS, CONVERSATIONS = "attempts.json", "conversations.json"


class ExpertsError(RuntimeError):
    """An iteration that cannot go on: nothing that its models have done tells anything, or may be learnt from."""


class Questions(NamedTuple):
    """Held-out problems without one in common: those that judge models, and those that choose among them on the way."""

    judging: list[Placed]
    choosing: list[Placed]


class Sat(NamedTuple):
    """One attempt: where the problem is from, the mode, the reward (None: its environment failed), the tokens that the model
    wrote, whether it has thought, how the attempt ended, and its calls of tools (`calling.CallCount`)."""

    family: str
    level: int
    mode: str
    reward: float | None
    tokens: int
    thought: bool
    end: str
    calls: int
    calls_succeeded: int


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
    instead when it is there. Raises `ExpertsError`, and keeps nothing, where all attempts at a family's problems failed."""
    if not (folder / RECORDS).is_file():
        policy = Policy(model, replace(recipe, sampling=replace(recipe.sampling, turns=exam.turns or recipe.sampling.turns)))
        found, conversations = [], []
        for mode in MODES:
            seeded = [
                Asked(one.problem, random.Random(f"exam {mode} {number}").getrandbits(62)) for number, one in enumerate(asked)
            ]
            attempts = policy.attempt(seeded, mode, exam.temperature, about)
            _refuse_failures(asked, attempts, f"{about} ({model}), {mode}")
            pairs = list(zip(asked, attempts, strict=True))
            found += [_record(at, mode, one, policy.tokenizer) for at, one in pairs]
            firsts = [next(own) for _, own in groupby(pairs, key=lambda pair: (pair[0].family, pair[0].level))]
            conversations += [_conversation(at, mode, one, policy.tokenizer) for at, one in firsts]
        with write_folder_atomically(folder) as aside:
            _write_lines(aside / RECORDS, found)
            _write_lines(aside / CONVERSATIONS, conversations)
    return read_attempts(folder)


def _refuse_failures(asked: Sequence[Placed], attempts: Sequence[Trajectory], about: str) -> None:
    for family in dict.fromkeys(at.family for at in asked):
        own = [one for at, one in zip(asked, attempts, strict=True) if at.family == family]
        if all(one.verdict is None for one in own):
            (reason, count), *_ = Counter(str(one.failure) for one in own).most_common(1)
            raise ExpertsError(
                f"{about}: all {len(own)} attempts at {family} have failed, by no fault of the model's; most often: {reason} "
                f"({count} times). Nothing was kept of this exam; the same command goes on with it"
            )


def read_attempts(folder: Path) -> list[Sat]:
    """What `sit` has kept there."""
    return [Sat(*one) for one in json.loads((folder / RECORDS).read_text(encoding="utf-8"))]


def _record(at: Placed, mode: str, one: Trajectory, tokenizer: Tokenizer) -> Sat:
    reward, thought = one.verdict and one.verdict.reward, has_thought(one.response)
    calls = calls_of(one, mode, tokenizer)
    return Sat(at.family, at.level, mode, reward, one.length, thought, one.end, calls.made, calls.succeeded)


def calls_of(one: Trajectory, mode: str, tokenizer: Tokenizer) -> CallCount:
    """Every call that the model has begun, those of a turn that was cut off or could not be read included."""
    if not one.problem.tools:
        return CallCount(0, 0)
    text = unread_turn(one, tokenizer)
    if mode == "thinking":
        text = OPENS_THINKING + text  # which stands in the prompt
    thinking, closed, answer = text.rpartition("</think>")
    begun = answer if closed or "<think>" not in text else ""  # within a thinking there are no calls
    return count_calls(one.response, one.problem.tools, begun.count("<tool_call>"))


def unread_turn(one: Trajectory, tokenizer: Tokenizer) -> str:
    """What the model has written after the last message of its response: a turn that was cut off or could not be read."""
    stretches = groupby(zip(one.ids, one.written, strict=True), key=lambda pair: pair[1])
    turns = [[id for id, _ in pairs] for written, pairs in stretches if written]
    return tokenizer.decode(turns[-1]) if len(turns) > one.turns else ""


def _conversation(at: Placed, mode: str, one: Trajectory, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "family": at.family,
        "level": at.level,
        "mode": mode,
        "messages": one.problem.messages,
        "response": one.response,
        "unread": unread_turn(one, tokenizer),
        "reward": one.verdict and one.verdict.reward,
        "reasons": one.verdict.reasons if one.verdict else (str(one.failure),),
        "tokens": one.length,
    }


def _write_lines(path: Path, values: Sequence[Any]) -> None:
    """A JSON list, a value on each line."""
    lines = ",\n".join(json.dumps(one) for one in values)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


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
        "calls": call_success(judged),
    }


def call_success(sat: Iterable[Sat]) -> dict[str, Any] | None:
    """The share of calls that could be read, fitted their tools and were done, over single calls; None without any call."""
    made, succeeded = (sum(own) for own in zip(*((one.calls, one.calls_succeeded) for one in sat), strict=True))
    if not made:
        return None
    return {"made": made, "success": share([1.0] * succeeded + [0.0] * (made - succeeded)).numbers}


def score(sat: Sequence[Sat], domain_of: Mapping[str, str]) -> float:
    """The mean over domains of the mean reward in all modes: a domain with many families counts no more than one with few."""
    domains = dict.fromkeys(domain_of.values())
    found = (rewards(one for one in sat if domain_of[one.family] == domain) for domain in domains)
    return statistics.fmean(statistics.fmean(own) for own in found if own)


def difference(before: Sequence[Sat], after: Sequence[Sat]) -> Estimate:
    """By how much the reward rises from one model to another at the same problems, problem by problem."""
    pairs = zip(before, after, strict=True)
    return mean([new.reward - old.reward for old, new in pairs if old.reward is not None and new.reward is not None])
