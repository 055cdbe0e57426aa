"""Conversations to learn from: masks, shares, packing, and the samples that are refused."""

import json
from functools import cache
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import MODEL

from minglm.chat import MODES, render
from minglm.config import ConfigError
from minglm.data.packing import IGNORED, PADDING
from minglm.model import GLM
from minglm.posttrain.lint import LintError, Sample, lint, read_samples, violation
from minglm.posttrain.recipe import Conversations
from minglm.posttrain.sft_data import (
    Conversation,
    DataRefused,
    PackedConversations,
    deal,
    held_out_census,
    training_census,
)
from minglm.tasks.task import TRAIN
from minglm.tokenizer import Tokenizer, train_tokenizer

LAW = settings(max_examples=60, derandomize=True, deadline=None)
FEW = settings(LAW, max_examples=15)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris", "days": 3}'}}


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the weather in Paris is fine. 3 + 4 = 7. So it is."] * 3, 300, show_progress=False)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def result(text: str, **more) -> dict:
    return {"role": "tool", "content": text, **more}


# --------------------------------------------------------------------------------------------------------------- masks

words = st.text("abc .3\n<>/", min_size=1, max_size=12).map(str.strip).filter(bool)


@st.composite
def conversations(draw) -> tuple[list[dict], list[tuple[str, bool]], bool | None]:
    """Messages, the text that they become in stretches with whose each is, written down as the conversation is made, and the
    mode. Whose: True is the model's own."""
    thinking = draw(st.sampled_from([True, False, None]))
    messages, spans = [], [("[gMASK]<sop>", False)]
    rounds = draw(st.integers(1, 3))
    ends_before = False  # whether the mark that comes next ends a turn of the model's
    if draw(st.booleans()):
        text = draw(words)
        messages.append({"role": "system", "content": text})
        spans.append(("<|system|>\n" + text, False))
    for number in range(rounds):
        is_last = number == rounds - 1
        text = draw(words)
        messages.append(user(text))
        nothink = "/nothink" if thinking is False else ""
        spans += [("<|user|>", ends_before), (f"\n{text}{nothink}", False)]
        calls_before = draw(st.integers(0, 2))
        for turn in range(calls_before + 1):
            reasoning = "" if thinking is False else draw(words)
            content = draw(words) if turn == calls_before else draw(st.just("") | words)
            message = assistant(content, reasoning_content=reasoning) if reasoning else assistant(content)
            kept = reasoning if is_last else ""
            dropped = bool(reasoning) and not is_last
            spans += [("<|assistant|>", False), (f"\n<think>{kept}</think>", thinking is not False and not dropped)]
            spans.append((f"\n{content}" if content else "", True))
            if turn < calls_before:
                city, answer = draw(words), draw(words)
                function = {"name": "weather", "arguments": {"city": city}}
                message["tool_calls"] = [{"type": "function", "function": function}]
                call = f"\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>{city}</arg_value>\n</tool_call>"
                spans += [(call, True), ("<|observation|>", True)]
                spans.append((f"\n<tool_response>\n{answer}\n</tool_response>", False))
                messages += [message, result(answer)]
            else:
                messages.append(message)
        ends_before = True
    spans.append(("<|user|>", True))
    return messages, spans, thinking


def tools_of(messages: list[dict]) -> tuple:
    return (WEATHER,) if any(message["role"] == "tool" for message in messages) else ()


@LAW
@given(conversations())
def test_masks_are_what_a_recomputation_character_by_character_gives(conversation):
    messages, spans, thinking = conversation
    tools = tools_of(messages)
    text = render(messages, tools or None, thinking) + "<|user|>"
    if tools:
        head = render([], tools)
        spans = [(head, False), *spans[1:]]
    assert "".join(span for span, _ in spans) == text
    whose = [own for span, own in spans for _ in span.encode()]

    rendered = lint(Sample(messages, "here", tools, thinking), tokenizer(), 10**6)
    place = 0
    for id, own in zip(rendered.ids, rendered.assistant_mask, strict=True):
        length = len(tokenizer().decode_bytes([id]))
        assert set(whose[place : place + length]) == {own}
        place += length
    assert place == len(whose)


