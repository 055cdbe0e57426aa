"""Documents: own text in, embedded sources, and the split into train and held-out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minglm.data.sources import (
    DEFAULT_SOURCES,
    FEWEST_TO_SPLIT_BY_DOCUMENT,
    HELD_OUT,
    SOURCES,
    TRAIN,
    Corpus,
    DataError,
    Document,
    default_documents,
    documents_from_path,
    embedded_documents,
    split_documents,
    split_of,
)

texts = st.text(st.characters(exclude_categories=["Cs"]))


def document(text: str, group: str | None = None) -> Document:
    return Document(text, "name", "source", "prose", group)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- own text


def test_a_file_is_one_document_with_its_bytes_unchanged(tmp_path):
    text = "Zeile eins\r\nÜber\ttwo  \n\n"
    [only] = documents_from_path(write(tmp_path / "book.whatever", text))
    assert only == Document(text, "book.whatever", "book.whatever", "prose")


def test_a_folder_is_read_sorted_by_path_with_code_and_prose_told_apart(tmp_path):
    folders = [f"{letter}/z.txt" for letter in "qwertyuiop"]
    for name in ["b.md", *folders, "a/z.txt", "a/run.py", "c.jsonl", "README.TXT"]:  # not in the order of their names
        write(tmp_path / "notes" / name, '{"text": "record"}' if name == "c.jsonl" else f"text of {name}")
    found = list(documents_from_path(tmp_path / "notes"))
    assert [d.name for d in found] == ["README.TXT", "b.md", "c.jsonl:1", "a/run.py", "a/z.txt", *sorted(folders)]
    assert [d.domain for d in found] == ["prose", "prose", "prose", "code"] + ["prose"] * 11
    assert {d.source for d in found} == {"notes"}


def test_a_folder_passes_over_hidden_empty_and_binary_files_and_broken_links(tmp_path):
    for name in [".git/config.txt", ".hidden.txt", "picture.png", "empty.txt", "blank.txt"]:
        write(tmp_path / name, "" if name == "empty.txt" else " \n" if name == "blank.txt" else "text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "kept.txt", "kept")
    assert [d.name for d in documents_from_path(tmp_path)] == ["kept.txt"]


def test_jsonl_is_one_document_a_line_and_blank_lines_are_passed_over(tmp_path):
    records = [{"text": "first\nline"}, {"id": 2, "text": "sécond"}]
    path = write(tmp_path / "r.jsonl", "\n".join(["", *map(json.dumps, records), "  "]))
    assert [(d.text, d.name) for d in documents_from_path(path)] == [
        ("first\nline", "r.jsonl:2"),
        ("sécond", "r.jsonl:3"),
    ]


def test_the_byte_order_mark_is_no_text(tmp_path):
    assert [d.text for d in documents_from_path(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello"))] == ["hello"]
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "hello"}\r\n')
    assert [d.text for d in documents_from_path(path)] == ["hello"]


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("empty.txt", b"", "empty.txt: the file is empty"),
        ("blank.txt", b" \n\t\n", "blank.txt: nothing but blanks"),
        ("blank.jsonl", b'{"text": " "}\n\n', "blank.jsonl: nothing but blanks"),
        ("latin.txt", b"0123456789\xe4", "latin.txt: not UTF-8: byte 0xe4 at offset 10"),
        ("marked.txt", b"\xef\xbb\xbf\xe4", "marked.txt: not UTF-8: byte 0xe4 at offset 3"),
        ("cut.txt", "ab\u20ac".encode()[:-1], "cut.txt: not UTF-8: byte 0xe2 at offset 2"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n', "latin.jsonl: not UTF-8: byte 0xe4 at offset 24"),
        ("cut.jsonl", b'{"text": "a"}\n\n{"text": "b\n', 'cut.jsonl, line 3: not JSON .*found \'{"text": "b\''),
        ("deep.jsonl", b"[" * 100_000, r"deep.jsonl, line 1: not JSON .*found '\[\[\["),
        ("list.jsonl", b'["text"]', r"list.jsonl, line 1: found '\[\"text\"\]'; wanted an object"),
        ("key.jsonl", b'{"texts": "a", "id": 1}', r"key.jsonl, line 1: no key \"text\" among \['id', 'texts'\]"),
        ("number.jsonl", b'{"text": 7}', 'number.jsonl, line 1: "text" is 7; wanted a string'),
        ("half.jsonl", b'{"text": "\\ud800"}', 'half.jsonl, line 1: "text" is not Unicode'),
    ],
)
def test_bad_own_text_is_refused_by_file_and_place(tmp_path, name, content, found):
    with pytest.raises(DataError, match=found):
        list(documents_from_path(write(tmp_path / name, content)))


def test_a_missing_path_and_a_folder_without_text_are_refused_at_once(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        documents_from_path(tmp_path / "nowhere")
    write(tmp_path / "pictures" / "a.png", b"\x89PNG")
    with pytest.raises(DataError, match="pictures: no text in this folder; wanted files .* .md "):
        documents_from_path(tmp_path / "pictures")


def test_identity_follows_names_and_contents_and_nothing_else(tmp_path):
    def identity(place: str, files: dict[str, str]) -> dict:
        for name, text in files.items():
            write(tmp_path / place / "notes" / name, text)
        return documents_from_path(tmp_path / place / "notes").identity

    first = identity("1", {"a.txt": "one", "b.txt": "two"})
    assert identity("2", {"b.txt": "two", "a.txt": "one"}) == first
    assert identity("3", {"a.txt": "one", "b.txt": "too"}) != first
    assert identity("4", {"a.txt": "one", "c.txt": "two"}) != first
    assert identity("5", {"a.txt": "onet", "b.txt": "wo"}) != first


# ---- corpora and the split


@given(st.lists(texts))
def test_a_corpus_drops_blank_documents_and_all_but_the_first_of_duplicates(found):
    corpus = Corpus.from_documents(map(document, found))
    kept = [d.text for d in corpus]
    assert kept == list(dict.fromkeys(text for text in found if text.strip()))
    assert list(corpus.in_memory()) == list(corpus) and corpus.in_memory().identity == corpus.identity


def test_the_identity_of_documents_in_memory_follows_every_field():
    base = dict(text="t", name="n", source="s", domain="prose", group="g")
    identities = [Corpus.from_documents([Document(**base)]).identity]
    identities += [Corpus.from_documents([Document(**{**base, field: "other"})]).identity for field in base]
    assert len({json.dumps(identity) for identity in identities}) == 6


@given(st.lists(texts.filter(str.strip), max_size=20, unique=True))
def test_few_documents_are_each_split_at_nine_tenths_of_their_characters(found):
    split = list(split_documents(map(document, found)))
    joined = {"train": "", "held_out": ""}
    for name, part in split:
        joined[name] += part.text
    assert joined["train"] == "".join(text[: int(len(text) * 0.9)] for text in found)
    assert joined["held_out"] == "".join(text[int(len(text) * 0.9) :] for text in found)
    assert all(part.text for _, part in split)


def test_tiny_shakespeare_would_be_split_as_nanogpt_does():
    [(_, train), (_, held_out)] = split_documents([document("x" * 1_115_394)])
    assert (len(train.text), len(held_out.text)) == (1_003_854, 111_540)


@pytest.mark.parametrize("fewer, parts", [(1, 2), (0, 1)])
def test_the_number_of_documents_decides_how_they_are_split(fewer, parts):
    found = [document(f"document number {i}") for i in range(FEWEST_TO_SPLIT_BY_DOCUMENT - fewer)]
    assert len(list(split_documents(found))) == parts * len(found)


@given(st.integers(min_value=0))
def test_held_out_and_train_never_share_a_text_and_every_document_is_in_one(start):
    found = [document(f"document {start + i % 700}") for i in range(1400)]  # each of them twice
    split = list(split_documents(Corpus.from_documents(found)))
    of = {name: {d.text for s, d in split if s == name} for name in (TRAIN, HELD_OUT)}
    assert of[TRAIN].isdisjoint(of[HELD_OUT]) and len(of[TRAIN] | of[HELD_OUT]) == len(split) == 700
    assert of[HELD_OUT], "none of 700 held out has a chance of less than one in a million"


def test_one_document_in_fifty_is_held_out():
    held_out = sum(split_of(document(f"document {i}")) == HELD_OUT for i in range(50_000))
    assert 850 < held_out < 1150  # 1,000, give or take five standard deviations


@given(texts, texts, texts)
def test_a_group_stays_together_and_a_text_alone_decides_otherwise(text, other, group):
    assert split_of(document(text, group)) == split_of(document(other, group))
    assert split_of(document(text)) == split_of(Document(text, other, other, "code"))


# ---- embedded sources


@pytest.fixture(scope="module")
def default() -> list[Document]:
    return list(default_documents())


def test_the_default_documents_have_prose_and_code_and_several_megabytes_of_each(default):
    assert {d.source for d in default} == set(DEFAULT_SOURCES)
    for domain in ("prose", "code"):
        assert 5e6 < sum(len(d.text) for d in default if d.domain == domain) < 50e6
    assert all(d.domain == SOURCES[d.source].domain for d in default)


def test_the_default_documents_hold_out_a_fair_share_of_prose_and_of_code(default):
    for domain in ("prose", "code"):
        size = {split: sum(len(d.text) for d in default if d.domain == domain and split_of(d) == split)
                for split in (TRAIN, HELD_OUT)}  # fmt: skip
        assert 0.005 < size[HELD_OUT] / (size[TRAIN] + size[HELD_OUT]) < 0.05


def test_the_docstrings_of_a_held_out_module_are_held_out_with_it(default):
    code = [d for d in default if d.source == "code/standard_library"]
    docstrings = [d for d in default if d.source == "docstrings/standard_library"]
    held_out = {d.name.split(".")[0] for d in code if split_of(d) == HELD_OUT}
    assert held_out and all(split_of(d) == (HELD_OUT if d.name.split(".")[0] in held_out else TRAIN) for d in docstrings)


def test_no_tests_no_tables_and_nothing_of_this_machine_is_read(default):
    modules = [d.name for d in default if d.domain == "code"]
    for left_out in ("test", "site-packages", "encodings", "pydoc_data"):
        assert not [name for name in modules if left_out in name.split(".")]
    assert not [name for name in modules if "_sysconfigdata" in name]
    assert {"json.decoder", "asyncio", "argparse"} <= set(modules)


def test_docstrings_are_long_clean_and_named_by_what_they_describe(default):
    docstrings = {d.name: d.text for d in default if d.source == "docstrings/standard_library"}
    assert docstrings["json.dumps"].startswith("Serialize ``obj`` to a JSON formatted ``str``.\n\nIf ``skipkeys``")
    assert docstrings["json.decoder.JSONDecoder"].startswith("Simple JSON")
    assert all(len(text) > 200 for text in docstrings.values())


def test_every_source_reads_documents_of_its_domain():
    for name, source in SOURCES.items():
        first = next(iter(embedded_documents(name)))
        assert (first.source, first.domain) == (name, source.domain)


READ_AND_HASH = """
import hashlib, sys
from minglm.data.sources import embedded_documents, split_of
names = "python_topics", "package_descriptions", "docstrings/networkx", "code/networkx"
digest = hashlib.sha256()
for d in embedded_documents(*names):
    digest.update(repr((d, split_of(d))).encode())
