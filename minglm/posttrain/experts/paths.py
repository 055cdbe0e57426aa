"""Three ways from the cold start to one model, at equal compute:

    self-distillation        experts by RL, their answers learnt from the base on, RL on the unified model
    on-policy distillation   the same experts; a student, from the cold start, follows the one of each problem's domain
    one model                from the cold start, RL on the rewards of all domains at once

Compute is counted in tokens of a forward pass: a token generated is one, a token trained on three, a token that a teacher reads
one. What the first way has spent behind the cold start, rounds that were not kept included, is what the others may spend; the
experts are paid for by both that need them. Gates and exams are measurements and no part of it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from minglm.evals.interval import mean
from minglm.files import write_text_atomically
from minglm.posttrain.experts.exam import Sat, questions, score
from minglm.posttrain.experts.harvest import read_counts
from minglm.posttrain.experts.pipeline import Made, experts, open_folder, practise, sit_exams
from minglm.posttrain.experts.recipe import ExpertsRecipe
from minglm.rl.recipe import RLRecipe
from minglm.train.metrics import read_metrics

COMPARED = "paths.json"
PATHS = ("self-distillation", "on-policy distillation", "one model")


class Spent(NamedTuple):
    """Tokens generated, trained on and read by teachers."""

    generated: int = 0
    trained: int = 0
    teacher: int = 0

    @property
    def compute(self) -> int:
        return self.generated + 3 * self.trained + self.teacher

    def plus(self, *others: "Spent") -> "Spent":
        return Spent(*map(sum, zip(self, *others, strict=True)))


def spent_by(run: Path) -> Spent:
    """By a run of `sft` (padding included) or `rl`."""
    steps = [record for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "step"]
    if "generated_tokens" in steps[-1]:
        return Spent(*(sum(step[f"{name}_tokens"] for step in steps) for name in Spent._fields))
    return Spent(trained=steps[-1]["tokens"])


def compare(recipe: ExpertsRecipe, folder: str | Path) -> dict[str, Any]:
    """Do the iteration of `folder`, or what is still to be done of it, and the two other ways beside it -> what paths.json
    holds, by way. Raises as `experts` does."""
    made = experts(recipe, folder)
    recipe, folder = open_folder(recipe, Path(folder))
    of_experts = Spent().plus(*(spent_by(folder / "experts" / domain) for domain in recipe.experts))
    own = of_experts.plus(*(_spent_in_round(folder, one.number, recipe) for one in made.rounds))
    student = student_recipe(recipe, made, own.compute - of_experts.compute)
    everything = _within(recipe.unified_rl, made, own.compute)
    runs = [(student, folder / "distilled"), (everything, folder / "one-model")]
    distilled, together = practise(runs, recipe.experts_at_once, folder)
    everywhere = list(recipe.experts)
    models = {
        f"unified-{made.kept.number}-rl": (made.kept.rl, everywhere),
        "distilled": (distilled, everywhere),
        "one-model": (together, everywhere),
    }
    sat = sit_exams(recipe, folder, models, questions(recipe.levels, recipe.exam, recipe.seed).judging).values()
    costs = (own, of_experts.plus(spent_by(folder / "distilled")), spent_by(folder / "one-model"))
    found = {
        path: {**cost._asdict(), "compute": cost.compute, **_judged(attempts, recipe.domain_of)}
        for path, cost, attempts in zip(PATHS, costs, sat, strict=True)
    }
    write_text_atomically(folder / COMPARED, json.dumps(found, indent=1) + "\n")
    write_paths(folder, [found])
    return found


def student_recipe(recipe: ExpertsRecipe, made: Made, compute: int) -> RLRecipe:
    """On-policy distillation from the start, each family's teacher being its domain's expert."""
    teachers = {family: made.experts[domain] for family, domain in recipe.domain_of.items()}
    own = recipe.unified_rl
    sampling = replace(own.sampling, rounds=1)
    tasks = replace(own.tasks, curriculum="none")  # a teacher has something to say about every problem
    return _within(replace(own, teachers=teachers, sampling=sampling, tasks=tasks), made, compute)


def _within(recipe: RLRecipe, made: Made, compute: int) -> RLRecipe:
    """The recipe from the start until so much compute is spent: at least one token of each attempt."""
    steps = max(1, compute // (recipe.sampling.groups * recipe.sampling.group_size))
    sampling = replace(recipe.sampling, tokens=recipe.sampling.stages[-1])  # stages would be parts of steps that never come
    return replace(recipe, base=made.start, compute_budget=max(1, compute), steps=steps, sampling=sampling)


def _spent_in_round(folder: Path, number: int, recipe: ExpertsRecipe) -> Spent:
    own = folder / f"round-{number}"
    answers = (own / "answers" / domain for domain in recipe.experts)
    generated = sum(read_counts(path)["generated_tokens"] for path in answers if path.is_dir())
    return Spent(generated).plus(spent_by(own / "sft"), spent_by(own / "rl"))


def _judged(sat: Sequence[Sat], domain_of: Mapping[str, str]) -> dict[str, Any]:
    """The score, that of each domain, and that of each mode."""
    modes = dict.fromkeys(one.mode for one in sat)
    return {
        "score": score(sat, domain_of),
        "domains": {
            domain: score([one for one in sat if domain_of[one.family] == domain], domain_of)
            for domain in dict.fromkeys(domain_of.values())
        },
        "modes": {mode: score([one for one in sat if one.mode == mode], domain_of) for mode in modes},
    }


def write_paths(folder: Path, found: Sequence[Mapping[str, Any]]) -> str:
    """paths.md: the three ways, means over the iterations of `found`, with intervals where there are several. -> its text"""
    first = found[0][PATHS[0]]
    names = ["compute", "generated", "trained", "teacher", "score", *first["domains"], *first["modes"]]
    lines = [f"| | {' | '.join(names)} | score, less that of {PATHS[0]} |", f"|---|{'---|' * (len(names) + 1)}"]
    for path in PATHS:
        flat = [{**one[path], **one[path]["domains"], **one[path]["modes"]} for one in found]
        cells = [f"{mean([one[name] for one in flat]).value:,.0f}" for name in names[:4]]
        cells += [mean([one[name] for one in flat]).text() for name in names[4:]]
        gains = mean([one[path]["score"] - one[PATHS[0]]["score"] for one in found])
        lines.append(f"| {path} | {' | '.join(cells)} | {'' if path == PATHS[0] else gains.text()} |")
    text = "\n".join(lines)
    title = f"# Three ways to one model at equal compute, {len(found)} {'seed' if len(found) == 1 else 'seeds'}"
    (folder / "paths.md").write_text(f"{title}\n\n{text}\n", encoding="utf-8")
    return text
