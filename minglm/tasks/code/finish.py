"""Finish a file that uses another file of the same repository: its names must be found there.

The hidden tests run the answer beside a changed version of the other file, with other numbers: code that copied what it
saw fails, code that calls the names passes. The question says so.
"""

import json
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

from minglm.tasks.code.answer import NAMES, WritesCode, function
from minglm.tasks.sandbox import Case
from minglm.tasks.task import Message, reply

WORDINGS = (
    "{shown}\n\n# file: {main}.py\n{imports}\n\n"
    "Write {name}(x) of {main}.py: {request}. Use the names of {modules}, whose numbers may change.",
    "Finish {main}.py with {name}(x): {request}. The numbers in {modules} may change, so use the names.\n\n"
    "{shown}\n\n# file: {main}.py\n{imports}",
)
OPERATORS = {"+": "plus", "-": "minus", "*": "times"}
# What a function with this operator may be for.
PURPOSES = {
    "+": ("add the fee", "add the bonus", "add the tax", "add the margin"),
    "-": ("take off the discount", "take off the cost", "take off the weight", "take off the rebate"),
    "*": ("apply the rate", "apply the factor", "apply the scale", "apply the share"),
}
INPUTS = (-7, -1, 0, 2, 3, 10, 25)
GUESSES = (
    ("x", lambda x: x),
    ("-x", lambda x: -x),
    ("0", lambda x: 0),
    ("1", lambda x: 1),
    ("None", lambda x: None),
    ("x == x", lambda x: True),
)


class Definition(NamedTuple):
    """In a module: a function of x, or a constant (without operator). `later` is its number in the changed version."""

    module: str
    name: str
    operator: str
    number: int
    later: int
    purpose: str = ""
    """Where a request says what is wanted by its purpose, not by its name."""

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.name}"

    def code(self, later: bool = False) -> str:
        number = self.later if later else self.number
        if not self.operator:
            return f"{self.name} = {number}" + (f"  # {self.purpose}" if self.purpose else "")
        doc = f'    """{self.purpose.capitalize()}."""\n' if self.purpose else ""
        return f"def {self.name}(x):\n{doc}    return x {self.operator} {number}"

    def apply(self, x: int) -> int:
        return calculate(x, self.operator, self.later)


def calculate(x: int, operator: str, y: int) -> int:
    match operator:
        case "+":
            return x + y
        case "-":
            return x - y
        case _:
            return x * y


