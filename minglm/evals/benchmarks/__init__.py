"""Published benchmarks, read from the files in which they are published, and scored as they are.

from minglm.evals.benchmarks.registry import BENCHMARKS, load
questions = load("aime", Path("aime_2024.jsonl"))
"""
