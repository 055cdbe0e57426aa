r"""Conversations to text and back: GLM-4.5's chat template, and the parser of what the model answers.

Messages and tools are in OpenAI's format. `render` writes the very bytes of the published template, `render_tokens` the
ids, with the tokens that the model itself would have written marked while they are made (nothing is searched for
afterwards). `parse` and `StreamParser` read an assistant's turn by one grammar, which starts where the model does, right
after `<|assistant|>` (or, in non-thinking mode, after the `\n<think></think>` that the template has already written):

    turn      = [ thinking ] [ content ] *call
    thinking  = space "<think>" reasoning "</think>"       ; the first "</think>" ends it, whatever stands before
    content   = text without "<tool_call>"                 ; white space at its ends does not count
    call      = space "<tool_call>" space name space *( argument space ) "</tool_call>"
    argument  = "<arg_key>" key "</arg_key>" space "<arg_value>" value "</arg_value>"
    name      = one or more characters other than white space, "<" and ">"
    space     = any white space, or none

Keys and values are any text, kept to the last blank: where one would hold the tag that closes it, the template writes a
backslash after "<", and one more where there are some (`</arg_value>` becomes `<\/arg_value>`, that `<\\/arg_value>`);
the parser takes it away again. In JSON, `\/` is `/` anyway. All other text has the published bytes.

The tool's JSON schema says what a value is: `001` stays a string where it says string; number, integer, boolean, null,
array and object are JSON; the types of a union are tried in the schema's order; without a schema it is a string. What
does not fit is an error that says where, never a guess.

So `parse(render(x)) == x` for every assistant message x but those whose reasoning holds `</think>` or whose content holds
`<tool_call>` (the published bytes are ambiguous there), whose reasoning or content has white space at its ends (the
template strips it), or whose arguments are not of the types of the schema.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from minglm.tokenizer import SPECIAL_TOKENS, Tokenizer

# The three modes by name. The template knows two: automatic differs from thinking in training, not in text. There the
# model chooses by the task whether to open with `<think>` and a reasoning or with `<think></think>`.
MODES: dict[str, bool | None] = {"thinking": True, "non-thinking": False, "automatic": None}
OPENS_THINKING = "\n<think>"  # how a turn that thinks begins

TOOLS_HEAD = (
    "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
TOOLS_TAIL = (
    "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
    "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>"
)
NAME = re.compile(r"[^\s<>]+")
JSON_TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")


class ChatError(ValueError):
    """A conversation that cannot be written, or an answer that cannot be read.

    Attributes:
        index, key: the message (or tool) and its key, from `render`; None where they do not apply.
        position: where in the text, in characters, from `parse`; None from `render`.
    """

    def __init__(self, message: str, *, index: int | None = None, key: str | None = None, position: int | None = None):
        super().__init__(message)
        self.index, self.key, self.position = index, key, position


# ------------------------------------------------------------------------------------------------ conversation to text


class Piece(NamedTuple):
    """A stretch of the rendered text."""

    text: str
    is_mark: bool = False  # the name of a special token, written by the template
    by_model: bool = False  # what the model itself would have written


@dataclass(frozen=True)
class Rendered:
    """A conversation as token ids.

    Attributes:
        ids: of the whole text.
        assistant_mask: as long as `ids`; True where the model itself would have written the token.
    """

    ids: list[int]
    assistant_mask: list[bool]


def has_thought(response: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any of the messages holds a reasoning that is more than blanks."""
    return any((message.get("reasoning_content") or "").strip() for message in response)


def render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = False,
    keep_reasoning: bool = False,
) -> str:
    r"""The conversation as the published template writes it, byte for byte.

    Args:
        messages: of roles system, user, assistant and tool; `content` a string or a list of parts, strings or
            `{"type": "text", "text": ...}`. A tool's may be a list of results. An assistant's may be None or absent;
            its reasoning stands in `reasoning_content` or, before `</think>`, in `content`; `arguments` of its calls
            are a mapping or the JSON of one.
        tools: what may be called, each a JSON schema in OpenAI's form.
        enable_thinking: False puts `/nothink` after each user's text and `\n<think></think>` into the generation
            prompt. True and None are the same text.
        add_generation_prompt: end where the model is to go on.
        keep_reasoning: False drops the reasoning of turns before the last user message, as published. True keeps it:
            for training on what was sampled.

    Raises:
        ChatError: an unknown role, content of a wrong type, arguments that are not JSON, a tool name that the grammar
            cannot carry, a part that is not text. (The published template would leave out the message or the part, or
            write the text "None".) It names the message and the key.
    """
    pieces = _pieces(messages, tools, enable_thinking, add_generation_prompt, keep_reasoning)
    return "".join(piece.text for piece in pieces)


