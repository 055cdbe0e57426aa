"""Conversations that must not be learnt from, each refused with its place and the reason.

What a model is fine-tuned on it does: a turn without its end teaches it never to stop, a mark that stands in a text teaches
it to write one, and a row without a target is a mean of nothing (karpathy/nanochat#590). So every sample is looked at before
the first step, and none is repaired in silence.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minglm.chat import ChatError, Rendered, render_tokens, signatures
from minglm.tokenizer import SPECIAL_TOKENS, Tokenizer

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

ROLES = ("system", "user", "assistant", "tool")
MARK = re.compile("|".join(map(re.escape, sorted(SPECIAL_TOKENS, key=len, reverse=True))))
NULLABLE = ("type", "enum", "const", "anyOf", "oneOf")  # what `nullable` lets null through
FAULTS = {
    "json": "not a JSON object with messages (of pairs also chosen and rejected), tools and thinking",
    "role": "unknown role",
    "format": "not in OpenAI's format",
    "empty mask": "nothing to learn: no token is the model's",
    "no answer": "no assistant's message at the end",
    "cut answer": "an assistant's turn without its end",
    "doubled mark": "a special token's name in a text",
    "orphan result": "a tool's result without a call",
    "unanswered call": "a call without its result",
    "arguments": "arguments that are not JSON, or not as the tool's schema says",
    "mode": "a thinking that contradicts the mode",
    "pair": "two answers of which none can be preferred",
    "too long": "longer than a row",
}


class LintError(ValueError):
    """A sample that is refused. Attributes: where (file and line, or family, and sample), fault (key of `FAULTS`), reason."""

    def __init__(self, where: str, fault: str, reason: str):
        super().__init__(f"{where}: {fault}: {reason}")
        self.where, self.fault, self.reason = where, fault, reason


@dataclass(frozen=True)
class Sample:
    """A conversation to learn from. `thinking` as `enable_thinking` of `minglm.chat.render`; `where` names it in errors.
    opens_thinking: the prompt has opened the thinking, so that the model learns to think there and not whether to."""

    messages: Sequence[Mapping[str, Any]]
    where: str
    tools: Sequence[Mapping[str, Any]] = ()
    thinking: bool | None = None
    opens_thinking: bool = False


def read_samples(path: Path) -> Iterator[Sample | LintError]:
    """The samples of a JSONL file in order, and an error in the place of each line that holds none; blank lines are none."""
    for where, found in read_objects(path, ("messages",)):
        yield found if isinstance(found, LintError) else sample_of(found, where, found["messages"])


def sample_of(found: Mapping[str, Any], where: str, messages: Sequence[Mapping[str, Any]]) -> Sample:
    """A conversation with the tools and the mode of a line."""
    return Sample(messages, where, found.get("tools") or [], found.get("thinking"), found.get("opens_thinking", False))


def read_objects(path: Path, lists: Sequence[str]) -> Iterator[tuple[str, dict[str, Any] | LintError]]:
    """Place and content of each line of a JSONL file that is not blank: an object with these lists, or what is wrong."""
    number = 0
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for line_number, line in enumerate(file, 1):
            if line.strip():
                number += 1
                where = f"{path}, line {line_number}, sample {number}"
                yield where, _read_line(line, where, lists)


def _read_line(line: str, where: str, lists: Sequence[str]) -> dict[str, Any] | LintError:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return LintError(where, "json", f"{error}")
    if not isinstance(found, dict) or not all(isinstance(found.get(key), list) for key in lists):
        wanted = ", ".join(f'"{key}"' for key in lists) + (", lists" if len(lists) > 1 else ", a list")
        return LintError(where, "json", f"found {line.strip()[:60]!r}; wanted an object with {wanted}")
    thinking = found.get("thinking")
    if thinking is not None and not isinstance(thinking, bool):
        return LintError(where, "json", f'"thinking" is {thinking!r:.60}; wanted true, false or null')
    opens = found.get("opens_thinking", False)
    if not isinstance(opens, bool) or (opens and thinking is not True):
        return LintError(where, "json", f'"opens_thinking" is {opens!r:.60}; wanted false, or true where "thinking" is true')
    return found


def lint(sample: Sample, tokenizer: Tokenizer, longest: int) -> Rendered:
    """The sample's ids and the mask of what is learnt, at most `longest` tokens. Raises `LintError`."""

    def refuse(fault: str, reason: str) -> LintError:
        return LintError(sample.where, fault, reason)

    messages = sample.messages
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise refuse("role", f"messages[{index}] has the role {role!r:.40}; wanted one of {', '.join(ROLES)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise refuse("empty mask", "there is no message of the assistant; wanted one")
    if messages[-1]["role"] != "assistant":
        raise refuse("no answer", f"the last message is the {messages[-1]['role']}'s; wanted the assistant's")
    try:
        schemas = {name: signature.parameters for name, signature in signatures(sample.tools).items()}
        for found in (*_turn_faults(messages), *_mark_faults(messages), *_call_faults(messages, schemas)):
            raise refuse(*found)
        for found in _mode_faults(sample):
            raise refuse(*found)
        rendered = render_tokens(
            tokenizer,
            messages,
            sample.tools or None,
            sample.thinking,
            end_of_turn=True,
            opens_thinking=sample.opens_thinking,
        )
    except ChatError as error:
        raise refuse("format", str(error)) from error
    if not any(rendered.assistant_mask):
        raise refuse("empty mask", "no token is the model's; wanted a turn with some text")
    if len(rendered.ids) > longest:
        raise refuse("too long", f"{len(rendered.ids)} tokens; wanted at most a row's {longest}: none is ever cut")
    return rendered


Found = Iterator[tuple[str, str]]  # fault and reason


def _turn_faults(messages: Sequence[Mapping[str, Any]]) -> Found:
    """Every turn of the assistant must end in the mark of the user or of a tool, every call in its result."""
    waiting: list[Any] = []  # the ids of calls without a result yet
    before = None
    for index, message in enumerate(messages):
        role, where = message["role"], f"messages[{index}]"
        if role == "tool":
            content = message.get("content")
            for _ in range(len(content) if isinstance(content, list | tuple) else 1):
                if not waiting:
                    yield "orphan result", f"{where} is a tool's result, and no call before it waits for one"
                    return
                id = message.get("tool_call_id")
                if id is not None and None not in waiting and id not in waiting:
                    yield "orphan result", f"{where} answers the call {id!r:.40}; wanted one of {waiting!r:.80}"
                    return
                waiting.remove(id) if id in waiting else waiting.pop(0)
        elif waiting:
            yield "unanswered call", f"{where} is the {role}'s, while {len(waiting)} calls before it have no result"
        if before == "assistant" and role in ("assistant", "system"):
            yield "cut answer", f"messages[{index - 1}] is followed by the {role}'s: no mark ends the turn; wanted user or tool"
        if role == "assistant":
            yield from _cut_faults(message, where)
            waiting += [call.get("id") if isinstance(call, Mapping) else None for call in _calls(message)]
        before = role


def _cut_faults(message: Mapping[str, Any], where: str) -> Found:
    content, calls = message.get("content") or "", message.get("tool_calls")
    if message.get("finish_reason") == "length":
        yield "cut answer", f'{where} has finish_reason "length"; wanted an answer that came to its end'
    if isinstance(content, str) and "<think>" in content and "</think>" not in content:
        yield "cut answer", f"{where}.content opens <think> and never closes it"
    if not calls and isinstance(content, str) and not content.split("</think>")[-1].strip():
        yield "cut answer", f"{where} has neither content nor calls; wanted an answer after the thinking"


def _mark_faults(messages: Sequence[Mapping[str, Any]]) -> Found:
    for index, message in enumerate(messages):
        for key, text in _texts(message):
            mark = MARK.search(text)
            if mark:
                yield "doubled mark", f"messages[{index}].{key} holds {mark[0]!r} at character {mark.start()}"


def _texts(message: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """All texts of a message that the template puts between its marks."""
    content = message.get("content")
    parts = content if isinstance(content, list | tuple) else [content]
    for part in parts:
        text = part.get("text", part.get("output")) if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            continue
        if message["role"] == "user":
            text = text.removesuffix("/nothink")  # the template's own mark stands in for it
        elif message["role"] == "assistant" and message.get("reasoning_content") is None and "</think>" in text:
            text = re.sub(r"\A\s*(?:<think>)?(.*?)</think>", r"\1", text, count=1, flags=re.DOTALL)
        yield "content", text
    if isinstance(message.get("reasoning_content"), str):
        yield "reasoning_content", message["reasoning_content"]
    for number, call in enumerate(_calls(message)):
        arguments = _function(call).get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False, default=str)
        yield f"tool_calls[{number}].function.arguments", text


def _calls(message: Mapping[str, Any]) -> Sequence[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list | tuple) else ()


def _function(call: Any) -> Mapping[str, Any]:
    function = (call.get("function") or call) if isinstance(call, Mapping) else {}
    return function if isinstance(function, Mapping) else {}


def _call_faults(messages: Sequence[Mapping[str, Any]], schemas: Mapping[str, Mapping[str, Any]]) -> Found:
    for index, message in enumerate(messages):
        for number, call in enumerate(_calls(message)):
            function, where = _function(call), f"messages[{index}].tool_calls[{number}]"
            name, arguments = function.get("name"), function.get("arguments")
            if not isinstance(name, str) or name not in schemas:
                yield (
                    "arguments",
                    f"{where} calls {name!r:.40}; wanted one of the tools: {', '.join(schemas) or 'there are none'}",
                )
                continue
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments)
                except (ValueError, RecursionError) as error:
                    yield "arguments", f"{where}.function.arguments are not JSON: {error}"
                    continue
            if reason := violation(arguments, schemas[name]):
                yield "arguments", f"{where} ({name}): {reason}"


