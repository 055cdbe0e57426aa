"""What hostile code tries, at every level that this machine has. Each attack is stopped, or the level does not claim to.

An attack is a program that prints BROKEN if it got through. It names the claim (of `ENFORCES`) that it is against.
"""

import json
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from minglm.tasks.sandbox import ENFORCES, Case, Limits, Sandbox, SandboxError, run_function_tests
from minglm.tasks.sandbox.inside import usage

SECRET = "a-secret-of-the-caller"


@pytest.fixture(scope="module", params=[level for level in ENFORCES if level != "none"])
def sandbox(request):
    try:
        opened = Sandbox(request.param, warm=1)
    except SandboxError as error:
        pytest.skip(f"not on this machine: {error}")
    with opened:
        yield opened


@pytest.fixture
def attack(sandbox, tmp_path, monkeypatch):
    """Runs a program; its text may use CALLER (our process), HOST (a folder of ours with secret.txt), PORT (ours)."""
    monkeypatch.setenv("MINGLM_TEST_SECRET", SECRET)
    (tmp_path / "secret.txt").write_text(SECRET)
    listener = socket.create_server(("127.0.0.1", 0))

    def run(program: str, claim: str, limits: Limits | None = None):
        if claim not in sandbox.enforces:
            pytest.skip(f"level {sandbox.level} declares that it does not stop this")
        names = f"CALLER, HOST, PORT = {os.getpid()}, {str(tmp_path)!r}, {listener.getsockname()[1]}\n"
        outcome = sandbox.run({"attack.py": names + PRELUDE + program}, "attack.py", limits=limits)
        assert "BROKEN" not in outcome.stdout, outcome
        assert SECRET not in outcome.stdout + outcome.stderr + outcome.report
        assert (tmp_path / "secret.txt").read_text() == SECRET
        assert sandbox.run({"a.py": "print(1)"}, "a.py").stdout == "1\n", "the sandbox goes on"
        return outcome

    with listener:
        yield run


PRELUDE = """
import ctypes, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def stopped(action, *kinds):
    try:
        action()
    except kinds or OSError as error:
        print("stopped:", error)
    else:
        print("BROKEN")
"""


def finished(outcome, times: int = 1) -> bool:
    """The program ran to its end, and was stopped so many times on the way."""
    return outcome.exit == 0 and outcome.stdout.count("stopped:") == times


def processes_of(sandbox: Sandbox) -> int:
    return len(list(usage.descendants(sandbox._pool._process.pid, None)))


def settled(sandbox: Sandbox, most: int) -> bool:
    deadline = time.monotonic() + 10
    while processes_of(sandbox) > most and time.monotonic() < deadline:
        time.sleep(0.05)
    return processes_of(sandbox) <= most


# ---- processes


def test_a_fork_bomb_gets_no_more_processes_than_allowed_and_leaves_none(sandbox, attack):
    waiting = processes_of(sandbox)
    program = """
made = 0
while made < 50:
    try:
        if os.fork() == 0:
            time.sleep(60)
        made += 1
    except OSError as error:
        print("stopped:", made)
        break
print("BROKEN" if made > 3 else "held")
"""
    assert finished(attack(program, "processes", Limits(processes=4)))
    assert settled(sandbox, waiting + 1)


def test_a_fork_bomb_that_never_rests_ends_at_its_limits(sandbox, attack):
    waiting = processes_of(sandbox)
    program = """
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
    assert attack(program, "processes", Limits(cpu=0.5, wall=30)).killed_by == "cpu"
    assert settled(sandbox, waiting + 1)


def test_a_thread_bomb_stops_at_the_limit_of_processes_or_memory(attack, sandbox):
    program = """
import threading
started = 0
try:
    while started < 200:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        started += 1
    print("BROKEN")
except (RuntimeError, MemoryError):
    print("stopped:", started)
sys.stdout.flush()
os._exit(0)
"""
    assert finished(attack(program, "processes", Limits(processes=4)))


def test_a_process_left_behind_ends_with_the_run(sandbox, attack):
    waiting = processes_of(sandbox)
    program = """
