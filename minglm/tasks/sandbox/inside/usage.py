"""What a process and its descendants use, from /proc."""

import os
from collections.abc import Iterator

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGESIZE")
_HAS_CHILDREN = os.path.exists(f"/proc/self/task/{os.getpid()}/children")  # some kernels are built without
_INTERPRETER = 16 << 20  # bytes of each process that it mostly shares with the others, and that are not counted


def descendants(pid: int, proc: int | None) -> Iterator[int]:
    """Children first to last, each before its own. proc: an open folder, where /proc is not to be seen."""
    waiting = [pid]
    while waiting:
        children = _children(waiting.pop(), proc)
        waiting += children
        yield from children


def total(pid: int, proc: int | None) -> tuple[float, int]:
    """Of all descendants: seconds of processor time, those that have ended included, and bytes of resident memory.

    Of each process the first 16 MiB are not counted: the interpreter, which it shares with the one that it was forked from.
    """
    ticks = resident = 0
    for one in descendants(pid, proc):
        text = _read(f"{one}/stat", proc)
        if text:
            fields = text[text.rindex(")") + 2 :].split()  # from the third on: a name may hold anything
            ticks += sum(int(field) for field in fields[11:15])
            resident += max(0, int(fields[21]) * _PAGE - _INTERPRETER)
    return ticks / _TICK, resident


def _children(pid: int, proc: int | None) -> list[int]:
    try:
        folder = os.open(f"{pid}/task" if proc is not None else f"/proc/{pid}/task", os.O_RDONLY, dir_fd=proc)
    except OSError:
        return []  # it has ended
    try:
        threads = os.listdir(folder)
    except OSError:
        threads = []
    finally:
        os.close(folder)
    if not _HAS_CHILDREN:
        return [child for child in _all(proc) if _parent(child, proc) == pid]
    texts = [_read(f"{pid}/task/{thread}/children", proc) for thread in threads]
    return [int(child) for text in texts for child in text.split()]


def _all(proc: int | None) -> list[int]:
    return [int(name) for name in os.listdir(proc if proc is not None else "/proc") if name.isdigit()]


def _parent(pid: int, proc: int | None) -> int:
    text = _read(f"{pid}/stat", proc)
    return int(text[text.rindex(")") + 2 :].split()[1]) if text else 0


def _read(path: str, proc: int | None) -> str:
    try:
        place = os.open(path if proc is not None else f"/proc/{path}", os.O_RDONLY, dir_fd=proc)
    except OSError:
        return ""
    with open(place) as file:
        try:
            return file.read()
        except OSError:
            return ""
