"""Corpora through the `datasets` library: local files in its formats."""

import json
import sys

import pytest

from minglm.data.hugging_face import hugging_face_corpus
from minglm.data.shards import prepare
from minglm.data.sources import DataError
from minglm.tokenizer import train_tokenizer

ROWS = [{"text": f"Row {i} of the table, in words. " * 3, "id": i} for i in range(30)]


def test_without_the_library_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets; install it: pip install datasets"):
        hugging_face_corpus("HuggingFaceFW/fineweb-edu")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The same rows as JSONL and as parquet."""
    datasets = pytest.importorskip("datasets", reason="optional: pip install datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    return {"json": tmp_path / "rows.jsonl", "parquet": tmp_path / "rows.parquet"}


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_rows_are_documents_in_their_order_however_often_they_are_read(files, kind, tmp_path):
    corpus = hugging_face_corpus(kind, files=[files[kind]], domain="web")
    assert [d.text for d in corpus] == [d.text for d in corpus] == [row["text"] for row in ROWS]
    assert {d.domain for d in corpus} == {"web"}
    assert len(list(hugging_face_corpus(kind, files=[files[kind]], documents=7))) == 7
    tokenizer = train_tokenizer([row["text"] for row in ROWS], 320, show_progress=False)
    dataset = prepare(corpus, tokenizer, tmp_path / "data", progress=False)
    assert dataset.domains == ["web"] and dataset.splits["train"].num_documents == len(ROWS)


def test_the_identity_changes_with_the_contents(files):
    before = hugging_face_corpus("json", files=[files["json"]]).identity
    files["json"].write_text(json.dumps(ROWS[0]))
    assert hugging_face_corpus("json", files=[files["json"]]).identity != before


def test_what_cannot_be_read_is_named(files, tmp_path):
    with pytest.raises(DataError, match="row 0: the column 'body' does not exist; there are text, id"):
        list(hugging_face_corpus("json", files=[files["json"]], column="body"))
    with pytest.raises(DataError, match="row 0: the column 'id' holds int; wanted one of strings"):
        list(hugging_face_corpus("json", files=[files["json"]], column="id"))
    with pytest.raises(DataError, match="nothing.jsonl: cannot be read: No such file"):
        hugging_face_corpus("json", files=[tmp_path / "nothing.jsonl"])
    with pytest.raises(DataError, match="no-such-format: datasets cannot open it"):
        list(hugging_face_corpus("no-such-format", files=[files["json"]]))
