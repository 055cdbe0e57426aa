"""A recipe: everything that decides a training run, in one TOML file (examples in `configs/recipe/`).

    recipe = load_recipe("nano")                 # configs/recipe/nano.toml, or the path of any recipe
    save_recipe(recipe, "runs/nano/config.toml")  # as resolved, with every default: itself a recipe

Nothing here needs torch.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from minglm.config import ConfigError, GLMConfig, build, read_toml_mapping
from minglm.files import write_text_atomically
from minglm.train.stages import Plan, Stage, plan
from minglm.train.stages import require as _require

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Data:
    """What to read."""

    sources: tuple[str, ...] = ()
    """Embedded sources by name (minglm.data.sources.SOURCES); none means the default ones."""
    path: Path | None = None
    """Own text instead of the sources: a file, a folder or JSONL. In a recipe file it starts from that file's folder."""
    folder: Path | None = None
    """Where the tokenizer and the tokens are kept, for several runs to share; by default in the run folder."""
    ingredients: tuple[str, ...] = ()
    """What fills the domains that stages mix, beside sources or path, where they are named; see minglm.train.ingredients."""
    datasets: Mapping[str, str] = field(default_factory=dict)
    """Domain -> a dataset of the Hugging Face Hub that fills it, streamed: "owner/name:configuration@revision#column", of
    which only the name must be given (column: text); needs the package datasets."""
    characters: int = 4_000_000
    """Of text that each ingredient takes from the embedded sources at most; 0: all."""
    fim_rate: float = 0.5
    """The share of source files that are cut into pieces with a middle to fill in."""
    fim_characters: int = 600
    """Of the longest of these pieces: about 2.5 times the tokens of a sequence."""
    repository_characters: int = 3000
    """Of the longest document of a repository, about."""
    families: tuple[str, ...] = ()
    """Of problems that such ingredients are made of; none: all of theirs. A model learns few families sooner than many."""
    documents: int = 1000
    """Of each ingredient that is made of problems."""
    thinking_share: float = 0.5
    """The share of them with worked solutions."""
    levels: int = 4
    """Difficulties of each family of problems, from the easiest on; 0: all."""
    long_levels: tuple[int, ...] = (3, 4, 5, 6)
    """Difficulties of long documents, all equally likely: 3 is 600 characters, each next one twice as many."""

    def __post_init__(self) -> None:
        for key, most in (("fim_rate", 1), ("thinking_share", 1), ("levels", math.inf), ("characters", math.inf)):
            _require(0 <= getattr(self, key) <= most, key, getattr(self, key), "0 to 1" if most == 1 else "0 or more")
        for key in ("fim_characters", "repository_characters", "documents"):
            _require(getattr(self, key) > 0, key, getattr(self, key), "above 0")


