"""A question of an exam: what is asked, how an answer is judged, and a right answer if one is published."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minglm.evals.measure import EvaluationError
from minglm.tasks.task import Episode, Message, SingleTurn, Verdict, final_content

RIGHT = Verdict(1.0)
Judge = Callable[[Sequence[Message]], Verdict]


class Unscorable(EvaluationError):
    """An answer that cannot be judged here. The message says what is needed."""


@dataclass(frozen=True)
class Question:
    """One question of a benchmark or a family; where it is asked it stands beside `Problem`.

    suite: the benchmark or family. id: unique within it. judge: of a whole response; may raise Unscorable. gold: a right
    response, where one is published; thought: one with thinking. turns: of the assistant, at most. place: of the record.
    published: the record's own text, without our words around it, which is what may lie in training text.
    """

    suite: str
    id: str
    messages: Sequence[Message]
    judge: Judge
    gold: Sequence[Message] = ()
    thought: Sequence[Message] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    turns: int = 1
    world: Callable[[], Episode] = SingleTurn
    chance: float | None = None
    place: str = ""
    published: str = ""

    @property
    def text(self) -> str:
        """The question as one text."""
        return "\n".join(str(message.get("content") or "") for message in self.messages)

    def start(self) -> Episode:
        return self.world()

    def demonstrate(self, thinking: bool) -> Sequence[Message]:
        return self.thought if thinking and self.thought else self.gold

    def verify(self, response: Sequence[Message]) -> Verdict:
        """Judge a response; one that says and calls nothing, or only repeats the question, is worth nothing in any exam."""
        turns = [message for message in response if message.get("role") == "assistant"]
        if not any(message.get("tool_calls") or str(message.get("content") or "").strip() for message in turns):
            return Verdict(0.0, ("the answer is empty",))
        copies = {" ".join(text.split()) for text in (self.text, *(str(one.get("content")) for one in self.messages))}
        if " ".join(final_content(response).split()) in copies - {""}:
            return Verdict(0.0, ("the answer is the question",))
        return self.judge(response)


def digest(text: str) -> str:
    """An id for a question that is published without one: the same wherever its file lies."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def asked(text: str, system: str | None = None) -> list[Message]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]


def judged_text(why_wrong: Callable[[str], str | None]) -> Judge:
    """A judge of the last message's content. why_wrong: None where it is right."""

    def judge(response: Sequence[Message]) -> Verdict:
        reason = why_wrong(final_content(response))
        return RIGHT if reason is None else Verdict(0.0, (reason,))

    return judge
