"""Word problems of science: the words say which quantities are given and which one is asked for; a formula is chosen by
them, solved, and chained with the next. All quantities are whole numbers in the units that the formulas want.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple, Self

from minglm.tasks.reasoning.exact import Number


class Formula(NamedTuple):
    """product = one * other, each the name of a quantity."""

    product: str
    one: str
    other: str


class Quantity(NamedTuple):
    unit: str
    told: str
    """What has it, with this value."""
    asked: str


QUANTITIES = {
    "distance": Quantity("m", "moves {} m", "How far does it move"),
    "speed": Quantity("m/s", "goes at {} m/s", "How fast does it go"),
    "time": Quantity("s", "takes {} s", "How long does it take"),
    "mass": Quantity("kg", "weighs {} kg", "How much does it weigh"),
    "acceleration": Quantity("m/s2", "speeds up by {} m/s2", "How much does it speed up"),
    "force": Quantity("N", "pushes with {} N", "How hard does it push"),
    "work": Quantity("J", "does {} J of work", "How much work does it do"),
    "power": Quantity("W", "runs at {} W", "How much power does it have"),
    "voltage": Quantity("V", "is at {} V", "What is its voltage"),
    "current": Quantity("A", "carries {} A", "How much current does it carry"),
    "resistance": Quantity("ohm", "resists with {} ohm", "What is its resistance"),
    "density": Quantity("kg/m3", "is as dense as {} kg/m3", "How dense is it"),
    "volume": Quantity("m3", "fills {} m3", "How much room does it fill"),
    "pressure": Quantity("Pa", "presses with {} Pa", "What is its pressure"),
    "area": Quantity("m2", "covers {} m2", "How much ground does it cover"),
    "momentum": Quantity("kg m/s", "has a momentum of {} kg m/s", "What is its momentum"),
    "charge": Quantity("C", "holds {} C", "How much charge does it hold"),
    "height": Quantity("m", "is {} m high", "How high is it"),
}

FORMULAS = (
    Formula("distance", "speed", "time"),
    Formula("speed", "acceleration", "time"),
    Formula("force", "mass", "acceleration"),
    Formula("work", "force", "distance"),
    Formula("work", "power", "time"),
    Formula("voltage", "current", "resistance"),
    Formula("power", "voltage", "current"),
    Formula("mass", "density", "volume"),
    Formula("force", "pressure", "area"),
    Formula("momentum", "mass", "speed"),
    Formula("charge", "current", "time"),
    Formula("volume", "area", "height"),
)
THINGS = ("A body", "A machine", "An engine", "A device")
LARGEST = 12


class Step(NamedTuple):
    """One use of a formula."""

    formula: Formula
    asked: str
    """Which of its quantities comes out."""


@dataclass(frozen=True)
class Science(Number):
    """Difficulty d chains formulas: one product at 1, one formula solved for any quantity at 2, then two, three and four
    formulas, each of which takes up the result of the one before."""

    family = "science"
    stands_for = "Science in pre-training and in synthetic reasoning data (sections 2.2, 2.3); GPQA at school level."
    difficulties = range(1, 6)

    given: tuple[tuple[str, int], ...]
    """Quantities and their values, as they are told."""
    steps: tuple[Step, ...]

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        while True:
            drawn = _draw(rng, max(1, difficulty - 1), products_only=difficulty == 1)
            if drawn is not None:
                given, steps = drawn
                return cls(rng.randrange(len(THINGS)), given, steps)

    @property
    def question(self) -> str:
        *first, last = [QUANTITIES[quantity].told.format(value) for quantity, value in self.given]
        asked = QUANTITIES[self.steps[-1].asked]
        return f"{THINGS[self.wording]} {', '.join(first)} and {last}. {asked.asked}, in {asked.unit}?"

    @property
    def value(self) -> int:
        return _known(self)[self.steps[-1].asked]

    @property
    def guesses(self) -> range:
        return range(1, LARGEST ** (len(self.steps) + 1) + 1)

    @property
    def thinking(self) -> str:
        known, lines = dict(self.given), []
        for formula, asked in self.steps:
            known[asked] = solved(formula, asked, known)
            if asked == formula.product:
                lines.append(f"{asked} = {formula.one} * {formula.other}")
                lines.append(f"= {known[formula.one]} * {known[formula.other]} = {known[asked]}")
            else:
                other = formula.other if asked == formula.one else formula.one
                lines.append(f"{asked} = {formula.product} / {other}")
                lines.append(f"= {known[formula.product]} / {known[other]} = {known[asked]}")
        return "\n".join(lines)


def _known(problem: Science) -> dict[str, int]:
    known = dict(problem.given)
    for formula, asked in problem.steps:
        known[asked] = solved(formula, asked, known)
    return known


def solved(formula: Formula, asked: str, known: dict[str, int]) -> int:
    """The asked quantity from the two others, which are known and make it whole."""
    if asked == formula.product:
        return known[formula.one] * known[formula.other]
    return known[formula.product] // known[formula.other if asked == formula.one else formula.one]


def _draw(rng: random.Random, length: int, products_only: bool) -> tuple[tuple[tuple[str, int], ...], tuple[Step, ...]] | None:
    """A chain of formulas with values; None if this draw cannot go on. No quantity stands in it twice."""
    known: dict[str, int] = {}
    given: list[tuple[str, int]] = []
    steps: list[Step] = []
    while len(steps) < length:
        last = steps[-1].asked if steps else None
        fitting = [formula for formula in FORMULAS if _fits(formula, last, known)]
        if not fitting:
            return None
        formula = rng.choice(fitting)
        asked = formula.product if products_only else rng.choice([quantity for quantity in formula if quantity != last])
        new = [quantity for quantity in formula if quantity not in (asked, last)]
        known |= {quantity: rng.randint(2, LARGEST) for quantity in new}
        if asked != formula.product and not _made_whole(rng, formula, asked, last, known):
            return None
        given += [(quantity, known[quantity]) for quantity in new]
        known[asked] = solved(formula, asked, known)
        steps.append(Step(formula, asked))
    return tuple(sorted(given)), tuple(steps)  # an order that says nothing of the formulas


def _fits(formula: Formula, last: str | None, known: dict[str, int]) -> bool:
    """Whether a formula takes up the last result, and nothing else that is known."""
    return all((quantity == last) == (quantity in known) for quantity in formula) and (last is None or last in formula)


def _made_whole(rng: random.Random, formula: Formula, asked: str, last: str | None, known: dict[str, int]) -> bool:
    """Change what is new so that the quotient is whole; False if that cannot be."""
    divisor = formula.other if asked == formula.one else formula.one
    if last != formula.product:
        known[formula.product] = known[divisor] * rng.randint(2, LARGEST)
        return True
    divisors = [number for number in range(2, LARGEST + 1) if known[last] % number == 0 and number < known[last]]
    if not divisors:
        return False
    known[divisor] = rng.choice(divisors)
    return True
