"""Documents to train on: the text that every installation of minglm already holds, or the user's own.

GLM-4.5 is trained on web pages, books and code (paper, section 2.2). Nothing is downloaded here: prose comes from the
manual, the docstrings and the package descriptions of the installed Python, code from its standard library and
packages. Their versions differ between machines, so a corpus carries an `identity` that says what was read.

    documents = default_documents()                  # or embedded_documents("python_topics", "code/numpy")
    documents = documents_from_path("my/notes")      # own text: a file, a folder, JSONL
    for split, document in split_documents(documents): ...
"""

import ast
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

TRAIN, HELD_OUT = "train", "held_out"
HELD_OUT_ONE_IN = 50
# Modules differ in size: this is the first number for which each embedded source holds out 1-4% of its text, too.
HELD_OUT_SALT = "58"
FEWEST_TO_SPLIT_BY_DOCUMENT = 500  # below it, one in 50 may well be none: with 500 the chance is 0.98^500 = 0.00004
TRAIN_SHARE_WITHIN_DOCUMENT = 0.9  # nanoGPT's split of tiny shakespeare

SHORTEST_PROSE = 200  # characters: shorter docstrings and descriptions say little
LARGEST_DIGIT_SHARE = 0.1  # above it, a source file is a table of numbers

CODE_SUFFIXES = frozenset(".py .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .rb .sh .sql .toml .yaml .yml .html .css".split())
PROSE_SUFFIXES = frozenset(".txt .text .md .rst .tex".split())
JSONL_SUFFIX = ".jsonl"


class DataError(ValueError):
    """Text that cannot be trained on. The message names the file, what was found there and what was wanted."""


