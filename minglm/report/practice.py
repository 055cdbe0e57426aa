"""Sections of the page about reinforcement learning: the curves of each run, and what the experts' answers became."""

from minglm.posttrain.experts.filters import FILTERS, SAMPLED
from minglm.posttrain.experts.harvest import COUNTS, read_counts
from minglm.report.html import Html, charts, commands, folded, heading, interval, later, section, table
from minglm.report.parts import Story
from minglm.report.svg import Series, lines
from minglm.report.training import of_kind, smooth
from minglm.rl.objective import formula
from minglm.rl.recipe import load_rl_recipe
from minglm.train.metrics import read_metrics


def rl_section(story: Story) -> Html:
    title, paper = "Reinforcement learning", "report, sections 3.2 to 3.5"
    drawn, rows = [], []
    for name, folder in story.rl_runs().items():
        records = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
        steps, held_out = of_kind(records, "step"), of_kind(records, "held_out")
        if not held_out:
            continue
        rewards = [(one["step"], one["rewards"]["all"]) for one in held_out]
        points = [(step, value) for step, (value, _, _) in rewards]
        # Of few attempts an interval may reach beyond what a reward can be.
        bounds = [(low and max(0.0, low), high and min(1.0, high)) for _, (_, low, high) in rewards]
        series = [Series("held out, 95% interval", points, 1, "dots", bounds)]
        if steps:
            series.append(Series("attempts in training", smooth(steps, "reward"), 0))
            series.append(Series("", [(one["step"], one["reward"]) for one in steps], 0, "pale"))
        drawn.append((lines(series, "step", "reward", y_range=(0.0, 1.0)), name))
        first, last = (interval(reward) for _, reward in (rewards[0], rewards[-1]))
        tokens = f"{steps[0]['length']:.0f} to {steps[-1]['length']:.0f}" if steps else "–"
        rows.append([name, f"{len(steps)}", first, last, tokens])
    if not drawn:
        waiting = "the reward on held-out problems, step by step, of each expert and of the unified model."
        return section("rl", title, paper, later(waiting), *_answers(story))
    text = (
        "What an environment answers is never trained on. Problems that attempts are trained on get harder as they are learnt, "
        "so the curve of training may fall while the held-out reward rises."
    )
    head = ["run", "steps", "held out, before", "held out, after", "tokens an attempt"]
    return section("rl", title, paper, text, charts(*drawn), table(head, rows), *_objectives(story), *_answers(story))


def _objectives(story: Story) -> list[Html]:
    """The losses as they were computed, each once, with the runs that followed it."""
    runs: dict[str, list[str]] = {}
    for name, folder in story.rl_runs().items():
        if (folder / "config.toml").is_file():
            runs.setdefault(formula(load_rl_recipe(folder / "config.toml").objective), []).append(name)
    return [folded(f"The loss of {', '.join(names)}", commands(text)) for text, names in runs.items()]


def _answers(story: Story) -> list[Html]:
    """What the filters have taken of the answers that experts have given, by round and domain."""
    recipe = story.experts
    domains = recipe.experts if recipe else ()
    counts = {}
    for number in story.rounds:
        for domain in domains:
            folder = story.iteration / f"round-{number}" / "answers" / domain
            if (folder / COUNTS).is_file():
                counts[f"{domain}, round {number}"] = read_counts(folder)
    if not counts:
        return []
    found = counts.values()
    rows = [["attempts", *(f"{one['attempts']:,}" for one in found)]]
    rows += [[f"dropped: {name} ({why})", *(f"{one['took'][name]:,}" for one in found)] for name, why in FILTERS.items()]
    rows += [[f"kept: {mode}", *(f"{one['kept'][mode]:,}" for one in found)] for mode in (*SAMPLED, "automatic")]
    rows += [[f"automatic: {what}", *(f"{one['automatic'][what]:,}" for one in found)] for what in ("at once", "thinks")]
    caption = (
        "Rejection sampling (report, section 3.1): what the experts have answered, and what the unified model learns of it."
    )
    return [heading("What the experts teach"), table(["", *counts], rows, caption)]
