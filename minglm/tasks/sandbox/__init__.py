"""Runs model code without trusting it: `Sandbox` for programs, `run_function_tests` for single functions."""

from .functions import Case, CaseResult, run_function_tests, same_value
from .limits import Limits, Outcome, SandboxError
from .sandbox import ENFORCES, Level, Sandbox, default_sandbox

__all__ = [
    "ENFORCES",
    "Case",
    "CaseResult",
    "Level",
    "Limits",
    "Outcome",
    "Sandbox",
    "SandboxError",
    "default_sandbox",
    "run_function_tests",
    "same_value",
]
