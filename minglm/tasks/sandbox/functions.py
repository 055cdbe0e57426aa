"""Tests of a function of model code: called inside the sandbox, judged outside of it.

Only arguments go in, only JSON comes out, and the values are compared here. So code cannot claim to have passed: it must
say the right values, and of these nothing is inside. A line of the report counts if it begins with a token drawn for the
run, and the first one for a case counts.
"""

import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .limits import Limits, Outcome
from .pool import INSIDE
from .sandbox import Sandbox, default_sandbox

_HARNESS = (INSIDE / "cases.py").read_text(encoding="utf-8")
MOST_CHARACTERS = 50_000
"""Longer sources are refused unread."""


class Case(NamedTuple):
    """One call. Arguments and value are what JSON can carry; tuples count as lists, and keys of dictionaries as strings."""

    arguments: Sequence[Any]
    expected: Any


class CaseResult(NamedTuple):
    """True if the case passed. The reason of one that did not names arguments and what came, not what was expected."""

    passed: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.passed


def run_function_tests(
    source: str,
    name: str,
    cases: Sequence[Case],
    *,
    files: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    sandbox: Sandbox | None = None,
    same: Callable[[Any, Any], bool] | None = None,
) -> list[CaseResult]:
    """Call the function `name` of a Python source with the arguments of each case, all in one run.

    files: more files in its folder, which it may import. sandbox: by default the process's own. same: whether a value, as
    JSON has it, is the expected one; by default `same_value`. Raises SandboxError if there is no sandbox.
    """
    if len(source) > MOST_CHARACTERS:
        return [CaseResult(False, f"{len(source):,} characters of code: at most {MOST_CHARACTERS:,} are read")] * len(cases)
    token = secrets.token_hex(16)
    job = {"name": name, "token": token, "arguments": [list(case.arguments) for case in cases]}
    box = {**(files or {}), "solution.py": source, "cases.json": json.dumps(job), "run_cases.py": _HARNESS}
    outcome = (sandbox or default_sandbox()).run(box, "run_cases.py", limits=limits)
    told = _read_report(outcome.report, token)
    return [
        _judge(case, told.get(number), told.get(-1), outcome, name, same or same_value) for number, case in enumerate(cases)
    ]


def _read_report(report: str, token: str) -> dict[int, dict[str, Any]]:
    told: dict[int, dict[str, Any]] = {}
    for line in report.split("\n"):
        if line.startswith(token):
            try:
                number, outcome = json.loads(line[len(token) :])
            except (ValueError, TypeError, RecursionError):
                continue
            if type(number) is int and isinstance(outcome, dict):
                told.setdefault(number, outcome)
    return told


def _judge(case: Case, told: Any, load: Any, outcome: Outcome, name: str, same: Callable[[Any, Any], bool]) -> CaseResult:
    call = f"{name}({', '.join(map(repr, case.arguments))})"
    call = call if len(call) <= 120 else call[:117] + "..."
    if told is None:
        if load is not None:
            return CaseResult(False, f"the code does not load: {str(load.get('error'))[:300]}")
        why = f"killed for its {outcome.killed_by} limit" if outcome.killed_by else f"ended with exit {outcome.exit}"
        return CaseResult(False, f"{call}: no value; the run was {why}" if outcome.killed_by else f"{call}: no value; it {why}")
    if "value" not in told:
        return CaseResult(False, f"{call}: {str(told.get('error'))[:300]}")
    if same(told["value"], _as_json(case.expected)):
        return CaseResult(True)
    return CaseResult(False, f"{call}: wrong value {_short(told['value'])}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def same_value(found: Any, expected: Any) -> bool:
    """Equal in type and value: 1, 1.0 and True are three values. Floats within a relative 1e-9, and NaN equals NaN."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-9) or (math.isnan(found) and math.isnan(expected))
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same_value, found, expected))
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same_value(found[key], expected[key]) for key in expected)
    return found == expected
