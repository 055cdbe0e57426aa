"""What an evaluation finds: measures with intervals, and tables of them with a column for each checkpoint."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minglm.evals.interval import Estimate, change_of_ratio, ratio, share
from minglm.files import write_text_atomically

FEWEST_UNITS = 8  # for a comparison: fewer vary too little by chance


class EvaluationError(ValueError):
    """An evaluation that cannot be made. The message says what was found and what would be right."""


@dataclass(frozen=True)
class Measure:
    """One number about a model.

    part: what was asked ("bits", "families", ...); name: of what (a domain, a family, ...); quantity: in which unit or by
    which measure ("bits per byte", "reward, 2-shot"). chance: what a guess would score, where that is known.
    lower_is_better: as for losses. left_out: problems that this model could not be asked, because they do not fit
    its positions, or whose answers nobody could judge; the others are in `estimate.count`. units: numerator and denominator of
    each problem or document that the value is the ratio of, so that two models can be compared unit by unit; both 0 where a
    problem that was left out has kept its place.
    """

    part: str
    name: str
    quantity: str
    estimate: Estimate
    chance: float | None = None
    lower_is_better: bool = False
    left_out: int = 0
    units: tuple[tuple[float, float], ...] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        return self.part, self.name, self.quantity


def scored(
    part: str, name: str, quantity: str, scores: Sequence[float | None], chance: float | None = None, left_out: int = 0
) -> Measure:
    """A measure of scores from 0 to 1, Wilson's interval around their mean. None: a problem that is left out, beside those of
    `left_out`, and keeps its place among the units."""
    units = tuple((0.0, 0.0) if score is None else (float(score), 1.0) for score in scores)
    known = [score for score in scores if score is not None]
    return Measure(part, name, quantity, share(known), chance, left_out=left_out + len(scores) - len(known), units=units)


def summed(
    part: str,
    name: str,
    quantity: str,
    numerators: Sequence[float],
    denominators: Sequence[float],
    chance: float | None = None,
    lower_is_better: bool = True,
    left_out: int = 0,
) -> Measure:
    """A measure of sum(numerators) / sum(denominators), such as nats and bytes of documents. 0 and 0: one that is left out."""
    units = tuple((float(top), float(bottom)) for top, bottom in zip(numerators, denominators, strict=True))
    known = [unit for unit in units if any(unit)]
    estimate = ratio(*zip(*known, strict=True)) if known else ratio([], [])
    return Measure(part, name, quantity, estimate, chance, lower_is_better, left_out + len(units) - len(known), units)


@dataclass
class Results:
    """All that was measured on one model. details: what pictures are drawn from, by part (JSON's types only)."""

    model: str
    suite: str
    limit: int
    seed: int
    measures: list[Measure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def find(self, part: str, name: str, quantity: str | None = None) -> Measure:
        """The measure of this name; of several quantities, the one that begins with `quantity`. Raises EvaluationError."""
        for measure in self.measures:
            if (measure.part, measure.name) == (part, name) and measure.quantity.startswith(quantity or ""):
                return measure
        of_part = [f"{m.part}/{m.name}: {m.quantity}" for m in self.measures if m.part == part]
        known = of_part or sorted({m.part for m in self.measures})
        raise EvaluationError(f"no measure {part}/{name}: {quantity or 'any'}; there are {known}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, at once or not at all."""
        write_text_atomically(path, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Results":
        """Read what `save` wrote. Raises EvaluationError for another file."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            measures = [
                Measure(**{**m, "estimate": Estimate(**m["estimate"]), "units": tuple(map(tuple, m["units"]))})
                for m in found.pop("measures")
            ]
            return cls(**found, measures=measures)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise EvaluationError(f"{path}: these are no results of an evaluation ({error}); delete the file") from error


def table(columns: Mapping[str, Results]) -> str:
    """Markdown: a row for each measure, a column for each model, `value [low, high]`.

    A value is in bold where its interval does not hold the chance level and lies on the better side of it. ▲ and ▼: surely
    better or worse than the column before it, compared problem by problem (`direction`).
    """
    rows: dict[tuple[str, str, str], Measure] = {}
    for results in columns.values():
        rows |= {measure.key: measure for measure in results.measures}
    found = {label: {measure.key: measure for measure in results.measures} for label, results in columns.items()}
    lines = [
        f"| part | of | measure | chance | {' | '.join(columns)} |",
        f"|---|---|---|---|{'---|' * len(columns)}",
    ]
    parts = list(dict.fromkeys(part for part, _, _ in rows))
    for key in sorted(rows, key=lambda key: parts.index(key[0])):  # stable: in the order in which they were measured
        measure = rows[key]
        own = [found[label].get(key) for label in columns]
        cells = [_cell(one) + _mark(before, one) for before, one in zip([None, *own], own, strict=False)]
        chance = "" if measure.chance is None else f"{measure.chance:.3f}"
        arrow = "↓" if measure.lower_is_better else "↑"
        lines.append(f"| {measure.part} | {measure.name} | {measure.quantity} {arrow} | {chance} | {' | '.join(cells)} |")
    return "\n".join(lines)


def direction(before: Measure, after: Measure) -> int:
    """1 where the later model is better, -1 where it is worse, 0 where their difference may be chance: the 95% interval of
    the change holds 0, the models were asked different problems, or fewer than `FEWEST_UNITS`."""
    same = [bottom for _, bottom in before.units] == [bottom for _, bottom in after.units]
    if not same or sum(map(any, after.units)) < FEWEST_UNITS or before.left_out != after.left_out:
        return 0
    change = change_of_ratio(before.units, after.units)
    if not change.excludes(0.0):
        return 0
    return 1 if (change.value < 0) == after.lower_is_better else -1


def _mark(before: Measure | None, after: Measure | None) -> str:
    if before is None or after is None:
        return ""
    return {1: " ▲", -1: " ▼", 0: ""}[direction(before, after)]


def _cell(measure: Measure | None) -> str:
    if measure is None:
        return "–"
    estimate, chance = measure.estimate, measure.chance
    text = estimate.text()
    if chance is not None and estimate.excludes(chance) and (estimate.value < chance) == measure.lower_is_better:
        text = f"**{text}**"
    return text + (f" ({measure.left_out} left out)" if measure.left_out else "")
