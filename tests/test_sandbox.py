"""The sandbox for those who use it well: runs, limits, levels, refusals, many runs at a time."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.tasks import sandbox as package
from minglm.tasks.sandbox import (
    ENFORCES,
    Case,
    Limits,
    Sandbox,
    SandboxError,
    bench,
    default_sandbox,
    run_function_tests,
    same_value,
)
from minglm.tasks.sandbox import sandbox as module
from minglm.tasks.sandbox.inside import usage
from minglm.tasks.sandbox.pool import INSIDE


@pytest.fixture(scope="module")
def sandbox():
    return default_sandbox()


def python(sandbox, program, **kwargs):
    return sandbox.run({"main.py": textwrap.dedent(program)}, "main.py", **kwargs)


# ---- runs


def test_a_file_runs_as_python_would_run_it(sandbox):
    program = """
        import sys
        print(__name__, sys.argv, input())
        print("é", file=sys.stderr)
        sys.exit(3)
    """
    outcome = python(sandbox, program, stdin="hällo\n")
    assert (outcome.stdout, outcome.stderr) == ("__main__ ['main.py'] hällo\n", "é\n")
    assert (outcome.exit, outcome.killed_by, outcome.passed) == (3, None, False)
    assert 0 < outcome.cpu_seconds < 2 and outcome.wall_seconds > 0


def test_files_import_one_another_whatever_they_are_called(sandbox):
    files = {
        "package/__init__.py": "",
        "package/student.py": "from package.first import x\ny = x + 1",
        "package/first.py": "x = 1",
        "system.py": "z = 5",  # the sandbox's own files have such names
        "wire.py": "w = 6",
        "data/text.txt": "line\r\nüñï",
        "main.py": "import package.student, system, wire\nprint(package.student.y, system.z, wire.w)\n"
        "print(open('data/text.txt', newline='', encoding='utf-8').read())",
    }
    assert sandbox.run(files, "main.py").stdout == "2 5 6\nline\r\nüñï\n"


def test_what_is_printed_at_the_end_and_by_threads_is_there(sandbox):
    program = """
        import atexit, threading, time
        atexit.register(print, "end")
        threading.Thread(target=lambda: (time.sleep(0.05), print("thread"))).start()
        print("main", end="")
    """
    assert python(sandbox, program).stdout == "mainthread\nend\n"


def test_an_exception_is_told_as_python_tells_it(sandbox):
    outcome = python(sandbox, "def f():\n    return 1 / 0\nf()")
    assert outcome.exit == 1
    assert outcome.stderr.startswith('Traceback (most recent call last):\n  File "main.py", line 3')
    assert outcome.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert python(sandbox, "raise SystemExit('no')").stderr == "no\n"


def test_programs_run_with_arguments(sandbox):
    assert sandbox.run({}, ["python", "-c", "import sys; print(sys.argv)", "a b"]).stdout == "['-c', 'a b']\n"
    assert sandbox.run({"x": "1\n2\n"}, ["cat", "x"]).stdout == "1\n2\n"
    assert sandbox.run({}, ["no-such-program"]).exit == 127
    tests = "import unittest\nclass T(unittest.TestCase):\n    def test_a(self): self.assertEqual(1, 1)"
    outcome = sandbox.run({"test_a.py": tests}, ["python", "-m", "unittest", "-v"])
    assert outcome.passed and "Ran 1 test" in outcome.stderr


def test_the_same_program_gives_the_same_order_of_sets(sandbox):
    program = "print({str(n) for n in range(50)})"
    assert len({python(sandbox, program).stdout for _ in range(4)}) == 1
    assert len({sandbox.run({}, ["python", "-c", program]).stdout for _ in range(3)}) == 1
    assert len({python(sandbox, "import random; print(random.random())").stdout for _ in range(3)}) == 3


def test_large_input_and_output_pass(sandbox):
    text = "x" * 300_000
    outcome = python(sandbox, "import sys; sys.stdout.write(sys.stdin.read())", stdin=text, limits=Limits(output_bytes=300_000))
    assert outcome.stdout == text and outcome.killed_by is None


def test_input_that_nobody_reads_does_no_harm(sandbox):
    assert python(sandbox, "print(1)", stdin="x" * 1_000_000).stdout == "1\n"


EVERYDAY = {
    "open('/dev/null', 'w').write('x'); print(len(open('/dev/urandom', 'rb').read(4)))": "4",
    "import tempfile\nwith tempfile.TemporaryDirectory() as d: print(len(tempfile.NamedTemporaryFile(dir=d).name) > 9)": "True",
    "import asyncio\nasync def main(): await asyncio.sleep(0.01); return 5\nprint(asyncio.run(main()))": "5",
    "from concurrent.futures import ThreadPoolExecutor as T\nprint(list(T(3).map(abs, [-1, 2])))": "[1, 2]",
    "import sqlite3; c = sqlite3.connect('x.db'); print(c.execute('select 3').fetchone())": "(3,)",
    "import os; os.makedirs('a/b'); os.rename('a/b', 'c'); open('c/d', 'w').write('1'); print(open('c/d').read())": "1",
    "import decimal, hashlib, unittest, xml.etree.ElementTree, zlib; print(hashlib.md5(b'').hexdigest()[:4])": "d41d",
}


@pytest.mark.parametrize("level", [level for level in ENFORCES if level != "none"])
def test_what_programs_do_every_day_works_at_every_level(level):
    try:
        opened = Sandbox(level, warm=1)
    except SandboxError as error:
        pytest.skip(f"not on this machine: {error}")
    with opened:
        for program, printed in EVERYDAY.items():
            outcome = python(opened, program)
            assert (outcome.stdout.strip(), outcome.stderr) == (printed, ""), program
        if level != "landlock":  # which has one process
            program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(3)'], stdin=subprocess.DEVNULL)"
            assert python(opened, program).stdout == "3\n"


# ---- refusals


@pytest.mark.parametrize(
    "files",
    [
        {"/etc/x": ""},
        {"../x": ""},
        {"a/../../x": ""},
        {"": ""},
        {".": ""},
        {"a//b": ""},
        {"a\0b": ""},
        {"a": "", "a/b": ""},
        {"x" * 300: ""},
        {"a": 1},
        {"\ud800": ""},
    ],
)
def test_paths_out_of_the_folder_and_odd_files_are_refused(sandbox, files):
    with pytest.raises(SandboxError, match="file"):
        sandbox.run({**files, "main.py": ""}, "main.py")


def test_a_command_that_is_no_file_is_refused(sandbox):
    with pytest.raises(SandboxError, match="one of the files"):
        sandbox.run({"a.py": ""}, "b.py")


@pytest.mark.parametrize("wrong", [{"cpu": 0}, {"wall": float("inf")}, {"memory": 1}, {"processes": 0}, {"output_bytes": -1}])
def test_limits_that_nothing_could_meet_are_refused(wrong):
    with pytest.raises(SandboxError, match=next(iter(wrong))):
        Limits(**wrong)


def test_without_walls_it_refuses_unless_told_otherwise(monkeypatch):
    with pytest.raises(SandboxError, match="allow_unsafe=True"):
        Sandbox("none")
    with pytest.raises(SandboxError, match="wanted"):
        Sandbox("strong")
    monkeypatch.setattr(module, "Pool", unavailable)
    with pytest.raises(SandboxError, match="bubblewrap: gone.*namespaces: gone.*landlock: gone.*allow_unsafe"):
        Sandbox()


def unavailable(level, *_):
    raise SandboxError("gone")


def test_no_walls_have_limits_and_say_so():
    with Sandbox("none", allow_unsafe=True, warm=0) as unsafe:
        assert unsafe.level == "none" and "network" not in unsafe.enforces
        assert "network" in unsafe.missing and "does not stop: disk, files" in repr(unsafe)
        assert python(unsafe, "print(1)").stdout == "1\n"
        assert python(unsafe, "while True: pass", limits=Limits(cpu=0.2, wall=30)).killed_by == "cpu"
        left = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)"
        began = time.monotonic()
        assert python(unsafe, left).exit == 0 and time.monotonic() - began < 20
        while left := list(usage.descendants(unsafe._pool._process.pid, None)):  # a guard that tidies up, if any
            assert time.monotonic() - began < 20, left
            time.sleep(0.05)


def test_a_level_that_breaks_its_claims_is_not_used(monkeypatch):
    """Level none, said to stop everything: its check finds out."""
    claims = ENFORCES["namespaces"]
    monkeypatch.setattr(module, "ENFORCES", {"none": claims})
    with pytest.raises(SandboxError, match="does not keep what it claims.*hidden_files.*network.*processes"):
        Sandbox("none", allow_unsafe=True, warm=0)


@pytest.mark.parametrize("release", ["5.13.19-generic", "4.18.0-553.el8", "5.4"])
def test_kernels_that_count_all_runs_together_are_refused(release):
    program = f"import sys; sys.path[0:0] = [{str(INSIDE)!r}]; import walls; walls._check_kernel({release!r})"
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"Linux {release} found, 5.14 or later needed" in outcome.stderr
    newer = program.replace(release, "6.18.44-x")
    assert subprocess.run([sys.executable, "-c", newer]).returncode == 0


def test_the_check_does_no_harm_without_walls():
    before = Path(os.__file__).stat()
    with Sandbox("none", allow_unsafe=True, warm=0):
        pass
    assert Path(os.__file__).stat().st_mtime_ns == before.st_mtime_ns


# ---- many runs, long lives


def test_many_threads_get_each_its_own_answer(sandbox):
    def one(number):
        return sandbox.run({"main.py": f"print({number} * 2)"}, "main.py").stdout

    with ThreadPoolExecutor(40) as threads:
        assert list(threads.map(one, range(80))) == [f"{2 * number}\n" for number in range(80)]


def test_no_more_runs_at_a_time_than_allowed(monkeypatch):
    with Sandbox(parallel=2, warm=0) as narrow, ThreadPoolExecutor(6) as threads:
        lock, running, most, run = threading.Lock(), 0, 0, narrow._pool.run

        def counted(*arguments):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            try:
                return run(*arguments)
            finally:
                with lock:
                    running -= 1

        monkeypatch.setattr(narrow._pool, "run", counted)
        busy = [threads.submit(narrow.run, {"main.py": "import time; time.sleep(0.2)"}, "main.py") for _ in range(6)]
        assert all(future.result().passed for future in busy) and most == 2


def test_a_killed_nursery_is_replaced():
    with Sandbox(warm=1) as one:
        os.kill(one._pool._process.pid, signal.SIGKILL)
        assert [python(one, "print(1)").stdout for _ in range(3)] == ["1\n"] * 3


def test_a_closed_sandbox_says_so_and_leaves_nothing():
    one = Sandbox(warm=2)
    pid = one._pool._process.pid
    one.close()
    with pytest.raises(SandboxError, match="closed"):
        python(one, "")
    assert not Path(f"/proc/{pid}").exists()


def test_all_ends_with_its_caller():
    program = (
        "import sys, time; from minglm.tasks.sandbox import *; s = default_sandbox(); print(s._pool._process.pid, flush=True)\n"
        "s.run({'a.py': 'import time; time.sleep(60)'}, 'a.py', limits=Limits(wall=60))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as caller:
        nursery = int(caller.stdout.readline())
        deadline = time.monotonic() + 10
        while len(family := [nursery, *usage.descendants(nursery, None)]) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        caller.kill()
    while any(Path(f"/proc/{pid}").exists() for pid in family) and time.monotonic() < deadline + 10:
        time.sleep(0.05)
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]


def test_the_default_is_one_for_a_process_and_another_for_its_fork():
    assert default_sandbox() is default_sandbox()
    ours = default_sandbox()
    ready, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            other = default_sandbox()
            status = 0 if other is not ours and python(other, "print(1)").stdout == "1\n" else 2
        finally:
            os._exit(status)
    os.close(ready)
    os.close(theirs)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert python(ours, "print(2)").stdout == "2\n"


# ---- tests of functions


def test_each_case_is_judged_by_itself_and_told_why(sandbox):
    source = "def f(x):\n    if x == 1: raise KeyError('one')\n    if x == 2: return {1, 2}\n    return [x, {'a': x}]"
    results = run_function_tests(source, "f", [Case((n,), [0, {"a": 0}]) for n in range(4)])
    assert [result.passed for result in results] == [True, False, False, False]
    assert [result.reason for result in results[1:]] == [
        "f(1): KeyError: 'one'",
        "f(2): it returned a set that JSON cannot carry",
        "f(3): wrong value [3, {'a': 3}]",
    ]


def test_the_case_that_hangs_is_named_and_those_before_count(sandbox):
    source = "def f(x):\n    while x == 2: pass\n    return x"
    results = run_function_tests(source, "f", [Case((n,), n) for n in range(4)], limits=Limits(cpu=0.3, wall=30))
    assert [result.passed for result in results] == [True, True, False, False]
    assert "f(2)" in results[2].reason and "cpu" in results[2].reason


@pytest.mark.parametrize(
    ("source", "reason"),
    [("def f(x", "SyntaxError"), ("x = 1", "no f"), ("1 / 0", "ZeroDivisionError"), ("#" * 60_000, "60,000 characters")],
)
def test_code_that_does_not_load_fails_every_case(sandbox, source, reason):
    results = run_function_tests(source, "f", [Case((1,), 1), Case((2,), 2)])
    assert len(results) == 2 and all(reason in result.reason for result in results)


def test_code_may_use_files_beside_it(sandbox):
    (result,) = run_function_tests("import other\ndef f(): return other.x", "f", [Case((), 7)], files={"other.py": "x = 7"})
    assert result


def json_values():
    leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.0, 1.0, -2.5]) | st.text("ab", max_size=2)
    inner = st.recursive(leaves, lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text("ab"), some, max_size=2))
    return inner


@given(json_values(), json_values())
@settings(max_examples=200)
def test_values_are_the_same_exactly_where_their_json_is(left, right):
    assert same_value(left, right) == (json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True))


def test_floats_are_compared_closely_and_types_exactly():
    assert same_value(0.1 + 0.2, 0.3) and same_value(float("nan"), float("nan"))
    assert not same_value(1, 1.0) and not same_value(True, 1) and not same_value(0.3001, 0.3)


def test_all_public_names_exist():
    assert all(hasattr(package, name) for name in package.__all__)


def test_the_benchmark_counts_runs_at_the_levels_of_this_machine():
    rates = bench.measure(default_sandbox().level, threads=20, seconds=0.3)
    assert list(rates) == ["opened for each run", "none ready", "ready"] and all(rate > 0 for rate in rates.values())
