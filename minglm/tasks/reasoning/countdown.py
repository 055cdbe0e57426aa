"""Countdown: reach a number with given numbers and operations. Any formula that does it is right."""

import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from minglm.tasks.reasoning.exact import only_content
from minglm.tasks.reasoning.formula import (
    Formula,
    FormulaError,
    Operation,
    calculate,
    numbers,
    operators,
    read,
    value,
    written,
)
from minglm.tasks.task import Message, Problem, Verdict, reply

LARGEST = 200
SHOWN_TRIES = 4


class Size(NamedTuple):
    how_many: int
    largest: int
    operators: str


LADDER = (
    Size(2, 9, "+-"),
    Size(2, 9, "+-*"),
    Size(3, 9, "+-"),
    Size(3, 9, "+-*"),
    Size(4, 9, "+-*"),
    Size(4, 25, "+-*/"),
    Size(5, 25, "+-*/"),
    Size(6, 50, "+-*/"),
)
WORDINGS = ("Make {} from {}. Use each number once, and {}.", "Use {1} once each, and {2}, to make {0}.")


@dataclass(frozen=True)
class Countdown(Problem):
    """Difficulty is how many numbers there are, from two to six, and how many operations are allowed."""

    family = "countdown"
    stands_for = "Search in synthetic reasoning data (section 2.3) and reasoning RL with verifiable answers (section 3.2)."
    difficulties = range(1, len(LADDER) + 1)

    wording: int
    numbers: tuple[int, ...]
    operators: str
    target: int
    solution: str
    """A formula that is right: the one by which the problem was made."""

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        size = LADDER[difficulty - 1]
        while True:
            given = [rng.randint(1, size.largest) for _ in range(size.how_many)]
            drawn = _draw(rng, given, size.operators)
            if drawn is not None and drawn[1] > 0:
                break
        formula, target = drawn
        return cls(rng.randrange(len(WORDINGS)), tuple(given), size.operators, target, written(formula))

    @property
    def key(self) -> str:
        return json.dumps([self.family, sorted(self.numbers), self.operators, self.target])

    @property
    def messages(self) -> list[Message]:
        listed, allowed = " ".join(map(str, self.numbers)), " ".join(self.operators)
        return [{"role": "user", "content": WORDINGS[self.wording].format(self.target, listed, allowed)}]

    def demonstrate(self, thinking: bool) -> list[Message]:
        return reply(self.solution, self._thinking() if thinking else None)

    def _thinking(self) -> str:
        """Tries that miss, then the one that hits: what a search looks like, cut to a few lines."""
        rng = random.Random(self.key)
        misses = []
        for _ in range(min(SHOWN_TRIES, len(self.numbers))):
            drawn = _draw(rng, self.numbers, self.operators)
            if drawn is not None and drawn[1] != self.target:
                misses.append(f"{written(drawn[0])} = {drawn[1]}, no")
        return "\n".join([*dict.fromkeys(misses), f"{self.solution} = {self.target}, yes"])

    def verify(self, response: Sequence[Message]) -> Verdict:
        content = only_content(response)
        if content is None:
            return Verdict(0.0, ("wanted one message of the assistant with a formula as its content",))
        try:
            formula = read(content)
            reached = value(formula)
        except FormulaError as error:
            return Verdict(0.0, (f"no formula with a value: {error}",))
        reasons = []
        if sorted(numbers(formula)) != sorted(self.numbers):
            reasons.append(f"the numbers used are {numbers(formula)}; wanted each of {list(self.numbers)} once")
        if other := sorted(set(operators(formula)) - set(self.operators)):
            reasons.append(f"it uses {' '.join(other)}; allowed are {' '.join(self.operators)}")
        if reached != self.target:
            reasons.append(f"its value is {short(reached)}; wanted {self.target}")
        return Verdict(0.0 if reasons else 1.0, tuple(reasons))

    def near_miss(self, rng: random.Random) -> list[Message]:
        """The right numbers and another value; or, where no order of them misses, one number too many."""
        for _ in range(20):
            drawn = _draw(rng, self.numbers, self.operators)
            if drawn is not None and drawn[1] != self.target:
                return reply(written(drawn[0]))
        return reply(f"{self.solution} + 1")

    def guess(self, rng: random.Random) -> list[Message]:
        """The numbers as they come, with any operations between."""
        return reply(_chained(self.numbers, [rng.choice(self.operators) for _ in self.numbers[1:]]))

    @property
    def chance(self) -> float:
        choices = list(itertools.product(self.operators, repeat=len(self.numbers) - 1))
        return sum(self._hits(choice) for choice in choices) / len(choices)

    def _hits(self, choice: Sequence[str]) -> bool:
        """Whether the chain reaches the target: in floating point, which is quick and far more exact than needed here."""
        sums, product = [], float(self.numbers[0])
        for operator, number in zip(choice, self.numbers[1:], strict=True):
            if operator in "*/":
                product = product * number if operator == "*" else product / number
            else:
                sums.append(product)
                product = float(number if operator == "+" else -number)
        return math.isclose(sum(sums) + product, self.target, rel_tol=0, abs_tol=1e-9)


def short(number: object) -> str:
    text = str(number)
    return text if len(text) <= 40 else text[:40] + "..."


def _chained(given: Sequence[int], between: Sequence[str]) -> str:
    return " ".join([str(given[0]), *(f"{operator} {number}" for operator, number in zip(between, given[1:], strict=True))])


def _draw(rng: random.Random, given: Sequence[int], allowed: str) -> tuple[Formula, int] | None:
    """A formula of the numbers in some order, all of whose parts are whole numbers from 0 to `LARGEST`, and its value; None
    if the draw has led nowhere."""
    parts: list[tuple[Formula, int]] = [(number, number) for number in given]
    while len(parts) > 1:
        (left, left_value), (right, right_value) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        operator = rng.choice(allowed)
        if operator == "/" and (right_value == 0 or left_value % right_value):
            operator = "-"
        if operator == "-" and left_value < right_value:
            left, left_value, right, right_value = right, right_value, left, left_value
        result = calculate(operator, left_value, right_value)
        if result > LARGEST:
            return None
        parts.append((Operation(left, operator, right), result))
    return parts[0]