def render_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    add_generation_prompt: bool = False,
    keep_reasoning: bool = False,
    end_of_turn: bool = False,
    opens_thinking: bool = False,
) -> Rendered:
    r"""The ids of what `render` writes, and which of them are the model's own.

    Only the template's own marks become special tokens; their names in anybody's text are text. So the ids are those
    of `tokenizer.encode(render(...), allow_special=True)` exactly where no text holds such a name. (One more case: with
    `enable_thinking=False`, `/nothink` at the end of a user's text is the template's mark, which it stands in for.)

    The model's own are, in each assistant's turn, everything after `<|assistant|>` and the mark of the user or tool
    that follows, by which the model ended its turn. Not its own: with `enable_thinking=False` the thinking, which the
    prompt already holds; an empty `<think></think>` in place of a reasoning that was dropped; and with `opens_thinking` the
    `<think>` itself, and the token after it, by which the model would decide whether to think: the prompt has decided that.

    Args:
        tokenizer: one that has the special tokens of the template.
        messages, tools, enable_thinking, add_generation_prompt, keep_reasoning: as for `render`.
        end_of_turn: after a last message of the assistant's, also the mark that ends its turn: `<|observation|>` if it
            calls tools, else `<|user|>`. Training wants True, or the model never learns to stop there.
        opens_thinking: the prompts have `\n<think>` at their end, as the server writes where thinking is asked for: also in
            the prompt that `add_generation_prompt` adds. Not together with `enable_thinking=False`.

    Raises:
        ChatError: as `render`; also if the tokenizer lacks a mark that is needed, or for a thinking that is opened and
            forbidden.
    """
    if opens_thinking and enable_thinking is False:
        raise ChatError("opens_thinking with enable_thinking False; wanted one of them", key="enable_thinking")
    pieces = _pieces(messages, tools, enable_thinking, add_generation_prompt, keep_reasoning, opens_thinking)
    if opens_thinking and add_generation_prompt:
        pieces += _template_text(OPENS_THINKING)
    if end_of_turn and not add_generation_prompt and messages and messages[-1]["role"] == "assistant":
        mark = "<|observation|>" if messages[-1].get("tool_calls") else "<|user|>"
        pieces.append(Piece(mark, is_mark=True, by_model=True))
    ids: list[int] = []
    assistant_mask: list[bool] = []
    opened = False
    for piece in _joined(pieces):
        if piece.is_mark and piece.text not in tokenizer.special_ids:
            raise ChatError(
                f"the tokenizer has no special token {piece.text!r}, which the template writes; wanted one that has"
            )
        new = [tokenizer.special_ids[piece.text]] if piece.is_mark else tokenizer.encode(piece.text)
        ids += new
        assistant_mask += [piece.by_model and not (opened and place == 0) for place in range(len(new))]
        opened = opens_thinking and piece.is_mark and piece.text == "<think>"
    return Rendered(ids, assistant_mask)


def _joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Text between two marks in one piece, as a tokenizer sees it that is given the whole."""
    texts: list[str] = []
    by_model = False
    for piece in pieces:
        if texts and (piece.is_mark or piece.by_model != by_model):
            yield Piece("".join(texts), by_model=by_model)
            texts = []
        if piece.is_mark:
            yield piece
        elif piece.text:
            texts.append(piece.text)
            by_model = piece.by_model
    if texts:
        yield Piece("".join(texts), by_model=by_model)


@functools.cache
def _template_text(text: str, by_model: bool = False) -> tuple[Piece, ...]:
    """Text of the template's own, in which names of special tokens are marks."""
    names = re.compile("(" + "|".join(re.escape(name) for name in SPECIAL_TOKENS) + ")")
    return tuple(
        Piece(part, is_mark=number % 2 == 1, by_model=by_model) for number, part in enumerate(names.split(text)) if part
    )


def _pieces(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    enable_thinking: bool | None,
    add_generation_prompt: bool,
    keep_reasoning: bool,
    opens_thinking: bool = False,
) -> list[Piece]:
    _check_messages(messages)
    _check_mode(enable_thinking)
    pieces = [*_template_text("[gMASK]<sop>")]
    if tools:
        pieces += _tools_pieces(tools)
    last_user = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    before = None
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "system":
            pieces += [*_template_text("<|system|>\n"), Piece(_content(message, index))]
        elif role == "user":
            pieces += _user_pieces(message, index, enable_thinking, before == "assistant")
        elif role == "tool":
            pieces += _tool_result_pieces(message, index, before)
        else:
            keep = keep_reasoning or index > last_user
            pieces += _assistant_pieces(message, index, keep, enable_thinking is not False, opens_thinking)
        before = role
    if add_generation_prompt:
        pieces += _template_text("<|assistant|>\n<think></think>" if enable_thinking is False else "<|assistant|>")
    return pieces


