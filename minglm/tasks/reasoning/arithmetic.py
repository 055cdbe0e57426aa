"""Sums, differences and products of whole numbers, worked in columns as at school."""

import random
from dataclasses import dataclass
from typing import NamedTuple, Self

from minglm.tasks.reasoning.exact import Number


class Size(NamedTuple):
    """Which calculations a difficulty asks for: the operator, and the digits of both numbers."""

    operator: str
    digits: int
    other_digits: int


# Larger numbers take more columns; a product takes a line for each pair of digits.
LADDER: tuple[tuple[Size, ...], ...] = (
    (Size("+", 1, 1),),
    (Size("+", 2, 1), Size("-", 2, 1)),
    (Size("+", 2, 2), Size("-", 2, 2), Size("*", 1, 1)),
    (Size("+", 3, 3), Size("-", 3, 3), Size("*", 2, 1)),
    (Size("+", 4, 4), Size("-", 4, 4), Size("*", 2, 2)),
    (Size("+", 5, 5), Size("-", 5, 5), Size("*", 3, 2)),
    (Size("+", 7, 7), Size("-", 7, 7), Size("*", 3, 3)),
    (Size("+", 9, 9), Size("-", 9, 9), Size("*", 4, 3)),
)

WORDINGS = ("What is {}?", "Calculate {}.", "Work out {}.", "{} = ?")


@dataclass(frozen=True)
class Arithmetic(Number):
    """Difficulty is the number of columns: from one-digit sums to sums of nine digits and products of four by three."""

    family = "arithmetic"
    stands_for = "Mathematics in pre-training and in synthetic reasoning data (sections 2.2, 2.3); MATH's smallest steps."
    difficulties = range(1, len(LADDER) + 1)

    left: int
    operator: str
    right: int

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        size = rng.choice(LADDER[difficulty - 1])
        left, right = _draw(rng, size.digits), _draw(rng, size.other_digits)
        if size.operator == "-" and left < right and difficulty < 4:  # no negative numbers yet
            left, right = right, left
        return cls(rng.randrange(len(WORDINGS)), left, size.operator, right)

    @property
    def question(self) -> str:
        return WORDINGS[self.wording].format(f"{self.left} {self.operator} {self.right}")

    @property
    def value(self) -> int:
        match self.operator:
            case "+":
                return self.left + self.right
            case "-":
                return self.left - self.right
            case _:
                return self.left * self.right

    @property
    def guesses(self) -> range:
        most, other = 10 ** len(str(self.left)) - 1, 10 ** len(str(self.right)) - 1
        match self.operator:
            case "+":
                return range(most + other + 1)
            case "-":
                return range(-other, most + 1)
            case _:
                return range(most * other + 1)

    @property
    def thinking(self) -> str:
        match self.operator:
            case "+":
                return "\n".join(added(self.left, self.right))
            case "-":
                return "\n".join(subtracted(self.left, self.right))
            case _:
                return "\n".join(multiplied(self.left, self.right))


def _draw(rng: random.Random, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def added(left: int, right: int) -> list[str]:
    """Columns from the right; after the arrow, what is written so far."""
    lines, written, carry = [], "", 0
    for place in range(max(len(str(left)), len(str(right)))):
        a, b = left // 10**place % 10, right // 10**place % 10
        total = a + b + carry
        last = 10 ** (place + 1) > max(left, right)
        written = (str(total) if last else str(total % 10)) + written
        lines.append(f"{a} + {b}{f' + {carry}' if carry else ''} = {total} -> {written}")
        carry = total // 10
    return lines


def subtracted(left: int, right: int) -> list[str]:
    """Columns from the right, the smaller number from the larger one; a column below zero borrows ten."""
    if left < right:
        return [f"{left} < {right}", *subtracted(right, left), f"{left} - {right} = {left - right}"]
    lines, written, borrowed = [], "", 0
    for place in range(len(str(left))):
        a, b = left // 10**place % 10, right // 10**place % 10
        digit = a - b - borrowed
        step = f"{a} - {b}{' - 1' if borrowed else ''}"
        borrowed = int(digit < 0)
        written = str(digit % 10) + written
        lines.append(f"{f'10 + {step}' if borrowed else step} = {digit % 10} -> {written}")
    if written != str(left - right):
        lines.append(str(left - right))
    return lines


def multiplied(left: int, right: int) -> list[str]:
    """Each digit times each digit, with its zeros, and the total so far."""
    lines, total = [], 0
    for a in _places(left):
        for b in _places(right):
            line = f"{a} * {b} = {a * b}"
            lines.append(f"{line}, {total} + {a * b} = {total + a * b}" if lines else line)
            total += a * b
    return lines


def _places(number: int) -> list[int]:
    """The number as a sum of digits with zeros: 305 is 300 + 5."""
    text = str(number)
    parts = [int(digit) * 10 ** (len(text) - 1 - place) for place, digit in enumerate(text)]
    return [part for part in parts if part] or [0]
