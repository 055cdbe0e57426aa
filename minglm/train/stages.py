"""The stages of a training run: what each one trains on, and from which step to which (report, sections 2.2 and 2.3).

A recipe lists `Stage`s, which say only what differs; `plan` works out all the rest, so that the trainer looks up what holds
at a step and knows nothing else about stages. A recipe without stages is one stage.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from minglm.config import ConfigError
from minglm.train.schedule import learning_rate_factor, micro_batches_at

if TYPE_CHECKING:
    from minglm.train.recipe import Recipe, Schedule

WHOLE = "training"  # the name of the only stage of a recipe without stages


@dataclass(frozen=True)
class Stage:
    """One stage. What it leaves out is as in the tables training and model."""

    name: str
    tokens: int
    """To train on, as a whole number of steps; times training.scale."""
    mixture: Mapping[str, float] = field(default_factory=dict)
    """Domain of the data -> its share of the tokens, as weights of any sum. None: all that there is, as it comes."""
    packing: Literal["truncate", "best_fit"] = "truncate"
    """truncate: documents end to end, cut anywhere (GLM-4.5's pre-training); best_fit: whole ones (mid-training)."""
    sequence_length: int | None = None
    sequences_per_step: int | None = None
    """Left out: as many as keep the tokens of a step."""
    sequences_per_micro_batch: int | None = None
    """Left out: as many as keep the tokens of a micro-batch, 1 at least."""
    rope_theta: float | None = None
    """RoPE's base. GLM-4.5 raises it from 1e4 to 1e6 where sequences first grow."""
    mtp_weight: float | None = None
    balance_weight: float | None = None
    router_bias_rate: float | None = None

    def __post_init__(self) -> None:
        require(bool(self.name) and self.name == self.name.strip(), "name", self.name, "a name")
        for key in ("tokens", "sequence_length", "sequences_per_step", "sequences_per_micro_batch", "rope_theta"):
            value = getattr(self, key)
            require(value is None or value > 0, key, value, "above 0")
        for key in ("mtp_weight", "balance_weight", "router_bias_rate"):
            value = getattr(self, key)
            require(value is None or value >= 0, key, value, "0 or more")
        for domain, weight in self.mixture.items():
            require(weight >= 0, f"mixture.{domain}", weight, "0 or more")
        require(not self.mixture or sum(self.mixture.values()) > 0, "mixture", dict(self.mixture), "a weight above 0")
        whole = self.mixture or self.packing == "truncate"
        require(bool(whole), "mixture", {}, "the weights of some domains: packing 'best_fit' packs each domain by itself")


@dataclass(frozen=True)
class PlannedStage:
    """A stage with everything decided. Steps count from 1 over the whole run; `last_step` belongs to the stage."""

    name: str
    number: int  # from 0
    first_step: int
    last_step: int
    mixture: Mapping[str, float]  # domains of weight 0 left out
    packing: str
    sequence_length: int
    sequences_per_step: int
    sequences_per_micro_batch: int
    rope_theta: float
    mtp_weight: float
    balance_weight: float
    router_bias_rate: float

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step + 1

    @property
    def border(self) -> int:
        """The step after which the stage begins."""
        return self.first_step - 1


@dataclass(frozen=True)
class Plan:
    """The stages in order, and the spans of the schedules, in steps of the whole run."""

    stages: tuple[PlannedStage, ...]
    warmup_steps: int  # of the learning rate
    decay_steps: int
    batch_warmup_steps: int
    first_sequences_per_step: int  # the batch at step 1, where it is warmed up
    schedule: "Schedule"

    @property
    def steps(self) -> int:
        return self.stages[-1].last_step

    def at(self, step: int) -> PlannedStage:
        """The stage that `step`, from 1 on, belongs to."""
        return next(stage for stage in self.stages if step <= stage.last_step)

    def is_border(self, step: int) -> bool:
        """Whether a stage ends with this step."""
        return step >= 1 and self.at(step).last_step == step

    def learning_rate_factor(self, step: int) -> float:
        """The part of the peak rate that `step` uses."""
        kind, final = self.schedule.kind, self.schedule.final_fraction
        return learning_rate_factor(step, self.steps, kind, self.warmup_steps, self.decay_steps, final)

    def micro_batches(self, step: int, ranks: int = 1) -> int:
        """Of each rank at `step`."""
        stage = self.at(step)
        at_once = stage.sequences_per_micro_batch * ranks
        full, first = stage.sequences_per_step // at_once, self.first_sequences_per_step // at_once
        return micro_batches_at(step, full, first, self.batch_warmup_steps)

    def named(self, name: str) -> PlannedStage:
        """Raises `ConfigError` that lists the stages there are."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"stage {name!r}: wanted one of {', '.join(stage.name for stage in self.stages)}")


def plan(recipe: "Recipe") -> Plan:
    """Work out all that the recipe leaves open. Raises `ConfigError`, naming key and fix, for what contradicts itself."""
    training, schedule = recipe.training, recipe.schedule

    def scaled(steps: int) -> int:
        return round(steps * training.scale)

    batch_warmup = scaled(training.batch_warmup_steps)
    if recipe.stages:
        require(not training.steps, "training.steps", training.steps, "none beside stages, which say their tokens (see scale)")
        names = [stage.name for stage in recipe.stages]
        require(len(set(names)) == len(names), "stages", names, "a name of its own for each stage")
    else:
        require(training.steps > 0, "training.steps", training.steps, "1 or more, or stages with their tokens")
    stages: list[PlannedStage] = []
    first_sequences = 0
    for number, stage in enumerate(recipe.stages or [_whole()]):
        where = f"stages.{stage.name}." if recipe.stages else "training."
        settings = _settings(recipe, stage, where)
        if number == 0 and batch_warmup:
            first_sequences = _first_sequences(recipe, settings, where)
        first = stages[-1].last_step + 1 if stages else 1
        if recipe.stages:
            missing = batch_warmup * (settings["sequences_per_step"] - first_sequences) / 2 if number == 0 else 0
            steps = _steps(recipe, stage, settings, missing)
        else:
            steps = max(1, scaled(training.steps))
        domains = {domain: weight for domain, weight in stage.mixture.items() if weight}
        stages.append(PlannedStage(stage.name, number, first, first + steps - 1, domains, stage.packing, **settings))
    found = Plan(
        tuple(stages), scaled(schedule.warmup_steps), scaled(schedule.decay_steps), batch_warmup, first_sequences, schedule
    )
    require(
        found.warmup_steps + found.decay_steps <= found.steps,
        "schedule.warmup_steps",
        schedule.warmup_steps,
        f"with decay_steps = {schedule.decay_steps} at most training.steps = {round(found.steps / training.scale)}",
    )
    if recipe.stages and batch_warmup > stages[0].steps:
        raise ConfigError(
            f"training.batch_warmup_steps = {training.batch_warmup_steps}: wanted at most the "
            f"{stages[0].steps / training.scale:.0f} steps of the first stage"
        )
    return found


def _whole() -> Stage:
    return Stage(WHOLE, tokens=1)  # its steps are the recipe's


def _settings(recipe: "Recipe", stage: Stage, where: str) -> dict:
    training = recipe.training
    longest = recipe.model.max_position_embeddings

    def own(key: str, otherwise):
        value = getattr(stage, key)
        return otherwise if value is None else value

    length = own("sequence_length", training.sequence_length)
    require(
        length <= longest,
        f"{where}sequence_length",
        length,
        f"at most model.max_position_embeddings = {longest} (--model.max-position-embeddings {length} makes room)",
    )
    tokens_per_step = training.sequences_per_step * training.sequence_length
    sequences = own("sequences_per_step", max(1, tokens_per_step // length))
    at_once = max(1, training.sequences_per_micro_batch * training.sequence_length // length)
    micro = own("sequences_per_micro_batch", math.gcd(sequences, at_once))
    require(
        sequences % micro == 0, f"{where}sequences_per_step", sequences, f"a multiple of sequences_per_micro_batch = {micro}"
    )
    return {
        "sequence_length": length,
        "sequences_per_step": sequences,
        "sequences_per_micro_batch": micro,
        "rope_theta": own("rope_theta", recipe.model.rope_theta),
        **{key: own(key, getattr(training, key)) for key in ("mtp_weight", "balance_weight", "router_bias_rate")},
    }


def _first_sequences(recipe: "Recipe", settings: dict, where: str) -> int:
    """As many as keep the tokens of the first step, where the first stage has another sequence length than [training]."""
    training, micro = recipe.training, settings["sequences_per_micro_batch"]
    first = training.first_sequences_per_step * training.sequence_length // settings["sequence_length"]
    fits = first % micro == 0 and 0 < first <= settings["sequences_per_step"]
    wanted = f"a multiple of sequences_per_micro_batch = {micro}, up to sequences_per_step = {settings['sequences_per_step']}"
    require(fits, f"{where}first_sequences_per_step", first, wanted)
    return first


def _steps(recipe: "Recipe", stage: Stage, settings: dict, missing: float) -> int:
    """Of a stage, from its tokens; `missing`: sequences that its steps lack while the batch warms up."""
    training = recipe.training
    full = settings["sequences_per_step"] * settings["sequence_length"]
    tokens = stage.tokens * training.scale
    steps = round(tokens / full + missing / settings["sequences_per_step"])
    if steps < 1:
        least = math.ceil(full / 2 / training.scale)
        raise ConfigError(
            f"stages.{stage.name}.tokens = {stage.tokens}: the stage would see no data: times training.scale = "
            f"{training.scale:g} it is no step of {full:,} tokens; wanted at least {least:,}, or a larger training.scale"
        )
    return steps


def require(holds: bool, key: str, found: object, wanted: str) -> None:
    """Raises `ConfigError` unless it holds."""
    if not holds:
        raise ConfigError(f"{key} = {found!r}: wanted {wanted}")
