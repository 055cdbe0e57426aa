"""Jobs in processes of their own, several at a time."""

import contextlib
import multiprocessing
import os
import pickle
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from signal import SIGKILL, Signals
from typing import Any, TypeVar

from tqdm import tqdm

from minglm.train.stop import sigterm_as_interrupt

Job = TypeVar("Job")


class JobLost(RuntimeError):
    """A job whose process has ended without a word, killed from outside, or for want of memory."""


def in_processes(
    work: Callable[[Job], Any],
    jobs: Sequence[Job],
    workers: int,
    about: str,
    behind: Callable[[Job], Sequence[Job]] = lambda _: (),
) -> None:
    """Have `work(job)` do each job in a process of its own, `workers` at a time on equal shares of the cores; when one is done,
    those `behind` it may begin. Raises what a job raises, and `JobLost`. SIGTERM is as Ctrl-C. Whatever ends this ends what is
    under way: by SIGTERM, or, where this process was killed, by SIGKILL.

    work: a function at the top of a module, for other processes find it there; about: what the progress bar says.
    """
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    waiting = deque(jobs)
    under_way: dict[Connection, tuple[Job, multiprocessing.context.SpawnProcess]] = {}
    total = len(jobs) + sum(len(behind(job)) for job in jobs)
    with sigterm_as_interrupt(), tqdm(total=total, desc=about, unit="run") as bar:
        try:
            while waiting or under_way:
                while waiting and len(under_way) < workers:
                    job = waiting.popleft()
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_do, args=(threads, work, job, sender))
                    process.start()
                    sender.close()  # the process has its own: when it ends, however, the receiver is told
                    under_way[receiver] = job, process
                for receiver in wait(list(under_way)):
                    job, process = under_way[receiver]
                    error = _last_word(receiver, process)
                    del under_way[receiver]
                    if error is not None:
                        raise error
                    waiting.extend(behind(job))
                    bar.update()
        finally:
            for _, process in under_way.values():
                process.terminate()
            for _, process in under_way.values():
                process.join()


def _last_word(receiver: Connection, process: multiprocessing.context.SpawnProcess) -> BaseException | None:
    """What the job raised; None if it is done."""
    try:
        return receiver.recv()
    except EOFError:
        process.join()  # or there is no exit code yet
        code = process.exitcode or 0
        return JobLost(f"a process has ended with {Signals(-code).name if code < 0 else code} and not said why")
    finally:
        receiver.close()
        process.join()


def _do(threads: int, work: Callable[[Job], Any], job: Job, sender: Connection) -> None:
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    error: BaseException | None = None
    try:
        work(job)
    except BaseException as raised:
        raised.add_note(f"In another process:\n{traceback.format_exc()}")
        error = raised
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whose arguments do not make it again
        error = RuntimeError("".join(traceback.format_exception(error)))
    sender.send(error)


def _end_with_parent() -> None:
    """Else a job whose parent was killed would go on, and meet the one that the same command begins anew in its folder."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), SIGKILL)


def run_quietly(job: tuple[Callable[[Any, Any], Any], Any, str | Path]) -> None:
    """A job for `in_processes`: `run(recipe, run_folder)`, and what it prints goes into log.txt there."""
    run, recipe, run_folder = job
    Path(run_folder).mkdir(parents=True, exist_ok=True)
    with open(Path(run_folder) / "log.txt", "a", encoding="utf-8") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            run(recipe, run_folder)
