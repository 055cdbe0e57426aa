"""The sandbox: runs code that nobody trusts, behind the strongest walls that this machine has.

    with Sandbox() as sandbox:
        outcome = sandbox.run({"main.py": "print(6 * 7)"}, "main.py")
        outcome.stdout, outcome.exit, outcome.killed_by      # "42\n", 0, None

Levels, strongest first; "auto" takes the first that passes a check of its claims here and now:

    bubblewrap   the program bwrap: namespaces for files, processes, network; a seccomp filter inside
    namespaces   the same walls built by system calls (user namespaces must be allowed)
    landlock     no namespaces: Landlock for files, a seccomp filter that also refuses new processes and foreign signals
    none         limits, no walls; only with allow_unsafe=True

The code sees Python's standard library and the system's programs, to read, and its folder, to write. It has no /proc and
no /dev/shm (so no locks of multiprocessing); at level landlock it starts no processes and changes no modes of files.
"""

import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Literal, Self

from .limits import MIB, Limits, Outcome, SandboxError, check_files
from .pool import INSIDE, Pool

Level = Literal["bubblewrap", "namespaces", "landlock", "none"]

_LIMITS = frozenset({"cpu", "wall", "memory", "file_bytes", "output"})
ENFORCES: dict[Level, frozenset[str]] = {
    "bubblewrap": _LIMITS | {"disk", "files", "hidden_files", "network", "other_processes", "processes", "left_behind"},
    "namespaces": _LIMITS | {"disk", "files", "hidden_files", "network", "other_processes", "processes", "left_behind"},
    "landlock": _LIMITS | {"files", "network", "other_processes", "processes", "left_behind"},
    "none": _LIMITS,
}
"""What a level keeps code from: exceeding the limits of these names, and

disk: writing more than `disk_bytes` in all its files together
files: reading and writing outside of its folder, but for reading Python and the system's programs
hidden_files: even seeing that other files exist
network: all sockets but pairs of its own
other_processes: sending signals to processes outside, seeing their memory or environment
processes: having more processes and threads than allowed (landlock: more processes than the first)
left_behind: leaving a process that outlives the run
"""

_CHECK = (INSIDE / "check.py").read_text(encoding="utf-8")


class Sandbox:
    """Runs jobs for any number of threads; at most `parallel` of them run at a time, the others wait for their turn.

    Holds processes: close it, or use it in a `with`; they end with this process in any case.
    """

    def __init__(
        self,
        level: Level | Literal["auto"] = "auto",
        *,
        allow_unsafe: bool = False,
        parallel: int | None = None,
        warm: int | None = None,
        disk_bytes: int = 32 * MIB,
    ):
        """allow_unsafe: take level "none" where nothing better can be had. parallel: by default two a processor core.
        warm: runs that wait ready (about 6 MB each), by default as many as parallel but at most 16. disk_bytes: of all files
        of a run together.

        Raises SandboxError, with the reasons for each level, if the level (for "auto": any but none) cannot be had here.
        """
        if level not in ("auto", *ENFORCES):
            raise SandboxError(f"level = {level!r}: wanted 'auto', {', '.join(map(repr, ENFORCES))}")
        if level == "none" and not allow_unsafe:
            raise SandboxError("level 'none' has limits but no walls: the code could read and delete this user's files; "
                               "pass allow_unsafe=True if you trust it that far")  # fmt: skip
        parallel = parallel or 2 * (os.cpu_count() or 1)
        self._turn = threading.BoundedSemaphore(parallel)
        self._pool, self.level = _open(level, allow_unsafe, min(parallel, 16) if warm is None else warm, disk_bytes)
        self.enforces = ENFORCES[self.level]
        self.missing = ENFORCES["bubblewrap"] - self.enforces
        """What a stronger level would stop, and this one does not."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.close()

    def __repr__(self) -> str:
        missing = f"; it does not stop: {', '.join(sorted(self.missing))}" if self.missing else ""
        return f"<Sandbox of level {self.level}{missing}>"

    def run(
        self, files: Mapping[str, str], command: str | Sequence[str], stdin: str = "", limits: Limits | None = None
    ) -> Outcome:
        """Write the files into an empty folder, and run a command there.

        files: relative path -> content. command: the path of one of the files, run as Python in a warm interpreter; or a
        program with its arguments, where "python" is this Python without packages (`["python", "-m", "unittest"]`). A
        program that does not exist gives exit 127. Raises SandboxError for a job that cannot be made, or if the sandbox
        itself fails; never for what the code does.
        """
        check_files(files)
        if isinstance(command, str) and command not in files:
            raise SandboxError(f"command {command!r}: wanted one of the files, or a list of a program and its arguments")
        limits = limits or Limits()
        job = {
            "files": dict(files),
            "command": command if isinstance(command, str) else [str(word) for word in command],
            "stdin": stdin,
            "limits": vars(limits),
        }
        with self._turn:
            answer = self._pool.run(job, limits.wall)
        texts = (answer["stdout"], answer["stderr"], answer["exit"], answer["killed_by"], answer["report"])
        return Outcome(*texts, cpu_seconds=answer["cpu"], wall_seconds=answer["wall"])


def _open(level: str, allow_unsafe: bool, warm: int, disk_bytes: int) -> tuple[Pool, Level]:
    reasons = []
    candidates = [one for one in ENFORCES if level in (one, "auto") and (one != "none" or allow_unsafe)]
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"the sandbox needs Linux, this is {sys.platform}: run it in a virtual machine or a container")
    for candidate in candidates:
        try:
            pool = Pool(candidate, warm, disk_bytes)
        except SandboxError as error:
            reasons.append(f"{candidate}: {error}")
            continue
        try:
            broken = _broken_claims(pool, ENFORCES[candidate])
        except SandboxError as error:
            reasons.append(f"{candidate}: {error}")
            pool.close()
            continue
        if not broken:
            return pool, candidate
        pool.close()
        reasons.append(f"{candidate}: does not keep what it claims here: {', '.join(sorted(broken))}")
    raise SandboxError(
        f"no sandbox of level {level!r} on this machine: {'; '.join(reasons)}. Install bubblewrap, or allow user namespaces, "
        "or use a kernel with Landlock (6.2 or later). Sandbox(allow_unsafe=True) runs code with limits but no walls."
    )


def _broken_claims(pool: Pool, claims: frozenset[str]) -> set[str]:
    """Run a program inside that tries what the level claims to stop. -> the claims that it found untrue."""
    limits = Limits(processes=4)
    settings = {"pid": os.getpid(), "processes": limits.processes, "claims": sorted(claims)}
    files = {"check.py": _CHECK, "settings.json": json.dumps(settings)}
    answer = pool.run({"files": files, "command": "check.py", "stdin": "", "limits": vars(limits)}, limits.wall)
    if answer["exit"] != 0:
        raise SandboxError(f"its check failed: {answer['killed_by'] or answer['stderr'].strip() or answer['exit']}")
    return set(json.loads(answer["stdout"]))


_default: tuple[int, Sandbox] | None = None
_default_lock = threading.Lock()


def default_sandbox() -> Sandbox:
    """The sandbox that verifiers use: level "auto", opened at its first use and kept for the life of this process.

    MINGLM_UNSAFE_SANDBOX=1 in the environment allows level "none". Raises SandboxError if there is none.
    """
    global _default
    with _default_lock:
        if _default is None or _default[0] != os.getpid():  # a fork shares no sockets with its parent
            _default = os.getpid(), Sandbox(allow_unsafe=os.environ.get("MINGLM_UNSAFE_SANDBOX") == "1")
        return _default[1]
