"""The parser: gives back what the template wrote, for every cutting of the text, and never guesses."""

import json
import random
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minglm.chat import ChatError, Delta, StreamParser, parse, render, signatures

# ------------------------------------------------------------------------------------------ parse(render(x)) == x

WORDS = ["", " ", "\n", "def f(x):\n\treturn x < 1", "é", "🙂", "\x85", "\\", "<", "</", '"', "001", "true", "null", "{}", "a"]
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
ESCAPED = ["<\\/arg_value>", "<\\\\/arg_value>", "<\\/arg_key>", "<\\", "<|user|>", "<|assistant|>", "[gMASK]<sop>", "/nothink"]

texts = st.text(max_size=12) | st.lists(st.sampled_from(WORDS + TAGS + ESCAPED), max_size=6).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
arrays = st.lists(json_values, max_size=3)
objects = st.dictionaries(texts, json_values, max_size=3)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
not_json = texts.filter(lambda text: not text.strip() or text.strip()[0] not in '0123456789-"[{tfn')

# A schema and the values that it allows, where text and type decide one another.
SCHEMAS = [
    ({"type": "string"}, texts),
    ({"type": "string", "enum": ["001", "true"]}, st.sampled_from(["001", "true"])),
    ({}, texts),
    ({"description": "no type"}, texts),
    ({"type": "integer"}, st.integers()),
    ({"type": "number"}, numbers),
    ({"type": "boolean"}, st.booleans()),
    ({"type": "null"}, st.none()),
    ({"type": "array", "items": {"type": "string"}}, arrays),
    ({"type": "object"}, objects),
    ({"type": ["integer", "string"]}, st.integers() | not_json),
    ({"type": ["string", "integer"]}, texts),
    ({"anyOf": [{"type": "null"}, {"type": "boolean"}, {"type": "string"}]}, st.none() | st.booleans() | not_json),
    ({"oneOf": [{"type": "array"}, {"type": "object"}]}, arrays | objects),
    ({"allOf": [{"description": "x"}, {"type": "integer"}]}, st.integers()),
    ({"enum": ["a", 3, None, False]}, st.sampled_from(["a", 3, None, False])),
    ({"const": 7}, st.just(7)),
    ({"type": "integer", "nullable": True}, st.integers() | st.none()),
    ({"$ref": "#/$defs/a~1b"}, st.booleans()),
]
DEFINITIONS = {"a/b": {"$ref": "#/$defs/last"}, "last": {"type": "boolean"}}


@st.composite
def tools_and_turns(draw: st.DrawFn) -> tuple[list[dict], dict]:
    """Tools, and an assistant's turn that the grammar allows."""
    tools, calls = [], []
    for number in range(draw(st.integers(0, 3))):
        typed = draw(st.dictionaries(texts, st.sampled_from(SCHEMAS), max_size=3))
        parameters = {"type": "object", "properties": {key: schema for key, (schema, _) in typed.items()}, "$defs": DEFINITIONS}
        tools.append({"type": "function", "function": {"name": f"tool-{number}", "parameters": parameters}})
        arguments = {key: draw(values) for key, (_, values) in typed.items() if draw(st.booleans())}
        if draw(st.booleans()):
            arguments |= draw(st.dictionaries(texts.filter(lambda key, typed=typed: key not in typed), texts, max_size=2))
        calls.append({"type": "function", "function": {"name": f"tool-{number}", "arguments": arguments}})
    calls += [
        {"type": "function", "function": {"name": "unknown", "arguments": draw(st.dictionaries(texts, texts, max_size=2))}}
    ]
    turn = {
        "role": "assistant",
        "reasoning_content": draw(texts.filter(lambda text: "</think>" not in text)).strip(),
        "content": draw(texts.filter(lambda text: "<tool_call>" not in text)).strip(),
        "tool_calls": draw(st.permutations(calls))[: draw(st.integers(0, len(calls)))],
    }
    return tools, turn


def same(left: object, right: object) -> bool:
    """Equal, and 1, 1.0 and True are not."""
    return left == right and json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


@settings(max_examples=400)
@given(tools_and_turns())
def test_parse_gives_back_every_turn_that_render_wrote(tools_and_turn):
    tools, turn = tools_and_turn
    text = render([turn])
    assert same(parse(text, tools), turn)
    as_json = [{"function": {**c["function"], "arguments": json.dumps(c["function"]["arguments"])}} for c in turn["tool_calls"]]
    assert same(parse(render([{**turn, "tool_calls": as_json}]), tools), turn)


