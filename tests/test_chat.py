"""The template: the published one's bytes, the ids, and which of them are the model's own."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from minglm.chat import MODES, ChatError, parse, render, render_tokens, tool_grammar
from minglm.tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, train_tokenizer

# The published template's semantics in Jinja, rendered by transformers.
TEMPLATE = CHAT_TEMPLATE.read_text(encoding="utf-8")

WORDS = ["", " ", "\n", "\n\n", "a", "Hi there", "é", "数", "🙂", "\x85", "\u2028", "\t", "0", "{", '"', "\\", "<", "</", "|>"]
TAGS = [*SPECIAL_TOKENS, "<tools>", "</tools>"]
CLOSERS = re.compile(r"<\\*/arg_(key|value)>")

texts = st.one_of(st.text(max_size=12), st.lists(st.sampled_from(WORDS + TAGS), max_size=6).map("".join))
tagless_texts = st.lists(st.sampled_from(WORDS) | st.text("abc xyz\n12", max_size=8), max_size=5).map("".join)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
names = st.from_regex(r"[a-z_][a-z0-9_.\-]{0,12}", fullmatch=True) | st.sampled_from(["wetter_für_morgen", "天气"])


def free_of_closers(value: object) -> bool:
    return not CLOSERS.search(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


arguments = st.dictionaries(texts.filter(free_of_closers), json_values.filter(free_of_closers), max_size=3)


def parts(text: st.SearchStrategy[str]) -> st.SearchStrategy:
    return text | st.lists(text | text.map(lambda t: {"type": "text", "text": t}), max_size=3)


@st.composite
def calls(draw: st.DrawFn) -> dict:
    found = draw(arguments)
    function = {"name": draw(names), "arguments": json.dumps(found) if draw(st.booleans()) else found}
    return draw(st.sampled_from([function, {"type": "function", "id": "call_1", "function": function}]))


def messages_of(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict]:
    results = st.lists(text | text.map(lambda t: {"output": t}) | text.map(lambda t: {"type": "text", "text": t}), max_size=3)
    thought = st.builds("{}<think>{}</think>{}".format, text, text, text)
    return st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": parts(text)}),
        st.fixed_dictionaries({"role": st.just("user"), "content": text.map(lambda t: t + "/nothink")}),
        st.fixed_dictionaries(
            {"role": st.just("assistant"), "content": parts(text) | thought},
            optional={"reasoning_content": text | st.none(), "tool_calls": st.none() | st.lists(calls(), max_size=3)},
        ),
        st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": st.lists(calls(), min_size=1, max_size=2)}),
        st.fixed_dictionaries({"role": st.just("tool"), "content": text | results}),
    )


tools_lists = st.none() | st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.dictionaries(texts, json_values, max_size=3)}),
    max_size=2,
)
modes = st.sampled_from([None, True, False])


def reference(messages: list[dict], tools: list | None, enable_thinking: bool | None, add_generation_prompt: bool) -> str:
    """What transformers makes of the published template. It wants arguments as mappings, and the mode only if given."""
    mode = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for call in message.get("tool_calls") or []:
            function = call.get("function", call)
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"])
    rendered, _ = render_jinja_template(
        [messages], tools=tools, chat_template=TEMPLATE, add_generation_prompt=add_generation_prompt, **mode
    )
    return rendered[0]


@settings(max_examples=400)
@given(st.lists(messages_of(texts), max_size=6), tools_lists, modes, st.booleans())
@example([{"role": "assistant", "content": "<think>a\n</think>b</think>\n\nc"}], None, None, False)
@example([{"role": "tool", "content": [{"output": None}, 5, True, None]}, {"role": "tool", "content": "x"}], [], False, True)
def test_render_writes_the_bytes_of_the_published_template(messages, tools, enable_thinking, add_generation_prompt):
    rendered = render(messages, tools, enable_thinking, add_generation_prompt)
    assert rendered == reference(messages, tools, enable_thinking, add_generation_prompt)


@given(
    st.lists(messages_of(texts), max_size=4), st.lists(st.sampled_from([r"</arg_value>", r"<\/arg_value>", "x"]), min_size=1)
)
def test_a_value_that_holds_its_closing_tag_gets_a_backslash_and_nothing_else_changes(messages, pieces):
    def turn(value: str) -> dict:
        return {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": value}}]}

    value = "".join(pieces)
    escaped = "".join(piece.replace("<", "<\\") for piece in pieces)
    assert render([*messages, turn(value)]) == reference([*messages, turn(escaped)], None, None, False)


def test_a_conversation_spelt_out():
    tools = [{"type": "function", "function": {"name": "wetter", "parameters": {"type": "object", "properties": {}}}}]
    messages = [
        {"role": "system", "content": "Kurz."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, "!"]},
        {"role": "assistant", "content": "old", "reasoning_content": "dropped"},
        {"role": "user", "content": "Wetter?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": " I must ask ",
            "tool_calls": [
                {"type": "function", "function": {"name": "wetter", "arguments": '{"ort": "Köln", "tage": [1, 2]}'}}
            ],
        },
        {"role": "tool", "content": "Regen"},
        {"role": "tool", "content": "Sonne"},
    ]
    assert render(messages, tools, add_generation_prompt=True) == (
        "[gMASK]<sop><|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "wetter", "parameters": {"type": "object", "properties": {}}}}\n'
        "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
        "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
        "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>"
        "<|system|>\nKurz.<|user|>\nHi!<|assistant|>\n<think></think>\nold<|user|>\nWetter?"
        "<|assistant|>\n<think>I must ask</think>\n<tool_call>wetter\n<arg_key>ort</arg_key>\n<arg_value>Köln</arg_value>\n"
        "<arg_key>tage</arg_key>\n<arg_value>[1, 2]</arg_value>\n</tool_call>"
        "<|observation|>\n<tool_response>\nRegen\n</tool_response>\n<tool_response>\nSonne\n</tool_response><|assistant|>"
    )
    kept = render(messages, tools, keep_reasoning=True)
    assert "<think>dropped</think>\nold<|user|>" in kept


def test_the_three_modes():
    messages = [{"role": "user", "content": "Hi"}]
    prompts = {name: render(messages, None, mode, add_generation_prompt=True) for name, mode in MODES.items()}
    assert prompts["thinking"] == prompts["automatic"] == "[gMASK]<sop><|user|>\nHi<|assistant|>"
    assert prompts["non-thinking"] == "[gMASK]<sop><|user|>\nHi/nothink<|assistant|>\n<think></think>"


@given(messages_of(texts).filter(lambda message: message["role"] == "assistant"))
def test_no_content_is_empty_content_never_the_word_none(message):
    turn = {**message, "reasoning_content": "r"}
    assert render([{**turn, "content": None}]) == render([{**turn, "content": ""}])


# -------------------------------------------------------------------------------------------------------- ids and masks


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The user asks for the weather in Paris. You may call functions. {arg-key-1} a b c"] * 9, 340,
                           show_progress=False)  # fmt: skip


def holds_mark(messages: object) -> bool:
    text = json.dumps(messages, ensure_ascii=False)
    return any(name in text for name in SPECIAL_TOKENS)


@settings(max_examples=200)
@given(st.lists(messages_of(tagless_texts), max_size=5), modes, st.booleans())
def test_ids_are_those_of_the_whole_text_where_no_text_names_a_mark(tokenizer, messages, enable_thinking, prompt):
    messages = [
        {**m, "content": m["content"].replace("/nothink", "").replace("<think>", "").replace("</think>", "")}
        if isinstance(m.get("content"), str)
        else m
        for m in messages
    ]
    if holds_mark(messages):
        return
    tools = [{"type": "function", "function": {"name": "f"}}]
    rendered = render_tokens(tokenizer, messages, tools, enable_thinking, prompt)
    text = render(messages, tools, enable_thinking, prompt)
    assert rendered.ids == tokenizer.encode(text, allow_special=True)


@given(st.lists(messages_of(texts), max_size=5), tools_lists, modes, st.booleans(), st.booleans())
def test_ids_say_what_render_writes(tokenizer, messages, tools, enable_thinking, prompt, keep):
    rendered = render_tokens(tokenizer, messages, tools, enable_thinking, prompt, keep)
    assert tokenizer.decode(rendered.ids) == render(messages, tools, enable_thinking, prompt, keep)
    assert len(rendered.ids) == len(rendered.assistant_mask)


@given(texts, texts, texts, modes)
def test_nobody_s_text_becomes_a_control_token(tokenizer, user, answer, result, enable_thinking):
    messages = [
        {"role": "system", "content": user},
        {"role": "user", "content": user + "."},
        {"role": "assistant", "reasoning_content": answer, "content": answer,
         "tool_calls": [{"name": "f", "arguments": {user: answer}}]},
        {"role": "tool", "content": result},
    ]  # fmt: skip
    ids = render_tokens(tokenizer, messages, None, enable_thinking).ids
    marks = [id for id in ids if id in tokenizer.special_ids.values()]
    wanted = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]
    wanted += ["<tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>"]
    wanted += ["<|observation|>", "<tool_response>", "</tool_response>"]
    if enable_thinking is False:
        wanted.insert(4, "/nothink")
    assert marks == [tokenizer.special_ids[name] for name in wanted]


def test_nothink_typed_by_the_user_is_control_only_where_the_caller_asks_for_the_mode(tokenizer):
    messages = [{"role": "user", "content": "Hi/nothink"}]
    mark = tokenizer.special_ids["/nothink"]
    assert mark not in render_tokens(tokenizer, messages).ids
    assert render_tokens(tokenizer, messages, enable_thinking=False).ids.count(mark) == 1


@settings(max_examples=200)
@given(st.lists(messages_of(texts), max_size=6), modes)
def test_the_mask_is_what_follows_the_prompts_that_the_model_was_given(tokenizer, messages, enable_thinking):
    """Every turn is what the model sampled after its own prompt, so prompt and turn together are how the conversation
    begins; what lies behind the prompt, and the mark that ends the turn, are the model's own, nothing else."""
    if enable_thinking is False:  # no reasoning is sampled then
        messages = [{**m, "reasoning_content": ""} if m["role"] == "assistant" else m for m in messages]

    def ids(count: int, **options: bool) -> list[int]:
        return render_tokens(tokenizer, messages[:count], None, enable_thinking, keep_reasoning=True, **options).ids

    rendered = render_tokens(tokenizer, messages, None, enable_thinking, keep_reasoning=True, end_of_turn=True)
    wanted = [False] * len(rendered.ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, turn = ids(index, add_generation_prompt=True), ids(index + 1)
            assert rendered.ids[: len(prompt)] == prompt
            assert rendered.ids[: len(turn)] == turn
            is_last = index + 1 == len(messages)
            ends = is_last or messages[index + 1]["role"] in ("user", "tool")
            # A list of no results is the mark alone.
            wanted[len(prompt) : len(turn) + ends] = [True] * (len(turn) + ends - len(prompt))
    assert rendered.assistant_mask == wanted


def masked_text(tokenizer, messages: list[dict], **options: object) -> list[str]:
    """The stretches of the model's own text."""
    rendered = render_tokens(tokenizer, messages, **options)
    stretches, before = [], False
    for id, own in zip(rendered.ids, rendered.assistant_mask, strict=True):
        if own:
            if not before:
                stretches.append([])
            stretches[-1].append(id)
        before = own
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_the_mask_leaves_out_what_the_template_put_into_the_model_s_mouth(tokenizer):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "reasoning_content": "r", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "reasoning_content": "s", "content": "d"},
    ]
    dropped = ["\nb<|user|>", "\n<think>s</think>\nd<|user|>"]
    assert masked_text(tokenizer, messages, end_of_turn=True) == dropped
    kept = ["\n<think>r</think>\nb<|user|>", "\n<think>s</think>\nd"]
    assert masked_text(tokenizer, messages, keep_reasoning=True) == kept
    plain = [{key: value for key, value in message.items() if key != "reasoning_content"} for message in messages]
    assert masked_text(tokenizer, plain, enable_thinking=False, end_of_turn=True) == ["\nb<|user|>", "\nd<|user|>"]
    # Automatic: that it did not think was the model's choice.
    assert masked_text(tokenizer, plain) == ["\n<think></think>\nb<|user|>", "\n<think></think>\nd"]


