"""`python -m minglm.tasks.sandbox.bench`: runs a second at every level of this machine, with the warm pool and without.

A run is the test of a small function on eight cases. Many threads call at once, as episodes of reinforcement learning do.
"""

import functools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from .functions import Case, run_function_tests
from .limits import SandboxError
from .sandbox import ENFORCES, Level, Sandbox

SOURCE = "def f(x):\n    return x * x"
CASES = [Case((x,), x * x) for x in range(8)]


def runs_a_second(work: Callable[[], None], threads: int, seconds: float) -> float:
    """How often so many threads together get the work done. Raises what the work raises."""
    begin = time.monotonic()

    def repeat() -> int:
        done = 0
        while time.monotonic() < begin + seconds:
            work()
            done += 1
        return done

    with ThreadPoolExecutor(threads) as pool:
        done = sum(future.result() for future in [pool.submit(repeat) for _ in range(threads)])
    return done / (time.monotonic() - begin)


def measure(level: Level, threads: int, seconds: float) -> dict[str, float]:
    """Runs a second: a sandbox opened for each run; one without runs that wait ready; one with. Raises SandboxError."""

    def check(sandbox: Sandbox) -> None:
        results = run_function_tests(SOURCE, "f", CASES, sandbox=sandbox)
        if not all(results):
            raise SandboxError(f"level {level}: {next(result.reason for result in results if not result)}")

    def alone() -> None:
        with Sandbox(level, warm=0, allow_unsafe=True) as sandbox:
            check(sandbox)

    rates = {"opened for each run": runs_a_second(alone, os.cpu_count() or 1, seconds)}
    for name, warm in (("none ready", 0), ("ready", None)):
        with Sandbox(level, warm=warm, allow_unsafe=True) as sandbox:
            check(sandbox)
            rates[name] = runs_a_second(functools.partial(check, sandbox), threads, seconds)
    return rates


def table(threads: int = 200, seconds: float = 5.0) -> Iterator[str]:
    yield f"runs a second, {threads} threads, {os.cpu_count()} processor cores"
    for level in ENFORCES:
        try:
            rates = measure(level, threads, seconds)
        except SandboxError as error:
            yield f"{level:12} not here: {error}"
            continue
        yield f"{level:12} " + "   ".join(f"{name}: {rate:.1f}" for name, rate in rates.items())


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)
