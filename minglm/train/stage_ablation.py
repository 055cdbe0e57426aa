"""Does each stage earn its keep? Every stage against the same number of tokens of the stage before it.

    python -m minglm ablate nano --stages --seeds 1 2 3

For each seed the recipe is trained once, to the end of the last stage that is judged. An arm is a run that starts at one of
its borders, from the very checkpoint, and does one thing otherwise; both are judged on the same held-out documents and
problems, so that a difference between the two is that of the one thing, and of chance. The interval over seeds says how much of
it is chance.

    control       the stage before goes on: its mixture, packing, sequence length and RoPE base, for the stage's tokens
    rope          the RoPE base stays as it was, from where the recipe changes it to the recipe's end
    fim           no fill-in-the-middle: from the beginning to the end of a stage, by default that with the most code
"""

import contextlib
import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minglm.config import ConfigError
from minglm.train.ablation import half_width, mean_and_interval
from minglm.train.processes import in_processes
from minglm.train.recipe import Recipe
from minglm.train.run_folder import RunFolder
from minglm.train.span import Span
from minglm.train.stages import PlannedStage

KINDS = ("control", "rope", "fim")
Judge = Callable[[Path, Path], Mapping[str, float]]
"""A model's folder and the folder of prepared data -> numbers by name. It goes to other processes: it must be picklable."""


@dataclass(frozen=True)
class Arm:
    """A run that does one thing otherwise, and the stage at whose end it is compared with the recipe's own run."""

    kind: str
    stage: str
    recipe: Recipe
    span: Span  # without from_run, which differs between seeds

    @property
    def label(self) -> str:
        return f"{self.stage}, {self.kind}"


@dataclass(frozen=True)
class Run:
    """One training, and the stages at whose ends it is judged."""

    recipe: Recipe
    folder: Path
    span: Span
    judged: tuple[str, ...]


def arms(recipe: Recipe, kinds: Sequence[str] = KINDS, stages: Sequence[str] = ()) -> list[Arm]:
    """The arms of a recipe; of those stages only, if any are named.

    Raises `ConfigError` for a recipe of a single stage, and for kinds and stages that do not exist.
    """
    plan = recipe.plan()
    if len(plan.stages) < 2:
        raise ConfigError("ablate --stages: the recipe has a single stage; wanted [[stages]], such as those of nano")
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"arms = {kind!r}: wanted some of {', '.join(KINDS)}")
    chosen = {plan.named(name).name for name in stages} or {stage.name for stage in plan.stages}
    found = []
    for before, stage in zip(plan.stages, plan.stages[1:], strict=False):
        if "control" in kinds and stage.name in chosen:
            span = Span(from_stage=stage.name, until_stage=stage.name)
            found.append(Arm("control", stage.name, _with_stage(recipe, stage, _control(recipe, before, stage)), span))
        if "rope" in kinds and stage.rope_theta != before.rope_theta and plan.stages[-1].name in chosen:
            kept = recipe
            for later in plan.stages[stage.number :]:
                kept = _with_stage(kept, later, replace(kept.stages[later.number], rope_theta=before.rope_theta))
            found.append(Arm("rope", plan.stages[-1].name, kept, Span(from_stage=stage.name)))
    if "fim" in kinds and recipe.data.fim_rate and "code" in recipe.data.ingredients:
        most = max(plan.stages, key=_code_tokens)
        last = most if not stages else max((plan.named(name) for name in stages), key=_code_tokens)
        without = replace(recipe, data=replace(recipe.data, fim_rate=0.0))
        found.append(Arm("fim", last.name, without, Span(until_stage=last.name)))
    return found


def _with_stage(recipe: Recipe, stage: PlannedStage, other) -> Recipe:
    return replace(recipe, stages=(*recipe.stages[: stage.number], other, *recipe.stages[stage.number + 1 :]))


def _control(recipe: Recipe, before: PlannedStage, stage: PlannedStage):
    """The stage with all that decides what it reads from the stage before; its place in the schedules is its own."""
    keys = ("mixture", "packing", "sequence_length", "sequences_per_step", "sequences_per_micro_batch", "rope_theta")
    return replace(recipe.stages[stage.number], **{key: getattr(before, key) for key in keys})


def _code_tokens(stage: PlannedStage) -> float:
    share = stage.mixture.get("code", 0.0) / sum(stage.mixture.values()) if stage.mixture else 0.0
    return share * stage.steps * stage.sequences_per_step * stage.sequence_length


