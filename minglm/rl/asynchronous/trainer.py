"""The asynchronous loop: as the synchronous one, but for where samples come from and where weights go."""

import os
import random
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minglm.rl.asynchronous.buffer import TRIES, Batch, Buffer
from minglm.rl.asynchronous.exchange import Exchange, Journal, replay
from minglm.rl.asynchronous.messages import Order, Result, Span
from minglm.rl.asynchronous.server import Server
from minglm.rl.asynchronous.timeline import Recorder, plot_timeline, read_spans, write_spans
from minglm.rl.asynchronous.weights import checksums, compare, read_metadata_of, write_weights
from minglm.rl.loop import Loop
from minglm.rl.practice import Practice, RLError
from minglm.train.stop import StopRequest
from minglm.train.trainer import Outcome

LOOK_SECONDS = 0.2  # from one look after workers to the next, while the trainer waits
WORKER = "python -m minglm.rl.asynchronous.worker"
FAREWELL_SECONDS = 5.0  # for workers to end when they have been told to


class BufferedLoop(Loop, ABC):
    """A loop whose batches come from an exchange. Derived classes say how it waits for them and how weights go out."""

    clock: Any = time.time  # of leases and of the timeline: seconds

    def __init__(self, recipe, folder, tokenizer, config, device, base, checkpoint):
        self.saved_buffer: dict[str, Any] | None = None
        self.journal_starts: dict[int, int] = {}  # checkpoint's step -> the first file of the journal that it lacks
        super().__init__(recipe, folder, tokenizer, config, device, base, checkpoint)
        own, sampling = recipe.asynchronous, recipe.sampling
        if checkpoint is None:  # of a run that was killed before its first one
            for name in ("journal", "weights"):
                shutil.rmtree(folder.path / name, ignore_errors=True)
            (folder.path / "timeline.jsonl").unlink(missing_ok=True)
        self.buffer = Buffer(sampling.group_size, sampling.groups, sampling.rounds, own.max_staleness)
        self.journal = Journal(folder.path / "journal")
        if self.saved_buffer is not None:
            self.buffer.load_state_dict(self.saved_buffer)
            replay(self.buffer, self.journal.read(self.journal_starts[self.step]))
        self.exchange = Exchange(self.buffer, self.journal.write, self.draw, self.clock, own.lease_seconds)
        self.recorder = Recorder("trainer", self.clock)
        self.timeline = folder.path / "timeline.jsonl"

    @abstractmethod
    def wait_for(self, step: int) -> Batch:
        """The batch of a step, when it is due."""

    @abstractmethod
    def alone(self) -> AbstractContextManager[Any]:
        """What keeps others from the exchange."""

    def draw(self, version: int, number: int) -> dict[str, Any]:
        """The next problem, by what curriculum and temperature know now."""
        (family, level), draw = self.curriculum.pick(version, number)
        seed = random.Random(f"{self.recipe.seed} {number}").getrandbits(62)
        limits = self.limits_at(version + 1).in_mode_of(self.recipe.sampling, number)
        return Order(
            family=family,
            level=level,
            draw=draw,
            seed=seed,
            tokens=limits.tokens,
            temperature=float(limits.temperature),
            thinking=limits.thinking,
            opens_thinking=limits.opens_thinking,
        ).model_dump()

    def practise(self) -> Practice:
        self.recorder.now("waiting")
        batch = self.wait_for(self.step)
        self.recorder.now("training")
        found = Practice(rounds=1)
        taken = (*batch.groups, *batch.aside)
        for group in taken:
            order = Order(**group.order)
            problem = order.problem()
            attempts = [Result(**slot.result).trajectory(problem) for slot in group.slots]
            found.add(attempts, ((order.family, order.level), order.draw), self.buffer.rounds > 1)
        versions = [{version for version in one.versions if version >= 0} for one in found.trajectories]
        with self.alone():
            found.tell(self.curriculum, self.step)
            found.numbers = {
                "groups": [group.number for group in batch.groups],
                "groups_open": len(self.buffer.open_groups),
                "leases_expired": self.exchange.expired,
                # Attempts whose environment failed, which others took the place of: lost, though none of them is in `failed`.
                "attempts_repeated": sum(min(slot.failures, TRIES - 1) for group in taken for slot in group.slots),
                # The share of attempts whose tokens are of several versions.
                "mixed_versions": sum(len(own) > 1 for own in versions) / max(1, len(versions)),
            }
        return found

    def train_step(self) -> float:
        reward = super().train_step()
        self.publish()
        return reward

    def publish(self) -> None:
        """Let workers have the weights of this step; those of a step that was done before must be the same ones again."""
        self.recorder.now("weights")
        if self.step >= self.buffer.version:  # else a step done again, on the way to what workers have already
            self.send_weights()
        with self.alone():
            if self.step > self.buffer.version:
                self.exchange.publish()
            self.buffer.forget(self.step)
            write_spans(self.recorder.drain(), self.timeline)

    def send_weights(self) -> None:
        """Where workers have weights of their own."""

    def evaluate(self, bar: tqdm) -> None:
        self.recorder.now("evaluating")
        super().evaluate(bar)

    def choose_temperature(self) -> None:
        self.recorder.now("evaluating")
        super().choose_temperature()

    def own_state(self) -> dict[str, Any]:
        with self.alone():
            self.journal_starts[self.step] = self.journal.start()
            buffer = self.buffer.state_dict()
        return super().own_state() | {"buffer": buffer, "journal_starts": list(self.journal_starts.items())}

    def load_own_state(self, state: dict[str, Any]) -> None:
        super().load_own_state(state)
        self.saved_buffer, self.journal_starts = state["buffer"], dict(state["journal_starts"])

    def save(self) -> None:
        self.recorder.now("saving")
        super().save()
        kept = {int(folder.name.removeprefix("step-")) for folder in self.folder.checkpoints()}
        self.journal_starts = {step: first for step, first in self.journal_starts.items() if step in kept}
        self.journal.forget(min(self.journal_starts.values()))
        if self.timeline.exists():
            title = f"minglm: {self.folder.path.name}, trainer and workers"
            plot_timeline(read_spans(self.timeline), self.folder.path / "timeline.png", title)