def tool(**properties: object) -> list[dict]:
    return [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}]


def call(*arguments: tuple[str, str]) -> str:
    pairs = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments)
    return f"\n<tool_call>f\n{pairs}</tool_call>"


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "001", "001"),
        ({"type": "string"}, "true", "true"),
        ({"type": "string"}, "", ""),
        ({"type": "string"}, " \n<b>x</b>\n", " \n<b>x</b>\n"),
        ({}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "5.0", 5),
        ({"type": "number"}, "5", 5),
        ({"type": "number"}, "-5e3", -5000.0),
        ({"type": "boolean"}, "false", False),
        ({"type": "array"}, '["001", 1]', ["001", 1]),
        ({"type": "object"}, '{"a": {"b": null}}', {"a": {"b": None}}),
        ({"type": ["integer", "string"]}, "001", "001"),
        ({"type": ["integer", "string"]}, "1", 1),
        ({"type": ["string", "integer"]}, "1", "1"),
    ],
)
def test_the_schema_types_a_value_not_its_looks(schema, text, value):
    arguments = parse(call(("a", text)), tool(a=schema))["tool_calls"][0]["function"]["arguments"]
    assert same(arguments, {"a": value})


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "integer"}, "five"),
        ({"type": "integer"}, "001"),
        ({"type": "integer"}, "5.5"),
        ({"type": "integer"}, "true"),
        ({"type": "integer"}, ""),
        ({"type": "integer"}, "9" * 5000),
        ({"type": "number"}, "NaN"),
        ({"type": "number"}, "1e999"),
        ({"type": "number"}, '"5"'),
        ({"type": "boolean"}, "True"),
        ({"type": "boolean"}, "1"),
        ({"type": "null"}, "None"),
        ({"type": "array"}, "[1, 2"),
        ({"type": "array"}, "[" * 100_000),
        ({"type": "object"}, "{}}"),
        ({"type": "object"}, "{'a': 1}"),
        ({"type": "object"}, '{"a": 1, "a": 2}'),
        ({"type": "object"}, '{"a": "\\ud800"}'),
        ({"type": ["integer", "null"]}, "x"),
    ],
)
def test_a_value_of_another_type_is_an_error_at_its_place(schema, text):
    turn = call(("ok", "1"), ("a", text))
    with pytest.raises(ChatError, match="argument 'a' of f") as caught:
        parse(turn, tool(a=schema))
    assert turn[caught.value.position :].startswith(text + "</arg_value>")


@pytest.mark.parametrize(
    ("turn", "at", "wanted"),
    [
        ("\n<tool_call>f\n{}</tool_call>", "{}", "<arg_key> or </tool_call>"),
        ('\n<tool_call>{"name": "f"}</tool_call>', '"f"', "<arg_key>"),
        ("\n<tool_call>\n</tool_call>", "</tool_call>", "the name of a tool"),
        ("\n<tool_call>two words\n</tool_call>", "words", "<arg_key>"),
        ("\n<tool_call>a>b\n</tool_call>", ">b", "white space"),
        ("\n<tool_call>f\n<arg_key>a</arg_key>\n</tool_call>", "</tool_call>", "<arg_value>"),
        ("\n<tool_call>f\n<arg_key>a</arg_key>x<arg_value>1</arg_value></tool_call>", "x<arg", "<arg_value>"),
        ("\n<tool_call>f\n<arg_value>1</arg_value>\n</tool_call>", "<arg_value>", "<arg_key>"),
        (call(("a", "1"), ("a", "2")), "a</arg_key>\n<arg_value>2", "each once"),
        (call() + " and so on", "and", "<tool_call>"),
        (call() + "\n<tool_call>", "", "the name of a tool"),
        ("\n<tool_call>f", "", "the name of a tool"),
        ("\n<tool_call>f\n<arg_key>a", "", "</arg_key>"),
        ("\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_va", "", "<arg_value>"),
        ("\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_val", "", "</arg_value>"),
        ("\n<tool_call>f\n", "", "<arg_key> or </tool_call>"),
        (call() + "\n<tool_", "", "<tool_call>"),
    ],
)
def test_a_malformed_call_is_reported_where_it_goes_wrong(turn, at, wanted):
    with pytest.raises(ChatError) as caught:
        parse("<|assistant|>" + turn)
    assert wanted in str(caught.value)
    position = caught.value.position - len("<|assistant|>")
    assert position == (turn.rindex(at) if at else len(turn))


