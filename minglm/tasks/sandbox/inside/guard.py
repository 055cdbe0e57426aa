"""Watches one run from outside its walls, ends it at its limits, and tells the caller what came of it."""

import contextlib
import json
import os
import selectors
import signal
import socket
import time
from typing import Any

import usage
import walls
import wire

_LOOK_EVERY = 0.02  # seconds between two looks at processor time and memory
_SETUP_SECONDS = 30.0
_DRAIN_SECONDS = 2.0
_OUTPUTS = ("stdout", "stderr", "report")


def serve(connection: socket.socket, settings: dict[str, Any]) -> None:
    """Make the walls, wait for a job, see it through, answer. Never returns."""
    guard = None
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        guard = Guard(connection, settings)
        answer = guard.work()
    except BaseException as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    try:
        if answer is not None:
            wire.send(connection, answer)
        connection.close()
    finally:
        if guard is not None and guard.folder is not None:
            # After the answer, for it may take long. And not by shutil, which a tree of a thousand folders defeats.
            os.execv("/bin/rm", ["rm", "-rf", "--", guard.folder])
        os._exit(0)


class Guard:
    def __init__(self, connection: socket.socket, settings: dict[str, Any]):
        self.connection, self.settings = connection, settings
        names = ("stdin", "job", *_OUTPUTS, "status")
        pipes = {name: os.pipe() for name in names}
        writes = ("stdin", "job")  # what the guard writes; the rest it reads
        theirs = {name: ends[0] if name in writes else ends[1] for name, ends in pipes.items()}
        self.ends = {name: ends[1] if name in writes else ends[0] for name, ends in pipes.items()}
        self.proc = settings.get("proc")
        self.first, self.folder = walls.start(settings, theirs)
        for descriptor in theirs.values():
            os.close(descriptor)
        self.output = {name: bytearray() for name in _OUTPUTS}
        self.lines = b""
        self.status: dict[str, Any] = {}
        self.killed_by: str | None = None
        self.cpu, self.began = 0.0, 0.0  # seconds

    def work(self) -> dict[str, Any] | None:
        """-> the answer; None if the caller has gone."""
        try:
            job = wire.receive(self.connection)
            if job is None:
                return None
            self.limits = job["limits"]
            self.input = memoryview(job.pop("stdin").encode("utf-8", "surrogatepass"))
            with open(self.ends["job"], "wb") as pipe:
                pipe.write(json.dumps(job).encode())
            return self._answer() if self._watch() else None
        finally:
            self._end()

    def _watch(self) -> bool:
        """Until all has been read that the run wrote. -> False if the caller has gone."""
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.connection, selectors.EVENT_READ, "caller")
        for name in (*_OUTPUTS, "status"):
            self.selector.register(self.ends[name], selectors.EVENT_READ, name)
        os.set_blocking(self.ends["stdin"], False)
        self.selector.register(self.ends["stdin"], selectors.EVENT_WRITE, "stdin")
        deadline = time.monotonic() + _SETUP_SECONDS
        started = ended = False
        look = None
        while self.selector.get_map().keys() & {self.ends[name] for name in (*_OUTPUTS, "status")}:
            now = time.monotonic()
            if not started and self.status.get("started"):
                started, self.began = True, now
                deadline, look = now + self.limits["wall"], now + _LOOK_EVERY
            if not ended and (self.killed_by or self.status.keys() & {"exit", "error"}):
                ended, look, deadline = True, None, now + _DRAIN_SECONDS
                self._kill()
            if now >= deadline:
                if ended:
                    break  # a process that got away, at level none, holds a pipe
                if started:
                    self.killed_by = "wall"
                else:
                    self.status["error"] = f"it was not set up within {_SETUP_SECONDS:.0f} s"
                continue
            if look is not None and now >= look:
                self._look()
                look = time.monotonic() + _LOOK_EVERY
            for key, _ in self.selector.select(min(deadline, look or deadline) - now):
                if key.data == "caller":
                    return False
                self._handle(key.data)
        return True

    def _handle(self, name: str) -> None:
        if name == "stdin":
            try:
                self.input = self.input[os.write(self.ends["stdin"], self.input[:65536]) :] if self.input else self.input
            except BrokenPipeError:
                self.input = self.input[:0]
            if not self.input:
                self._close("stdin")
            return
        data = os.read(self.ends[name], 65536)
        if not data:
            self._close(name)
        elif name == "status":
            *lines, self.lines = (self.lines + data).split(b"\n")
            for line in lines:
                self.status = {**json.loads(line), **self.status}  # the first word counts
        else:
            kept, room = self.output[name], self.limits["output_bytes"] + 1
            kept += data[: room - len(kept)]
            if len(kept) == room:
                self.killed_by = self.killed_by or "output"

    def _close(self, name: str) -> None:
        self.selector.unregister(self.ends[name])
        os.close(self.ends[name])

    def _look(self) -> None:
        """At what all the processes use together; the kernel only limits each of them."""
        self.cpu, resident = usage.total(self.first, self.proc)
        if self.cpu > self.limits["cpu"]:
            self.killed_by = "cpu"
        elif resident > self.limits["memory"]:
            self.killed_by = "memory"

    def _kill(self) -> None:
        """The first process and with it, inside a PID namespace, all others; elsewhere those that can be found."""
        for pid in [self.first] if self.folder is None else [*usage.descendants(self.first, self.proc), self.first]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _end(self) -> None:
        self._kill()
        os.waitpid(self.first, 0)

    def _answer(self) -> dict[str, Any]:
        if "error" in self.status:
            return {"error": self.status["error"]}
        if self.killed_by is None and "started" not in self.status:
            words = self.output["stderr"].decode("utf-8", "replace").strip()
            return {"error": f"its first process ended before it began{': ' if words else ''}{words}"}
        # Without an exit the first process was killed, which nobody but the kernel can do, out of memory.
        killed_by, code = self.killed_by, self.status.get("exit", -signal.SIGKILL)
        cpu = self.status.get("cpu", self.cpu)
        if killed_by is None and code in (-signal.SIGXCPU, -signal.SIGKILL):
            # Nobody else sends SIGKILL: the kernel out of memory, the student's start at a MemoryError, itself.
            killed_by = "cpu" if code == -signal.SIGXCPU or cpu >= self.limits["cpu"] else "memory"
        most = self.limits["output_bytes"]
        texts = {name: bytes(kept[:most]).decode("utf-8", "replace") for name, kept in self.output.items()}
        wall = self.status.get("wall", time.monotonic() - self.began)
        return {**texts, "exit": None if killed_by else code, "killed_by": killed_by, "cpu": cpu, "wall": wall}
