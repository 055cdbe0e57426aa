"""The tokenizer gives Hugging Face's ids at tiktoken's speed, loses no text, and lets no text act as control."""

import json
import pickle
import subprocess
import sys
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minglm.chat import render_tokens
from minglm.tokenizer import (
    BYTE_CHARACTERS,
    CONTENT_TAGS,
    END_OF_DOCUMENT,
    PATTERN,
    SPECIAL_TOKENS,
    Tokenizer,
    train_tokenizer,
)

ROOT = Path(__file__).parents[1]
TEXTS = [topics[name] for name in sorted(topics)]
TOKENIZER = train_tokenizer(TEXTS, 1200, show_progress=False)

FRAGMENTS = [
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c"),
    *("0", "7", "12", "345", "6789", "١٢٣٤", "½", "Ⅷ", "１２"),
    *("'s", "'S", "'t", "'re", "'RE", "'vE", "'m", "'ll", "'LL", "'d", "'", "’s", "'ſ", "'x"),
    *("the", " the", "print", "Import", "of", " a", "é", "ß", "naïve", "Straße", "İ", "ǅ"),
    *("!", "...", " //", "{}", "<", "|>", "</", "=", '"', "\\", "€"),
    *("😀", "👩\u200d👩\u200d👧", "🇩🇪", "☃\ufe0f", "你好", "世界，", "こんにちは", "한국어", "नमस्ते", "مرحبا", "שלום"),
    *("e\u0301", "\u0301", "a\u0308\u0323", "\u200b", "\ufeff", "\x00", "\x07", "\x7f", "\ufffd", "\U0010ffff"),
]
FRAGMENTED = st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join)
EXCERPTS = st.tuples(st.sampled_from(TEXTS), st.integers(0, 2000), st.integers(0, 200)).map(
    lambda drawn: drawn[0][drawn[1] : drawn[1] + drawn[2]]
)
TEXT = st.one_of(st.text(), FRAGMENTED, st.tuples(FRAGMENTED, st.text(), EXCERPTS).map("".join))
WITH_SPECIALS = st.lists(st.one_of(TEXT, st.sampled_from(SPECIAL_TOKENS)), max_size=6).map("".join)


