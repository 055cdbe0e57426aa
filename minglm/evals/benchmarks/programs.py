"""Questions whose answer is a program, judged by published tests in the sandbox: HumanEval, LiveCodeBench, SciCode.

Published tests run in the process of the answer that they test. The harness counts a run as passed only if it came to its end
and named a token drawn for it, so that leaving early or printing something helps nothing; an answer that searches the
interpreter's frames for that token would still pass. HumanEval's own harness has the same limit.
"""

import base64
import functools
import io
import json
import operator
import pickle
import re
import secrets
import zlib
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from minglm.evals.benchmarks.question import RIGHT, Judge, Question, Unscorable, asked, judged_text
from minglm.evals.benchmarks.records import Record
from minglm.tasks.sandbox import Case, Limits, default_sandbox, run_function_tests
from minglm.tasks.task import Episode, Message, TaskError, Verdict, reply

# Of a run. Published are 3 s (HumanEval) and 6 s (LiveCodeBench), and tests whose right output is megabytes long.
LIMITS = Limits(cpu=10.0, wall=20.0, memory=1 << 30, output_bytes=32 << 20)
FENCE = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json",
)  # fmt: skip
IMPORTS = "".join(f"from {name} import *\n" for name in (*MODULES, "builtins", "typing"))
IMPORTS += f"import {', '.join(MODULES)}\nsys.setrecursionlimit(50_000)\n"
"""What LiveCodeBench has done before an answer runs. In this order pow is the built-in one, and bisect the module."""

_HARNESS = """
import json, os
with open("job.json", encoding="utf-8") as file:
    job = json.load(file)
os.unlink("job.json")
write, space = os.write, {"__name__": "answer"}
exec(compile(job["program"], "answer.py", "exec"), space)
exec(compile(job["tests"], "tests.py", "exec"), space)
write(3, job["token"].encode())
"""


def code_of(content: str, name: str = "") -> str:
    """The last fenced block that holds `name`, else the last one, else the whole content."""
    blocks = FENCE.findall(content) or [content]
    return next((block for block in reversed(blocks) if name in block), blocks[-1])


def run_with_tests(program: str, tests: str) -> str | None:
    """Run a program and then tests of it, in one process in the sandbox. -> why it fails; None if it passes."""
    token = secrets.token_hex(16)
    job = json.dumps({"program": program, "tests": tests, "token": token})
    outcome = default_sandbox().run({"job.json": job, "run.py": _HARNESS}, "run.py", limits=LIMITS)
    if outcome.report.endswith(token):
        return None
    if outcome.killed_by:
        return f"killed for its {outcome.killed_by} limit"
    lines = outcome.stderr.strip().splitlines()
    return f"failed: {lines[-1][:200]}" if lines else f"ended early, with exit {outcome.exit}"


def humaneval(record: Record) -> Question:
    """A function to complete; `test` defines check(candidate)."""
    prompt, name = record.take("prompt", str), record.take("entry_point", str)
    test, solution = record.take("test", str), record.take("canonical_solution", str)
    if f"def {name}" not in prompt:
        raise record.fail("entry_point", name, "the name of a function that the prompt defines")
    if "def check" not in test:
        raise record.fail("test", test, "the definition of check(candidate)")

    def why_wrong(content: str) -> str | None:
        code = code_of(content, f"def {name}")
        before = prompt[: prompt.index(f"def {name}")]
        program = f"{before}\n{code}" if f"def {name}" in code else f"{prompt}{code}"
        return run_with_tests(program, f"{test}\ncheck({name})\n")

    text = f"Complete this Python function. Answer with the whole function in one block of code.\n\n```python\n{prompt}\n```"
    gold = reply(f"```python\n{prompt}{solution}\n```")
    return Question("humaneval", record.take("task_id", str), asked(text), judged_text(why_wrong), gold, published=prompt)


# ---- LiveCodeBench


