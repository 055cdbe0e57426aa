"""What the demo writes down beside what its parts leave: how long each has taken, on what, and which are done."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minglm.files import write_text_atomically
from minglm.report.parts import Part

RECORD = "demo.json"


@dataclass
class Record:
    """form: quick, default or full. seconds: of each part, over all times that it was gone on with."""

    form: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "Record":
        """That of the folder, or an empty one."""
        path = folder / RECORD
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls()

    def save(self, folder: Path) -> None:
        write_text_atomically(folder / RECORD, json.dumps(asdict(self), indent=1) + "\n")

    def left(self, parts: Sequence[Part]) -> float:
        """Seconds until all parts are done, about: what is measured of a kind of part says how long others of it take, and what
        is measured at all how fast this machine is."""
        known: dict[str, tuple[float, float]] = {}
        for part in parts:
            if part.done and part.name in self.seconds:
                measured, expected = known.get(part.kind, (0.0, 0.0))
                known[part.kind] = measured + self.seconds[part.name], expected + part.expected_seconds
        totals = [sum(column) for column in zip(*known.values(), strict=True)] or [1.0, 1.0]
        left = 0.0
        for part in parts:
            if part.done:
                continue
            measured, expected = known.get(part.kind, totals)
            whole, spent = part.expected_seconds * measured / expected, self.seconds.get(part.name, 0.0)
            share = part.share()
            if share is not None and share > 0.1:
                whole = spent / share if spent else whole
                left += whole * (1 - share)
            else:
                left += max(whole - spent, 0.05 * whole)
        return left


def this_machine() -> dict[str, str]:
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
