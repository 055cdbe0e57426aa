"""Knights, who always tell the truth, and knaves, who always lie: puzzles with exactly one solution."""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from minglm.tasks.reasoning.exact import Word

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn")
KINDS = {True: "knight", False: "knave"}

Kinds = Sequence[bool] | Mapping[int, bool]
"""Of each person by number, whether a knight."""
Statement = tuple[str, int, int]
"""What somebody says, of two people by number: ("knight", i, i), ("knave", i, i), ("same", i, j), ("differ", i, j)."""


@dataclass(frozen=True)
class Knights(Word):
    """Difficulty d has d + 1 people who each say something; one solution fits, found by trying. The first difficulty has
    one who is known."""

    family = "knights"
    stands_for = "Logic in synthetic reasoning data (section 2.3); knights-and-knaves benchmarks."
    difficulties = range(1, 6)

    statements: tuple[Statement, ...]
    known: bool
    """Whether the first person is told to be a knight, or a knave: by `truth`."""
    truth: tuple[bool, ...]
    """Who is a knight."""
    asked: int

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        people, known = difficulty + 1, difficulty == 1
        while True:
            truth = tuple(rng.random() < 0.5 for _ in range(people))
            statements = tuple(_draw(rng, person, truth) for person in range(people))
            if solutions(statements, truth[0] if known else None) == [truth]:
                asked = rng.randrange(1 if known else 0, people)
                return cls(rng.randrange(2), statements, known, truth, asked)

    @property
    def question(self) -> str:
        told = [f'{NAMES[person]}: "{_said(said)}"' for person, said in enumerate(self.statements)]
        fact = [f"{NAMES[0]} is a {KINDS[self.truth[0]]}."] if self.known else []
        rule = "Knights tell the truth, knaves lie."
        asked = f"Is {NAMES[self.asked]} a knight or a knave?"
        return " ".join([rule, *fact, *told, asked] if self.wording == 0 else [asked, rule, *fact, *told])

    @property
    def answer(self) -> str:
        return KINDS[self.truth[self.asked]]

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(KINDS.values())

    @property
    def thinking(self) -> str:
        """Suppose, and follow what is said, to a contradiction or to the end: each line is one such path."""
        start = {0: self.truth[0]} if self.known else {}
        return "\n".join(_paths(self.statements, start))


def _paths(statements: Sequence[Statement], kinds: dict[int, bool]) -> list[str]:
    """Lines up to the first path that ends well; a path lists people in the order in which their kinds became known."""
    kinds, fits = _followed(statements, kinds)
    if not fits or len(kinds) == len(statements):
        row = ", ".join(f"{NAMES[person]} {KINDS[kind]}" for person, kind in kinds.items())
        return [f"{row}: {'yes' if fits else 'no'}"]
    person = next(person for person in range(len(statements)) if person not in kinds)
    lines = _paths(statements, {**kinds, person: True})
    return lines if lines[-1].endswith("yes") else [*lines, *_paths(statements, {**kinds, person: False})]


def _followed(statements: Sequence[Statement], kinds: dict[int, bool]) -> tuple[dict[int, bool], bool]:
    """Who else must be what, where a statement lacks one person's kind alone; and whether no statement is broken."""
    kinds = dict(kinds)
    learnt = True
    while learnt:
        learnt = False
        for speaker, said in enumerate(statements):
            unknown = {speaker, *said[1:]} - kinds.keys()
            if len(unknown) > 1:
                continue
            possible = [{**kinds, person: kind} for person in unknown for kind in (True, False)] or [kinds]
            fitting = [case for case in possible if _fits(speaker, said, case)]
            if not fitting:
                return kinds, False
            if len(fitting) == 1 and unknown:
                kinds, learnt = fitting[0], True
    return kinds, True


def _fits(speaker: int, said: Statement, kinds: Kinds) -> bool:
    return _holds(said, kinds) == kinds[speaker]


def solutions(statements: Sequence[Statement], first: bool | None = None) -> list[tuple[bool, ...]]:
    """All ways to be knights and knaves in which knights' statements hold and knaves' do not; `first` fixes one person."""
    return [
        case
        for case in itertools.product((True, False), repeat=len(statements))
        if first in (None, case[0])
        if all(_fits(person, said, case) for person, said in enumerate(statements))
    ]


def _draw(rng: random.Random, person: int, truth: Sequence[bool]) -> Statement:
    """Something that this person can say: of others, or of another and oneself. (Nobody can call himself a knave, and to
    call oneself a knight says nothing.)"""
    people = range(len(truth))
    while True:
        other = rng.choice([number for number in people if number != person])
        kind = rng.choice(("knight", "knave", "same", "differ"))
        third = other if kind in ("knight", "knave") else rng.choice([number for number in people if number != other])
        said = (kind, *sorted((other, third)))
        if _fits(person, said, truth):
            return said


def _holds(said: Statement, kinds: Kinds) -> bool:
    kind, one, other = said
    match kind:
        case "knight":
            return kinds[one]
        case "knave":
            return not kinds[one]
        case "same":
            return kinds[one] == kinds[other]
        case _:
            return kinds[one] != kinds[other]


def _said(said: Statement) -> str:
    kind, one, other = said
    match kind:
        case "knight" | "knave":
            return f"{NAMES[one]} is a {kind}."
        case "same":
            return f"{NAMES[one]} and {NAMES[other]} are the same."
        case _:
            return f"{NAMES[one]} and {NAMES[other]} differ."
