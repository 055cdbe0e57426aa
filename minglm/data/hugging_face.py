"""Corpora of the Hugging Face Hub, or files in their formats, streamed through the `datasets` library.

The one part of the data that may need the network, and an optional dependency: nothing else imports this file.

    corpus = hugging_face_corpus("HuggingFaceFW/fineweb-edu", name="sample-10BT", documents=1_000_000, revision="v1.0.0")
    corpus = hugging_face_corpus("parquet", files=["a.parquet", "b.parquet"], column="content", domain="code")
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from minglm.data.sources import Corpus, DataError, Document


def hugging_face_corpus(
    path: str,
    name: str | None = None,
    split: str = "train",
    column: str = "text",
    domain: str = "prose",
    documents: int | None = None,
    revision: str | None = None,
    files: Sequence[str | Path] = (),
) -> Corpus:
    """One document a row, in the order of the rows; rows without text are passed over. Nothing is kept in memory.

    Args:
        path: a dataset's name on the Hub, or the format of `files`: "json" (JSONL), "parquet", "csv", "text".
        name: the dataset's configuration, where it has several.
        split: the rows to read; held out are some of these as of any corpus (`minglm.data.sources.split_of`).
        column: which one holds the text.
        documents: read no more rows than these.
        revision: branch, tag or commit on the Hub. Name a commit: without one, nobody can tell what was read.
        files: local ones, whose contents are hashed into the corpus's identity.

    Raises DataError, at once: `datasets` is not installed, a file is missing; while it is read: the dataset cannot be opened,
    there is no such column, or it holds no strings.
    """
    library = _library()
    identity: dict[str, object] = {"hugging_face": path, "name": name, "split": split, "column": column, "rows": documents}
    identity["revision"] = revision
    if files:
        identity["files"] = {Path(file).name: _sha256(Path(file)) for file in files}
    options = {"data_files": [str(file) for file in files]} if files else {}

    def read() -> Iterator[Document]:
        try:
            rows = library.load_dataset(path, name, split=split, revision=revision, streaming=True, **options)
        except Exception as error:  # of many kinds: no network, no such name, another format
            raise DataError(f"{path}: datasets cannot open it: {type(error).__name__}: {error}") from error
        for number, row in enumerate(itertools.islice(rows, documents)):
            text = row.get(column)
            if column not in row or not isinstance(text, str | None):
                found = f"holds {type(text).__name__}" if column in row else f"does not exist; there are {', '.join(row)}"
                raise DataError(f"{path}, row {number}: the column {column!r} {found}; wanted one of strings")
            if text:
                yield Document(text, f"{split}:{number}", path, domain)

    return Corpus(read, identity)


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "reading Hugging Face's datasets needs the package datasets; install it: pip install datasets"
        ) from error
    return datasets


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
