"""What of the machine's files can be seen: the system's programs and Python, to read, and one folder to write."""

import ctypes
import os
import struct
import sys

import system

BOX = "/box"
_MOUNT_SETATTR, _WHOLE_TREE, _AT_FDCWD = 442, 0x8000, -100
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/nix/store")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def readable(*more: str) -> list[str]:
    """Paths that exist, none inside another."""
    paths = [*_SYSTEM, sys.base_prefix, sys.base_exec_prefix, os.path.realpath(sys.executable), *more]
    found: list[str] = []
    for path in paths:
        if os.path.lexists(path) and not any(path == one or path.startswith(f"{one}/") for one in found):
            found.append(path)
    return found


def enter(folder: str, paths: list[str], with_proc: bool) -> None:
    """Make the root of this process a file system that has these paths and an empty BOX, nothing else, read only.

    folder: an empty one, only used on the way. Needs a mount namespace of our own. Raises OSError where mounts are refused.
    """
    system.mount("none", "/", None, system.RECURSIVE | system.PRIVATE)
    system.mount("sandbox", folder, "tmpfs", system.NO_SUID | system.NO_DEVICES, "size=1m,mode=755")
    for path in [*paths, *DEVICES]:
        _show(path, folder + path)
    os.mkdir(folder + BOX, 0o755)
    if with_proc:
        _show("/proc", f"{folder}/proc")
        os.makedirs(f"{folder}/tmp", exist_ok=True)  # where bubblewrap mounts its own root
    elif not os.path.exists(f"{folder}/tmp"):
        os.symlink("box", f"{folder}/tmp")
    for path in paths:
        if not os.path.islink(path):
            _make_read_only(folder + path, tree=True)
    system.enter_root(folder)
    _make_read_only("/", tree=False)


def _show(path: str, place: str) -> None:
    os.makedirs(os.path.dirname(place), 0o755, exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.mkdir(place, 0o755)
    else:
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
    system.mount(path, place, None, system.BIND | system.RECURSIVE)


def _make_read_only(path: str, tree: bool) -> None:
    attributes = struct.pack("QQQQ", 1 | 2 | 4, 0, 0, 0)  # read only, no set-user-id, no devices
    flags = ctypes.c_uint(_WHOLE_TREE if tree else 0)
    number, size = ctypes.c_long(_MOUNT_SETATTR), ctypes.c_size_t(len(attributes))
    result = system.LIBC.syscall(number, ctypes.c_int(_AT_FDCWD), path.encode(), flags, attributes, size)
    system.check(result, f"mount_setattr on {path}")
