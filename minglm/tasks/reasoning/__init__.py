"""Reasoning: a question, steps of thought, and one answer that is right or wrong."""

from minglm.tasks.task import Problem

FAMILIES: tuple[type[Problem], ...] = ()
