"""Landlock: which files a process may touch, without namespaces and without privileges (kernel 5.13 and later)."""

import ctypes
import os
import struct
from collections.abc import Iterable

import system

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same on every machine
_EXECUTE, _READ_FILE, _READ_FOLDER = 1 << 0, 1 << 2, 1 << 3
_FILE_RIGHTS = _EXECUTE | 1 << 1 | _READ_FILE | 1 << 14 | 1 << 15  # what a rule on a file may name
_MAKE_DEVICES_AND_SOCKETS = 1 << 6 | 1 << 9 | 1 << 11
_NEEDED = 3  # the version that also guards truncation
_SCOPES_VERSION = 6


def version() -> int:
    """Of the kernel's Landlock; 0 if there is none."""
    return max(0, system.LIBC.syscall(ctypes.c_long(_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint32(1)))


def scopes_signals() -> bool:
    return version() >= _SCOPES_VERSION


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """From now on only these files and what lies below them, no TCP, and no signals out where the kernel can keep them in.

    Raises OSError where the kernel has no Landlock of version 3 (Linux 6.2).
    """
    found = version()
    if found < _NEEDED:
        raise OSError(f"Landlock version {found} found, {_NEEDED} needed (Linux 6.2)")
    rights = (1 << 15) - 1 | (1 << 15 if found >= 5 else 0)
    network = 3 if found >= 4 else 0
    scopes = 3 if found >= _SCOPES_VERSION else 0
    attributes = struct.pack("QQQ", rights, network, scopes)[: 24 if scopes else 16 if network else 8]
    create = system.LIBC.syscall(ctypes.c_long(_CREATE), attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    rules = system.check(create, "landlock_create_ruleset")
    reading = _EXECUTE | _READ_FILE | _READ_FOLDER
    for paths, allowed in ((readable, reading), (writable, rights & ~_MAKE_DEVICES_AND_SOCKETS)):
        for path in paths:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            granted = allowed if os.path.isdir(path) else allowed & _FILE_RIGHTS
            rule = struct.pack("=Qi", granted, place)
            add = system.LIBC.syscall(ctypes.c_long(_ADD), ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint32(0))
            system.check(add, f"landlock_add_rule {path}")
            os.close(place)
    system.forbid_new_privileges()
    system.check(
        system.LIBC.syscall(ctypes.c_long(_RESTRICT), ctypes.c_int(rules), ctypes.c_uint32(0)), "landlock_restrict_self"
    )
    os.close(rules)