class AsynchronousLoop(BufferedLoop):
    """With rollout workers in processes of their own, over HTTP."""

    def __init__(self, recipe, folder, tokenizer, config, device, base, checkpoint):
        super().__init__(recipe, folder, tokenizer, config, device, base, checkpoint)
        (folder.path / "weights").mkdir(exist_ok=True)
        self.server = Server(
            self.exchange, self.weights_file, self._record, recipe.asynchronous.host, folder.path / "server.json"
        )
        self.workers = Workers(folder.path, recipe.asynchronous.workers)

    def run(self, stop: StopRequest) -> Outcome:
        if self.finished:
            return super().run(stop)  # which has nothing to do
        self.stop = stop
        print(f"rollout workers: {self.workers.count} here; for more: {WORKER} {self.folder.path}\n")
        with ExitStack() as stack:
            stack.enter_context(self.server)
            self.publish()  # what the run starts from; what it comes back to is published when it is there again
            stack.enter_context(self.workers.running())
            try:
                return super().run(stop)
            finally:
                self.server.say_stop(self.recipe.asynchronous.lease_seconds)  # who is not heard of for so long is dead

    def alone(self) -> AbstractContextManager[Any]:
        return self.server.lock

    def wait_for(self, step: int) -> Batch:
        with self.server.lock:
            while (batch := self.exchange.take(step)) is None:
                if (failure := self.server.failure) is not None:
                    raise RLError(f"step {step}: a worker's request failed: {failure}") from failure
                for dead in self.workers.look_after():
                    self.exchange.lost(dead)
                    now = self.clock()
                    self._record([Span(who=dead.split(".")[0], what="died", start=now, end=now)])
                self.exchange.give_up_silent()
                if self.stop.signal is not None and not self.exchange.heard:
                    raise RLError(f"step {step}: asked to stop, and no worker is there to finish it; the same command goes on")
                self.server.lock.wait(LOOK_SECONDS)
        return batch

    def weights_file(self, version: int) -> Path:
        return self.folder.path / "weights" / f"version-{version}.safetensors"

    def send_weights(self) -> None:
        path = self.weights_file(self.step)
        if path.exists():  # a step done again
            _, before = read_metadata_of(path)
            compare(f"step {self.step}, done again", before, checksums(self.engine.model))
            return
        write_weights(self.engine.model, self.step, path)
        for old in path.parent.glob("version-*.safetensors"):
            if old != path:
                old.unlink()

    def _record(self, spans: list[Span]) -> None:
        write_spans(spans, self.timeline)


class Workers:
    """Rollout processes on this machine. They end soon after their trainer, however it ends."""

    def __init__(self, run_folder: Path, count: int):
        self.run_folder, self.count = run_folder, count
        self.started = 0
        self.processes: dict[str, subprocess.Popen] = {}  # by name
        self.logs = run_folder / "workers"

    @contextmanager
    def running(self) -> Iterator[None]:
        for number in range(self.count):
            self._start(number)
        try:
            yield
        finally:
            for process in self.processes.values():
                try:
                    process.wait(FAREWELL_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def look_after(self) -> list[str]:
        """Start those again that were killed -> their names. Raises RLError for one that ended by a fault of its own."""
        dead = [(name, process.returncode) for name, process in self.processes.items() if process.poll() is not None]
        for name, code in dead:
            if code >= 0:
                raise RLError(f"worker {name} ended with {code}: see {self.logs / name}.log")
            del self.processes[name]
            self._start(int(name.split(".")[0].removeprefix("worker-")))
        return [name for name, _ in dead]

    def _start(self, number: int) -> None:
        self.logs.mkdir(exist_ok=True)
        name = f"worker-{number}.{os.getpid()}.{self.started}"
        self.started += 1
        command = [sys.executable, "-m", "minglm.rl.asynchronous.worker", str(self.run_folder), "--name", name]
        with (self.logs / f"{name}.log").open("w") as log:
            # In a session of its own: Ctrl-C is for the trainer, which still wants its step finished.
            self.processes[name] = subprocess.Popen(
                [*command, "--parent", str(os.getpid())], stdout=log, stderr=log, start_new_session=True
            )
