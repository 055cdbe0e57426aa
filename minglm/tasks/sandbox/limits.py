"""What a run may use, and what came of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

MIB = 1 << 20
KilledBy = Literal["cpu", "wall", "memory", "output"]


class SandboxError(RuntimeError):
    """No sandbox can be had, or a run that cannot be made. The message says why and what would help."""


@dataclass(frozen=True)
class Limits:
    """What one run may use."""

    cpu: float = 2.0
    """Seconds of processor time, of all its processes together."""
    wall: float = 5.0
    """Seconds by the clock."""
    memory: int = 256 * MIB
    """Bytes of address space of each process, and of resident memory of all of them together."""
    processes: int = 8
    """Processes and threads at a time, the first one counted. Level landlock cannot count, so it allows one process."""
    file_bytes: int = 8 * MIB
    """Bytes of a file that it writes."""
    output_bytes: int = MIB // 8
    """Bytes of each of stdout, stderr and report."""

    def __post_init__(self):
        for name, least in (("cpu", 0.01), ("wall", 0.01), ("memory", 32 * MIB), ("processes", 1)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise SandboxError(f"Limits.{name} = {value}: wanted a finite number of at least {least}")
        for name in ("file_bytes", "output_bytes"):
            if getattr(self, name) < 0:
                raise SandboxError(f"Limits.{name} = {getattr(self, name)}: wanted a number of bytes, at least 0")


class Outcome(NamedTuple):
    """What came of a run. Text is what the code wrote, so trust none of it; bytes that are no UTF-8 are replaced."""

    stdout: str
    stderr: str
    exit: int | None
    """The exit status; minus the signal that ended it; None if it was killed for a limit."""
    killed_by: KilledBy | None
    report: str = ""
    """What was written to file descriptor 3, which lies apart from what the code prints."""
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.exit == 0


def check_files(files: Mapping[str, str]) -> None:
    """Raises SandboxError for a path that is not plain, relative and inside the folder, or for content that is not text."""
    for path, text in files.items():
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or str(PurePosixPath(path)) != path:
            raise SandboxError(f"file {path!r}: wanted a plain relative path such as 'package/module.py'")
        if any(str(folder) in files for folder in PurePosixPath(path).parents):
            raise SandboxError(f"file {path!r}: one of the files has the name of its folder")
        if not path.isprintable() or len(path) > 200:
            raise SandboxError(f"file {path!r}: wanted at most 200 printable characters as a path")
        if not isinstance(text, str):
            raise SandboxError(f"file {path!r}: its content is {type(text).__name__}, wanted str")