def test_turns_that_need_no_call():
    def message(reasoning: str, content: str) -> dict:
        return {"role": "assistant", "reasoning_content": reasoning, "content": content, "tool_calls": []}

    assert parse("") == message("", "")
    assert parse("Hi <there\n") == message("", "Hi <there")
    assert parse("\n<think>\nwhy\n</think>\n\nso") == message("why", "so")
    assert parse("\n<think>cut o") == message("cut o", "")
    assert parse("\n<think>a<tool_call>b</think>c</think>") == message("a<tool_call>b", "c</think>")
    assert parse("\n<think></think>\n<think>x</think>y") == message("", "<think>x</think>y")
    assert parse("\n<thin") == message("", "<thin")
    zero = "\n<tool_call>f</tool_call>"
    assert parse(zero)["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_a_mode_says_where_the_text_begins():
    text = "\n<think>x</think>\ny"

    def read(**options: object) -> tuple[str, str]:
        parser = StreamParser(**options)
        parser.feed(text)
        parser.finish()
        return parser.message["reasoning_content"], parser.message["content"]

    assert read() == read(thinking=True) == ("x", "y")
    assert read(thinking=False) == ("", text.strip())
    assert read(in_thinking=True) == ("<think>x", "y")


# ---------------------------------------------------------------------------------------------------------- streaming


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def read(chunks: list[str], tools: list[dict] | None) -> tuple:
    """All that a stream told, and the message that it built; fragments joined."""
    parser = StreamParser(tools)
    deltas: list[Delta] = []
    for chunk in chunks:
        deltas += parser.feed(chunk)
    deltas += parser.finish()
    told = {"reasoning": "", "content": "", "calls": [], "error": None}
    for delta in deltas:
        assert told["error"] is None, "a delta after the error"
        if delta.kind in ("reasoning", "content"):
            assert delta.text and not told["calls"] and not (delta.kind == "reasoning" and told["content"])
            told[delta.kind] += delta.text
        elif delta.kind == "tool_call_start":
            assert delta.index == len(told["calls"])
            told["calls"].append([delta.name, ""])
        elif delta.kind == "tool_call_arguments":
            assert delta.index == len(told["calls"]) - 1 and delta.json_fragment
            told["calls"][-1][1] += delta.json_fragment
        else:
            assert delta.kind == "error"
            told["error"] = (delta.position, delta.message)
    return told, parser.message


def assert_told_is_message(told: dict, message: dict) -> None:
    assert (told["reasoning"], told["content"]) == (message["reasoning_content"], message["content"])
    complete = [
        [c["function"]["name"], json.dumps(c["function"]["arguments"], ensure_ascii=False)] for c in message["tool_calls"]
    ]
    assert told["calls"][: len(complete)] == complete
    assert len(told["calls"]) - len(complete) <= (told["error"] is not None)  # the one that is broken off


broken_texts = st.lists(st.sampled_from(WORDS + TAGS + ESCAPED + ["f\n", call(("a", "1")), "\n<think>x</think>\n"]), max_size=9)


@settings(max_examples=300)
@given(tools_and_turns().map(lambda x: (x[0], render([x[1]])[len("[gMASK]<sop><|assistant|>") :])), st.data())
def test_every_cutting_of_a_turn_tells_the_same(tools_and_text, data):
    tools, text = tools_and_text
    whole = read([text], tools)
    assert_told_is_message(*whole)
    assert whole[0]["error"] is None and whole[1] == parse(text, tools)
    assert read(list(text), tools) == whole
    assert read(cut(text, data.draw(st.lists(st.integers(0, len(text))))), tools) == whole


@settings(max_examples=300)
@given(broken_texts.map("".join), st.data())
@example("\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value><\\\\/arg_value>< /arg_value></arg_value>\n</tool_call>", None)
def test_every_cutting_of_any_text_tells_the_same(text, data):
    whole = read([text], None)
    assert_told_is_message(*whole)
    assert read(list(text), None) == whole
    if data is not None:
        assert read(cut(text, data.draw(st.lists(st.integers(0, len(text))))), None) == whole


def test_every_pair_of_cuts_tells_the_same():
    tools = tool(code={"type": "string"}, flags={"type": "array"})
    code = 'if a < b:\n\tprint("</arg_value>")  # <\\/arg_value>'
    arguments = {"code": code, "flags": ["</tool_call>", 1]}
    turn = {"role": "assistant", "reasoning_content": "a </thin", "content": "b <tool"}
    text = render([{**turn, "tool_calls": [{"name": "f", "arguments": arguments}]}])[len("[gMASK]<sop><|assistant|>") :]
    whole = read([text], tools)
    assert whole[1]["tool_calls"][0]["function"]["arguments"] == arguments
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1, 3):
            assert read([text[:first], text[first:second], text[second:]], tools) == whole


