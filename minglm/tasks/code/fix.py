"""Find and fix the bug of a small function."""

import json
import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.code import loops, steps
from minglm.tasks.code.answer import NAMES
from minglm.tasks.code.steps import INPUTS, Steps
from minglm.tasks.code.write import OnLists
from minglm.tasks.task import Message, reply

WORDINGS = (
    "{name}(xs) should: {orders}. It has a bug. Write it without the bug.\n{code}",
    "This function has a bug. It should: {orders}. Fix it.\n{code}",
    "Find the bug and write {name} right. It should: {orders}.\n{code}",
)
LOOPS = (2, 3)
"""Difficulties of which half of the problems are loops."""


@dataclass(frozen=True)
class FixFunction(OnLists):
    """Difficulty is the number of steps. One of them is wrong in the code that is shown, or the loop round them is."""

    family = "fix_function"
    stands_for = "Issues and changes of repositories in mid-training (section 2.3); the smallest step of SWE-bench."
    difficulties = range(1, 6)

    shown: Steps
    loop: bool
    slip: str | None
    """What is wrong with the loop, where the steps are right."""

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        wording, name = rng.randrange(len(WORDINGS)), rng.choice(NAMES)
        if difficulty not in LOOPS or rng.random() < 0.5:
            right = steps.draw(rng, difficulty, INPUTS)
            return cls(wording, name, right, rng.choice(steps.mistakes(right, INPUTS)), False, None)
        right = loops.draw(rng, difficulty, INPUTS)
        slips = loops.slips(right, INPUTS)
        if slips and rng.random() < 0.7:
            return cls(wording, name, right, right, True, rng.choice(slips))
        return cls(wording, name, right, rng.choice(loops.mistakes(right, INPUTS)), True, None)

    @property
    def key(self) -> str:
        return json.dumps([self.family, self.steps, self.shown, self.loop, self.slip])

    def _render(self, what: Steps, slip: str | None = None) -> str:
        return loops.render(self.name, what, slip) if self.loop else steps.render(self.name, what)

    @property
    def buggy(self) -> str:
        return self._render(self.shown, self.slip)

    @property
    def solution(self) -> str:
        return self._render(self.steps)

    @property
    def messages(self) -> list[Message]:
        text = WORDINGS[self.wording].format(name=self.name, orders=steps.orders(self.steps), code=self.buggy)
        return [{"role": "user", "content": text}]

    @property
    def thinking(self) -> str:
        if self.loop:
            wrong, right = self.buggy.split("\n"), self.solution.split("\n")
            lines = [f"{new.strip()}" for old, new in zip(wrong, right, strict=True) if old != new]
            words = loops.SLIPS.get(self.slip or "", "a line is wrong")
            return f"{words}: it must be {' and '.join(lines)}" + (" after the loop" if self.slip == "early" else "")
        lines = []
        for right, shown in zip(self.steps, self.shown, strict=True):
            order = right.says.removeprefix("return ")
            lines.append(f"{order}: {shown.code} is right" if right == shown else f"{order}: not {shown.code} but {right.code}")
        return "\n".join(lines)

    def near_miss(self, rng: random.Random) -> list[Message]:
        """The function as it was, or with another bug."""
        if self.loop:
            others = [self._render(self.steps, slip) for slip in loops.slips(self.steps, INPUTS)]
            others += [self._render(wrong) for wrong in loops.mistakes(self.steps, INPUTS)]
        else:
            others = [self._render(wrong) for wrong in steps.mistakes(self.steps, INPUTS)]
        return reply(rng.choice([self.buggy, *others]))