def test_a_turn_that_calls_tools_ends_in_the_mark_of_their_results(tokenizer):
    calling = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    turn = "\n<think></think>\n<tool_call>f\n</tool_call><|observation|>"
    assert masked_text(tokenizer, [calling], end_of_turn=True) == [turn]
    assert masked_text(tokenizer, [calling, {"role": "tool", "content": "x"}]) == [turn]


def test_a_tokenizer_without_the_marks_is_refused():
    tokenizer = train_tokenizer(["text"] * 3, 300, specials=["<|endoftext|>"], show_progress=False)
    with pytest.raises(ChatError, match="no special token '\\[gMASK\\]'"):
        render_tokens(tokenizer, [{"role": "user", "content": "Hi"}])


# -------------------------------------------------------------------------------------------------------------- errors


def user(content: object) -> list[dict]:
    return [{"role": "system", "content": "s"}, {"role": "user", "content": content}]


def call(function: object) -> list[dict]:
    return [{"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": [function]}]


@pytest.mark.parametrize(
    ("messages", "key", "found"),
    [
        ("Hi", None, "messages is a str"),
        ([{"role": "user", "content": "u"}, "Hi"], None, "is a str"),
        ([{"role": "user", "content": "u"}, {"role": "developer", "content": "d"}], "role", "'developer'"),
        ([{"role": "user", "content": "u"}, {"content": "d"}], "role", "None"),
        (user(None), "content", "missing"),
        (user(5), "content", "a int: 5"),
        (user({"type": "text", "text": "x"}), "content", "a dict"),
        (user(["a", {"type": "image_url", "image_url": "x"}]), "content[1]", "reads text only"),
        (user([{"type": "text"}]), "content[0]", "'type': 'text'"),
        (user("a\ud800"), "content", "half a surrogate pair"),
        ([*user("u")[:1], {"role": "tool", "content": None}], "content", "missing"),
        ([*user("u")[:1], {"role": "assistant", "content": 1.5}], "content", "1.5"),
        ([*user("u")[:1], {"role": "assistant", "content": "", "reasoning_content": 5}], "reasoning_content", "a int: 5"),
        ([*user("u")[:1], {"role": "assistant", "content": "", "tool_calls": {"a": 1}}], "tool_calls", "a dict"),
        (call("f"), "tool_calls[0]", "a str"),
        (call({"function": "f"}), "tool_calls[0].function", "a str"),
        (call({"arguments": {}}), "tool_calls[0].function.name", "None"),
        (call({"name": "two words", "arguments": {}}), "tool_calls[0].function.name", "'two words'"),
        (call({"name": "f"}), "tool_calls[0].function.arguments", "missing"),
        (call({"name": "f", "arguments": ""}), "tool_calls[0].function.arguments", "not JSON"),
        (call({"name": "f", "arguments": "{'a': 1}"}), "tool_calls[0].function.arguments", "not JSON"),
        (call({"name": "f", "arguments": '{"a": NaN}'}), "tool_calls[0].function.arguments", "NaN"),
        (call({"name": "f", "arguments": '{"a": 1, "a": 2}'}), "tool_calls[0].function.arguments", "twice"),
        (call({"name": "f", "arguments": "[" * 100_000}), "tool_calls[0].function.arguments", "nested"),
        (call({"name": "f", "arguments": "[1]"}), "tool_calls[0].function.arguments", "a list"),
        (call({"name": "f", "arguments": {"a": object()}}), "tool_calls[0].function.arguments", "['a'] is not JSON"),
        (call({"name": "f", "arguments": {"a": float("inf")}}), "tool_calls[0].function.arguments", "['a'] is not JSON"),
        (call({"name": "f", "arguments": {5: "x"}}), "tool_calls[0].function.arguments", "the key 5"),
    ],
)
def test_what_cannot_be_written_is_refused_by_message_and_key(messages, key, found):
    with pytest.raises(ChatError) as caught:
        render(messages)
    assert found in str(caught.value)
    if key is not None:
        assert (caught.value.index, caught.value.key) == (1, key)
        assert f"messages[1].{key}" in str(caught.value)


def test_unfit_tools_and_modes_are_refused():
    for tools, found in [("f", "tools is a str"), (["f"], "tools[0] is a str"), ([{"a": {1, 2}}], "tools[0] is not JSON")]:
        with pytest.raises(ChatError, match=re.escape(found)):
            render([], tools)
    for mode in ("yes", 0, 1):
        with pytest.raises(ChatError, match="enable_thinking"):
            render([], enable_thinking=mode)
        with pytest.raises(ChatError, match="enable_thinking"):
            tool_grammar(None, enable_thinking=mode)


def test_parse_takes_a_turn_a_turn_with_its_mark_and_a_conversation():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "r", "content": "<|user|>"}]
    text = render(messages)
    wanted = {"role": "assistant", "reasoning_content": "r", "content": "<|user|>", "tool_calls": []}
    assert parse(text) == parse(text[text.index("<|assistant|>") :]) == parse("\n<think>r</think>\n<|user|>") == wanted
    with pytest.raises(ChatError, match="no <|assistant|>"):
        parse(render(messages[:1]))