def library_of(tokenizer, specials=True):
    """The same tokenizer.json in Hugging Face's library, which finds its special tokens in any text, or without."""
    document = json.loads(tokenizer._json)
    if not specials:
        document["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(document))


LIBRARY = library_of(TOKENIZER, specials=False)
LIBRARY_WITH_SPECIALS = library_of(TOKENIZER)


def document_of(vocab, merges, specials=(END_OF_DOCUMENT,), **model):
    """A tokenizer.json, as a dictionary, whose specials come after `vocab`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": len(vocab) + i, "content": name, **flags} for i, name in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": {token: id for id, token in enumerate(vocab)}, "merges": merges, **model},
    }


def load(document, where="here"):
    return Tokenizer(json.dumps(document).encode(), where)


# --- The same ids as Hugging Face's library --------------------------------------------------------------------------


@settings(max_examples=3000, deadline=None)
@given(TEXT)
@example("a 'S 's it'LL 1234567  \n\n  x")
def test_encoding_equals_the_tokenizers_library(text):
    assert TOKENIZER.encode(text) == LIBRARY.encode(text).ids


@settings(max_examples=500, deadline=None)
@given(WITH_SPECIALS)
@example("<|user|><|user|> <think>/nothink</think>/nothinking<|user|")
def test_encoding_with_specials_equals_the_tokenizers_library(text):
    assert TOKENIZER.encode(text, allow_special=True) == LIBRARY_WITH_SPECIALS.encode(text).ids


def test_every_character_is_cut_and_encoded_as_by_the_tokenizers_library():
    # One representative block stands for the large uniform scripts; unassigned characters are left out.
    uniform = [range(0x3500, 0x4D00), range(0x5000, 0x9F00), range(0xAD00, 0xD700), range(0x17100, 0x18C00)]
    for start in [*range(0, 0x3500, 0x100), *range(0x4D00, 0x32000, 0x100), *range(0xE0000, 0xE0200, 0x100)]:
        if any(start in block for block in uniform):
            continue
        block = [chr(code) for code in range(start, start + 0x100)]
        assigned = [c for c in block if unicodedata.category(c) not in ("Cn", "Cs")]
        text = "".join(f"a{c}a1{c}1 {c}{c}\n{c} '{c}" for c in assigned)
        assert TOKENIZER.encode(text) == LIBRARY.encode(text).ids, f"block U+{start:04X}"


@pytest.mark.parametrize("after", ["", "x", "\n", "\nx", "1", "!"])
def test_whitespace_of_any_length_is_cut_as_by_the_tokenizers_library(after):
    # The pattern given to tiktoken counts in hundreds, so go past a few of them.
    for length in range(320):
        text = "y" + " " * length + after
        assert TOKENIZER.encode(text) == LIBRARY.encode(text).ids, length


@pytest.mark.parametrize("text", [" " * 2_000_000 + "x", "\n" + "\t" * 1_500_000, "a" * 1_000_000, " \n" * 500_000])
def test_a_run_of_millions_encodes(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@st.composite
def merge_tables(draw):
    """A vocabulary over "abc" and its merges: as learnt, with all the splits of each token, or with some left out."""
    vocab = ["a", "b", "c"]
    merges = []
    for _ in range(draw(st.integers(0, 12))):
        pair = [draw(st.sampled_from(vocab)), draw(st.sampled_from(vocab))]
        if "".join(pair) not in vocab:
            vocab.append("".join(pair))
            merges.append(pair)
    if draw(st.booleans()):  # as in files converted from tiktoken
        merges = [
            [token[:cut], token[cut:]]
            for token in vocab
            for cut in range(1, len(token))
            if token[:cut] in vocab and token[cut:] in vocab
        ]
    if draw(st.booleans()):
        merges = [merge for merge in merges if draw(st.integers(0, 3))]
    if draw(st.booleans()):
        order = draw(st.permutations(range(len(merges))))
        merges = [merges[i] for i in order]
    return vocab, merges


@settings(max_examples=800, deadline=None)
@given(merge_tables(), st.booleans(), st.lists(st.text("abc", max_size=12), min_size=1, max_size=8))
def test_any_tokenizer_that_loads_encodes_as_the_tokenizers_library(table, ignore_merges, texts):
    vocab, merges = table
    try:
        tokenizer = load(document_of(vocab, merges, ignore_merges=ignore_merges))
    except ValueError as error:
        assert "wanted merges in the order of ids" in str(error) or "wanted a merge that makes it" in str(error)
        assume(False)
    library = library_of(tokenizer)
    for text in [*texts, *vocab]:
        assert tokenizer.encode(text) == library.encode(text).ids


def test_a_token_that_merges_never_reach_is_used_only_with_ignore_merges():
    # As GLM's " 王": "bc" is merged first, after which no merge leads to "abcd".
    vocab, merges = ["a", "b", "c", "d", "bc", "ab", "cd", "abcd"], [["b", "c"], ["a", "b"], ["c", "d"], ["ab", "cd"]]
    by_merges = load(document_of(vocab, merges, ignore_merges=False))
    at_once = load(document_of(vocab, merges, ignore_merges=True))
    assert by_merges.encode("abcd") == [0, 4, 3]
    assert at_once.encode("abcd") == [7]
    assert at_once.encode("abcda") == [0, 4, 3, 0]
    assert by_merges.decode([7]) == "abcd"
    assert by_merges.fingerprint != at_once.fingerprint


def test_transformers_loads_the_folder_and_gives_the_same_ids(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    text = "<|user|>\nHow many?/nothink<|assistant|>\n<think></think>\n42 élan 你好"
    for cls in (PreTrainedTokenizerFast, AutoTokenizer):
        theirs = cls.from_pretrained(tmp_path)
        assert theirs(text)["input_ids"] == TOKENIZER.encode(text, allow_special=True)
        assert len(theirs) == TOKENIZER.vocab_size
        assert theirs.eos_token_id == theirs.pad_token_id == TOKENIZER.end_of_document_id
        assert theirs.decode(TOKENIZER.encode(text, allow_special=True)) == text
        # Parsers of reasoning and tool calls need the tags when the specials are skipped.
        kept = theirs.decode([TOKENIZER.special_ids[name] for name in SPECIAL_TOKENS], skip_special_tokens=True)
        assert kept == "".join(name for name in SPECIAL_TOKENS if name in CONTENT_TAGS)


def test_transformers_renders_a_conversation_as_ids_as_we_do(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "ü", "b": [1]}}}
    messages = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "", "reasoning_content": "Ask.", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
    ]
    for mode in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
        found = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False, **mode)
        assert found == render_tokens(TOKENIZER, messages, tools, **mode, add_generation_prompt=True).ids


# --- Nothing is lost, nothing acts as control ------------------------------------------------------------------------


@settings(max_examples=1000, deadline=None)
@given(WITH_SPECIALS, st.booleans())
def test_decoding_inverts_encoding(text, allow_special):
    ids = TOKENIZER.encode(text, allow_special)
    assert TOKENIZER.decode(ids) == TOKENIZER.decode(np.array(ids, dtype=np.int64)) == text


@settings(max_examples=500, deadline=None)
@given(WITH_SPECIALS)
@example("".join(SPECIAL_TOKENS))
def test_user_text_never_gives_a_special_id(text):
    assert not set(TOKENIZER.encode(text)) & set(TOKENIZER.special_ids.values())


@settings(max_examples=500, deadline=None)
@given(TEXT)
def test_byte_lengths_add_up_to_the_text(text):
    lengths = TOKENIZER.token_byte_lengths()
    assert lengths.dtype == np.int32 and lengths.shape == (TOKENIZER.vocab_size,)
    assert lengths[TOKENIZER.encode(text)].sum() == len(text.encode())


def test_byte_length_of_a_special_token_is_zero_and_of_no_other():
    specials = set(TOKENIZER.special_ids.values())
    assert {id for id, length in enumerate(TOKENIZER.token_byte_lengths()) if length == 0} == specials


def test_a_cut_character_decodes_to_a_replacement_mark_unless_strict():
    ids = TOKENIZER.encode("\U0010ffff")[:-1]
    assert TOKENIZER.decode(ids) == "\ufffd"
    assert TOKENIZER.decode_bytes(ids) == "\U0010ffff".encode()[:-1]
    with pytest.raises(UnicodeDecodeError):
        TOKENIZER.decode(ids, errors="strict")


def test_a_batch_encodes_as_its_texts_do_in_order():
    assert TOKENIZER.encode_batch(TEXTS, num_threads=3) == [TOKENIZER.encode(text) for text in TEXTS]
    assert TOKENIZER.encode_batch(["<|user|>"], allow_special=True) == [[TOKENIZER.special_ids["<|user|>"]]]


# --- Training --------------------------------------------------------------------------------------------------------


NUMBERS = train_tokenizer([f"{n} + {n * n} = {n + n * n}, 19{n % 100:02}\n" for n in range(2000)], 400, show_progress=False)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([TOKENIZER, NUMBERS]), st.lists(st.one_of(TEXT, st.integers(0).map(str)), max_size=5).map("".join))
@example(NUMBERS, "1234567, 1999 and 12")
def test_each_digit_is_an_id_of_its_own_in_what_we_train(tokenizer, text):
    """Numbers are all that NUMBERS has seen, and still it has no id for two digits."""
    parts = [tokenizer.decode([id], errors="ignore") for id in tokenizer.encode(text)]
    assert [part for part in parts if any(c in "0123456789" for c in part)] == [c for c in text if c in "0123456789"]


@pytest.mark.parametrize("texts, vocab_size, reached", [(TEXTS, 700, 700), (["low lower"], 700, None), ([], 288, 288)])
def test_specials_follow_the_ordinary_ids_in_published_order(texts, vocab_size, reached):
    tokenizer = train_tokenizer(texts, vocab_size, show_progress=False)
    first = tokenizer.vocab_size - len(SPECIAL_TOKENS)
    assert list(tokenizer.special_ids.items()) == [(name, first + i) for i, name in enumerate(SPECIAL_TOKENS)]
    assert tokenizer.vocab_size == reached if reached else 288 < tokenizer.vocab_size < vocab_size
    assert tokenizer.end_of_document_id == tokenizer.special_ids["<|endoftext|>"]
    assert [tokenizer.decode([id]) for id in tokenizer.end_of_turn_ids] == [
        "<|endoftext|>",
        "<|user|>",
        "<|observation|>",
    ]
    assert tokenizer.decode(tokenizer.encode("any text, 猫 \x00")) == "any text, 猫 \x00"


def test_the_name_of_a_special_token_is_never_learnt_as_ordinary():
    # "/nothink" is one piece of text to the pattern, so plain training would learn it.
    tokenizer = train_tokenizer(["/nothink /nothinking [MASK]"] * 50, 400, show_progress=False)
    assert tokenizer.special_ids["/nothink"] == tokenizer.vocab_size - 1
    assert len(tokenizer.encode("/nothink")) > 1
    assert tokenizer.encode("/nothink", allow_special=True) == library_of(tokenizer).encode("/nothink").ids


def test_training_is_the_same_in_every_process():
    program = (
        "from pydoc_data.topics import topics; from minglm.tokenizer import train_tokenizer;"
        "print(train_tokenizer([topics[n] for n in sorted(topics)], 1200, show_progress=False).fingerprint)"
    )
    # Without `check`, so that a failure shows what the program said.
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == TOKENIZER.fingerprint, done.stderr
    assert train_tokenizer(TEXTS[1:], 1200, show_progress=False).fingerprint != TOKENIZER.fingerprint


def test_characters_of_ascii_text_are_its_tokens(tmp_path):
    trained = train_tokenizer(["hello\n", "world"], characters=True, specials=[END_OF_DOCUMENT])
    trained.save_pretrained(tmp_path)
    for tokenizer in (trained, Tokenizer.from_pretrained(tmp_path)):
        assert tokenizer.vocab_size == len(set("hello\nworld")) + 1
        assert tokenizer.end_of_turn_ids == (tokenizer.end_of_document_id,) == (tokenizer.vocab_size - 1,)
        assert [tokenizer.decode([id]) for id in tokenizer.encode("world\nhello")] == list("world\nhello")
        assert tokenizer.encode("<|endoftext|>hell", allow_special=True)[0] == tokenizer.end_of_document_id
        for unknown in ("x", "é", "<"):
            with pytest.raises(ValueError, match=f"character '{unknown}' is not in this vocabulary of 8 bytes"):
                tokenizer.encode(f"hello{unknown}<|endoftext|>")


def test_vocabulary_must_hold_bytes_and_specials():
    with pytest.raises(ValueError, match="vocab_size is 287; wanted at least 288"):
        train_tokenizer(TEXTS, 287)


@pytest.mark.parametrize("arguments", [{}, {"vocab_size": 300, "characters": True}])
def test_vocabulary_is_either_sized_or_of_characters(arguments):
    with pytest.raises(ValueError, match="either vocab_size or characters"):
        train_tokenizer(TEXTS, **arguments)


@pytest.mark.parametrize(
    "specials, message",
    [
        ([], "wanted <|endoftext|> among them"),
        ([END_OF_DOCUMENT, ""], "no empty one"),
        ([END_OF_DOCUMENT, END_OF_DOCUMENT], "also begins"),
        ([END_OF_DOCUMENT, "<a", "<ab"], "'<a' also begins '<ab'"),
        ([END_OF_DOCUMENT, "a"], "['a'] are ordinary tokens, too"),
    ],
)
def test_unfit_specials_are_refused(specials, message):
    with pytest.raises(ValueError) as caught:
        train_tokenizer(["text"], 400, specials=specials, show_progress=False)
    assert message in str(caught.value)


# --- Files -----------------------------------------------------------------------------------------------------------


def test_saving_and_loading_changes_nothing(tmp_path):
    TOKENIZER.save_pretrained(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", str(tmp_path / "new" / "folder" / "tokenizer.json")):
        loaded = Tokenizer.from_pretrained(path)
        assert loaded.fingerprint == TOKENIZER.fingerprint
        assert loaded.special_ids == TOKENIZER.special_ids
        assert loaded.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])


def test_pickling_changes_nothing():
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    assert copy.fingerprint == TOKENIZER.fingerprint


def test_both_spellings_of_merges_are_one_tokenizer():
    vocab = [*BYTE_CHARACTERS, "lo", "low", "er", "Ġlow"]
    pairs = [["l", "o"], ["lo", "w"], ["e", "r"], ["Ġ", "low"]]
    newer = load(document_of(vocab, pairs))
    older = load(document_of(vocab, [" ".join(pair) for pair in pairs]))
    for tokenizer in (newer, older):
        assert tokenizer.encode("lower low") == [257, 258, 259]
        assert tokenizer.decode([257, 258, 259]) == "lower low"
        assert tokenizer.special_ids == {END_OF_DOCUMENT: 260}
    assert newer.fingerprint == older.fingerprint != load(document_of(vocab[:-1], pairs[:-1])).fingerprint


def test_specials_listed_in_the_vocabulary_as_well_are_specials_still():
    document = document_of([END_OF_DOCUMENT, *BYTE_CHARACTERS], [])
    document["added_tokens"][0]["id"] = 0
    tokenizer = load(document)
    assert tokenizer.special_ids == {END_OF_DOCUMENT: 0}
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode("<|endoftext|>a", allow_special=True) == [0, 1 + ord("a")]
    assert 0 not in tokenizer.encode("<|endoftext|>")


GOOD = document_of(["a", "b", "c", "ab"], [["a", "b"]], [END_OF_DOCUMENT, "<x>"])


def changed(path, value):
    """GOOD with the value at `path` replaced."""
    document = json.loads(json.dumps(GOOD))
    node = document
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return document


@pytest.mark.parametrize(
    "path, value, message",
    [
        (["model"], {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "model.type is 'WordLevel'"),
        (["model", "dropout"], 0.1, "model.dropout is 0.1"),
        (["model", "unk_token"], "a", "model.unk_token is 'a'"),
        (["model", "byte_fallback"], True, "model.byte_fallback is True"),
        (["model", "end_of_word_suffix"], "</w>", "model.end_of_word_suffix is '</w>'"),
        (["normalizer"], {"type": "NFC"}, "normalizer is {'type': 'NFC'}"),
        (["pre_tokenizer"], None, "pre_tokenizer is None"),
        (["pre_tokenizer"], {"type": "Whitespace"}, "pre_tokenizer is [{'type': 'Whitespace'}]"),
        (["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"], r"\p{N}+", r"'Regex': '\\p{N}+'"),
        (["pre_tokenizer", "pretokenizers", 1, "add_prefix_space"], True, "'add_prefix_space': True"),
        (["decoder"], None, "decoder.type is None; wanted 'ByteLevel'"),
        (["added_tokens", 1, "lstrip"], True, "lstrip of added token '<x>' is True"),
        (["added_tokens", 1, "id"], 7, "id of added token '<x>' is 7; wanted 5"),
        (["added_tokens", 0, "content"], "<eos>", "wanted <|endoftext|> among them"),
        (["model", "vocab"], {"a": 0, "b": 1, "ab": 2}, "id of added token '<|endoftext|>' is 4; wanted 3"),
        (["model", "vocab"], {"a": 0, "b": 1, "ab": 3, END_OF_DOCUMENT: 4, "<x>": 5}, "found id 3 after id 1"),
        (["model", "vocab"], {"a": 0, "b": 1, "ab": 2, "▁": 3}, "'▁' in token '▁' stands for no byte"),
        (["model", "merges"], [["a", "b"], ["b", "c"]], "Token `bc` out of vocabulary"),
    ],
)
def test_another_family_is_refused_by_name(tmp_path, path, value, message):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(ValueError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert message in str(caught.value) and str(caught.value).startswith(str(file))


def test_the_file_that_the_refused_ones_are_made_from_loads():
    assert load(GOOD).encode("abc") == [3, 2]


def test_merges_out_of_the_order_of_ids_are_refused():
    vocab = ["a", "b", "c", "ab", "bc"]
    assert load(document_of(vocab, [["a", "b"], ["b", "c"]])).encode("abc") == [3, 2]
    with pytest.raises(ValueError, match="merge 1 .* makes id 3 after one that makes id 4"):
        load(document_of(vocab, [["b", "c"], ["a", "b"]]))


def test_a_merge_that_makes_a_special_token_is_refused():
    document = document_of(["a", "b", "ab"], [["a", "b"]])
    document["added_tokens"].insert(0, document["added_tokens"][0] | {"id": 2, "content": "ab"})
    with pytest.raises(ValueError, match="none that makes a special token"):
        load(document)


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0", "model": {"ty', b"\xff\xfe", b"[]", b"{}"])
def test_a_damaged_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="not a readable tokenizer.json") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "tokenizer.json"))


def test_a_missing_file_is_named(tmp_path):
    for path, named in [(tmp_path, tmp_path / "tokenizer.json"), (tmp_path / "no", tmp_path / "no")]:
        with pytest.raises(FileNotFoundError, match="no such file") as caught:
            Tokenizer.from_pretrained(path)
        assert str(caught.value).startswith(f"{named}: ")


# --- Wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, 7, b"bytes", ["list"]])
def test_only_strings_encode(text):
    with pytest.raises(TypeError, match=f"text is a {type(text).__name__}"):
        TOKENIZER.encode(text)
    with pytest.raises(TypeError, match=f"texts holds a {type(text).__name__}"):
        train_tokenizer(["a", text], 300, show_progress=False)


def test_one_string_is_not_a_list_of_texts():
    with pytest.raises(TypeError, match="texts is one string"):
        train_tokenizer("text", 300)


@pytest.mark.parametrize("allow_special", [False, True])
def test_a_lone_surrogate_is_refused(allow_special):
    with pytest.raises(ValueError, match=r"'\\ud800' in position 2: surrogates not allowed"):
        TOKENIZER.encode("ab\ud800", allow_special)


@pytest.mark.parametrize("how", [{"vocab_size": 300, "show_progress": False}, {"characters": True}])
def test_a_lone_surrogate_cannot_be_trained_on(how):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        train_tokenizer(["ab\ud800"], **how)


def test_a_vocabulary_of_characters_needs_a_character():
    with pytest.raises(ValueError, match="texts hold no character"):
        train_tokenizer(["", END_OF_DOCUMENT], characters=True)


@pytest.mark.parametrize("id", [-1, TOKENIZER.vocab_size, 10**12])
def test_an_id_out_of_the_vocabulary_is_named(id):
    with pytest.raises(ValueError, match=f"id {id} is not in the vocabulary"):
        TOKENIZER.decode([0, id])
