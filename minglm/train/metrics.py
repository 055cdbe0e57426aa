"""`metrics.jsonl`: one JSON object a line, each with the `step` after which it was taken and a `kind`.

    step      one optimiser step: losses, gradient norm, learning rate, MaxVio of each MoE layer, ...
    held_out  loss and bits per byte on held-out documents
    router    each expert's share of the step's tokens, and its selection bias, by layer
    sample    text that the model wrote

The keys in `WALL_CLOCK` differ from run to run; everything else is the same to the bit when the same recipe runs again on
the same machine, however often it was killed and resumed.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minglm.files import whole_lines

WALL_CLOCK = ("seconds", "tokens_per_second")
LAST_BYTES = 2**17  # of a file, that are read for its newest records


class MetricsError(ValueError):
    """A metrics file that cannot be read or written. The message names the file, and what is wrong."""


class MetricsFile:
    """Appends to a `metrics.jsonl`; each record is on disk when `write` returns.

    Where several ranks train together, the first has it enabled and writes for all.
    """

    def __init__(self, path: str | Path, enabled: bool = True):
        self.path, self.enabled = Path(path), enabled

    def cut_back(self, step: int) -> None:
        """Forget what was recorded after `step`, and a last line that was cut off when its writer was killed."""
        if not self.enabled or not self.path.exists():
            return
        lines = enumerate(whole_lines(self.path.read_bytes()), 1)
        kept = [line for number, line in lines if _parse(line, self.path, number)["step"] <= step]
        aside = self.path.with_name(self.path.name + ".cut-back")
        aside.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(aside, self.path)

    def write(self, *records: Mapping[str, Any]) -> None:
        """Append records. Raises ValueError for NaN or infinity, which JSON does not have, MetricsError for a full disk."""
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
        if not self.enabled:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())  # a checkpoint must never be newer than the metrics that lead up to it
        except OSError as error:
            raise MetricsError(
                f"{self.path}: cannot be written: {error.strerror}. No checkpoint is lost; the same command goes on "
                "from the newest one when this is put right"
            ) from error


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`, in order. Raises MetricsError for a line that is no record."""
    path = Path(path)
    return [_parse(line, path, number) for number, line in enumerate(whole_lines(path.read_bytes()), 1)]


def read_last(path: str | Path) -> list[dict[str, Any]]:
    """The newest records, a few hundred steps of them, in order; none where there is no file. What is watched while it grows is
    read again and again, so this does not read all of it."""
    path = Path(path)
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = max(0, file.seek(0, os.SEEK_END) - LAST_BYTES)
        file.seek(start)
        lines = whole_lines(file.read())
    return [_parse(line, path, number) for number, line in enumerate(lines[1:] if start else lines, 1)]


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("kind"), str):
        return record
    raise MetricsError(f"{path}, line {number}: found {line[:60]!r}; wanted a JSON object with a step and a kind")
