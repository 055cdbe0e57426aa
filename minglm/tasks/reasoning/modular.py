"""Modular arithmetic: remainders of sums, products, powers, and inverses."""

import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.reasoning.exact import Number

PRIMES = (5, 7, 11, 13, 17, 19)
WORDINGS = ("What is {} mod {}?", "Calculate {} mod {}.", "Give the remainder of {} by {}.")
INVERSE_WORDINGS = ("For which x from 1 to {2} is {0} * x mod {1} = 1?", "Find x from 1 to {2} with {0} * x mod {1} = 1.")


@dataclass(frozen=True)
class ModularArithmetic(Number):
    """Difficulty is what is to be reduced: a number, a sum, a product, a larger number by long division, a small power, a
    large power by squaring; the last one asks for an inverse, found by trying."""

    family = "modular_arithmetic"
    stands_for = "Mathematics in synthetic reasoning data (section 2.3); MATH's number theory."
    difficulties = range(1, 8)

    kind: str
    """number, sum, product, power, inverse"""
    left: int
    right: int
    modulus: int

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        wording = rng.randrange(6)
        modulus = rng.randint(3, 9)
        match difficulty:
            case 1:
                return cls(wording, "number", rng.randint(modulus, 29), 0, modulus)
            case 2:
                return cls(wording, "sum", rng.randint(3, 29), rng.randint(3, 29), modulus)
            case 3:
                return cls(wording, "product", rng.randint(3, 19), rng.randint(3, 19), modulus)
            case 4:
                return cls(wording, "number", rng.randint(1000, 99999), 0, modulus)
            case 5:
                return cls(wording, "power", rng.randint(2, 9), rng.randint(3, 6), rng.choice(PRIMES))
            case 6:
                return cls(wording, "power", rng.randint(2, 9), rng.randint(17, 99), rng.choice(PRIMES))
            case _:
                modulus = rng.choice(PRIMES)
                return cls(wording, "inverse", rng.randint(2, modulus - 1), 0, modulus)

    @property
    def question(self) -> str:
        if self.kind == "inverse":
            wording = INVERSE_WORDINGS[self.wording % len(INVERSE_WORDINGS)]
            return wording.format(self.left, self.modulus, self.modulus - 1)
        written = {"number": "{}", "sum": "({} + {})", "product": "({} * {})", "power": "{}^{}"}[self.kind]
        return WORDINGS[self.wording % len(WORDINGS)].format(written.format(self.left, self.right), self.modulus)

    @property
    def value(self) -> int:
        match self.kind:
            case "number":
                return self.left % self.modulus
            case "sum":
                return (self.left + self.right) % self.modulus
            case "product":
                return self.left * self.right % self.modulus
            case "power":
                return pow(self.left, self.right, self.modulus)
            case _:
                return pow(self.left, -1, self.modulus)

    @property
    def guesses(self) -> range:
        return range(1 if self.kind == "inverse" else 0, self.modulus)

    @property
    def thinking(self) -> str:
        left, right, modulus = self.left, self.right, self.modulus
        match self.kind:
            case "number":
                return "\n".join(_divided(left, modulus))
            case "sum":
                return "\n".join([f"{left} + {right} = {left + right}", *_divided(left + right, modulus)])
            case "product":
                a, b = left % modulus, right % modulus
                reduced = [f"{left} mod {modulus} = {a}", f"{right} mod {modulus} = {b}", f"{a} * {b} = {a * b}"]
                return "\n".join([*reduced, *_divided(a * b, modulus)])
            case "power":
                return "\n".join(_powers(left, right, modulus))
            case _:
                tries = [f"{left} * {x} = {left * x}, mod {modulus} = {left * x % modulus}" for x in range(1, self.value + 1)]
                return "\n".join(tries)


def _divided(number: int, modulus: int) -> list[str]:
    """Long division: from the left, the remainder so far with the next digit behind it."""
    if number < 100:
        return [f"{number} = {modulus} * {number // modulus} + {number % modulus}"]
    lines, remainder = [], 0
    for digit in str(number):
        part = 10 * remainder + int(digit)
        remainder = part % modulus
        lines.append(f"{part} = {modulus} * {part // modulus} + {remainder}")
    return lines


def _powers(base: int, exponent: int, modulus: int) -> list[str]:
    """By squaring; the powers that the exponent's binary digits ask for are multiplied."""
    lines, result, power, square = [], 1, 1, base % modulus
    if base >= modulus:
        lines.append(f"{base} mod {modulus} = {square}")
    while power <= exponent:
        lines.append(f"{base}^{power} = {square}")
        if exponent & power:
            lines.append(f"{result} * {square} = {result * square}, mod {modulus} = {result * square % modulus}")
            result = result * square % modulus
        square = square * square % modulus
        power *= 2
    return lines
