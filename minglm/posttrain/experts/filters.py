"""Which of the experts' answers are learnt from (report, section 3.1, rejection sampling), and what becomes of a prompt.

Every answer that is dropped is counted under the first of `FILTERS` that drops it. The difficulty of a problem is its measured
pass rate: of the easy ones the easiest are dropped, and the others have one answer each; hard ones keep several. The
automatic mode learns from the same answers: those with thinking where those without are likely wrong and it helps, else those
without.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from minglm.posttrain.experts.policy import Placed, is_right
from minglm.posttrain.experts.recipe import Harvest
from minglm.posttrain.lint import LintError, Sample, lint
from minglm.rl.pathology import periodic
from minglm.rl.rollout import Trajectory
from minglm.tasks.agents.calling import count_calls
from minglm.tokenizer import Tokenizer

FILTERS = {
    "failed": "its environment, or a source of rewards, gave no verdict",
    "truncated": "cut off at the end of its tokens or turns",
    "protocol": "a call that cannot be read or is not as its tool's schema says, or marks where none belong",
    "wrong": "not the right answer; of agents: not the final state that was asked for",
    "mode": "a thinking that contradicts the mode",
    "call": "a call that could not be done: what follows it is a repair, or a guess",
    "repetition": "the same tokens again and again",
    "length": "far longer than others that are right, or longer than a row",
    "score": "disliked by the reward model, or what RL has a veto against",
    "luck": "of a family, difficulty and mode in which no more are right than by guessing",
    "duplicate": "the same as another answer to the problem",
    "surplus": "more right answers to a problem than are kept",
    "easy": "the problem is solved too often to teach much",
    "balance": "too many of its mode",
}
LINT = {"mode": "mode", "too long": "length"}  # the fault of a sample -> its filter; all others: protocol
SampledMode = Literal["thinking", "non-thinking"]
SAMPLED: tuple[SampledMode, ...] = ("thinking", "non-thinking")
NO_VETOES: Mapping[str, float] = MappingProxyType({})


class Answer(NamedTuple):
    """An attempt at a problem. number: the problem's place among those that were asked."""

    number: int
    placed: Placed
    mode: SampledMode
    attempt: Trajectory

    @property
    def own_ids(self) -> tuple[int, ...]:
        """What the model wrote, results of tools left out."""
        return tuple(id for id, own in zip(self.attempt.ids, self.attempt.written, strict=True) if own)

    @property
    def pool(self) -> tuple[str, int, str]:
        return self.placed.family, self.placed.level, self.mode

    def sample(self, thinking: bool | None) -> dict[str, Any]:
        """A line for `sft` (minglm.posttrain.lint.read_samples), with its origin."""
        problem, response = self.placed.problem, self.attempt.response
        line = {"messages": [*problem.messages, *response], "tools": problem.tools, "thinking": thinking}
        # The server opens the thinking where one is asked for: whether to think is the automatic mode's to learn.
        return {**line, "opens_thinking": thinking is True, "family": self.placed.family, "level": self.placed.level}


@dataclass
class Kept:
    """What has passed: answers by mode, those of the automatic mode, and for each filter how many answers it took."""

    answers: dict[SampledMode, list[Answer]]
    automatic: list[Answer]
    took: Counter[str]
    undecided: int = 0  # problems for which the automatic mode has no right answer of the kind that it needs

    def lines(self) -> list[dict[str, Any]]:
        found = [one.sample(mode == "thinking") for mode in SAMPLED for one in self.answers[mode]]
        return found + [one.sample(None) for one in self.automatic]

    def counts(self) -> dict[str, int]:
        """Samples by mode."""
        return {**{mode: len(self.answers[mode]) for mode in SAMPLED}, "automatic": len(self.automatic)}