def _tools_pieces(tools: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
    yield from _template_text(TOOLS_HEAD)
    for index, tool in enumerate(_check_tools(tools)):
        try:
            text = _dump_json(tool)
        except ValueError as error:
            raise ChatError(f"tools[{index}] is not JSON: {error}", index=index, key="tools") from error
        yield Piece(text + "\n")
    yield from _template_text(TOOLS_TAIL)


def _user_pieces(message: Mapping[str, Any], index: int, enable_thinking: bool | None, ends_turn: bool) -> Iterator[Piece]:
    # The model ends its turn by naming who speaks next: after an assistant's turn, this mark is the model's.
    yield Piece("<|user|>", is_mark=True, by_model=ends_turn)
    text = _content(message, index)
    if enable_thinking is False:
        yield Piece("\n" + text.removesuffix("/nothink"))
        yield Piece("/nothink", is_mark=True)
    else:
        yield Piece("\n" + text)


def _tool_result_pieces(message: Mapping[str, Any], index: int, before: str | None) -> Iterator[Piece]:
    observation = Piece("<|observation|>", is_mark=True, by_model=before == "assistant")
    content = message.get("content")
    if isinstance(content, str):
        results = [_checked_text(content, index, "content")]
    elif isinstance(content, list | tuple):
        results = [_tool_result(item, index) for item in content]
    else:
        raise _wrong_type(index, "content", content, "a string or a list of results")
    if not isinstance(content, str) or before != "tool":
        yield observation
    for result in results:
        yield from _template_text("\n<tool_response>\n")
        yield Piece(result)
        yield from _template_text("\n</tool_response>")


def _tool_result(item: Any, index: int) -> str:
    """As Jinja prints it: the item's `output` if it has one, else the item, in Python's notation if it is no string."""
    if isinstance(item, Mapping) and "output" in item:
        item = item["output"]
    return _checked_text(str(item), index, "content")


def _assistant_pieces(
    message: Mapping[str, Any], index: int, keep: bool, asked_to_think: bool, opens_thinking: bool
) -> Iterator[Piece]:
    reasoning, content = _reasoning_and_content(message, index)
    yield Piece("<|assistant|>", is_mark=True)
    # The model wrote the thinking that stands here, unless the prompt did or a longer one was dropped.
    by_model = asked_to_think and (keep or not reasoning)
    yield from _template_text(OPENS_THINKING, by_model and not opens_thinking)
    yield Piece(reasoning if keep else "", by_model=by_model)
    yield from _template_text("</think>", by_model)
    if content:
        yield Piece("\n" + content, by_model=True)
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, list | tuple):
        raise _wrong_type(index, "tool_calls", calls, "a list of calls")
    for number, call in enumerate(calls):
        yield from _call_pieces(call, index, f"tool_calls[{number}]")


def _reasoning_and_content(message: Mapping[str, Any], index: int) -> tuple[str, str]:
    """Both stripped. The reasoning may stand in the content, before `</think>`, as the model writes it."""
    content = "" if message.get("content") is None else _content(message, index)
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise _wrong_type(index, "reasoning_content", reasoning, "a string")
    if reasoning is None:
        reasoning = ""
        if "</think>" in content:
            reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
    return _checked_text(reasoning, index, "reasoning_content").strip(), content.strip()


def _call_pieces(call: Any, index: int, key: str) -> Iterator[Piece]:
    mark = functools.partial(_template_text, by_model=True)
    if not isinstance(call, Mapping):
        raise _wrong_type(index, key, call, "a mapping with the function's name and arguments")
    function = call.get("function") or call
    if not isinstance(function, Mapping):
        raise _wrong_type(index, f"{key}.function", function, "a mapping with name and arguments")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ChatError(
            f'messages[{index}].{key}.function.name is {name!r}; wanted text without white space, "<" and ">"',
            index=index,
            key=f"{key}.function.name",
        )
    arguments = _arguments(function.get("arguments"), index, f"{key}.function.arguments")
    yield from mark("\n<tool_call>")
    yield Piece(_checked_text(name, index, f"{key}.function.name") + "\n", by_model=True)
    for name, value in arguments.items():
        yield from mark("<arg_key>")
        yield Piece(_escape(name, "arg_key"), by_model=True)
        yield from mark("</arg_key>\n<arg_value>")
        yield Piece(_escape(value, "arg_value"), by_model=True)
        yield from mark("</arg_value>\n")
    yield from mark("</tool_call>")


def _arguments(arguments: Any, index: int, key: str) -> dict[str, str]:
    """Each argument as the text that the template writes: strings as they are, the rest as JSON."""
    where = f"messages[{index}].{key}"
    if isinstance(arguments, str):
        try:
            arguments = _load_json(arguments)
        except ValueError as error:
            raise ChatError(f"{where} is not JSON: {error}", index=index, key=key) from error
    if not isinstance(arguments, Mapping):
        raise _wrong_type(index, key, arguments, "a mapping, or the JSON of one")
    texts = {}
    for name, value in arguments.items():
        if not isinstance(name, str):
            raise ChatError(f"{where} has the key {name!r}; wanted a string", index=index, key=key)
        try:
            text = value if isinstance(value, str) else _dump_json(value)
        except ValueError as error:
            raise ChatError(f"{where}[{name!r}] is not JSON: {error}", index=index, key=key) from error
        texts[_checked_text(name, index, key)] = _checked_text(text, index, key)
    return texts


def _escape(text: str, tag: str) -> str:
    return re.sub(rf"<(\\*/{tag}>)", r"<\\\1", text)


def _unescape(text: str, tag: str) -> str:
    return re.sub(rf"<\\(\\*/{tag}>)", r"<\1", text)


