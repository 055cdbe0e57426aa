"""BFCL v3, the Berkeley function-calling leaderboard: are these the right calls, with arguments that may be had?

The judgement is by syntax (AST): names, types of the schema, and for each argument a list of values that count, in which ""
says that it may be left out. Strings are compared without case, blanks and `,./-_*^`; parallel calls in any order.
Unlike published: a call of an unknown function is not relevant, one with broken arguments is a call where none is wanted, 1 is
not true, and strings deep within lists and objects are compared like all others.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minglm.evals.benchmarks.question import RIGHT, Judge, Question, Unscorable
from minglm.evals.benchmarks.records import Record
from minglm.tasks.task import Message, Verdict

SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
PYTHON_TYPES = {
    "string": str, "integer": int, "float": float, "number": float, "boolean": bool, "array": list, "tuple": list,
    "dict": dict, "object": dict, "any": str,
}  # fmt: skip
NEEDS = {
    "multi_turn": "the simulated programs of bfcl_eval, whose states are compared after each turn",
    "javascript": "values in the syntax of JavaScript",
    "java": "values in the syntax of Java",  # behind the one that begins like it
    "exec": "the functions themselves, some of which ask services on the network",
    "rest": "services on the network",
    "memory": "the memory stores of BFCL v4",
    "web_search": "a search engine",
    "sql": "a database, and is no longer part of the benchmark",
    "chatable": "people, and is no longer part of the benchmark",
}


def bfcl(record: Record) -> Question:
    """A question of one turn; ground_truth is joined to it by the loader from possible_answer/, but irrelevance has none."""
    id = record.take("id", str)
    category = re.sub(r"_\d.*$", "", id)
    turns = record.take_json("question", list)
    # A later turn may be empty: in multi_turn_miss_func it only brings a function.
    if not turns or not turns[0] or not all(isinstance(turn, list) for turn in turns):
        raise record.fail("question", turns, "a list of turns, each a list of messages")
    functions = record.take_json("function", list, [])
    messages = turns[0]
    kind = category.removeprefix("live_").removeprefix("simple_")  # the newer files have simple_java
    needs = next((needs for part, needs in NEEDS.items() if kind.startswith(part)), None)
    if needs:
        return Question("bfcl", id, messages, _unscorable(record.place, category, needs), place=record.place)
    described = all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in functions)
    if not described or not (functions or category.endswith("irrelevance")):
        raise record.fail("function", functions, "descriptions of functions, each with a name")
    tools = [{"type": "function", "function": _as_tool(function)} for function in functions]
    if category.endswith("irrelevance"):
        gold = [{"role": "assistant", "content": "None of these functions can do that."}]
        return Question(
            "bfcl", id, messages, judged_calls(lambda calls: "called a function" if calls else None), gold, tools=tools
        )
    if category.endswith("_relevance"):
        known = [tool["function"]["name"] for tool in tools]

        def why_irrelevant(calls: Sequence[tuple[str, Any]]) -> str | None:
            return None if calls and all(name in known for name, _ in calls) else "called none of the functions"

        return Question("bfcl", id, messages, judged_calls(why_irrelevant), [call_message(known[0], {})], tools=tools)
    wanted = record.take_json("ground_truth", list)
    if not wanted or not all(isinstance(one, dict) and len(one) == 1 for one in wanted):
        raise record.fail("ground_truth", wanted, "objects of one function each, with lists of values for its arguments")
    by_name = {function["name"]: function for function in functions}
    pairs = [next(iter(one.items())) for one in wanted]
    for name, arguments in pairs:
        lists = isinstance(arguments, dict) and all(isinstance(values, list) for values in arguments.values())
        if name not in by_name or not lists:
            raise record.fail("ground_truth", {name: arguments}, f"one of {sorted(by_name)} with lists of values")
    gold_calls = [_call(name, _right_arguments(by_name[name], own)) for name, own in pairs]
    gold = [{"role": "assistant", "content": "", "tool_calls": gold_calls}]

    def why_wrong(calls: Sequence[tuple[str, Any]]) -> str | None:
        if len(calls) != len(pairs):
            return f"{len(calls)} calls; wanted {len(pairs)}"
        rest = list(calls)
        for name, arguments in pairs:
            reasons = [why_not_this_call(call, by_name[name], arguments) for call in rest]
            if None not in reasons:
                return f"no call fits {name}: {reasons[0]}"
            rest.pop(reasons.index(None))
        return None

    return Question("bfcl", id, messages, judged_calls(why_wrong), gold, tools=tools)


def _unscorable(place: str, category: str, needs: str) -> Judge:
    def judge(response: Sequence[Message]) -> Verdict:
        raise Unscorable(f"{place}: to judge BFCL's category {category} one needs {needs}; leave it out, or use bfcl_eval")

    return judge


def safe_name(name: str) -> str:
    """OpenAI's protocol has no dots in names."""
    return re.sub(r"[^\w-]", "_", name)


