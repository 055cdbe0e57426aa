"""A model behind an OpenAI-compatible endpoint: asked to solve, to judge, or to play a customer."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minglm.evals.measure import EvaluationError
from minglm.tasks.task import Message

KEY = "MINGLM_EVAL_KEY"  # the environment variable with the endpoint's API key
GRADER_KEY = "MINGLM_GRADER_KEY"  # of a model that grades, for exams and for the rewards of RL
SECONDS = 600.0  # for an answer
RETRIES = 4


class EndpointError(EvaluationError):
    """An endpoint that gives no answer. The message says what came."""


class Written(NamedTuple):
    """A turn of an assistant. tokens: of it, thinking included. cut: at the limit of tokens."""

    message: Message
    tokens: int
    cut: bool


class Endpoint:
    """One model of one endpoint."""

    def __init__(self, url: str, name: str, key: str = KEY):
        """key: the name of the environment variable that holds the key."""
        from openai import OpenAI

        self.url, self.name = url, name
        self._client = OpenAI(base_url=url, api_key=os.environ.get(key, "none"), timeout=SECONDS, max_retries=RETRIES)

    def ask(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        temperature: float = 0.0,
        tokens: int = 1024,
        seed: int | None = None,
    ) -> Written:
        """One turn. thinking: None leaves it to the model; otherwise enable_thinking is put among the template's arguments, as
        vLLM, SGLang and our server take it. Raises EndpointError."""
        from openai import OpenAIError

        options: dict[str, Any] = {"temperature": temperature, "max_tokens": tokens}
        if tools:
            options["tools"] = list(tools)
        if seed is not None:
            options["seed"] = seed
        if thinking is not None:
            options["extra_body"] = {"chat_template_kwargs": {"enable_thinking": thinking}}
        try:
            answer = self._client.chat.completions.create(model=self.name, messages=list(messages), **options)
            choice = answer.choices[0]
            found, used = choice.message, answer.usage
        except (OpenAIError, ValueError, AttributeError, IndexError, TypeError) as error:  # JSON that is no completion
            raise EndpointError(f"{self.url}, model {self.name}: {type(error).__name__}: {error}"[:500]) from error
        message: Message = {"role": "assistant", "content": found.content or ""}
        if reasoning := getattr(found, "reasoning_content", None) or getattr(found, "reasoning", None):
            message["reasoning_content"] = reasoning
        if found.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in found.tool_calls]
        return Written(message, used.completion_tokens if used else 0, choice.finish_reason == "length")
