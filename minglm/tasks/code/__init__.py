"""Families whose answers are Python code, judged by hidden tests in the sandbox."""

FAMILIES = ()
