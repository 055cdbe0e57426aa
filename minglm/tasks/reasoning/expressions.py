"""Expressions with parentheses and precedence, carried out one operation a line."""

import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

from minglm.tasks.reasoning.exact import Number
from minglm.tasks.reasoning.formula import Formula, Operation, numbers, read, steps, value, written

LARGEST = 200
WORDINGS = ("What is {}?", "Calculate {}.", "Simplify {}.", "Evaluate {}.")


@dataclass(frozen=True)
class Expressions(Number):
    """Difficulty d has d + 1 operations on numbers from 1 to 9; no value on the way is larger than 200."""

    family = "expressions"
    stands_for = "Mathematics in pre-training and in synthetic reasoning data (sections 2.2, 2.3); MATH's prealgebra."
    difficulties = range(1, 9)

    expression: str

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        return cls(rng.randrange(len(WORDINGS)), written(_draw(rng, difficulty + 1)))

    @property
    def question(self) -> str:
        return WORDINGS[self.wording].format(self.expression)

    @property
    def value(self) -> int:
        return int(value(read(self.expression)))

    @property
    def guesses(self) -> range:
        return range(-LARGEST, LARGEST + 1)

    @property
    def thinking(self) -> str:
        return "\n".join([self.expression, *(f"= {step}" for step in steps(read(self.expression)))])


def _draw(rng: random.Random, operations: int) -> Formula:
    """A formula whose parts are all whole numbers of at most `LARGEST`."""
    if operations == 0:
        return rng.randint(1, 9)
    while True:
        left = rng.randrange(operations)
        formula = Operation(
            _draw(rng, left), rng.choice("+-*/" if operations > 2 else "+-*"), _draw(rng, operations - 1 - left)
        )
        if formula.operator == "/" and value(formula.right) == 0:
            continue
        result: Fraction = value(formula)
        if result.denominator == 1 and abs(result) <= LARGEST and len(numbers(formula)) == operations + 1:
            return formula
