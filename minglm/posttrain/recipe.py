"""Recipes of fine-tuning and of learning from preferences, each in one TOML file (examples in `configs/sft/` and
`configs/reward/`). Nothing here needs torch."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from tyro.conf import Positional, arg

from minglm.config import ConfigError, GLMConfig, build, read_toml_mapping
from minglm.train.recipe import (
    Checkpoints,
    Evaluation,
    Hardware,
    Optimizer,
    Recipe,
    Samples,
    Schedule,
    Training,
    find_config,
    save_recipe,
)
from minglm.train.stages import require


@dataclass(frozen=True)
class Conversations:
    """What to learn from. Each sample is in one of three modes, whose shares are exact (`minglm.data.mixture`)."""

    samples: int
    """Conversations to train on; packed into rows, which repeat when all have been read."""
    thinking: float = 0.5
    """Weight of samples that reason before they answer."""
    non_thinking: float = 0.5
    """Weight of samples whose user says `/nothink`: the empty thinking stands in the prompt and is not learnt."""
    automatic: float = 0.0
    """Weight of samples in which the task decides: families think, easy families answer at once."""
    families: tuple[str, ...] = ()
    """Of problems (minglm.tasks), for all three modes."""
    easy_families: tuple[str, ...] = ()
    """Not worth a thought: for non-thinking and automatic samples only. The prompts of thinking and automatic samples have the
    same text, so a family that is in both lists would ask for two different answers to it."""
    opens_thinking: bool = False
    """The `<think>` of the families' thinking samples stands in their prompts and is not learnt, as files may say of their own.
    Whether to think is then learnt from automatic samples alone; else from thinking ones, too, whose prompts are the same."""
    family_weights: Mapping[str, float] = field(default_factory=dict)
    """How often a family's turn comes among the others of a mode; 1 for those that are not named."""
    levels: int = 2
    """Difficulties of each family, from the easiest on; 0: all."""
    family_levels: Mapping[str, int] = field(default_factory=dict)
    """Of a family, where they are to be others."""
    files: tuple[Path, ...] = ()
    """Own conversations, JSONL: {"messages": [...], "tools": [...], "thinking": true, false or null (automatic)} a line; with
    "opens_thinking": true the `<think>` of a thinking sample stands in its prompt and is not learnt. In a recipe file paths
    start from that file's folder."""
    file_share: float = 0.5
    """The part of each mode's samples that comes from files, where the mode has any there beside families."""
    held_out_files: tuple[Path, ...] = ()
    """As files, for the held-out loss; problems of families have a held-out split of their own."""
    mode_prompts: int = 64
    """Held-out problems that the finished model is asked in each mode, to see that it keeps to the mode; 0: none."""

    def __post_init__(self) -> None:
        require(self.samples > 0, "samples", self.samples, "1 or more")
        for key in ("thinking", "non_thinking", "automatic", "levels", "mode_prompts"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        require(any(self.weights.values()), "thinking", self.thinking, "a mode with a weight above 0")
        require(0 <= self.file_share <= 1, "file_share", self.file_share, "0 to 1")
        require(bool(self.families or self.easy_families or self.files), "families", (), "some families or files")
        both = set(self.families) & set(self.easy_families)
        require(not both, "easy_families", tuple(sorted(both)), "families that are not among families, too")
        for key in ("family_weights", "family_levels"):
            unknown = sorted(set(getattr(self, key)) - {*self.families, *self.easy_families})
            require(not unknown, key, tuple(unknown), "names that are in families or easy_families")
        for name, weight in self.family_weights.items():
            require(weight > 0, f"family_weights.{name}", weight, "above 0")
        for name, levels in self.family_levels.items():
            require(levels >= 0, f"family_levels.{name}", levels, "0 or more")
        held_out = self.families or self.easy_families or self.held_out_files
        require(bool(held_out), "held_out_files", (), "some, as there are no families to hold problems out from")

    def levels_of(self, family: str) -> int:
        return self.family_levels.get(family, self.levels)

    @property
    def weights(self) -> dict[str, float]:
        """By the names of `minglm.chat.MODES`."""
        return {"thinking": self.thinking, "non-thinking": self.non_thinking, "automatic": self.automatic}


Router = Literal["update", "sequence_loss_only", "freeze"]
"""Balance of the experts. update: loss-free balancing goes on, and the sequence-level loss with it; sequence_loss_only: the
selection bias stays as it is; freeze: neither."""


@dataclass(frozen=True)
class LoRA:
    """Learn thin matrices beside frozen weights instead of the weights (minglm.posttrain.lora). Checkpoints are merged."""

    rank: int = 0
    """0: learn all weights."""
    alpha: float = 16.0
    """The adapters' products count alpha / rank times."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "rank", self.rank, "0 or more")
        require(self.alpha > 0, "alpha", self.alpha, "above 0")


@dataclass(frozen=True, kw_only=True)
class PostTraining:
    """What recipes of fine-tuning and of learning from preferences have in common."""

    base: Annotated[Positional[Path | None], arg(metavar="BASE")] = None
    """The model to start from: a run folder, or a Hugging Face folder with its tokenizer."""
    seed: int = 1
    """Everything random hangs on it."""
    router: Router = "sequence_loss_only"
    training: Training
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    hardware: Hardware = field(default_factory=Hardware)

    def as_training(self, model: GLMConfig) -> Recipe:
        """As the trainer reads it, for a base of this architecture. Raises `ConfigError` for what does not fit together."""
        training = dataclasses.replace(
            self.training,
            router_bias_rate=self.training.router_bias_rate if self.router == "update" else 0.0,
            balance_weight=0.0 if self.router == "freeze" else self.training.balance_weight,
        )
        kept = {key: getattr(self, key) for key in ("seed", "optimizer", "schedule", "evaluation", "checkpoints", "hardware")}
        return Recipe(model, training, samples=Samples(prompts=()), **kept)


@dataclass(frozen=True, kw_only=True)
class SFTRecipe(PostTraining):
    """Everything that decides a fine-tuning."""

    conversations: Conversations
    lora: LoRA = field(default_factory=LoRA)

    def __post_init__(self) -> None:
        if self.lora.rank:
            wanted = f"'adamw' with lora.rank = {self.lora.rank}: Muon would make thin factors orthogonal, not their product"
            require(self.optimizer.kind == "adamw", "optimizer.kind", self.optimizer.kind, wanted)
            require(
                self.router != "update", "router", self.router, "another one with LoRA, which leaves the routers as they are"
            )


@dataclass(frozen=True)
class Preferences:
    """What to learn from: pairs of answers to one conversation, of which one is preferred."""

    pairs: int
    """To train on; they are packed into rows, which repeat when all have been read."""
    levels: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Difficulties of the style family's pairs (minglm.tasks.general.style), all equally often; none: only files."""
    files: tuple[Path, ...] = ()
    """Own pairs, JSONL: {"messages": [...], "chosen": [...], "rejected": [...]} a line, each a list of messages, perhaps with
    "tools" and "thinking". In a recipe file paths start from that file's folder."""
    file_share: float = 0.5
    """The part of the pairs that comes from files, where there are both."""
    held_out_files: tuple[Path, ...] = ()
    """As files, for the held-out pairs; those of the style family have a held-out split of their own."""

    def __post_init__(self) -> None:
        require(self.pairs > 0, "pairs", self.pairs, "1 or more")
        require(0 <= self.file_share <= 1, "file_share", self.file_share, "0 to 1")
        require(bool(self.levels or self.files), "levels", self.levels, "some, or files")
        held_out = self.levels or self.held_out_files
        require(bool(held_out), "held_out_files", (), "some, as there are no levels to hold pairs out from")


@dataclass(frozen=True, kw_only=True)
class RewardRecipe(PostTraining):
    """Everything that decides a training on preferences."""

    preferences: Preferences
    objective: Literal["bradley_terry", "dpo"] = "bradley_terry"
    """bradley_terry: a reward model, the base with one number in place of its head. dpo: the base itself, which stays a policy
    and is held to where it started; its answers are learnt with their reasoning, which a reward model never sees."""
    center_weight: float = 0.01
    """bradley_terry: of the penalty that keeps the scores around 0, so that their logistic function is a reward."""
    beta: float = 0.1
    """dpo: how much the distance from the base costs."""

    def __post_init__(self) -> None:
        require(self.center_weight >= 0, "center_weight", self.center_weight, "0 or more")
        require(self.beta > 0, "beta", self.beta, "above 0")


# ---------------------------------------------------------------------------------------------------- reading, writing


def load_sft_recipe(name_or_path: str | Path) -> SFTRecipe:
    """Read a recipe: a TOML file, or the name of one in `configs/sft/`. Paths in the file start from its folder.

    Raises `ConfigError`, naming file and key, for whatever does not fit.
    """
    return _load(SFTRecipe, "sft", name_or_path)


def load_reward_recipe(name_or_path: str | Path) -> RewardRecipe:
    """The same for learning from preferences and `configs/reward/`."""
    return _load(RewardRecipe, "reward", name_or_path)


def save_sft_recipe(recipe: SFTRecipe, path: Path) -> None:
    save_recipe(recipe, path, "sft --recipe")


def save_reward_recipe(recipe: RewardRecipe, path: Path) -> None:
    save_recipe(recipe, path, "reward --recipe")


Either = TypeVar("Either", SFTRecipe, RewardRecipe)


def resolve_paths(recipe: Either) -> Either:
    """With absolute paths: a run can then be resumed from another working directory."""
    if recipe.base is None:
        raise ConfigError("base: missing; wanted the run folder or the folder of the model to start from")
    return with_paths(recipe, Path.resolve)


def _load(cls: type[Either], kind: Literal["sft", "reward"], name_or_path: str | Path) -> Either:
    path = find_config(kind, name_or_path)
    recipe = build(cls, read_toml_mapping(path), where=str(path))
    return with_paths(recipe, lambda found: path.parent / found)


def with_paths(recipe: Either, change: Callable[[Path], Path]) -> Either:
    """With every path as `change` makes it."""
    table = "conversations" if isinstance(recipe, SFTRecipe) else "preferences"
    data = getattr(recipe, table)
    files = {key: tuple(map(change, getattr(data, key))) for key in ("files", "held_out_files")}
    data = dataclasses.replace(data, **files)
    return dataclasses.replace(recipe, base=recipe.base and change(recipe.base), **{table: data})
