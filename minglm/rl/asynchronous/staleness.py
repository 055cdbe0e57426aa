"""Learning curves against staleness: one recipe under several bounds, on a virtual clock, so that a seed fixes everything.

    python -m minglm.rl.asynchronous.staleness runs/sums --run-folder runs/staleness

Workers have room for all that a bound admits, so the tokens of a step are about as old as the bound allows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import tyro
from tyro.conf import Positional, arg

from minglm.rl.loop import rl
from minglm.rl.recipe import RLRecipe, load_rl_recipe
from minglm.train.metrics import read_metrics
from minglm.train.plots import drawing
from minglm.train.run_folder import RunFolder

Runs = Mapping[int, Sequence[Sequence[dict[str, Any]]]]
"""Bound -> of each seed the records of its metrics."""


def with_bound(recipe: RLRecipe, max_staleness: int) -> RLRecipe:
    """The recipe on a virtual clock, under this bound."""
    room = (max_staleness + 1) * recipe.sampling.groups * recipe.sampling.group_size
    own = replace(recipe.asynchronous, max_staleness=max_staleness, clock="virtual", workers=1, room=room)
    return replace(recipe, mode="asynchronous", asynchronous=own)


def plot(runs: Runs, path: Path) -> None:
    """Held-out reward over the steps for each bound, mean of the seeds with all of them behind it; and the gap by staleness."""
    with drawing(path, 13, 4.8) as figure:
        rewards, gaps = figure.subplots(1, 2)
        for bound, seeds in runs.items():
            curves = [[(r["step"], r["rewards"]["all"][0]) for r in records if r["kind"] == "held_out"] for records in seeds]
            steps = [step for step, _ in curves[0]]
            mean = [fmean(value for _, value in points) for points in zip(*curves, strict=True)]
            line = rewards.plot(steps, mean, "o-", markersize=3, label=f"{bound} ({mean_staleness(seeds):.1f} on average)")[0]
            for curve in curves:
                rewards.plot(*zip(*curve, strict=True), color=line.get_color(), alpha=0.25, linewidth=1)
            found = gap_by_staleness(seeds)
            gaps.plot(found.keys(), found.values(), "o-", color=line.get_color(), label=str(bound))
        rewards.set(title="Reward on held-out problems", xlabel="step")
        rewards.legend(title="staleness at most")
        gaps.set(title="Mean log-probability gap, sampler to trainer", xlabel="staleness of a token, steps", ylabel="nats")


def mean_staleness(seeds: Sequence[Sequence[dict[str, Any]]]) -> float:
    found = [record["staleness"] for records in seeds for record in records if "staleness" in record]
    return fmean(found) if found else 0.0


def gap_by_staleness(seeds: Sequence[Sequence[dict[str, Any]]]) -> dict[int, float]:
    """The mean over the steps that have tokens of that staleness."""
    found: dict[int, list[float]] = {}
    for records in seeds:
        for record in records:
            for staleness, gap in record.get("gap_by_staleness", {}).items():
                found.setdefault(int(staleness), []).append(gap)
    return {staleness: fmean(found[staleness]) for staleness in sorted(found)}


def main(
    base: Annotated[Positional[Path], arg(metavar="BASE")],
    run_folder: Path,
    recipe: str = "nano",
    bounds: tuple[int, ...] = (0, 1, 4),
    seeds: tuple[int, ...] = (1,),
    steps: int | None = None,
    correction: str | None = None,
) -> None:
    """Train BASE under each bound and seed, and plot how it learns. Goes on where it was killed.

    recipe: of RL, a name or a path; steps: other than the recipe's; correction: objective.importance other than the recipe's,
    such as "none", to see what it rescues.
    """
    torch.set_num_threads(1)
    chosen = replace(load_rl_recipe(recipe), base=base)
    chosen = replace(chosen, steps=steps or chosen.steps)
    if correction is not None:
        chosen = replace(chosen, objective=replace(chosen.objective, importance=correction))
    runs: dict[int, list[list[dict[str, Any]]]] = {}
    for bound in bounds:
        for seed in seeds:
            folder = RunFolder(run_folder / f"staleness-{bound}-seed-{seed}")
            rl(replace(with_bound(chosen, bound), seed=seed), folder.path)
            runs.setdefault(bound, []).append(read_metrics(folder.metrics))
        plot(runs, run_folder / "staleness.png")
    for bound, records in runs.items():
        last = [[r for r in own if r["kind"] == "held_out"][-1]["rewards"]["all"][0] for own in records]
        print(f"staleness at most {bound}: {mean_staleness(records):.2f} on average, held-out reward {fmean(last):.3f} {last}")
    print(f"made: {run_folder / 'staleness.png'}")


if __name__ == "__main__":
    tyro.cli(main)