def test_text_is_told_as_soon_as_it_is_sure():
    parser = StreamParser(tool(a={"type": "string"}, n={"type": "integer"}))

    def told(chunk: str) -> list[tuple]:
        return [(delta.kind, delta.text or delta.json_fragment or delta.name) for delta in parser.feed(chunk)]

    assert told("\n<thi") == []
    assert told("nk>I ") == [("reasoning", "I")]
    assert told("think <") == [("reasoning", " think")]
    assert told("b") == [("reasoning", " <b")]
    assert told("</think>\nOh\n<too") == [("content", "Oh")]
    assert told("l_call>f") == []
    assert told("\n") == [("tool_call_start", "f")]
    assert told("<arg_key>a</arg_key>\n<arg_value>x") == [("tool_call_arguments", '{"a": "x')]
    assert told(' "y"') == [("tool_call_arguments", ' \\"y\\"')]
    assert told("</arg_value>\n<arg_key>n</arg_key>\n<arg_value>1") == [("tool_call_arguments", '"')]
    assert told("2</arg_value>") == [("tool_call_arguments", ', "n": 12')]
    assert told("\n</tool_call>") == [("tool_call_arguments", "}")]
    assert parser.finish() == []
    with pytest.raises(ValueError, match="after finish"):
        parser.feed("x")


# ------------------------------------------------------------------------------------------------------------ fuzzing

KEY, VALUE = (rf"<arg_{name}>(?P<{name}>(?:(?!</arg_{name}>).)*)</arg_{name}>" for name in ("key", "value"))
ARGUMENT = re.compile(rf"\s*{KEY}\s*{VALUE}", re.DOTALL)
CALL = re.compile(rf"\s*<tool_call>\s*(?P<name>[^\s<>]+)(?P<arguments>(?:{ARGUMENT.pattern})*)\s*</tool_call>".replace(
    "(?P<key>", "(?:").replace("(?P<value>", "(?:"), re.DOTALL)  # fmt: skip


def by_regular_expressions(text: str) -> list[tuple[str, list[tuple[str, str]]]] | None:
    """The grammar a second time: the calls of a turn with their arguments as raw text, None if one is malformed."""
    after_thinking = re.sub(r"\A\s*<think>.*?(</think>|\Z)", "", text, count=1, flags=re.DOTALL)
    start = after_thinking.find("<tool_call>")
    found, at = [], start
    while start >= 0 and after_thinking[at:].strip():
        match = CALL.match(after_thinking, at)
        if not match:
            return None
        pairs = [(pair["key"], pair["value"]) for pair in ARGUMENT.finditer(match["arguments"])]
        found.append((match["name"], pairs))
        at = match.end()
    return found


def unescaped(text: str, tag: str) -> str:
    return re.sub(rf"<(\\+)/{tag}>", lambda found: f"<{found[1][1:]}/{tag}>", text)


def malformed(rng: random.Random) -> str:
    """A good turn spoilt a few times, or tags and text in any order."""
    snippets = [*TAGS, *ESCAPED, *WORDS, "f", "n\n", "7", "[1]"]
    if rng.random() < 0.3:
        return "".join(rng.choices(snippets, k=rng.randrange(12)))
    pairs = [(rng.choice(["a", "n", "l", "b"]), rng.choice(["7", "[1]", "x y", "true", "<b>", "<\\/arg_value>"])) for _ in "12"]
    text = "\n<think>hm</think>\nOh." + call(*pairs[: rng.randrange(3)]) + call(*pairs[: rng.randrange(3)])
    for _ in range(rng.randrange(1, 4)):
        at, more = rng.randrange(len(text) + 1), rng.randrange(1, 14)
        tags = [match.span() for match in re.finditer(r"</?[a-z_]+>|\n", text)] or [(0, len(text))]
        start, end = rng.choice(tags)
        text = rng.choice([
            text[:at] + text[at + more :],
            text[:start] + text[end:],
            text[:end] + text[start:],
            text[:at] + rng.choice(snippets) + text[at:],
            text[:start] + rng.choice(snippets) + text[end:],
            text[:at],
        ])  # fmt: skip
    return text