@dataclass(frozen=True)
class Document:
    """One text.

    `name` says where it is from within its `source`; `domain` is what mixtures give weights to: "prose", "code" or any
    other name. `group` is set where a document must go to the same split as its siblings: the module that a source file or
    a docstring belongs to. `split` is set where a document says itself which one it belongs to ("train", "held_out").

    `marks` are the special tokens within the document: (offset, name) puts the token `name` before the character
    text[offset]. Special tokens come from marks alone: their names in `text` are text like any other.
    """

    text: str
    name: str
    source: str
    domain: str
    group: str | None = None
    split: str | None = None
    marks: tuple[tuple[int, str], ...] = ()

    def __post_init__(self):
        """Raises DataError for another split, and for marks that are out of order or outside the text."""
        if self.split not in (None, TRAIN, HELD_OUT):
            raise DataError(f"{self.source}, {self.name}: split is {self.split!r}; wanted {TRAIN!r}, {HELD_OUT!r} or None")
        offsets = [offset for offset, _ in self.marks]
        if offsets != sorted(offsets) or (offsets and not 0 <= offsets[0] <= offsets[-1] <= len(self.text)):
            raise DataError(
                f"{self.source}, {self.name}: marks stand at {offsets}; wanted rising offsets from 0 to {len(self.text)}"
            )


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read again and again, in the same order each time; blank ones and exact duplicates dropped.

    `identity` is a JSON-able mapping that differs whenever the documents would: source names with package versions, or
    a hash of the contents. It lets `minglm.data.shards.prepare` know, without reading them, documents tokenised before.
    """

    read: Callable[[], Iterable[Document]]
    identity: dict[str, object]

    def __iter__(self) -> Iterator[Document]:
        seen: set[bytes] = set()
        for document in self.read():
            digest = _digest(document.text) + _digest(json.dumps(document.marks))
            if digest not in seen and not _is_blank(document.text):
                seen.add(digest)
                yield document

    @classmethod
    def joined(cls, corpora: Iterable["Corpus"]) -> "Corpus":
        """The documents of all of them, one corpus after the other."""
        corpora = tuple(corpora)
        return cls(lambda: itertools.chain.from_iterable(corpora), {"joined": [corpus.identity for corpus in corpora]})

    @classmethod
    def from_documents(cls, documents: Iterable[Document]) -> "Corpus":
        """A corpus of documents that are in memory."""
        documents = tuple(documents)
        content = hashlib.sha256()
        for document in documents:
            for field in (document.text, document.name, document.source, document.domain, document.group or ""):
                content.update(_digest(field))
            content.update(_digest(json.dumps([document.split, document.marks])))
        return cls(lambda: documents, {"documents": len(documents), "sha256": content.hexdigest()})

    def with_splits(self) -> "Corpus":
        """The same text, each document saying its split: joined with others, a small corpus is still split by position."""
        return Corpus(lambda: (replace(document, split=split) for split, document in split_documents(self)), self.identity)

    def in_memory(self) -> "Corpus":
        """The same corpus, kept from the first reading on: for a corpus that is read more than once and is small."""
        return Corpus(functools.cache(lambda: tuple(self)), self.identity)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


# ---- held-out documents


def split_of(document: Document) -> str:
    """The split of a document: its own `split`, or by a hash of its content: one in 50 is "held_out", the rest is "train".

    Documents with a `group` go by a hash of the group's name instead, so that code is held out by whole modules of the
    standard library (`csv`, `asyncio`) and whole modules or sub-packages of other packages (`networkx.readwrite`),
    together with their docstrings: no held-out docstring stands in a training file. The choice depends on nothing else,
    so it is the same on every machine, and stays when documents are added.
    """
    if document.split is not None:
        return document.split
    digest = _digest(f"{HELD_OUT_SALT} {document.text if document.group is None else document.group}")
    return HELD_OUT if int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0 else TRAIN


def split_documents(documents: Iterable[Document]) -> Iterator[tuple[str, Document]]:
    """Yield (split, document) for each document.

    A corpus of at least 500 documents is split by document (`split_of`). In a smaller one (a novel, a folder of notes)
    one in 50 could be none, so each document is split by position: the first 90% of its characters train, the last 10%
    are held out. Documents that say their own split stay whole, and so do those with marks, which hold for a whole text.
    """
    documents = iter(documents)
    first = list(itertools.islice(documents, FEWEST_TO_SPLIT_BY_DOCUMENT))
    if len(first) == FEWEST_TO_SPLIT_BY_DOCUMENT:
        for document in itertools.chain(first, documents):
            yield split_of(document), document
        return
    for document in first:
        if document.split or document.marks:
            yield split_of(document), document
            continue
        cut = int(len(document.text) * TRAIN_SHARE_WITHIN_DOCUMENT)
        for split, text in ((TRAIN, document.text[:cut]), (HELD_OUT, document.text[cut:])):
            if text:
                yield split, replace(document, text=text)


# ---- embedded sources


@dataclass(frozen=True)
class Source:
    """An embedded source: a generator of documents, and what it read from (name -> version)."""

    domain: str
    read: Callable[[], Iterator[Document]]
    versions: Callable[[], dict[str, str]]


def _python_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics  # 0.76 MB of manual: worth importing only when it is read

    for name in sorted(topics):
        yield Document(topics[name], name, "python_topics", "prose")


def _package_descriptions() -> Iterator[Document]:
    for name, distribution in sorted(_distributions().items()):
        metadata = distribution.metadata
        description = metadata.get_payload() or metadata.get("Description") or ""
        if len(description) > SHORTEST_PROSE:
            yield Document(description, name, "package_descriptions", "prose")


def _distributions() -> dict[str, importlib.metadata.Distribution]:
    """Installed packages by name. minglm's own README changes without its version, so it is not one of them."""
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        if distribution.read_text("METADATA"):  # a broken uninstallation leaves folders without
            found.setdefault(distribution.metadata["Name"].lower(), distribution)  # the first one is the one imported
    found.pop("minglm", None)
    return found


def _docstrings(package: str | None) -> Iterator[Document]:
    source = f"docstrings/{package or 'standard_library'}"
    for module, text in source_files(package):
        for name, docstring in _docstrings_of(text, module):
            yield Document(docstring, name, source, "prose", _group(module, package))


