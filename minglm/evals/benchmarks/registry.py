"""The registry of published benchmarks: how each is read and judged, and what it cannot be judged without.

python -m minglm eval my/model --benchmark aime --data aime_2024.jsonl
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from minglm.evals.benchmarks import answers, graded, programs
from minglm.evals.benchmarks.calls import bfcl
from minglm.evals.benchmarks.customers import tau_bench
from minglm.evals.benchmarks.instructions import ifeval
from minglm.evals.benchmarks.question import Question
from minglm.evals.benchmarks.records import Record, RecordError, files_of, records
from minglm.evals.benchmarks.shells import swe_bench, terminal_bench
from minglm.evals.endpoint import Endpoint
from minglm.evals.measure import EvaluationError

Loader = Callable[[Path, Endpoint | None], Iterable[Question | None]]


class Benchmark(NamedTuple):
    """title: what it is called. data: what --data names. judged: how. needs: what some of it cannot be judged without."""

    title: str
    load: Loader
    data: str
    judged: str
    needs: str = ""


def _each(question: Callable[[Record], Question]) -> Loader:
    return lambda path, grader: (_placed(question(record), record) for record in records(path))


def _graded(question: Callable[[Record, Endpoint | None], Question | None]) -> Loader:
    return lambda path, grader: (_placed(question(record, grader), record) for record in records(path))


def _placed(question: Question | None, record: Record) -> Question | None:
    return replace(question, place=record.place) if question else None


def _bfcl(path: Path, grader: Endpoint | None) -> Iterator[Question]:
    """Questions in BFCL_v3_*.json, right answers by id in possible_answer/ beside them."""
    for file in files_of(path):
        answers_file = file.parent / "possible_answer" / file.name
        right = {record.take("id", str): record.values for record in records(answers_file)} if answers_file.is_file() else {}
        for record in records(file):
            joined = Record(record.place, {**right.get(record.take("id", str), {}), **record.values})
            yield _placed(bfcl(joined), record)


def _safety_bench(path: Path, grader: Endpoint | None) -> Iterator[Question]:
    """test_en.json with test_answers_en.json beside it (by id), or dev_en.json, an object of lists by category. Each language
    and subset counts its ids anew, so the file's name is part of ours."""
    for file in files_of(path):
        if file.name.startswith("test_answers"):
            continue
        answers_file = file.with_name(file.name.replace("test_", "test_answers_", 1))
        right = Record(str(file), {})
        if answers_file != file and answers_file.is_file():
            found = list(records(answers_file))
            if len(found) != 1:
                raise RecordError(
                    f"{answers_file}: found {len(found)} records; wanted one object, of answers by the questions' ids"
                )
            right = found[0]
        for record in records(file):
            lists = list(record.values.values())
            inner = [one for part in lists for one in part] if lists and all(isinstance(one, list) for one in lists) else None
            for number, values in enumerate(inner if inner is not None else [record.values]):
                place = record.place if inner is None else f"{record.place}[{number}]"
                if not isinstance(values, dict):
                    raise RecordError(f"{place}: found {values!r:.80}; wanted a question")
                one = Record(place, {**right.take(str(values.get("id")), dict, {}), **values})
                id = one.take("id", int) if inner is None else number
                yield replace(answers.safety_bench(one), id=f"{file.stem} {id}", place=place)


def _terminal_bench(path: Path, grader: Endpoint | None) -> Iterator[Question]:
    folders = sorted({file.parent for name in ("task.yaml", "task.toml") for file in path.rglob(name)})
    for folder in folders:
        yield replace(terminal_bench(folder), place=str(folder))


_NUMPY = "numpy, scipy and test_data.h5 for nearly all published problems"
BENCHMARKS: dict[str, Benchmark] = {
    "aime": Benchmark("AIME", _each(answers.aime), "problem, answer", "exact whole number in \\boxed{}"),
    "math_500": Benchmark("MATH-500", _each(answers.math_500), "problem, answer", "equal in text or value, in \\boxed{}"),
    "gpqa": Benchmark("GPQA", _each(answers.gpqa), "gpqa_diamond.csv", "letter, choices shuffled by the question"),
    "mmlu_pro": Benchmark("MMLU-Pro", _each(answers.mmlu_pro), "question, options, answer, answer_index", "letter"),
    "safety_bench": Benchmark("SafetyBench", _safety_bench, "test_en.json, test_answers_en.json; or dev_en.json", "letter"),
    "humaneval": Benchmark("HumanEval", _each(programs.humaneval), "HumanEval.jsonl", "published tests in the sandbox"),
    "live_code_bench": Benchmark(
        "LiveCodeBench", _each(programs.live_code_bench), "test*.jsonl", "public and private tests in the sandbox"
    ),
    "scicode": Benchmark(
        "SciCode", _each(programs.scicode), "problems_*.jsonl", "tests of each sub-step in the sandbox", _NUMPY
    ),
    "bfcl": Benchmark(
        "BFCL v3", _bfcl, "BFCL_v3_*.json beside possible_answer/", "calls by syntax (AST)",
        "the simulated programs of bfcl_eval for multi_turn; Java and JavaScript",
    ),
    "ifeval": Benchmark("IFEval", _each(ifeval), "input_data.jsonl", "all constraints kept, strictly"),
    "tau_bench": Benchmark(
        "TAU-bench", tau_bench, "tau_bench/envs/retail or airline of a checkout", "state of the data, outputs said",
        "a model that plays the customer (--grader-url)",
    ),
    "swe_bench": Benchmark(
        "SWE-bench Verified", _each(swe_bench), "the instances, beside checkouts", "published tests after the commands",
        "docker images for all but plain repositories",
    ),
    "terminal_bench": Benchmark(
        "Terminal-Bench", _terminal_bench, "a folder of tasks' folders", "published tests after the commands",
        "docker for tasks that need more than a bare folder",
    ),
    "browsecomp": Benchmark(
        "BrowseComp", _graded(graded.browsecomp), "browse_comp_test_set.csv", "equal to the letter, or a model judges",
        "a model that judges (--grader-url); a browser, or the model answers by heart",
    ),
    "hle": Benchmark(
        "HLE", _graded(graded.hle), "question, answer, answer_type", "letter; equal to the letter, or a model judges",
        "a model that judges (--grader-url); questions with pictures are left out",
    ),
}  # fmt: skip


def load(name: str, path: Path, grader: Endpoint | None = None) -> list[Question]:
    """All questions of a benchmark's files, in order. Raises EvaluationError for another name, RecordError for what is not in
    the published layout, or an id that comes twice."""
    if name not in BENCHMARKS:
        raise EvaluationError(f"benchmark = {name!r}: wanted families, or one of {', '.join(BENCHMARKS)}")
    if not path.exists():
        raise RecordError(f"{path} does not exist; wanted {BENCHMARKS[name].title}'s {BENCHMARKS[name].data}")
    found: dict[str, Question] = {}
    for question in BENCHMARKS[name].load(path, grader):
        if question is None:
            continue
        if question.id in found:
            raise RecordError(f"{question.place}: id {question.id!r} is also that of {found[question.id].place}")
        found[question.id] = question
    if not found:
        raise RecordError(f"{path}: found no question; wanted {BENCHMARKS[name].title}'s {BENCHMARKS[name].data}")
    return list(found.values())
