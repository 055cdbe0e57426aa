"""The folder of a training run, and how a run goes on from what is in it.

    config.toml            the recipe as resolved
    metrics.jsonl          see minglm.train.metrics
    checkpoints/step-N/    a Hugging Face folder (model and tokenizer), and trainer/ with all else that resuming needs
    data/                  tokenizer and tokens, unless the recipe keeps them elsewhere
    overview.png           plots

A checkpoint has its name only when it is complete (`minglm.files.write_folder_atomically`).
"""

import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from minglm.config import ConfigError, read_toml_mapping
from minglm.train.recipe import Recipe, differences, load_recipe, save_recipe
from minglm.train.state import STATE


class RunFolder:
    """Names and lists what a run writes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.overview = self.path / "overview.png"

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step}"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, the oldest first."""
        steps = (re.fullmatch(r"step-(\d+)", folder.name) for folder in (self.path / "checkpoints").glob("step-*"))
        folders = [self.checkpoint(step) for step in sorted(int(match[1]) for match in steps if match)]
        return [folder for folder in folders if (folder / STATE).is_file()]

    def newest_checkpoint(self) -> Path | None:
        return next(reversed(self.checkpoints()), None)

    def open(
        self,
        recipe: Any,
        must_resume: bool = False,
        load: Callable[[Path], Any] = load_recipe,
        save: Callable[[Any, Path], None] = save_recipe,
    ) -> Path | None:
        """Make the folder ready for `recipe`; return the checkpoint to go on from, or None to start at the beginning.

        load, save: read and write a recipe of this kind.

        Raises `ConfigError` if the checkpoints there are another recipe's, or if there are none and `must_resume`.
        """
        for doomed in (self.path / "checkpoints").glob(".*.deleted"):  # the last run was killed while it deleted them
            shutil.rmtree(doomed)
        newest = self.newest_checkpoint()
        if newest is None and must_resume:
            raise ConfigError(f"{self.path}: found no checkpoint to resume from; without --resume, the run starts anew")
        if newest is not None:
            changes = list(differences(load(self.config), recipe))
            if changes:
                raise ConfigError(
                    f"{self.path} holds the checkpoints of another recipe; {'; '.join(changes)}. To go on with it, give "
                    f"its own recipe ({self.config}); to start anew, give another --run-folder or delete this one"
                )
            return newest
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        save(recipe, self.config)
        self.metrics.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
        return None

    def prune(self, keep: int, borders: Collection[int] = ()) -> None:
        """Delete all but the newest `keep` checkpoints, and those after the steps `borders`; 0 keeps all."""
        kept = {self.checkpoint(step) for step in borders}
        for folder in self.checkpoints()[:-keep] if keep else []:
            if folder not in kept:
                self.delete(folder)

    def delete(self, checkpoint: Path) -> None:
        # Under another name first, so that a kill in between leaves no half checkpoint that looks like a whole one.
        doomed = checkpoint.with_name(f".{checkpoint.name}.deleted")
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed)

    def training_recipe(self) -> Recipe | None:
        """The run's recipe; None where there is none, or a recipe of post-training, which starts from a base."""
        if not self.config.is_file() or "base" in read_toml_mapping(self.config):
            return None
        return load_recipe(self.config)

    def stage_checkpoints(self) -> dict[str, Path]:
        """The checkpoint at the end of each stage of the run's recipe, by the stage's name; of stages that have ended."""
        recipe = self.training_recipe()
        borders = {stage.name: self.checkpoint(stage.last_step) for stage in recipe.plan().stages} if recipe else {}
        return {name: folder for name, folder in borders.items() if (folder / STATE).is_file()}


def model_folder(path: Path) -> Path:
    """Where the model of a run folder is: its newest checkpoint; without one, the folder itself is taken for a model's."""
    return RunFolder(path).newest_checkpoint() or path
