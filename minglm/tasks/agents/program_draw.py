"""Draws programs for repositories: modules one above the other, each calling functions of the one below."""

import random
from typing import NamedTuple

from minglm.tasks.agents.programs import (
    COMPARISONS,
    LARGEST_CONSTANT,
    OPERATORS,
    Binary,
    CallOf,
    Expression,
    Function,
    Module,
    Name,
    Number,
    Program,
    ProgramError,
    Value,
    evaluate,
)

MODULES = ("shop", "prices", "points", "boxes", "trips", "rules")
FUNCTIONS = ("price", "fee", "score", "bonus", "size", "weight", "speed", "gain", "cost", "level")
ITEMS = "items"


class Check(NamedTuple):
    """A call of a function, and what is right."""

    module: str
    function: str
    arguments: tuple[Value, ...]
    wanted: int


def draw_program(rng: random.Random, counts: tuple[int, ...], with_loops: bool) -> Program:
    """Modules with so many functions each, the lowest first."""
    modules: list[Module] = []
    names = iter(rng.sample(FUNCTIONS, sum(counts)))
    for module_name, count in zip(rng.sample(MODULES, len(counts)), counts, strict=True):
        below = modules[-1] if modules else None
        functions: list[Function] = []
        for number in range(count):
            callees = [function for function in below.functions if not function.items] if below else []
            callee = callees[number % len(callees)] if callees else None
            functions.append(_draw_function(rng, next(names), callee, with_loops and number == count - 1))
        used = tuple(sorted({name for function in functions for name in _called(function.value)}))
        modules.append(Module(module_name, tuple(functions), ((below.name, used),) if below else ()))
    return tuple(modules)


def _draw_function(rng: random.Random, name: str, callee: Function | None, is_loop: bool) -> Function:
    if is_loop:
        inner = CallOf(callee.name, (Name("x"), Name("a"))) if callee else Name("x")
        value = Binary(rng.choice(list(OPERATORS)), inner, rng.choice((Name("a"), _constant(rng))))
        return Function(name, (ITEMS, "a"), value, items=ITEMS)
    inner = CallOf(callee.name, (Name("a"), Name("b"))) if callee else Name("a")
    if rng.random() < 0.4:
        condition = (rng.choice(list(COMPARISONS)), Name("a"), rng.choice((Name("b"), _constant(rng))))
        value = Binary(rng.choice(list(OPERATORS)), inner, _constant(rng))
        return Function(name, ("a", "b"), value, condition, rng.choice((Name("b"), _constant(rng))))
    value: Expression = Binary(rng.choice(list(OPERATORS)), inner, Name("b"))
    if rng.random() < 0.5:
        value = Binary(rng.choice(list(OPERATORS)), value, _constant(rng))
    return Function(name, ("a", "b"), value)


def _constant(rng: random.Random) -> Number:
    return Number(rng.randint(2, LARGEST_CONSTANT))


def _called(expression: Expression) -> list[str]:
    match expression:
        case CallOf(function, _):
            return [function]
        case Binary(_, left, right):
            return _called(left) + _called(right)
    return []


def draw_checks(rng: random.Random, program: Program, modules: tuple[Module, ...], each: int) -> tuple[Check, ...]:
    """So many different calls of each function of the modules."""
    checks: list[Check] = []
    for module in modules:
        for function in module.functions:
            seen: set[tuple[Value, ...]] = set()
            while len(seen) < each:
                arguments = tuple(
                    tuple(rng.randint(0, 9) for _ in range(rng.randint(2, 3))) if name == function.items else rng.randint(0, 12)
                    for name in function.parameters
                )
                if arguments not in seen:
                    seen.add(arguments)
                    wanted = evaluate(program, function.name, arguments)
                    checks.append(Check(module.name, function.name, arguments, wanted))
    return tuple(checks)


def failure(program: Program, check: Check) -> str:
    """What is wrong with a call in this program; empty if it returns what it should."""
    try:
        value = evaluate(program, check.function, check.arguments)
    except ProgramError as error:
        return str(error)
    return "" if value == check.wanted else f"wrong value {value}"
