"""One display for the whole story: which part runs, how long all will take, the newest score; and the page, kept fresh.

A thread looks into the folder now and then; it computes nothing that the parts need, so they are the same with it and without.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

from minglm.posttrain.experts import exam
from minglm.posttrain.experts.harvest import read_counts
from minglm.posttrain.experts.pipeline import GATE
from minglm.report.html import duration
from minglm.report.page import write_report
from minglm.report.parts import Part, Story, read_json
from minglm.report.record import Record, this_machine
from minglm.train.metrics import read_last

LOOK_SECONDS = 2.0
SAVE_SECONDS = 5.0
PAGE_SECONDS = 45.0
LINE_SECONDS = 60.0  # between lines where there is no terminal


class Progress:
    """Within this context the story is watched. Time counts for the parts that are under way, in equal shares.

    What goes wrong in the thread is raised when the context ends, unless something else is.
    """

    def __init__(self, story: Story, form: str, out: TextIO | None = None):
        self.story, self.out = story, out or sys.stderr
        self.parts = story.parts()
        self.record = Record.of(story.folder)
        self.record.form, self.record.machine = form, this_machine()
        self.record.save(story.folder)
        self.report = write_report(story.folder)
        self._score = ""  # the newest one of the parts that are done
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
                with contextlib.suppress(FileNotFoundError):  # a part that begins takes away what it had not finished
                    self._look()
        except BaseException as error:
            self.error = error

    def _look(self, last: bool = False) -> None:
        """Give the time since the last look to the parts that are under way, and show, save and write what is due."""
        now, record = time.monotonic(), self.record
        current = self._under_way()
        for part in current:
            record.seconds[part.name] = record.seconds.get(part.name, 0.0) + (now - self._looked) / len(current)
        self._looked = now
        ended = [part for part in self.parts if part.done and part.name not in record.done]
        for part in ended:
            record.seconds.setdefault(part.name, 0.0)
            record.done.append(part.name)
            found = score(self.story, part)
            self._score = found or self._score
            self._say(f"{part.title:<32}{duration(record.seconds[part.name]):>8}   {found}".rstrip())
        if ended or last or now - self._saved > SAVE_SECONDS:
            record.save(self.story.folder)
            self._saved = now
        if ended or last or now - self._paged > PAGE_SECONDS:
            write_report(self.story.folder)
            self._paged = time.monotonic()
        if current and not last:
            self._show(current, now)

    def _under_way(self) -> list[Part]:
        """The first part that is not done, and those that have begun beside it."""
        left = [part for part in self.parts if part.name not in self.record.done]
        return left[:1] + [part for part in left[1:] if part.share()]

    def _show(self, parts: Sequence[Part], now: float) -> None:
        done, left = len(self.record.done), self.left()
        spent = sum(self.record.seconds.values())
        titles = (part.title + (f" {share:.0%}" if (share := part.share()) else "") for part in parts)
        what = f"{done + 1}/{len(self.parts)} {', '.join(titles)}"
        told = ", ".join(filter(None, [f"about {duration(left)} left", score(self.story, parts[0]) or self._score]))
        self._bar.n = round(1000 * spent / (spent + left))
        self._bar.set_description_str(f"{what}, {told}")
        if self._bar.disable and now - self._told > LINE_SECONDS:
            self._say(f"  {what}, {told}")
            self._told = now

    def _say(self, line: str) -> None:
        self._bar.clear()
        print(line, file=self.out, flush=True)


def score(story: Story, part: Part) -> str:
    """The newest number that says how good the model of a part is, in a few words."""
    if part.kind == "answers" and part.done:
        counts = read_counts(part.result)
        return f"{sum(counts['kept'].values()):,} samples of {counts['attempts']:,} answers"
    if part.kind == "exam" and part.done:
        if part.result.name == GATE:
            return f"score {read_json(part.result)['score']:.3f}"
        return f"score {exam.score(exam.read_attempts(part.result.parent), story.experts.domain_of):.3f}"
    records = [] if part.metrics is None else read_last(part.metrics)
    for record in reversed([one for one in records if one["step"] <= part.steps[1]]):
        if record["kind"] == "held_out" and part.kind == "rl":
            return f"held-out reward {record['rewards']['all'][0]:.3f}"
        if record["kind"] == "held_out" and part.kind == "training":
            return f"held-out {record['bits_per_byte']:.3f} bits/byte"
        if record["kind"] == "held_out":
            return f"held-out {record['loss']:.3f} nats/token"
        if record["kind"] == "step" and part.kind == "rl":
            return f"reward {record['reward']:.3f}"
    return ""
