"""The world of an agent's problem: it answers calls of tools, speaks for the user, and judges when it has ended.

All that comes back is a function of the problem and of what the assistant did before: no clock, no chance, no state
outside the world. So an attempt is judged by replaying it, and an attempt that quotes other results than the world gave
is refused.
"""

import json
from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

from minglm.tasks.agents.calling import Call, MalformedCall, Tool, call_message, read_calls
from minglm.tasks.task import Episode, Message, Problem, TaskError, Verdict

Replies = list[str]


class Move(NamedTuple):
    """One turn of the assistant: calls, or else content."""

    thinking: str
    calls: Sequence[Call] = ()
    content: str = ""


Moves = Generator[Move, Replies, None]
"""A policy: yields moves and is sent what came back, the contents of the results or of the user's message."""


class World(Episode):
    """One attempt. `faults` says what went wrong; an attempt that has ended without any was right."""

    def __init__(self, tools: Sequence[Tool], turn_limit: int):
        self.tools = tools
        self.turn_limit = turn_limit
        self.turns = 0
        self.faults: list[str] = []

    @abstractmethod
    def call(self, call: Call) -> str:
        """Do a call of one of the tools; its arguments fit the schema. -> the result; of what cannot be done it begins with
        `calling.ERROR`."""

    @abstractmethod
    def hear(self, content: str) -> str | None:
        """The assistant speaks. -> what the user says to that; None after the last word, with any faults added."""

    def after_calls(self) -> None:
        """Called when the calls of one message are done: a place to end the attempt."""

    def end(self, *faults: str) -> None:
        self.done = True
        self.faults += faults

    def step(self, message: Message) -> list[Message]:
        if self.done:
            raise TaskError("the episode has ended: start another one")
        self.turns += 1
        if self.turns > self.turn_limit:
            self.end(f"more than {self.turn_limit} messages")
            return []
        try:
            calls = read_calls(message, self.tools)
            content = _content(message)
        except MalformedCall as error:
            self.end(f"malformed call: {error}")
            return []
        if not calls:
            reply = self.hear(content)
            if reply is None:
                self.end()
            return [] if self.done else [{"role": "user", "content": reply}]
        results = [{"role": "tool", "content": self.call(call)} for call in calls]
        self.after_calls()
        return [] if self.done else results

    def verdict(self) -> Verdict:
        """How the attempt went, once it has ended."""
        return Verdict(0.0, tuple(self.faults)) if self.faults else Verdict(1.0)


class AgentProblem(Problem):
    """A problem with tools, whose `start` gives a World and whose `solve` is a policy that is right."""

    @abstractmethod
    def start(self) -> World: ...

    @abstractmethod
    def solve(self) -> Moves:
        """The right moves. Their thinking speaks only of what the assistant has been told by then."""

    @property
    def key(self) -> str:
        """The question and the way to the answer: worlds that differ elsewhere are one problem, however large they are."""
        return json.dumps([self.messages, self.demonstrate(thinking=True)], sort_keys=True, ensure_ascii=False)

    def demonstrate(self, thinking: bool) -> list[Message]:
        return self.play(self.solve(), thinking)

    def play(self, moves: Moves, thinking: bool = False) -> list[Message]:
        """What comes of a policy's moves, until the world ends or the policy does."""
        world = self.start()
        response: list[Message] = []
        replies: Replies | None = None
        while not world.done:
            try:
                move = moves.send(replies)
            except StopIteration:
                break
            message = call_message(move.calls) if move.calls else {"role": "assistant", "content": move.content}
            if thinking and move.thinking:
                message["reasoning_content"] = move.thinking
            came_back = world.step(message)
            response += [message, *came_back]
            replies = [reply["content"] for reply in came_back]
        return response

    def verify(self, response: Sequence[Message]) -> Verdict:
        messages = list(response) if isinstance(response, list | tuple) else []
        world = self.start()
        position = 0
        while position < len(messages) and not world.done:
            came_back = world.step(messages[position])
            position += 1
            for reply in came_back:
                if position == len(messages) or not _says(messages[position], reply):
                    return Verdict(0.0, (f"message {position + 1} is not what the world answers",))
                position += 1
        if not world.done:
            return Verdict(0.0, (*world.faults, "the response ends before the task does"))
        if position < len(messages):
            return Verdict(0.0, (*world.faults, f"message {position + 1} comes after the end"))
        return world.verdict()


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if not isinstance(content, str):
        raise MalformedCall(f"content is a {type(content).__name__}; wanted text")
    return content


def _says(message: Any, wanted: Message) -> bool:
    return isinstance(message, Mapping) and all(
        isinstance(message.get(key), str) and message[key] == wanted[key] for key in ("role", "content")
    )


def word(content: str) -> str:
    """An answer, without what does not count: white space around it, one full stop at its end."""
    return content.strip().removesuffix(".").rstrip()
