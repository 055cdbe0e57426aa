"""Repairing a small repository: read its files, edit them, run its tests, until they pass.

The repository is judged by its tests and by more calls that the agent does not see. Its code runs in the sandbox alone
(minglm/tasks/sandbox), which is told the calls and not the values that are right. Only the states that a demonstration
passes through, with each module as it comes or as it should be, are known without running them: what their tests say is
computed (minglm/tasks/agents/programs.py). Measure of difficulty: modules and functions; at the highest, two bugs.
"""

import functools
import itertools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from minglm.tasks.agents.calling import Call, Tool, tool
from minglm.tasks.agents.program_draw import Check, draw_checks, draw_program, failure
from minglm.tasks.agents.programs import Program, mutations, source, words
from minglm.tasks.agents.world import AgentProblem, Move, Moves, World, word
from minglm.tasks.sandbox import Case, Limits, run_function_tests
from minglm.tasks.task import Message

TESTS = "tests.py"
TOOLS = [
    tool("read_file", "Read a file", {"path": "string"}),
    tool("edit", "Replace text of a file", {"path": "string", "old": "string", "new": "string"}),
    tool("run_tests", "Run tests.py", {}),
]
COUNTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (2, 2, 1), 5: (3, 2, 1)}  # functions of each module, by difficulty
VISIBLE, HIDDEN = 2, 6  # calls of each function that is tested
SHOWN_FAILURES = 3
MOST_RUNS = 12  # of the tests, in one attempt
LONGEST_FILE = 10_000  # characters
LIMITS = Limits(cpu=1.0, wall=5.0)
# Inside the sandbox: any function of any module by its name.
CALLER = """import importlib

def call(module, name, arguments):
    return getattr(importlib.import_module(module), name)(*arguments)
"""

