"""Questions with one right answer, a number or a word, and what all their families share: form, verifier, guesses.

The answer is the content and nothing else, so that a verifier need not guess which number of a text was meant. Blanks at
its ends and one full stop do not count.
"""

import json
import random
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from minglm.tasks.task import Message, Problem, Verdict, reply

INTEGER = re.compile(r"[+-]?[0-9]{1,100}")


def only_content(response: Sequence[Message]) -> str | None:
    """The content of a response that is one message of the assistant without calls; None of any other."""
    if not isinstance(response, list | tuple) or len(response) != 1 or not isinstance(response[0], Mapping):
        return None
    message = response[0]
    content = message.get("content")
    if message.get("role") != "assistant" or message.get("tool_calls") or not isinstance(content, str):
        return None
    return content.strip().removesuffix(".")


@dataclass(frozen=True)
class OneAnswer(Problem):
    """A family derives from `Number` or `Word`, and gives `question`, `thinking` and the answer.

    `wording` chooses among ways to ask, and is no part of the problem's content, which is the question in wording 0.
    """

    wording: int

    @property
    @abstractmethod
    def question(self) -> str:
        """What is asked, in one or two sentences."""

    @property
    @abstractmethod
    def thinking(self) -> str:
        """The worked solution, in short lines."""

    @property
    @abstractmethod
    def answer(self) -> str:
        """The content of a right response."""

    @abstractmethod
    def why_wrong(self, content: str) -> str | None:
        """What is wrong with an answer; None if it is right."""

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.question}]

    @property
    def key(self) -> str:
        return json.dumps([self.family, replace(self, wording=0).question])

    def demonstrate(self, thinking: bool) -> list[Message]:
        return reply(self.answer, self.thinking if thinking else None)

    def verify(self, response: Sequence[Message]) -> Verdict:
        content = only_content(response)
        if content is None:
            return Verdict(0.0, ("wanted one message of the assistant with text as its content and no calls",))
        reason = self.why_wrong(content)
        return Verdict(1.0) if reason is None else Verdict(0.0, (reason,))


class Number(OneAnswer):
    """The answer is a whole number."""

    @property
    @abstractmethod
    def value(self) -> int:
        """The right number."""

    @property
    @abstractmethod
    def guesses(self) -> range:
        """The numbers that may be right for all that the form of the question says; `value` is among them."""

    @property
    def answer(self) -> str:
        return str(self.value)

    def why_wrong(self, content: str) -> str | None:
        if not INTEGER.fullmatch(content):
            return f"the answer is {content[:60]!r}; wanted a whole number and nothing else"
        return None if int(content) == self.value else f"the answer is {content}; right is {self.value}"

    def near_miss(self, rng: random.Random) -> list[Message]:
        """A slip by one in some place, or of the sign."""
        place = 10 ** rng.randrange(len(str(abs(self.value))))
        wrong = {self.value + place, self.value - place, -self.value} - {self.value}
        return reply(str(rng.choice(sorted(wrong))))

    def guess(self, rng: random.Random) -> list[Message]:
        return reply(str(rng.choice(self.guesses)))

    @property
    def chance(self) -> float:
        return 1 / len(self.guesses)


class Word(OneAnswer):
    """The answer is one of a few words."""

    @property
    @abstractmethod
    def choices(self) -> tuple[str, ...]:
        """The words that may be right for all that the form of the question says; the right one is among them."""

    def why_wrong(self, content: str) -> str | None:
        return None if content == self.answer else f"the answer is {content[:60]!r}; right is {self.answer!r}"

    def near_miss(self, rng: random.Random) -> list[Message]:
        return reply(rng.choice([choice for choice in self.choices if choice != self.answer]))

    def guess(self, rng: random.Random) -> list[Message]:
        return reply(rng.choice(self.choices))

    @property
    def chance(self) -> float:
        return 1 / len(self.choices)
