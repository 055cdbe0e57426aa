"""Prepared folders: what is written is what was read, nothing half-done is left, nothing damaged is opened."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.data import shards
from minglm.data.shards import FORMAT_VERSION, DatasetError, VocabularyMismatch, open_dataset, prepare
from minglm.data.sources import Corpus, DataError, Document, documents_from_path, split_documents
from minglm.files import WriteError
from minglm.tokenizer import END_OF_DOCUMENT, train_tokenizer

SOME_TEXT = "the cat sat on the mat. The dog, too!\n\n    return self.cat + 1234\n"
TOKENIZER = train_tokenizer([SOME_TEXT], 320, show_progress=False)
OTHER_TOKENIZER = train_tokenizer([SOME_TEXT], 310, show_progress=False)

# A tokenizer that joins what is around line breaks wherever it may.
BREAKS = ["\n", "\n\n", "\r\n", " ", "  ", "\t", "a", "'s", "12", "!", "!\n", "\u3000", "\x1c", "é"]
JOINER = train_tokenizer(["".join(pair) * 2 for pair in itertools.product(BREAKS, repeat=3)], 600, show_progress=False)


def documents(number: int, domain: str = "prose") -> list[Document]:
    return [Document(f"{i} is document number {i}.\n" * (1 + i % 5), f"{i}", "numbers", domain) for i in range(number)]


def tokens_of(folder: Path) -> dict[str, list[list[int]]]:
    splits = open_dataset(folder).splits
    return {name: [split.document(i).tolist() for i in range(split.num_documents)] for name, split in splits.items()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=2).filter(str.strip)


@given(st.lists(texts, min_size=1, max_size=8))
def test_every_document_is_found_again_in_its_split_and_ends_in_the_end_of_document(texts):
    corpus = Corpus.from_documents(Document(text, "n", "s", "prose") for text in texts)
    with tempfile.TemporaryDirectory() as parent:
        prepare(corpus, TOKENIZER, Path(parent, "data"), progress=False)
        found = tokens_of(Path(parent, "data"))
    for split, ids in found.items():
        wanted = [document.text for name, document in split_documents(corpus) if name == split]
        assert [TOKENIZER.decode(document[:-1]) for document in ids] == wanted
        assert all(document[-1] == TOKENIZER.end_of_document_id for document in ids)


@given(st.integers(1, 400))
@settings(max_examples=20)
def test_tokens_and_fingerprint_are_independent_of_the_size_of_shards(shard_tokens):
    with tempfile.TemporaryDirectory() as parent:
        one = prepare(documents(20), TOKENIZER, Path(parent, "one"), progress=False)
        many = prepare(documents(20), TOKENIZER, Path(parent, "many"), shard_tokens, progress=False)
        assert tokens_of(many.folder) == tokens_of(one.folder)
        assert many.fingerprint == one.fingerprint
        train = many.splits["train"]
        assert all(len(shard) >= shard_tokens for shard in train.shards[:-1])
        anywhere = np.arange(train.num_tokens)[::-1].reshape(1, -1, 1)
        assert np.array_equal(train.tokens_at(anywhere), one.splits["train"].tokens_at(anywhere))


@given(st.lists(st.sampled_from(BREAKS), min_size=1, max_size=50).map("".join), st.integers(1, 20))
def test_a_long_text_has_the_same_tokens_encoded_in_pieces(text, piece):
    with mock.patch.object(shards, "_PIECE_CHARACTERS", piece):
        assert shards._encode([Document(t, "n", "s", "prose") for t in (text, "b", text)], JOINER) == [
            JOINER.encode(t) for t in (text, "b", text)
        ]


def test_user_text_cannot_end_a_document(tmp_path):
    corpus = [Document(f"a{END_OF_DOCUMENT}b " * 20, "n", "s", "prose")]
    train = prepare(corpus, TOKENIZER, tmp_path / "data", progress=False).splits["train"]
    assert (train.document(0) == TOKENIZER.end_of_document_id).sum() == 1


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_tokens_take_two_bytes_where_the_vocabulary_allows(tmp_path, vocab_size, dtype):
    specials = [END_OF_DOCUMENT, *(f"<|{i}|>" for i in range(vocab_size - 257))]
    tokenizer = train_tokenizer([], vocab_size, specials=specials, show_progress=False)
    dataset = prepare(documents(3), tokenizer, tmp_path / "data", progress=False)
    assert dataset.vocab_size == vocab_size
    assert {shard.dtype for shard in dataset.splits["train"].shards} == {np.dtype(dtype)}


def test_train_and_held_out_share_no_text(tmp_path):
    prepare(documents(700) + documents(700), TOKENIZER, tmp_path / "data", progress=False)
    found = {split: {tuple(ids) for ids in all_ids} for split, all_ids in tokens_of(tmp_path / "data").items()}
    assert found["train"].isdisjoint(found["held_out"])
    assert len(found["train"]) + len(found["held_out"]) == 700 and len(found["held_out"]) > 0


def test_the_manifest_counts_what_was_read_and_hashes_what_was_written(tmp_path):
    corpus = documents(300) + [Document(f"def f{i}(): pass", f"{i}", "functions", "code") for i in range(300)]
    dataset = prepare(corpus, TOKENIZER, tmp_path / "data", progress=False)
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["domains"] == dataset.domains == ["prose", "code"]
    for source, entry in manifest["sources"].items():
        of_source = [d for d in corpus if d.source == source]
        assert (entry["documents"], entry["bytes"]) == (300, sum(len(d.text) for d in of_source))
        assert entry["tokens"] == sum(len(TOKENIZER.encode(d.text)) + 1 for d in of_source)
    for key in ("documents", "bytes", "tokens"):
        assert sum(s[key] for s in manifest["splits"].values()) == sum(s[key] for s in manifest["sources"].values())
    train = dataset.splits["train"]
    assert train.num_documents == manifest["splits"]["train"]["documents"]
    assert train.num_tokens == manifest["splits"]["train"]["tokens"]
    domains = Counter(d.domain for split, d in split_documents(corpus) if split == "train")
    assert np.bincount(train.domains).tolist() == [domains["prose"], domains["code"]]
    files = content(tmp_path / "data")
    assert set(files) == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        assert (entry["bytes"], entry["sha256"]) == (len(files[name]), hashlib.sha256(files[name]).hexdigest())


# ---- used again


def test_a_folder_prepared_from_the_same_is_used_again_without_reading(tmp_path, capsys):
    first = prepare(Corpus(lambda: documents(9), {"version": "1"}), TOKENIZER, tmp_path / "data", progress=False)
    assert capsys.readouterr().out == ""
    written = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    unread = Corpus(lambda: pytest.fail("was read"), {"version": "1"})
    again = prepare(unread, TOKENIZER, tmp_path / "data")
    assert "was prepared from these documents before and is used again" in capsys.readouterr().out
    assert again.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == written


def test_a_folder_prepared_from_something_else_is_neither_used_nor_overwritten(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(SOME_TEXT)
    folder = prepare(documents_from_path(text), TOKENIZER, tmp_path / "data", progress=False).folder
    before = content(folder)
    found, wanted = TOKENIZER.fingerprint, OTHER_TOKENIZER.fingerprint
    with pytest.raises(DatasetError, match=f"not overwritten; .* tokenizer: found '{found}', wanted '{wanted}'"):
        prepare(documents_from_path(text), OTHER_TOKENIZER, folder, progress=False)
    text.write_text(SOME_TEXT + "more")
    with pytest.raises(DatasetError, match="not overwritten; .* documents.sha256: found '.*', wanted '"):
        prepare(documents_from_path(text), TOKENIZER, folder, progress=False)
    assert content(folder) == before


def test_a_folder_of_the_users_own_is_never_written_into(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(DatasetError, match="manifest.json: no such file"):
        prepare(documents(3), TOKENIZER, tmp_path, progress=False)
    with pytest.raises(DatasetError, match="letter.txt/manifest.json: no such file"):
        prepare(documents(3), TOKENIZER, tmp_path / "letter.txt", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


# ---- damaged folders


@pytest.fixture
def folder(tmp_path) -> Path:
    return prepare(documents(20), TOKENIZER, tmp_path / "data", shard_tokens=100, progress=False).folder


@pytest.mark.parametrize("name", ["train-00001.bin", "train-offsets.npy", "held_out-domains.npy"])
def test_a_truncated_or_missing_file_is_named_with_both_sizes(folder, name):
    size = (folder / name).stat().st_size
    os.truncate(folder / name, size - 2)
    with pytest.raises(DatasetError, match=f"{name}: found {size - 2} bytes, wanted {size} bytes"):
        open_dataset(folder)
    (folder / name).unlink()
    with pytest.raises(DatasetError, match=f"{name}: found no such file, wanted {size} bytes"):
        open_dataset(folder)


def test_files_that_contradict_each_other_are_refused(folder):
    offsets = np.load(folder / "train-offsets.npy")
    np.save(folder / "train-offsets.npy", offsets - 1)
    with pytest.raises(DatasetError, match=f"hold {offsets[-1]} tokens, train-offsets.npy counts {offsets[-1] - 1}"):
        open_dataset(folder)


@pytest.mark.parametrize(
    "text, found",
    [("{", "not JSON"), ("[]", f"format_version is None, wanted {FORMAT_VERSION}"), ('{"format_version": 99}', "is 99")],
)
def test_a_damaged_or_unknown_manifest_is_refused(folder, text, found):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DatasetError, match=f"manifest.json: .*{found}"):
        open_dataset(folder)


def test_a_folder_that_was_not_prepared_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="manifest.json: no such file; wanted a folder written by"):
        open_dataset(tmp_path / "nothing")


def test_tokens_of_another_tokenizer_are_refused_with_both_fingerprints(folder):
    open_dataset(folder, TOKENIZER)
    fingerprints = f"{TOKENIZER.fingerprint[:12]} and 320 ids; wanted {OTHER_TOKENIZER.fingerprint[:12]} and 310 ids"
    with pytest.raises(VocabularyMismatch, match=fingerprints):
        open_dataset(folder, OTHER_TOKENIZER)


# ---- preparation that does not end


def test_bad_text_in_the_middle_leaves_nothing_behind(tmp_path):
    lines = [json.dumps({"text": f"record {i}"}) for i in range(2000)]
    (tmp_path / "records.jsonl").write_text("\n".join([*lines, "{", *lines]))
    with pytest.raises(DataError, match="records.jsonl, line 2001: not JSON"):
        prepare(documents_from_path(tmp_path / "records.jsonl"), TOKENIZER, tmp_path / "data", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_no_documents_are_refused_and_leave_nothing_behind(tmp_path):
    with pytest.raises(DataError, match="no documents"):
        prepare([], TOKENIZER, tmp_path / "data", progress=False)
    assert list(tmp_path.iterdir()) == []


PREPARE = """
import os, signal, sys
from minglm.data.shards import prepare
from minglm.data.sources import Corpus, Document
from minglm.tokenizer import Tokenizer

