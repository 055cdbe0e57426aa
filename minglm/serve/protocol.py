"""What requests may hold, and errors, both in OpenAI's form.

A request is refused as a whole, with the name of the key that is wrong, before anything is computed for it. Keys of
OpenAI's that we do not have are taken at the value that asks for nothing, and refused at any other: an answer that
silently ignores what was asked is worse than none.
"""

import difflib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

MAX_CHOICES = 128
MAX_STOP_STRINGS = 16

# Keys that we lack, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
# Keys that ask for nothing at any value.
IGNORED = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})


class ApiError(Exception):
    """An answer other than 200. `param`: the key of the request that is wrong, such as "messages[0].role"."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's class of the error."""
        named = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        return named.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> Any:
    """One prompt as text or ids, or a list of such -> a list."""
    is_one = isinstance(value, str) or (isinstance(value, list) and value and all(type(id) is int for id in value))
    return [value] if is_one else value


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Part):
    include_usage: bool = False
    """A last event with the usage of the whole request."""
    continuous_usage_stats: bool = False
    """The usage so far in every event (the name is vLLM's)."""
    include_obfuscation: bool = False
    """Taken and ignored: OpenAI's padding against readers of packet lengths."""


class _Generation(_Part):
    """What both endpoints share. A key that is null is as good as absent."""

    model: str | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float = Field(0.0, ge=0, lt=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], BeforeValidator(_as_list)] = Field(
        default=[], max_length=MAX_STOP_STRINGS
    )
    stop_token_ids: list[int] = Field(default=[], max_length=MAX_STOP_STRINGS)
    ignore_eos: bool = False
    """Go on to max_tokens, whatever the model writes."""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    """Also give the ids of prompt and answer: a trainer must see exactly what was sampled."""
    return_experts: bool = False
    """Also give the experts that tokens were routed to, [position][MoE layer][choice], the prompt's first. The last token
    of an answer has none: it was never fed to the model."""

    @field_validator("stop_token_ids")
    @classmethod
    def _ids_are_positive(cls, ids: list[int]) -> list[int]:
        if any(id < 0 for id in ids):
            raise ValueError("wanted ids of 0 or more")
        return ids


class TemplateOptions(_Part):
    enable_thinking: bool | None = None
    """True: the answer begins inside <think>; False: without thinking; null: the model chooses."""


class FunctionName(_Part):
    name: str


class ToolChoice(_Part):
    type: Literal["function"]
    function: FunctionName


