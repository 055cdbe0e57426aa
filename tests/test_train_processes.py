"""Jobs in other processes: what they raise, how they end, and that none is left behind."""

import os
import signal
import time
from pathlib import Path

import pytest
from small_run import in_child

from minglm.config import ConfigError
from minglm.train.processes import JobLost, in_processes


class TwoArguments(ValueError):
    """Pickle makes it of one argument, which raises."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} and {second}")


def end(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "two":
        raise TwoArguments("one", "the other")
    raise ConfigError(how)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("killed", JobLost, "ended with SIGKILL"),
        ("exit", JobLost, "ended with 3 "),
        ("two", RuntimeError, "one and the other"),
        ("steps = 3: wanted 4", ConfigError, "^steps = 3: wanted 4"),
    ],
)
def test_whatever_ends_a_job_is_raised_and_says_where(how, kind, message):
    with pytest.raises(kind, match=message) as raised:
        in_processes(end, [how], 2, "test")
    if kind is ConfigError:
        assert str(raised.value) == how and "in end" in raised.value.__notes__[0]


def write_process(folder: Path, seconds: float = 60.0) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(seconds)


def wait_some(job: tuple[Path, int]) -> None:
    folder, number = job
    (folder / f"{number} begins").touch()
    time.sleep(0.2)
    (folder / f"{number} ends").touch()


def test_no_more_than_so_many_run_at_once_and_those_behind_one_begin_after_it(tmp_path):
    behind = {0: [(tmp_path, 3)], 3: [(tmp_path, 4)]}
    in_processes(wait_some, [(tmp_path, number) for number in range(3)], 2, "test", lambda job: behind.get(job[1], []))
    found = [path.name for path in sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)]
    assert sorted(found) == sorted(f"{number} {what}" for number in range(5) for what in ("begins", "ends"))
    under_way = [sum(1 if name.endswith("begins") else -1 for name in found[: place + 1]) for place in range(len(found))]
    assert max(under_way) <= 2 and under_way[-1] == 0
    assert found.index("0 ends") < found.index("3 begins") and found.index("3 ends") < found.index("4 begins")


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_jobs_end_with_what_has_begun_them_even_where_it_is_killed(tmp_path, how):
    parent = in_child(in_processes, write_process, [tmp_path, tmp_path], 2, "test")
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(parent.pid, how)
    parent.join(60)
    assert parent.exitcode not in (0, None)
    while any(is_alive(int(path.name)) for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
