"""Tools and calls of them: declared in OpenAI's format, read strictly.

A call is malformed if its arguments are not JSON, if there is no such tool, or if the tool's schema does not allow the
arguments. In the report (section 3.3, process action format penalty) that ends the attempt with reward zero, and so it
does here: `read_calls` raises, and the world (minglm/tasks/agents/world.py) ends.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minglm.tasks.task import Message

Tool = dict[str, Any]
MOST_CALLS = 16  # in one message
LONGEST_ARGUMENT = 20_000  # characters
LARGEST_NUMBER = 10**15
ERROR = "error:"  # how the result of a call begins that cannot be done


class MalformedCall(ValueError):
    """A call that cannot be made. The message says what was found and what would be right."""


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]


def tool(name: str, description: str, parameters: Mapping[str, str | Mapping[str, Any]], optional: Sequence[str] = ()) -> Tool:
    """Declare a tool. parameters: of each its JSON type, or its schema (type, and perhaps enum)."""
    properties = {key: {"type": schema} if isinstance(schema, str) else dict(schema) for key, schema in parameters.items()}
    required = [key for key in parameters if key not in optional]
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def call_message(calls: Sequence[Call], content: str = "") -> Message:
    """The assistant's message that makes the calls."""
    functions = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"type": "function", "function": function} for function in functions],
    }


def read_calls(message: Any, tools: Sequence[Tool]) -> list[Call]:
    """The calls of an assistant's message, whatever it holds. Raises MalformedCall for the first that cannot be made."""
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        raise MalformedCall("found something else; wanted a message of the assistant")
    found = message.get("tool_calls")
    if found is None:
        return []
    if not isinstance(found, list | tuple):
        raise MalformedCall(f"tool_calls is a {type(found).__name__}; wanted a list of calls")
    if len(found) > MOST_CALLS:
        raise MalformedCall(f"{len(found)} calls in one message; wanted at most {MOST_CALLS}")
    return [_read_call(call, index, tools) for index, call in enumerate(found)]


class CallCount(NamedTuple):
    """Calls of an attempt; and of these, those that fit their tools and could be done."""

    made: int
    succeeded: int


def count_calls(response: Sequence[Message], tools: Sequence[Tool], unread: int = 0) -> CallCount:
    """One by one. A call has succeeded if all of its message could be read (else the world does none of them) and its result,
    where the attempt went on to one, is no error. unread: calls of a turn that could not be read, which stand in no message.
    """
    made, succeeded = unread, 0
    for place, message in enumerate(response):
        calls = message.get("tool_calls") or ()
        made += len(calls)
        try:
            read_calls(message, tools)
        except MalformedCall:
            continue
        results = [found["content"] for found in response[place + 1 : place + 1 + len(calls)] if found["role"] == "tool"]
        succeeded += len(calls) - sum(result.startswith(ERROR) for result in results)
    return CallCount(made, succeeded)


def _read_call(call: Any, index: int, tools: Sequence[Tool]) -> Call:
    where = f"call {index + 1}"
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise MalformedCall(f"{where} has no function; wanted one with name and arguments")
    name = function.get("name")
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    if not isinstance(name, str) or name not in schemas:
        raise MalformedCall(f"{where}: there is no tool {_shown(name)}; wanted one of {', '.join(schemas)}")
    try:
        arguments = _check_arguments(function.get("arguments"), schemas[name])
    except MalformedCall as error:
        raise MalformedCall(f"{where}, {name}: {error}") from error
    return Call(name, arguments)


def _check_arguments(arguments: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(arguments, str):
        arguments = _load_json(arguments)
    if not isinstance(arguments, Mapping):
        raise MalformedCall(f"arguments are {_shown(arguments)}; wanted a JSON object")
    properties = schema["properties"]
    for key in arguments:
        if not isinstance(key, str) or key not in properties:
            raise MalformedCall(f"there is no argument {_shown(key)}; wanted {', '.join(properties) or 'none'}")
    for key in schema["required"]:
        if key not in arguments:
            raise MalformedCall(f"argument {key} is missing")
    return {key: _check_value(key, value, properties[key]) for key, value in arguments.items()}


def _check_value(key: str, value: Any, schema: Mapping[str, Any]) -> Any:
    kind = schema["type"]
    if kind == "integer" and isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_NUMBER:
        value = int(value)  # JSON has one kind of number: 2.0 is an integer
    python = {"string": str, "integer": int, "number": int | float, "boolean": bool}[kind]
    if not isinstance(value, python) or (kind != "boolean" and isinstance(value, bool)):
        raise MalformedCall(f"argument {key} is {_shown(value)}; wanted {kind}")
    if isinstance(value, int | float) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
        raise MalformedCall(f"argument {key} is too large a number, or none; wanted at most {LARGEST_NUMBER}")
    if isinstance(value, str) and len(value) > LONGEST_ARGUMENT:
        raise MalformedCall(f"argument {key} has {len(value)} characters; wanted at most {LONGEST_ARGUMENT}")
    if "enum" in schema and value not in schema["enum"]:
        raise MalformedCall(f"argument {key} is {_shown(value)}; wanted one of {', '.join(map(str, schema['enum']))}")
    return value


def _load_json(text: str) -> Any:
    """Strict: no NaN, no infinity, no key twice."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as error:
        raise MalformedCall("the arguments are not JSON") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def _shown(value: Any) -> str:
    """Short, and safe for anything: the repr of a deep list or a huge number would raise."""
    if isinstance(value, str):
        return repr(value[:40])
    if value is None or isinstance(value, bool | float):
        return repr(value)
    return f"a {type(value).__name__}"
