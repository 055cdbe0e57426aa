"""What an iteration is to show, as numbers from the exams and what is wanted of them: experts beat the common start, one model
reaches them all, thinking pays where it is hard and the automatic mode saves tokens, RL and a second round help, calls succeed.

Two models, or two modes, are compared problem by problem, in single attempts at the same problems.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from minglm.chat import MODES
from minglm.evals.interval import Estimate, mean, ratio
from minglm.posttrain.experts.exam import Sat, call_success, difference, rewards
from minglm.posttrain.experts.recipe import ExpertsRecipe

GLM_TOOL_SUCCESS = 0.906
"""GLM-4.5's own share of calls that succeed, on its own tasks of a coding agent (report, section 4): another world."""
WITHIN = 0.03
"""Of an expert's reward the unified model may lack."""
AUTOMATIC_WITHIN, AUTOMATIC_TOKENS = 0.02, 0.6
"""What the automatic mode may lack of the reward of always thinking, and the part of its tokens that it may take."""

VERDICTS = "shown: the whole 95% interval is as wanted; likely: the number is; missed: it is not."
COLUMNS = ("", "measured", "wanted", "")

Wanted = Literal["above", "at least", "at most"]
FITS: Mapping[Wanted, Callable[[float, float], bool]] = {
    "above": lambda value, bound: value > bound,
    "at least": lambda value, bound: value >= bound,
    "at most": lambda value, bound: value <= bound,
}


class Claim(NamedTuple):
    """measured: with its 95% interval, over problems, or over seeds."""

    text: str
    measured: Estimate
    wanted: Wanted
    bound: float

    @property
    def verdict(self) -> str:
        """shown: the whole interval fits; likely: the number alone does; missed: it does not."""
        fits, one = FITS[self.wanted], self.measured
        if not fits(one.value, self.bound):
            return "missed"
        ends = (one.low, one.high)
        return "shown" if all(end is not None and fits(end, self.bound) for end in ends) else "likely"

    @property
    def row(self) -> list[str]:
        """Of a table with `COLUMNS`."""
        return [self.text, self.measured.text(), f"{self.wanted} {self.bound:g}", self.verdict]

    @property
    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return {"measured": self.measured.numbers, "wanted": self.wanted, "bound": self.bound, "verdict": self.verdict}


def claims(recipe: ExpertsRecipe, sat: Mapping[str, Sequence[Sat]], kept: int) -> list[Claim]:
    """Those that the exams say something on. sat: the exam of each model by name, as `pipeline.sit_exams` gives them; kept: the
    round whose model is the last one."""
    found = _measured(recipe, sat, kept)
    return [Claim(text, measured, wanted, bound) for text, measured, wanted, bound in found if measured]


def _measured(
    recipe: ExpertsRecipe, sat: Mapping[str, Sequence[Sat]], kept: int
) -> Iterator[tuple[str, Estimate | None, Wanted, float]]:
    start, last, domain_of = sat["start"], sat[f"unified-{kept}-rl"], recipe.domain_of

    def practised(domain: str, model: Sequence[Sat]) -> list[Sat]:
        modes = recipe.experts[domain].sampling.modes
        return [one for one in model if one.mode in modes and domain_of[one.family] == domain]

    for domain in recipe.experts:
        gain = _gain(*(practised(domain, one) for one in (start, sat[f"expert-{domain}"])))
        yield f"expert of {domain}, less the common start, in the modes that it practises", gain, "above", 0.0
    for domain in recipe.experts:
        gain = _gain(*(practised(domain, one) for one in (sat[f"expert-{domain}"], last)))
        yield f"unified model, less the expert of {domain}, there", gain, "at least", -WITHIN
    thinking, at_once, automatic = ([one for one in last if one.mode == mode] for mode in MODES)
    hard = hard_half(start)
    hard_thinking, hard_at_once = ([one for one in own if (one.family, one.level) in hard] for own in (thinking, at_once))
    yield "thinking, less answering at once, on the harder half", _gain(hard_at_once, hard_thinking), "above", 0.0
    spent = _tokens(hard_at_once, hard_thinking)
    yield "tokens of answering at once, over those of thinking, there", spent, "at most", 1.0
    yield "automatic mode, less always thinking", _gain(thinking, automatic), "at least", -AUTOMATIC_WITHIN
    saved = _tokens(automatic, thinking)
    yield "tokens of the automatic mode, over those of always thinking", saved, "at most", AUTOMATIC_TOKENS
    yield "after RL on the unified model, less before it", _gain(sat[f"unified-{kept}"], last), "above", 0.0
    if recipe.rounds > 1 and recipe.regenerated:
        first, second = (
            [one for one in sat[f"unified-{number}-rl"] if domain_of[one.family] in recipe.regenerated] for number in (1, 2)
        )
        yield "second round, less the first, in what was answered anew", _gain(first, second), "above", 0.0
    calls = call_success(last)
    succeeded = Estimate(*calls["success"], count=calls["made"]) if calls else None
    yield "calls of tools that succeed, in all modes", succeeded, "at least", GLM_TOOL_SUCCESS


def _gain(before: Sequence[Sat], after: Sequence[Sat]) -> Estimate | None:
    """None where no problem has a verdict twice."""
    both = any(old.reward is not None and new.reward is not None for old, new in zip(before, after, strict=True))
    return difference(before, after) if both else None


def _tokens(some: Sequence[Sat], others: Sequence[Sat]) -> Estimate | None:
    numbers = ([one.tokens for one in own] for own in (some, others))
    return ratio(*numbers) if sum(one.tokens for one in others) else None


def hard_half(sat: Sequence[Sat]) -> set[tuple[str, int]]:
    """The harder half of the pools."""
    ranked = easiest_first(sat)
    return set(ranked[len(ranked) // 2 :])


def easiest_first(sat: Sequence[Sat]) -> list[tuple[str, int]]:
    """The pools, families with a difficulty, those first that are solved most often, in all modes together: by another model
    than the one that is judged there, for else its bad luck would count as difficulty."""
    pools = by_pool(sat)
    return sorted(pools, key=lambda pool: statistics.fmean(rewards(pools[pool]) or [0.0]), reverse=True)


def by_pool(sat: Sequence[Sat]) -> dict[tuple[str, int], list[Sat]]:
    """The attempts of each family and difficulty."""
    pools: dict[tuple[str, int], list[Sat]] = {}
    for one in sat:
        pools.setdefault((one.family, one.level), []).append(one)
    return pools


def claims_of(found: Mapping[str, Mapping[str, Any]]) -> list[Claim]:
    """Back from text -> `Claim.numbers`."""
    return [Claim(text, Estimate(*one["measured"], count=0), one["wanted"], one["bound"]) for text, one in found.items()]


def over_seeds(found: Sequence[Sequence[Claim]]) -> list[Claim]:
    """The means over the iterations of several seeds, with Student's intervals, of what all of them say something on."""
    measured = [{one.text: one.measured.value for one in own} for own in found]
    return [
        one._replace(measured=mean([own[one.text] for own in measured]))
        for one in found[0]
        if all(one.text in own for own in measured)
    ]


def claims_table(found: Sequence[Claim]) -> str:
    """Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(one.row for one in found)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