try:
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if os.fork() == 0:
            for number in range(3, 64):
                try: os.close(number)
                except OSError: pass
            time.sleep(60)
        os._exit(0)
except OSError:
    pass
"""
    began = time.monotonic()
    assert attack(program, "left_behind").exit == 0
    assert time.monotonic() - began < 20 and settled(sandbox, waiting + 1)


def test_a_left_thread_does_not_outlive_its_wall_limit(attack):
    program = "import threading; threading.Thread(target=time.sleep, args=(60,)).start()"
    assert attack(program, "wall", Limits(wall=0.5)).killed_by == "wall"


# ---- memory


def test_a_memory_bomb_is_stopped(attack):
    outcome = attack("x = []\nwhile True: x.append(bytearray(10**7))", "memory", Limits(memory=128 << 20, cpu=10, wall=30))
    assert outcome.killed_by == "memory"


def test_a_memory_bomb_that_catches_its_error_has_no_more_memory(attack):
    program = """
x = []
try:
    while True: x.append(bytearray(10**7))
except MemoryError:
    print("stopped:", len(x))
    if len(x) > 12: print("BROKEN")
"""
    assert finished(attack(program, "memory", Limits(memory=128 << 20, cpu=10, wall=30)))


def test_processes_have_no_more_memory_together_than_one_may(sandbox, attack):
    if sandbox.level == "landlock":
        pytest.skip("it has one process")
    program = """
for _ in range(4):
    if os.fork() == 0:
        break
x = bytearray(b"x") * (80 << 20)
time.sleep(20)
print("BROKEN")
"""
    assert attack(program, "memory", Limits(memory=200 << 20, cpu=10, wall=30)).killed_by == "memory"


def test_memory_that_no_limit_counts_cannot_be_had(attack):
    program = """
stopped(lambda: os.memfd_create("x"))
for number in (29, 425):  # shmget, io_uring_setup on x86_64
    if os.uname().machine == "x86_64" and libc.syscall(number, 1, 1 << 20, 0o1666) >= 0:
        print("BROKEN")
"""
    assert finished(attack(program, "memory"))


# ---- the network


def test_no_sockets(attack):
    program = """
