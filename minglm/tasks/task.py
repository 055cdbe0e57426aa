"""What a problem family is: one class whose instances are problems.

From this one definition come the text of mid-training, the samples of SFT, the environments of RL, and the held-out
evaluation:

    problem = Countdown.sample(random.Random(1), difficulty=3)
    problem.messages                                  # what the model is asked, in OpenAI's format
    response = problem.demonstrate(thinking=True)     # a right answer: messages from the first of the assistant on
    problem.verify(response)                          # Verdict(reward=1.0, reasons=())

An agent's problem has tools, and an `Episode` that answers each message of the assistant:

    episode = problem.start()
    while not episode.done:
        response += [message := policy(problem.messages + response)]
        response += episode.step(message)

A response is judged by replaying it in a fresh episode, so `verify` is a function of problem and response alone.
"""

import hashlib
import itertools
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self

from minglm.data.sources import HELD_OUT, TRAIN

Message = dict[str, Any]
"""A message in OpenAI's format: role, content, and for the assistant reasoning_content and tool_calls."""

HELD_OUT_ONE_IN = 5
DRAWS_A_PROBLEM = 8  # before a small family is taken for exhausted


class TaskError(ValueError):
    """A problem that cannot be made, or a family that does not exist. The message says what was wanted."""


class Verdict(NamedTuple):
    """How good a response is, from 0 to 1; below 1 with what is wrong with it."""

    reward: float
    reasons: tuple[str, ...] = ()


class Episode(ABC):
    """The world of one attempt at a problem."""

    done: bool = False

    @abstractmethod
    def step(self, message: Message) -> list[Message]:
        """The assistant's message -> what comes back: results of its tool calls (role "tool"), or what the user says next;
        nothing once the episode has ended. Raises TaskError after that."""


class Problem(ABC):
    """A problem. Families are frozen dataclasses derived from this class, with all that makes the problem in fields."""

    family: ClassVar[str]
    """The name of the family, in snake_case."""
    stands_for: ClassVar[str]
    """What of the report it stands for: one sentence that names the section, and the public benchmark if there is one."""
    difficulties: ClassVar[range]
    """What `sample` takes; the first is the easiest."""

    @classmethod
    @abstractmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        """Draw a problem. Raises TaskError for a difficulty that the family does not have."""

    @property
    @abstractmethod
    def messages(self) -> list[Message]:
        """What the model is given first: the user's question, perhaps behind a system message."""

    @property
    def tools(self) -> list[dict[str, Any]]:
        """What it may call, in OpenAI's format."""
        return []

    @abstractmethod
    def demonstrate(self, thinking: bool) -> list[Message]:
        """A right response, results of tools included. thinking: with reasoning_content, a worked solution."""

    @abstractmethod
    def verify(self, response: Sequence[Message]) -> Verdict:
        """Judge a response, whatever it holds: never raises, never runs its text in this process."""

    @abstractmethod
    def near_miss(self, rng: random.Random) -> list[Message]:
        """A wrong response that looks like a right one: less than full reward."""

    @abstractmethod
    def guess(self, rng: random.Random) -> list[Message]:
        """What a policy answers that knows the form and nothing else."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """The expected reward of `guess`, by computation."""

    @property
    def key(self) -> str:
        """The content, which decides the split: problems with equal keys are in the same one. A family that asks one thing
        in several wordings leaves the wording out."""
        return json.dumps([self.messages, self.tools], sort_keys=True, ensure_ascii=False)

    def start(self) -> Episode:
        """A fresh world for one attempt. One message of the assistant ends it, unless the family says otherwise."""
        return SingleTurn()

    @classmethod
    def check_difficulty(cls, difficulty: int) -> None:
        if difficulty not in cls.difficulties:
            low, high = cls.difficulties[0], cls.difficulties[-1]
            raise TaskError(f"difficulty = {difficulty}: {cls.family} has {low} to {high}")


class SingleTurn(Episode):
    """Ends with the first message."""

    def step(self, message: Message) -> list[Message]:
        if self.done:
            raise TaskError("the episode has ended: start another one")
        self.done = True
        return []


def split_of(problem: Problem) -> Literal["train", "held_out"]:
    """Content decides, so that no problem is in both splits however small its family is."""
    digest = hashlib.sha256(problem.key.encode()).digest()
    return HELD_OUT if int.from_bytes(digest[:8]) % HELD_OUT_ONE_IN == 0 else TRAIN


def problems(
    family: type[Problem], split: Literal["train", "held_out"], seed: int, difficulties: Sequence[int] | None = None
) -> Iterator[Problem]:
    """An endless, seeded sequence of a family's problems in one split; each of one of the difficulties (by default all).

    Seeds of the two splits are apart, too. Raises TaskError if a split seems to hold no problem of the family.
    """
    if split not in (TRAIN, HELD_OUT):
        raise TaskError(f"split = {split!r}: wanted {TRAIN!r} or {HELD_OUT!r}")
    chosen = list(family.difficulties if difficulties is None else difficulties)
    for difficulty in chosen:
        family.check_difficulty(difficulty)
    rng = random.Random(f"{family.family} {split} {seed}")
    missed = 0
    while True:
        problem = family.sample(rng, rng.choice(chosen))
        if split_of(problem) == split:
            missed = 0
            yield problem
        else:
            missed += 1
            if missed == 1000:
                raise TaskError(f"{family.family}, difficulties {chosen}: 1,000 problems drawn, none of split {split!r}")


def different_problems(
    family: type[Problem],
    split: Literal["train", "held_out"],
    seed: int,
    count: int,
    difficulties: Sequence[int] | None = None,
) -> list[Problem]:
    """The first `count` different ones of `problems`: what is asked twice says less than it counts for. Fewer where so many
    draws a problem as `DRAWS_A_PROBLEM` hold no more."""
    found: dict[str, Problem] = {}
    for problem in itertools.islice(problems(family, split, seed, difficulties), DRAWS_A_PROBLEM * count):
        found.setdefault(problem.key, problem)
        if len(found) == count:
            break
    return list(found.values())


def reply(content: str, thinking: str | None = None) -> list[Message]:
    """A response of one message; with a worked solution if there is one."""
    message = {"role": "assistant", "content": content}
    return [message if thinking is None else {**message, "reasoning_content": thinking}]


def final_content(response: Sequence[Message]) -> str:
    """The content of the assistant's last message; empty if there is none, whatever else the response holds."""
    for message in reversed(response) if isinstance(response, list | tuple) else ():
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            content = message.get("content")
            return content if isinstance(content, str) else ""
    return ""
