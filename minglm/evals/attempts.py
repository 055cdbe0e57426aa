"""A model at work on problems: asked in one form or another, answered by the world, judged by the family's verifier."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tqdm import tqdm

from minglm.chat import ChatError, parse, render_tokens
from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.engine.sequence import Completion
from minglm.tasks.task import Message, Problem, Verdict
from minglm.tasks.text import ANSWER, STOPS, THINKING, conversation_text, document, in_one_form, prompt_text, read_answer
from minglm.tokenizer import Tokenizer

FEWEST_NEW_TOKENS = 8  # with room for fewer a problem is left out: it could not be answered
MORE_TURNS = 2  # than the demonstration needs


class Form(Protocol):
    """How a problem is put to a model, and how its turn is read."""

    tokenizer: Tokenizer
    stops: tuple[str, ...]

    def prompt(self, problem: Problem, response: Sequence[Message], room: int) -> list[int]:
        """The ids that the next turn of the assistant follows: at most `room`, if it can be put so."""

    def turn(self, problem: Problem, message: Message) -> list[int]:
        """The ids of a turn, for its length."""

    def read(self, problem: Problem, response: Sequence[Message], completion: Completion) -> Message:
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

    def prompt(self, problem: Problem, response: Sequence[Message], room: int) -> list[int]:
        for shots in range(len(self.shots), 0, -1):
            ids = self.tokenizer.encode(self.text(problem, response, shots))
            if len(ids) <= room:
                return ids
        return self.tokenizer.encode(self.text(problem, response, 0))

    def turn(self, problem: Problem, message: Message) -> list[int]:
        return self.tokenizer.encode(conversation_text([message]) + "\n")

    def read(self, problem: Problem, response: Sequence[Message], completion: Completion) -> Message:
        found = read_answer(self.begun(problem, response) + completion.text)
        # One turn at a time: a second message would have been written without the world's answer to the first.
        return next((message for message in found if message["role"] == "assistant"), in_one_form({"role": "assistant"}))


@dataclass(frozen=True)
class ChatForm:
    """The chat template, without examples. thinking: None and True leave it to the model, False forbids it."""

    tokenizer: Tokenizer
    thinking: bool
    stops: tuple[str, ...] = ()

    def prompt(self, problem: Problem, response: Sequence[Message], room: int) -> list[int]:
        conversation = [*problem.messages, *response]
        return render_tokens(self.tokenizer, conversation, problem.tools or None, self.thinking, add_generation_prompt=True).ids

    def turn(self, problem: Problem, message: Message) -> list[int]:
        before = self.prompt(problem, (), 0)
        whole = render_tokens(self.tokenizer, [*problem.messages, message], problem.tools or None, self.thinking).ids
        return whole[len(before) :]

    def read(self, problem: Problem, response: Sequence[Message], completion: Completion) -> Message:
        try:
            return parse(completion.text, problem.tools or None)
        except ChatError:  # a malformed call: the verifier sees what stands there
            return in_one_form({"role": "assistant", "content": completion.text})


@dataclass
class Attempt:
    """One problem, what the model has answered so far (results of tools included), and the verdict at the end.

    too_long: the problem did not fit the model's positions, so that nothing was asked.
    """

    problem: Problem
    response: list[Message] = field(default_factory=list)
    verdict: Verdict | None = None
    too_long: bool = False


def attempt(engine: Engine, form: Form, problems: Sequence[Problem], seed: int, about: str, progress: bool) -> list[Attempt]:
    """Have the model solve all problems side by side, by greedy decoding, turn by turn. -> attempts, in order."""
    attempts = [Attempt(problem) for problem in problems]
    episodes = [problem.start() for problem in problems]
    demonstrations = [problem.demonstrate(thinking=form.thinking) for problem in problems]
    limits = [_turn_limit(form, problem, shown) for problem, shown in zip(problems, demonstrations, strict=True)]
    turns = [MORE_TURNS + sum(message["role"] == "assistant" for message in shown) for shown in demonstrations]
    going = list(range(len(problems)))
    with tqdm(total=len(problems), desc=about, unit="problem", disable=not progress, leave=False) as bar:
        while going:
            asked, prompts, params = [], [], []
            for i in going:
                fitting = _fit(engine, form, attempts[i], limits[i], seed)
                if fitting is None:
                    attempts[i].too_long = not attempts[i].response  # later on, it ends with what it has
                    episodes[i].done = True
                else:
                    asked.append(i)
                    prompts.append(fitting[0])
                    params.append(fitting[1])
            for i, completion in zip(asked, engine.generate(prompts, params), strict=True):
                message = form.read(attempts[i].problem, attempts[i].response, completion)
                attempts[i].response += [message, *episodes[i].step(message)]
                turns[i] -= 1
            before, going = len(going), [i for i in asked if not episodes[i].done and turns[i]]
            bar.update(before - len(going))
    for one in attempts:
        one.verdict = one.problem.verify(one.response)
    return attempts


def _turn_limit(form: Form, problem: Problem, demonstration: Sequence[Message]) -> int:
    """Half as many tokens again as the longest turn of the demonstration."""
    longest = max(len(form.turn(problem, message)) for message in demonstration if message["role"] == "assistant")
    return longest + longest // 2 + FEWEST_NEW_TOKENS


def _fit(engine: Engine, form: Form, one: Attempt, limit: int, seed: int) -> tuple[list[int], SamplingParams] | None:
    """The prompt and how it is to be answered, within the model's positions; None if they leave no room for an answer."""
    positions = engine.model.config.max_position_embeddings
    try:
        prompt = form.prompt(one.problem, one.response, positions - limit)
    except ChatError:  # what the model wrote before cannot be put into the template
        return None
    room = positions - len(prompt) + 1  # the last token is never fed
    if room < FEWEST_NEW_TOKENS:
        return None
    return prompt, SamplingParams(temperature=0.0, max_tokens=min(limit, room), stop=form.stops, seed=seed)
