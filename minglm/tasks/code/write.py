"""Write a small function for a specification."""

import json
import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.code import steps
from minglm.tasks.code.answer import NAMES, WritesCode
from minglm.tasks.code.steps import INPUTS, Steps
from minglm.tasks.sandbox import Case
from minglm.tasks.task import Message, reply

WORDINGS = (
    "Write a Python function {name}(xs) for a list of integers: {orders}.",
    "Write {name}(xs) in Python. xs is a list of integers: {orders}.",
    "xs is a list of integers. Write a Python function {name}(xs): {orders}.",
)
GUESSES = (
    ("xs", lambda xs: list(xs)),
    ("[]", lambda xs: []),
    ("0", lambda xs: 0),
    ("1", lambda xs: 1),
    ("None", lambda xs: None),
    ("True", lambda xs: True),
)


@dataclass(frozen=True)
class OnLists(WritesCode):
    """A function of a list of integers, that does some steps in turn."""

    steps: Steps

    @property
    def key(self) -> str:
        return json.dumps([self.family, self.steps])

    @property
    def solution(self) -> str:
        return steps.render(self.name, self.steps)

    @property
    def cases(self) -> tuple[Case, ...]:
        return tuple(Case((xs,), steps.apply(self.steps, xs)) for xs in INPUTS)

    @property
    def guesses(self):
        return GUESSES

    def guess(self, rng: random.Random) -> list[Message]:
        return reply(f"def {self.name}(xs):\n    return {rng.choice(GUESSES)[0]}")


@dataclass(frozen=True)
class WriteFunction(OnLists):
    """Difficulty is the number of steps."""

    family = "write_function"
    stands_for = "Code in pre-training and code reinforcement learning (sections 2.2, 3.2); HumanEval, MBPP, LiveCodeBench."
    difficulties = range(1, 6)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        return cls(rng.randrange(len(WORDINGS)), rng.choice(NAMES), steps.draw(rng, difficulty, INPUTS))

    @property
    def messages(self) -> list[Message]:
        text = WORDINGS[self.wording].format(name=self.name, orders=steps.orders(self.steps))
        return [{"role": "user", "content": text}]

    @property
    def thinking(self) -> str:
        return "\n".join(f"{step.says.removeprefix('return ')}: {step.code}" for step in self.steps)

    def near_miss(self, rng: random.Random) -> list[Message]:
        return reply(steps.render(self.name, rng.choice(steps.mistakes(self.steps, INPUTS))))
