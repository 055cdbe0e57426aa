"""Does it help? A grid of variants of one recipe, each over several seeds, judged on the same held-out documents.

    python -m minglm ablate text --vary optimizer.kind=muon,adamw --vary optimizer.learning_rate=2e-3,4e-3 --seeds 1 2 3

Noise between seeds is larger than many an "improvement" (nanochat's log: 0.251 to 0.268 over seven equal runs), so every
number comes with its 95% interval. Killed, the same command goes on: every run is an ordinary run folder.
"""

import dataclasses
import itertools
import json
import math
import statistics
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from scipy.special import stdtrit

from minglm.config import ConfigError, build
from minglm.train.metrics import read_metrics
from minglm.train.processes import in_processes, run_quietly
from minglm.train.recipe import Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class RunResult:
    """The end of one run: held-out loss in nats a token, bits per byte, and MaxVio, the mean over layers and last tenth."""

    loss: float
    bits_per_byte: float
    max_violation: float


def parse_variation(text: str) -> tuple[str, list[Any]]:
    """`optimizer.kind=muon,adamw` -> the key's path and its values, each read as TOML where it is that, else as a string.

    Lists need whole TOML: `sampling.tokens=96,[32,64,96]`.
    """
    path, separator, values = text.partition("=")
    if not separator or not values:
        raise ConfigError(f"vary = {text!r}: wanted table.key=value,value")
    together = _parse_value(f"[{values}]")
    return path, together if isinstance(together, list) else [_parse_value(value) for value in values.split(",")]


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def with_value(node: Any, path: str, value: Any) -> Any:
    """A copy of a (nested) frozen dataclass in which the key at `path` (dots between tables) has another value; strict."""
    key, _, rest = path.partition(".")
    values = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    inner = values.get(key)
    values[key] = with_value(inner, rest, value) if rest and dataclasses.is_dataclass(inner) else value
    return build(type(node), values, where=type(node).__name__)


def variants(recipe: T, variations: Sequence[str]) -> dict[str, T]:
    """Every combination of the variations' values: label -> recipe. Raises `ConfigError` for keys that do not exist.

    A key with a single value changes all variants alike and is left out of the labels.
    """
    parsed = [parse_variation(text) for text in variations]
    found = {}
    for combination in itertools.product(*(values for _, values in parsed)):
        varied, label = recipe, []
        for (path, values), value in zip(parsed, combination, strict=True):
            varied = with_value(varied, path, value)
            label += [f"{path}={value}"] if len(values) > 1 else []
        found[" ".join(label) or "as it is"] = varied
    return found


def ablate(
    recipe: Recipe, variations: Sequence[str], seeds: Sequence[int], folder: str | Path, workers: int = 1
) -> dict[str, list[RunResult]]:
    """Run every variant with every seed, `workers` at a time on equal shares of the cores. -> the results by label.

    Writes `results.json` and `curves.png` into `folder`; the runs lie beside them and share tokenizer and tokens.
    """
    from minglm.train.preparation import prepare_data
    from minglm.train.trainer import train

    folder = Path(folder).resolve()
    recipe = with_value(recipe, "data.folder", recipe.data.folder or folder / "data")
    grid = variants(recipe, variations)
    folder.mkdir(parents=True, exist_ok=True)
    prepare_data(recipe, folder)
    metrics = run_grid(train, grid, seeds, folder, workers)
    results = {label: [_result(records) for records in runs] for label, runs in metrics.items()}
    plain = {label: [dataclasses.asdict(result) for result in runs] for label, runs in results.items()}
    (folder / "results.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    _plot_curves(metrics, folder / "curves.png")
    return results


def run_grid(
    run: Callable[[Any, str], Any], grid: Mapping[str, Any], seeds: Sequence[int], folder: Path, workers: int
) -> dict[str, list[list[dict[str, Any]]]]:
    """Have `run(recipe, run_folder)` do each recipe of the grid with each seed, `workers` at a time on equal shares of the
    cores. -> the metrics of the runs by label. What has been done before is not done again.

    run: a function at the top of a module; it goes on where it was killed. Ends and raises as `in_processes` does.
    """
    jobs = [
        (run, with_value(varied, "seed", seed), str(_run_folder(folder, label, seed)))
        for label, varied in grid.items()
        for seed in seeds
    ]
    in_processes(run_quietly, jobs, workers, "ablation")
    return {label: [read_metrics(_run_folder(folder, label, s) / "metrics.jsonl") for s in seeds] for label in grid}


def _run_folder(folder: Path, label: str, seed: int) -> Path:
    return folder / label.replace("/", "-").replace(" ", "+") / f"seed-{seed}"


def _result(records: Sequence[Mapping[str, Any]]) -> RunResult:
    held_out = [record for record in records if record["kind"] == "held_out"][-1]
    steps = [record["max_violation"] for record in records if record["kind"] == "step"]
    last = [violation for layers in steps[-max(1, len(steps) // 10) :] for violation in layers]
    return RunResult(held_out["loss"], held_out["bits_per_byte"], statistics.mean(last) if last else math.nan)


def mean_and_interval(values: Sequence[float]) -> str:
    """`mean ± half width` of the 95% confidence interval (Student's t); without a width for a single value."""
    half = half_width(values)
    return f"{statistics.mean(values):.4f}" + ("" if half is None else f" ± {half:.4f}")


def half_width(values: Sequence[float]) -> float | None:
    """Of the mean's 95% confidence interval (Student's t); None for a single value, which has none."""
    n = len(values)
    return float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def report(results: Mapping[str, Sequence[RunResult]]) -> str:
    """A Markdown table, one variant a row, best held-out loss first."""
    lines = ["| variant | held-out loss (nats/token) | bits per byte | MaxVio, last tenth |", "|---|---|---|---|"]
    for label, runs in sorted(results.items(), key=lambda item: statistics.mean(run.loss for run in item[1])):
        columns = [mean_and_interval([getattr(run, f.name) for run in runs]) for f in dataclasses.fields(RunResult)]
        lines.append(f"| {label} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _plot_curves(metrics: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Held-out loss and MaxVio over the steps: one colour a variant, one line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for index, (label, runs) in enumerate(metrics.items()):
        for number, records in enumerate(runs):
            style = {"color": f"C{index}", "label": None if number else label, "linewidth": 1}
            held_out = [(r["step"], r["loss"]) for r in records if r["kind"] == "held_out" and r["step"]]
            left.plot(*zip(*held_out, strict=True), marker="o", markersize=3, **style)
            routed = [r for r in records if r["kind"] == "step" and r["max_violation"]]
            if routed:
                steps = [(r["step"], statistics.mean(r["max_violation"])) for r in routed]
                right.plot(*zip(*steps, strict=True), **{**style, "linewidth": 0.6})
    left.set(xlabel="step", ylabel="nats per token", title="Held-out loss")
    right.set(xlabel="step", ylabel="max load / mean load - 1", title="MaxVio, mean over MoE layers", yscale="log")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
