"""What an RL run looks like: rewards, held-out rewards with intervals, pass@k, how attempts end, lengths, entropy, clipping,
temperature, the gap to the sampler by its causes, and the curriculum."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from matplotlib.figure import Figure

from minglm.rl.curriculum import Standing
from minglm.rl.rollout import End
from minglm.train.plots import drawing

ENDS, STANDINGS = get_args(End), get_args(Standing)


def plot_run(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the records of a run's metrics.jsonl into a PNG. Without a step yet, nothing is drawn."""
    steps = [record for record in records if record["kind"] == "step"]
    held_out = [record for record in records if record["kind"] == "held_out"]
    if not steps:
        return
    with drawing(path, 19, 11, title) as figure:
        _draw(figure, steps, held_out)


def _draw(figure: Figure, steps: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> None:
    axes = figure.subplots(3, 4)
    x = [record["step"] for record in steps]

    def curve(ax, heading: str, keys: Sequence[str], labels: Sequence[str] | None = None) -> None:
        for number, key in enumerate(keys):
            points = [(record["step"], record[key]) for record in steps if key in record]
            if points:
                ax.plot(*zip(*points, strict=True), label=labels[number] if labels else None, linewidth=1)
        ax.set_title(heading)
        ax.set_xlabel("step")
        if labels and ax.lines:
            ax.legend(fontsize="small")

    def curves_of(ax, heading: str, key: str, style: str) -> None:
        """Of the numbers in the table `key`, a curve each."""
        for name in dict.fromkeys(name for record in steps for name in record[key]):
            points = [(record["step"], record[key][name]) for record in steps if name in record[key]]
            ax.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1, label=name)
        ax.set(title=heading, xlabel="step")
        if ax.lines:
            ax.legend(fontsize="small")

    def shares(ax, heading: str, names: Sequence[str], counts: Sequence[dict[str, int]]) -> None:
        values = [[count.get(name, 0) / max(1, sum(count.values())) for count in counts] for name in names]
        ax.stackplot(x, values, labels=names, alpha=0.8)
        ax.set(title=heading, xlabel="step", ylim=(0, 1))
        ax.legend(fontsize="small", loc="lower left")

    rewards, judged, passes, ends, lengths, entropy, clip, temperature, gap, apart, stage, pools = axes.flatten()
    curve(rewards, "Reward of all attempts", ["reward"])
    curves_of(rewards, "Reward of all attempts", "reward_by_family", ".")
    for name in held_out[0]["rewards"] if held_out else ():
        known = [record for record in held_out if name in record["rewards"]]
        values, at = [record["rewards"][name] for record in known], [record["step"] for record in known]
        line = judged.plot(at, [value for value, _, _ in values], "o-", markersize=3, label=name)[0]
        bounds = [[value if bound is None else bound for value, *both in values for bound in both[i : i + 1]] for i in (0, 1)]
        judged.fill_between(at, *bounds, color=line.get_color(), alpha=0.15)
    judged.set(title="Reward on held-out problems, 95% intervals", xlabel="step")
    judged.legend(fontsize="small")
    curves_of(passes, "pass@k of the problems drawn", "pass_at", "-")
    shares(ends, "How attempts end", ENDS, [{**record["ends"], "failed": record["failed"]} for record in steps])
    curve(lengths, "Tokens an attempt, and allowed a turn", ["length", "tokens"], ["length", "allowed"])
    curve(entropy, "Entropy of the policy, nats a token", ["entropy"])
    curve(clip, "Share of tokens", ["clipped", "dropped"], ["held by the clip", "dropped by the correction"])
    curve(temperature, "Temperature", ["temperature"])
    gaps = {"largest_gap": "largest", "own_routing_gap": "mean, own routing", "mean_gap": "mean", "stale_gap": "mean, stale"}
    curve(gap, "Log-probability gap, sampler to trainer, nats", list(gaps), list(gaps.values()))
    gap.set_yscale("symlog", linthresh=1e-8)
    curve(
        apart,
        "Sampler and trainer",
        ["rerouted", "staleness", "largest_staleness"],
        ["tokens routed apart", "staleness, mean", "largest"],
    )
    curve(stage, "Stage of the curriculum", ["curriculum_stage"])
    stage.set_yticks([1, 2])
    standings = [Counter(pool["standing"] for pool in record["curriculum"].values()) for record in steps]
    shares(pools, "Difficulties, by how often they are solved", STANDINGS, standings)
