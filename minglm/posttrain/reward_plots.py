"""What learning from preferences looks like: loss, accuracy with intervals, and reliability."""

from pathlib import Path

from matplotlib.figure import Figure

from minglm.train.plots import BLUE, GREY, ORANGE, Records, drawing


def plot_run(records: Records, path: Path, title: str) -> None:
    """Draw the records of a run's metrics.jsonl into a PNG. Before step 1 nothing is drawn."""
    steps = [record for record in records if record["kind"] == "step"]
    held_out = [record for record in records if record["kind"] == "held_out"]
    if not steps:
        return
    with drawing(path, 15, 8, title) as figure:
        _draw(figure, steps, held_out)


def _draw(figure: Figure, steps: Records, held_out: Records) -> None:
    (loss, accuracy, reliability), (error, sources, norm) = figure.subplots(2, 3)
    x, at = [record["step"] for record in steps], [record["step"] for record in held_out]

    loss.plot(x, [record["preference_loss"] for record in steps], color=BLUE, alpha=0.5, linewidth=1, label="training")
    loss.plot(at, [record["loss"] for record in held_out], "o-", color="black", markersize=3, label="held out")
    loss.set(title="Preference loss, nats a pair", xlabel="step")
    loss.legend()

    accuracy.plot(x, [record["accuracy"] for record in steps], color=BLUE, alpha=0.3, linewidth=1, label="training")
    value, low, high = zip(*(record["accuracy"] for record in held_out), strict=True)
    accuracy.plot(at, value, "o-", color="black", markersize=3, label="held out, 95%")
    accuracy.fill_between(at, low, high, color="black", alpha=0.12)
    accuracy.axhline(0.5, color=GREY, linestyle=":")
    accuracy.set(title="Preferred answer told, share of pairs", xlabel="step", ylim=(0.3, 1.01))
    accuracy.legend(loc="lower right")

    last = held_out[-1]
    confidence, told, count = zip(*last["bins"], strict=True)
    reliability.plot([0.5, 1], [0.5, 1], ":", color=GREY)
    reliability.plot(confidence, told, "-", color=ORANGE, linewidth=1)
    reliability.scatter(confidence, told, [20 + 400 * n / sum(count) for n in count], color=ORANGE)
    reliability.set(title=f"Reliability at step {last['step']} (area: pairs)", xlabel="confidence", ylabel="share right")

    error.plot(at, [record["calibration_error"] for record in held_out], "o-", color=ORANGE, markersize=3)
    error.set(title="Calibration error, held out", xlabel="step", ylim=(0, None))

    names = list(last["by_source"])
    for place, name in enumerate(names):
        value, low, high = last["by_source"][name]
        sources.plot([low, high], [place, place], color=BLUE)
        sources.plot([value], [place], "o", color=BLUE)
    sources.axvline(0.5, color=GREY, linestyle=":")
    sources.set_yticks(range(len(names)), names)
    sources.set(title=f"Held-out accuracy by source at step {last['step']}", xlim=(0, 1.02))

    norm.plot(x, [record["gradient_norm"] for record in steps], color=BLUE, linewidth=1)
    norm.set(title="Gradient norm before clipping", xlabel="step", yscale="log")