Files = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Repository(AgentProblem):
    """right, shown: the program as it should be and as it is. visible: the calls of its tests. hidden: further ones."""

    right: Program
    shown: Program
    visible: tuple[Check, ...]
    hidden: tuple[Check, ...]

    family = "repository"
    stands_for = "Software-engineering agentic RL of section 3.3 with verifiable outcomes, and SWE-bench of section 4."
    difficulties = range(1, 6)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        while True:
            right = draw_program(rng, COUNTS[difficulty], with_loops=difficulty >= 3)
            tested = right if difficulty <= 3 else right[-1:]
            visible = draw_checks(rng, right, tested, VISIBLE)
            hidden = draw_checks(rng, right, right, HIDDEN)
            shown = right
            breaking = [other for other in mutations(right) if any(failure(other, check) for check in visible)]
            if not breaking:
                continue
            if difficulty < 5:
                return cls(right, rng.choice(breaking), visible, hidden)
            # Two bugs in two modules, each of which fails the tests alone; together they must not make up for each other.
            one, two = rng.choice(breaking), rng.choice(breaking)
            shown = tuple(b if b != r else a for a, b, r in zip(one, two, right, strict=True))
            if len(_changed(right, shown)) == 2 and any(failure(shown, check) for check in visible):
                return cls(right, shown, visible, hidden)

    def files(self, program: Program) -> Files:
        """All files, the tests last. What the functions say that they do is right in each."""
        said = {function.name: words(function) for module in self.right for function in module.functions}
        modules = [(module.path, source(module, said)) for module in program]
        return (*modules, (TESTS, _tests_source(self.visible)))

    @property
    def messages(self) -> list[Message]:
        names = ", ".join(path for path, _ in self.files(self.shown))
        return [{"role": "user", "content": f'Repair the code so that {TESTS} passes. Then answer "done". Files: {names}'}]

    @property
    def tools(self) -> list[Tool]:
        return TOOLS

    @property
    def key(self) -> str:
        return json.dumps([self.files(self.shown), self.files(self.right)])

    def start(self) -> "Workplace":
        return Workplace(self)

    def solve(self) -> Moves:
        [report] = yield Move("Run the tests.", [Call("run_tests", {})])
        thinking = f"{report.partition(': ')[0]} fails."
        before, after = dict(self.files(self.shown)), dict(self.files(self.right))
        wrong = _changed(self.right, self.shown)
        for module in reversed(self.shown):  # from what is tested down to what it calls
            path = module.path
            yield Move(f"{thinking} Read {path}.", [Call("read_file", {"path": path})])
            thinking = f"{path} is right."
            if path in wrong:
                old, new = edit_between(before[path], after[path])
                wrong.remove(path)
                yield Move(self._reason(path), [Call("edit", {"path": path, "old": old, "new": new})])
                [report] = yield Move("Run the tests again.", [Call("run_tests", {})])
                thinking = f"{report.partition(': ')[0]} fails."
            if not wrong:
                break
        yield Move("All pass.", content="done")

    def _reason(self, path: str) -> str:
        """Why a module is edited: what the function says, beside what its code has."""
        right, shown = (next(m for m in program if m.path == path) for program in (self.right, self.shown))
        for good, bad in zip(right.functions, shown.functions, strict=True):
            if good != bad:
                return f"{good.name} should be {words(good)}. The code has {words(bad)}."
        names = [{name for _, names in module.imports for name in names} for module in (right, shown)]
        return f"{', '.join(sorted(names[0] - names[1]))} is not imported."

    def _attempt(self, edited: Program) -> list[Message]:
        """One edit that makes the shown program this one, without a look or a test; none if they are equal."""

        def moves() -> Moves:
            before, after = dict(self.files(self.shown)), dict(self.files(edited))
            for path in before:
                if before[path] != after[path]:
                    old, new = edit_between(before[path], after[path])
                    yield Move("", [Call("edit", {"path": path, "old": old, "new": new})])
            yield Move("", content="done")

        return self.play(moves())

    def near_miss(self, rng: random.Random) -> list[Message]:
        """Another edit in one place, after which some call is wrong; or none."""
        wrong = [other for other in mutations(self.shown) if self._fails(other)]
        return self._attempt(rng.choice([self.shown, *wrong]))

    def guess(self, rng: random.Random) -> list[Message]:
        """Any edit in one place, as good as any other."""
        return self._attempt(rng.choice(mutations(self.shown)))

    @property
    def chance(self) -> float:
        edits = mutations(self.shown)
        return sum(not self._fails(edited) for edited in edits) / len(edits)

    def _fails(self, program: Program) -> bool:
        return any(failure(program, check) for check in (*self.visible, *self.hidden))


class Workplace(World):
    """The repository's files while they are edited, until the assistant says that it is done."""

    def __init__(self, problem: Repository):
        super().__init__(problem.tools, turn_limit=30)
        self.checks = (*problem.visible, *problem.hidden)
        self.visible = len(problem.visible)
        self.files = dict(problem.files(problem.shown))
        self.runs = 0
        # Any mixture of wrong and right modules: what a demonstration passes through.
        states = itertools.product(*(dict.fromkeys(pair) for pair in zip(problem.shown, problem.right, strict=True)))
        self.known = {problem.files(program): tuple(failure(program, check) for check in self.checks) for program in states}

    def call(self, call: Call) -> str:
        if call.name == "run_tests":
            return self._run_tests()
        path = call.arguments["path"]
        if path not in self.files:
            return f"error: no such file; there are {', '.join(self.files)}"
        if call.name == "read_file":
            return self.files[path].rstrip("\n")
        return self._edit(path, call.arguments["old"], call.arguments["new"])

    def hear(self, content: str) -> str | None:
        if word(content) != "done":
            self.end(f"said {content[:40]!r}; wanted 'done'")
            return None
        results = self._results()
        failed = [_told(check, result) for check, result in zip(self.checks, results, strict=True) if result]
        if failed:
            self.end(*failed[:SHOWN_FAILURES])
        return None

    def _edit(self, path: str, old: str, new: str) -> str:
        if path == TESTS:
            return f"error: {TESTS} cannot be changed"
        count = self.files[path].count(old) if old else 0
        if count != 1:
            return f"error: old is there {count} times, wanted once"
        edited = self.files[path].replace(old, new)
        if len(edited) > LONGEST_FILE:
            return f"error: larger than {LONGEST_FILE} characters"
        if not _is_text(edited):
            return "error: new is no text"
        self.files[path] = edited
        return "ok"

    def _run_tests(self) -> str:
        self.runs += 1
        if self.runs > MOST_RUNS:
            return f"error: the tests were run {MOST_RUNS} times, and no more"
        pairs = list(zip(self.checks, self._results(), strict=True))[: self.visible]
        failed = [_told(check, result) for check, result in pairs if result]
        return "\n".join(failed[:SHOWN_FAILURES]) or f"all {len(pairs)} tests pass"

    def _results(self) -> tuple[str, ...]:
        files = tuple(self.files.items())
        return self.known[files] if files in self.known else run_checks(files, self.checks)