def ablate_stages(
    recipe: Recipe,
    seeds: Sequence[int],
    folder: str | Path,
    judge: Judge,
    judged_by: str,
    kinds: Sequence[str] = KINDS,
    stages: Sequence[str] = (),
    workers: int = 1,
) -> str:
    """Train the recipe and its arms with every seed, judge them, `workers` processes at a time. -> a Markdown report.

    judged_by: the judge's name and settings; what was judged by the same before is not judged again. Killed, the same call
    goes on. Writes `stages.md` and `stages.json` into `folder`, beside the run folders.
    """
    folder = Path(folder).resolve()
    data = recipe.data.folder or folder / "data"
    recipe = replace(recipe, data=replace(recipe.data, folder=data))
    grid = arms(recipe, kinds, stages)
    if not grid:
        raise ConfigError(f"ablate --stages: found no arm {', '.join(kinds)} at {', '.join(stages)}; wanted a later stage")
    folder.mkdir(parents=True, exist_ok=True)
    _prepare(recipe, folder, grid)

    def place(label: str, seed: int) -> Path:
        return folder / label.replace(", ", "+").replace(" ", "-") / f"seed-{seed}"

    def run_of(seed: int, arm: Arm) -> Run:
        varied = replace(arm.recipe, seed=seed)
        if arm.kind == "fim":
            tokenizer = str(data / "tokenizer") if recipe.tokenizer == "train" else recipe.tokenizer
            varied = replace(varied, tokenizer=tokenizer, data=replace(varied.data, folder=folder / "data-without-fim"))
        start = place("recipe", seed) if arm.span.from_stage else None
        return Run(varied, place(arm.label, seed), replace(arm.span, from_run=start), (arm.stage,))

    stages_judged = tuple(stage.name for stage in recipe.plan().stages if stage.name in {arm.stage for arm in grid})
    needed = Span(until_stage=stages_judged[-1])
    own = [Run(replace(recipe, seed=seed), place("recipe", seed), needed, stages_judged) for seed in seeds]
    others = [run_of(seed, arm) for arm in grid if not arm.span.from_stage for seed in seeds]
    behind = {
        run.folder: [run_of(seed, arm) for arm in grid if arm.span.from_stage] for run, seed in zip(own, seeds, strict=True)
    }
    work = functools.partial(_train_and_judge, data=data, judge=judge, judged_by=judged_by)
    in_processes(work, [*own, *others], workers, "training and judging", lambda run: behind.get(run.folder, []))

    pairs = {}
    for arm in grid:
        both = [(place("recipe", seed), place(arm.label, seed)) for seed in seeds]
        pairs[arm.label] = [tuple(_judged(run, arm.stage, data, judge, judged_by) for run in pair) for pair in both]
    text = report(pairs)
    (folder / "stages.json").write_text(json.dumps({"judged by": judged_by, "arms": pairs}, indent=1) + "\n")
    (folder / "stages.md").write_text(text + "\n", encoding="utf-8")
    return text


def _prepare(recipe: Recipe, folder: Path, grid: Sequence[Arm]) -> None:
    """Before runs share it: two processes must not prepare one folder at a time."""
    from minglm.train.preparation import prepare_data

    prepare_data(recipe, folder)
    if any(arm.kind == "fim" for arm in grid):
        tokenizer = str(recipe.data.folder / "tokenizer") if recipe.tokenizer == "train" else recipe.tokenizer
        other = replace(recipe.data, fim_rate=0.0, folder=folder / "data-without-fim")
        prepare_data(replace(recipe, tokenizer=tokenizer, data=other), folder)


def _train_and_judge(run: Run, data: Path, judge: Judge, judged_by: str) -> None:
    from minglm.train.trainer import train

    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("a", encoding="utf-8") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            train(run.recipe, run.folder, span=run.span)
    for stage in run.judged:
        _judged(run.folder, stage, data, judge, judged_by)


def _judged(run_folder: Path, stage: str, data: Path, judge: Judge, judged_by: str) -> dict[str, float]:
    """The judge's numbers on the end of a stage, kept in the run folder."""
    kept = run_folder / f"judged-{stage}.json"
    if kept.is_file():
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known["judged by"] == judged_by:
            return known["numbers"]
    numbers = dict(judge(RunFolder(run_folder).stage_checkpoints()[stage], data))
    kept.write_text(json.dumps({"judged by": judged_by, "numbers": numbers}, indent=1) + "\n", encoding="utf-8")
    return numbers


def report(pairs: Mapping[str, Sequence[tuple[Mapping[str, float], Mapping[str, float]]]]) -> str:
    """Markdown: for each arm a table with the recipe's mean, the arm's, and their difference by seed with its interval.

    pairs: label -> for each seed the numbers of the recipe's run and of the arm's. A difference whose interval does not
    hold 0 is in bold.
    """
    lines = []
    for label, runs in pairs.items():
        lines += [f"### {label}", "", f"| measure | recipe | {label.partition(', ')[2]} | recipe - arm |", "|---|---|---|---|"]
        for name in runs[0][0]:
            if not all(name in numbers for pair in runs for numbers in pair):
                continue
            own, other = ([pair[index][name] for pair in runs] for index in (0, 1))
            differences = [a - b for a, b in zip(own, other, strict=True)]
            difference, half = mean_and_interval(differences), half_width(differences)
            if half is not None and abs(statistics.mean(differences)) > half:
                difference = f"**{difference}**"
            lines.append(f"| {name} | {statistics.mean(own):.4f} | {statistics.mean(other):.4f} | {difference} |")
        lines.append("")
    return "\n".join(lines)