@LAW
@given(conversations())
def test_labels_are_the_model_s_own_tokens_one_place_earlier(conversation):
    messages, _, thinking = conversation
    rendered = lint(Sample(messages, "here", tools_of(messages), thinking), tokenizer(), 10**6)
    ids, mask = np.array(rendered.ids), np.array(rendered.assistant_mask)
    (batch,) = PackedConversations([Conversation(ids, mask, "", "")], len(ids) + 3, 0, 0).batches(1)
    labels = batch.labels[0].numpy()
    learnt = np.flatnonzero(labels != IGNORED)
    assert (labels[learnt] == ids[learnt + 1]).all() and (learnt + 1 == np.flatnonzero(mask)).all()


def test_the_empty_thinking_of_non_thinking_mode_is_not_learnt_and_that_of_automatic_mode_is():
    messages = [user("2 + 2?"), assistant("4")]
    close = tokenizer().special_ids["</think>"]
    for thinking, wanted in ((False, False), (None, True)):
        rendered = lint(Sample(messages, "here", (), thinking), tokenizer(), 100)
        assert rendered.assistant_mask[rendered.ids.index(close)] is wanted
        assert rendered.assistant_mask[-1] and rendered.ids[-1] == tokenizer().special_ids["<|user|>"]


# ------------------------------------------------------------------------------------------------------------- packing


@st.composite
def token_lists(draw) -> list[Conversation]:
    seed, lengths = draw(st.integers(0, 2**32)), draw(st.lists(st.integers(2, 16), min_size=1, max_size=8))
    rng = np.random.default_rng(seed)
    made = [(rng.integers(0, MODEL.vocab_size, n), rng.random(n) < 0.6) for n in lengths]
    return [Conversation(ids, np.append(mask[:-1], True), "", "") for ids, mask in made]  # none without a target


@LAW
@given(token_lists(), st.integers(16, 40), st.integers(0, 5))
def test_every_conversation_is_whole_in_one_row_once_an_epoch(made, length, epoch):
    packed = PackedConversations(made, length, seed=3, padding_id=0)
    rows = packed.rows(epoch, np.arange(packed.rows_per_epoch))
    found = []
    for ids, documents in zip(rows.input_ids, rows.document_ids, strict=True):
        assert (np.diff(documents[documents != PADDING]) >= 0).all()
        found += [tuple(ids[documents == number]) for number in range(documents.max() + 1)]
        assert (ids[documents == PADDING] == 0).all()
    assert sorted(found) == sorted(tuple(one.ids) for one in made)
    assert (rows.labels[rows.document_ids == PADDING] == IGNORED).all()
    again = PackedConversations(made, length, seed=3, padding_id=0)
    assert again.fingerprint == packed.fingerprint
    assert all((a == b).all() for a, b in zip(rows, again.rows(epoch, np.arange(again.rows_per_epoch)), strict=True))


@cache
def small_model() -> GLM:
    torch.manual_seed(0)
    return GLM(MODEL).eval()


@FEW
@given(token_lists(), st.integers(16, 40))
def test_the_loss_of_packed_rows_is_the_token_weighted_sum_of_the_conversations_alone(made, length):
    model = small_model()
    (batch,) = PackedConversations(made, length, 0, 0).batches(8)
    with torch.no_grad():
        loss, counts = model.loss(*_tensors(batch)), model.count_targets(batch.labels, batch.document_ids)
        found = torch.stack([loss.lm * counts.lm, loss.mtp * counts.mtp])
        wanted = torch.zeros(2)
        for one in made:
            (alone,) = PackedConversations([one], len(one.ids), 0, 0).batches(1)
            loss, counts = model.loss(*_tensors(alone)), model.count_targets(alone.labels)
            wanted += torch.stack([loss.lm * counts.lm, loss.mtp * counts.mtp])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def _tensors(batch) -> tuple[torch.Tensor, ...]:
    return batch.input_ids, batch.labels, batch.document_ids


def test_a_conversation_longer_than_a_row_is_refused():
    one = Conversation(np.arange(9), np.ones(9, bool), "", "")
    with pytest.raises(ValueError, match="longest has 9 tokens; wanted some, of at most sequence_length = 8"):
        PackedConversations([one], 8, 0, 0)


def test_a_state_of_other_conversations_is_refused():
    packed = [PackedConversations([Conversation(np.arange(n), np.ones(n, bool), "", "")], 8, 0, 0) for n in (5, 6)]
    with pytest.raises(ValueError, match="another data stream: conversations: found"):
        packed[1].stream().load_state_dict(packed[0].stream().state_dict())


# -------------------------------------------------------------------------------------------------------------- shares

weights = st.integers(0, 7).map(lambda n: n / 4)


