"""Expressions with parentheses and precedence, carried out one operation a line."""

import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.reasoning.exact import Number
from minglm.tasks.reasoning.formula import Formula, Operation, calculate, read, steps, value, written

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
        return cls(rng.randrange(len(WORDINGS)), written(_draw(rng, difficulty + 1)[0]))

    @property
    def question(self) -> str:
        return WORDINGS[self.wording].format(self.expression)

    @property
    def value(self) -> int:
        return value(read(self.expression))

    @property
    def guesses(self) -> range:
        return range(-LARGEST, LARGEST + 1)

    @property
    def thinking(self) -> str:
        return "\n".join([self.expression, *(f"= {step}" for step in steps(read(self.expression)))])


def _draw(rng: random.Random, operations: int) -> tuple[Formula, int]:
    """A formula, all of whose parts are whole numbers of at most `LARGEST`, and its value."""
    if operations == 0:
        number = rng.randint(1, 9)
        return number, number
    while True:
        before = rng.randrange(operations)
        operator = rng.choice("+-*/" if operations > 2 else "+-*")
        (left, left_value), (right, right_value) = _draw(rng, before), _draw(rng, operations - 1 - before)
        if operator == "/" and (right_value == 0 or left_value % right_value):
            continue
        result = calculate(operator, left_value, right_value)
        if abs(result) <= LARGEST:
            return Operation(left, operator, right), result
