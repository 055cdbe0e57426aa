"""The grammar of turns: takes what the template writes, and lets nothing through that the parser would refuse."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.chat import ChatError, parse, render_tokens, tool_grammar
from minglm.engine.grammar import GrammarCompiler, Matcher
from minglm.tokenizer import Tokenizer, train_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    'a "quoted" key': {"type": "number"},
                    "unit": {"enum": ['"C"\n\\', "", 3, None]},
                    "flags": {"type": "array", "items": {"$ref": "#/$defs/flag"}},
                    "place": {
                        "type": "object",
                        "properties": {"lat": {"type": "number"}, "name": {"type": "string"}},
                        "required": ["lat"],
                    },
                    "sure": {"$ref": "#/$defs/flag"},
                    "maybe": {"type": "integer", "nullable": True},
                    "any": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
                },
                "required": ["city", "sure"],
                "$defs": {"flag": {"type": "boolean"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
    {"type": "function", "function": {"name": "put", "parameters": {"additionalProperties": {"type": "integer"}}}},
]

texts = st.text(max_size=10) | st.lists(st.sampled_from(["", " ", "\n", "é", "<think>", "<\\", "</arg_value>", "a"])).map(
    "".join
)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
open_texts = st.text(max_size=10)  # in JSON, where the closing tag may not stand
get_weather = st.fixed_dictionaries(
    {"city": texts, "sure": st.booleans()},
    optional={
        "days": st.integers(),
        'a "quoted" key': numbers,
        "unit": st.sampled_from(['"C"\n\\', "", 3, None]),
        "flags": st.lists(st.booleans(), max_size=3),
        "place": st.fixed_dictionaries({"lat": numbers}, optional={"name": open_texts}),
        "maybe": st.integers() | st.none(),
        "any": texts,
    },
)
ORDER = list(TOOLS[0]["function"]["parameters"]["properties"])
calls = st.one_of(
    get_weather.map(lambda found: ("get_weather", {key: found[key] for key in ORDER if key in found})),
    st.just(("now", {})),
    st.dictionaries(texts.filter(bool), st.integers(), max_size=2).map(lambda found: ("put", found)),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = "Call get_weather for the city of Paris, 12 days; now put true false null é 数 <arg_value> </tool_call>."
    return train_tokenizer([text] * 9, 400, show_progress=False)


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


def allowed(tokenizer: Tokenizer, matcher: Matcher) -> torch.Tensor:
    logits = torch.zeros(tokenizer.vocab_size)
    matcher.hide(logits)
    return logits == 0


def turn_ids(tokenizer: Tokenizer, reasoning: str | None, content: str, called: list[tuple[str, dict]]) -> list[int]:
    """What the model writes: without reasoning, in non-thinking mode."""
    turn = {"role": "assistant", "reasoning_content": reasoning or "", "content": content}
    turn["tool_calls"] = [{"name": name, "arguments": arguments} for name, arguments in called]
    mode = False if reasoning is None else None
    rendered = render_tokens(tokenizer, [turn], enable_thinking=mode, end_of_turn=True)
    return [id for id, own in zip(rendered.ids, rendered.assistant_mask, strict=True) if own]


def refused_at(tokenizer: Tokenizer, compiler: GrammarCompiler, grammar: str, ids: list[int]) -> int | None:
    """Where the grammar does not allow the next id; None if it takes them all."""
    matcher = compiler.matcher(grammar)
    for place, id in enumerate(ids):
        if not allowed(tokenizer, matcher)[id]:
            return place
        matcher.advance(id)
    return None


@settings(max_examples=80)
@given(
    reasoning=st.none() | texts.filter(lambda text: "</think>" not in text),
    content=texts.filter(lambda text: "<tool_call>" not in text),
    called=st.lists(calls, max_size=3),
)
def test_the_grammar_takes_every_turn_that_the_template_writes(tokenizer, compiler, reasoning, content, called):
    mode = False if reasoning is None else None
    ids = turn_ids(tokenizer, reasoning, content, called)
    assert refused_at(tokenizer, compiler, tool_grammar(TOOLS, "auto", mode), ids) is None
    if called:
        ids = turn_ids(tokenizer, reasoning, "", called)
        assert refused_at(tokenizer, compiler, tool_grammar(TOOLS, "required", mode), ids) is None
        name = called[0][0]
        one = turn_ids(tokenizer, reasoning, "", called[:1])
        assert (
            refused_at(tokenizer, compiler, tool_grammar(TOOLS, {"type": "function", "function": {"name": name}}, mode), one)
            is None
        )
    else:
        assert refused_at(tokenizer, compiler, tool_grammar(TOOLS, "none", mode), ids) is None


def walk(tokenizer: Tokenizer, compiler: GrammarCompiler, grammar: str, rng: random.Random) -> tuple[str, bool]:
    """A turn of random tokens, of those that the grammar allows, tags rather than text; and whether it came to its end."""
    matcher = compiler.matcher(grammar)
    ends = set(tokenizer.end_of_turn_ids)
    tags = {*tokenizer.special_ids.values(), *tokenizer.encode("\n")} - ends
    ids: list[int] = []
    for _ in range(400):
        choices = set(allowed(tokenizer, matcher).nonzero().flatten().tolist())
        kinds = [choices & tags, choices & ends]
        wanted = next((kind for kind in kinds if kind and rng.random() < 0.2), choices)
        id = rng.choice(sorted(wanted))
        if id in ends:
            return tokenizer.decode(ids), True
        ids.append(id)
        matcher.advance(id)
    return tokenizer.decode(ids), False


TYPES = {"city": str, "days": int, 'a "quoted" key': (int, float), "flags": list, "place": dict, "sure": bool}


@pytest.mark.parametrize("choice", ["auto", "required", {"name": "get_weather"}, "none"])
def test_whatever_the_grammar_allows_can_be_read_and_fits_its_tool(tokenizer, compiler, choice):
    rng = random.Random(7)
    grammar = tool_grammar(TOOLS, choice)
    ended = called = unread = 0
    for _ in range(200):
        text, has_ended = walk(tokenizer, compiler, grammar, rng)
        if not has_ended:
            continue
        ended += 1
        try:
            message = parse(text, TOOLS)
        except ChatError as error:  # what the library lets through within arrays and objects
            assert any(found in str(error) for found in ("too large", "twice", "surrogate")), error
            unread += 1
            continue
        called += len(message["tool_calls"])
        assert message["tool_calls"] or choice in ("auto", "none")
        for call in message["tool_calls"]:
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            assert choice != "none" and name in ("get_weather", "now", "put")
            if name == "get_weather":
                assert {"city", "sure"} <= arguments.keys() <= set(ORDER)
                assert [key for key in ORDER if key in arguments] == list(arguments)
                assert all(isinstance(arguments[key], kind) for key, kind in TYPES.items() if key in arguments)
                assert arguments.get("unit", 3) in ('"C"\n\\', "", 3, None)
                assert "lat" in arguments.get("place", {"lat": 0})
            elif name == "now":
                assert arguments == {} and choice in ("auto", "required")
    assert ended > 50 and unread < ended / 2 and (called > 5) == (choice != "none"), (ended, unread, called)


@pytest.mark.parametrize(
    ("choice", "text", "kept"),
    [
        ("auto", "\n<tool_call>weather\n", "\n<tool_call>"),
        ("auto", "\n<tool_call>get_weather\n</tool_call>", "\n<tool_call>get_weather\n"),
        ("auto", "\n<tool_call>now\n<arg_key>", "\n<tool_call>now\n"),
        ("auto", "\n<tool_call>put\n<arg_key>n</arg_key>\n<arg_value>x", "\n<tool_call>put\n<arg_key>n</arg_key>\n<arg_value>"),
        ("auto", "\n<tool_call>now\n</tool_call><|user|>", "\n<tool_call>now\n</tool_call>"),
        ("auto", "Hi<|observation|>", "Hi"),
        ("auto", "Hi</think>", "Hi"),
        ("required", "Hi", ""),
        ("required", "<|user|>", ""),
        ("none", "Hi\n<tool_call>", "Hi\n"),
        ({"name": "now"}, "\n<tool_call>get", "\n<tool_call>"),
        ({"name": "now"}, "\n<tool_call>now\n</tool_call>\n", "\n<tool_call>now\n</tool_call>"),
    ],
)
def test_the_grammar_stops_a_call_that_no_tool_takes(tokenizer, compiler, choice, text, kept):
    ids = tokenizer.encode(text, allow_special=True)
    place = refused_at(tokenizer, compiler, tool_grammar(TOOLS, choice), ids)
    assert place is not None
    assert tokenizer.decode(ids[:place]) == kept


def test_names_of_tags_in_text_never_open_or_close_anything(tokenizer, compiler):
    """Spelt out in ordinary tokens they would deceive a reader of the text, so the last of them is not allowed."""
    grammar = tool_grammar(TOOLS)
    head = tokenizer.encode("\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>", allow_special=True)
    for before, tag in [([], "<tool_call>"), (head, "</arg_value>")]:
        ids = tokenizer.encode("x" + tag)
        assert refused_at(tokenizer, compiler, grammar, before + ids) == len(before) + len(ids) - 1
        assert refused_at(tokenizer, compiler, grammar, before + tokenizer.encode("x" + tag.replace("<", "<\\"))) is None


def test_one_call_only_where_calls_may_not_be_parallel(tokenizer, compiler):
    ids = turn_ids(tokenizer, None, "", [("now", {}), ("now", {})])
    assert refused_at(tokenizer, compiler, tool_grammar(TOOLS, "auto", False), ids) is None
    one = tool_grammar(TOOLS, "auto", False, parallel_calls=False)
    assert tokenizer.decode(ids[: refused_at(tokenizer, compiler, one, ids)]) == "\n<tool_call>now\n</tool_call>"


def test_the_mode_says_whether_the_model_may_think(tokenizer, compiler):
    ids = turn_ids(tokenizer, "hm", "Hi", [])
    for mode in (True, None):
        assert refused_at(tokenizer, compiler, tool_grammar(TOOLS, "none", mode), ids) is None
    assert refused_at(tokenizer, compiler, tool_grammar(TOOLS, "none", False), ids) == ids.index(
        tokenizer.special_ids["<think>"]
    )

    unthinking = tokenizer.encode("\nHi<|user|>", allow_special=True)
    assert refused_at(tokenizer, compiler, tool_grammar(TOOLS, "none", True), unthinking) == 1
    assert refused_at(tokenizer, compiler, tool_grammar(TOOLS, "none", None), unthinking) is None


def test_no_tools_no_grammar_and_unknown_choices_are_refused():
    assert tool_grammar(None) is tool_grammar([], "none") is None
    for tools, choice, found in [
        ([], "required", "there are no tools"),
        (TOOLS, {"name": "nope"}, "wanted one of ['get_weather', 'now', 'put']"),
        (TOOLS, "any", "'any'"),
        (TOOLS, {"type": "function"}, "wanted"),
        (TOOLS, None, "None"),
    ]:
        with pytest.raises(ChatError) as caught:
            tool_grammar(tools, choice)
        assert found in str(caught.value) and caught.value.key == "tool_choice"


def test_a_grammar_is_text_that_says_the_same_tools_the_same_way():
    assert tool_grammar(TOOLS) == tool_grammar(json.loads(json.dumps(TOOLS)))