@FEW
@given(weights, weights, weights, st.integers(1, 80), st.integers(0, 3), st.sampled_from((1, 3)))
def test_shares_of_modes_and_of_families_in_them_hold_after_any_number_of_samples(
    thinking, non_thinking, automatic, n, seed, often
):
    if not thinking + non_thinking + automatic:
        thinking = 1.0
    families = {"families": ("weekdays", "clock"), "easy_families": ("translation",), "family_weights": {"clock": often}}
    recipe = Conversations(n, thinking, non_thinking, automatic, levels=1, **families)
    dealt = list(islice(deal(recipe, TRAIN, {}, tokenizer(), 10**6, seed), n))
    total = sum(recipe.weights.values())
    for mode, weight in recipe.weights.items():
        own = [one.source for one in dealt if one.mode == mode]
        assert abs(len(own) - n * weight / total) < 1
        two, three = 1 + often, 2 + often
        wanted = {
            "thinking": (1 / two, often / two, 0),
            "non-thinking": (1 / three, often / three, 1 / three),
            "automatic": (1 / two / 2, often / two / 2, 1 / 2),
        }[mode]
        for name, share in zip(("weekdays", "clock", "translation"), wanted, strict=True):
            assert abs(own.count(name) - share * len(own)) < 1


def test_a_family_may_have_difficulties_of_its_own():
    def shown(**changes: object) -> dict[str, list[list[int]]]:
        recipe = Conversations(30, 1, 0, 0, families=("weekdays", "arithmetic"), **changes)
        dealt = list(islice(deal(recipe, TRAIN, {}, tokenizer(), 10**6, 1), 30))
        return {name: [one.ids.tolist() for one in dealt if one.source == name] for name in recipe.families}

    easy, hard, mixed = shown(levels=1), shown(levels=3), shown(levels=1, family_levels={"arithmetic": 3})
    assert mixed == {"weekdays": easy["weekdays"], "arithmetic": hard["arithmetic"]} != easy
    assert easy["weekdays"] != hard["weekdays"]


def test_in_automatic_samples_families_think_and_easy_ones_do_not():
    recipe = Conversations(20, 0, 0, 1, families=("weekdays",), easy_families=("translation",), levels=1)
    empty = [tokenizer().special_ids["<think>"], tokenizer().special_ids["</think>"]]
    for one in islice(deal(recipe, TRAIN, {}, tokenizer(), 10**6, 1), 20):
        ids = one.ids.tolist()
        start = ids.index(empty[0])
        assert (ids[start : start + 2] == empty) == (one.source == "translation")
        assert one.mask[start] and one.mask[start + 1]


def test_the_prompt_may_open_the_thinking_of_thinking_samples_alone():
    def shown(**changes: object) -> list:
        recipe = Conversations(30, 1, 1, 1, families=("weekdays",), easy_families=("translation",), levels=1, **changes)
        return list(islice(deal(recipe, TRAIN, {}, tokenizer(), 10**6, 1), 30))

    think = tokenizer().special_ids["<think>"]
    for plain, opened in zip(shown(), shown(opens_thinking=True), strict=True):
        assert plain.ids.tolist() == opened.ids.tolist() and plain.mode == opened.mode
        (place,) = np.flatnonzero(plain.ids == think)
        assert plain.mask[place] == (plain.mode != "non-thinking")
        changed = np.flatnonzero(plain.mask != opened.mask).tolist()
        assert changed == ([place - 1, place, place + 1] if plain.mode == "thinking" else [])


def test_the_same_seed_gives_the_same_samples_and_another_one_others():
    recipe = Conversations(12, families=("arithmetic",))
    first, again, other = (
        [one.ids.tolist() for one in training_census(recipe, tokenizer(), 10**6, seed).conversations] for seed in (1, 1, 2)
    )
    assert first == again != other


def write(path, *lines: object):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def line(question: str, thinking: bool | None) -> dict:
    answer = {"reasoning_content": "Easy."} if thinking else {}
    return {"messages": [user(question), assistant("Fine.", **answer)], "thinking": thinking}


