"""Runs one job as the code that nobody trusts: first all privileges are given up, then it is started."""

import atexit
import builtins
import io
import math
import os
import resource
import signal
import sys
import tempfile
import threading
import traceback
import types
from typing import Any

import landlock
import seccomp
import system


def run(job: dict[str, Any], box: str, level: str, readable: list[str]) -> None:
    """Never returns. Descriptors 0 to 3 are stdin, stdout, stderr and report."""
    system.die_with_parent()
    os.setsid()
    os.chdir(box)
    _set_limits(job["limits"], level)
    if level != "none":
        _give_up_privileges(box, level, readable)
    os.closerange(4, 1024)  # until here, what goes wrong is told to the guard
    os.environ.clear()
    os.environ.update({"HOME": box, "TMPDIR": box, "PATH": f"{sys.base_prefix}/bin:/usr/bin:/bin", "LANG": "C.UTF-8"})
    os.environ.update({"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"})  # for Pythons that it starts
    command = job["command"]
    if isinstance(command, str):
        _run_file(command, box)
    else:
        _replace_by(command)


def _set_limits(limits: dict[str, Any], level: str) -> None:
    seconds = math.ceil(limits["cpu"])
    hard = {
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if level in ("bubblewrap", "namespaces"):  # elsewhere it would count all processes of the user
        hard[resource.RLIMIT_NPROC] = limits["processes"] + 1  # and the first process of the sandbox
    for kind, wanted in hard.items():
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            wanted = min(wanted, ceiling)
        resource.setrlimit(kind, (wanted, wanted + 1 if kind == resource.RLIMIT_CPU else wanted))


def _give_up_privileges(box: str, level: str, readable: list[str]) -> None:
    if level == "landlock":
        landlock.restrict([*readable, "/dev/zero", "/dev/urandom", "/dev/random"], [box, "/dev/null"])
    system.forbid_new_privileges()
    system.drop_capabilities()
    alone = level == "landlock"  # what cannot be counted must not be
    seccomp.install(forks=not alone, own=os.getpid() if alone else None)


def _replace_by(command: list[str]) -> None:
    program, *arguments = command
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):  # Python's own ways with them would be inherited
        signal.signal(number, signal.SIG_DFL)
    try:
        if program == "python":
            program = os.path.realpath(sys.executable)
            arguments = ["-s", "-S", *arguments]
        os.execvp(program, [program, *arguments])
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        os._exit(127)


def _run_file(path: str, box: str) -> None:
    """As `python path` would, in this interpreter, which is warm already."""
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(open(number, mode, closefd=False), "utf-8", errors, line_buffering=number == 2)
        for number, mode, errors in ((0, "rb", "replace"), (1, "wb", "backslashreplace"), (2, "wb", "backslashreplace"))
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _forget_own_modules()
    tempfile.tempdir = None  # the guard's
    sys.argv = [path]
    sys.path[0] = os.path.dirname(os.path.join(box, path))
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = main
    code = 1
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
        exec(compile(source, path, "exec"), main.__dict__)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if code == 1 and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except MemoryError:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does, out of memory
    except BaseException as error:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # not this file
        traceback.print_exception(error)
    os._exit(_finish(code) & 0xFF)


def _forget_own_modules() -> None:
    """So that the job's modules can have any names."""
    own = os.path.dirname(__file__)
    for name, module in list(sys.modules.items()):
        if os.path.dirname(getattr(module, "__file__", None) or "") == own:
            del sys.modules[name]


def _finish(code: int) -> int:
    """What the interpreter does at its end: wait for threads, run what was registered, flush."""
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        return code or 120  # the interpreter's own status for output that cannot be flushed
    return code
