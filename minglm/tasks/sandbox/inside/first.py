"""The first process inside the walls: writes the files of a job, starts the student, and says how that ended."""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import student

STATUS, JOB, PROC = 4, 5, 6


def arrange(descriptors: dict[str, int]) -> None:
    """Put the pipes, and the folder /proc where there is one, where all expect them, and close everything else."""
    places = {0: "stdin", 1: "stdout", 2: "stderr", 3: "report", STATUS: "status", JOB: "job", PROC: "proc"}
    places = {place: name for place, name in places.items() if name in descriptors}
    high = {}
    for place, name in places.items():  # out of the way first, so that no move covers another's source
        high[place] = os.dup(descriptors[name])
        while high[place] <= max(places):
            high[place] = os.dup(high[place])
    for place, source in high.items():
        os.dup2(source, place)
    os.closerange(max(places) + 1, 1024)


def serve(box: str, level: str, readable: list[str], prepare: Callable[[], None] = lambda: None) -> None:
    """Wait for the job, do it, tell, end. Never returns; with it ends, inside a PID namespace, all that is left.

    prepare: done first. What goes wrong there is told as well.
    """
    try:
        prepare()
        with open(JOB, "rb", closefd=False) as pipe:
            text = pipe.read()
        if text:  # empty: the caller has gone
            _do(json.loads(text), box, level, readable)
    except BaseException as error:
        _tell({"error": f"{type(error).__name__}: {error}"})
    os._exit(0)


def _do(job: dict[str, Any], box: str, level: str, readable: list[str]) -> None:
    for path, text in job["files"].items():
        place = os.path.join(box, path)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            file.write(text)
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            student.run(job, box, level, readable)
        except BaseException as error:
            _tell({"error": f"{type(error).__name__}: {error}"})
        os._exit(1)
    _tell({"started": True})
    for number in (0, 1, 2, 3, JOB):
        os.close(number)
    while True:
        ended, status, used = os.wait4(-1, 0)  # orphans, too
        if ended == child:
            break
    spent = used.ru_utime + used.ru_stime
    _tell({"exit": os.waitstatus_to_exitcode(status), "cpu": spent, "wall": time.monotonic() - begin})


def _tell(status: dict[str, Any]) -> None:
    os.write(STATUS, json.dumps(status).encode() + b"\n")
