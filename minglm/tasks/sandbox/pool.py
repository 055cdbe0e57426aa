"""The caller's side: a nursery of processes, some of them ready behind their walls before a job is there."""

import collections
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from .inside import wire
from .limits import SandboxError

INSIDE = Path(__file__).parent / "inside"
_ANSWER_SECONDS = 60.0
"""How much longer than its wall limit a run may take to be answered, on a machine with more to do than it can."""


class Pool:
    """Starts runs at one level. Threads may share it; processes may not (a socket has one reader)."""

    def __init__(self, level: str, warm: int, disk_bytes: int):
        """warm: how many runs wait ready. Raises SandboxError where the level cannot be had here."""
        self.warm = warm
        bubblewrap = shutil.which("bwrap")
        if level == "bubblewrap" and bubblewrap is None:
            raise SandboxError("no program bwrap (install the package bubblewrap)")
        self._settings = {"level": level, "disk_bytes": disk_bytes, "bubblewrap": bubblewrap}
        self._settings["programs"] = [str(INSIDE), os.path.realpath(bubblewrap or "")] if level == "bubblewrap" else []
        self._ready: collections.deque[socket.socket] = collections.deque()
        self._lock = threading.Lock()
        self._closed = False
        self._open_nursery()
        for _ in range(warm):
            self._ready.append(self._start())

    def _open_nursery(self) -> None:
        self._nursery, theirs = socket.socketpair()
        python = [os.path.realpath(sys.executable), "-s", "-S", "-P", "-B", str(INSIDE), "nursery"]
        with tempfile.TemporaryDirectory(prefix="sandbox-view-") as empty:
            settings = {**self._settings, "connection": theirs.fileno(), "empty_folder": empty}
            self._process = subprocess.Popen(
                [*python, json.dumps(settings)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={"PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},  # none of our secrets
                cwd="/",
                start_new_session=True,  # Ctrl+C is for us
            )
            theirs.close()
            hello = wire.receive(self._nursery)
        if hello is None or "error" in hello:
            self.close()
            raise SandboxError((hello or {}).get("error", "its process ended at once"))

    def run(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Do a job of at most so many seconds. Raises SandboxError if no answer comes, or one of an error.

        A run without an answer, whose processes were killed from outside, is done once more.
        """
        answer = self._try(job, seconds) or self._try(job, seconds)
        if answer is None or "error" in answer:
            raise SandboxError(f"a run failed outside of its code: {(answer or {}).get('error', 'no answer')}")
        return answer

    def _try(self, job: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        with self._lock:
            if self._closed:
                raise SandboxError("this sandbox is closed")
            connection = self._ready.popleft() if self._ready else self._start()
            while len(self._ready) < self.warm:
                self._ready.append(self._start())
        with connection:
            connection.settimeout(seconds + _ANSWER_SECONDS)
            try:
                wire.send(connection, job)
                return wire.receive(connection)
            except OSError:
                return None

    def _start(self) -> socket.socket:
        try:
            return self._ask()
        except OSError:  # somebody has killed the nursery
            self._process.kill()
            self._process.wait()
            self._nursery.close()
            self._open_nursery()
            return self._ask()

    def _ask(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._nursery, [b"+"], [theirs.fileno()])
        return ours

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for connection in self._ready:
                connection.close()
            self._ready.clear()
            self._nursery.close()  # which ends it
        self._process.wait()
