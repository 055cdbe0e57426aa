"""The buffer at work: leases that run out by a clock, and a journal by which all of it survives its process.

Whatever changes the buffer is written to the journal, and is on the disk, before anybody hears of it. A buffer is a function
of its calls, so the journal's calls on the newest checkpoint's buffer give the very state that was lost: what was delivered
stays delivered, and the steps since the checkpoint are taken again with the same batches, which gives the same weights to the
bit. So the versions that tokens carry stay true.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minglm.files import whole_lines
from minglm.rl.asynchronous.buffer import Batch, Buffer, Lease

Call = tuple[str, list[Any]]  # a method of Buffer and its arguments


class JournalError(ValueError):
    """A journal that cannot be read. The message names file and line."""


class Journal:
    """Calls, one a line as JSON, in numbered files; a checkpoint starts the next file and holds what all before it come to."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.file = None
        self.start()

    def start(self) -> int:
        """Go on in a new file -> its number."""
        number = max(self._numbers(), default=-1) + 1
        self.close()
        self.file = self._path(number).open("x", encoding="utf-8")
        return number

    def write(self, calls: Sequence[Call]) -> None:
        """Append; on the disk when this returns."""
        self.file.write("".join(json.dumps(call) + "\n" for call in calls))
        self.file.flush()
        os.fsync(self.file.fileno())

    def read(self, first: int) -> list[Call]:
        """All calls of the files from number `first` on. Raises JournalError for a line that is none; the last of a file may
        be cut off, by a kill, and nobody has heard of it then."""
        calls = []
        for number in sorted(n for n in self._numbers() if n >= first):
            path = self._path(number)
            for line, text in enumerate(whole_lines(path.read_bytes()), 1):
                try:
                    name, arguments = json.loads(text)
                except (ValueError, TypeError):  # the latter for JSON that is no pair
                    raise JournalError(f"{path}, line {line}: found {text[:60]!r}; wanted [name, arguments]") from None
                calls.append((name, arguments))
        return calls

    def forget(self, first: int) -> None:
        """Delete the files before number `first`."""
        for number in self._numbers():
            if number < first:
                self._path(number).unlink()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl"

    def _numbers(self) -> list[int]:
        return [int(match[1]) for path in self.folder.iterdir() if (match := re.fullmatch(r"(\d+)\.jsonl", path.name))]


class Answer(NamedTuple):
    """To a worker. version: what it is to sample with; leases: what else to attempt; void: its leases that no longer hold."""

    version: int
    leases: list[Lease]
    void: list[int]


class Exchange:
    """Between workers and trainer; one thread at a time.

    draw: (version, number of a group) -> its order, which JSON can hold. clock: seconds, from anywhere. A worker that has not
    been heard of for `lease_seconds` loses its leases.
    """

    def __init__(
        self,
        buffer: Buffer,
        write: Callable[[Sequence[Call]], None],
        draw: Callable[[int, int], Any],
        clock: Callable[[], float],
        lease_seconds: float,
    ):
        self.buffer, self.write, self.draw, self.clock, self.lease_seconds = buffer, write, draw, clock, lease_seconds
        self.expired = 0  # leases, since this process began
        # After a restart everybody is given the time to be heard of again.
        self.heard = {slot.worker: clock() for group in buffer.open_groups.values() for slot in group.slots if slot.worker}
        self._calls: list[Call] = []

    def poll(self, worker: str, version: int, room: int, held: Sequence[int]) -> Answer:
        """A worker is alive, samples with `version`, has `held` under way and takes up to `room` attempts more.

        It gets none before it has the published version, so that no token is older than its lease.
        """
        self.heard[worker] = self.clock()
        # What it does not know of was lost on the way to it.
        under_way = self.buffer.leases(worker)
        self._give_up([lease for lease in under_way if lease not in held])
        leases: list[Lease] = []
        while version == self.buffer.version and len(leases) < room:
            if (lease := self._do("lease", worker)) is not None:
                leases.append(lease)
            elif self.buffer.admits:
                self._do("open", self.draw(self.buffer.version, self.buffer.opened))
            else:
                break
        self._commit()
        return Answer(self.buffer.version, leases, [lease for lease in held if lease not in under_way])

    def deliver(self, worker: str, lease: int, result: Any, reward: float | None, oldest: int) -> bool:
        """See `Buffer.deliver`. The same delivery may come any number of times."""
        self.heard[worker] = self.clock()
        accepted = self._do("deliver", lease, result, reward, oldest)
        self._commit()
        return accepted

    def give_up_silent(self) -> None:
        """Free what workers hold that have not been heard of for too long."""
        now = self.clock()
        for worker in [name for name, heard in self.heard.items() if now - heard > self.lease_seconds]:
            self.lost(worker)

    def lost(self, worker: str) -> None:
        """A worker is dead: what it held is free again."""
        self.heard.pop(worker, None)
        self._give_up(self.buffer.leases(worker))
        self._commit()

    def take(self, step: int) -> Batch | None:
        """The batch of this step: again if it was taken before, and None while it is not due."""
        if step in self.buffer.taken:
            return self.buffer.taken[step]
        if self.buffer.due is None:
            return None
        batch = self._do("take")
        self._commit()
        return batch

    def publish(self) -> None:
        self._do("publish")
        self._commit()

    def _give_up(self, leases: list[int]) -> None:
        if leases:
            self.expired += len(leases)
            self._do("give_up", leases)

    def _do(self, name: str, *arguments: Any) -> Any:
        found = getattr(self.buffer, name)(*arguments)
        if found is not None or name != "lease":  # a lease that was not given has changed nothing
            self._calls.append((name, list(arguments)))
        return found

    def _commit(self) -> None:
        if self._calls:
            calls, self._calls = self._calls, []
            self.write(calls)


def replay(buffer: Buffer, calls: Sequence[Call]) -> None:
    """Bring a buffer to where the journal's calls lead."""
    for name, arguments in calls:
        getattr(buffer, name)(*arguments)