def _as_tool(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**_as_schema(function), "name": safe_name(function["name"])}


def _as_schema(value: Any) -> Any:
    """With JSON schema's names of types in place of Python's."""
    if isinstance(value, list):
        return [_as_schema(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {key: _as_schema(one) for key, one in value.items()}
    if isinstance(found.get("type"), str):
        found["type"] = SCHEMA_TYPES.get(found["type"], found["type"])
    return found


def _call(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": safe_name(name), "arguments": dict(arguments)}}


def call_message(name: str, arguments: Mapping[str, Any]) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [_call(name, arguments)]}


def _right_arguments(function: Mapping[str, Any], wanted: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The first value of each argument; one that may be left out is, unless the schema requires it."""
    required = (function.get("parameters") or {}).get("required") or ()
    firsts = {key: next((one for one in values if one != "" or key not in required), "") for key, values in wanted.items()}
    return {key: _plain(first) for key, first in firsts.items() if first != ""}


def _plain(value: Any) -> Any:
    """The value that a possible one describes: in objects each key has a list of them."""
    if isinstance(value, dict):
        firsts = {key: _options(own)[0] for key, own in value.items() if own != []}
        return {key: _plain(first) for key, first in firsts.items() if first != ""}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def calls_of(message: Message) -> list[tuple[str, Any]]:
    """Name and arguments of each call; arguments that are no JSON object as they are."""
    found = []
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                pass  # the text itself fits no schema, and so the call is wrong
        found.append((str(function.get("name")), arguments))
    return found


def judged_calls(why_wrong: Callable[[Sequence[tuple[str, Any]]], str | None]) -> Judge:
    """A judge of the calls in the first message."""

    def judge(response: Sequence[Message]) -> Verdict:
        first = next((message for message in response if message.get("role") == "assistant"), {})
        reason = why_wrong(calls_of(first))
        return RIGHT if reason is None else Verdict(0.0, (reason,))

    return judge


def why_not_this_call(call: tuple[str, Any], function: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    name, arguments = call
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {}
    if name != safe_name(function["name"]):
        return f"calls {name}"
    if not isinstance(arguments, dict):
        return f"arguments {arguments!r:.60} are no object"
    for key in parameters.get("required") or ():
        if key not in arguments:
            return f"{key} is missing"
    for key, value in arguments.items():
        if key not in properties or key not in wanted:
            return f"{key} is not wanted"
        if not _has_type(value, properties[key], wanted[key]):
            return f"{key} = {value!r:.60} is of another type than {properties[key].get('type')}"
        if not _is_one_of(value, properties[key], wanted[key]):
            return f"{key} = {value!r:.60} is another value"
    missing = [key for key, options in wanted.items() if key not in arguments and "" not in options]
    return f"{missing[0]} is missing" if missing else None


def _type_of(schema: Mapping[str, Any]) -> type:
    return PYTHON_TYPES.get(schema.get("type", "any"), str)


def _own_type(options: Sequence[Any]) -> type | None:
    return next((type(option) for option in options if option != ""), None)


def _has_type(value: Any, schema: Mapping[str, Any], options: Sequence[Any]) -> bool:
    """Of the schema's type, or of the right values' where that is another. A whole number is a float, too, but not in a list,
    all items of which must have the type of the schema's items, or that of the first item of a right value."""
    kind = _type_of(schema)
    if type(value) is not kind:
        return type(value) is _own_type(options) or (kind is float and type(value) is int)
    if kind is not list or not isinstance(schema.get("items"), dict):
        return True
    inner = _type_of(schema["items"])
    lists = [option for option in options if isinstance(option, list)]
    return len(lists) < len(options) or any(all(type(one) in (inner, _own_type(right)) for one in value) for right in lists)


def _is_one_of(value: Any, schema: Mapping[str, Any], options: Sequence[Any]) -> bool:
    """Right values of another type than the schema's are names of variables, or null: only these themselves count."""
    if _own_type(options) not in (None, _type_of(schema)):
        return value in options
    return any(same(value, option) for option in options) or (value == [] and "" in options)


def same(value: Any, option: Any) -> bool:
    """Whether a value is that of the option. In an object of the options each key has a list of values."""
    if isinstance(value, str) and isinstance(option, str):
        return _bare(value) == _bare(option)
    if isinstance(value, dict) and isinstance(option, dict):
        if any(key not in option or not any(same(one, own) for own in _options(option[key])) for key, one in value.items()):
            return False
        return all(key in value or "" in _options(own) for key, own in option.items())
    if isinstance(value, list) and isinstance(option, list):
        return len(value) == len(option) and all(map(same, value, option))
    if isinstance(value, bool) or isinstance(option, bool):
        return value is option
    return value == option


def _options(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


def _bare(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')
