"""Chat in the terminal: what you type is a message, what begins with a slash is a command.

    /think   the model thinks before it answers      /reset        forget the conversation
    /nothink it answers at once                       /save [FILE]  write the conversation as JSON
    /auto    it decides by itself (as at the start)   /help, /quit

Ctrl-C stops the answer, and keeps what there is of it; Ctrl-D leaves.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from minglm.chat import ChatError, Delta, StreamParser, render_tokens
from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.tokenizer import Tokenizer

HELP = __doc__.partition("\n\n")[2]
MODES = {"/think": True, "/nothink": False, "/auto": None}
DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"


class Terminal:
    """A conversation with one model.

    Args:
        params: of every answer; `max_tokens` is cut to what the context has room for, and each answer has a seed of its own.
        max_context: tokens of conversation and answer together.
        source, target: lines are read here (a terminal or a pipe), and everything is written there.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        params: SamplingParams,
        max_context: int,
        source: TextIO | None = None,
        target: TextIO | None = None,
    ):
        self.messages: list[dict] = []
        self.thinking: bool | None = None
        self._engine, self._tokenizer, self._params, self._max_context = engine, tokenizer, params, max_context
        self._source, self._target = source or sys.stdin, target or sys.stdout
        self._is_terminal = self._target.isatty() and "NO_COLOR" not in os.environ
        self._answers = 0

    def run(self) -> None:
        """Until the input ends or /quit."""
        while (line := self._read_line()) is not None:
            line = line.strip()
            if line.startswith("/"):
                if not self._obey(line):
                    return
            elif line:
                self._say(line)

    def _read_line(self) -> str | None:
        """None at the end. With a person at the keyboard: their line editing, and Ctrl-C clears the line."""
        if not (self._source is sys.stdin and self._source.isatty()):
            return self._source.readline() or None
        with contextlib.suppress(ImportError):  # not on every system; without it, lines are edited plainly
            import readline  # noqa: F401  (input() uses it once it is there)
        while True:
            try:
                return input(f"{BOLD}> {PLAIN}" if self._is_terminal else "> ")
            except KeyboardInterrupt:
                self._write("\n(Ctrl-D leaves)\n")
            except EOFError:
                self._write("\n")
                return None

    # --------------------------------------------------------------------------------------------------------- commands

    def _obey(self, line: str) -> bool:
        """False to leave."""
        command, _, argument = line.partition(" ")
        if command in MODES:
            self.thinking = MODES[command]
            names = {True: "thinks before it answers", False: "answers at once", None: "decides by itself whether to think"}
            self._write(f"(the model {names[self.thinking]})\n")
        elif command == "/reset":
            self.messages.clear()
            self._write("(a new conversation)\n")
        elif command == "/save":
            self._save(Path(argument.strip() or time.strftime("chat-%Y%m%d-%H%M%S.json")))
        elif command == "/help":
            self._write(HELP)
        elif command in ("/quit", "/exit"):
            return False
        else:
            self._write(f"({command} is no command; /help lists them)\n")
        return True

    def _save(self, path: Path) -> None:
        try:
            with path.open("x", encoding="utf-8") as file:  # never over something that is there
                json.dump({"messages": self.messages}, file, ensure_ascii=False, indent=2)
        except OSError as error:
            self._write(f"(not saved: {path}: {error.strerror}; give another name)\n")
        else:
            self._write(f"(saved: {path})\n")

    # ---------------------------------------------------------------------------------------------------------- answers

    def _say(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        try:
            request_id = self._engine.add(*self._request())
        except (ChatError, ValueError) as error:
            self.messages.pop()
            self._write(f"({error})\n")
            return
        parser = StreamParser(None, self.thinking, in_thinking=bool(self.thinking))
        printer = _Printer(self._target, self._is_terminal)
        tokens, begun, reason = 0, None, None
        with _noted_interrupt() as interrupted:
            while reason is None:
                for output in self._engine.step():
                    begun = begun or time.perf_counter()
                    tokens += len(output.new_ids)
                    printer.show(parser.feed(output.text))
                    reason = output.finish_reason
                if interrupted and reason is None:
                    self._engine.cancel(request_id)
                    reason = "stopped"
            while self._engine.has_work:  # what a cancelled request leaves behind
                self._engine.step()
        printer.show(parser.finish())
        printer.end()
        self._report(tokens, begun, reason)
        message = parser.message
        self.messages.append({key: value for key, value in message.items() if value or key in ("role", "content")})

    def _request(self) -> tuple[list[int], SamplingParams]:
        thinks = self.thinking is True
        prompt = render_tokens(
            self._tokenizer, self.messages, None, self.thinking, add_generation_prompt=True, opens_thinking=thinks
        )
        ids = prompt.ids
        room = self._max_context - len(ids)
        if room < 1:
            raise ValueError(f"the conversation has {len(ids)} tokens and {self._max_context} is the limit; /reset begins anew")
        changes: dict[str, Any] = {"max_tokens": min(self._params.max_tokens, room), "must_think": thinks}
        if self._params.seed is not None:
            changes["seed"] = self._params.seed + self._answers
        self._answers += 1
        return ids, dataclasses.replace(self._params, **changes)

    def _report(self, tokens: int, begun: float | None, reason: str) -> None:
        seconds = time.perf_counter() - begun if begun else 0
        speed = f", {(tokens - 1) / seconds:.0f} tokens/s" if tokens > 1 and seconds > 0 else ""
        notes = {"length": ", cut off at the limit", "stopped": ", stopped"}
        text = f"[{tokens} token{'' if tokens == 1 else 's'}{speed}{notes.get(reason, '')}]"
        self._write(f"{DIM}{text}{PLAIN}\n\n" if self._is_terminal else f"{text}\n\n")

    def _write(self, text: str) -> None:
        self._target.write(text)
        self._target.flush()


class _Printer:
    """Shows a parser's deltas: thinking dim on a terminal, between marks elsewhere."""

    def __init__(self, target: TextIO, is_terminal: bool):
        self._target, self._is_terminal = target, is_terminal
        self._kind: str | None = None

    def show(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.kind == "tool_call_start":
                self._switch("call")
                self._put(f"<{delta.name}> ")
            elif delta.kind == "tool_call_arguments":
                self._put(delta.json_fragment)
            elif delta.kind == "error":
                self._switch("error")
                self._put(f"(a malformed tool call, at character {delta.position}: {delta.message})")
            else:
                self._switch(delta.kind)
                self._put(delta.text)
        self._target.flush()

    def end(self) -> None:
        self._switch(None)
        self._target.flush()

    def _switch(self, kind: str | None) -> None:
        if kind == self._kind:
            return
        if self._kind == "reasoning":
            self._target.write(f"{PLAIN}\n\n" if self._is_terminal else "\n[end of thinking]\n")
        elif self._kind is not None:
            self._target.write("\n")
        if kind == "reasoning":
            self._target.write(DIM if self._is_terminal else "[thinking]\n")
        self._kind = kind

    def _put(self, text: str) -> None:
        self._target.write(visible(text))


def visible(text: str) -> str:
    """Control characters as pictures of themselves: what a model writes must not steer the terminal."""

    def one(character: str) -> str:
        code = ord(character)
        if code < 0x20 and character not in "\n\t":
            return chr(0x2400 + code)
        return "\N{REPLACEMENT CHARACTER}" if 0x7F <= code <= 0x9F else character

    return "".join(map(one, text))


@contextlib.contextmanager
def _noted_interrupt() -> Iterator[list[int]]:
    """Meanwhile Ctrl-C is noted in the list, and raises nothing: the engine must not be left in the middle of a step."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
