"""A recipe of reinforcement learning, in one TOML file (examples in `configs/rl/`). Nothing here needs torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from minglm.config import ConfigError, GLMConfig, build, read_toml_mapping
from minglm.rl.objective import Objective
from minglm.train.recipe import Hardware, Optimizer, Recipe, Samples, Training, find_config, save_recipe
from minglm.train.stages import require


@dataclass(frozen=True)
class Tasks:
    """What to practise on: problems of the training split; held-out ones judge."""

    levels: Mapping[str, tuple[int, ...]]
    """Family (minglm.tasks) -> its difficulties."""
    curriculum: Literal["none", "pass_rate"] = "pass_rate"
    """none: all difficulties equally often. pass_rate: moderate ones first, those the policy solves now and then; when the
    reward has levelled off, hard ones, too, of which it has solved one at least (report, section 3.2)."""

    def __post_init__(self) -> None:
        require(bool(self.levels), "levels", self.levels, "a family, and its difficulties")
        for family, levels in self.levels.items():
            require(bool(levels), f"levels.{family}", levels, "one difficulty at least")


@dataclass(frozen=True)
class Sampling:
    """How the policy attempts problems."""

    group_size: int = 8
    """Attempts at one problem."""
    groups: int = 16
    """Problems of a step."""
    tokens: int = 128
    """Of one turn, at most. The same from the first step to the last: growing it made models unlearn long outputs."""
    turns: int = 8
    """Of one attempt, at most."""
    temperature: float = 1.0
    thinking: Literal["thinking", "non-thinking", "automatic"] = "thinking"
    format_penalty: bool = True
    """A call that cannot be read ends the episode at once, with reward 0 (report, section 3.2.4)."""
    rounds: int = 3
    """Dynamic sampling: problems whose attempts all have one reward are replaced by others, so many times at most; 1: never."""

    def __post_init__(self) -> None:
        require(self.group_size >= 2, "group_size", self.group_size, "2 or more: one attempt has nothing to be judged against")
        for key in ("groups", "tokens", "turns", "rounds"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")


@dataclass(frozen=True)
class Asynchronous:
    """How rollout workers and trainer work side by side, in mode "asynchronous"."""

    max_staleness: int = 2
    """Steps that the trained weights may have done since a token's; 0: workers and trainer take turns."""
    workers: int = 1
    """Rollout processes that the run starts; 0: others start them (python -m minglm.rl.asynchronous.worker RUN_FOLDER)."""
    room: int = 64
    """Attempts that a worker has under way at most, those that wait for their environment included."""
    lease_seconds: float = 30.0
    """A worker that has not been heard of for so long loses what it has under way to others."""
    host: str = "127.0.0.1"
    """Where the trainer listens for workers, by plain HTTP with a token: elsewhere only in a network that can be trusted."""
    clock: Literal["wall", "virtual"] = "wall"
    """virtual: one process, workers played with drawn durations; the schedule is the same every time."""

    def __post_init__(self) -> None:
        for key in ("max_staleness", "workers"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        require(self.room >= 1, "room", self.room, "1 or more")
        require(self.lease_seconds > 0, "lease_seconds", self.lease_seconds, "above 0")
        alone = self.clock == "virtual" and self.workers == 0
        require(not alone, "workers", self.workers, "1 or more with clock 'virtual'")


@dataclass(frozen=True)
class RLRecipe:
    """Everything that decides a run."""

    tasks: Tasks
    steps: int
    base: Annotated[Positional[Path | None], arg(metavar="BASE")] = None
    """The policy to start from: a run folder, or a Hugging Face folder with its tokenizer."""
    seed: int = 1
    """Everything random hangs on it."""
    mode: Literal["synchronous", "asynchronous"] = "synchronous"
    """synchronous: one process that samples and trains by turns. asynchronous: rollout workers sample meanwhile."""
    asynchronous: Asynchronous = field(default_factory=Asynchronous)
    sampling: Sampling = field(default_factory=Sampling)
    objective: Objective = field(default_factory=Objective)
    passes: int = 1
    """Optimiser steps on the trajectories of one step; with more than one the objective's clip has something to do."""
    tokens_at_once: int = 8192
    """Of a micro-batch, padding included. Bounds the memory, changes nothing else."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=3e-4, weight_decay=0.0))
    mtp_weight: float = 0.1
    """Of the MTP layer's loss, which learns beside the policy and pulls at nothing else; it drafts for the policy."""
    balance_weight: float = 1e-4
    evaluate_every: int = 20
    """Steps between looks at held-out problems; 0: only at the beginning and the end."""
    evaluation_problems: int = 64
    """Of each family."""
    checkpoint_every: int = 20
    keep: int = 2
    """Checkpoints; 0: all."""
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        for key in ("steps", "passes", "tokens_at_once", "evaluation_problems", "checkpoint_every"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for key in ("evaluate_every", "keep", "mtp_weight", "balance_weight"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")

    def as_training(self, model: GLMConfig) -> Recipe:
        """As `minglm.train.learner.Learner` reads it."""
        training = Training(
            sequence_length=model.max_position_embeddings,
            sequences_per_step=1,
            sequences_per_micro_batch=1,
            steps=self.steps,
            mtp_weight=self.mtp_weight,
            balance_weight=self.balance_weight,
            router_bias_rate=0.0,  # the bias stays as the base has it: sampler and trainer would route apart while it moves
        )
        return Recipe(
            model, training, seed=self.seed, optimizer=self.optimizer, samples=Samples(prompts=()), hardware=self.hardware
        )


def load_rl_recipe(name_or_path: str | Path) -> RLRecipe:
    """Read a recipe: a TOML file, or the name of one in `configs/rl/`. A base in the file starts from the file's folder.

    Raises `ConfigError`, naming file and key, for whatever does not fit.
    """
    path = find_config("rl", name_or_path)
    recipe = build(RLRecipe, read_toml_mapping(path), where=str(path))
    return dataclasses.replace(recipe, base=recipe.base and path.parent / recipe.base)


def resolve_base(recipe: RLRecipe) -> RLRecipe:
    """With an absolute path. Raises `ConfigError` where there is none."""
    if recipe.base is None:
        raise ConfigError("base: missing; wanted the run folder or the folder of the policy to start from")
    return dataclasses.replace(recipe, base=recipe.base.resolve())


def save_rl_recipe(recipe: RLRecipe, path: Path) -> None:
    save_recipe(recipe, path, "rl --recipe")