def test_files_fill_their_share_of_each_mode_that_they_have_and_come_round_again(tmp_path):
    path = write(tmp_path / "own.jsonl", line("a", True), "", line("b", True), line("c", False))
    recipe = Conversations(40, 1, 1, 2, families=("weekdays",), files=(path,), file_share=0.25, levels=1)
    census = training_census(recipe, tokenizer(), 1000, 1)
    counts = {(mode, name): 0 for mode in MODES for name in ("own.jsonl", "weekdays")}
    for one in census.conversations:
        counts[one.mode, one.source] += 1
    files = [counts[mode, "own.jsonl"] for mode in MODES]
    assert sum(counts.values()) == 40 and files[0] in (2, 3) and files[1] in (2, 3) and files[2] == 0
    assert counts["automatic", "weekdays"] == 20  # the file has no automatic samples, so the family makes all
    assert not census.faults


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(families=("weekdays",), family_weights={"clock": 2}), "family_weights = .*'clock'.*names that are in families"),
        (dict(families=("weekdays",), family_levels={"clock": 2}), "family_levels = .*'clock'.*names that are in families"),
        (dict(families=("weekdays",), family_levels={"weekdays": -1}), "family_levels.weekdays = -1: wanted 0 or more"),
        (dict(families=("weekdays",), family_weights={"weekdays": 0}), "family_weights.weekdays = 0: wanted above 0"),
        (dict(families=("weekdays",), easy_families=("weekdays",)), "easy_families = .*'weekdays'.*not among families"),
        (dict(), "families = .*: wanted some families or files"),
        (dict(files=("own.jsonl",)), "held_out_files = .*no families to hold problems out from"),
        (dict(families=("weekdays",), thinking=0, non_thinking=0), "a mode with a weight above 0"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Conversations(10, **changes)


def test_a_mode_that_nothing_fills_and_a_family_that_is_none_are_refused(tmp_path):
    path = write(tmp_path / "own.jsonl", line("a", True))
    with pytest.raises(ConfigError, match="conversations.non_thinking = 0.5: no train sample is of this mode"):
        training_census(Conversations(4, files=(path,), held_out_files=(path,)), tokenizer(), 1000, 1)
    with pytest.raises(ConfigError, match="found 'weekday'; wanted some of arithmetic"):
        training_census(Conversations(4, families=("weekday",)), tokenizer(), 1000, 1)


def test_held_out_samples_are_always_the_same_and_as_many_as_hold_the_tokens():
    recipe = Conversations(4, families=("arithmetic",))
    first, again = (held_out_census(recipe, tokenizer(), 1000, 500).conversations for _ in range(2))
    assert [one.ids.tolist() for one in first] == [one.ids.tolist() for one in again]
    total = sum(len(one.ids) for one in first)
    assert 500 <= total < 500 + len(first[-1].ids)
    trained = training_census(Conversations(200, families=("arithmetic",)), tokenizer(), 1000, 0).conversations
    assert not {tuple(one.ids) for one in first} & {tuple(one.ids) for one in trained}


# -------------------------------------------------------------------------------------------------------------- linter

GOOD = [
    user("Rain in Paris?"),
    assistant("", tool_calls=[CALL]),
    result("rain", tool_call_id="a"),
    assistant("Yes."),
    user("Thanks"),
    assistant("You are welcome."),
]


def calling(**function) -> list[dict]:
    call = {"type": "function", "function": {**CALL["function"], **function}}
    return [user("a"), assistant("", tool_calls=[call])]


FAULTY = [
    ("role", [user("a"), {"role": "robot", "content": "b"}], {}, "messages[1] has the role 'robot'"),
    ("empty mask", [user("a")], {}, "there is no message of the assistant"),
    ("empty mask", [], {}, "there is no message of the assistant"),
    ("no answer", [user("a"), assistant("b"), user("c")], {}, "the last message is the user's"),
    ("cut answer", [user("a"), assistant("b"), assistant("c")], {}, "messages[1] is followed by the assistant's"),
    ("cut answer", [user("a"), assistant("b"), {"role": "system", "content": "c"}, user("d"), assistant("e")], {}, "system's"),
    ("cut answer", [user("a"), assistant("", reasoning_content="b")], {}, "neither content nor calls"),
    ("cut answer", [user("a"), assistant("<think>b")], {}, "opens <think> and never closes it"),
    ("cut answer", [user("a"), assistant("b", finish_reason="length")], {}, 'finish_reason "length"'),
    ("doubled mark", [user("a"), assistant("b<|user|>")], {}, "messages[1].content holds '<|user|>' at character 1"),
    ("doubled mark", [user("a<|assistant|>"), assistant("b")], {}, "messages[0].content holds"),
    ("doubled mark", [user("a"), assistant("b", reasoning_content="c</think>")], {}, "reasoning_content holds '</think>'"),
    ("doubled mark", [user("a"), assistant("<think>b</think>c</think>d")], {}, "holds '</think>'"),
    ("doubled mark", calling(arguments={"city": "<tool_call>"}), {}, "tool_calls[0].function.arguments holds '<tool_call>'"),
    ("orphan result", [user("a"), result("b"), assistant("c")], {}, "messages[1] is a tool's result"),
    ("orphan result", [*GOOD[:3], result("b"), assistant("c")], {}, "messages[3] is a tool's result"),
    ("orphan result", [*GOOD[:2], result("b", tool_call_id="z"), assistant("c")], {}, "answers the call 'z'"),
    ("unanswered call", [*GOOD[:2], assistant("c")], {}, "while 1 calls before it have no result"),
    ("arguments", calling(arguments="{city"), {}, "are not JSON"),
    ("arguments", calling(arguments="{}"), {}, "'city' is a required property"),
    ("arguments", calling(arguments={"city": 3}), {}, "arguments.city: 3 is not of type 'string'"),
    ("arguments", calling(arguments={"city": "a", "days": True}), {}, "True is not of type 'integer'"),
    ("arguments", calling(arguments={"city": "a", "unit": "K"}), {}, "'K' is not one of ['C', 'F']"),
    ("arguments", calling(arguments={"city": "a", "town": "b"}), {}, "'town' was unexpected"),
    ("arguments", calling(name="wether"), {}, "calls 'wether'; wanted one of the tools: weather"),
    ("arguments", calling(name=["weather"]), {}, "calls ['weather']; wanted one of the tools: weather"),
    ("mode", [user("a"), assistant("b")], {"thinking": True}, "no message after the last user's thinks"),
    ("mode", [user("a"), assistant("b", reasoning_content="c")], {"thinking": False}, "messages[1] thinks"),
    ("format", [user(3), assistant("b")], {}, "messages[0].content"),
    ("format", [user("a"), assistant("b")], {"tools": [{"type": "function"}]}, "tools[0]"),
    ("too long", [user("a " * 900), assistant("b")], {}, "wanted at most a row's 1500: none is ever cut"),
    ("json", "not json", {}, ""),
    ("json", {"conversation": []}, {}, 'wanted an object with "messages"'),
    ("json", [user("a"), assistant("b")], {"thinking": "yes"}, "wanted true, false or null"),
]


@pytest.mark.parametrize("fault, messages, more, reason", FAULTY)
def test_each_fault_is_refused_with_file_line_sample_and_reason(tmp_path, fault, messages, more, reason):
    faulty = {"messages": messages, "tools": [WEATHER], **more} if isinstance(messages, list) else messages
    good = {"messages": GOOD, "tools": [WEATHER]}
    path = write(tmp_path / "own.jsonl", good, "", faulty, good)
    recipe = Conversations(1, 0, 0, 1, files=(path,), held_out_files=(path,))
    census = training_census(recipe, tokenizer(), 1500, 1)
    (error,) = census.faults
    assert error.fault == fault and f"{path}, line 3, sample 2" in str(error) and reason in error.reason
    with pytest.raises(DataRefused, match="1 samples are refused"):
        census.refuse_faults()
    assert fault in census.table()


def test_what_is_right_is_not_refused(tmp_path):
    parts = [{"type": "text", "text": "a"}]
    both = [user("a"), assistant("", tool_calls=[{**CALL, "id": "1"}, {**CALL, "id": "2"}])]
    right = [
        {"messages": GOOD, "tools": [WEATHER]},
        {"messages": GOOD[:2], "tools": [WEATHER]},
        {"messages": [*both, result("y", tool_call_id="2"), result("x", tool_call_id="1"), assistant("b")], "tools": [WEATHER]},
        {"messages": [*both, result(["y", "x"]), assistant("b")], "tools": [WEATHER]},
        {"messages": [{"role": "system", "content": "s"}, user(parts), assistant("<think>c</think>b")], "thinking": True},
        {"messages": [user("a/nothink"), assistant("b")], "thinking": False},
        {"messages": [user("a"), assistant("1 < 2 > 0")], "other": 1},
    ]
    samples = list(read_samples(write(tmp_path / "own.jsonl", *right)))
    assert len(samples) == len(right)
    for sample in samples:
        lint(sample, tokenizer(), 1000)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1, max_size=2), inner, max_size=3),
    max_leaves=8,
)


