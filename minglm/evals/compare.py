"""Two exams compared, problem by problem, and the smallest difference that the comparison could have seen."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.special import stdtrit

from minglm.evals.exam import by_suite, read_rows, usable
from minglm.evals.interval import Estimate, mean
from minglm.evals.measure import FEWEST_UNITS, EvaluationError

NORMAL_80 = 0.8416212335729143  # the 80% quantile of the normal distribution
ANSWERS = ".answers.jsonl"


class Difference(NamedTuple):
    """after - before of one suite and mode, over the problems that both were asked. detectable: the true difference that such
    a comparison would find in 80 of 100 cases, at a level of 95%; None for a single problem."""

    suite: str
    mode: str
    before: float
    after: float
    change: Estimate
    detectable: float | None


def compare(before: Path, after: Path) -> list[Difference]:
    """Each a folder of results, or a file of answers. Raises EvaluationError where there is nothing that both were asked."""
    left, right = (by_suite(read_rows(answers_of(path)).values()) for path in (before, after))
    found = []
    for suite, mode in left:
        asked = {}
        for own in (left, right):
            rewards: dict[tuple[str, str], list[float]] = {}
            for id, rows in own.get((suite, mode), {}).items():
                for row in filter(usable, rows):
                    rewards.setdefault((id, row["asked"]), []).append(row["reward"])  # another text is another question
            for question, of in rewards.items():
                asked.setdefault(question, []).append(sum(of) / len(of))
        pairs = [pair for pair in asked.values() if len(pair) == 2]
        if pairs:
            means = [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]
            differences = [b - a for a, b in pairs]
            found.append(Difference(suite, mode, *means, mean(differences), smallest_detectable(differences)))
    if not found:
        raise EvaluationError(f"{before} and {after} have no suite, mode and question in common; wanted two exams alike")
    return found


def smallest_detectable(differences: Sequence[float]) -> float | None:
    """(t_97.5% + z_80%) standard errors of the mean of paired differences; the usual sum for 80% power. Where problems differ
    hardly or not at all, the error is that of one problem that comes out differently: no less can be ruled out."""
    n = len(differences)
    if n < 2:
        return None
    centre = sum(differences) / n
    variance = sum((one - centre) ** 2 for one in differences) / (n - 1)
    return (float(stdtrit(n - 1, 0.975)) + NORMAL_80) * math.sqrt(max(variance, 1 / n) / n)


def answers_of(path: Path) -> Path:
    """The one file of answers in a folder of results. Raises EvaluationError for none or several."""
    found = [path] if path.is_file() else sorted(path.glob(f"*{ANSWERS}"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise EvaluationError(f"{path}: found {names}; wanted a folder with one *{ANSWERS}, or such a file")
    return found[0]


def table_of(differences: Sequence[Difference]) -> str:
    """Markdown; in bold what is surely not chance, of `FEWEST_UNITS` problems or more."""
    lines = ["| suite | mode | problems | before | after | difference | detectable |", "|---|---|---|---|---|---|---|"]
    for one in differences:
        text = f"{one.change.value:+.3f}" + one.change.text().removeprefix(f"{one.change.value:.3f}")
        text = f"**{text}**" if one.change.excludes(0.0) and one.change.count >= FEWEST_UNITS else text
        detectable = "?" if one.detectable is None else f"{min(1.0, one.detectable):.3f}"
        lines.append(
            f"| {one.suite} | {one.mode} | {one.change.count} | {one.before:.3f} | {one.after:.3f} | {text} | {detectable} |"
        )
    return "\n".join(lines)