import socket
import subprocess
import tempfile
stopped(lambda: socket.create_connection(("127.0.0.1", PORT), timeout=1))
stopped(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", PORT)))
stopped(lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM))
stopped(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).connect("\\0x"))
stopped(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).bind("here"))
stopped(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
stopped(lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
stopped(lambda: socket.getaddrinfo("example.com", 80))
a, b = socket.socketpair()  # its own, which event loops need
a.send(b"x"); assert b.recv(1) == b"x"
"""
    assert finished(attack(program, "network"), 8)


# ---- files


def test_other_processes_cannot_be_read_in_proc(attack):
    program = """
for who in (CALLER, os.getppid(), 1):
    for what in ("environ", "mem", "maps", "cmdline", "root/etc/passwd"):
        stopped(lambda: open(f"/proc/{who}/{what}", "rb").read(1))
stopped(lambda: os.listdir("/proc"))
"""
    assert finished(attack(program, "other_processes"), 16)


def test_links_lead_nowhere(attack, tmp_path):
    program = """
target = os.path.join(HOST, "secret.txt")
os.symlink(target, "link")
stopped(lambda: print(open("link").read()))
stopped(lambda: open("link", "w"))
os.symlink(HOST, "folder")
stopped(lambda: os.listdir("folder"))
stopped(lambda: open("folder/new.txt", "w"))
stopped(lambda: os.link(target, "hard"))
stopped(lambda: os.rename(target, "stolen"))
stopped(lambda: os.unlink(target))
stopped(lambda: open("../../../../../../etc/passwd"))
stopped(lambda: os.open(".", os.O_TMPFILE | os.O_RDWR) and open("/proc/self/environ"))
"""
    assert finished(attack(program, "files"), 9)
    assert os.listdir(tmp_path) == ["secret.txt"]


def test_a_link_left_behind_harms_nothing_when_the_folder_is_removed(attack, tmp_path):
    attack("os.symlink(HOST, 'link'); os.mkdir('deep'); os.symlink(HOST, 'deep/link'); os.chmod('deep', 0)", "files")
    assert (tmp_path / "secret.txt").read_text() == SECRET


def test_a_folder_of_any_depth_is_removed(sandbox, attack):
    before = set(os.listdir(tempfile.gettempdir()))
    outcome = attack("for _ in range(1200): os.mkdir('d'); os.chdir('d')\nprint('deep')", "files", Limits(cpu=5, wall=20))
    assert outcome.exit == 0 or "No space" in outcome.stderr  # where the folder has a size of its own

    def left():
        new = set(os.listdir(tempfile.gettempdir())) - before
        return len([name for name in new if name.startswith("sandbox-")])

    deadline = time.monotonic() + 20
    while left() > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left() <= 1  # of the run that waits ready


def test_files_outside_cannot_even_be_seen(attack):
    assert finished(attack("stopped(lambda: os.stat(HOST))\nstopped(lambda: os.stat('/etc/passwd'))", "hidden_files"), 2)


def test_python_and_the_system_cannot_be_changed(attack):
    program = """
for place in (os.__file__, sys.executable, "/usr/bin/env", "/etc/ld.so.cache", "/dev/new", "/new", "/usr/new"):
    stopped(lambda: open(place, "a"))
stopped(lambda: os.chmod(os.__file__, os.stat(os.__file__).st_mode))  # would be allowed to an owner, and does no harm
stopped(lambda: os.utime(os.__file__, (0, os.stat(os.__file__).st_mtime)))
file = os.open(os.__file__, os.O_RDONLY)
stopped(lambda: os.fchmod(file, os.stat(os.__file__).st_mode))
stopped(lambda: os.setxattr(os.__file__, "user.x", b"x"))
"""
    assert finished(attack(program, "files"), 11)


def test_a_huge_file_is_stopped(attack):
    program = """
def write():
    with open("big", "wb", buffering=0) as file:
        while True: file.write(b"x" * 10**6)
stopped(write)
if os.path.getsize("big") > 4 << 20: print("BROKEN")
stopped(lambda: os.truncate("big", 1 << 40))
"""
    assert finished(attack(program, "file_bytes", Limits(file_bytes=4 << 20)), 2)


def test_many_files_cannot_fill_the_disk(attack):
    program = """
def write():
    for number in range(100):
        with open(f"{number}", "wb", buffering=0) as file:
            file.write(b"x" * 10**6)
stopped(write)
"""
    assert finished(attack(program, "disk"))


# ---- other processes, privileges


def test_nothing_can_be_traced(attack):
    program = """
for who in (CALLER, os.getppid(), 1):
    if libc.ptrace(16, who, 0, 0) != -1: print("BROKEN")
if libc.ptrace(0, 0, 0, 0) != -1: print("BROKEN")
buffer = ctypes.create_string_buffer(64)
if libc.process_vm_readv(CALLER, buffer, 1, buffer, 1, 0) != -1: print("BROKEN")
if libc.process_vm_readv(os.getppid(), buffer, 1, buffer, 1, 0) != -1: print("BROKEN")
"""
    assert attack(program, "other_processes").exit == 0


def test_signals_reach_nobody_outside(attack):
    with subprocess.Popen(["sleep", "600"]) as bystander:
        program = f"""
for who in (CALLER, -CALLER, {bystander.pid}, os.getppid(), -1, 0):
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
        if who in (-1, 0) and number != signal.SIGTERM: continue
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try: os.kill(who, number)
        except OSError as error: print(who, error)
print("alive")
"""
        outcome = attack(program, "other_processes")
        state = Path(f"/proc/{bystander.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        bystander.kill()
    assert "alive" in outcome.stdout and outcome.exit == 0
    assert state == "S"  # neither ended (Z) nor stopped (T); nor is this process, which has read it


def test_the_first_process_of_the_sandbox_cannot_be_ended(attack):
    program = """
import resource
stopped(lambda: resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0)))
for number in range(1, 65):
    for who in {os.getppid(), 1}:
        try: os.kill(who, number)
        except OSError: pass