def _content(message: Mapping[str, Any], index: int) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return _checked_text(content, index, "content")
    if not isinstance(content, list | tuple):
        raise _wrong_type(index, "content", content, "a string or a list of text parts")
    return "".join(_part_text(part, index, f"content[{number}]") for number, part in enumerate(content))


def _part_text(part: Any, index: int, key: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
    if not isinstance(text, str):
        raise _wrong_type(index, key, part, 'a string or {"type": "text", "text": ...}; the model reads text only')
    return _checked_text(text, index, key)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not isinstance(messages, list | tuple):
        raise ChatError(f"messages is a {type(messages).__name__}; wanted a list of messages", key="messages")
    roles = ("system", "user", "assistant", "tool")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatError(f"messages[{index}] is a {type(message).__name__}; wanted a mapping", index=index)
        role = message.get("role")
        if role not in roles:
            raise ChatError(f"messages[{index}].role is {role!r:.100}; wanted one of {roles}", index=index, key="role")


def _check_mode(enable_thinking: Any) -> None:
    if enable_thinking is not None and not isinstance(enable_thinking, bool):
        raise ChatError(f"enable_thinking is {enable_thinking!r:.60}; wanted True, False or None", key="enable_thinking")


def _check_tools(tools: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(tools, list | tuple):
        raise ChatError(f"tools is a {type(tools).__name__}; wanted a list of tools", key="tools")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise ChatError(f"tools[{index}] is a {type(tool).__name__}; wanted a mapping", index=index, key="tools")
    return tools


def _wrong_type(index: int, key: str, found: Any, wanted: str) -> ChatError:
    kind = "missing" if found is None else f"a {type(found).__name__}: {found!r:.100}"
    return ChatError(f"messages[{index}].{key} is {kind}; wanted {wanted}", index=index, key=key)


def _checked_text(text: str, index: int, key: str) -> str:
    """Refuse what has no UTF-8 form, and so no tokens: JSON lets half a surrogate pair through."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatError(
            f"messages[{index}].{key} holds {text[error.start]!r}, half a surrogate pair, which is no character; "
            "wanted Unicode text",
            index=index,
            key=key,
        ) from error
    return text


# ------------------------------------------------------------------------------------------------------------- values


def _dump_json(value: Any) -> str:
    """As the template writes JSON. Raises ValueError for anything that JSON has no form for."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    text.encode()  # a UnicodeEncodeError is a ValueError, too
    return text


def _load_json(text: str) -> Any:
    """Strict: no NaN, no infinity, no key twice, no half of a surrogate pair. Raises ValueError."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_no_key_twice)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    if "\\u" in text:
        _dump_json(value)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large for a number")
    return number


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} stands there twice")
    return value


def _typed(text: str, types: tuple[str, ...]) -> Any:
    """The value that `text` stands for: of the first of `types` that it fits. Raises ValueError if none does."""
    reason = ""
    for kind in types:
        if kind == "string":
            return text
        try:
            value = _load_json(text)
        except ValueError as error:
            reason = f" ({error})"
            continue
        if is_a(value, kind):
            return int(value) if kind == "integer" else value
    raise ValueError(f"found {text!r:.60}; wanted {' or '.join(types)}{reason}")


def is_a(value: Any, kind: str) -> bool:
    """Whether a JSON value is of a type, by its name in JSON schemas (`JSON_TYPES`). Whole floats are integers, booleans are
    no numbers."""
    if kind == "integer":
        return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))
    if kind == "number":
        return not isinstance(value, bool) and isinstance(value, int | float)
    python = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": Mapping}
    return isinstance(value, python[kind])


@dataclass(frozen=True)
class Signature:
    """What a tool takes.

    Attributes:
        types: JSON types of each argument, in the order in which they are tried.
        other: types of an argument that the schema does not name.
        parameters: the tool's whole schema of arguments, an object's.
    """

    types: dict[str, tuple[str, ...]]
    other: tuple[str, ...]
    parameters: Mapping[str, Any]


def signatures(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Signature]:
    """What each tool takes, by its name; `tools` as for `render`.

    Raises ChatError, naming the tool, for one without a fit name, two of one name, or a schema that is none.
    """
    found: dict[str, Signature] = {}
    for index, tool in enumerate(_check_tools(tools or ())):
        where = f"tools[{index}]"
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ChatError(
                f'{where}.function.name is {name!r}; wanted text without white space, "<" and ">"', index=index, key="tools"
            )
        if name in found:
            raise ChatError(f"{where} is named {name!r}, as one before it; wanted another name", index=index, key="tools")
        try:
            found[name] = _signature({} if function.get("parameters") is None else function["parameters"])
        except ValueError as error:
            raise ChatError(f"{where}.function.parameters ({name}): {error}", index=index, key="tools") from error
    return found


def _signature(parameters: Any) -> Signature:
    if not isinstance(parameters, Mapping):
        raise ValueError(f"a {type(parameters).__name__}; wanted a JSON schema, a mapping")
    properties = parameters.get("properties", {})
    if not isinstance(properties, Mapping):
        raise ValueError(f"properties is a {type(properties).__name__}; wanted a mapping of names to schemas")
    types = {}
    for name, schema in properties.items():
        try:
            types[name] = _schema_types(schema, parameters)
        except ValueError as error:
            raise ValueError(f"property {name!r}: {error}") from error
    return Signature(types, _schema_types(parameters.get("additionalProperties", {}), parameters), parameters)


def _schema_types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> tuple[str, ...]:
    """The JSON types that a schema allows, in its order; string alone where it says nothing."""
    if isinstance(schema, bool):
        return ("string",)
    if not isinstance(schema, Mapping):
        raise ValueError(f"a {type(schema).__name__}: {schema!r:.60}; wanted a JSON schema, a mapping")
    if depth > 32:
        raise ValueError("$ref goes round in a circle; wanted a schema with a type")
    inner = functools.partial(_schema_types, root=root, depth=depth + 1)
    if "$ref" in schema:
        return inner(_referred(schema["$ref"], root))
    if "type" in schema:
        types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not isinstance(types, list | tuple) or not types or any(kind not in JSON_TYPES for kind in types):
            raise ValueError(f"type is {schema['type']!r:.60}; wanted {', '.join(JSON_TYPES)}, or a list of them")
    elif union := schema.get("anyOf") or schema.get("oneOf"):
        types = [kind for alternative in _schemas(union) for kind in inner(alternative)]
    elif parts := schema.get("allOf"):
        types = next((inner(part) for part in _schemas(parts) if _says_type(part)), ("string",))
    elif "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else _schemas(schema["enum"])
        # Any text is a string, so the others are tried first.
        types = sorted((_type_of(value) for value in values), key=lambda kind: kind == "string")
    else:
        types = ["string"]
    if schema.get("nullable") is True:
        types = [*types, "null"]
    return tuple(dict.fromkeys(types))


def _schemas(found: Any) -> Sequence[Any]:
    if not isinstance(found, list | tuple) or not found:
        raise ValueError(f"{found!r:.60}; wanted a list with something in it")
    return found


def _says_type(schema: Any) -> bool:
    return isinstance(schema, Mapping) and not schema.keys().isdisjoint({"$ref", "type", "anyOf", "oneOf", "const", "enum"})


def _type_of(value: Any) -> str:
    return next((kind for kind in JSON_TYPES[1:] if is_a(value, kind)), "string")


def _referred(reference: Any, root: Mapping[str, Any]) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#/"):
        raise ValueError(f"$ref is {reference!r:.60}; wanted one within the schema, such as #/$defs/name")
    found: Any = root
    for step in reference[2:].split("/"):
        step = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or step not in found:
            raise ValueError(f"$ref is {reference!r}, and there is no {step!r} there; wanted a schema that exists")
        found = found[step]
    return found


# ------------------------------------------------------------------------------------------------ text to conversation


@dataclass(frozen=True)
class Delta:
    """What one more stretch of the model's text adds to its message.

    Attributes:
        kind: `reasoning`, `content`, `tool_call_start`, `tool_call_arguments` or `error`.
        text: more of the reasoning or the content.
        index: number of the call, from 0.
        name: of the tool whose call starts.
        json_fragment: more of the arguments' JSON. The fragments of a complete call make one JSON object.
        position, message: where in the text, in characters, and what was found and wanted. It is the last delta:
            nothing after the error is read.
    """

    kind: str
    text: str = ""
    index: int | None = None
    name: str | None = None
    json_fragment: str = ""
    position: int | None = None
    message: str | None = None


def parse(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
    """An assistant's turn as a message: role, reasoning_content, content and tool_calls.

    Args:
        text: the turn, without the token that ends it. `<|assistant|>` before it is passed over, and so is
            `[gMASK]<sop><|assistant|>`; of any other conversation that begins with `[gMASK]<sop>`, what stands before
            the last `<|assistant|>`.
        tools: whose schemas type the arguments. The name of a call need not be among them.

    Returns:
        All four keys, always. Reasoning and content are stripped and `""` if there are none; `tool_calls` is a list of
        `{"type": "function", "function": {"name": ..., "arguments": {...}}}`. A turn that ends in its thinking has
        reasoning and nothing else.

    Raises:
        ChatError: a call that is malformed, or an argument that is not of its type, with `position`.
    """
    start = 0
    if text.startswith("[gMASK]<sop><|assistant|>"):  # one turn alone, which may hold the mark as text
        start = len("[gMASK]<sop>")
    elif text.startswith("[gMASK]<sop>"):
        start = text.rfind("<|assistant|>")
        if start < 0:
            raise ChatError("the conversation has no <|assistant|>; wanted one with an assistant's turn", position=len(text))
    start += len("<|assistant|>") if text.startswith("<|assistant|>", start) else 0
    parser = StreamParser(tools)
    for delta in [*parser.feed(text[start:]), *parser.finish()]:
        if delta.kind == "error":
            raise ChatError(f"at character {start + delta.position}: {delta.message}", position=start + delta.position)
    return parser.message


class _Malformed(Exception):
    def __init__(self, position: int, message: str):
        super().__init__(message)
        self.position = position


class StreamParser:
    """Reads a turn as it comes, in chunks cut anywhere: the deltas together are the same for every cutting.

    Text is held back only where it may still turn out to be a tag or white space at an end, and the value of an argument
    that is not a string until it is complete.

    Attributes:
        message: what has been read so far, as `parse` returns it; calls once they are complete.
    """

    def __init__(
        self, tools: Sequence[Mapping[str, Any]] | None = None, thinking: bool | None = None, in_thinking: bool = False
    ):
        """Read a turn from its start.

        Args:
            tools: as for `parse`. Raises ChatError where they are unfit.
            thinking: the mode, as `enable_thinking` for `render`. After a prompt with False, which holds the empty
                thinking, everything up to the first call is content.
            in_thinking: the prompt has already opened `<think>`, so the text starts within the reasoning.
        """
        self._signatures = signatures(tools)
        self._buffer = ""
        self._at = 0  # in the buffer
        self._dropped = 0  # characters before the buffer
        self._state = self._in_thinking if in_thinking else self._at_start if thinking is not False else self._in_content
        self._texts: dict[str, list[str]] = {"reasoning": [], "content": []}
        self._space: list[str] = []  # white space that counts only if more text follows
        self._calls: list[dict[str, Any]] = []
        self._deltas: list[Delta] = []
        self._finished = False

    def feed(self, text: str) -> list[Delta]:
        """Read on; returns what is new. Raises ValueError after `finish`."""
        if self._finished:
            raise ValueError("feed was called after finish; wanted a new parser for a new turn")
        return self._read(text)

    def finish(self) -> list[Delta]:
        """The text has ended: what was held back, and an error if it ended within a call."""
        self._finished = True
        return self._read("")

    @property
    def message(self) -> dict[str, Any]:
        return {
            "role": "assistant",
            "reasoning_content": "".join(self._texts["reasoning"]),
            "content": "".join(self._texts["content"]),
            "tool_calls": [{"type": "function", "function": dict(call)} for call in self._calls],
        }

    def _read(self, text: str) -> list[Delta]:
        self._buffer = self._buffer[self._at :] + text
        self._dropped, self._at = self._dropped + self._at, 0
        try:
            while self._state is not None and self._state():
                pass
        except _Malformed as error:
            self._emit(Delta("error", position=error.position, message=str(error)))
            self._state = None
        if self._state is None:  # nothing more is read
            self._at = len(self._buffer)
        deltas, self._deltas = self._deltas, []
        return deltas

    # Each state reads what is sure and says whether it went on to another state.

    def _at_start(self) -> bool:
        self._skip_space()
        rest = self._buffer[self._at : self._at + len("<think>")]
        if "<think>".startswith(rest) and rest != "<think>" and not self._finished:
            return False
        if rest == "<think>":
            self._at += len(rest)
            self._state = self._in_thinking
        else:
            self._state = self._in_content
        return True

    def _in_thinking(self) -> bool:
        piece, ended = self._up_to("</think>")
        self._emit_text("reasoning", piece)
        if ended:
            self._space.clear()
            self._state = self._in_content
        return ended

    def _in_content(self) -> bool:
        piece, ended = self._up_to("<tool_call>")
        self._emit_text("content", piece)
        if ended:
            self._space.clear()
            self._state = self._at_name
        return ended

    def _at_name(self) -> bool:
        self._skip_space()
        name = NAME.match(self._buffer, self._at)
        end = name.end() if name else self._at
        if end == len(self._buffer):
            return self._wait("the name of a tool")
        if not name:
            raise self._found(self._at, self._buffer[self._at], "the name of a tool after <tool_call>")
        if not self._buffer[end].isspace() and self._buffer[end] != "<":
            raise self._found(end, self._buffer[end], "white space after the name of a tool")
        self._name, self._arguments, self._at = name.group(), {}, end
        self._emit(Delta("tool_call_start", index=len(self._calls), name=self._name))
        self._state = self._at_argument
        return True

    def _at_argument(self) -> bool:
        tag = self._tag("<arg_key>", "</tool_call>")
        if tag == "<arg_key>":
            self._key_position, self._key = self._dropped + self._at, []
            self._state = self._in_key
        elif tag == "</tool_call>":
            self._emit_json("}" if self._arguments else "{}")
            self._calls.append({"name": self._name, "arguments": self._arguments})
            self._state = self._after_call
        return tag is not None

    def _in_key(self) -> bool:
        piece, ended = self._up_to("</arg_key>", escaped=True)
        self._key.append(piece)
        if not ended:
            return self._wait("</arg_key>")
        key = "".join(self._key)
        if key in self._arguments:
            raise _Malformed(self._key_position, f"found the argument {key!r:.60} a second time; wanted each once")
        self._argument = key
        self._state = self._at_value
        return True

    def _at_value(self) -> bool:
        if self._tag("<arg_value>") is None:
            return False
        signature = self._signatures.get(self._name)
        self._types = signature.types.get(self._argument, signature.other) if signature else ("string",)
        self._value_position, self._value = self._dropped + self._at, []
        if self._types[0] == "string":
            self._emit_json(self._json_key() + '"')
        self._state = self._in_value
        return True

    def _in_value(self) -> bool:
        piece, ended = self._up_to("</arg_value>", escaped=True)
        self._value.append(piece)
        is_text = self._types[0] == "string"  # any text fits, so it can go out at once
        if is_text and piece:
            self._emit_json(json.dumps(piece, ensure_ascii=False)[1:-1])
        if not ended:
            return self._wait("</arg_value>")
        try:
            value = _typed("".join(self._value), self._types)
        except ValueError as error:
            raise _Malformed(self._value_position, f"argument {self._argument!r:.60} of {self._name}: {error}") from error
        self._emit_json('"' if is_text else self._json_key() + json.dumps(value, ensure_ascii=False))
        self._arguments[self._argument] = value
        self._state = self._at_argument
        return True

    def _after_call(self) -> bool:
        if self._tag("<tool_call>", may_end=True) is None:
            return False
        self._state = self._at_name
        return True

    def _json_key(self) -> str:
        return (", " if self._arguments else "{") + json.dumps(self._argument, ensure_ascii=False) + ": "

    def _up_to(self, tag: str, escaped: bool = False) -> tuple[str, bool]:
        """The text before `tag`, as far as it is sure, and whether the tag was there and passed."""
        start = self._at
        end = self._buffer.find(tag, start)
        ended = end >= 0
        if ended:
            self._at = end + len(tag)
        else:
            end = len(self._buffer)
            opening = self._buffer.rfind("<", start)  # a tag has no other "<"
            if opening >= 0 and not self._finished:
                rest = self._buffer[opening + 1 :]
                if tag[1:].startswith(rest.lstrip("\\") if escaped else rest):
                    end = opening
            self._at = end
        piece = self._buffer[start:end]
        return (_unescape(piece, tag[2:-1]) if escaped else piece), ended

    def _tag(self, *tags: str, may_end: bool = False) -> str | None:
        """Pass white space and one of `tags`; None if the text must come first."""
        self._skip_space()
        rest = self._buffer[self._at : self._at + max(len(tag) for tag in tags)]
        for tag in tags:
            if rest.startswith(tag):
                self._at += len(tag)
                return tag
        for length in range(1, len(rest) + 1):
            if not any(tag.startswith(rest[:length]) for tag in tags):
                raise self._found(self._at, rest[:length], " or ".join(tags))
        if not (may_end and not rest):
            self._wait(" or ".join(tags))
        return None

    def _skip_space(self) -> None:
        while self._at < len(self._buffer) and self._buffer[self._at].isspace():
            self._at += 1

    def _wait(self, wanted: str) -> bool:
        if self._finished:
            raise _Malformed(
                self._dropped + len(self._buffer), f"found the end of the text in call {len(self._calls)}; wanted {wanted}"
            )
        return False

    def _found(self, at: int, found: str, wanted: str) -> _Malformed:
        return _Malformed(self._dropped + at, f"found {found!r} in or after call {len(self._calls)}; wanted {wanted}")

    def _emit_text(self, kind: str, piece: str) -> None:
        """White space counts between two words, not before the first nor after the last."""
        texts = self._texts[kind]
        if not texts:
            piece = piece.lstrip()
        body = piece.rstrip()
        if body:
            text = "".join([*self._space, body])
            self._space.clear()
            texts.append(text)
            self._emit(Delta(kind, text=text))
        if texts and len(body) < len(piece):
            self._space.append(piece[len(body) :])

    def _emit_json(self, fragment: str) -> None:
        self._emit(Delta("tool_call_arguments", index=len(self._calls), json_fragment=fragment))

    def _emit(self, delta: Delta) -> None:
        """One delta for neighbours of one kind."""
        last = self._deltas[-1] if self._deltas else None
        if last and delta.kind == "tool_call_arguments" and (last.kind, last.index) == (delta.kind, delta.index):
            self._deltas[-1] = replace(last, json_fragment=last.json_fragment + delta.json_fragment)
        else:
            self._deltas.append(delta)


# ------------------------------------------------------------------------------------------------------ text to be had


def tool_grammar(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] = "auto",
    enable_thinking: bool | None = None,
    parallel_calls: bool = True,
) -> str | None:
    r"""A grammar of the turns that the model may write, so that every call in them can be read and fits its tool.

    It is llguidance's dialect of Lark, for `LLMatcher`, with its nested `%json` for values that are JSON. `<think>` and
    the like without quotes are special tokens, so the matcher's tokenizer must know each of `Tokenizer.special_ids` as
    special. It ends in the token that ends the turn: `<|observation|>` after calls, else `<|user|>` or `<|endoftext|>`;
    no other token may end it.

    The turn has the template's bytes. Arguments come in the schema's order, those that are required always, no other
    ones (any, if the schema has no properties, but `additionalProperties`). Enforced are types, `enum` and `const`, and
    what llguidance knows of the schema of numbers, arrays and objects; of strings neither pattern nor length. Four things
    it lets through that the parser then reports: a number beyond a float's range, a key twice, and within arrays and
    objects strings that hold `</arg_value>` or half a surrogate pair.

    Args:
        tools: as for `render`.
        tool_choice: "auto": calls or none. "required": thinking, then at least one call. `{"name": ...}`, or OpenAI's
            `{"type": "function", "function": {"name": ...}}`: thinking, then one call of this tool. "none": no call.
        enable_thinking: True: the model opens with a thinking. None: it may. False: the prompt already holds the empty
            one.
        parallel_calls: whether there may be several calls.

    Returns:
        None if there are no tools: nothing to constrain.

    Raises:
        ChatError: unfit tools; a choice of a tool that is not there; an unknown choice or mode.
    """
    _check_mode(enable_thinking)
    known = signatures(tools)
    names, at_least_one = _chosen(known, tool_choice)
    if not known:
        return None
    lines = [
        "THOUGHT: " + _text_without("</think>"),
        "CONTENT: " + _text_without("<tool_call>"),
        "PRELUDE: /(?s:.*)\\n/ & " + _not_holding("<tool_call>"),
        "KEY: " + _text_without("</arg_key>"),
        "VALUE: " + _text_without("</arg_value>"),
        'thinking: "\\n" <think> THOUGHT? </think>',
        "answer: CONTENT? (<|user|> | <|endoftext|>)",
    ]
    first = {True: "thinking ", None: "thinking? ", False: ""}[enable_thinking]
    if not names:
        return "\n".join([f"start: {first}answer", *lines]) + "\n"
    several = parallel_calls and not isinstance(tool_choice, Mapping)
    calls = 'call ("\\n" call)* <|observation|>' if several else "call <|observation|>"
    start = f'{first}"\\n" {calls}' if at_least_one else f"{first}(answer | PRELUDE {calls})"
    lines += ["call: " + " | ".join(f"call_{number}" for number in range(len(names)))]
    for number, name in enumerate(names):
        arguments = "".join(f" {argument}" for argument in _argument_rules(known[name]))
        lines += [f"call_{number}: <tool_call> {_literal(name + chr(10))}{arguments} </tool_call>"]
    return "\n".join([f"start: {start}", *lines]) + "\n"


def _chosen(known: Mapping[str, Signature], tool_choice: str | Mapping[str, Any]) -> tuple[list[str], bool]:
    """The tools that may be called, and whether one must be."""
    if tool_choice in ("auto", "none"):
        return list(known) if tool_choice == "auto" else [], False
    if tool_choice == "required":
        if not known:
            raise ChatError('tool_choice is "required" and there are no tools; wanted some', key="tool_choice")
        return list(known), True
    function = tool_choice.get("function", tool_choice) if isinstance(tool_choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        wanted = '"auto", "none", "required" or {"type": "function", "function": {"name": ...}}'
        raise ChatError(f"tool_choice is {tool_choice!r:.100}; wanted {wanted}", key="tool_choice")
    if name not in known:
        raise ChatError(f"tool_choice names {name!r:.100}; wanted one of {sorted(known)}", key="tool_choice")
    return [name], True


def _argument_rules(signature: Signature) -> Iterator[str]:
    parameters = signature.parameters
    properties = parameters.get("properties") or {}
    for name, schema in properties.items():
        value = _value_rule(schema, parameters, signature.types[name])
        rule = f'<arg_key> {_literal(_escape(name, "arg_key"))} </arg_key> "\\n" <arg_value> {value} </arg_value> "\\n"'
        yield rule if name in parameters.get("required", ()) else f"({rule})?"
    others = parameters.get("additionalProperties", False)
    if not properties and others is not False:
        value = _value_rule(others, parameters, signature.other)
        yield f'(<arg_key> KEY </arg_key> "\\n" <arg_value> {value} </arg_value> "\\n")*'


def _value_rule(schema: Any, root: Mapping[str, Any], types: tuple[str, ...]) -> str:
    if isinstance(schema, Mapping) and "$ref" in schema:
        return _value_rule(_referred(schema["$ref"], root), root, types)
    if isinstance(schema, Mapping) and ("const" in schema or "enum" in schema):
        values = [schema["const"]] if "const" in schema else _schemas(schema["enum"])
        texts = dict.fromkeys(value if isinstance(value, str) else _dump_json(value) for value in values)
        literals = " | ".join(_literal(_escape(text, "arg_value")) for text in texts if text)
        return (f"({literals})" if literals else '""') + ("?" if literals and "" in texts else "")
    if "string" in types:
        return "VALUE?"
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    alternatives = {"anyOf": [schema, {"type": "null"}]} if schema.get("nullable") is True else dict(schema)
    as_rendered = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return "%json " + _dump_json({**definitions, **alternatives, "x-guidance": as_rendered})


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _text_without(tag: str) -> str:
    return "/(?s:.+)/ & " + _not_holding(tag)


def _not_holding(tag: str) -> str:
    return "~/(?s:.*)" + tag.replace("/", r"\/") + "(?s:.*)/"
