"""Questions that are worked at in a shell: SWE-bench Verified and Terminal-Bench, in the sandbox.

A response is judged by doing its commands again in a fresh folder and then running the published tests. The real images
hold compilers, packages and services that the sandbox lacks: so each problem's own solution is tried first, and where it
does not pass the problem is Unscorable here, which says what image is needed. That is so for nearly all published ones.
As in `programs`, the tests run in the process of what they test: code that searches the interpreter's frames could pass.
"""

import functools
import itertools
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minglm.evals.benchmarks.calls import calls_of
from minglm.evals.benchmarks.question import RIGHT, Judge, Question, Unscorable, asked
from minglm.evals.benchmarks.records import Record, RecordError
from minglm.tasks.sandbox import Limits, default_sandbox
from minglm.tasks.task import Episode, Message, TaskError, Verdict

LIMITS = Limits(cpu=60.0, wall=180.0, memory=2 << 30, processes=64)
TURNS = 50
HOME = "/box"  # where the sandbox's folder is
SHOWN = 8000  # characters of a command's output
TOOL = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command in the working folder. It starts anew each time: no variables stay, files do.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}

_HARNESS = '''
import importlib.util, inspect, json, os, subprocess, sys, unittest
with open(".job.json", encoding="utf-8") as file:
    job = json.load(file)
os.unlink(".job.json")
os.unlink(".run.py")
write, output = os.write, ""
for command in job["commands"]:
    try:
        done = subprocess.run(["bash", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=60)
        output = done.stdout.decode("utf-8", "replace") + (f"\\n[exit {done.returncode}]" if done.returncode else "")
    except subprocess.TimeoutExpired:
        output = "[killed after 60 seconds]"
for path, text in job["files"].items():
    if text is None:
        subprocess.run(["rm", "-f", path], check=True)
        continue
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
if job["patch"]:
    with open(".patch", "w", encoding="utf-8") as file:
        file.write(job["patch"])
    subprocess.run(["git", "apply", ".patch"], check=True)

def found_in(path):
    """Name -> test, for each test of a file."""
    spec = importlib.util.spec_from_file_location(path[:-3].replace("/", "."), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    tests = {}
    for name, value in list(vars(module).items()):
        if name.startswith("test") and inspect.isfunction(value):
            tests[f"{path}::{name}"] = value
        elif inspect.isclass(value) and (name.startswith("Test") or issubclass(value, unittest.TestCase)):
            for method in dir(value):
                if method.startswith("test"):
                    tests[f"{path}::{name}::{method}"] = run_of(value, method)
    return tests

def run_of(kind, method):
    if not issubclass(kind, unittest.TestCase):
        return lambda: getattr(kind(), method)()
    def run():
        result = unittest.TestResult()
        kind(method).run(result)
        assert result.wasSuccessful()
    return run

passed = []
sys.path.insert(0, os.getcwd())
for path in job["tests"]:
    try:
        tests = found_in(path)
    except BaseException:
        continue
    for name, test in tests.items():
        try:
            test()
        except BaseException:
            continue
        passed.append(name)
write(3, (job["token"] + json.dumps({"output": output[-job["shown"]:], "passed": passed})).encode())
'''


def in_box(
    files: Mapping[str, str],
    commands: Sequence[str],
    tests: Sequence[str] = (),
    test_files: Mapping[str, str | None] | None = None,
    patch: str = "",
) -> dict[str, Any]:
    """Do commands in a fresh folder with `files`; then lay test files (None: no such file) and a patch over it, and run all
    tests of some files.

    -> output of the last command, and the names of the tests that passed, as pytest writes them; neither where it broke off.
    """
    token = secrets.token_hex(16)
    job = {"commands": list(commands), "tests": list(tests), "files": dict(test_files or {}), "patch": patch}
    box = {**files, ".job.json": json.dumps({**job, "token": token, "shown": SHOWN}), ".run.py": _HARNESS}
    outcome = default_sandbox().run(box, ".run.py", limits=LIMITS)
    _, mark, report = outcome.report.partition(token)
    if not mark:
        return {"output": f"[{outcome.killed_by or outcome.stderr[-500:] or outcome.exit}]", "passed": []}
    return json.loads(report)