@dataclass(frozen=True)
class FinishFile(WritesCode):
    """Difficulty: 1 one function of the other file; 2 a function and a constant; 3 two functions, a constant, and more names
    that are not wanted; 4 the same, said by what they are for instead of by name; 5 from two files."""

    family = "finish_file"
    stands_for = "Repository-level code in mid-training (section 2.3): names that another file of the repository defines."
    difficulties = range(1, 6)

    main: str
    definitions: tuple[Definition, ...]
    """Of all other files, in their order there."""
    calls: tuple[int, ...]
    """Places of the functions that are called, the innermost first."""
    constant: int | None
    operator: str
    """What joins the constant."""

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        names = _names(rng, 12)
        main, modules = names.pop(), [names.pop() for _ in range(2 if difficulty == 5 else 1)]
        purposeful = difficulty >= 4
        functions = [_define(rng, rng.choice(modules), names.pop()) for _ in range((1, 1, 3, 3, 4)[difficulty - 1])]
        constants = [_define_constant(rng, rng.choice(modules), names.pop()) for _ in range((0, 1, 2, 2, 2)[difficulty - 1])]
        if purposeful:  # each purpose once, or the request would have two meanings
            functions = _with_purposes(rng, functions)
            constants = [one._replace(purpose=f"the {word}") for one, word in zip(constants, ("base", "surplus"), strict=True)]
        if difficulty == 5:
            functions[0], functions[1] = functions[0]._replace(module=modules[0]), functions[1]._replace(module=modules[1])
        called = functions[: 1 if difficulty < 3 else 2]
        wanted = constants[0] if constants else None
        definitions = [*functions, *constants]
        rng.shuffle(definitions)
        calls = tuple(definitions.index(one) for one in called)
        problem = cls(
            rng.randrange(len(WORDINGS)),
            rng.choice(NAMES),
            main,
            tuple(definitions),
            calls,
            definitions.index(wanted) if wanted else None,
            rng.choice(list(OPERATORS)) if wanted else "",
        )
        right = [case.expected for case in problem.cases]
        if problem.chance or len(set(right)) < 3 or problem._copied_values() == right:
            return cls.sample(rng, difficulty)
        return problem

    @property
    def key(self) -> str:
        return json.dumps([self.family, self.main, self.definitions, self.calls, self.constant, self.operator])

    @property
    def modules(self) -> list[str]:
        return sorted({one.module for one in self.definitions})

    def module(self, module: str, later: bool) -> str:
        """The text of a file."""
        return "\n\n".join(one.code(later) for one in self.definitions if one.module == module)

    @property
    def files(self) -> Mapping[str, str]:
        return {f"{module}.py": self.module(module, later=True) + "\n" for module in self.modules}

    @property
    def imports(self) -> str:
        return "\n".join(f"import {module}" for module in self.modules)

    def whole(self, code: str) -> str:
        return f"{self.imports}\n\n\n{code}\n"

    @property
    def request(self) -> str:
        called = [self.definitions[place] for place in self.calls]
        constant = self.definitions[self.constant] if self.constant is not None else None
        if called[0].purpose:
            words = [f"take x, {called[0].purpose}", *(one.purpose for one in called[1:])]
        else:
            words = [" of ".join([*(one.name for one in reversed(called)), "x"])]
        if constant:
            words.append(f"{OPERATORS[self.operator]} {constant.purpose or constant.name}")
        return ", ".join(words)

    @property
    def messages(self) -> list[Message]:
        shown = "\n\n".join(f"# file: {module}.py\n{self.module(module, later=False)}" for module in self.modules)
        text = WORDINGS[self.wording].format(
            shown=shown,
            main=self.main,
            imports=self.imports,
            name=self.name,
            request=self.request,
            modules=" and ".join(f"{module}.py" for module in self.modules),
        )
        return [{"role": "user", "content": text}]

    def _expression(self, calls: tuple[int, ...], constant: int | None) -> str:
        expression = "x"
        for place in calls:
            expression = f"{self.definitions[place].full_name}({expression})"
        return expression if constant is None else f"{expression} {self.operator} {self.definitions[constant].full_name}"

    def _value(self, x: int, calls: tuple[int, ...], constant: int | None) -> int:
        """With the numbers of the changed files."""
        for place in calls:
            x = self.definitions[place].apply(x)
        return x if constant is None else calculate(x, self.operator, self.definitions[constant].later)

    @property
    def solution(self) -> str:
        return function(self.name, self._expression(self.calls, self.constant))

    @property
    def thinking(self) -> str:
        lines = [
            f"{self.definitions[place].purpose or self.definitions[place].name}: {self.definitions[place].full_name}(x)"
            for place in self.calls
        ]
        if self.constant is not None:
            constant = self.definitions[self.constant]
            lines.append(f"{constant.purpose or constant.name}: {constant.full_name}")
        return "\n".join(lines)

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(Case((x,), self._value(x, self.calls, self.constant)) for x in INPUTS)

    @property
    def guesses(self):
        return GUESSES

    def near_miss(self, rng: random.Random) -> list[Message]:
        return reply(function(self.name, rng.choice(self._wrong())))

    @property
    def copied(self) -> str:
        """The right expression for the numbers that are shown."""
        expression = "x"
        for one in (self.definitions[place] for place in self.calls):
            expression = f"{expression if expression == 'x' else f'({expression})'} {one.operator} {one.number}"
        if self.constant is None:
            return expression
        return f"({expression}) {self.operator} {self.definitions[self.constant].number}"

    def _copied_values(self) -> list[int]:
        values = []
        for x in INPUTS:
            for one in (self.definitions[place] for place in self.calls):
                x = calculate(x, one.operator, one.number)
            constant = None if self.constant is None else self.definitions[self.constant].number
            values.append(x if constant is None else calculate(x, self.operator, constant))
        return values

    def _wrong(self) -> list[str]:
        """Expressions: the numbers copied instead of the names used; another name of the same kind; the order turned round."""
        right = [case.expected for case in self.cases]
        found = [self.copied]
        functions = [place for place, one in enumerate(self.definitions) if one.operator]
        constants = [place for place, one in enumerate(self.definitions) if not one.operator]
        others = [(self.calls[::-1], self.constant)]
        others += [(self.calls[:-1] + (place,), self.constant) for place in functions]
        others += [(self.calls, place) for place in constants if self.constant is not None]
        others += [(self.calls, None)]
        for calls, constant in others:
            if [self._value(x, calls, constant) for x in INPUTS] != right:
                found.append(self._expression(calls, constant))
        return found


def _names(rng: random.Random, count: int) -> list[str]:
    """Invented words, all different; none is one of Python's modules."""
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.choice("bdfgklmnprtvz") + rng.choice("aeiou") for _ in range(2))
        if name not in names and name not in sys.stdlib_module_names:
            names.append(name)
    return names


def _define(rng: random.Random, module: str, name: str) -> Definition:
    return Definition(module, name, rng.choice(list(OPERATORS)), *rng.sample(range(2, 10), 2))


def _define_constant(rng: random.Random, module: str, name: str) -> Definition:
    return Definition(module, name.upper(), "", *rng.sample(range(2, 10), 2))


def _with_purposes(rng: random.Random, functions: list[Definition]) -> list[Definition]:
    left = {operator: rng.sample(purposes, len(purposes)) for operator, purposes in PURPOSES.items()}
    return [one._replace(purpose=left[one.operator].pop()) for one in functions]
