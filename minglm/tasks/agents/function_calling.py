"""Function calling: which function, with which arguments, how many times; or none; or a value is missing.

Judged as BFCL judges: by the calls themselves, each exact, in any order. An argument that the user leaves open may be left
out or given its default. Measure of difficulty: tools to choose from, then kinds of request, then calls to make.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from minglm.tasks.agents.calling import Call, Tool, call_message
from minglm.tasks.agents.catalogue import CATALOGUE
from minglm.tasks.agents.world import AgentProblem, Move, Moves, World, word
from minglm.tasks.task import Message

RULE = ' If no function fits, answer "none". If a value is not given, answer with its name and "?".'
NONE = "none"
KINDS = ("call", "none", "ask")


@dataclass(frozen=True)
class FunctionCalling(AgentProblem):
    """functions: names of those offered. calls: name and arguments of what is wanted, none of them if nothing fits.
    missing: of the first call, the argument that the user does not give at first. has_rule: whether the question says
    that there are other answers than calls."""

    functions: tuple[str, ...]
    calls: tuple[tuple[str, tuple[tuple[str, str | int], ...]], ...]
    question: str
    missing: str = ""
    has_rule: bool = False

    family = "function_calling"
    stands_for = "Function-calling RL of section 3.4 with step-wise rules, and BFCL v3 of section 4."
    difficulties = range(1, 6)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        offered = rng.sample(sorted(CATALOGUE), (1, 2, 3, 3, 4)[difficulty - 1])
        kind = rng.choice(KINDS) if difficulty >= 3 else "call"
        if kind == "none":
            function = CATALOGUE[rng.choice(sorted(set(CATALOGUE) - set(offered)))]
            return cls(tuple(offered), (), function.request(function.draw(rng, difficulty >= 4)), has_rule=True)
        count = (1, 1, 1, 2, rng.choice((2, 3)))[difficulty - 1]
        calls: list[Call] = []
        while len(calls) < count:
            function = CATALOGUE[rng.choice(offered)]
            call = Call(function.name, function.draw(rng, with_optional=difficulty >= 4))
            if call not in calls:
                calls.append(call)
        missing = rng.choice(CATALOGUE[calls[0].name].required).name if kind == "ask" else ""
        said = [
            {key: value for key, value in call.arguments.items() if index or key != missing} for index, call in enumerate(calls)
        ]
        question = " ".join(CATALOGUE[call.name].request(given) for call, given in zip(calls, said, strict=True))
        frozen = tuple((call.name, tuple(call.arguments.items())) for call in calls)
        return cls(tuple(offered), frozen, question, missing, difficulty >= 3)

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.question + (RULE if self.has_rule else "")}]

    @property
    def tools(self) -> list[Tool]:
        return [CATALOGUE[name].tool for name in self.functions]

    @property
    def key(self) -> str:
        """The request alone: with other functions around it, or another value behind "name?", it is the same request."""
        return self.question

    @property
    def wanted(self) -> list[Call]:
        return [Call(name, dict(arguments)) for name, arguments in self.calls]

    def start(self) -> "Requests":
        return Requests(self)

    def solve(self) -> Moves:
        if not self.calls:
            yield Move(f"The functions are {', '.join(self.functions)}. None fits.", content=NONE)
            return
        thinking = [_explained(call) for call in self.wanted]
        if self.missing:
            yield Move(f"{self.calls[0][0]} needs {self.missing}. It is not given.", content=f"{self.missing}?")
            thinking[0] = f"{self.missing} is {dict(self.calls[0][1])[self.missing]}. " + thinking[0]
        yield Move("\n".join(thinking), self.wanted)

    def near_miss(self, rng: random.Random) -> list[Message]:
        if not self.calls:
            return [call_message([_random_call(self.functions, rng)])]
        calls = self.wanted
        index = rng.randrange(len(calls))
        call = calls[index]
        key = rng.choice(sorted(call.arguments))
        values = {argument.name: argument.values for argument in CATALOGUE[call.name].arguments}[key]
        other = rng.choice([value for value in values if value != call.arguments[key]])
        calls[index] = Call(call.name, {**call.arguments, key: other})

        def moves() -> Moves:
            if self.missing and rng.random() < 0.5:
                yield Move("", content=f"{self.missing}?")
            yield Move("", calls)

        return self.play(moves())

    def guess(self, rng: random.Random) -> list[Message]:
        """One of the kinds of answer that the question allows; one call, of any function, with any required values."""

        def moves() -> Moves:
            kind = rng.choice(KINDS) if self.has_rule else "call"
            if kind == "none":
                yield Move("", content=NONE)
                return
            if kind == "ask":
                yield Move("", content=rng.choice(self._names()) + "?")
            yield Move("", [_random_call(self.functions, rng)])

        return self.play(moves())

    @property
    def chance(self) -> float:
        kind = 1 / len(KINDS) if self.has_rule else 1.0
        if not self.calls:
            return kind
        (name, arguments), *others = self.calls
        function = CATALOGUE[name]
        if others or len(arguments) > len(function.required):
            return 0.0  # the guess makes one call, and leaves out what it may
        chance = kind / len(self.functions)
        for argument in function.required:
            chance /= len(argument.values)
        return chance / len(self._names()) if self.missing else chance

    def _names(self) -> list[str]:
        return sorted({argument.name for name in self.functions for argument in CATALOGUE[name].required})


class Requests(World):
    """The user answers the one question that there is to ask, and the calls end the attempt."""

    def __init__(self, problem: FunctionCalling):
        super().__init__(problem.tools, turn_limit=3)
        self.problem = problem
        self.has_asked = False
        self.made: list[Call] = []

    def call(self, call: Call) -> str:
        self.made.append(call)
        return ""

    def after_calls(self) -> None:
        problem = self.problem
        if problem.missing and not self.has_asked:
            self.end(f"{problem.missing} was not given, and not asked for")
        elif sorted(map(_form, self.made)) != sorted(map(_form, problem.wanted)):
            wanted = "; ".join(map(_form, problem.wanted)) or "none"
            self.end(f"calls {'; '.join(map(_form, self.made))[:200]}; wanted {wanted}")
        else:
            self.end()

    def hear(self, content: str) -> str | None:
        problem = self.problem
        said = word(content)
        if problem.missing and not self.has_asked and said == f"{problem.missing}?":
            self.has_asked = True
            return f"{dict(problem.calls[0][1])[problem.missing]}."
        if problem.calls or said != NONE:
            wanted = "calls" if problem.calls else repr(NONE)
            self.end(f"said {content[:40]!r}; wanted {f'{problem.missing}? and then calls' if problem.missing else wanted}")
        return None


def _form(call: Call) -> str:
    """A call with all defaults in place: equal calls have equal forms."""
    defaults = {argument.name: argument.default for argument in CATALOGUE[call.name].arguments if argument.default is not None}
    return f"{call.name} {json.dumps({**defaults, **call.arguments}, sort_keys=True)}"


def _explained(call: Call) -> str:
    values = ", ".join(f"{key} {value}" for key, value in call.arguments.items())
    return f"{call.name}: {values}."


def _random_call(functions: Sequence[str], rng: random.Random) -> Call:
    function = CATALOGUE[rng.choice(functions)]
    return Call(function.name, {argument.name: rng.choice(argument.values) for argument in function.required})
