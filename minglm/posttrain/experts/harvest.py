"""What an expert teaches: its attempts at problems of its domain, with thinking and without, filtered, as samples for `sft`."""

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minglm.files import write_folder_atomically
from minglm.posttrain.experts.filters import FILTERS, SAMPLED, Answer, choose, pass_rates
from minglm.posttrain.experts.policy import Policy, different
from minglm.posttrain.experts.recipe import Harvest
from minglm.rl.recipe import RLRecipe
from minglm.rl.rollout import Asked
from minglm.tasks.task import TRAIN

SAMPLES, COUNTS = "samples.jsonl", "counts.json"


def harvest(model: Path, domain: str, expert: RLRecipe, recipe: Harvest, row: int, draw: int, folder: Path) -> None:
    """Have the model attempt problems of the training split of the expert's families, and write what passes the filters, into
    `folder`, which is there only when it is complete: samples.jsonl for `sft`, counts.json with what each filter took.

    row: tokens of the longest sample; draw: another one gives other problems, of which RL's may be some.
    """
    # Every source is asked about every answer, those that can only veto, too: its filter decides.
    asked_too = {name: getattr(expert.rewards, name) or 1.0 for name in ("verifier", *expert.rewards.vetoes)}
    policy = Policy(model, replace(expert, rewards=replace(expert.rewards, **asked_too, vetoes=())))
    placed = different(expert.tasks.levels, TRAIN, draw, recipe.count(domain))
    answers: list[Answer] = []
    for mode in SAMPLED:
        asked = [
            Asked(one.problem, random.Random(f"{draw} {mode} {number} {response}").getrandbits(62))
            for number, one in enumerate(placed)
            for response in range(recipe.responses)
        ]
        found = policy.attempt(asked, mode, recipe.temperature, f"answers of {domain}")
        answers += [
            Answer(place // recipe.responses, placed[place // recipe.responses], mode, one) for place, one in enumerate(found)
        ]
    kept = choose(answers, recipe, policy.tokenizer, row, dict.fromkeys(expert.rewards.vetoes, expert.rewards.veto_below))
    counts = {
        "problems": len(placed),
        "attempts": len(answers),
        "generated_tokens": sum(one.attempt.length for one in answers),
        "took": {name: kept.took[name] for name in FILTERS},
        "kept": kept.counts(),
        "automatic": {
            "at once": sum(one.mode == "non-thinking" for one in kept.automatic),
            "thinks": sum(one.mode == "thinking" for one in kept.automatic),
            "undecided": kept.undecided,
        },
        "pass_rates": _by_pool(answers),
    }
    with write_folder_atomically(folder) as aside:
        lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in kept.lines())
        (aside / SAMPLES).write_text("".join(lines), encoding="utf-8")
        (aside / COUNTS).write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


def _by_pool(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """Of each mode and pool the mean pass rate of its problems."""
    found: dict[str, dict[str, list[float]]] = {mode: {} for mode in SAMPLED}
    for mode in SAMPLED:
        own = [one for one in answers if one.mode == mode]
        pool_of = {one.number: f"{one.placed.family} {one.placed.level}" for one in own}
        for number, rate in pass_rates(own).items():
            found[mode].setdefault(pool_of[number], []).append(rate)
    return {mode: {pool: statistics.fmean(rates) for pool, rates in pools.items()} for mode, pools in found.items()}


def read_counts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / COUNTS).read_text(encoding="utf-8"))


def counts_table(counts: dict[str, dict[str, Any]]) -> str:
    """A Markdown table: domains beside one another, what was attempted, what each filter took, what is left."""
    lines = [f"| | {' | '.join(counts)} |", f"|---|{'---|' * len(counts)}"]
    rows = [("attempts", [one["attempts"] for one in counts.values()])]
    rows += [(f"dropped: {name} ({FILTERS[name]})", [one["took"][name] for one in counts.values()]) for name in FILTERS]
    rows += [(f"kept: {mode}", [one["kept"][mode] for one in counts.values()]) for mode in (*SAMPLED, "automatic")]
    rows += [
        (f"automatic: {name}", [one["automatic"][name] for one in counts.values()])
        for name in ("at once", "thinks", "undecided")
    ]
    return "\n".join(lines + [f"| {name} | {' | '.join(f'{value:,}' for value in values)} |" for name, values in rows])
