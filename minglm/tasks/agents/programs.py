"""A small language of functions, with three readings of each: Python, plain words, and a value.

Repositories to repair are made of it (minglm/tasks/agents/repository.py). As programs are data here, and not text, what a
bug changes is computed while a problem is drawn: nothing has to be run for that.
"""

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

OPERATORS = {"+": (operator.add, "plus"), "-": (operator.sub, "minus"), "*": (operator.mul, "times")}
COMPARISONS = {
    "<": (operator.lt, "less than"),
    "<=": (operator.le, "at most"),
    ">": (operator.gt, "more than"),
    ">=": (operator.ge, "at least"),
}
LARGEST_CONSTANT = 9


class ProgramError(Exception):
    """What Python would raise, as `type: message`."""


@dataclass(frozen=True)
class Number:
    value: int


@dataclass(frozen=True)
class Name:
    name: str


@dataclass(frozen=True)
class Binary:
    sign: str
    left: "Expression"
    right: "Expression"


@dataclass(frozen=True)
class CallOf:
    function: str
    arguments: tuple["Expression", ...]


Expression = Number | Name | Binary | CallOf


@dataclass(frozen=True)
class Function:
    """Returns `value`; with `condition` (comparison, left, right) only where that holds, otherwise `otherwise`; with
    `items`, the sum of `value` over all x of that argument."""

    name: str
    parameters: tuple[str, ...]
    value: Expression
    condition: tuple[str, Expression, Expression] | None = None
    otherwise: Expression | None = None
    items: str = ""


@dataclass(frozen=True)
class Module:
    """imports: of which module, which names."""

    name: str
    functions: tuple[Function, ...]
    imports: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def path(self) -> str:
        return f"{self.name}.py"


Program = tuple[Module, ...]

# ------------------------------------------------------------------------------------------------------------ as Python


def source(module: Module, said: Mapping[str, str]) -> str:
    """The module's file. said: what each function is to do, for its docstring."""
    imports = [f"from {name} import {', '.join(names)}\n" for name, names in module.imports if names]
    functions = [_function_source(function, said[function.name]) for function in module.functions]
    return "\n\n".join(["".join(imports), *functions] if imports else functions)


def _function_source(function: Function, said: str) -> str:
    lines = [f"def {function.name}({', '.join(function.parameters)}):", f'    """{said}"""']
    value = code(function.value)
    if function.items:
        lines += ["    total = 0", f"    for x in {function.items}:", f"        total = total + {value}", "    return total"]
    elif function.condition and function.otherwise:
        sign, left, right = function.condition
        lines += [
            f"    if {code(left)} {sign} {code(right)}:",
            f"        return {value}",
            f"    return {code(function.otherwise)}",
        ]
    else:
        lines.append(f"    return {value}")
    return "".join(line + "\n" for line in lines)


def code(expression: Expression) -> str:
    match expression:
        case Number(value):
            return str(value)
        case Name(name):
            return name
        case CallOf(function, arguments):
            return f"{function}({', '.join(map(code, arguments))})"
        case Binary(sign, left, right):
            inner = f"({code(left)})" if isinstance(left, Binary) and sign == "*" and left.sign != "*" else code(left)
            return f"{inner} {sign} {code(right)}"


# ------------------------------------------------------------------------------------------------------------- in words


def words(function: Function) -> str:
    """What a function does."""
    value = _in_words(function.value)
    if function.items:
        return f"the sum of {value} for each x in {function.items}"
    if function.condition and function.otherwise:
        sign, left, right = function.condition
        condition = f"{_in_words(left)} is {COMPARISONS[sign][1]} {_in_words(right)}"
        return f"{value} if {condition}, else {_in_words(function.otherwise)}"
    return value


def _in_words(expression: Expression) -> str:
    match expression:
        case Number(value):
            return str(value)
        case Name(name):
            return name
        case CallOf(function, arguments):
            return f"{function} of {' and '.join(map(_in_words, arguments))}"
        case Binary(sign, left, right):
            comma = "" if isinstance(left, Name | Number) else ","
            return f"{_in_words(left)}{comma} {OPERATORS[sign][1]} {_in_words(right)}"