def test_ten_thousand_malformed_turns_never_crash_and_invent_no_argument():
    tools = tool(n={"type": "integer"}, l={"type": "array"}, b={"type": "boolean"})
    types = {"n": int, "l": list, "b": bool}
    rng = random.Random(4)
    refused = 0
    for _ in range(10_000):
        text = malformed(rng)
        told, message = read(cut(text, [rng.randrange(len(text) + 1) for _ in range(rng.randrange(6))]), tools)
        assert_told_is_message(told, message)
        if told["error"]:
            refused += 1
            assert 0 <= told["error"][0] <= len(text)
        try:
            assert parse("<|assistant|>" + text, tools) == message and told["error"] is None
        except ChatError as error:
            assert error.position == len("<|assistant|>") + told["error"][0]

        wanted = by_regular_expressions(text)
        calls = message["tool_calls"]
        if told["error"] is None:
            assert wanted is not None and len(wanted) == len(calls), text
        for number, (name, pairs) in enumerate(wanted or []):
            if number == len(calls):  # well-formed, so an argument is twice there or of another type
                keys = [key for key, _ in pairs]
                typed = [(types[key], value) for key, value in pairs if key in types and name == "f"]
                assert len(set(keys)) < len(keys) or any(not is_json_of(kind, value) for kind, value in typed), text
                break
            found = calls[number]["function"]
            assert found["name"] == name
            assert list(found["arguments"]) == [unescaped(key, "arg_key") for key, _ in pairs]
            for value, (_, raw) in zip(found["arguments"].values(), pairs, strict=True):
                assert value == (unescaped(raw, "arg_value") if isinstance(value, str) else json.loads(raw)), text
    assert 3000 < refused < 9500


def is_json_of(kind: type, text: str) -> bool:
    try:
        return type(json.loads(unescaped(text, "arg_value"))) is kind
    except ValueError:
        return False


def test_a_long_turn_takes_time_in_proportion():
    """One character at a time, 160,000 of them: not the square of it."""
    text = "\n<think>" + " why" * 10_000 + "</think>" + call(("a", "x <y> " * 20_000))
    start = time.process_time()
    told, message = read(list(text), None)
    assert len(message["tool_calls"][0]["function"]["arguments"]["a"]) == 120_000
    assert time.process_time() - start < 20


# ------------------------------------------------------------------------------------------------------------ schemas


@pytest.mark.parametrize(
    ("tools", "found"),
    [
        ([{"type": "function", "function": {}}], "name is None"),
        ([{"type": "function", "function": {"name": "a b"}}], "'a b'"),
        ([{"name": "f"}, {"name": "f"}], "named 'f', as one before"),
        ([{"name": "f", "parameters": "x"}], "a str; wanted a JSON schema"),
        ([{"name": "f", "parameters": {"properties": ["a"]}}], "properties is a list"),
        (tool(a={"type": "float"}), "property 'a': type is 'float'; wanted string"),
        (tool(a={"type": []}), "type is []"),
        (tool(a=5), "property 'a': a int"),
        (tool(a={"anyOf": "x"}), "wanted a list"),
        (tool(a={"enum": []}), "wanted a list with something in it"),
        (tool(a={"$ref": "#/$defs/b"}), "there is no '$defs'"),
        (tool(a={"$ref": "other.json"}), "within the schema"),
        (tool(a={"$ref": "#/properties/a"}), "round in a circle"),
    ],
)
def test_unfit_tools_are_refused_before_anything_is_read(tools, found):
    for use in (signatures, StreamParser, lambda tools: parse("", tools)):
        with pytest.raises(ChatError, match=re.escape(found)) as caught:
            use(tools)
        assert caught.value.key == "tools" and caught.value.index == len(tools) - 1