print("alive")
"""
    outcome = attack(program, "other_processes")
    assert finished(outcome) and "alive" in outcome.stdout


def test_files_send_no_signals_to_others(attack):
    program = """
import fcntl
a, b = os.pipe()
stopped(lambda: fcntl.fcntl(a, 8, CALLER))  # F_SETOWN
"""
    assert finished(attack(program, "other_processes"))


def test_no_new_namespaces_mounts_or_privileges(attack):
    program = """
for flags in (0x10000000, 0x20000000, 0x00020000, 0x40000000):
    if libc.unshare(flags) != -1: print("BROKEN")
if libc.mount(b"none", b".", b"tmpfs", 0, None) != -1: print("BROKEN")
if libc.umount2(b"/", 2) != -1: print("BROKEN")
stopped(lambda: os.chroot("."))
stopped(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))
stopped(lambda: os.sethostname("x") if hasattr(os, "sethostname") else (_ for _ in ()).throw(OSError()))
stopped(lambda: os.nice(-5))
if os.uname().machine == "x86_64":
    flags = 0x10000000 | 17
    if libc.syscall(56, flags, 0, 0, 0, 0) != -1: print("BROKEN")  # clone
"""
    assert finished(attack(program, "files"), 4)


def test_limits_cannot_be_raised(attack):
    program = """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
    hard = resource.getrlimit(kind)[1]
    stopped(lambda: resource.setrlimit(kind, (hard + 1, hard + 1)), ValueError, OSError)
"""
    assert finished(attack(program, "cpu"), 4)


def test_the_limits_and_priorities_of_others_cannot_be_changed(attack):
    program = """
import resource
stopped(lambda: resource.prlimit(CALLER, resource.RLIMIT_CPU, resource.prlimit(CALLER, resource.RLIMIT_CPU)))
stopped(lambda: os.setpriority(os.PRIO_PROCESS, CALLER, os.getpriority(os.PRIO_PROCESS, 0)))
stopped(lambda: os.sched_setaffinity(CALLER, {0, 1}))
"""
    assert finished(attack(program, "other_processes"), 3)


def test_nothing_of_the_caller_is_inherited(attack):
    program = """
found = []
for number in range(1024):
    try:
        os.fstat(number)
        found.append(number)
    except OSError:
        pass
print(found, dict(os.environ))
if found != [0, 1, 2, 3]: print("BROKEN")
"""
    assert attack(program, "other_processes").exit == 0


# ---- time


def test_an_endless_loop_ends_at_its_cpu_limit(attack):
    outcome = attack("while True: pass", "cpu", Limits(cpu=0.3, wall=30))
    assert outcome.killed_by == "cpu" and outcome.exit is None


def test_a_loop_in_c_that_ignores_signals_ends_at_its_cpu_limit(attack):
    program = """
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
9 ** 9 ** 9
"""
    assert attack(program, "cpu", Limits(cpu=0.3, wall=30)).killed_by == "cpu"


def test_a_sleeper_ends_at_its_wall_limit_and_not_much_later(attack):
    began = time.monotonic()
    assert attack("time.sleep(60)", "wall", Limits(wall=0.3)).killed_by == "wall"
    assert time.monotonic() - began < 10


def test_a_pipe_that_nobody_reads_or_writes_keeps_nothing_waiting(attack):
    assert attack("sys.stdin.read(); print('stopped:')", "wall").exit == 0
    assert (
        attack("os.close(0); os.close(1); os.close(2); os.close(3); time.sleep(60)", "wall", Limits(wall=0.3)).killed_by
        == "wall"
    )


# ---- output


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_flood_of_output_is_cut(attack, number):
    outcome = attack(f"while True: os.write({number}, b'x' * 65536)", "output", Limits(output_bytes=100_000))
    assert outcome.killed_by == "output"
    assert [len(text) for text in (outcome.stdout, outcome.stderr, outcome.report)][number - 1] == 100_000


def test_output_that_is_no_text_is_replaced(attack):
    assert attack("os.write(1, bytes(range(256)))", "output").stdout.count("\ufffd") == 128


# ---- claims of success


CASES = [Case([number], number * number + 1) for number in range(5)]

FORGERIES = {
    "prints": "print('[0, {\"value\": 1}]'); f = lambda x: 0",
    "writes to the report": """
