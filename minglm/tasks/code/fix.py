"""Find and fix the bug of a small function."""

import json
import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.code import steps
from minglm.tasks.code.answer import NAMES, reply
from minglm.tasks.code.steps import INPUTS, Steps
from minglm.tasks.code.write import OnLists
from minglm.tasks.task import Message

WORDINGS = (
    "{name}(xs) should: {orders}. It has a bug. Write it without the bug.\n{code}",
    "This function has a bug. It should: {orders}. Fix it.\n{code}",
    "Find the bug and write {name} right. It should: {orders}.\n{code}",
)


@dataclass(frozen=True)
class FixFunction(OnLists):
    """Difficulty is the number of steps; one of them is wrong in the code that is shown."""

    family = "fix_function"
    stands_for = "Issues and changes of repositories in mid-training (section 2.3); the smallest step of SWE-bench."
    difficulties = range(1, 6)

    shown: Steps

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        right = steps.draw(rng, difficulty, INPUTS)
        return cls(rng.randrange(len(WORDINGS)), rng.choice(NAMES), right, rng.choice(steps.mistakes(right, INPUTS)))

    @property
    def key(self) -> str:
        return json.dumps([self.family, self.steps, self.shown])

    @property
    def messages(self) -> list[Message]:
        orders, code = steps.orders(self.steps), steps.render(self.name, self.shown)
        return [{"role": "user", "content": WORDINGS[self.wording].format(name=self.name, orders=orders, code=code)}]

    @property
    def thinking(self) -> str:
        lines = []
        for right, shown in zip(self.steps, self.shown, strict=True):
            order = right.says.removeprefix("return ")
            lines.append(f"{order}: {shown.code} is right" if right == shown else f"{order}: not {shown.code} but {right.code}")
        return "\n".join(lines)

    def near_miss(self, rng: random.Random) -> list[Message]:
        """The function as it was, or with another bug."""
        return reply(steps.render(self.name, rng.choice([self.shown, *steps.mistakes(self.steps, INPUTS)])))
