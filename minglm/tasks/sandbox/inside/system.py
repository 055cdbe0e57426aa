"""System calls that Python has no function for."""

import ctypes
import os
import platform
import signal
import struct

LIBC = ctypes.CDLL(None, use_errno=True)
MACHINE = platform.machine()

NEW_MOUNTS, NEW_CGROUP, NEW_NAMES, NEW_IPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEW_USER, NEW_PIDS, NEW_NET = 0x10000000, 0x20000000, 0x40000000

READ_ONLY, NO_SUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
DETACH = 2

_DEATH_SIGNAL, _DUMPABLE, _SUBREAPER, _NO_NEW_PRIVILEGES = 1, 4, 36, 38
_CLONE = {"x86_64": 56, "aarch64": 220}
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPABILITIES_VERSION_3 = 0x20080522


def check(result: int, what: str) -> int:
    """Raises OSError where a call of libc failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    check(LIBC.unshare(flags), "unshare")


def clone(flags: int) -> int:
    """Like os.fork, with new namespaces. Only for a process of one thread."""
    if MACHINE not in _CLONE:
        raise OSError(f"clone: no number known for {MACHINE}")
    number = ctypes.c_long(_CLONE[MACHINE])
    nothing = ctypes.c_long(0)
    return check(LIBC.syscall(number, ctypes.c_long(flags | signal.SIGCHLD), nothing, nothing, nothing, nothing), "clone")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    named = kind.encode() if kind else None
    check(LIBC.mount(source.encode(), target.encode(), named, ctypes.c_ulong(flags), options.encode()), f"mount on {target}")


def enter_root(folder: str) -> None:
    """Make a mounted folder the root, and let go of the old one."""
    os.chdir(folder)
    if MACHINE not in _PIVOT_ROOT:
        raise OSError(f"pivot_root: no number known for {MACHINE}")
    check(LIBC.syscall(ctypes.c_long(_PIVOT_ROOT[MACHINE]), b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", DETACH), "umount of the old root")
    os.chdir("/")


def control(option: int, value: int) -> None:
    arguments = [ctypes.c_ulong(number) for number in (value, 0, 0, 0)]
    check(LIBC.prctl(option, *arguments), f"prctl {option}")


def die_with_parent() -> None:
    control(_DEATH_SIGNAL, signal.SIGKILL)


def adopt_orphans() -> None:
    control(_SUBREAPER, 1)


def set_dumpable(yes: bool) -> None:
    control(_DUMPABLE, int(yes))


def forbid_new_privileges() -> None:
    control(_NO_NEW_PRIVILEGES, 1)


def drop_capabilities() -> None:
    header = struct.pack("Ii", _CAPABILITIES_VERSION_3, 0)
    check(LIBC.capset(header, struct.pack("6I", *[0] * 6)), "capset")


def set_host_name(name: str) -> None:
    check(LIBC.sethostname(name.encode(), len(name)), "sethostname")