# -------------------------------------------------------------------------------------------------------------- a value

Value = int | tuple[int, ...]


def evaluate(program: Program, name: str, arguments: tuple[Value, ...]) -> int:
    """What the function returns. Raises ProgramError where Python raises."""
    module, function = next((m, f) for m in program for f in m.functions if f.name == name)
    return _run(program, module, function, arguments)


def _run(program: Program, module: Module, function: Function, arguments: tuple[Value, ...]) -> int:
    values = dict(zip(function.parameters, arguments, strict=True))
    if function.items:
        return sum(_value(program, module, function.value, {**values, "x": x}) for x in values[function.items])
    if function.condition and function.otherwise:
        sign, left, right = function.condition
        holds = COMPARISONS[sign][0](_value(program, module, left, values), _value(program, module, right, values))
        return _value(program, module, function.value if holds else function.otherwise, values)
    return _value(program, module, function.value, values)


def _value(program: Program, module: Module, expression: Expression, values: dict[str, Value]) -> int:
    match expression:
        case Number(value):
            return value
        case Name(name):
            return values[name]
        case Binary(sign, left, right):
            first = _value(program, module, left, values)
            return OPERATORS[sign][0](first, _value(program, module, right, values))
        case CallOf(name, arguments):
            imported = {one for _, names in module.imports for one in names}
            if name not in imported and all(function.name != name for function in module.functions):
                raise ProgramError(f"NameError: name '{name}' is not defined")
            return evaluate(program, name, tuple(_value(program, module, one, values) for one in arguments))


# ----------------------------------------------------------------------------------------------------------------- bugs


def mutations(program: Program) -> list[Program]:
    """All programs that differ from this one in one place of one line."""
    found: list[Program] = []
    for index, module in enumerate(program):
        changed = [*_changed_imports(module)]
        for number, function in enumerate(module.functions):
            for other in _changed_functions(function):
                functions = (*module.functions[:number], other, *module.functions[number + 1 :])
                changed.append(replace(module, functions=functions))
        found += [(*program[:index], other, *program[index + 1 :]) for other in changed]
    return found


def _changed_imports(module: Module) -> Iterator[Module]:
    """One imported name is forgotten."""
    for index, (name, names) in enumerate(module.imports):
        for one in names:
            left = tuple(other for other in names if other != one)
            yield replace(module, imports=(*module.imports[:index], (name, left), *module.imports[index + 1 :]))


def _changed_functions(function: Function) -> Iterator[Function]:
    scope = tuple(name for name in function.parameters if name != function.items) + (("x",) if function.items else ())
    for value in _changed(function.value, scope):
        yield replace(function, value=value)
    if function.condition and function.otherwise:
        sign, left, right = function.condition
        for other in COMPARISONS:
            if other != sign:
                yield replace(function, condition=(other, left, right))
        for value in _changed(right, scope):
            yield replace(function, condition=(sign, left, value))
        for value in _changed(function.otherwise, scope):
            yield replace(function, otherwise=value)


def _changed(expression: Expression, scope: tuple[str, ...]) -> Iterator[Expression]:
    match expression:
        case Number(value):
            yield from (Number(other) for other in (value - 1, value + 1) if 0 <= other <= LARGEST_CONSTANT + 1)
        case Name(name):
            yield from (Name(other) for other in scope if other != name)
        case CallOf(function, arguments):
            if len(arguments) == 2 and arguments[0] != arguments[1]:
                yield CallOf(function, (arguments[1], arguments[0]))
        case Binary(sign, left, right):
            yield from (Binary(other, left, right) for other in OPERATORS if other != sign)
            yield from (Binary(sign, other, right) for other in _changed(left, scope))
            yield from (Binary(sign, left, other) for other in _changed(right, scope))