@functools.lru_cache(maxsize=1024)
def run_checks(files: Files, checks: tuple[Check, ...]) -> tuple[str, ...]:
    """Make the calls in the sandbox. -> what is wrong with each, empty if it returned what it should.

    Kept, so that a replay does not run the same files again. Code that draws numbers or looks at the time may have other
    results in another process. Raises SandboxError if there is no sandbox.
    """
    cases = [Case((check.module, check.function, check.arguments), check.wanted) for check in checks]
    modules = {path: text for path, text in files if path != TESTS}
    results = run_function_tests(CALLER, "call", cases, files=modules, limits=LIMITS)
    return tuple("" if result.passed else _steady(result.reason.partition("): ")[2] or result.reason) for result in results)


def _steady(reason: str) -> str:
    """Without what differs from run to run: addresses, folders, which of the two clocks ran out."""
    reason = re.sub(r"0x[0-9a-f]+", "0x", reason)
    reason = re.sub(r"/(?:[^\s'\"()/]+/)+", "", reason)
    return re.sub(r"its (cpu|wall) limit", "its time limit", reason)


def _told(check: Check, result: str) -> str:
    return f"{_call_text(check)}: {result}, wanted {check.wanted}"


def _call_text(check: Check) -> str:
    shown = ", ".join(str(list(one)) if isinstance(one, tuple) else str(one) for one in check.arguments)
    return f"{check.function}({shown})"


def _tests_source(checks: Sequence[Check]) -> str:
    imported: dict[str, dict[str, None]] = {}
    for check in checks:
        imported.setdefault(check.module, {})[check.function] = None
    lines = [f"from {module} import {', '.join(names)}" for module, names in imported.items()]
    return "\n".join([*lines, "", *(f"assert {_call_text(check)} == {check.wanted}" for check in checks)]) + "\n"


def _changed(right: Program, shown: Program) -> list[str]:
    """The modules that differ, by path."""
    return [module.path for module, other in zip(right, shown, strict=True) if module != other]


def _is_text(text: str) -> bool:
    """Whether a file can hold it: half a surrogate pair has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def edit_between(before: str, after: str) -> tuple[str, str]:
    """old and new of the edit that makes the one the other: whole lines, as few as are there once, and some in their place."""
    old, new = before.split("\n"), after.split("\n")
    same = 0
    while same < min(len(old), len(new)) and old[same] == new[same]:
        same += 1
    tail = 0
    while tail < min(len(old), len(new)) - same and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    while True:
        found = "\n".join(old[same : len(old) - tail])
        if found and before.count(found) == 1 and same < len(new) - tail:
            return found, "\n".join(new[same : len(new) - tail])
        if tail and (same == 0 or old[len(old) - tail]):
            tail -= 1
        else:
            same -= 1
