"""Instruction following: a short text under one to six constraints that a program checks."""

import json
import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.general.answer import hear, shown
from minglm.tasks.general.constraints import Constraint
from minglm.tasks.general.draft import WORDS, Draft, Unfit, words_of
from minglm.tasks.general.forms import KINDS
from minglm.tasks.task import Message, Problem, TaskError, Verdict, reply

OPENINGS = ("Write a short text.", "Write some words.", "Write something short.")


def _stock() -> tuple[str, ...]:
    rng = random.Random("texts of a policy that knows no constraint")
    return tuple(" ".join(rng.sample(WORDS, 1 + number % 8)) for number in range(64))


STOCK = _stock()
"""What `guess` draws from: plain texts of one to eight words."""


@dataclass(frozen=True)
class InstructionFollowing(Problem):
    """A text is wanted that keeps some constraints. Difficulty is how many.

    The constraints are drawn together with a text that keeps them all, so every composition can be satisfied. The reward is 1
    where all are kept and else 0, IFEval's strict accuracy of a prompt (arXiv 2311.07911): a share of them would pay for
    bans that any text keeps, and for xxx in the right form. For the same reason a text has words: xxx is none.

    Fields:
        opening: the first sentence of the instruction.
        constraints: in the order told.
        text: one that keeps them.
    """

    opening: str
    constraints: tuple[Constraint, ...]
    text: str

    family = "instruction_following"
    stands_for = "Instruction-following RL with its types of constraints (section 3.4), and IFEval of section 4."
    difficulties = range(1, 7)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        for _ in range(10_000):
            names = _of_different_slots(rng, difficulty)
            draft = Draft()
            try:
                drawn = [KINDS[name].draw(rng, draft) for name in names]
                text = draft.write(rng)
            except Unfit:
                continue
            if all(KINDS[constraint.kind].kept(constraint, text) for constraint in drawn):
                rng.shuffle(drawn)
                return cls(rng.choice(OPENINGS), tuple(drawn), text)
        raise TaskError(f"no text found for {difficulty} constraints: this should not happen, the kinds contradict each other")

    @property
    def key(self) -> str:
        """The constraints, in whatever order and after whatever opening."""
        return json.dumps(sorted(self.constraints))

    @property
    def messages(self) -> list[Message]:
        told = [KINDS[constraint.kind].told(constraint) for constraint in self.constraints]
        return [{"role": "user", "content": " ".join([self.opening, *told])}]

    def demonstrate(self, thinking: bool) -> list[Message]:
        return reply(self.text, "\n".join(self._steps()) if thinking else None)

    def _steps(self) -> list[str]:
        """A draft on one line, then each constraint with what is seen of it."""
        checks = [
            f"{KINDS[constraint.kind].told(constraint)} {KINDS[constraint.kind].seen(constraint, self.text)}"
            for constraint in self.constraints
        ]
        return ["Draft: " + self.text.replace("\n", " / "), *checks]

    def verify(self, response) -> Verdict:
        content, fault = hear(response)
        if fault:
            return Verdict(0.0, (fault,))
        return self._judge(content)

    def _judge(self, text: str) -> Verdict:
        if any(len(word) > 2 and len(set(word)) == 1 for word in words_of(text)):
            return Verdict(0.0, (f"wanted words, not one letter over and over. Found {shown(text)}",))
        broken = [constraint for constraint in self.constraints if not KINDS[constraint.kind].kept(constraint, text)]
        reasons = tuple(f"{KINDS[constraint.kind].told(constraint)} Found {shown(text)}" for constraint in broken)
        return Verdict(float(not broken), reasons)

    def near_miss(self, rng: random.Random) -> list[Message]:
        changed = [text for text in _changes(self, rng) if text.strip() and self._judge(text.strip()).reward < 1]
        return reply(rng.choice(changed))

    def guess(self, rng: random.Random) -> list[Message]:
        return reply(rng.choice(STOCK))

    @property
    def chance(self) -> float:
        return sum(self._judge(text).reward for text in STOCK) / len(STOCK)


def _of_different_slots(rng: random.Random, count: int) -> list[str]:
    """Names of kinds, in the order in which they mark a draft."""
    names = list(KINDS)
    rng.shuffle(names)
    chosen: dict[str, str] = {}
    for name in names:
        if len(chosen) < count:
            chosen.setdefault(KINDS[name].slot, name)
    return sorted(chosen.values(), key=list(KINDS).index)


def _changes(problem: InstructionFollowing, rng: random.Random) -> list[str]:
    """Texts like the right one. For every kind of constraint, one of them breaks it (a test holds us to that)."""
    text = problem.text
    words = text.split(" ")
    lines = text.split("\n")
    named = [word for constraint in problem.constraints for word in constraint.words]
    number = max((constraint.number for constraint in problem.constraints), default=0)
    return [
        words[0],
        " ".join(words[:-1]),
        " ".join(words[1:]),
        " ".join([*words, rng.choice(WORDS)]),
        " ".join([rng.choice(WORDS), *words]),
        " ".join([*words, *rng.sample(WORDS, number)]) if number <= len(WORDS) else text * 2,
        " ".join(reversed(words)),
        f"{text}\n{text}",
        f"{text} {text}",
        "\n".join(lines[:-1]),
        " ".join(lines),
        text.upper(),
        text.lower(),
        text.capitalize(),
        text.strip('"!?.'),
        text.replace(",", ""),
        f"{text}, 7",
        *(text.replace(word, rng.choice([other for other in WORDS if other != word])) for word in named),
        *(f"{text} {word}" for word in named),
        text.replace(str(number), str(number + 1)),
        text.replace("[", "").replace("]", ""),
        f"{text} {min(WORDS)}",
        f"{text} {min(WORDS, key=len)} {max(WORDS, key=len)} {min(WORDS, key=len)}",
    ]
