"""The parts of the story of a run folder, in order, and how far each is: a function of what is in the folder.

    data, then a part for each stage of pre-training and mid-training      the folder itself, a run of `train`
    start, experts, rounds, exams                                          experts/, an iteration of `experts`
    what the stages can do, and how reliable the agent is                  eval-stages/ and eval-agents/, of `eval`

No part is done because something says so, but because its result is there.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minglm.posttrain.experts.exam import RECORDS
from minglm.posttrain.experts.pipeline import FINISHED, GATE
from minglm.posttrain.experts.recipe import ExpertsRecipe, load_experts_recipe
from minglm.posttrain.recipe import SFTRecipe
from minglm.rl.recipe import RLRecipe
from minglm.tasks import FAMILIES
from minglm.tasks.agents.world import AgentProblem
from minglm.train.metrics import read_last
from minglm.train.recipe import Recipe
from minglm.train.run_folder import RunFolder
from minglm.train.state import STATE

EXPERTS, STAGES_EVALUATED, AGENTS_EVALUATED, TABLE = "experts", "eval-stages", "eval-agents", "table.md"
SAMPLES = 4  # of an agent at each problem, for pass^k
Kind = Literal["data", "training", "sft", "rl", "answers", "exam", "eval"]
SECONDS: Mapping[Kind, float] = {
    "data": 45.0,
    "training": 2.4e-4,
    "sft": 1.9e-4,
    "rl": 0.02,
    "answers": 0.01,
    "exam": 0.01,
    "eval": 0.005,
}
"""What a part takes for a unit of its work, at nano on two cores; what has been measured takes its place."""


@dataclass(frozen=True)
class Part:
    """name: a path within the story. work: tokens of training, attempts of all else; steps: of a run, before and at its end."""

    name: str
    title: str
    kind: Kind
    result: Path
    """Is there when the part is done, and not before."""
    work: float
    metrics: Path | None = None
    steps: tuple[int, int] = (0, 0)

    @property
    def done(self) -> bool:
        return self.result.exists()

    @property
    def expected_seconds(self) -> float:
        return SECONDS[self.kind] * self.work

    def share(self) -> float | None:
        """How much of it is done, from 0 to 1; None where nothing says so."""
        if self.metrics is None:
            return None
        first, last = self.steps
        records = read_last(self.metrics)
        step = records[-1]["step"] if records else 0
        return min(1.0, max(0.0, (step - first) / (last - first)))


@dataclass(frozen=True)
class Story:
    """What a folder's recipes say that there will be. training: None for a folder that is no run; experts: None for a run that
    nothing comes after."""

    folder: Path
    training: Recipe | None
    experts: ExpertsRecipe | None

    @classmethod
    def of(cls, folder: str | Path) -> "Story":
        """Raises `ConfigError` for recipes that cannot be read."""
        run = RunFolder(folder)
        config = run.path / EXPERTS / "config.toml"
        return cls(run.path, run.training_recipe(), load_experts_recipe(config) if config.is_file() else None)

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def iteration(self) -> Path:
        return self.folder / EXPERTS

    def parts(self) -> list[Part]:
        found = list(_of_training(self.run, self.training)) if self.training else []
        if self.experts:
            found += _of_experts(self.iteration, self.experts)
            found += self._of_evaluation(self.experts)
        return found

    def _of_evaluation(self, recipe: ExpertsRecipe) -> Iterator[Part]:
        if self.training and self.training.stages:
            work = len(self.training.stages) * 160.0 * _stage_limit(recipe)
            yield Part("eval/stages", "what each stage has learnt", "eval", self.folder / STAGES_EVALUATED / TABLE, work)
        if families := agent_families(recipe):
            work = 3.0 * SAMPLES * recipe.exam.problems * len(families)
            yield Part("eval/agents", "how reliable the agent is", "eval", self.folder / AGENTS_EVALUATED / TABLE, work)

    def rl_runs(self) -> dict[str, Path]:
        """The folders of all runs of RL, by name; whether they are there yet or not."""
        return {part.title: part.result.parent for part in self.parts() if part.kind == "rl"}

    def kept_round(self) -> int | None:
        """The last round so far that was kept."""
        return max((number for number, gate in self.gates().items() if gate["kept"]), default=None)

    def gates(self) -> dict[int, dict[str, Any]]:
        """What the gate of each round so far has said."""
        found = {number: read_json(self.iteration / f"round-{number}" / GATE) for number in self.rounds}
        return {number: gate for number, gate in found.items() if gate}

    def exams(self) -> dict[str, list[Path]]:
        """Column of the tables (`results.COLUMNS`) -> where the exams that it is made of are, or will be."""
        if self.experts is None:
            return {}
        names = {"base": ["base"], "start": ["start"], "expert": [f"expert-{domain}" for domain in self.experts.experts]}
        if kept := self.kept_round():
            names |= {"unified": [f"unified-{kept}"], "unified_rl": [f"unified-{kept}-rl"]}
        return {column: [self.iteration / "exams" / name for name in own] for column, own in names.items()}

    @property
    def rounds(self) -> range:
        return range(1, self.experts.rounds + 1) if self.experts else range(0)

    @property
    def model(self) -> Path:
        """The model at the end of the story, where it is written."""
        return self.folder / "model"


def evaluations(story: Story) -> dict[str, list[str]]:
    """What the story gives to the command `eval`, by the part that it is."""
    found = {}
    recipe, folder = story.experts, story.folder
    if recipe and story.training and story.training.stages:
        families = story.training.data.families
        suite = "bits,likelihood" if families else "bits"
        chosen = ["--families", *families] if families else []
        out = ["--limit", str(_stage_limit(recipe)), "--out", str(folder / STAGES_EVALUATED)]
        found["eval/stages"] = [str(folder), "--suite", suite, *chosen, *out]
    if recipe and (families := agent_families(recipe)) and (kept := story.kept_round()):
        levels = max(FAMILIES[family].difficulties.index(max(recipe.levels[family])) + 1 for family in families)
        asked = ["--benchmark", "families", "--families", *families, "--levels", str(levels)]
        drawn = ["--samples", str(SAMPLES), "--limit", str(recipe.exam.problems), "--seed", str(recipe.seed)]
        model = RunFolder(story.iteration / f"round-{kept}" / "rl").newest_checkpoint()
        found["eval/agents"] = [str(model), *asked, *drawn, "--out", str(folder / AGENTS_EVALUATED)]
    return found


def _stage_limit(recipe: ExpertsRecipe) -> int:
    """How much `eval` asks of each stage's model, of each kind: far dearer than an exam's questions."""
    return max(2, recipe.exam.problems // 6)


def agent_families(recipe: ExpertsRecipe) -> list[str]:
    """Those whose problems are solved with tools, in a world that answers."""
    return [family for family in recipe.levels if issubclass(FAMILIES[family], AgentProblem)]


def _of_training(run: RunFolder, recipe: Recipe) -> Iterator[Part]:
    yield Part("data", "text and tokenizer", "data", run.metrics, 1.0)
    for stage in recipe.plan().stages:
        tokens = stage.steps * stage.sequences_per_step * stage.sequence_length
        yield Part(
            f"training/{stage.name}",
            f"training: {stage.name}",
            "training",
            run.checkpoint(stage.last_step) / STATE,
            tokens,
            run.metrics,
            (stage.border, stage.last_step),
        )


def _of_experts(folder: Path, recipe: ExpertsRecipe) -> Iterator[Part]:
    yield _sft("start", "cold start", folder / "start", recipe.start)
    for domain, expert in recipe.experts.items():
        yield _rl(f"experts/{domain}", f"expert: {domain}", folder / "experts" / domain, expert)
    pools = sum(map(len, recipe.levels.values()))
    sat = 3.0 * recipe.exam.problems
    for number in range(1, recipe.rounds + 1):
        round, of = folder / f"round-{number}", f"round {number}: "
        for domain, expert in recipe.experts.items():
            if number == 1 or domain in recipe.regenerated:
                problems = recipe.harvest.count(domain) * sum(map(len, expert.tasks.levels.values()))
                attempts = 2 * problems * recipe.harvest.responses
                answers = round / "answers" / domain
                yield Part(f"round-{number}/answers/{domain}", f"{of}answers, {domain}", "answers", answers, attempts)
        yield _sft(f"round-{number}/sft", f"{of}unified model", round / "sft", recipe.unified_sft)
        yield _rl(f"round-{number}/rl", f"{of}RL on it", round / "rl", recipe.unified_rl)
        yield Part(f"round-{number}/gate", f"{of}gate", "exam", round / GATE, sat * pools)
    for model in ("base", "start"):
        yield Part(f"exams/{model}", f"exam: {model}", "exam", folder / "exams" / model / RECORDS, sat * pools)
    for domain, expert in recipe.experts.items():
        name, own = f"expert-{domain}", sum(map(len, expert.tasks.levels.values()))
        yield Part(f"exams/{name}", f"exam: expert, {domain}", "exam", folder / "exams" / name / RECORDS, sat * own)
    for number in range(1, recipe.rounds + 1):
        for name, title in (
            (f"unified-{number}", f"unified {number}"),
            (f"unified-{number}-rl", f"unified {number}, after RL"),
        ):
            yield Part(f"exams/{name}", f"exam: {title}", "exam", folder / "exams" / name / RECORDS, sat * pools)


def _sft(name: str, title: str, folder: Path, recipe: SFTRecipe) -> Part:
    training = recipe.training
    steps = max(1, round(training.scale * training.steps))
    tokens = steps * training.sequences_per_step * training.sequence_length
    return Part(name, title, "sft", folder / FINISHED, tokens, folder / "metrics.jsonl", (0, steps))


def _rl(name: str, title: str, folder: Path, recipe: RLRecipe) -> Part:
    attempts = recipe.steps * recipe.sampling.groups * recipe.sampling.group_size
    return Part(name, title, "rl", folder / FINISHED, attempts, folder / "metrics.jsonl", (0, recipe.steps))


def read_json(path: Path) -> Any:
    """None where there is no such file yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