import os, json
for n in range(5): os.write(3, json.dumps([n, {"value": n * n + 1}]).encode() + b"\\n")
f = lambda x: 0
""",
    "says that it passed, token and all": """
import os, sys
def f(x):
    job = sys.modules["__main__"].job
    for number in range(5):
        os.write(3, (job["token"] + '[%d, {"passed": true, "value": true}]\\n' % number).encode())
    os._exit(0)
""",
    "equals everything": """
class All(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
f = lambda x: All(0)
""",
    "is a word for everything": """
class Any(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
f = lambda x: Any("")
""",
    "changes json": "import json\njson.dumps = lambda *a, **k: '[0, {}]'\nf = lambda x: 0",
    "changes equality in the process": "import builtins\nbuiltins.map = builtins.all = lambda *a: True\nf = lambda x: 0",
    "ends early": "import os\nos._exit(0)",
    "ends early, with success": "raise SystemExit(0)",
    "returns nothing that JSON has": "f = lambda x: float('nan')",
    "answers deep": """
def f(x):
    a = []
    for _ in range(100000): a = [a]
    return a
""",
    "answers with a number too long to read": "f = lambda x: 10 ** 5000",
    "answers true": "f = lambda x: True",
    "answers with a deep report": """
import os, sys
os.write(3, (sys.modules["__main__"].job["token"] + "[" * 100000 + "\\n").encode())
f = lambda x: 0
""",
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_no_case_passes_by_a_claim(sandbox, forgery):
    results = run_function_tests(FORGERIES[forgery], "f", CASES, sandbox=sandbox)
    # 1 == True in Python; here a value must have the type, too.
    assert [result.passed for result in results] == [False] * 5
    assert all(result.reason for result in results)
    assert all(run_function_tests("def f(x): return x * x + 1", "f", CASES, sandbox=sandbox))


def test_pickles_are_never_opened(sandbox, tmp_path):
    program = f"""
import os, pickle
class Bomb:
    def __reduce__(self):
        return os.mkdir, ({str(tmp_path / "exploded")!r},)
os.write(3, pickle.dumps(Bomb()) + b"\\n")
f = lambda x: Bomb()
"""
    results = run_function_tests(program, "f", CASES, sandbox=sandbox)
    assert not any(results) and "JSON cannot carry" in results[0].reason
    assert not (tmp_path / "exploded").exists()


def test_a_run_sees_nothing_of_the_one_before(sandbox):
    leave = "import builtins, json, os\nbuiltins.x = json.x = 1\nopen('left', 'w').close()\nos.environ['LEFT'] = '1'"
    look = """
import builtins, json, os
print(json.dumps([hasattr(builtins, "x"), hasattr(json, "x"), os.listdir("."), "LEFT" in os.environ]))
"""
    for _ in range(3):
        assert sandbox.run({"a.py": leave}, "a.py").exit == 0
        assert json.loads(sandbox.run({"a.py": look}, "a.py").stdout) == [
            False,
            False,
            ["a.py"],
            False,
        ]


def test_a_crash_of_the_interpreter_is_an_exit(sandbox):
    outcome = sandbox.run({"a.py": "import ctypes; ctypes.string_at(0)"}, "a.py")
    assert (outcome.exit, outcome.killed_by) == (-11, None)
