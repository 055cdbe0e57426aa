"""A part of a run: from one of its stages on, or until one of them.

What a run starts from is the checkpoint that ends the stage before: in its own folder, or in that of another run whose
first stages are the same. So the end of a long run can be tried anew, or in several ways, without its beginning.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from minglm.checkpoint import CheckpointError
from minglm.config import ConfigError
from minglm.tokenizer import Tokenizer
from minglm.train.metrics import MetricsFile
from minglm.train.recipe import Recipe, differences, load_recipe, save_recipe
from minglm.train.run_folder import RunFolder
from minglm.train.stages import Plan, PlannedStage


@dataclass(frozen=True)
class Span:
    """The stages to train; by default all."""

    from_stage: str | None = None
    """Start from the end of the stage before this one. In the run's own folder, what came later is deleted."""
    from_run: Path | None = None
    """With --from-stage: the folder of the run to start from (by default this one)."""
    until_stage: str | None = None
    """Stop at the end of this stage."""

    def share_data(self, recipe: Recipe) -> Recipe:
        """A run that starts from another one reads its data, unless the recipe names a place."""
        if self.from_run is None:
            return recipe
        if self.from_stage is None:
            raise ConfigError("from_run without from_stage: wanted the name of the stage to start with, too")
        if recipe.data.folder is not None:
            return recipe
        folder = load_recipe(RunFolder(self.from_run).config).data.folder or self.from_run / "data"
        return replace(recipe, data=replace(recipe.data, folder=folder.resolve()))

    def open(self, folder: RunFolder, recipe: Recipe, must_resume: bool = False) -> tuple[Path | None, int]:
        """Make the folder ready; return the checkpoint to go on from (None: the beginning) and the last step to take.

        Raises `ConfigError` for stages that the recipe does not have, a checkpoint that is not there, or one that lies on
        the way of another recipe.
        """
        plan = recipe.plan()
        last = plan.named(self.until_stage).last_step if self.until_stage else plan.steps
        if self.from_stage is None:
            return folder.open(recipe, must_resume), last
        stage = plan.named(self.from_stage)
        if stage.border == 0:
            raise ConfigError(f"from_stage = {stage.name!r} is the first stage: wanted a later one; leave it out to begin anew")
        if last < stage.first_step:
            raise ConfigError(f"until_stage = {self.until_stage!r} comes before from_stage = {stage.name!r}")
        if self.from_run is None:
            return _rewind(folder, recipe, plan, stage), last
        if folder.newest_checkpoint() is not None:  # the same command again
            return folder.open(recipe, must_resume), last
        source = RunFolder(self.from_run)
        checkpoint = _checkpoint_before(source, recipe, plan, stage)
        folder.open(recipe)
        _copy_metrics(source, folder, stage.border)
        return checkpoint, last


WHOLE_RUN = Span()


def check_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Raises `CheckpointError` if the checkpoint's model reads other ids than the data was made with."""
    found = Tokenizer.from_pretrained(checkpoint)
    if found.fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"{checkpoint}: its tokenizer has fingerprint {found.fingerprint[:12]}, the data's {tokenizer.fingerprint[:12]}; "
            f"wanted the same one: --tokenizer {checkpoint}, with a --data.folder of its own"
        )


def _checkpoint_before(source: RunFolder, recipe: Recipe, plan: Plan, stage: PlannedStage) -> Path:
    """The checkpoint at the border before `stage`, if the run in `source` came there on the recipe's way."""
    if not source.config.is_file():
        raise ConfigError(f"{source.path}: no run folder, there is no {source.config.name}; wanted one that has passed a stage")
    other = load_recipe(source.config)
    unlike = [line for line in differences(other, recipe) if line.startswith("model.")]
    ours = [(s.name, s.last_step) for s in plan.stages if s.last_step <= stage.border]
    theirs = [(s.name, s.last_step) for s in other.plan().stages if s.last_step <= stage.border]
    if ours != theirs:
        unlike.append(f"stages to step {stage.border} (name, last step): found {theirs}, wanted {ours}")
    if unlike:
        raise ConfigError(
            f"{source.path} is a run of another recipe, from which {stage.name!r} cannot start; {'; '.join(unlike)}"
        )
    checkpoint = source.checkpoint(stage.border)
    if checkpoint not in source.checkpoints():
        found = ", ".join(f"{name} ({path.name})" for name, path in source.stage_checkpoints().items()) or "none"
        raise ConfigError(
            f"{checkpoint}: no such checkpoint, it would end the stage before {stage.name!r}; stages that have ended there: "
            f"{found}. Train up to it first: --until-stage {plan.stages[stage.number - 1].name}"
        )
    return checkpoint


def _rewind(folder: RunFolder, recipe: Recipe, plan: Plan, stage: PlannedStage) -> Path:
    """Take a run back to the border before `stage`. The later stages may have changed in the recipe."""
    checkpoint = _checkpoint_before(folder, recipe, plan, stage)
    later = [found for found in folder.checkpoints() if int(found.name.removeprefix("step-")) > stage.border]
    for doomed in reversed(later):  # the newest first: a kill in between leaves a run of the old recipe, only shorter
        folder.delete(doomed)
    MetricsFile(folder.metrics).cut_back(stage.border)
    save_recipe(recipe, folder.config)
    print(f"from the end of the stage before {stage.name!r}: {len(later)} later checkpoints deleted")
    return checkpoint


def _copy_metrics(source: RunFolder, folder: RunFolder, step: int) -> None:
    """A run's metrics tell its whole way, also what it went in another folder."""
    if source.metrics.is_file():
        shutil.copyfile(source.metrics, folder.metrics)
        MetricsFile(folder.metrics).cut_back(step)
