"""The functions that the family function_calling chooses from, and how people ask for them.

A request is a head and parts, one for each argument, in this order: "Set an alarm" + " for {hour} o'clock". A request that
leaves one out, and so misses a value, is the same sentence without the part.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minglm.tasks.agents.calling import Tool, tool

Values = Sequence[str] | Sequence[int]

TOWNS = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Quito")
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
LANGUAGES = ("French", "German", "Greek", "Latin")
ROOMS = ("kitchen", "hall", "bedroom", "office")
HOURS = tuple(range(1, 13))


@dataclass(frozen=True)
class Argument:
    """An argument: its name, how it is asked for, and what it may be. default: what it is where the user says nothing."""

    name: str
    part: str
    values: Values
    default: str | None = None
    is_closed: bool = False  # the schema lists the values

    @property
    def schema(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "integer" if isinstance(self.values[0], int) else "string"}
        if self.is_closed:
            schema["enum"] = list(self.values)
        if self.default is not None:
            schema["default"] = self.default
        return schema


@dataclass(frozen=True)
class Function:
    name: str
    description: str
    head: str
    arguments: tuple[Argument, ...]

    @property
    def tool(self) -> Tool:
        optional = [argument.name for argument in self.arguments if argument.default is not None]
        return tool(self.name, self.description, {argument.name: argument.schema for argument in self.arguments}, optional)

    @property
    def required(self) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.arguments if argument.default is None)

    def draw(self, rng: random.Random, with_optional: bool) -> dict[str, Any]:
        """Arguments, all different where they are of one kind."""
        drawn: dict[str, Any] = {}
        for argument in self.arguments:
            if argument.default is None or (with_optional and rng.random() < 0.5):
                taken = (argument.default, *drawn.values())
                drawn[argument.name] = rng.choice([value for value in argument.values if value not in taken])
        return drawn

    def request(self, arguments: dict[str, Any]) -> str:
        """The sentence that asks for these arguments and is silent on the others."""
        parts = [argument.part.format(arguments[argument.name]) for argument in self.arguments if argument.name in arguments]
        return self.head + "".join(parts) + "."


def _function(name: str, description: str, head: str, *arguments: Argument) -> Function:
    return Function(name, description, head, arguments)


CATALOGUE = {
    function.name: function
    for function in (
        _function("get_weather", "The weather in a town", "Tell me the weather", Argument("town", " in {}", TOWNS)),
        _function("start_timer", "Start a timer", "Start a timer", Argument("minutes", " of {} minutes", tuple(range(2, 16)))),
        _function("play_music", "Play music of an artist", "Play music", Argument("artist", " by {}", PEOPLE)),
        _function("make_call", "Phone somebody", "Make a phone call", Argument("person", " to {}", PEOPLE)),
        _function(
            "set_alarm",
            "Set an alarm",
            "Set an alarm",
            Argument("hour", " for {} o'clock", HOURS),
            Argument("day", " on {}", ("today", *DAYS), default="today"),
        ),
        _function(
            "send_message",
            "Send a message",
            "Send a message",
            Argument("person", " to {}", PEOPLE),
            Argument("text", " that says {}", ("hello", "yes", "no", "thanks", "welcome")),
        ),
        _function(
            "set_heating",
            "Heat a room",
            "Set the heating",
            Argument("room", " in the {}", ROOMS, is_closed=True),
            Argument("degrees", " to {} degrees", tuple(range(15, 25))),
        ),
        _function(
            "book_table",
            "Book a table",
            "Book a table",
            Argument("people", " for {} people", tuple(range(2, 9))),
            Argument("day", " on {}", DAYS, is_closed=True),
        ),
        _function(
            "find_route",
            "A route between towns",
            "Find a route",
            Argument("start", " from {}", TOWNS),
            Argument("goal", " to {}", TOWNS),
            Argument("means", " by {}", ("car", "train", "bus"), default="car", is_closed=True),
        ),
        _function(
            "translate",
            "Translate a word",
            "Translate a word",
            Argument("word", ": {}", ("tree", "river", "house", "bread", "stone")),
            Argument("language", " into {}", LANGUAGES),
        ),
        _function(
            "find_book",
            "Books on a topic",
            "Find books",
            Argument("topic", " about {}", ("ships", "birds", "stars", "trains", "bees")),
            Argument("language", " in {}", ("English", *LANGUAGES), default="English"),
        ),
        _function(
            "order_goods",
            "Order goods",
            "Order boxes",
            Argument("item", " of {}", ("tea", "rice", "salt", "nails", "soap")),
            Argument("count", ", {} of them", tuple(range(2, 10))),
        ),
    )
}