def schema_of(value) -> dict:
    """The narrowest schema of the kind that tools have."""
    if isinstance(value, dict):
        return {"type": "object", "properties": {k: schema_of(v) for k, v in value.items()}, "required": list(value)}
    if isinstance(value, list):
        return {"type": "array", "items": {"anyOf": [schema_of(item) for item in value]} if value else {}}
    kinds = {bool: "boolean", int: "integer", str: "string", type(None): "null"}
    return {"type": kinds[type(value)], "enum": [value]}


@LAW
@given(json_values, json_values)
def test_a_value_is_as_its_own_schema_says_and_another_one_only_if_it_has_the_same(value, other):
    def fault(it, schema):
        return violation({"it": it}, {"properties": {"it": schema}})

    schema = schema_of(value)
    assert fault(value, schema) is None
    if isinstance(value, str | int | None) and other is not value and (other != value or type(other) is not type(value)):
        assert fault(other, schema) is not None
    root = {"$defs": {"one": schema}, "properties": {"x": {"$ref": "#/$defs/one"}}}
    assert violation({"x": value}, root) is None
    assert "'y' was unexpected" in violation({"y": value}, root)
    assert violation({"y": value}, {**root, "additionalProperties": True}) is None


SCHEMAS = [  # schema of an argument; what is as it says; what is not
    ({"type": "string", "nullable": True}, [None, "a"], [1]),
    ({"enum": ["a"], "nullable": True}, [None, "a"], ["b"]),
    ({"type": "integer", "minimum": 2}, [2, 3.0], [1, 2.5, True]),
    ({"type": "array", "items": {"type": "string"}, "maxItems": 2}, [["a"]], [["a"] * 3, [1], "a"]),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, [None, "a"], [1]),
    ({"type": "string", "pattern": "^a+$"}, ["aa"], ["b"]),
    ({"properties": {"a": {}}}, [{"a": 1}, {}], [{"b": 1}]),
    ({"properties": {"a": {}}, "patternProperties": {"^x": {}}}, [{"x1": 1}], [{"b": 1}]),
    ({"properties": {"a": {}}, "additionalProperties": {"type": "string"}}, [{"b": "c"}], [{"b": 1}]),
    ({"const": 1}, [1], [True, 2]),
]


