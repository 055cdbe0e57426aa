"""Runs model code without trusting it: `Sandbox` for programs, `run_function_tests` for single functions."""

from .limits import Limits, Outcome, SandboxError
from .sandbox import ENFORCES, Level, Sandbox, default_sandbox

__all__ = ["ENFORCES", "Level", "Limits", "Outcome", "Sandbox", "SandboxError", "default_sandbox"]