class Function(_Part):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _is_object_schema(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if not schema:
            return schema
        if schema.get("type", "object") != "object":
            raise ValueError(f"wanted a JSON schema of type 'object', found type {schema['type']!r}")
        properties = schema.get("properties", {})
        if not isinstance(properties, dict) or not all(isinstance(value, dict) for value in properties.values()):
            raise ValueError("wanted 'properties' that map each name to a JSON schema")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise ValueError("wanted 'required' as a list of names")
        if unknown := [name for name in required if name not in properties]:
            raise ValueError(f"'required' names {unknown}, which 'properties' lacks")
        return schema


class Tool(_Part):
    type: Literal["function"]
    function: Function


class ChatRequest(_Generation):
    """Body of POST /v1/chat/completions. `tools` stay as they came: the template keeps the order of their keys."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] = Field(default=[], max_length=128)
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    thinking_budget: int | None = Field(None, ge=0)
    """Most tokens inside <think>; then </think> is put in."""
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @property
    def usable_tools(self) -> list[dict[str, Any]] | None:
        """What the model is told of."""
        return self.tools if self.tools and self.tool_choice != "none" else None

    @property
    def choice_of_tool(self) -> str | dict[str, str]:
        """`tool_choice` in the form of `minglm.chat.tool_grammar`."""
        return {"name": self.tool_choice["function"]["name"]} if isinstance(self.tool_choice, dict) else self.tool_choice


class CompletionRequest(_Generation):
    """Body of POST /v1/completions. `prompt`: texts or lists of ids."""

    prompt: Annotated[list[Annotated[str | list[int], Field(union_mode="left_to_right")]], BeforeValidator(_as_prompts)] = (
        Field(min_length=1, max_length=MAX_CHOICES)
    )
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)


class WeightsRequest(_Part):
    """Body of POST /v1/weights: a folder on the server's disk."""

    folder: str = Field(min_length=1)


NESTED_KEYS = {key for part in (StreamOptions, TemplateOptions, ToolChoice, Tool, Function) for key in part.model_fields}
Body = TypeVar("Body", bound=BaseModel)


def parse_body(kind: type[Body], body: bytes) -> Body:
    """Raises `ApiError` 400 that names the key, what was found there and what would be right."""
    found = _parse_json(body)
    if not isinstance(found, dict):
        raise ApiError(400, f"The body is a JSON {_json_type(found)}; wanted an object.")
    wanted = {}
    for key, value in found.items():
        if value is None or key in IGNORED:
            continue
        if key in NEUTRAL and key not in kind.model_fields:
            if value not in NEUTRAL[key]:
                one = json.dumps(NEUTRAL[key][0])
                raise ApiError(400, f"{key} is not supported here; leave it out, or give {one}.", param=key, code="unsupported")
            continue
        wanted[key] = value
    request = _validate(kind, wanted, ())
    if isinstance(request, ChatRequest):
        _check_tools(request)
        if request.top_logprobs and not request.logprobs:
            raise ApiError(400, "top_logprobs is given without logprobs; wanted logprobs = true with it.", param="top_logprobs")
    return request


def _parse_json(body: bytes) -> Any:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"The body is not UTF-8: byte {error.start} is {body[error.start]:#04x}.", code="invalid_utf8"
        ) from None
    except RecursionError:
        raise ApiError(400, "The body's JSON is nested too deeply.", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from None


def _json_type(value: Any) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def _check_tools(request: ChatRequest) -> None:
    names = []
    for index, tool in enumerate(request.tools):
        names.append(_validate(Tool, tool, ("tools", index)).function.name)
    if twice := {name for name in names if names.count(name) > 1}:
        raise ApiError(400, f"tools name {sorted(twice)} more than once; wanted each function once.", param="tools")
    choice = request.tool_choice
    if isinstance(choice, dict):
        wanted = _validate(ToolChoice, choice, ("tool_choice",)).function.name
        if wanted not in names:
            raise ApiError(400, f"tool_choice names {wanted!r}; tools hold {names}.", param="tool_choice")
    elif choice not in ("none", "auto", "required"):
        message = f"tool_choice is {choice!r:.80}; wanted 'none', 'auto', 'required' or a function."
        raise ApiError(400, message, param="tool_choice")
    elif choice == "required" and not names:
        raise ApiError(400, "tool_choice is 'required' without tools; give some.", param="tool_choice")


def _validate(kind: type[Body], value: dict, where: tuple[str | int, ...]) -> Body:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    param = _path(where + tuple(part for part in first["loc"] if not _names_a_type(part)))
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        near = difflib.get_close_matches(key, {*kind.model_fields, *NESTED_KEYS}, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ApiError(400, f"Unknown key {param!r:.200}{hint}", param=param[:200], code="unknown_key")
    if first["type"] == "missing":
        raise ApiError(400, f"{param} is missing.", param=param, code="missing")
    found = f"; found {first['input']!r:.80}" if not isinstance(first["input"], dict | list) else ""
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    raise ApiError(400, f"{param}: {message}{found}.", param=param, code="invalid_value")


def _names_a_type(part: str | int) -> bool:
    """pydantic puts the member of a union into the path."""
    return isinstance(part, str) and bool(re.match(r"(str|int|list\[.*|function-.*)$", part))


def _path(parts: tuple[str | int, ...]) -> str:
    """("messages", 0, "role") -> "messages[0].role"."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")
