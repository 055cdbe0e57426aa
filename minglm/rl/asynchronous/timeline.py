"""Who did what when: spans as JSON lines in `timeline.jsonl`, and the Gantt chart of trainer and workers."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.patches import Patch

from minglm.files import whole_lines
from minglm.rl.asynchronous.messages import Span
from minglm.train.plots import BLUE, GREEN, GREY, ORANGE, RED, drawing

COLOURS = {
    "training": BLUE,
    "sampling": GREEN,
    "episode": GREEN,
    "waiting": "#d9dce0",
    "weights": ORANGE,
    "evaluating": "#7d5ba6",
    "saving": GREY,
    "died": RED,
}
"""What is done -> how it is drawn. weights: written by the trainer, fetched and compared by a worker. waiting: of the trainer
for a batch, of a worker for environments or for work."""
SHOWN_SECONDS = 120.0
LONGEST_LINE = 2**16  # bytes, by far


class Recorder:
    """The spans of one process: what it does now, until it does something else."""

    def __init__(self, who: str, clock: Callable[[], float]):
        self.who, self.clock = who, clock
        self.spans: list[Span] = []
        self.what, self.start = "", clock()

    def now(self, what: str) -> None:
        if what != self.what:
            self._end()
            self.what = what

    def drain(self) -> list[Span]:
        """The spans since the last call, up to this moment."""
        self._end()
        spans, self.spans = self.spans, []
        return spans

    def _end(self) -> None:
        now = self.clock()
        if self.what:
            self.spans.append(Span(who=self.who, what=self.what, start=self.start, end=now))
        self.start = now


def write_spans(spans: Sequence[Span], path: Path) -> None:
    """Append them, in the place of a last line that a kill has cut off."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - LONGEST_LINE))
        cut_off = file.read().split(b"\n")[-1]
        file.truncate(end - len(cut_off))
        file.writelines(span.model_dump_json().encode() + b"\n" for span in spans)


def read_spans(path: Path, most_bytes: int = 2**23) -> list[Span]:
    """The spans at the end of a file; a last line that a kill has cut off is left out."""
    with path.open("rb") as file:
        cut = max(0, path.stat().st_size - most_bytes)
        file.seek(cut)
        lines = whole_lines(file.read())
    return [Span.model_validate_json(line) for line in lines[cut > 0 :]]


def plot_timeline(spans: Sequence[Span], path: Path, title: str, seconds: float = SHOWN_SECONDS) -> None:
    """Draw the last `seconds` as a PNG: a row for the trainer, one for each worker. Without spans nothing is drawn."""
    if not spans:
        return
    end = max(span.end for span in spans)
    start = max(min(span.start for span in spans), end - seconds)
    shown = [span for span in spans if span.end >= start]
    rows = sorted({span.who for span in shown}, key=lambda who: (who != "trainer", who))
    with drawing(path, 13, 1.6 + 0.5 * len(rows)) as figure:
        axes = figure.subplots()
        for row, who in enumerate(rows):
            for what in COLOURS:
                bars = [(s.start - start, s.end - s.start) for s in shown if (s.who, s.what) == (who, what)]
                if what == "died":
                    axes.plot([at for at, _ in bars], [row] * len(bars), "x", color=COLOURS[what], markersize=9)
                else:
                    overlap = {"alpha": 0.15} if what == "episode" else {}  # of many at a time
                    axes.broken_barh(bars, (row - 0.36, 0.72), color=COLOURS[what], linewidth=0, **overlap)
        axes.set(title=title, xlabel="seconds", xlim=(0, end - start), ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), rows)
        axes.grid(False, axis="y")
        seen = [what for what in COLOURS if any(span.what == what for span in shown)]
        handles = [Patch(color=COLOURS[what], label=what) for what in seen]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