def violation(arguments: Any, parameters: Mapping[str, Any]) -> str | None:
    """What in a call's arguments is not as the tool's JSON schema says (draft 2020-12, and OpenAPI's `nullable`).

    Arguments that no schema names are refused unless `additionalProperties` lets them in, as `minglm.chat.tool_grammar` does.
    """
    from jsonschema.exceptions import SchemaError, UnknownType, best_match
    from referencing.exceptions import Unresolvable

    try:
        found = best_match(_validator(json.dumps({"type": "object", **parameters})).iter_errors(arguments))
    except (SchemaError, UnknownType, Unresolvable, RecursionError) as error:
        return f"the tool's schema cannot be followed: {getattr(error, 'message', error)!s:.200}"
    return None if found is None else f"{found.json_path.replace('$', 'arguments', 1)}: {found.message:.200}"


@functools.lru_cache(maxsize=1024)
def _validator(schema: str) -> "Validator":
    """Of a schema's JSON. Raises SchemaError for one that is none."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend
    from referencing import Registry

    own = Draft202012Validator.VALIDATORS

    def unless_null(keyword: str) -> Callable[..., Iterator[Any]]:
        def check(validator: "Validator", wanted: Any, value: Any, part: Mapping[str, Any]) -> Iterator[Any]:
            if value is not None or part.get("nullable") is not True:
                yield from own[keyword](validator, wanted, value, part)

        return check

    def properties(validator: "Validator", wanted: Any, value: Any, part: Mapping[str, Any]) -> Iterator[Any]:
        yield from own["properties"](validator, wanted, value, part)
        if wanted and "additionalProperties" not in part:
            yield from own["additionalProperties"](validator, False, value, part)

    strict = extend(Draft202012Validator, {"properties": properties, **{key: unless_null(key) for key in NULLABLE}})
    found = json.loads(schema)
    Draft202012Validator.check_schema(found)
    return strict(found, registry=Registry())  # an empty one: nothing is ever fetched


def _mode_faults(sample: Sample) -> Found:
    """A non-thinking sample never thinks. A thinking one does, somewhere after the last user's message: the template drops
    what was thought before."""
    messages = sample.messages
    last_user = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
    thoughts = [index for index, message in enumerate(messages) if message["role"] == "assistant" and _thinks(message)]
    if sample.thinking is False and thoughts:
        yield "mode", f"messages[{thoughts[0]}] thinks, in a non-thinking sample"
    if sample.thinking is True and not any(index > last_user for index in thoughts):
        yield "mode", "no message after the last user's thinks, in a thinking sample"


def _thinks(message: Mapping[str, Any]) -> bool:
    content, reasoning = message.get("content"), message.get("reasoning_content")
    if reasoning is None and isinstance(content, str) and "</think>" in content:
        reasoning = content.split("</think>")[0].split("<think>")[-1]
    return isinstance(reasoning, str) and bool(reasoning.strip())
