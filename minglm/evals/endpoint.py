"""A model behind an OpenAI-compatible endpoint: asked to solve, to judge, or to play a customer."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minglm.evals.measure import EvaluationError
from minglm.tasks.task import Message

KEY = "MINGLM_EVAL_KEY"  # the environment variable with the endpoint's API key
GRADER_KEY = "MINGLM_GRADER_KEY"  # of a model that grades, for exams and for the rewards of RL
SECONDS = 600.0  # for an answer, by default
RETRIES = 4
REFUSALS = (400, 413, 422)


class EndpointError(EvaluationError):
    """An endpoint that gives no answer. The message says what came."""


class Refused(EndpointError):
    """A request that the endpoint will not answer when it is asked again either, such as one that is too long for its model."""


class Written(NamedTuple):
    """A turn of an assistant. tokens: of it, thinking included. cut: at the limit of tokens."""

    message: Message
    tokens: int
    cut: bool


class Endpoint:
    """One model of one endpoint."""

    def __init__(self, url: str, name: str, key: str = KEY, seconds: float = SECONDS):
        """key: the name of the environment variable that holds the key. seconds: for an answer."""
        from openai import OpenAI

        self.url, self.name = url, name
        self._client = OpenAI(base_url=url, api_key=os.environ.get(key, "none"), timeout=seconds, max_retries=RETRIES)

    def ask(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        temperature: float = 0.0,
        tokens: int | None = None,
        seed: int | None = None,
        must_call: str | None = None,
    ) -> Written:
        """One turn. thinking: None leaves it to the model; otherwise enable_thinking is put among the template's arguments, as
        vLLM, SGLang and our server take it. tokens: at most; None: what the endpoint allows. must_call: the tool that the
        endpoint makes the model call. Raises EndpointError, Refused."""
        from openai import APIStatusError, OpenAIError

        options: dict[str, Any] = {"temperature": temperature}
        if tokens is not None:
            options["max_tokens"] = tokens
        if tools:
            options["tools"] = list(tools)
        if seed is not None:
            options["seed"] = seed
        if must_call is not None:
            options["tool_choice"] = {"type": "function", "function": {"name": must_call}}
        if thinking is not None:
            options["extra_body"] = {"chat_template_kwargs": {"enable_thinking": thinking}}
        try:
            answer = self._client.chat.completions.create(model=self.name, messages=list(messages), **options)
            choice = answer.choices[0]
            return Written(_message(choice.message), _tokens(answer.usage), choice.finish_reason == "length")
        except (OpenAIError, ValueError, AttributeError, IndexError, TypeError) as error:  # JSON that is no completion
            kind = Refused if isinstance(error, APIStatusError) and error.status_code in REFUSALS else EndpointError
            raise kind(f"{self.url}, model {self.name}: {type(error).__name__}: {error}"[:500]) from error


def _message(found: Any) -> Message:
    message: Message = {"role": "assistant", "content": found.content or ""}
    if reasoning := getattr(found, "reasoning_content", None) or getattr(found, "reasoning", None):
        message["reasoning_content"] = reasoning
    if found.tool_calls:
        message["tool_calls"] = [call.model_dump(exclude_none=True) for call in found.tool_calls]
    return message


def _tokens(usage: Any) -> int:
    return (usage.completion_tokens or 0) if usage else 0