print(digest.hexdigest(), "networkx" in sys.modules)
"""


def test_documents_and_split_are_the_same_in_every_process_and_no_package_is_imported():
    outputs = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        outputs.add(subprocess.check_output([sys.executable, "-c", READ_AND_HASH], env=environment, text=True))
    [output] = outputs
    assert output.split()[1] == "False"


def test_an_unknown_source_is_refused_with_those_there_are():
    with pytest.raises(DataError, match="unknown source 'code/nympy'; .*code/numpy"):
        embedded_documents("python_topics", "code/nympy")


# ---- documents that say their split or carry marks


def test_a_document_that_says_its_split_goes_there_whole_in_small_corpora_and_large():
    said = [Document(f"text {i} " * 9, str(i), "s", "prose", split=("train", "held_out")[i % 2]) for i in range(20)]
    others = [Document(f"other {i} " * 9, str(i), "s", "prose") for i in range(600)]
    for corpus in (said, [*said, *others[:5]], [*others, *said]):
        found = {document.name: split for split, document in split_documents(corpus) if document in said}
        assert found == {document.name: document.split for document in said}
    with pytest.raises(DataError, match="split is 'test'; wanted 'train', 'held_out' or None"):
        Document("a", "n", "s", "prose", split="test")


def test_marked_documents_are_never_cut():
    marked = Document("prefix suffix middle", "n", "s", "code", marks=((0, "<|code_prefix|>"), (7, "<|code_suffix|>")))
    assert [document for _, document in split_documents([marked])] == [marked]


def test_a_small_corpus_joined_with_a_large_one_is_still_split_by_position():
    small = Corpus.from_documents([Document("a novel, " * 100, "novel", "s", "prose")])
    large = Corpus.from_documents(Document(f"text {i}", str(i), "s", "code") for i in range(1000))
    joined = Corpus.joined([small.with_splits(), large])
    novel = {split: len(document.text) for split, document in split_documents(joined) if document.name == "novel"}
    assert novel == {"train": 810, "held_out": 90}
    assert len(list(joined)) == 1002
    assert Corpus.joined([small, large]).identity != Corpus.joined([large, small]).identity


def test_the_identity_of_documents_in_memory_says_their_splits_and_marks():
    def identity(**more) -> dict:
        return Corpus.from_documents([Document("abc", "n", "s", "code", **more)]).identity

    kinds = [{}, {"split": "train"}, {"split": "held_out"}, {"marks": ((0, "<|code_prefix|>"),)}]
    assert len({str(identity(**more)) for more in kinds}) == 4
