"""A model at work on problems: asked in one form or another, answered by the world, judged by the family's verifier."""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm import tqdm

from minglm.chat import OPENS_THINKING, ChatError, StreamParser, parse, render_tokens
from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.engine.sequence import Completion
from minglm.evals.benchmarks.question import Question, Unscorable
from minglm.evals.endpoint import Endpoint, EndpointError, Refused, Written
from minglm.tasks.sandbox import SandboxError
from minglm.tasks.task import Message, Problem, Verdict
from minglm.tasks.text import ANSWER, STOPS, THINKING, conversation_text, document, in_one_form, prompt_text, read_answer
from minglm.tokenizer import Tokenizer

FEWEST_NEW_TOKENS = 8  # with room for fewer a problem is left out: it could not be answered
MORE_TURNS = 2  # than the demonstration needs
AT_ONCE = 16  # questions to an endpoint
CANNOT_JUDGE = (Unscorable, SandboxError, Refused)  # the last by a model that judges or plays a customer
Asked = Problem | Question


class Form(Protocol):
    """How a problem is put to a model, and how its turn is read."""

    tokenizer: Tokenizer
    thinking: bool | None
    stops: tuple[str, ...]

    def prompt(self, problem: Asked, response: Sequence[Message], room: int) -> list[int]:
        """The ids that the next turn of the assistant follows: at most `room`, if it can be put so."""

    def turn(self, problem: Asked, message: Message) -> list[int]:
        """The ids of a turn, for its length."""

    def read(self, problem: Asked, response: Sequence[Message], completion: Completion) -> Message:
        """What the model wrote, as a message; never raises."""


@dataclass(frozen=True)
class BaseForm:
    """Plain text behind solved problems of the training split: `shots`, as many of them as there is room for.

    thinking: the shots think, and the answer is begun with `Thinking:`; otherwise, where there is no tool to call instead,
    with `Answer:`.
    """

    tokenizer: Tokenizer
    shots: tuple[Problem, ...]
    thinking: bool
    stops: tuple[str, ...] = STOPS

    def begun(self, problem: Problem, response: Sequence[Message] = ()) -> str:
        """The first words of the answer, which are the evaluation's."""
        if self.thinking:
            return "" if response else THINKING
        return "" if problem.tools else ANSWER

    def text(self, problem: Problem, response: Sequence[Message], shots: int) -> str:
        before = "".join(document(shot, self.thinking) for shot in self.shots[:shots])
        return before + prompt_text(problem) + conversation_text(response) + self.begun(problem, response)

    def prompt(self, problem: Asked, response: Sequence[Message], room: int) -> list[int]:
        for shots in range(len(self.shots), 0, -1):
            ids = self.tokenizer.encode(self.text(problem, response, shots))
            if len(ids) <= room:
                return ids
        return self.tokenizer.encode(self.text(problem, response, 0))

    def turn(self, problem: Asked, message: Message) -> list[int]:
        return self.tokenizer.encode(conversation_text([message]) + "\n")

    def read(self, problem: Asked, response: Sequence[Message], completion: Completion) -> Message:
        found = read_answer(self.begun(problem, response) + completion.text)
        # One turn at a time: a second message would have been written without the world's answer to the first.
        return next((message for message in found if message["role"] == "assistant"), in_one_form({"role": "assistant"}))


@dataclass(frozen=True)
class ChatForm:
    """The chat template, without examples. thinking: True opens it, as `serve` does; None leaves it to the model, which is the
    automatic mode; False forbids it."""

    tokenizer: Tokenizer
    thinking: bool | None
    stops: tuple[str, ...] = ()

    def prompt(self, problem: Asked, response: Sequence[Message], room: int) -> list[int]:
        conversation = [*problem.messages, *response]
        return render_tokens(
            self.tokenizer,
            conversation,
            problem.tools or None,
            self.thinking,
            add_generation_prompt=True,
            opens_thinking=self.thinking is True,
        ).ids

    def turn(self, problem: Asked, message: Message) -> list[int]:
        before = self.prompt(problem, (), 0)
        whole = render_tokens(self.tokenizer, [*problem.messages, message], problem.tools or None, self.thinking).ids
        return whole[len(before) :]

    def read(self, problem: Asked, response: Sequence[Message], completion: Completion) -> Message:
        text = OPENS_THINKING + completion.text if self.thinking else completion.text
        try:
            return parse(text, problem.tools or None)
        except ChatError:
            return _with_broken_call(text, problem.tools, self.thinking)


