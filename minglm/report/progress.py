"""One display for the whole story: which part runs, how long all will take, the newest score; and the page, kept fresh.

A thread looks into the folder now and then; it computes nothing that the parts need, so they are the same with it and without.
"""

import sys
import threading
import time
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

from minglm.report.html import duration
from minglm.report.page import write_report
from minglm.report.parts import Part, Story
from minglm.report.record import Record, this_machine
from minglm.train.metrics import read_last

LOOK_SECONDS = 2.0
SAVE_SECONDS = 5.0
PAGE_SECONDS = 45.0
LINE_SECONDS = 60.0  # between lines where there is no terminal


class Progress:
    """Within this context the story is watched. Time counts for the first part that is not done.

    What goes wrong in the thread is raised when the context ends, unless something else is.
    """

    def __init__(self, story: Story, form: str, out: TextIO | None = None):
        self.story, self.out = story, out or sys.stderr
        self.parts = story.parts()
        self.record = Record.of(story.folder)
        self.record.form, self.record.machine = form, this_machine()
        self.report = write_report(story.folder)
        self.error: BaseException | None = None
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def left(self) -> float:
        return self.record.left(self.parts)

    def __enter__(self) -> Self:
        self.record.done = [part.name for part in self.parts if part.done]
        self.record.save(self.story.folder)
        self._looked = self._saved = self._told = time.monotonic()
        self._paged = 0.0
        self._bar = tqdm(
            total=1000,
            file=self.out,
            bar_format="{bar:20} {desc}",
            dynamic_ncols=True,
            leave=False,
            disable=not self.out.isatty(),  # a log file has lines instead
        )
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finished.set()
        self._thread.join()
        self._bar.close()
        if kind is None and self.error is not None:
            raise self.error
        if self.error is None:
            self._look(last=True)

    def _watch(self) -> None:
        try:
            while not self._finished.wait(LOOK_SECONDS):
                self._look()
        except BaseException as error:
            self.error = error

    def _look(self, last: bool = False) -> None:
        """Give the time since the last look to the part that is under way, and show, save and write what is due."""
        now, record = time.monotonic(), self.record
        current = next((part for part in self.parts if part.name not in record.done), None)
        if current is not None:
            record.seconds[current.name] = record.seconds.get(current.name, 0.0) + now - self._looked
        self._looked = now
        ended = [part for part in self.parts if part.done and part.name not in record.done]
        for part in ended:
            record.seconds.setdefault(part.name, 0.0)
            record.done.append(part.name)
            self._say(f"{part.title:<32}{duration(record.seconds[part.name]):>8}   {score(part)}".rstrip())
        if ended or last or now - self._saved > SAVE_SECONDS:
            record.save(self.story.folder)
            self._saved = now
        if ended or last or now - self._paged > PAGE_SECONDS:
            write_report(self.story.folder)
            self._paged = time.monotonic()
        if current is not None and not last:
            self._show(current, now)

    def _show(self, part: Part, now: float) -> None:
        done, share, left = len(self.record.done), part.share(), self.left()
        spent = sum(self.record.seconds.values())
        what = f"{done + 1}/{len(self.parts)} {part.title}" + (f" {share:.0%}" if share else "")
        told = ", ".join(filter(None, [f"about {duration(left)} left", score(part)]))
        self._bar.n = round(1000 * spent / (spent + left))
        self._bar.set_description_str(f"{what}, {told}")
        if self._bar.disable and now - self._told > LINE_SECONDS:
            self._say(f"  {what}, {told}")
            self._told = now

    def _say(self, line: str) -> None:
        self._bar.clear()
        print(line, file=self.out, flush=True)


def score(part: Part) -> str:
    """The newest number that says how good the model of a part is, in a few words."""
    if part.metrics is None:
        return ""
    for record in reversed(read_last(part.metrics)):
        if record["step"] > part.steps[1]:
            continue
        if record["kind"] == "held_out" and "rewards" in record:
            return f"held-out reward {record['rewards']['all'][0]:.3f}"
        if record["kind"] == "held_out":
            measure = "bits_per_byte" if part.kind == "training" else "loss"
            return f"held-out {record[measure]:.3f} {'bits/byte' if part.kind == 'training' else 'nats/token'}"
        if record["kind"] == "step" and "reward" in record:
            return f"reward {record['reward']:.3f}"
    return ""