class Shell(Episode):
    """Answers calls of `bash`; a message without a call ends it."""

    def __init__(self, files: Mapping[str, str]):
        self.files, self.commands = files, []

    def step(self, message: Message) -> list[Message]:
        if self.done:
            raise TaskError("the episode has ended: start another one")
        calls = calls_of(message)
        self.done = not calls
        return [{"role": "tool", "content": self._answer(*call)} for call in calls]

    def _answer(self, name: str, arguments: Any) -> str:
        command = _command_of(name, arguments)
        if command is None:
            return 'Error: wanted a call of bash with {"command": "..."}'
        self.commands.append(command)
        return in_box(self.files, self.commands)["output"]


def commands_of(response: Sequence[Message]) -> list[str]:
    calls = [call for message in response if message.get("role") == "assistant" for call in calls_of(message)]
    return [command for command in itertools.starmap(_command_of, calls) if command is not None]


def _command_of(name: str, arguments: Any) -> str | None:
    command = arguments.get("command") if name == "bash" and isinstance(arguments, dict) else None
    return command if isinstance(command, str) else None


def command_message(command: str) -> Message:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "bash", "arguments": {"command": command}}}],
    }


def _judge(fails: Callable[[tuple[str, ...]], list[str]], solution: str, needs: str) -> Judge:
    """fails: commands -> which tests fail. The published solution is tried once, when the first answer is judged."""

    @functools.cache
    def can_be_judged() -> bool:
        return not fails((solution,)) and bool(fails(()))

    def judge(response: Sequence[Message]) -> Verdict:
        if not can_be_judged():
            raise Unscorable(needs)
        failed = fails(tuple(commands_of(response)))
        return Verdict(0.0, (f"fails {', '.join(failed)[:300]}",)) if failed else RIGHT

    return judge


def files_below(folder: Path, left_out: Sequence[str] = ()) -> dict[str, str]:
    """Path -> text of all files of a folder that are text, without hidden folders."""
    found = {}
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        path = file.relative_to(folder)
        if not file.is_file() or path.parts[0] in left_out or any(part.startswith(".git") for part in path.parts):
            continue
        try:
            found[path.as_posix()] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures and the like: a solution that needs them is found not to pass
    return found


def swe_bench(record: Record) -> Question:
    """An issue of a repository. Its checkout at base_commit is looked for beside the file of records, in the folder of the
    instance's name; right is what makes all of FAIL_TO_PASS and PASS_TO_PASS pass after the test patch, before which the files
    that it touches are laid back as they were, whatever the answer did to them."""
    id, statement = record.take("instance_id", str), record.take("problem_statement", str)
    patch, test_patch = record.take("patch", str), record.take("test_patch", str)
    wanted = record.take_json("FAIL_TO_PASS", list) + record.take_json("PASS_TO_PASS", list)
    if not wanted or not all(isinstance(test, str) for test in wanted):
        raise record.fail("FAIL_TO_PASS", record.values.get("FAIL_TO_PASS"), "names of tests, one at least")
    for key in ("repo", "base_commit", "version"):
        record.take(key, str)
    checkout = files_below(Path(re.sub(r":\d+$|\[\d+\]$", "", record.place)).parent / id)
    names = {test: _node(test) for test in wanted}
    paths = sorted({name.split("::")[0] for name in names.values()})
    touched = itertools.chain(*re.findall(r"^diff --git a/(\S+) b/(\S+)$", test_patch, re.MULTILINE))
    as_they_were = {path: checkout.get(path) for path in touched}

    def fails(commands: tuple[str, ...]) -> list[str]:
        if not checkout:
            return ["no checkout"]
        passed = in_box(checkout, commands, paths, as_they_were, test_patch)["passed"]
        return [test for test, name in names.items() if name not in passed]

    image = f"swebench/sweb.eval.x86_64.{id.replace('__', '_1776_')}"
    needs = (
        f"{record.place}: {id} does not pass with its own patch in the sandbox; needed is the image {image}, in which the "
        f"benchmark's harness judges the patches of answers.jsonl (or, for a plain repository, its checkout at base_commit "
        f"in {id}/ beside the records)"
    )
    solution = f"git apply <<'END_OF_PATCH'\n{patch.rstrip(chr(10))}\nEND_OF_PATCH"
    gold = [command_message(solution), {"role": "tool", "content": ""}, {"role": "assistant", "content": "Done."}]
    text = f"The working folder is a checkout of {record.values['repo']}. Change it so that this is resolved:\n\n{statement}"
    judge = _judge(fails, solution, needs)
    return Question(
        "swe_bench", id, asked(text), judge, gold, tools=[TOOL], turns=TURNS, world=lambda: Shell(checkout), published=statement
    )  # fmt: skip


