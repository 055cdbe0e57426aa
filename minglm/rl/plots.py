"""What an RL run looks like: rewards, held-out rewards with intervals, lengths, entropy, and the gap to the sampler."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from minglm.rl.rollout import End
from minglm.train.plots import STYLE

ENDS = get_args(End)


def plot_run(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the records of a run's metrics.jsonl into a PNG. Without a step yet, nothing is drawn."""
    steps = [record for record in records if record["kind"] == "step"]
    held_out = [record for record in records if record["kind"] == "held_out"]
    if not steps:
        return
    with rc_context(STYLE):
        figure = Figure(figsize=(15, 8), layout="constrained")
        FigureCanvasAgg(figure)  # draws without a screen
        figure.suptitle(title, fontweight="bold", x=0.01, ha="left")
        _draw(figure, steps, held_out)
        figure.savefig(path, dpi=100)


def _draw(figure: Figure, steps: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> None:
    axes = figure.subplots(2, 3)
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

    rewards, judged, lengths, entropy, gap, ends = axes.flatten()
    curve(rewards, "Reward of all attempts", ["reward"])
    for family in sorted({family for record in steps for family in record["reward_by_family"]}):
        points = [(r["step"], r["reward_by_family"][family]) for r in steps if family in r["reward_by_family"]]
        rewards.plot(*zip(*points, strict=True), ".", markersize=3, label=family)
    rewards.legend(fontsize="small")
    for name in held_out[0]["rewards"] if held_out else ():
        judged_then = [record for record in held_out if name in record["rewards"]]
        values, at = [record["rewards"][name] for record in judged_then], [record["step"] for record in judged_then]
        line = judged.plot(at, [value for value, _, _ in values], "o-", markersize=3, label=name)[0]
        judged.fill_between(at, [v[1] for v in values], [v[2] for v in values], color=line.get_color(), alpha=0.15)
    judged.set_title("Reward on held-out problems, 95% intervals")
    judged.set_xlabel("step")
    judged.legend(fontsize="small")
    curve(lengths, "Tokens an attempt", ["length"])
    curve(entropy, "Entropy of the policy, nats a token", ["entropy"])
    curve(gap, "Log-probability gap, sampler to trainer, nats", ["largest_gap", "mean_gap"], ["largest", "mean"])
    gap.set_yscale("symlog", linthresh=1e-8)
    shares = [[record["ends"].get(end, 0) / record["attempts"] for record in steps] for end in ENDS]
    ends.stackplot(x, shares, labels=ENDS, alpha=0.8)
    ends.set(title="How attempts end", xlabel="step", ylim=(0, 1))
    ends.legend(fontsize="small", loc="lower left")
