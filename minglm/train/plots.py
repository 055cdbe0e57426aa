"""Pictures of a training run, from its `metrics.jsonl` alone: one overview that fits a screen."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

BLUE, ORANGE, GREEN, RED, GREY = "#3b6fb6", "#e08a1e", "#3f9b6b", "#c8443c", "#8a8f98"
DOMAIN_COLORS = (BLUE, ORANGE, GREEN, RED, "#7d5ba6", "#4aa3a2", "#a8763e", "#c25b9a", "#6b7a2a", "#1c2f4f", "#b8a04a")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}
Records = Sequence[Mapping[str, Any]]


@contextmanager
def drawing(path: str | Path, width: float, height: float, title: str = "", dpi: int = 100) -> Iterator[Figure]:
    """An empty figure in our style, width by height inches, that is written as a PNG when its block ends."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)  # draws without a screen
        if title:
            figure.suptitle(title, fontweight="bold", x=0.01, ha="left")
        yield figure
        figure.savefig(path, dpi=dpi)


def plot_overview(records: Records, path: str | Path, title: str = "") -> None:
    """Draw the records of a run (minglm.train.metrics.read_metrics) into a PNG file. Nothing is drawn before step 1."""
    steps = _of_kind(records, "step")
    held_out, router = _of_kind(records, "held_out"), _of_kind(records, "router")
    if not steps:
        return
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 9.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        FigureCanvasAgg(figure)  # draws without a screen
        figure.suptitle(title, fontweight="bold", fontsize=13, x=0.01, ha="left")
        stages = _of_kind(records, "stage")
        grid = figure.add_gridspec(3, 3)
        losses = figure.add_subplot(grid[0, :2])
        _plot_losses(losses, steps, held_out)
        bits = figure.add_subplot(grid[0, 2])
        _plot_bits_per_byte(bits, held_out, _of_kind(records, "domain"))
        _plot_learning_rate(figure.add_subplot(grid[1, 0]), steps)
        _plot_gradient_norm(figure.add_subplot(grid[1, 1]), steps)
        _plot_speed(figure.add_subplot(grid[1, 2]), steps)
        _plot_max_violation(figure.add_subplot(grid[2, 0]), steps)
        for axes in figure.axes:
            if axes.get_xlabel() == "step":
                _mark_stages(axes, stages, named=axes is losses)
        if router:
            _plot_expert_load(figure.add_subplot(grid[2, 1]), router[-1])
            _plot_bias(figure.add_subplot(grid[2, 2]), router[-1])
        figure.savefig(path, dpi=110)


def _plot_losses(axes: Axes, steps: Records, held_out: Records) -> None:
    axes.set_title("loss, nats per token")
    lines = [("loss", "total", RED), ("mtp_loss", "the token after the next (MTP)", ORANGE), ("lm_loss", "next token", BLUE)]
    for key, label, color in lines:
        if any(_column(steps, key)):  # no MTP layer, no curve
            _plot_noisy(axes, _column(steps, "step"), _column(steps, key), color, label)
    axes.plot(
        _column(held_out, "step"), _column(held_out, "loss"), "o-", color="black", ms=4, lw=1.2, label="next token, held-out"
    )
    axes.legend(loc="upper right")
    _finish_steps(axes)


