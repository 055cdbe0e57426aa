"""Units: from one to another, and quantities given in two of them. All answers are whole numbers."""

import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.reasoning.exact import Number

CHAINS: tuple[tuple[tuple[str, int], ...], ...] = (
    # From large to small; the number says how many of the unit make one of the unit before.
    (("weeks", 1), ("days", 7), ("hours", 24), ("minutes", 60), ("seconds", 60)),
    (("kilometres", 1), ("metres", 1000), ("centimetres", 100), ("millimetres", 10)),
    (("tonnes", 1), ("kilograms", 1000), ("grams", 1000)),
    (("litres", 1), ("decilitres", 10), ("centilitres", 10), ("millilitres", 10)),
    (("pounds", 1), ("ounces", 16)),
    (("yards", 1), ("feet", 3), ("inches", 12)),
)
WORDINGS = ("How many {1} are {0}?", "Convert {0} to {1}.", "{0} = how many {1}?")
LARGEST_AMOUNT = 12


@dataclass(frozen=True)
class Units(Number):
    """Difficulty is the number of steps: one unit down; one up; two amounts into the smaller unit; two units down; two
    amounts that are two or three units apart; and the sum of two such."""

    family = "units"
    stands_for = "Reasoning on units in synthetic reasoning data (section 2.3); GSM8K's conversions."
    difficulties = range(1, 7)

    amounts: tuple[tuple[int, str], ...]
    """All of one chain; summed up they are the question."""
    unit: str
    """What is asked for."""

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        steps = {1: 1, 2: 1, 3: 1, 4: 2}.get(difficulty) or rng.randint(2, 3)
        chain = rng.choice([chain for chain in CHAINS if len(chain) > steps])
        top = rng.randrange(len(chain) - steps)
        large, small = chain[top][0], chain[top + steps][0]
        factor = in_one(large, small)
        amounts = [(rng.randint(2, LARGEST_AMOUNT), large)]
        if difficulty == 2:
            return cls(rng.randrange(3), ((amounts[0][0] * factor, small),), large)
        if difficulty in (3, 5, 6):
            amounts.append((rng.randint(2, min(factor - 1, 99)), small))
        if difficulty == 6:
            amounts.append((rng.randint(2, min(chain[top + 1][1] - 1, 99)), chain[top + 1][0]))
        return cls(rng.randrange(3), tuple(amounts), small)

    @property
    def question(self) -> str:
        *first, last = [f"{amount} {unit}" for amount, unit in self.amounts]
        told = f"{', '.join(first)} and {last}" if first else last
        return WORDINGS[self.wording].format(told, self.unit)

    @property
    def value(self) -> int:
        return sum(_converted(amount, unit, self.unit) for amount, unit in self.amounts)

    @property
    def guesses(self) -> range:
        """Up to what the form allows: amounts of smaller units are each less than one of the first, largest unit."""
        unit = self.amounts[0][1]
        names = [name for name, _ in _chain_of(unit)]
        if names.index(unit) > names.index(self.unit):
            return range(1, LARGEST_AMOUNT + 1)
        return range(1, (LARGEST_AMOUNT + len(self.amounts) - 1) * in_one(unit, self.unit) + 1)

    @property
    def thinking(self) -> str:
        lines, total = [], None
        for amount, unit in self.amounts:
            lines += _worked(amount, unit, self.unit)
            converted = _converted(amount, unit, self.unit)
            if total is not None:
                lines.append(f"{total} + {converted} = {total + converted}")
            total = converted if total is None else total + converted
        return "\n".join(lines)


def _chain_of(unit: str) -> tuple[tuple[str, int], ...]:
    return next(chain for chain in CHAINS if any(name == unit for name, _ in chain))


def in_one(large: str, small: str) -> int:
    """How many of the small unit make one of the large unit."""
    names = [name for name, _ in _chain_of(large)]
    factor = 1
    for _, number in _chain_of(large)[names.index(large) + 1 : names.index(small) + 1]:
        factor *= number
    return factor


def _converted(amount: int, unit: str, into: str) -> int:
    names = [name for name, _ in _chain_of(unit)]
    return amount * in_one(unit, into) if names.index(unit) <= names.index(into) else amount // in_one(into, unit)


def _worked(amount: int, unit: str, into: str) -> list[str]:
    """A line for each unit on the way."""
    chain = _chain_of(unit)
    names = [name for name, _ in chain]
    start, end = names.index(unit), names.index(into)
    if start > end:
        factor = in_one(into, unit)
        return [f"{amount} / {factor} = {amount // factor}"]
    lines = []
    for name, factor in chain[start + 1 : end + 1]:
        lines.append(f"{amount} * {factor} = {amount * factor} {name}")
        amount *= factor
    return lines
