"""Sections of the page about what post-training has gained: by family and model, by mode and difficulty, in calls of tools, and
in reliability. All of it is computed from the attempts at held-out problems that are there."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from minglm.chat import MODES
from minglm.evals.interval import mean, share
from minglm.evals.measure import Results
from minglm.posttrain.experts import claims
from minglm.posttrain.experts.exam import RECORDS, Sat, read_attempts, rewards
from minglm.posttrain.experts.paths import COMPARED
from minglm.posttrain.experts.results import COLUMNS, RESULTS, Table, rows_of, rows_of_domain
from minglm.report.html import Html, charts, heading, interval, later, section, table
from minglm.report.parts import AGENTS_EVALUATED, Story, agent_families, read_json
from minglm.report.svg import Row, Series, intervals, lines

NO_AGENT = "No family of this recipe is solved with tools."


class Attempts:
    """The attempts of each column of the tables, as far as its exams have been sat, and the tables of them."""

    def __init__(self, story: Story):
        self.recipe = story.experts
        found = {column: [folder for folder in own if (folder / RECORDS).is_file()] for column, own in story.exams().items()}
        self.sat = {column: [one for folder in own for one in read_attempts(folder)] for column, own in found.items() if own}
        self.table: Table = {column: rows_of(own, self.recipe.domain_of) for column, own in self.sat.items()}

    @property
    def last(self) -> str:
        """The column furthest down the road."""
        return [column for column in COLUMNS if column in self.sat][-1]

    def cell(self, column: str, row: str, mode: str) -> Mapping[str, Any] | None:
        return self.table.get(column, {}).get(row, {}).get(mode)


def gains_section(story: Story, attempts: Attempts) -> Html:
    title, paper = "What each step has gained", "report, section 3: experts, then one model"
    if not attempts.sat:
        waiting = "mean reward on held-out problems by family: base, cold start, experts, unified model, and after its RL."
        return section("gains", title, paper, later(waiting), *_rounds(story))
    columns = list(COLUMNS)
    drawn = []
    for domain in attempts.recipe.experts:
        rows = []
        for mode in MODES:
            found = [attempts.cell(column, f"all {domain}", mode) for column in columns]
            rows.append(Row(mode, [one and one["reward"] for one in found]))
        drawn.append((intervals(rows, list(COLUMNS.values()), "mean reward"), f"All families of {domain}, by mode."))
    tables = []
    for domain, expert in attempts.recipe.experts.items():
        rows = []
        for row in rows_of_domain(domain, expert):
            for mode in MODES:
                cells = [attempts.cell(column, row, mode) for column in columns]
                rows.append([row, mode, *(interval(one["reward"]) if one else "–" for one in cells)])
        tables += [heading(domain), table(["family", "mode", *COLUMNS.values()], rows)]
    text = (
        "Mean reward of one attempt at each held-out problem, the same problems and draws for every model, with 95% intervals. "
        "Experts are examined in their own domain alone."
    )
    return section("gains", title, paper, text, charts(*drawn), *_claims(story), *tables, *_rounds(story), *_ways(story))


def _claims(story: Story) -> list[Html]:
    """What the iteration was to show, when it is done."""
    found = claims.claims_of((read_json(story.iteration / RESULTS) or {}).get("claims", {}))
    if not found:
        return []
    return [heading("What was to be shown"), table(claims.COLUMNS, [one.row for one in found], claims.VERDICTS)]


def _rounds(story: Story) -> list[Html]:
    """The gates so far: agentic RL, answers anew, SFT, RL, and whether it was worth it."""
    rows = [[f"round {number}", f"{gate['score']:.3f}", gate["reason"]] for number, gate in story.gates().items()]
    caption = (
        "Rounds of iterative self-distillation (report, section 3.3): the score of all modes and domains, on problems that "
        "no exam uses, and the gate."
    )
    return [heading("Rounds"), table(["round", "score", "gate"], rows, caption)] if rows else []


def _ways(story: Story) -> list[Html]:
    """What `experts --compare` has found, where it was asked: other ways to one model."""
    found = read_json(story.iteration / COMPARED)
    if found is None:
        return []
    first = next(iter(found.values()))
    rows = [
        [way, f"{one['compute']:,}", f"{one['score']:.3f}", *(f"{one['domains'][domain]:.3f}" for domain in first["domains"])]
        for way, one in found.items()
    ]
    caption = "At equal compute, in tokens of a forward pass; scores are means over modes."
    head = ["way", "compute", "score", *first["domains"]]
    return [heading("Three ways to one model"), table(head, rows, caption)]


def thinking_section(attempts: Attempts) -> Html:
    title, paper = "To think or not to think", "report, section 3.1: the hybrid model"
    if not attempts.sat:
        waiting = "accuracy and tokens with thinking and without, and where the automatic mode thinks, by difficulty."
        return section("thinking", title, paper, later(waiting))
    column = attempts.last
    judged_by = "start" if "start" in attempts.sat else column  # the same model's bad luck would count as difficulty
    found = claims.by_pool(attempts.sat[column])
    ranked = claims.easiest_first(attempts.sat[judged_by])
    pools = [(f"{family} {level}", found[family, level]) for family, level in ranked if (family, level) in found]
    rows, drawn = [], []
    for name, _ in pools:
        cells = {mode: attempts.cell(column, name, mode) for mode in MODES}
        drawn.append(Row(name, [cells[mode] and cells[mode]["reward"] for mode in MODES]))
        rows.append([name, *_compared(cells)])
    half = len(pools) // 2
    groups = {"easier half": pools[:half], "harder half": pools[half:], "all": pools}
    sums = []
    for name, some in groups.items():
        sat = [one for _, own in some for one in own]
        if sat:
            sums.append([name, *_compared({mode: _of_mode(sat, mode) for mode in MODES})])
    head = ["", *(f"{mode}: reward" for mode in MODES), *(f"{mode}: tokens" for mode in MODES), "automatic thinks"]
    text = (
        f"The model: {COLUMNS[column]}. Difficulties stand in the order of what the model {COLUMNS[judged_by]} gets right, "
        "all modes together, easiest first."
    )
    chart = (intervals(drawn, list(MODES), "mean reward"), "Each difficulty of each family, the easiest first.")
    caption = "By measured difficulty, with 95% intervals."
    return section("thinking", title, paper, text, table(head, sums, caption), charts(chart), table(head, rows))


def _of_mode(sat: Sequence[Sat], mode: str) -> dict[str, Any] | None:
    own = [one for one in sat if one.mode == mode and one.reward is not None]
    if not own:
        return None
    numbers = {"reward": share(rewards(own)).numbers, "tokens": mean([one.tokens for one in own]).numbers}
    return {**numbers, "thought": statistics.fmean(one.thought for one in own)}


def _compared(cells: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    found = [interval(cells[mode]["reward"]) if cells[mode] else "–" for mode in MODES]
    found += [f"{cells[mode]['tokens'][0]:.0f}" if cells[mode] else "–" for mode in MODES]
    automatic = cells["automatic"]
    return [*found, f"{automatic['thought']:.0%}" if automatic else "–"]


def tools_section(attempts: Attempts) -> Html:
    title, paper = "Calls of tools that succeed", "report, sections 3.3 and 4"
    if attempts.recipe and not agent_families(attempts.recipe):
        return section("tools", title, paper, NO_AGENT)
    called = [column for column in attempts.sat if any(one.calls for one in attempts.sat[column])]
    if not called:
        waiting = "the share of calls that could be read, fitted their tool and were done, over held-out attempts of agents."
        return section("tools", title, paper, later(waiting))
    rows = [[COLUMNS[column], *(_calls(attempts.cell(column, "all", mode)) for mode in MODES)] for column in called]
    last = called[-1]
    families = dict.fromkeys(one.family for one in attempts.sat[last] if one.calls)
    by_family = [[family, *(_calls(attempts.cell(last, family, mode)) for mode in MODES)] for family in families]
    text = (
        "Every call that a model has begun counts by itself, those that were cut off too. It succeeds if it can be read, its "
        "name and arguments fit a tool, and the tool's result is no error. GLM-4.5's own figure is "
        f"{claims.GLM_TOOL_SUCCESS:.1%}, on its own tasks, of a coding agent with people's requests: another world than this "
        "small one, so the two numbers stand side by side and measure different things."
    )
    names = [COLUMNS[column] for column in called]
    values = [
        [(found := attempts.cell(column, "all", mode)) and found["calls"] and found["calls"]["success"] for column in called]
        for mode in MODES
    ]
    chart = intervals([Row(mode, own) for mode, own in zip(MODES, values, strict=True)], names, "share of calls that succeed")
    head = ["", *MODES]
    return section(
        "tools",
        title,
        paper,
        text,
        charts((chart, "With 95% intervals over calls.")),
        table(["model", *MODES], rows),
        heading(f"By family: {COLUMNS[last]}"),
        table(head, by_family),
    )


def _calls(found: Mapping[str, Any] | None) -> str:
    calls = found and found["calls"]
    return f"{interval(calls['success'], 3)} of {calls['made']:,}" if calls else "no calls"


def reliability_section(story: Story) -> Html:
    title, paper = "pass^k: is it right every time?", "report, section 4: TAU-bench"
    waiting = "how often several attempts of the agent at one problem are all right."
    files = sorted((story.folder / AGENTS_EVALUATED).glob("*.json"))
    if story.experts and not agent_families(story.experts):
        return section("reliability", title, paper, NO_AGENT)
    if not files:
        return section("reliability", title, paper, later(waiting))
    found = Results.load(files[0]).measures
    curves: dict[str, dict[int, list[float]]] = {mode: {} for mode in MODES}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for one in found:
        what, _, mode = one.quantity.rpartition(", ")
        name = what.partition(" of ")[0]
        if mode in curves and (name == "mean" or name.startswith(("pass@", "pass^"))):
            rows.setdefault((one.name, mode), {})[name] = interval(one.estimate.numbers)
            if name == "mean" or name.startswith("pass^"):
                k = 1 if name == "mean" else int(name.removeprefix("pass^"))
                curves[mode].setdefault(k, []).append(one.estimate.value)
    columns = list(dict.fromkeys(name for own in rows.values() for name in own))
    series = [
        Series(mode, sorted((k, statistics.fmean(values)) for k, values in own.items()), color, "dots")
        for color, (mode, own) in enumerate(curves.items())
        if own
    ]
    chart = lines(series, "k attempts, all of them right", "share of problems", y_range=(0.0, 1.0))
    cells = [[family, mode, *(own.get(name, "–") for name in columns)] for (family, mode), own in rows.items()]
    text = (
        "Several attempts at every held-out problem of the agent's world. pass@k: at least one of k is right; pass^k: all of "
        "them are, which is what a customer needs (TAU-bench)."
    )
    return section(
        "reliability",
        title,
        paper,
        text,
        charts((chart, "pass^k, the mean over families.")),
        table(["family", "mode", *columns], cells, "With 95% intervals over problems."),
    )
