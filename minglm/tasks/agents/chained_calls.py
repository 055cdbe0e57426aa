"""Calls that need one another: what one function returns is an argument of the next, and the last one acts.

"Book a room in the home town of the seller of tea" takes find_seller, then find_home, then book_room. Judged by the one
action, exactly; reading more than needed costs nothing but turns. Measure of difficulty: calls to make, and functions to
choose from.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from minglm.tasks.agents.calling import Call, Tool, call_message, tool
from minglm.tasks.agents.catalogue import PEOPLE, TOWNS
from minglm.tasks.agents.world import AgentProblem, Move, Moves, World
from minglm.tasks.task import Message

VALUES = {"person": PEOPLE, "town": TOWNS, "item": ("tea", "rice", "salt", "soap"), "weather": ("rain", "sun", "snow", "wind")}


class Reader(NamedTuple):
    """A function that returns a value of one kind for one of another. phrase: what it returns, in words."""

    description: str
    takes: str
    returns: str
    phrase: str


class Action(NamedTuple):
    """takes: the kind of its argument, which has the kind's name but for a message's text."""

    description: str
    takes: str
    argument: str
    request: str


READERS = {
    "find_seller": Reader("Who sells an item", "item", "person", "the seller of {}"),
    "find_home": Reader("Home town of a person", "person", "town", "the home town of {}"),
    "find_boss": Reader("Boss of a person", "person", "person", "the boss of {}"),
    "get_weather": Reader("The weather in a town", "town", "weather", "the weather in {}"),
}
ACTIONS = {
    "make_call": Action("Phone somebody", "person", "person", "Make a phone call to {}."),
    "book_room": Action("Book a room", "town", "town", "Book a room in {}."),
    "send_news": Action("Send the news", "weather", "text", "Send {} as news."),
}
READS = {1: 1, 2: 1, 3: 2, 4: 3}  # by difficulty


@dataclass(frozen=True)
class ChainedCalls(AgentProblem):
    """start_value: what the user names. chain: the readers from there on. table: reader, value and what it returns, for
    all values. functions: names of those offered."""

    start_value: str
    chain: tuple[str, ...]
    action: str
    table: tuple[tuple[str, str, str], ...]
    functions: tuple[str, ...]

    family = "chained_calls"
    stands_for = "End-to-end multi-turn function-calling RL of section 3.4, and the multi-step kinds of BFCL v3 of section 4."
    difficulties = range(1, 5)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        table = tuple(
            (name, value, rng.choice([one for one in VALUES[reader.returns] if one != value]))
            for name, reader in READERS.items()
            for value in VALUES[reader.takes]
        )
        while True:
            kind = rng.choice(("person", "town", "item"))
            start_value, chain = rng.choice(VALUES[kind]), []
            while len(chain) < READS[difficulty] and (
                fits := [name for name, reader in READERS.items() if reader.takes == kind]
            ):
                chain.append(rng.choice(fits))
                kind = READERS[chain[-1]].returns
            if len(chain) == READS[difficulty]:
                break
        action = next(name for name, one in ACTIONS.items() if one.takes == kind)
        needed = {*chain, action}
        names = [name for name in (*READERS, *ACTIONS) if difficulty > 1 or name in needed]
        return cls(start_value, tuple(chain), action, table, tuple(rng.sample(names, len(names))))

    @property
    def values(self) -> list[str]:
        """The start, and what each reader of the chain returns."""
        returned = {(name, value): result for name, value, result in self.table}
        values = [self.start_value]
        for name in self.chain:
            values.append(returned[name, values[-1]])
        return values

    @property
    def wanted(self) -> Call:
        return _act(self.action, self.values[-1])

    @property
    def messages(self) -> list[Message]:
        phrase = self.start_value
        for name in self.chain:
            phrase = READERS[name].phrase.format(phrase)
        return [{"role": "user", "content": ACTIONS[self.action].request.format(phrase)}]

    @property
    def tools(self) -> list[Tool]:
        return [_tool(name) for name in self.functions]

    def start(self) -> "Errand":
        return Errand(self)

    def solve(self) -> Moves:
        value = self.start_value
        for name in self.chain:
            wanted = READERS[name].phrase.format(value)
            [value] = yield Move(f"I need {wanted}.", [_read(name, value)])
        yield Move(f"{wanted[0].upper()}{wanted[1:]} is {value}.", [_act(self.action, value)])

    def near_miss(self, rng: random.Random) -> list[Message]:
        """The right calls, and then the action with another value; or with the right value, twice."""
        value = self.values[-1]
        other = rng.choice([one for one in VALUES[ACTIONS[self.action].takes] if one != value])

        def moves() -> Moves:
            for name, one in zip(self.chain, self.values, strict=False):
                yield Move("", [_read(name, one)])
            last = [self.wanted, self.wanted] if rng.random() < 0.3 else [_act(self.action, other)]
            yield Move("", last)

        return self.play(moves())

    def guess(self, rng: random.Random) -> list[Message]:
        """Any action that there is, with any value of its kind, unread."""
        action = rng.choice(self._actions())
        return [call_message([_act(action, rng.choice(VALUES[ACTIONS[action].takes]))])]

    @property
    def chance(self) -> float:
        return 1 / len(self._actions()) / len(VALUES[ACTIONS[self.action].takes])

    def _actions(self) -> list[str]:
        return [name for name in self.functions if name in ACTIONS]


class Errand(World):
    """Functions that return what is in the table, until one acts."""

    def __init__(self, problem: ChainedCalls):
        super().__init__(problem.tools, turn_limit=4 + 2 * len(problem.chain))
        self.returned = {(name, value): result for name, value, result in problem.table}
        self.wanted = problem.wanted
        self.acted: list[Call] = []

    def call(self, call: Call) -> str:
        if call.name in ACTIONS:
            self.acted.append(call)
            return "ok"
        [value] = call.arguments.values()
        return self.returned.get((call.name, value), "error: unknown")

    def after_calls(self) -> None:
        if self.acted == [self.wanted]:
            self.end()
        elif self.acted:
            self.end(f"acted {_shown(self.acted)}; wanted {_shown([self.wanted])}")

    def hear(self, content: str) -> str | None:
        self.end(f"said {content[:40]!r}; wanted calls")
        return None


def _tool(name: str) -> Tool:
    if name in READERS:
        return tool(name, READERS[name].description, {READERS[name].takes: "string"})
    return tool(name, ACTIONS[name].description, {ACTIONS[name].argument: "string"})


def _read(name: str, value: str) -> Call:
    return Call(name, {READERS[name].takes: value})


def _act(name: str, value: str) -> Call:
    return Call(name, {ACTIONS[name].argument: value})


def _shown(calls: Sequence[Call]) -> str:
    return "; ".join(f"{call.name} {str(next(iter(call.arguments.values())))[:40]}" for call in calls)
