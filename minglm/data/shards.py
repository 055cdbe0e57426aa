"""Documents tokenised once, into files that training maps into memory.

A prepared folder holds, for each split ("train", "held_out"):

    train-00000.bin, ...    the tokens of the documents, one after the other; each document ends in <|endoftext|>
    train-offsets.npy       int64 (documents + 1,): where in the split each document starts
    train-domains.npy       uint8 (documents,): index into the manifest's list of domains

and `manifest.json`: what was read, with which tokenizer, and size and SHA-256 of every file.

    dataset = prepare(default_documents(), tokenizer, "runs/first/data")   # at once if it was prepared before
    dataset = open_dataset("runs/first/data", tokenizer)
"""

import hashlib
import io
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from minglm.data.sources import HELD_OUT, TRAIN, Corpus, DataError, Document, split_documents
from minglm.files import sha256_of, write_folder_atomically
from minglm.tokenizer import Tokenizer

FORMAT_VERSION = 2  # raise it when the files, or what `sources` makes of the same packages, change
MANIFEST = "manifest.json"
SPLITS = (TRAIN, HELD_OUT)
MOST_DOMAINS = 256  # a document's domain is one byte

_BATCH_CHARACTERS = 1_000_000  # tokenised at a time: enough to keep all threads busy
_PIECE_CHARACTERS = 100_000
_CUT = re.compile(r"\n(?=\S)")


class DatasetError(ValueError):
    """A prepared folder that cannot be used. The message names the file, what was found and wanted."""


class VocabularyMismatch(DatasetError):
    """The folder's tokens are of another tokenizer than the one in use."""


# ---- reading