def _mark_stages(axes: Axes, stages: Records, named: bool) -> None:
    """A line where each stage ends, and its name before it."""
    start = 0
    for stage in stages:
        axes.axvline(stage["step"], color=GREY, lw=0.8, ls=(0, (2, 3)), zorder=0)
        if named:
            middle = (start + stage["step"]) / 2
            axes.annotate(
                stage["name"],
                (middle, 0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=GREY,
            )
        start = stage["step"]


def _plot_bits_per_byte(axes: Axes, held_out: Records, domains: Records) -> None:
    axes.set_title("held-out bits per byte")
    for index, name in enumerate(dict.fromkeys(record["domain"] for record in domains)):
        ends = [record for record in domains if record["domain"] == name]
        style = {"color": DOMAIN_COLORS[index % len(DOMAIN_COLORS)], "ms": 3, "lw": 1, "label": name}
        axes.plot(_column(ends, "step"), _column(ends, "bits_per_byte"), "o--", **style)
    if domains:
        axes.legend(loc="lower left", fontsize=7, ncols=2)
    x, y = _column(held_out, "step"), _column(held_out, "bits_per_byte")
    axes.plot(x, y, "o-", color="black", ms=4)
    if len(y):
        axes.annotate(f"{y[-1]:.3f}", (x[-1], y[-1]), xytext=(0, 7), textcoords="offset points", ha="right", weight="bold")
    axes.set_ylim(bottom=0)
    _finish_steps(axes)


def _plot_learning_rate(axes: Axes, steps: Records) -> None:
    axes.set_title("learning rate")
    axes.plot(_column(steps, "step"), _column(steps, "learning_rate"), color=GREEN)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(bottom=0)
    sequences = _column(steps, "sequences")
    if sequences.min() != sequences.max():
        axes.set_title("learning rate; batch (dots)")
        right = axes.twinx()
        right.plot(_column(steps, "step"), sequences, ":", color=GREY)
        right.set_ylim(bottom=0)
        right.grid(False)
    _finish_steps(axes)


def _plot_gradient_norm(axes: Axes, steps: Records) -> None:
    axes.set_title("gradient norm before clipping")
    _plot_noisy(axes, _column(steps, "step"), _column(steps, "gradient_norm"), BLUE)
    axes.set_yscale("log", subs=(2, 5))  # a run rarely spans two powers of ten
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _finish_steps(axes)


def _plot_speed(axes: Axes, steps: Records) -> None:
    axes.set_title("tokens per second")
    _plot_noisy(axes, _column(steps, "step"), _column(steps, "tokens_per_second"), GREEN)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylim(bottom=0)
    _finish_steps(axes)


def _plot_max_violation(axes: Axes, steps: Records) -> None:
    axes.set_title("MaxVio: largest load / mean - 1")
    by_layer = _column(steps, "max_violation").T  # (layers, steps)
    for layer, values in enumerate(by_layer):
        shade = 0.25 + 0.75 * (layer + 1) / len(by_layer)
        axes.plot(_column(steps, "step"), _smooth(values), color=BLUE, alpha=shade, lw=1.2)
    if len(by_layer):
        _plot_noisy(axes, _column(steps, "step"), by_layer.mean(0), RED, "mean of MoE layers", raw=False)
        axes.legend(loc="upper right")
    axes.set_ylim(bottom=0)
    _finish_steps(axes)


def _plot_expert_load(axes: Axes, router: Mapping[str, Any]) -> None:
    share = np.array(router["expert_share"])
    axes.set_title(f"expert load at step {router['step']}, 1 = fair share")
    _plot_heat_map(axes, share * share.shape[1], "Blues", 0, None)


def _plot_bias(axes: Axes, router: Mapping[str, Any]) -> None:
    bias = np.array(router["bias"])
    limit = max(abs(bias).max(), 1e-9)
    axes.set_title(f"balance bias at step {router['step']}")
    _plot_heat_map(axes, bias, "RdBu_r", -limit, limit)


def _plot_heat_map(axes: Axes, values: np.ndarray, colors: str, low: float, high: float | None) -> None:
    """values (layers, experts)."""
    image = axes.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, pad=0.02)
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer (last: MTP)")
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))


def _plot_noisy(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, label: str | None = None, raw: bool = True) -> None:
    """A smoothed line, over the raw one in a pale shade."""
    if raw:
        axes.plot(x, y, color=color, alpha=0.25, lw=0.8)
    axes.plot(x, _smooth(y), color=color, label=label)


def _smooth(y: np.ndarray) -> np.ndarray:
    """The mean over a window around each point, of up to 1/25 of the points."""
    half = len(y) // 50
    sums = np.concatenate([[0], np.cumsum(y)])
    first = np.maximum(np.arange(len(y)) - half, 0)
    end = np.minimum(np.arange(len(y)) + half + 1, len(y))
    return (sums[end] - sums[first]) / (end - first)


def _finish_steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _of_kind(records: Records, kind: str) -> Records:
    return [record for record in records if record["kind"] == kind]


def _column(records: Records, key: str) -> np.ndarray:
    return np.array([record[key] for record in records])