def _with_broken_call(text: str, tools: Sequence[Mapping[str, Any]], thinking: bool | None) -> Message:
    """A turn with a call that cannot be read: all before it, and where there are tools a call with arguments as they stand,
    which is none that could be done."""
    parser = StreamParser(tools or None, thinking)
    parser.feed(text)
    parser.finish()
    message = parser.message
    calls = text.rpartition("</think>")[2].split("<tool_call>")[1:]
    if tools and len(calls) > len(message["tool_calls"]):
        broken = calls[len(message["tool_calls"])]
        message["tool_calls"].append({"function": {"name": broken.split("\n")[0].strip(), "arguments": broken}})
    return in_one_form(message)


@dataclass
class Attempt:
    """One problem, what the model has answered so far (results of tools included), and the verdict at the end.

    seed: of what is drawn. too_long: the problem did not fit the model's positions, so that nothing was asked. tokens: that
    the model wrote; cut: a turn of it ended at the limit. unjudged: why there is no verdict.
    """

    problem: Asked
    seed: int = 0
    response: list[Message] = field(default_factory=list)
    verdict: Verdict | None = None
    too_long: bool = False
    tokens: int = 0
    cut: bool = False
    unjudged: str = ""


class Writer(Protocol):
    """Who writes the turns of the assistant."""

    thinking: bool | None

    def write(self, attempts: Sequence[Attempt]) -> Sequence[Written | None]:
        """The next turn of each; None of those that leave no room for one."""


@dataclass
class EngineWriter:
    """A model of ours. tokens: of a turn, at most; None: half as many again as the demonstration's longest turn has."""

    engine: Engine
    form: Form
    temperature: float = 0.0
    tokens: int | None = None

    @property
    def thinking(self) -> bool | None:
        return self.form.thinking

    def write(self, attempts: Sequence[Attempt]) -> list[Written | None]:
        fitting = [self._fit(one) for one in attempts]
        asked = [pair for pair in fitting if pair is not None]
        completions = iter(self.engine.generate([prompt for prompt, _ in asked], [params for _, params in asked]))
        return [
            None if pair is None else self._read(one, next(completions)) for one, pair in zip(attempts, fitting, strict=True)
        ]

    def _read(self, one: Attempt, completion: Completion) -> Written:
        message = self.form.read(one.problem, one.response, completion)
        return Written(message, len(completion.ids), completion.finish_reason == "length")

    def _limit(self, problem: Asked) -> int:
        if self.tokens is not None:
            return self.tokens
        shown = problem.demonstrate(thinking=self.thinking is not False)
        longest = max(len(self.form.turn(problem, message)) for message in shown if message["role"] == "assistant")
        return longest + longest // 2 + FEWEST_NEW_TOKENS

    def _fit(self, one: Attempt) -> tuple[list[int], SamplingParams] | None:
        """The prompt and how it is to be answered, within the model's positions; None if they leave no room for an answer."""
        positions, limit = self.engine.model.config.max_position_embeddings, self._limit(one.problem)
        try:
            prompt = self.form.prompt(one.problem, one.response, positions - limit)
        except ChatError:  # what the model wrote before cannot be put into the template
            return None
        room = positions - len(prompt) + 1  # the last token is never fed
        if room < FEWEST_NEW_TOKENS:
            return None
        most = min(limit, room)
        params = SamplingParams(
            temperature=self.temperature,
            max_tokens=most,
            stop=self.form.stops,
            seed=one.seed,
            must_think=isinstance(self.form, ChatForm) and self.thinking is True,
        )
        return prompt, params