def repeats(ids: Sequence[int], times: int, tokens: int) -> bool:
    """Whether some tokens stand `times` times in a row or more, and fill `tokens` places at least."""
    stretches = periodic(np.asarray(ids), len(ids) // times)
    # Whole rounds only: of 3 tokens, 16 are filled by the sixth round.
    return any(lengths.max() >= max(times, -(-tokens // period)) * period for period, _, lengths in stretches)


def fault_of(
    answer: Answer, recipe: Harvest, median: float | None, tokenizer: Tokenizer, row: int, vetoes: Mapping[str, float]
) -> str | None:
    """The first of `FILTERS` that drops the answer by itself; None if it may be learnt from. median: tokens of the right ones
    of its pool; row: tokens of the longest sample that `sft` takes; vetoes: sources of rewards, and what each has to give."""
    one = answer.attempt
    if one.verdict is None:
        return "failed"
    if one.end in ("length", "turns"):
        return "truncated"
    if one.end == "malformed":
        return "protocol"
    if not is_right(one):
        return "wrong"
    line = answer.sample(answer.mode == "thinking")
    try:
        lint(Sample(line["messages"], "", line["tools"], line["thinking"]), tokenizer, row)
    except LintError as error:
        return LINT.get(error.fault, "protocol")
    calls = count_calls(one.response, one.problem.tools)
    if calls.succeeded < calls.made:
        return "call"
    if repeats(answer.own_ids, recipe.repeats, recipe.repeated_tokens):
        return "repetition"
    if median is not None and one.length > recipe.times_median * median:
        return "length"
    wanted = {**vetoes, "model": max(recipe.score, vetoes.get("model", 0.0))}
    return "score" if any(one.parts.get(source, 1.0) < least for source, least in wanted.items()) else None


def choose(
    answers: Sequence[Answer], recipe: Harvest, tokenizer: Tokenizer, row: int, vetoes: Mapping[str, float] = NO_VETOES
) -> Kept:
    """From the attempts at a domain's problems those that are learnt from; arguments as those of `fault_of`."""
    lengths: dict[tuple, list[int]] = {}
    for one in answers:
        if is_right(one.attempt):
            lengths.setdefault(one.pool, []).append(one.attempt.length)
    medians = {pool: statistics.median(own) for pool, own in lengths.items()}
    lucky = guessed(answers)
    took: Counter[str] = Counter()
    sound: dict[int, dict[SampledMode, list[Answer]]] = {}
    for one in answers:
        fault = fault_of(one, recipe, medians.get(one.pool), tokenizer, row, vetoes)
        own = sound.setdefault(one.number, {mode: [] for mode in SAMPLED})[one.mode]
        if fault is None and one.pool in lucky:
            fault = "luck"
        if fault is None and any(one.attempt.response == other.attempt.response for other in own):
            fault = "duplicate"
        if fault is None:
            own.append(one)
        else:
            took[fault] += 1
    kept = Kept({mode: [] for mode in SAMPLED}, [], took)
    _choose_automatic(kept, answers, sound, recipe)
    _choose_by_difficulty(kept, answers, sound, recipe)
    _balance(kept, recipe)
    return kept


def guessed(answers: Iterable[Answer]) -> set[tuple[str, int, str]]:
    """The pools (family, difficulty and mode) in which the share of right attempts is within two standard errors of what
    guessing gives, or below: a right answer there says nothing of how it was found, and an expert that has forgotten how would
    teach just that."""
    found: dict[tuple, list[tuple[bool, float]]] = {}
    for one in answers:
        if one.attempt.verdict is not None:
            found.setdefault(one.pool, []).append((is_right(one.attempt), one.placed.problem.chance))
    lucky = set()
    for pool, own in found.items():
        right, chance = map(statistics.fmean, zip(*own, strict=True))
        if right <= chance + 2 * sqrt(chance * (1 - chance) / len(own)):
            lucky.add(pool)
    return lucky


def pass_rates(answers: Iterable[Answer]) -> dict[int, float]:
    """Of each problem, by its number: the share of right attempts among those that have a verdict."""
    found: dict[int, list[bool]] = {}
    for one in answers:
        if one.attempt.verdict is not None:
            found.setdefault(one.number, []).append(is_right(one.attempt))
    return {number: statistics.fmean(own) for number, own in found.items()}


def _choose_automatic(kept: Kept, answers: Sequence[Answer], sound: Mapping, recipe: Harvest) -> None:
    """One sample of each problem: at once where answers without thinking are likely right, or thinking is no better."""
    at_once, thinking = (pass_rates(one for one in answers if one.mode == mode) for mode in ("non-thinking", "thinking"))
    for number, own in sound.items():
        enough = min(recipe.at_once, thinking.get(number, 0.0))
        mode = "non-thinking" if at_once.get(number, 0.0) >= enough else "thinking"
        kept.automatic += own[mode][:1]
        kept.undecided += not own[mode]


def _choose_by_difficulty(kept: Kept, answers: Sequence[Answer], sound: Mapping, recipe: Harvest) -> None:
    """Hard problems first; of problems solved equally often, those with longer answers."""
    rates = pass_rates(answers)

    def ease(number: int) -> tuple[float, float, int]:
        lengths = [one.attempt.length for own in sound[number].values() for one in own]
        return rates[number], -statistics.fmean(lengths), number

    ranked = sorted((number for number, own in sound.items() if any(own.values())), key=ease)
    easy = round(recipe.easy_share * len(ranked))
    dropped = easy - round(recipe.easy_kept * easy)
    for place, number in enumerate(ranked):
        from_the_easiest = len(ranked) - 1 - place
        most = 0 if from_the_easiest < dropped else 1 if from_the_easiest < easy else recipe.kept
        for mode in SAMPLED:
            own = sound[number][mode]
            kept.answers[mode] += own[:most]
            kept.took["surplus" if most else "easy"] += len(own[most:])


def _balance(kept: Kept, recipe: Harvest) -> None:
    """The easiest problems' answers of a mode go where it has too many; against a mode without any nothing is balanced."""
    fewest = min(map(len, kept.answers.values()))
    for mode in SAMPLED if fewest else ():
        most = int(recipe.balance * fewest)
        kept.took["balance"] += len(kept.answers[mode][most:])
        del kept.answers[mode][most:]