@dataclass(frozen=True)
class Split:
    """The documents of one split, in the order they were read. Positions count tokens from the split's first one."""

    shards: tuple[np.ndarray, ...]  # memory-mapped, uint16 or uint32
    shard_starts: np.ndarray  # int64 (shards,): position of each shard's first token
    offsets: np.ndarray  # int64 (documents + 1,): document i is the positions offsets[i] to offsets[i + 1]
    domains: np.ndarray  # uint8 (documents,)

    @property
    def num_documents(self) -> int:
        return len(self.domains)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 (documents,)."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    def tokens_at(self, positions: np.ndarray) -> np.ndarray:
        """Tokens at `positions` (int64, any shape); int64 of the same shape."""
        tokens = np.empty(positions.shape, np.int64)
        which = np.searchsorted(self.shard_starts, positions, side="right") - 1
        for index in np.unique(which):
            inside = which == index
            tokens[inside] = self.shards[index][positions[inside] - self.shard_starts[index]]
        return tokens

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, int64 (tokens,), <|endoftext|> at the end."""
        return self.tokens_at(np.arange(self.offsets[index], self.offsets[index + 1]))


@dataclass(frozen=True)
class Dataset:
    """A prepared folder, opened."""

    folder: Path
    manifest: Mapping[str, object]
    splits: Mapping[str, Split]

    @property
    def fingerprint(self) -> str:
        """Hex; equal where texts, splits, domains and tokenizer are, into however many shards they were written."""
        contents = [self.manifest["tokenizer"]["fingerprint"], self.domains]
        for split in SPLITS:
            contents.append(self.manifest["splits"][split]["sha256"])
            contents.append(self.manifest["files"][f"{split}-domains.npy"]["sha256"])
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def end_of_document_id(self) -> int:
        return self.manifest["tokenizer"]["end_of_document_id"]

    @property
    def domains(self) -> list[str]:
        return self.manifest["domains"]

    @property
    def held_out_domains(self) -> list[str]:
        """The domains that have held-out documents."""
        return [self.domains[index] for index in np.unique(self.splits[HELD_OUT].domains)]


def open_dataset(folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> Dataset:
    """Open what `prepare` wrote. Tokens stay on disk until they are used.

    Raises:
        DatasetError: no readable manifest, another format version, a file missing or of another size than the
            manifest says, or files that contradict each other.
        VocabularyMismatch: `tokenizer` is given, and is another one than the tokens were made with.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if tokenizer is not None and manifest["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        found = manifest["tokenizer"]
        raise VocabularyMismatch(
            f"{folder / MANIFEST}: tokens of a tokenizer with fingerprint {found['fingerprint'][:12]} and "
            f"{found['vocab_size']} ids; wanted {tokenizer.fingerprint[:12]} and {tokenizer.vocab_size} ids. "
            "Use the tokenizer that the data was prepared with, or prepare it again in another folder"
        )
    for name, entry in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != entry["bytes"]:
            found = "no such file" if size is None else f"{size} bytes"
            raise DatasetError(
                f"{folder / name}: found {found}, wanted {entry['bytes']} bytes by {MANIFEST}; "
                "delete the folder and prepare it again"
            )
    return Dataset(folder, manifest, {split: _open_split(folder, split, manifest) for split in SPLITS})


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DatasetError(f"{path}: no such file; wanted a folder written by minglm.data.shards.prepare") from error
    except ValueError as error:
        raise DatasetError(f"{path}: not JSON ({error}); delete the folder and prepare it again") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise DatasetError(
            f"{path}: format_version is {version!r}, wanted {FORMAT_VERSION}; delete the folder and prepare it again"
        )
    return manifest


def _open_split(folder: Path, split: str, manifest: dict) -> Split:
    dtype = np.dtype(manifest["token_dtype"])
    names = manifest["splits"][split]["shards"]
    shards = tuple(np.asarray(np.memmap(folder / name, dtype, mode="r")) for name in names)
    ends = np.cumsum([0, *map(len, shards)])
    offsets = np.asarray(np.load(folder / f"{split}-offsets.npy", mmap_mode="r"))
    domains = np.asarray(np.load(folder / f"{split}-domains.npy", mmap_mode="r"))
    if offsets[-1] != ends[-1] or len(offsets) != len(domains) + 1:
        raise DatasetError(
            f"{folder}: the {split} shards hold {ends[-1]} tokens, {split}-offsets.npy counts {offsets[-1]}; "
            f"{len(offsets) - 1} documents have an offset, {len(domains)} a domain; wanted equal numbers"
        )
    return Split(shards, ends[:-1], offsets, domains)


# ---- writing


def prepare(
    documents: Corpus | Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    shard_tokens: int = 2**27,
    progress: bool = True,
) -> Dataset:
    """Split and tokenise `documents` into `folder`, or open the folder if it was prepared from the same before.

    The same means: equal `Corpus.identity` (package versions, or a hash of own text) and equal tokenizer; the documents
    are not read for it. The folder appears under its name only when it is complete.

    Args:
        shard_tokens: a shard is closed by the first document that takes it to this many tokens.
        progress: say what is done, and draw a bar with the bytes of text tokenised.

    Raises:
        DatasetError: the folder holds something else: it is never overwritten.
        DataError: no documents, or text that cannot be read (`minglm.data.sources`).
        WriteError: the disk is full.
    """
    corpus = documents if isinstance(documents, Corpus) else Corpus.from_documents(documents)
    folder = Path(folder)
    identity = {"documents": corpus.identity, "tokenizer": tokenizer.fingerprint}
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        _check_prepared_from(identity, _read_manifest(folder)["identity"], folder)
        if progress:
            print(f"data: {folder} was prepared from these documents before and is used again")
        return open_dataset(folder, tokenizer)
    with write_folder_atomically(folder) as aside:
        _write(corpus, tokenizer, aside, identity, shard_tokens, progress)
    return open_dataset(folder, tokenizer)


def _check_prepared_from(wanted: dict, found: dict, folder: Path) -> None:
    different = differences(found, wanted)
    if different:
        raise DatasetError(
            f"{folder} was prepared from something else and is not overwritten; delete it or name another folder. {different}"
        )


def differences(found: object, wanted: object) -> str:
    """In words, what is different between two JSON-able objects: the first five places. Empty if nothing is."""
    every = list(_differences(found, json.loads(json.dumps(wanted))))
    return "; ".join(every[:5]) + (f"; and {len(every) - 5} more" if len(every) > 5 else "")


def _differences(found: object, wanted: object, key: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted(found.keys() | wanted.keys()):
            yield from _differences(found.get(name), wanted.get(name), f"{key}.{name}" if key else name)
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for number, pair in enumerate(zip(found, wanted, strict=True)):
            yield from _differences(*pair, f"{key}.{number}")
    elif found != wanted:
        yield f"{key}: found {found!r}, wanted {wanted!r}"


def _write(corpus: Corpus, tokenizer: Tokenizer, folder: Path, identity: dict, shard_tokens: int, progress: bool) -> None:
    """Tokenise everything into `folder`, the manifest last."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    sources: dict[str, _Tally] = {}
    domains: list[str] = []
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc="tokenise", unit="B", unit_scale=True, disable=not progress))
        writers = {split: stack.enter_context(closing(_SplitWriter(folder, split, shard_tokens))) for split in SPLITS}
        for batch in _batches(split_documents(corpus)):
            encoded = _encode([document for _, document in batch], tokenizer)
            for (split, document), ids in zip(batch, encoded, strict=True):
                tokens = np.array([*ids, tokenizer.end_of_document_id], dtype)
                writers[split].add(document, tokens, _index_of(document.domain, domains))
                tally = sources.setdefault(document.source, _Tally())
                before = tally.bytes
                tally.add(document, tokens)
                bar.update(tally.bytes - before)
        if not sources:
            raise DataError("there are no documents to prepare")
        for writer in writers.values():
            writer.finish()

    manifest = {
        "format_version": FORMAT_VERSION,
        "identity": identity,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "end_of_document_id": tokenizer.end_of_document_id,
        },
        "token_dtype": dtype.name,
        "domains": domains,
        "sources": {name: tally.summary() for name, tally in sources.items()},
        "splits": {split: {**writer.tally.summary(), "shards": writer.shards} for split, writer in writers.items()},
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _batches(documents: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch, characters = [], 0
    for split, document in documents:
        batch.append((split, document))
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _index_of(domain: str, domains: list[str]) -> int:
    """Where the domain is in the list, to which a new one is added."""
    if domain not in domains:
        if len(domains) == MOST_DOMAINS:
            raise DataError(f"the documents have more than {MOST_DOMAINS} domains, {domain!r} among them; wanted fewer")
        domains.append(domain)
    return domains.index(domain)


def _encode(documents: list[Document], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of each document. Long texts are encoded in pieces, so that one big file keeps all threads busy, too."""
    pieces = [[piece for stretch in _stretches(document) for piece in _pieces(stretch)] for document in documents]
    encoded = iter(tokenizer.encode_batch(list(chain.from_iterable(pieces)), os.cpu_count() or 1))
    ids = []
    for document, parts in zip(documents, pieces, strict=True):
        if document.marks:
            ids.append(_with_marks(document, encoded, tokenizer))
        else:
            ids.append(list(chain.from_iterable(islice(encoded, len(parts)))))
    return ids


def _stretches(document: Document) -> list[str]:
    """The text cut at its marks."""
    offsets = [0, *(offset for offset, _ in document.marks), len(document.text)]
    return [document.text[start:end] for start, end in pairwise(offsets)]


def _with_marks(document: Document, encoded: Iterator[list[int]], tokenizer: Tokenizer) -> list[int]:
    """The encoded pieces of a document, special tokens between its stretches."""
    specials = []
    for _, name in document.marks:
        if name not in tokenizer.special_ids:
            raise DataError(
                f"{document.source}, {document.name}: marked with {name!r}, which is no special token of the tokenizer; "
                f"it has {', '.join(tokenizer.special_ids)}. Use another tokenizer, or documents without this mark"
            )
        specials.append(tokenizer.special_ids[name])
    ids: list[int] = []
    for number, stretch in enumerate(_stretches(document)):
        ids += specials[number - 1 : number] if number else []
        ids += chain.from_iterable(islice(encoded, sum(1 for _ in _pieces(stretch))))
    return ids


def _pieces(text: str) -> Iterator[str]:
    """Cut after a newline before a character that is no space: no token of `minglm.tokenizer.PATTERN` crosses it."""
    start = 0
    while cut := _CUT.search(text, start + _PIECE_CHARACTERS):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


@dataclass
class _Tally:
    """How much was read, and the SHA-256 over the SHA-256 of each text with its marks."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    sha256: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def add(self, document: Document, tokens: np.ndarray) -> None:
        text = document.text.encode()
        self.documents += 1
        self.bytes += len(text)
        self.tokens += len(tokens)
        self.sha256.update(hashlib.sha256(text).digest() + json.dumps(document.marks).encode())

    def summary(self) -> dict[str, object]:
        return {**vars(self), "sha256": self.sha256.hexdigest()}


class _SplitWriter:
    """Writes the files of one split: shard after shard, then the documents' offsets and domains."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.tally = _Tally()
        self.shards: list[str] = []
        self.offsets = array("q", [0])
        self.domains = array("B")
        self.file: BinaryIO | None = None  # the shard being written
        self.room = 0  # tokens that it still takes

    def add(self, document: Document, tokens: np.ndarray, domain: int) -> None:
        if self.file is None:
            self.shards.append(f"{self.split}-{len(self.shards):05}.bin")
            self.file = (self.folder / self.shards[-1]).open("wb")
            self.room = self.shard_tokens
        self.file.write(tokens)
        self.room -= len(tokens)
        if self.room <= 0:
            self.close()
        self.tally.add(document, tokens)
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.domains.append(domain)

    def finish(self) -> None:
        self.close()
        for name, values in (("offsets", self.offsets), ("domains", self.domains)):
            # np.save straight into a file reports a full disk without saying that it is one.
            npy = io.BytesIO()
            np.save(npy, np.asarray(values))
            (self.folder / f"{self.split}-{name}.npy").write_bytes(npy.getvalue())

    def close(self) -> None:
        file, self.file = self.file, None
        if file is not None:
            file.close()
