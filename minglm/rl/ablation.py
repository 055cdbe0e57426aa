"""Does it help in RL? Variants of one recipe from one base, each over several seeds, by the reward on held-out problems.

    python -m minglm ablate-rl runs/sums                                         # all parts of the report's recipe, one by one
    python -m minglm ablate-rl runs/sums --arms curriculum --seeds 1 2 3 4 5
    python -m minglm ablate-rl runs/sums --vary passes=1,2 --vary objective.policy=clip,cispo

A seed has the same held-out problems and the same draws of problems in all variants, so that variants are compared seed by
seed. Every number comes with its 95% interval over seeds. Killed, the same command goes on.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from minglm.config import ConfigError
from minglm.evals.interval import mean
from minglm.rl.loop import rl
from minglm.rl.recipe import RLRecipe, resolve_base
from minglm.tasks import FAMILIES
from minglm.train.ablation import run_grid, variants, with_value
from minglm.train.plots import drawing

Arm = Literal["curriculum", "dynamic_sampling", "aggregation", "length", "format_penalty", "temperature"]
AS_IT_IS = "as it is"


class RunResult(NamedTuple):
    """The mean reward on held-out problems, before the first step and after the last."""

    start: float
    end: float

    @property
    def gain(self) -> float:
        return self.end - self.start


def missing(recipe: RLRecipe) -> dict[Arm, str]:
    """Arms that a recipe cannot have, and what they lack."""
    found: dict[Arm, str] = {}
    pools = [(FAMILIES[family], level) for family, levels in recipe.tasks.levels.items() for level in levels]
    if not any(family.sample(random.Random(0), level).tools for family, level in pools):
        found["format_penalty"] = "tasks.levels: no family has tools, so that there is no call to be malformed; wanted one"
    if recipe.objective.aggregation == "constant":
        found["aggregation"] = (
            "objective.aggregation = 'constant': wanted 'token' or 'sequence', between which the arm compares"
        )
    return found


def one_by_one(recipe: RLRecipe, arms: Sequence[Arm]) -> dict[str, RLRecipe]:
    """The recipe as it is, and for each arm that with this one part turned the other way: off where it is on, and the reverse.

    Raises ConfigError for arms that are `missing`.
    """
    sampling, objective = recipe.sampling, recipe.objective
    for arm, lack in missing(recipe).items():
        if arm in arms:
            raise ConfigError(f"arm {arm}: {lack}")
    full, hot = max(sampling.stages), sampling.temperature
    staged = (max(1, full // 4), max(1, full // 2), full)
    turned: dict[Arm, tuple[str, Any]] = {
        "curriculum": ("tasks.curriculum", "none" if recipe.tasks.curriculum == "pass_rate" else "pass_rate"),
        "dynamic_sampling": ("sampling.rounds", 1 if sampling.rounds > 1 else 3),
        "aggregation": ("objective.aggregation", "sequence" if objective.aggregation == "token" else "token"),
        "length": ("sampling.tokens", staged if len(sampling.stages) == 1 else full),
        "format_penalty": ("sampling.format_penalty", not sampling.format_penalty),
        "temperature": (
            "sampling.temperatures",
            () if sampling.temperatures else tuple(round(hot + tenth / 10, 1) for tenth in range(5)),
        ),
    }
    changed = (turned[arm] for arm in arms)
    return {AS_IT_IS: recipe} | {f"{path}={_plain(value)}": with_value(recipe, path, value) for path, value in changed}


def _plain(value: Any) -> str:
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)


def ablate_rl(
    recipe: RLRecipe,
    variations: Sequence[str],
    arms: Sequence[Arm],
    seeds: Sequence[int],
    folder: str | Path,
    workers: int = 1,
    run: Callable[[RLRecipe, str], Any] = rl,
) -> str:
    """Every combination of the variations' values, or, without any, the arms one by one (none: all that the recipe can have).
    -> a Markdown table.

    Writes it as `ablation.md`, with `results.json` and `curves.png`, into `folder`; the runs lie beside them. Raises
    ConfigError for both variations and arms, and for what a recipe cannot be.
    """
    if variations and arms:
        raise ConfigError("ablate-rl: found --vary and --arms; wanted one of them")
    recipe, folder = resolve_base(recipe), Path(folder).resolve()
    if variations:
        grid = variants(recipe, variations)
    else:
        grid = one_by_one(recipe, arms or [arm for arm in get_args(Arm) if arm not in missing(recipe)])
    folder.mkdir(parents=True, exist_ok=True)
    metrics = run_grid(run, grid, seeds, folder, workers)
    results = {label: [_result(records) for records in runs] for label, runs in metrics.items()}
    plain = {label: [one._asdict() for one in runs] for label, runs in results.items()}
    (folder / "results.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    table = report(results)
    (folder / "ablation.md").write_text(table + "\n", encoding="utf-8")
    _plot_curves(metrics, folder / "curves.png")
    return table


def _result(records: Sequence[Mapping[str, Any]]) -> RunResult:
    judged = [record["rewards"]["all"][0] for record in records if record["kind"] == "held_out"]
    return RunResult(judged[0], judged[-1])


def report(results: Mapping[str, Sequence[RunResult]]) -> str:
    """A Markdown table, one variant a row, the first one being what the others are compared with, seed by seed."""
    (first, base), *_ = results.items()
    lines = [f"| variant | reward at the start | at the end | gain | gain, less that of {first} |", "|---|---|---|---|---|"]
    for label, runs in results.items():
        numbers = [[one.start for one in runs], [one.end for one in runs], [one.gain for one in runs]]
        differences = [one.gain - other.gain for one, other in zip(runs, base, strict=True)]
        columns = [mean(values).text() for values in numbers] + ["" if label == first else mean(differences).text()]
        lines.append(f"| {label} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _plot_curves(metrics: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """The held-out reward over the steps: one colour a variant, one line a seed."""
    with drawing(path, 9, 5, dpi=120) as figure:
        axes = figure.subplots()
        for index, (label, runs) in enumerate(metrics.items()):
            for number, records in enumerate(runs):
                points = [(r["step"], r["rewards"]["all"][0]) for r in records if r["kind"] == "held_out"]
                name = None if number else label
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1, color=f"C{index}", label=name)
        axes.set(xlabel="step", ylabel="mean reward", title="Reward on held-out problems")
        axes.legend(fontsize="small")