@dataclass(frozen=True)
class Training:
    """How much of it, in which portions, and the weights of the losses."""

    sequence_length: int
    """Tokens in a sequence."""
    sequences_per_step: int
    """The batch, once it is warmed up."""
    sequences_per_micro_batch: int
    """So many go through the model at once; gradients add up over a step. Bounds the memory, changes nothing else."""
    steps: int = 0
    """Optimiser steps; none where there are stages, which say their tokens."""
    scale: float = 1.0
    """A longer or shorter run: times the steps, or the tokens of every stage, and with them the warm-ups."""
    first_sequences_per_step: int = 0
    """The batch at step 1, where it is warmed up."""
    batch_warmup_steps: int = 0
    """The batch grows linearly up to this step; 0 means not at all."""
    mtp_weight: float = 0.3
    """Weight of the multi-token-prediction loss; GLM-4.5: 0.3, later 0.1."""
    balance_weight: float = 1e-4
    """Weight of the sequence-level balance loss."""
    router_bias_rate: float = 1e-3
    """Step of loss-free balancing; 0 freezes the bias."""

    def __post_init__(self) -> None:
        for key in ("sequence_length", "sequences_per_step", "sequences_per_micro_batch"):
            _require(getattr(self, key) > 0, key, getattr(self, key), "1 or more")
        _require(self.scale > 0, "scale", self.scale, "above 0")
        for key in ("steps", "batch_warmup_steps", "mtp_weight", "balance_weight", "router_bias_rate"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        micro = self.sequences_per_micro_batch
        multiple = f"a multiple of sequences_per_micro_batch = {micro}"
        _require(self.sequences_per_step % micro == 0, "sequences_per_step", self.sequences_per_step, multiple)
        if not self.batch_warmup_steps:
            _require(not self.first_sequences_per_step, "batch_warmup_steps", 0, "how long first_sequences_per_step grows")


@dataclass(frozen=True)
class Optimizer:
    """See minglm.optim. Thanks to RMS matching, Muon and AdamW share learning rate and weight decay."""

    kind: Literal["muon", "adamw"] = "muon"
    """Muon for matrices (AdamW for embedding, head, norms and biases), or AdamW for all."""
    learning_rate: float = 2.5e-4
    """The peak."""
    weight_decay: float = 0.1
    momentum: float = 0.95
    """Muon's."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    clip_norm: float = 1.0
    """The gradient of all parameters together is scaled down to this norm; 0 means never."""

    def __post_init__(self) -> None:
        for key in ("learning_rate", "weight_decay", "clip_norm"):
            _require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        _require(0 <= self.momentum < 1, "momentum", self.momentum, "0 to 1, 1 not included")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "betas",
            self.betas,
            "two numbers from 0 to 1, 1 not included",
        )


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the steps; see minglm.train.schedule."""

    kind: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    """wsd: so many last steps go down."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a part of the peak."""

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        fits = self.decay_steps > 0 if self.kind == "wsd" else self.decay_steps == 0
        _require(fits, "decay_steps", self.decay_steps, "1 or more with kind 'wsd', 0 with 'cosine'")
        _require(0 <= self.final_fraction <= 1, "final_fraction", self.final_fraction, "0 to 1")


@dataclass(frozen=True)
class Evaluation:
    """Loss and bits per byte on held-out documents: before the first step, on the way, and after the last."""

    every: int = 100
    """Steps from one to the next; 0: at the ends of stages alone."""
    tokens: int = 100_000
    """How many held-out tokens; always the same ones."""

    def __post_init__(self) -> None:
        _require(self.every >= 0, "every", self.every, "0 or more")
        _require(self.tokens > 0, "tokens", self.tokens, "1 or more")


@dataclass(frozen=True)
class Samples:
    """Text written by the model on the way."""

    every: int = 500
    """Steps from one to the next; 0: at the ends of stages alone."""
    prompts: tuple[str, ...] = ("The ",)
    tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        _require(self.every >= 0, "every", self.every, "0 or more")
        _require(self.tokens > 0, "tokens", self.tokens, "1 or more")
        _require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        _require(all(self.prompts), "prompts", self.prompts, "texts that are not empty")


@dataclass(frozen=True)
class Checkpoints:
    """What a killed run goes on from."""

    every: int = 500
    """Steps from one to the next; the last step and a stopped run's are saved, too."""
    keep: int = 2
    """So many newest ones are kept; 0 means all."""

    def __post_init__(self) -> None:
        _require(self.every > 0, "every", self.every, "1 or more")
        _require(self.keep >= 0, "keep", self.keep, "0 or more")


@dataclass(frozen=True)
class Hardware:
    """Where and how it is computed."""

    device: str = "auto"
    """"auto" takes a CUDA GPU, else Apple's, else the CPU; or a name: "cuda", "cuda:1", "mps", "cpu"."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: matrix products under autocast, master weights fp32. "auto" takes it on a CUDA GPU that has it."""
    gear: Literal["naive", "torch", "triton", "exact"] = "torch"
    """Which implementation of the hot operations; see minglm.ops."""
    compile: bool = False
    """torch.compile each decoder layer."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: a third slower, far less memory."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run."""

    model: GLMConfig
    """The architecture. In a file: the name of a size in configs/model, a path from the file's folder, or a table."""
    training: Training
    tokenizer: str = "train"
    """"train": learn as many ids as the model has, from the training documents; "characters": one id for each byte in
    them; else the path of a tokenizer.json or of its folder."""
    seed: int = 1
    """Everything random hangs on it."""
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    evaluation: Evaluation = field(default_factory=Evaluation)
    samples: Samples = field(default_factory=Samples)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    hardware: Hardware = field(default_factory=Hardware)
    stages: tuple[Stage, ...] = ()
    """One after the other, [[stages]] in a file; none: a single one of training.steps steps on all that there is."""

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1")
        self.plan()

    def plan(self) -> Plan:
        """Which stage has which steps, and all that it leaves out."""
        return plan(self)


# ---------------------------------------------------------------------------------------------------- reading, writing


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe: a TOML file, or the name of one in `configs/recipe/`.

    Paths in the file start from its folder. Raises `ConfigError`, naming file and key, for whatever does not fit.
    """
    path = find_config("recipe", name_or_path)
    mapping = read_toml_mapping(path)
    model = mapping.get("model")
    if isinstance(model, str):
        mapping["model"] = GLMConfig.from_toml(find_config("model", model, path.parent))
    elif model is not None:
        mapping["model"] = GLMConfig.from_dict(model, where=f"{path}: model")
    recipe = build(Recipe, mapping, where=str(path))
    data = dataclasses.replace(
        recipe.data,
        path=recipe.data.path and path.parent / recipe.data.path,
        folder=recipe.data.folder and path.parent / recipe.data.folder,
    )
    tokenizer = recipe.tokenizer
    if tokenizer not in ("train", "characters"):
        tokenizer = str(path.parent / tokenizer)
    return dataclasses.replace(recipe, data=data, tokenizer=tokenizer)


def resolve_paths(recipe: Recipe) -> Recipe:
    """With absolute paths: a run can then be resumed from another working directory."""
    data = dataclasses.replace(
        recipe.data,
        path=recipe.data.path and recipe.data.path.resolve(),
        folder=recipe.data.folder and recipe.data.folder.resolve(),
    )
    own = recipe.tokenizer not in ("train", "characters")
    return dataclasses.replace(recipe, data=data, tokenizer=str(Path(recipe.tokenizer).resolve()) if own else recipe.tokenizer)


def find_config(
    kind: Literal["model", "recipe", "sft", "reward", "rl", "experts"], name_or_path: str | Path, folder: Path = Path()
) -> Path:
    """The TOML file of a model size or recipe: a path from `folder`, or the bare name of one in `configs/`.

    Raises `ConfigError` that lists the names there are.
    """
    path = folder / name_or_path
    if path.is_file():
        return path
    shipped = CONFIGS / kind / f"{name_or_path}.toml"
    if len(Path(name_or_path).parts) == 1 and shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in shipped.parent.glob("*.toml")))
    raise ConfigError(f"{path}: no such file, and {kind} {str(name_or_path)!r} is none of {names}")


def save_recipe(recipe: Any, path: str | Path, command: str = "train") -> None:
    """Write a recipe, of training or of another `command`, as TOML with every key; `load_recipe` reads it back equal."""
    values = _to_mapping(recipe)
    stages = values.pop("stages", ())
    lines = [f"# The recipe of this run as resolved. `python -m minglm {command}` takes it, too.", *_table(values)]
    for stage in stages:
        lines += ["", "[[stages]]", *(f"{key} = {_toml(value)}" for key, value in stage.items() if value is not None)]
    write_text_atomically(path, "\n".join(lines) + "\n")


def _table(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The lines of a table, and behind them those of the tables in it, each under its own heading."""
    for key, value in values.items():
        if value is not None and not isinstance(value, Mapping):
            yield f"{key} = {_toml(value)}"
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ("", f"[{path}{key}]", *_table(value, f"{path}{key}."))


def differences(found: Any, wanted: Any) -> Iterator[str]:
    """One line for each key that differs, as `table.key: found ..., wanted ...`."""
    ours, theirs = _flat(_to_mapping(found)), _flat(_to_mapping(wanted))
    for key in ours | theirs:
        if ours.get(key) != theirs.get(key):
            yield f"{key}: found {ours.get(key)!r}, wanted {theirs.get(key)!r}"


def _to_mapping(recipe: Any) -> dict[str, Any]:
    mapping = dataclasses.asdict(recipe, dict_factory=lambda items: {key: _without_paths(value) for key, value in items})
    mapping.get("model", {}).pop("unused", None)
    return mapping


def _without_paths(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_without_paths, value))
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in mapping.items():
        if key == "stages":
            flat["stages"] = [stage["name"] for stage in value]
            value = {stage["name"]: stage for stage in value}
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _toml(value: object) -> str:
    """A value as TOML writes it, which for all that a recipe holds is as JSON or Python does."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # the one character JSON lets through
    return json.dumps(value) if isinstance(value, bool) else repr(value)
