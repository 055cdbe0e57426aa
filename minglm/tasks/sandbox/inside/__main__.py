"""`nursery SETTINGS`: fork a guard for each connection that comes in. `first SETTINGS`: the first process inside bubblewrap.

The modules below that nobody here uses are what most programs import: every student finds them loaded.
"""

import bisect  # noqa: F401
import collections  # noqa: F401
import dataclasses  # noqa: F401
import functools  # noqa: F401
import gc
import heapq  # noqa: F401
import itertools  # noqa: F401
import json
import os
import random  # noqa: F401
import signal
import socket
import string  # noqa: F401
import sys
import typing  # noqa: F401
from typing import Any

import first
import guard
import view
import walls
import wire


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a student may signal the first process, and must not interrupt it
    kind, settings = sys.argv[1], json.loads(sys.argv[2])
    if kind == "first":
        first.serve(view.BOX, settings["level"], [])
    else:
        nursery(settings)


def nursery(settings: dict[str, Any]) -> None:
    caller = socket.socket(fileno=settings["connection"])
    try:
        walls.prepare(settings)
    except OSError as error:
        wire.send(caller, {"error": str(error)})
        return
    wire.send(caller, {})
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # guards leave no zombies
    gc.collect()
    gc.freeze()  # what was made so far is never looked at by the collector again: its pages stay shared
    while True:
        _, descriptors, _, _ = socket.recv_fds(caller, 1, 1)
        if not descriptors:
            return  # the caller has gone; the guards see it, too
        if os.fork() == 0:
            caller.close()
            guard.serve(socket.socket(fileno=descriptors[0]), settings)
        os.close(descriptors[0])


main()
