"""Formulas of whole numbers as trees: written, calculated, simplified step by step, and read from text.

Reading is by a small parser of our own. Nothing here runs text.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
LONGEST_TEXT = 200
TOKEN = re.compile(r" *([0-9]{1,9}|[-+*/()])")


class FormulaError(ValueError):
    """Text that is no formula, or a formula without a value."""


@dataclass(frozen=True)
class Operation:
    left: "Formula"
    operator: str
    right: "Formula"


Formula = int | Operation
Exact = int | Fraction


def calculate(operator: str, left: Exact, right: Exact) -> Exact:
    """Exactly; whole numbers stay int. Raises FormulaError for a division by zero."""
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case _:
            if right == 0:
                raise FormulaError("it divides by zero")
            quotient = Fraction(left) / right
            return int(quotient) if quotient.denominator == 1 else quotient


def value(formula: Formula) -> Exact:
    if isinstance(formula, int):
        return formula
    return calculate(formula.operator, value(formula.left), value(formula.right))


def numbers(formula: Formula) -> list[int]:
    """From left to right."""
    return [formula] if isinstance(formula, int) else numbers(formula.left) + numbers(formula.right)


def operators(formula: Formula) -> list[str]:
    """From left to right."""
    if isinstance(formula, int):
        return []
    return [*operators(formula.left), formula.operator, *operators(formula.right)]


def written(formula: Formula) -> str:
    """With the fewest parentheses: read again, it has the same value, if perhaps in another order of sums and products."""
    if isinstance(formula, int):
        return str(formula)
    own = PRECEDENCE[formula.operator]
    left, right = written(formula.left), written(formula.right)
    if isinstance(formula.left, Operation) and PRECEDENCE[formula.left.operator] < own:
        left = f"({left})"
    if _is_bracketed(formula.operator, formula.right):
        right = f"({right})"
    return f"{left} {formula.operator} {right}"


def _is_bracketed(operator: str, right: Formula) -> bool:
    if isinstance(right, int):
        return right < 0
    if operator == "+" or operator == right.operator == "*":  # sums and products may be taken in any order
        return PRECEDENCE[right.operator] < PRECEDENCE[operator]
    return PRECEDENCE[right.operator] <= PRECEDENCE[operator]


def steps(formula: Formula) -> list[str]:
    """The formula after each operation that is carried out, deepest and leftmost first, down to a number."""
    lines = []
    while isinstance(formula, Operation):
        formula = _one_step(formula)
        lines.append(written(formula))
    return lines


def _one_step(formula: Operation) -> Formula:
    if isinstance(formula.left, Operation):
        return Operation(_one_step(formula.left), formula.operator, formula.right)
    if isinstance(formula.right, Operation):
        return Operation(formula.left, formula.operator, _one_step(formula.right))
    result = calculate(formula.operator, formula.left, formula.right)
    if result.denominator != 1:
        raise FormulaError(f"{written(formula)} is no whole number")
    return result


def read(text: str) -> Formula:
    """The formula that a text writes. Raises FormulaError for anything else, or more than `LONGEST_TEXT` characters."""
    if len(text) > LONGEST_TEXT:
        raise FormulaError(f"it has {len(text)} characters; wanted at most {LONGEST_TEXT}")
    tokens, position = [], 0
    text = text.strip(" ")
    while position < len(text):
        found = TOKEN.match(text, position)
        if not found:
            raise FormulaError(f"found {text[position : position + 20]!r}; wanted numbers, + - * / and parentheses")
        tokens.append(found[1])
        position = found.end()
    formula, rest = _sum(tokens)
    if rest:
        raise FormulaError(f"found {rest[0]!r} where the formula should end")
    return formula


def _sum(tokens: list[str]) -> tuple[Formula, list[str]]:
    left, tokens = _product(tokens)
    while tokens and tokens[0] in "+-":
        right, rest = _product(tokens[1:])
        left, tokens = Operation(left, tokens[0], right), rest
    return left, tokens


def _product(tokens: list[str]) -> tuple[Formula, list[str]]:
    left, tokens = _factor(tokens)
    while tokens and tokens[0] in "*/":
        right, rest = _factor(tokens[1:])
        left, tokens = Operation(left, tokens[0], right), rest
    return left, tokens


def _factor(tokens: list[str]) -> tuple[Formula, list[str]]:
    if tokens and tokens[0].isdigit():
        return int(tokens[0]), tokens[1:]
    if tokens and tokens[0] == "(":
        inside, tokens = _sum(tokens[1:])
        if tokens and tokens[0] == ")":
            return inside, tokens[1:]
        raise FormulaError("a parenthesis is not closed")
    raise FormulaError(f"found {tokens[0]!r} where a number should stand" if tokens else "a number is missing at its end")