def _docstrings_of(text: str, module: str) -> list[tuple[str, str]]:
    """(dotted name, docstring) of everything that `text` defines and describes at length."""
    with without_garbage_collector(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings are not ours to report
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # a file kept for another version of Python, a template
            return []
        found = ((name, ast.get_docstring(node)) for name, node in _definitions(tree, module))
        return [(name, docstring) for name, docstring in found if docstring and len(docstring) > SHORTEST_PROSE]


@contextmanager
def without_garbage_collector() -> Iterator[None]:
    """A syntax tree has no cycles, but its many nodes set the collector off, which then walks all that torch imported:
    half the time of reading docstrings."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _definitions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """`node` and all classes and functions defined within it, each with its dotted name."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.excepthandler):  # definitions under `if` and `try`
            yield from _definitions(child, name)


def _code(package: str | None) -> Iterator[Document]:
    source = f"code/{package or 'standard_library'}"
    for module, text in source_files(package):
        digits = sum(map(text.count, "0123456789\\"))
        if digits <= LARGEST_DIGIT_SHARE * len(text):
            yield Document(text, module, source, "code", _group(module, package))


def _group(module: str, package: str | None) -> str:
    """What is held out together: a top-level module of the standard library, up to three name parts of a package."""
    return ".".join(module.split(".")[: 1 if package is None else 3])


# Tests repeat what they test; site-packages is not the standard library; encodings are tables; pydoc_data is
# python_topics; _vendor and _bundled are copies of other packages.
_LEFT_OUT_FOLDERS = frozenset(
    "test tests testing idle_test benchmarks site-packages dist-packages lib-dynload __pycache__ "
    "encodings pydoc_data _vendor _bundled _antlr".split()
)


def source_files(package: str | None = None) -> Iterator[tuple[str, str]]:
    """(dotted module name, text) of each source file, sorted; `package` None is the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"]) if package is None else _package_folder(package)
    prefix = () if package is None else (package,)
    for path in _files_below(root, _LEFT_OUT_FOLDERS):
        *folders, file = path.relative_to(root).parts
        left_out = (
            file.startswith(("test_", "conftest", "_sysconfigdata"))  # the last holds this machine's build paths
            or any(folder.startswith("config-") for folder in folders)
        )
        if path.suffix != ".py" or left_out:
            continue
        try:
            with tokenize.open(path) as opened:  # heeds the file's own coding line
                text = opened.read()
        except (SyntaxError, UnicodeDecodeError):  # not Python source of this version
            continue
        module = (*prefix, *folders) if file == "__init__.py" else (*prefix, *folders, path.stem)
        yield ".".join(module), text


def _package_folder(package: str) -> Path:
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])  # found without importing it


def _files_below(folder: Path, left_out: Container[str] = ()) -> Iterator[Path]:
    """All files of a folder, sorted, hidden ones and those in folders named in `left_out` left out: the file system's own
    order differs between machines."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in left_out)
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(parent, name)


def _python_version() -> dict[str, str]:
    return {platform.python_implementation(): platform.python_version()}


def _package_version(package: str) -> dict[str, str]:
    try:
        return {package: importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(f"an embedded source reads the package {package!r}, which is not installed here") from error


def _all_versions() -> dict[str, str]:
    return {name: distribution.version for name, distribution in sorted(_distributions().items())}


_PACKAGES = ("matplotlib", "networkx", "numpy", "sympy", "torch")  # torch needs three of them, our plots the fourth

SOURCES: dict[str, Source] = {
    "python_topics": Source("prose", _python_topics, _python_version),
    "package_descriptions": Source("prose", _package_descriptions, _all_versions),
    "docstrings/standard_library": Source("prose", partial(_docstrings, None), _python_version),
    "code/standard_library": Source("code", partial(_code, None), _python_version),
    **{f"docstrings/{p}": Source("prose", partial(_docstrings, p), partial(_package_version, p)) for p in _PACKAGES},
    **{f"code/{p}": Source("code", partial(_code, p), partial(_package_version, p)) for p in _PACKAGES},
}

# About 20 MB, half prose and half code, read in a few seconds. Docstrings of sympy and torch would add 9 MB of prose,
# but parsing their 57 MB of source takes three times as long as all the rest.
DEFAULT_SOURCES = (
    "python_topics",
    "package_descriptions",
    "docstrings/standard_library",
    "docstrings/matplotlib",
    "docstrings/networkx",
    "docstrings/numpy",
    "code/standard_library",
)


def embedded_documents(*names: str) -> Corpus:
    """The documents of the named `SOURCES`, one source after the other. Raises DataError for an unknown name."""
    for name in names:
        if name not in SOURCES:
            raise DataError(f"unknown source {name!r}; the embedded sources are {', '.join(SOURCES)}")
    versions = {name: SOURCES[name].versions() for name in names}
    return Corpus(lambda: itertools.chain.from_iterable(SOURCES[name].read() for name in names), {"sources": versions})


def default_documents() -> Corpus:
    """What `python -m minglm` trains on: prose and code of this installation, the same whenever it is read here."""
    return embedded_documents(*DEFAULT_SOURCES)


# ---- own text


def documents_from_path(path: str | os.PathLike[str]) -> Corpus:
    """Own text: a file, or all text files of a folder, sorted by name, then those of the folders in it.

    A file is one document, a `.jsonl` file one document a line, from its key "text". Within a folder, files with other
    endings than `CODE_SUFFIXES`, `PROSE_SUFFIXES` and .jsonl, hidden files and empty files are passed over.

    Raises DataError, at once or while the documents are read, for: a missing path, a folder without text files, a file
    without text, bytes that are not UTF-8 (with their offset), a bad JSONL line (with its number).
    """
    path = Path(path)
    files = _own_files(path)
    source = path.resolve().name
    root = path if path.is_dir() else path.parent
    names = [file.relative_to(root).as_posix() for file in files]
    content = hashlib.sha256()
    for file, name in zip(files, names, strict=True):
        with file.open("rb") as opened:
            content.update(_digest(name) + hashlib.file_digest(opened, "sha256").digest())

    def read() -> Iterator[Document]:
        some = False
        for file, name in zip(files, names, strict=True):
            for document in _read_file(file, name, source):
                some = some or not _is_blank(document.text)
                yield document
        if not some:
            raise DataError(f"{path}: nothing but blanks; wanted text in UTF-8")

    return Corpus(read, {"path": source, "files": len(files), "sha256": content.hexdigest()})


def _own_files(path: Path) -> list[Path]:
    if path.is_file():
        if not path.stat().st_size:
            raise DataError(f"{path}: the file is empty; wanted text in UTF-8")
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    files = [file for file in _files_below(path) if _domain(file) and file.is_file() and file.stat().st_size]
    if not files:
        endings = " ".join(sorted(CODE_SUFFIXES | PROSE_SUFFIXES | {JSONL_SUFFIX}))
        raise DataError(f"{path}: no text in this folder; wanted files that are not empty and end in {endings}")
    return files


def _domain(file: Path) -> str | None:
    suffix = file.suffix.lower()
    if suffix in CODE_SUFFIXES:
        return "code"
    return "prose" if suffix in PROSE_SUFFIXES or suffix == JSONL_SUFFIX else None


def _read_file(file: Path, name: str, source: str) -> Iterator[Document]:
    if file.suffix.lower() == JSONL_SUFFIX:
        yield from _read_jsonl(file, name, source)
    elif text := _decode(file.read_bytes(), file):
        yield Document(text, name, source, _domain(file) or "prose")


def _decode(data: bytes, file: Path, offset: int = 0) -> str:
    try:
        return data.decode().removeprefix("\ufeff")  # the mark with which Windows likes to open its files
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not UTF-8: byte {data[error.start]:#04x} at offset {offset + error.start} ({error.reason}); "
            "convert the file, for example with iconv"
        ) from error


def _read_jsonl(file: Path, name: str, source: str) -> Iterator[Document]:
    offset = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = _decode(line, file, offset)
            offset += len(line)
            if not _is_blank(text):
                yield Document(_text_of_json(text, f"{file}, line {number}"), f"{name}:{number}", source, "prose")


def _text_of_json(line: str, where: str) -> str:
    wanted = 'wanted an object like {"text": "..."}'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # RecursionError: lists in lists in lists
        raise DataError(f"{where}: not JSON ({error}); found {line[:60].strip()!r}; {wanted}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: found {line[:60].strip()!r}; {wanted}")
    if "text" not in record:
        raise DataError(f'{where}: no key "text" among {sorted(record)}; {wanted}')
    text = record["text"]
    if not isinstance(text, str):
        raise DataError(f'{where}: "text" is {json.dumps(text)[:60]}; wanted a string')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, \ud800
        raise DataError(f'{where}: "text" is not Unicode text: {error}') from error
    return text
