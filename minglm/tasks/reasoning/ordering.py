"""Who is the oldest: people in a row, from comparisons that allow one order alone."""

import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.reasoning.exact import Word

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gil", "Hana")
RELATIONS = (("older", "younger", "oldest"), ("taller", "shorter", "tallest"), ("faster", "slower", "fastest"))
RANKS = ("", "second ", "third ", "fourth ", "fifth ", "sixth ", "seventh ", "eighth ")


@dataclass(frozen=True)
class Ordering(Word):
    """Difficulty d has d + 1 people. The comparisons are the d neighbours' in the true order, shuffled and turned round, so
    that they fix the order; from difficulty 2 on any rank is asked for, and from 4 on a needless comparison is added."""

    family = "ordering"
    stands_for = "Logic in synthetic reasoning data (section 2.3); BIG-bench's logical deduction."
    difficulties = range(1, 8)

    relation: int
    order: tuple[str, ...]
    """From the most to the least."""
    clues: tuple[tuple[str, str], ...]
    """(more, less): the pairs as they are told."""
    turned: tuple[bool, ...]
    """Which clues are told from the lesser one's side."""
    rank: int

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        order = rng.sample(NAMES, difficulty + 1)
        clues = list(zip(order, order[1:], strict=False))
        if difficulty >= 4:
            more, less = sorted(rng.sample(range(len(order)), 2))
            if less > more + 1:
                clues.append((order[more], order[less]))
        rng.shuffle(clues)
        return cls(
            wording=rng.randrange(2),
            relation=rng.randrange(len(RELATIONS)),
            order=tuple(order),
            clues=tuple(clues),
            turned=tuple(rng.random() < 0.5 for _ in clues),
            rank=0 if difficulty == 1 else rng.randrange(len(order)),
        )

    @property
    def question(self) -> str:
        more, less, most = RELATIONS[self.relation]
        told = " ".join(
            f"{b} is {less} than {a}." if turned else f"{a} is {more} than {b}."
            for (a, b), turned in zip(self.clues, self.turned, strict=True)
        )
        asked = f"Who is the {RANKS[self.rank]}{most}?"
        return f"{told} {asked}" if self.wording == 0 else f"{asked} {told}"

    @property
    def answer(self) -> str:
        return self.order[self.rank]

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(sorted(self.order))

    @property
    def thinking(self) -> str:
        """Comparisons told from the lesser one's side are turned; the row links them all; places are counted."""
        lines = [" > ".join(clue) for clue, turned in zip(self.clues, self.turned, strict=True) if turned]
        if len(self.order) > 2:
            lines.append(" > ".join(self.order))
        numbered = " ".join(f"{place} {name}" for place, name in enumerate(self.order[: self.rank + 1], 1))
        return "\n".join([*lines, numbered])