@pytest.mark.parametrize("schema, right, wrong", SCHEMAS)
def test_arguments_are_held_to_every_keyword_of_the_schema(schema, right, wrong):
    parameters = {"type": "object", "properties": {"x": schema}}
    assert [one for one in right if violation({"x": one}, parameters)] == []
    assert [one for one in wrong if not violation({"x": one}, parameters)] == []


@pytest.mark.parametrize(
    "schema", [{"type": "strng"}, {"$ref": "#/$defs/none"}, {"$ref": "https://example.org/s.json"}, {"pattern": "("}]
)
def test_a_schema_that_cannot_be_followed_is_said_to_be_one_and_nothing_is_fetched(schema):
    parameters = {"type": "object", "properties": {"x": {"properties": {"y": schema}}}}
    assert "the tool's schema cannot be followed" in violation({"x": {"y": "z"}}, parameters)


def test_an_error_of_the_linter_says_where():
    with pytest.raises(LintError, match="there, sample 7: no answer: the last message is the user's"):
        lint(Sample([user("a"), assistant("b"), user("c")], "there, sample 7"), tokenizer(), 100)


def test_a_thinking_that_the_prompt_opens_is_not_learnt(tmp_path):
    """All else of the sample is: the same ids, and a mask that lacks the mark, the line break before it, and the token after
    it, in whose place the automatic mode decides."""
    line = {
        "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "reasoning_content": "two", "content": "4"}]
    }
    path = tmp_path / "own.jsonl"
    lines = [{**line, "thinking": True}, {**line, "thinking": True, "opens_thinking": True}]
    lines += [{**line, "thinking": None, "opens_thinking": True}]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    plain, opened, refused = read_samples(path)
    assert refused.fault == "json" and "opens_thinking" in refused.reason
    tokenizer = train_tokenizer(["2+2? two 4"] * 3, 300, show_progress=False)
    first, second = (lint(sample, tokenizer, 100) for sample in (plain, opened))
    assert first.ids == second.ids
    learnt = list(zip(first.ids, first.assistant_mask, second.assistant_mask, strict=True))
    thought = tokenizer.encode("two")[0]
    assert [tokenizer.decode([id]) for id, plain, opened in learnt if plain and not opened] == [
        "\n",
        "<think>",
        tokenizer.decode([thought]),
    ]
    assert not any(opened and not plain for _, plain, opened in learnt)
