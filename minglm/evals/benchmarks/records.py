"""Records of a benchmark's files: JSON Lines, JSON, CSV, parquet, with the place of each for complaints.

A malformed record is refused as a whole, with file, line, key, what was found and what is wanted: a benchmark that
silently loses records is another benchmark.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minglm.evals.measure import EvaluationError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
WANTED = {str: "a text", int: "a whole number", list: "a list", dict: "an object", bool: "true or false"}
csv.field_size_limit(2**30)  # BrowseComp's and GPQA's cells are long


class RecordError(EvaluationError):
    """A file or record that is not in the published layout."""


@dataclass(frozen=True)
class Record:
    """One record. place: `file:line`, or `file[number]` where a format has no lines."""

    place: str
    values: dict[str, Any]

    def fail(self, key: str, found: Any, wanted: str) -> RecordError:
        shown = "is missing" if found is None else f"is {found!r:.120}"
        return RecordError(f"{self.place}: {key} {shown}; wanted {wanted}")

    def take(self, keys: str | Sequence[str], kind: type, default: Any = None) -> Any:
        """The value of the first key that is there (publishers disagree on capitals). Raises RecordError for none of them
        without a default, another type, or an empty text."""
        names = [keys] if isinstance(keys, str) else list(keys)
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
                value = str(value)  # parquet and CSV type numbers as they please
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise self.fail(name, value, WANTED[kind])
            if kind is str and not value.strip():
                if default is not None:
                    return default
                raise self.fail(name, value, "a text that is not empty")
            return value
        if default is None:
            raise self.fail(" or ".join(names), None, WANTED[kind])
        return default

    def take_json(self, key: str, kind: type, default: Any = None) -> Any:
        """A value that some files hold as it is and others as the text of its JSON."""
        value = self.values.get(key, default)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise self.fail(key, value, f"{WANTED[kind]}, or the JSON of one") from None
        if not isinstance(value, kind):
            raise self.fail(key, value, f"{WANTED[kind]}, or the JSON of one")
        return value

    def take_texts(self, key: str, fewest: int = 1) -> list[str]:
        """A list of texts. Raises RecordError for fewer than `fewest`, or others in it."""
        values = self.take_json(key, list)
        if len(values) < fewest or not all(isinstance(value, str) for value in values):
            raise self.fail(key, values, f"a list of at least {fewest} texts")
        return values


def files_of(path: Path) -> list[Path]:
    """The file, or all files of a folder that can be read, in order. Raises RecordError if there are none."""
    found = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not found or found[0].suffix not in SUFFIXES:
        raise RecordError(f"{path}: found no file to read; wanted one of {', '.join(SUFFIXES)}, or a folder with some")
    return found


def records(path: Path) -> Iterator[Record]:
    """All records of a file, or of a folder's files. Raises RecordError with the place of what cannot be read."""
    for file in files_of(path):
        try:
            yield from _READERS[file.suffix](file)
        except UnicodeDecodeError as error:
            raise RecordError(f"{file}: found bytes that are no UTF-8 ({error}); wanted text") from None
        except csv.Error as error:
            raise RecordError(f"{file}: this is no CSV file: {error}") from None


def _checked(place: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise RecordError(f"{place}: found {value!r:.120}; wanted an object with the benchmark's keys")
    return Record(place, value)


def _parsed(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RecordError(f"{place}: found {text!r:.80}, which is no JSON ({error}); wanted an object") from None


def _lines(file: Path) -> Iterator[Record]:
    with file.open(encoding="utf-8") as lines:  # str.splitlines would also cut at U+2028 and the like inside of a text
        for number, line in enumerate(lines, 1):
            if text := line.strip():
                yield _checked(f"{file}:{number}", _parsed(f"{file}:{number}", text))


def _json(file: Path) -> Iterator[Record]:
    """A list of records, one record, or lines: BFCL's .json files are JSON Lines."""
    text = file.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except ValueError:
        if "\n" not in text.strip():
            raise RecordError(f"{file}: found {text!r:.80}, which is no JSON; wanted a list of records") from None
        yield from _lines(file)
        return
    if isinstance(found, list):
        for number, value in enumerate(found):
            yield _checked(f"{file}[{number}]", value)
    else:
        yield _checked(str(file), found)


def _csv(file: Path) -> Iterator[Record]:
    with open(file, encoding="utf-8-sig", newline="") as opened:
        reader = csv.DictReader(opened)
        _ = reader.fieldnames  # which reads the first line
        while True:
            place = f"{file}:{reader.line_num + 1}"
            row = next(reader, None)
            if row is None:
                return
            if None in row or None in row.values():
                raise RecordError(f"{place}: found another number of cells than the header's {len(reader.fieldnames)}")
            yield Record(place, row)


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise RecordError(f"{file}: this is no parquet file: {error}") from None
    for number, row in enumerate(rows):
        yield Record(f"{file}[{number}]", row)


_READERS = {".jsonl": _lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}
