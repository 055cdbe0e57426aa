"""Linear equations, solved by doing the same to both sides, a line each."""

import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.reasoning.exact import Number

LARGEST = 12
LARGEST_PAIR = 9
WORDINGS = ("Solve {} for {}.", "If {}, what is {}?", "Find {1} in {0}.")


@dataclass(frozen=True)
class LinearEquations(Number):
    """Difficulty is the number of steps: one (x + b = c; a x = c), two, three (x on both sides), four (parentheses), and
    then two equations with two unknowns, one of which is asked for.

    The left side is first[0] * x + first[1], and so on; see `_equation`.
    """

    family = "linear_equations"
    stands_for = "Mathematics in pre-training and in synthetic reasoning data (sections 2.2, 2.3); MATH's algebra."
    difficulties = range(1, 8)

    difficulty: int
    x: int
    y: int
    """The second unknown of the last two difficulties; 0 before."""
    factors: tuple[int, ...]

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        wording = rng.randrange(len(WORDINGS))
        if difficulty >= 6:
            x, y = (rng.randint(-LARGEST_PAIR, LARGEST_PAIR) for _ in range(2))
            return cls(wording, difficulty, x, y, _draw_pair(rng, difficulty))
        x = rng.randint(0 if difficulty < 3 else -LARGEST, LARGEST)
        a = rng.randint(2, 9)
        b = _not_zero(rng, 1 if difficulty == 1 else -9)
        c = rng.choice([factor for factor in range(2, 9) if factor != a])
        return cls(wording, difficulty, x, 0, {1: (b,), 2: (a,), 3: (a, b), 4: (a, b, c), 5: (a, b, c)}[difficulty])

    @property
    def value(self) -> int:
        return self.x

    @property
    def guesses(self) -> range:
        if self.difficulty >= 6:
            return range(-LARGEST_PAIR, LARGEST_PAIR + 1)
        return range(0 if self.difficulty < 3 else -LARGEST, LARGEST + 1)

    @property
    def question(self) -> str:
        return WORDINGS[self.wording].format(self._equation(), "x")

    def _equation(self) -> str:
        x, factors = self.x, self.factors
        match self.difficulty:
            case 1:
                return f"x + {factors[0]} = {x + factors[0]}"
            case 2:
                return f"{factors[0]}x = {factors[0] * x}"
            case 3:
                return f"{_side(*factors)} = {factors[0] * x + factors[1]}"
            case 4:
                a, b, c = factors
                return f"{_side(a, b)} = {_side(c, (a - c) * x + b)}"
            case 5:
                a, b, c = factors
                return f"{a}({_side(1, b)}) = {_side(c, a * (x + b) - c * x)}"
            case _:
                a, b, c, d = factors
                return f"{_pair(a, b)} = {a * x + b * self.y} and {_pair(c, d)} = {c * x + d * self.y}"

    @property
    def thinking(self) -> str:
        match self.difficulty:
            case 1:
                (b,) = self.factors
                return f"x = {self.x + b} - {b}\nx = {self.x}"
            case 2:
                (a,) = self.factors
                return f"x = {a * self.x} / {a}\nx = {self.x}"
            case 3:
                return "\n".join(_two_steps(*self.factors, self.x))
            case 4:
                return "\n".join(_both_sides(*self.factors, self.x))
            case 5:
                a, b, c = self.factors
                right = _side(c, a * (self.x + b) - c * self.x)
                return "\n".join([f"{_side(a, a * b)} = {right}", *_both_sides(a, a * b, c, self.x)])
            case _:
                return "\n".join(self._eliminated())

    def _eliminated(self) -> list[str]:
        """Both equations times the other's factor of y, and the difference, which holds x alone."""
        a, b, c, d = self.factors
        x, y = self.x, self.y
        first, second = a * x + b * y, c * x + d * y
        lines = []
        if (b, d) != (1, 1):
            lines += [f"{_pair(a * d, b * d)} = {first * d}", f"{_pair(c * b, d * b)} = {second * b}"]
        left, right = a * d - c * b, first * d - second * b
        lines.append(f"{_term(left)} = {first * d} - {_bracketed(second * b)} = {right}")
        return lines if left == 1 else [*lines, f"x = {right} / {_bracketed(left)}", f"x = {x}"]


def _draw_pair(rng: random.Random, difficulty: int) -> tuple[int, ...]:
    while True:
        a, c = rng.randint(1, 5), rng.randint(1, 5)
        b, d = (1, 1) if difficulty == 6 else (rng.randint(1, 5), rng.randint(1, 5))
        if a * d != c * b:
            return a, b, c, d


def _not_zero(rng: random.Random, low: int) -> int:
    return rng.choice([number for number in range(low, 10) if number])


def _side(factor: int, constant: int) -> str:
    if constant == 0:
        return _term(factor)
    return f"{_term(factor)} {'+' if constant > 0 else '-'} {abs(constant)}"


def _pair(a: int, b: int) -> str:
    return f"{_term(a)} + {_term(b).replace('x', 'y')}"


def _term(factor: int) -> str:
    return {1: "x", -1: "-x"}.get(factor, f"{factor}x")


def _bracketed(number: int) -> str:
    return f"({number})" if number < 0 else str(number)


def _two_steps(a: int, b: int, x: int) -> list[str]:
    """a x + b = c."""
    lines = [f"{_term(a)} = {a * x + b} {'-' if b > 0 else '+'} {abs(b)} = {a * x}"] if b else []
    return lines if a == 1 else [*lines, f"x = {a * x} / {_bracketed(a)}", f"x = {x}"]


def _both_sides(a: int, b: int, c: int, x: int) -> list[str]:
    """a x + b = c x + d: what stands right with x goes left."""
    return [f"{_side(a - c, b)} = {(a - c) * x + b}", *_two_steps(a - c, b, x)]