class _TextOnly(pickle.Unpickler):
    """Private tests are published as a pickled text; nothing else is loaded of it."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"wanted a plain text, found {module}.{name}")


def _tests(record: Record, key: str) -> list[dict[str, str]]:
    """Public and private tests: JSON, or the base64 of the zlib of a pickled JSON."""
    text = record.take(key, str, "[]")
    if not text.lstrip().startswith("["):
        try:
            text = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load()
        except (ValueError, zlib.error, pickle.UnpicklingError, EOFError) as error:
            raise record.fail(key, text[:40], f"JSON, or base64 of zlib of a pickled text ({error})") from None
    tests = Record(record.place, {key: text}).take_json(key, list)
    for test in tests:
        if not isinstance(test, dict) or not {"input", "output", "testtype"} <= test.keys():
            raise record.fail(key, test, "tests with input, output and testtype")
        if test["testtype"] not in ("stdin", "functional"):
            raise record.fail(f"{key}.testtype", test["testtype"], "stdin or functional")
    return tests


def live_code_bench(record: Record) -> Question:
    """A program that reads stdin, or a method of `Solution`, or a function of its name; all public and private tests count.
    Stricter than published: a program that exits with an error is wrong whatever it wrote, and there is no numpy to import,
    which the question says."""
    tests = _tests(record, "public_test_cases") + _tests(record, "private_test_cases")
    if not tests:
        raise record.fail("public_test_cases", [], "a test at least, there or in private_test_cases")
    starter = record.values.get("starter_code") or ""
    metadata = record.take_json("metadata", dict, {})
    functional = tests[0]["testtype"] == "functional"
    name = metadata.get("func_name")
    if functional and not name:
        raise record.fail("metadata.func_name", name, "the name of the method that functional tests call")
    cases = _cases(record, tests) if functional else []

    def why_wrong(content: str) -> str | None:
        code = code_of(content, f"def {name}" if functional else "")
        return _function_fails(code, name, cases) if functional else _program_fails(code, tests)

    form = f"Write the method in this class:\n\n```python\n{starter}\n```" if functional else "Read stdin and write stdout."
    content = record.take("question_content", str)
    there = "Python's standard library is there, nothing else."
    text = f"{content}\n\n{form}\n\n{there} Answer with the whole program in one block of code."
    gold = record.values.get("solution")  # not published; hand-written records have one
    gold = reply(f"```python\n{gold}\n```") if gold else ()
    id = record.take("question_id", str)
    return Question("live_code_bench", id, asked(text), judged_text(why_wrong), gold, published=content)


def _cases(record: Record, tests: Sequence[dict[str, str]]) -> list[Case]:
    found = []
    for test in tests:
        try:
            arguments = [json.loads(line) for line in test["input"].split("\n") if line.strip()]
            found.append(Case(arguments, json.loads(test["output"])))
        except ValueError:
            raise record.fail("a functional test", test, "input with a JSON value a line, and output with one") from None
    return found


def _function_fails(code: str, name: str, cases: Sequence[Case]) -> str | None:
    method = f"Solution().{name}" if "class Solution" in code else name
    source = f"{IMPORTS}\n{code}\n\ndef answer_of_method(*arguments):\n    return {method}(*arguments)\n"
    for case in cases:  # as published: a run and its time for each, and what Python calls equal is right
        (result,) = run_function_tests(source, "answer_of_method", [case], limits=LIMITS, same=operator.eq)
        if not result:
            return result.reason
    return None


def _program_fails(code: str, tests: Sequence[dict[str, str]]) -> str | None:
    if not code.strip():
        return "no program"
    for number, test in enumerate(tests):
        outcome = default_sandbox().run({"main.py": f"{IMPORTS}\n{code}"}, "main.py", test["input"], LIMITS)
        if outcome.killed_by or outcome.exit:
            return f"test {number}: {outcome.killed_by or outcome.stderr.strip()[-200:]}"
        if not same_output(outcome.stdout, test["output"]):
            return f"test {number}: wrong output {outcome.stdout[:80]!r}"
    return None


def same_output(found: str, wanted: str) -> bool:
    """Line by line without blanks at the ends, as published: the same text, or decimal numbers of exactly the same values."""
    left, right = ([line.strip() for line in text.strip().split("\n")] for text in (found, wanted))
    return len(left) == len(right) and all(a == b or _same_numbers(a, b) for a, b in zip(left, right, strict=True))


def _same_numbers(found: str, wanted: str) -> bool:
    try:
        return [Decimal(word) for word in found.split()] == [Decimal(word) for word in wanted.split()]
    except InvalidOperation:
        return False


# ---- SciCode


class Steps(Episode):
    """Asks one sub-step after the other."""

    def __init__(self, texts: Sequence[str]):
        self.texts = list(texts)

    def step(self, message: Message) -> list[Message]:
        if self.done:
            raise TaskError("the episode has ended: start another one")
        self.texts.pop(0)
        self.done = not self.texts
        return [] if self.done else asked(self.texts[0])


def scicode(record: Record) -> Question:
    """A problem of several sub-steps, each a function that later ones call; reward: the share of sub-steps that pass. Unlike
    published, the three steps whose code its harness gives (13.6, 62.1, 76.3) are asked, too."""
    dependencies = record.values.get("required_dependencies") or ""
    steps = [Record(f"{record.place}, step {n}", step) for n, step in enumerate(record.take_json("sub_steps", list), 1)]
    if not steps or not all(isinstance(step.values, dict) for step in steps):
        raise record.fail("sub_steps", record.values.get("sub_steps"), "a list of objects, one at least")
    texts = [
        f"{step.take('step_description_prompt', str)}\n\n```python\n{step.take('function_header', str)}\n```\n\n"
        f"Available: {dependencies or 'the standard library'}. Answer with this one function in a block of code."
        for step in steps
    ]
    texts[0] = f"{record.take(('problem_description_main', 'problem_name'), str)}\n\n{texts[0]}"
    tests = [step.take_texts("test_cases") for step in steps]
    missing = _missing(dependencies, [test for own in tests for test in own])
    gold: list[Message] = []
    codes = [step.values.get("ground_truth_code") for step in steps]
    if all(codes):
        for number, code in enumerate(codes):
            gold += [*(asked(texts[number]) if number else ()), *reply(f"```python\n{code}\n```")]
    judge = _step_judge(record.place, dependencies, tests, missing)
    id = record.take("problem_id", str)
    published = "\n".join(step.values["step_description_prompt"] for step in steps)
    world = functools.partial(Steps, texts)
    return Question("scicode", id, asked(texts[0]), judge, gold, turns=len(steps), world=world, published=published)


def _missing(dependencies: str, tests: Sequence[str]) -> list[str]:
    """What the tests need and the sandbox, which has the standard library, lacks."""
    packages = re.findall(r"^\s*(?:import|from)\s+(\w+)", dependencies, re.MULTILINE)
    needed = sorted({name for name in packages if name in ("numpy", "scipy", "sympy", "matplotlib", "h5py")})
    targets = any(re.search(r"\btarget\b", test) and not re.search(r"\btarget\s*=[^=]", test) for test in tests)
    return needed + (["the right values of test_data.h5"] if targets else [])


def _step_judge(place: str, dependencies: str, tests: Sequence[Sequence[str]], missing: Sequence[str]) -> Judge:
    def judge(response: Sequence[Message]) -> Verdict:
        if missing:
            raise Unscorable(
                f"{place}: SciCode's tests need {', '.join(missing)}, and the sandbox has Python's standard library only; "
                "judge the answers with the benchmark's own harness"
            )
        codes = [code_of(message.get("content") or "") for message in response if message.get("role") == "assistant"]
        reasons, program = [], dependencies
        for code, own in zip(codes, tests, strict=False):
            program += "\n" + code
            reason = run_with_tests(program, "\n".join(own))
            reasons += [reason] if reason else []
        passed = min(len(codes), len(tests)) - len(reasons)
        return RIGHT if passed == len(tests) else Verdict(passed / len(tests), tuple(reasons) or ("steps are missing",))

    return judge