def _node(test: str) -> str:
    """`test_x (package.module.Class)`, unittest's name, as pytest's `package/module.py::Class::test_x`, which stays."""
    match = re.fullmatch(r"(\w+) \(([\w.]+)\)", test)
    if not match:
        return test
    *module, kind = match.group(2).removesuffix(f".{match.group(1)}").split(".")
    return f"{'/'.join(module)}.py::{kind}::{match.group(1)}"


# ---- Terminal-Bench


def terminal_bench(folder: Path) -> Question:
    """A task's folder: of the first version (task.yaml, solution.sh or keys to press in solution.yaml, tests/) or the second
    (task.toml, instruction.md, solution/solve.sh, environment/, tests/). What is /app in the image is the working folder here.
    Keys are not pressed here and other tests than pytest's are not run: such tasks do not pass, and so are not judged."""
    second = (folder / "task.toml").is_file()
    instruction = _instruction(folder, second)
    solutions = [folder / name for name in (("solution/solve.sh",) if second else ("solution.sh", "solution.yaml"))]
    solution = next((file for file in solutions if file.is_file()), None)
    tests = {f"tests/{path}": text for path, text in files_below(folder / "tests").items()}
    if not solution or not tests:
        raise RecordError(f"{folder}: found no {solutions[0].name} or no file in tests/; wanted a task of Terminal-Bench")
    if second:
        files = files_below(folder / "environment", ("Dockerfile", "docker-compose.yaml"))
    else:
        left_out = ("task.yaml", "Dockerfile", "docker-compose.yaml", "run-tests.sh", "solution.sh", "solution.yaml", "tests")
        files = files_below(folder, left_out)
    here = {path: text.replace("/app", HOME) for path, text in tests.items()}
    paths = sorted(path for path in here if Path(path).name.startswith("test") and path.endswith(".py"))
    count = sum(len(re.findall(r"^\s*def test", here[path], re.MULTILINE)) for path in paths)

    def fails(commands: tuple[str, ...]) -> list[str]:
        passed = in_box(files, [one.replace("/app", HOME) for one in commands], paths, here)["passed"]
        return [] if len(passed) >= count > 0 else [f"{count - len(passed)} of {count} tests"]

    script = solution.read_text(encoding="utf-8") if solution.suffix == ".sh" else ""
    needs = (
        f"{folder}: the task does not pass with its own solution in the sandbox; needed is docker with the task's Dockerfile, "
        "where Terminal-Bench's harness can ask the endpoint itself"
    )
    gold = (
        [command_message(script), {"role": "tool", "content": ""}, {"role": "assistant", "content": "Done."}] if script else []
    )
    judge = _judge(fails, script, needs)
    messages = asked(instruction.replace("/app", HOME))
    return Question(
        "terminal_bench", folder.name, messages, judge, gold, tools=[TOOL], turns=TURNS, world=lambda: Shell(files),
        published=instruction,
    )  # fmt: skip


def _instruction(folder: Path, second: bool) -> str:
    file = folder / ("instruction.md" if second else "task.yaml")
    if not file.is_file():
        raise RecordError(f"{folder}: found no {file.name}; wanted a task of Terminal-Bench")
    text = file.read_text(encoding="utf-8")
    if second:
        return text
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecordError(f"{file}: this is no YAML: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("instruction"), str):
        raise RecordError(f"{file}: instruction is missing; wanted a text")
    return found["instruction"]
