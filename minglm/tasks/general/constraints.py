"""Constraints on a text that a program can check, in seven groups: letters, length, keywords, position, form, case, edge.

A constraint is data: its kind's name, a number, words. Its kind knows how to draw one (and marks the draft, so that the
text keeps it), how to state it, and whether a text keeps it. Kinds that share a slot never come together: they would
contradict or imply each other. A word is a run of the letters A to Z; capitals and small letters count as the same.
"""

import random
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from minglm.tasks.general.draft import Draft


class Constraint(NamedTuple):
    kind: str
    number: int = 0
    words: tuple[str, ...] = ()


class Kind(ABC):
    """One type of constraint."""

    name: ClassVar[str]
    slot: ClassVar[str]

    @abstractmethod
    def draw(self, rng: random.Random, draft: Draft) -> Constraint:
        """Draws one and marks the draft. Raises Unfit where it cannot be kept."""

    @abstractmethod
    def told(self, constraint: Constraint) -> str:
        """The sentence of the instruction."""

    @abstractmethod
    def kept(self, constraint: Constraint, text: str) -> bool:
        """Whether a text keeps it."""

    def seen(self, constraint: Constraint, text: str) -> str:
        """What a worked solution says of a text that keeps it."""
        return "yes"


def counted(words: list[str]) -> str:
    """`river 1, moon 2`: words counted aloud."""
    return ", ".join(f"{word} {number}" for number, word in enumerate(words, start=1)) or "none"
