"""Asking a run to stop, by Ctrl-C or a job scheduler's SIGTERM."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

SAME_REQUEST_SECONDS = 2.0


def in_main_thread() -> bool:
    """Python takes signals there only."""
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Inside this context SIGTERM raises KeyboardInterrupt(SIGTERM), as Ctrl-C does one without arguments, so that other
    contexts clean up behind them.

    In any other thread than the main one this context does nothing.
    """
    if not in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number))


class StopRequest:
    """Inside this context the first SIGINT or SIGTERM only sets `signal`; a later SIGINT ends the process at once.

    Launchers and schedulers pass a signal on to processes that have got it already: what follows within
    `SAME_REQUEST_SECONDS`, and every further SIGTERM, is taken for the same request.
    In any other thread than the main one this context does nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if in_main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