@dataclass
class EndpointWriter:
    """A model behind an endpoint; `AT_ONCE` questions are under way. tokens: of a turn, at most; None: its own limit."""

    endpoint: Endpoint
    thinking: bool | None
    temperature: float
    tokens: int | None = None

    def write(self, attempts: Sequence[Attempt]) -> list[Written | None]:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            found = list(threads.map(self._turn, attempts))
        if len(found) >= AT_ONCE and not any(found):  # it is not the questions
            raise EndpointError(f"all {len(found)} requests were refused, one of them so: {attempts[0].unjudged}")
        return found

    def _turn(self, one: Attempt) -> Written | None:
        messages = as_request([*one.problem.messages, *one.response])
        arguments = (one.problem.tools, self.thinking, self.temperature, self.tokens, one.seed % 2**31)
        try:
            written = self.endpoint.ask(messages, *arguments)
        except Refused as error:  # of this question: an exam that ended here would end here every time
            one.unjudged = str(error)
            return None
        return written._replace(message=in_one_form(written.message))


def as_request(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages as OpenAI's protocol has them: calls with identities and the JSON of their arguments, and no reasoning."""
    found: list[Message] = []
    open: list[str] = []
    for message in messages:
        one = {"role": message["role"], "content": message.get("content") or ""}
        if message["role"] == "tool":
            one["tool_call_id"] = open.pop(0) if open else "call"
        elif calls := message.get("tool_calls"):
            open = [f"call_{len(found)}_{number}" for number in range(len(calls))]
            one["tool_calls"] = [
                {"id": id, "type": "function", "function": {"name": call["function"]["name"], "arguments": _as_json(call)}}
                for id, call in zip(open, calls, strict=True)
            ]
        found.append(one)
    return found


def _as_json(call: Mapping[str, Any]) -> str:
    arguments = call["function"]["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def attempt(
    writer: Writer, attempts: Sequence[Attempt], about: str, progress: bool, done: Callable[[Attempt], None] = lambda one: None
) -> list[Attempt]:
    """Have the model solve all problems side by side, turn by turn. done: called with each attempt once it is judged.
    -> the attempts, in order. Raises EndpointError where an endpoint gives no answer."""
    episodes = [one.problem.start() for one in attempts]
    turns = [turns_of(one.problem, writer.thinking) for one in attempts]
    going = list(range(len(attempts)))
    with tqdm(total=len(attempts), desc=about, unit="problem", disable=not progress, leave=False) as bar:
        while going:
            written = writer.write([attempts[i] for i in going])
            for i, turn in zip(going, written, strict=True):
                one = attempts[i]
                if turn is None:
                    one.too_long = not (one.response or one.unjudged)  # later on, it ends with what it has
                    episodes[i].done = True
                    continue
                one.tokens, one.cut = one.tokens + turn.tokens, one.cut or turn.cut
                one.response.append(turn.message)
                try:
                    one.response += episodes[i].step(turn.message)
                except CANNOT_JUDGE as error:
                    one.unjudged, episodes[i].done = str(error), True
                turns[i] -= 1
            ended, going = going, [i for i in going if not episodes[i].done and turns[i]]
            for i in ended:
                if i not in going:
                    _judge(attempts[i])
                    done(attempts[i])
                    bar.update()
    return list(attempts)


def _judge(one: Attempt) -> None:
    if not one.unjudged:
        try:
            one.verdict = one.problem.verify(one.response)
        except CANNOT_JUDGE as error:
            one.unjudged = str(error)


def turns_of(problem: Asked, thinking: bool | None) -> int:
    """How many turns the assistant has, at most."""
    if isinstance(problem, Question):
        return problem.turns
    shown = problem.demonstrate(thinking=thinking is not False)
    return MORE_TURNS + sum(message["role"] == "assistant" for message in shown)