def read():
    for i in range(3000):
        if i == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield Document(f"document number {i} " * 20, str(i), "numbers", "prose")

kill_at = int(sys.argv[3])
prepare(Corpus(read, {"numbers": 3000}), Tokenizer.from_pretrained(sys.argv[1]), sys.argv[2], progress=False)
"""


def run_prepare(parent: Path, kill_at: int = -1) -> int:
    TOKENIZER.save_pretrained(parent / "tokenizer")
    arguments = [parent / "tokenizer", parent / "runs" / "data", str(kill_at)]
    return subprocess.run([sys.executable, "-c", PREPARE, *arguments]).returncode


def test_a_killed_preparation_leaves_no_folder_and_the_next_one_is_undisturbed(tmp_path):
    assert run_prepare(tmp_path / "killed", kill_at=2990) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "runs" / "data").exists()
    assert run_prepare(tmp_path / "killed") == 0
    assert [path.name for path in (tmp_path / "killed" / "runs").iterdir()] == ["data"]
    assert run_prepare(tmp_path / "undisturbed") == 0
    assert content(tmp_path / "killed" / "runs" / "data") == content(tmp_path / "undisturbed" / "runs" / "data")


@pytest.mark.parametrize("name", ["train-00000.bin", "held_out-offsets.npy", "manifest.json"])
def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path, monkeypatch, name):
    open_file = Path.open

    def open_full(path: Path, mode: str = "r", *arguments, **keywords):
        return open_file(Path("/dev/full") if path.name == name and "w" in mode else path, mode, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", open_full)  # writing to /dev/full fails as on a full disk
    with pytest.raises(WriteError, match="data: the disk is full"):
        prepare(documents(1000), TOKENIZER, tmp_path / "data", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_any_names_are_domains_up_to_256_of_them(tmp_path):
    many = [Document(f"text {i} " * 5, str(i), "s", f"domain {i}", split="train") for i in range(257)]
    dataset = prepare(many[:256], TOKENIZER, tmp_path / "most", progress=False)
    assert dataset.domains == [f"domain {i}" for i in range(256)]
    assert dataset.splits["train"].domains.tolist() == list(range(256))
    with pytest.raises(DataError, match="more than 256 domains, 'domain 256' among them"):
        prepare(many, TOKENIZER, tmp_path / "too_many", progress=False)
