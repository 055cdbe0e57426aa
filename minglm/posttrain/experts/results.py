"""The tables of an expert iteration, as results.json and results.md; of several seeds, with intervals over them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minglm.chat import MODES
from minglm.evals.interval import Estimate, mean
from minglm.files import write_text_atomically
from minglm.posttrain.experts.claims import VERDICTS, Claim, claims, claims_of, claims_table, over_seeds
from minglm.posttrain.experts.exam import Sat, score, summary
from minglm.posttrain.experts.harvest import counts_table, read_counts
from minglm.posttrain.experts.recipe import ExpertsRecipe
from minglm.rl.recipe import RLRecipe

if TYPE_CHECKING:
    from minglm.posttrain.experts.pipeline import Made

RESULTS, TABLE = "results.json", "results.md"
COLUMNS = {
    "base": "base",
    "start": "SFT",
    "expert": "experts, each in its domain",
    "unified": "unified",
    "unified_rl": "unified, after RL",
}
Table = dict[str, dict[str, dict[str, Any]]]
"""Column -> row (a family, a family and a difficulty, "all DOMAIN", "all") -> mode -> `exam.summary`."""


def write_results(recipe: ExpertsRecipe, folder: Path, sat: Mapping[str, Sequence[Sat]], made: "Made") -> None:
    """sat: of each model, by name, its attempts at the problems that judge."""
    kept = made.kept.number
    experts = [one for domain in recipe.experts for one in sat[f"expert-{domain}"]]
    columns = {"base": sat["base"], "start": sat["start"], "expert": experts}
    columns |= {"unified": sat[f"unified-{kept}"], "unified_rl": sat[f"unified-{kept}-rl"]}
    table = {column: rows_of(own, recipe.domain_of) for column, own in columns.items()}
    answers = {one.number: {domain: read_counts(path) for domain, path in one.answers.items()} for one in made.rounds}
    shown = claims(recipe, sat, kept)
    results = {
        "seed": recipe.seed,
        "kept_round": kept,
        "scores": {name: score(own, recipe.domain_of) for name, own in sat.items()},
        "claims": _numbers(shown),
        "table": table,
        "gates": [one.gate for one in made.rounds],
        "answers": answers,
        "checkpoints": {"base": str(recipe.base), "start": str(made.start), "unified_rl": str(made.kept.rl)},
    }
    parts = ["# Expert iteration", _introduction(recipe.exam.problems), *_shown(shown), *_sections(table, recipe)]
    rounds = (f"- round {one.number}: score {one.gate['score']:.3f}, {one.gate['reason']}" for one in made.rounds)
    parts += ["## Rounds", "\n".join(rounds)]
    for number, counts in answers.items():
        parts += [f"## Answers of round {number}", counts_table(counts)]
    _write(folder, results, "\n\n".join(parts))


def write_results_of_seeds(recipe: ExpertsRecipe, folder: Path, folders: Sequence[Path]) -> None:
    """The same table with means and Student's intervals over the iterations of several seeds; of what one of them lacks,
    over the others."""
    results = [json.loads((one / RESULTS).read_text(encoding="utf-8")) for one in folders]
    shown = over_seeds([claims_of(one["claims"]) for one in results])
    found = [one["table"] for one in results]
    table: Table = {}
    for column, rows in found[0].items():
        for row, modes in rows.items():
            for mode in modes:
                own = [one[column][row][mode] for one in found if one[column].get(row, {}).get(mode)]
                if own:
                    numbers: dict[str, Any] = {key: _over([each[key][0] for each in own]) for key in ("reward", "tokens")}
                    calls = [each["calls"] for each in own if each["calls"]]
                    made, shares = sum(each["made"] for each in calls), [each["success"][0] for each in calls]
                    numbers["calls"] = {"made": made, "success": _over(shares)} if calls else None
                    table.setdefault(column, {}).setdefault(row, {})[mode] = {**numbers, "seeds": len(own)}
    text = [
        f"# Expert iteration, {len(folders)} seeds",
        "Means over seeds with 95% intervals (Student's t).",
    ]
    results_of_all = {"seeds": [one["seed"] for one in results], "claims": _numbers(shown), "table": table}
    _write(folder, results_of_all, "\n\n".join([*text, *_shown(shown), *_sections(table, recipe)]))


def _numbers(shown: Sequence[Claim]) -> dict[str, Any]:
    return {one.text: one.numbers for one in shown}


def _shown(found: Sequence[Claim]) -> list[str]:
    return ["## What was to be shown", VERDICTS, claims_table(found)]


def _over(values: Sequence[float]) -> list[float | None]:
    return mean(values).numbers


def _introduction(problems: int) -> str:
    return (
        f"Mean reward on held-out problems ({problems} of each difficulty, or as many as there are) with its 95% interval, and "
        "the mean number of tokens of an answer. thinking: the prompt has opened it; automatic: the model chooses."
    )


def rows_of(sat: Sequence[Sat], domain_of: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """A column of the table."""
    groups: dict[str, list[Sat]] = {}
    for one in sat:
        for row in ("all", f"all {domain_of[one.family]}", one.family, f"{one.family} {one.level}"):
            groups.setdefault(row, []).append(one)
    return {row: {mode: summary([one for one in own if one.mode == mode]) for mode in MODES} for row, own in groups.items()}


def rows_of_domain(domain: str, expert: RLRecipe) -> list[str]:
    """Of its table: its families, and where these are several, all of them together."""
    families = list(expert.tasks.levels)
    return families if len(families) == 1 else [*families, f"all {domain}"]


def _sections(table: Table, recipe: ExpertsRecipe) -> Iterator[str]:
    """A table of each domain, families and modes being its rows, the models its columns; and one of all together."""
    for domain, expert in recipe.experts.items():
        yield f"## {domain}"
        yield _markdown(table, rows_of_domain(domain, expert), _cell)
    yield "## all domains"
    yield _markdown(table, ["all"], _cell)
    yield "## calls of tools"
    yield "The share that could be read, fitted the tool and was done, and how many calls there were."
    yield _markdown(table, ["all"], _calls)


def _markdown(table: Table, rows: Sequence[str], cell: Callable[[Mapping[str, Any] | None], str]) -> str:
    lines = [f"| | mode | {' | '.join(COLUMNS.values())} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for row in rows:
        for mode in MODES:
            cells = [cell(table.get(column, {}).get(row, {}).get(mode)) for column in COLUMNS]
            lines.append(f"| {row} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "no verdict"
    return f"{Estimate(*found['reward'], count=0).text(2)}; {found['tokens'][0]:.0f} tokens"


def _calls(found: Mapping[str, Any] | None) -> str:
    calls = found and found["calls"]
    return f"{Estimate(*calls['success'], count=0).text()} of {calls['made']:,}" if calls else "no calls"


def _write(folder: Path, results: Any, text: str) -> None:
    write_text_atomically(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    write_text_atomically(folder / TABLE, text + "\n")
