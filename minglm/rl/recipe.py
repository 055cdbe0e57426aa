"""A recipe of reinforcement learning, in one TOML file (examples in `configs/rl/`). Nothing here needs torch."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from minglm.config import ConfigError, GLMConfig, build, read_toml_mapping
from minglm.rl.objective import Objective
from minglm.train.recipe import Hardware, Optimizer, Recipe, Samples, Training, find_config, save_recipe
from minglm.train.stages import require

Mode = Literal["thinking", "non-thinking", "automatic"]


@dataclass(frozen=True)
class Tasks:
    """What to practise on: problems of the training split; held-out ones judge."""

    levels: Mapping[str, tuple[int, ...]]
    """Family (minglm.tasks) -> its difficulties."""
    curriculum: Literal["none", "pass_rate", "pathology"] = "pass_rate"
    """none: all difficulties equally often. pass_rate: moderate ones first, those the policy solves now and then; when the
    reward has levelled off, hard ones, too, of which it has solved one at least (report, section 3.2). pathology: problems that
    attempts were pathological at come again, by how often they were (report, section 3.4)."""
    family_weights: Mapping[str, int] = field(default_factory=dict)
    """So many times as often as those of other families a family's difficulties come, each of them; 1 where none is named."""

    def __post_init__(self) -> None:
        require(bool(self.levels), "levels", self.levels, "a family, and its difficulties")
        for family, levels in self.levels.items():
            require(bool(levels), f"levels.{family}", levels, "one difficulty at least")
        for family, weight in self.family_weights.items():
            require(family in self.levels, "family_weights", family, f"families of levels: {', '.join(self.levels)}")
            require(weight >= 1, f"family_weights.{family}", weight, "1 or more")


@dataclass(frozen=True)
class Sampling:
    """How the policy attempts problems."""

    group_size: int = 8
    """Attempts at one problem."""
    groups: int = 16
    """Problems of a step."""
    tokens: int | tuple[int, ...] = 128
    """Of one turn, at most. The same from the first step to the last: growing it made models unlearn long outputs (report,
    section 3.2). Several, such as [32, 64, 128]: stages, each for an equal share of the steps."""
    turns: int = 8
    """Of one attempt, at most."""
    temperature: float = 1.0
    """Of attempts, in training from the first step on, and at held-out problems always."""
    temperatures: tuple[float, ...] = ()
    """Dynamic temperature, such as [1.0, 1.1, 1.2, 1.3]: when the reward has levelled off, the highest of these whose reward
    on problems set aside is within 1% of the best one's (report, section 3.2). None: the temperature never changes."""
    thinking: Mode | tuple[Mode, ...] = "thinking"
    """Several, such as ["thinking", "automatic"]: dealt out to the problems in turn. A hybrid model that practises one mode
    alone gets worse in the others."""
    opens_thinking: bool = False
    """In the mode "thinking" every turn begins within a thinking that the prompt has opened, as the server does where thinking
    is asked for, and does not end at once: its first token is not learnt. Else the policy may choose not to think."""
    learns_to_decide: bool = True
    """Whether to think is learnt, too. Otherwise the token after `<think>`, which decides it, is left out: where thinking and
    answering at once are right equally often, it would drift to either."""
    format_penalty: bool = True
    """A call that cannot be read ends the episode at once, with reward 0 (report, section 3.2.4)."""
    context: int | None = None
    """Tokens of one attempt that the model reads, at most: prompt, turns, results of tools. By default the model's positions.
    The longest sample, and with it the memory that training needs, hangs on it."""
    environment_seconds: float = 300.0
    """For the environment to answer a turn, verdict included. Later, the attempt has failed: it has no reward, not even 0."""
    precision: Literal["same", "fp8"] = "same"
    """fp8: the sampler has a copy of the policy whose linear layers have gone through FP8 in blocks of 128 x 128, emulated
    (report, section 3.5), which is what held-out problems judge, too. The gap that this makes is recorded;
    objective.importance and routing_replay are what helps."""
    rounds: int = 3
    """Dynamic sampling: problems whose attempts all have one reward are replaced by others, so many times at most; 1: never."""

    def __post_init__(self) -> None:
        require(self.group_size >= 2, "group_size", self.group_size, "2 or more: one attempt has nothing to be judged against")
        require(bool(self.stages) and min(self.stages) >= 1, "tokens", self.tokens, "1 or more")
        require(all(value > 0 for value in self.temperatures), "temperatures", self.temperatures, "each above 0")
        require(bool(self.modes), "thinking", self.thinking, "a mode at least")
        opens = self.opens_thinking and "thinking" not in self.modes
        require(not opens, "opens_thinking", self.opens_thinking, "false without the mode 'thinking'")
        for key in ("groups", "turns", "rounds", "context"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "1 or more")
        for key in ("temperature", "environment_seconds"):
            require(getattr(self, key) > 0, key, getattr(self, key), "above 0")

    @property
    def modes(self) -> tuple[Mode, ...]:
        """`thinking`, one after the other."""
        return (self.thinking,) if isinstance(self.thinking, str) else self.thinking

    @property
    def stages(self) -> tuple[int, ...]:
        """`tokens`, one after the other."""
        return (self.tokens,) if isinstance(self.tokens, int) else self.tokens

    def tokens_at(self, step: int, steps: int) -> int:
        """Of one turn, in a step (1 to `steps`)."""
        return self.stages[(step - 1) * len(self.stages) // steps]


@dataclass(frozen=True)
class Rewards:
    """Who says how good an attempt is (minglm.rl.rewards): the weighed mean of up to four sources."""

    verifier: float = 1.0
    """Weight of the problem's own rules."""
    model: float = 0.0
    """Weight of a reward model, as the `reward` command trains them."""
    model_folder: Path | None = None
    """Its run folder or checkpoint. In a recipe file the path starts from that file's folder."""
    rubric: float = 0.0
    """Weight of a model that grades by a rubric, behind an OpenAI-compatible endpoint; `serve` is one."""
    rubric_text: str = ""
    """What is good and what is not."""
    grader_url: str = "http://127.0.0.1:8000/v1"
    """Where the endpoint is; its API key is in the environment variable MINGLM_GRADER_KEY."""
    grader_name: str = ""
    """What the endpoint calls the model that grades."""
    grader_call: bool = False
    """The grade is the argument of a call that the endpoint forces (tool_choice), as ours does by a grammar: well formed, and
    without reasons before it, unless the model thinks. False: a line after the reasons, which may be missing."""
    pathology: float = 0.0
    """Weight of rules against loops, marks out of place, mixed scripts and empty turns (minglm.rl.pathology): 1 without any."""
    vetoes: tuple[Literal["verifier", "pathology", "model", "rubric"], ...] = ()
    """Sources that can veto: an attempt to which one gives less than `veto_below` has reward 0."""
    veto_below: float = 0.5

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("verifier", "pathology", "model", "rubric")}
        for key, weight in weights.items():
            require(weight >= 0, key, weight, "0 or more")
        require(any(weights.values()), "verifier", self.verifier, "a source with a weight above 0")
        require(0 < self.veto_below <= 1, "veto_below", self.veto_below, "above 0, up to 1")

    def uses(self, source: str) -> bool:
        return getattr(self, source) > 0 or source in self.vetoes


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
        wildcard = self.host in ("", "0.0.0.0", "::")
        require(not wildcard, "host", self.host, "an address by which workers reach the trainer, not all addresses")
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
    rewards: Rewards = field(default_factory=Rewards)
    objective: Objective = field(default_factory=Objective)
    teachers: Mapping[str, Path] = field(default_factory=dict)
    """On-policy distillation instead of the objective: family -> the run folder of the model that its problems are learnt from
    (minglm.rl.distillation). Rewards are recorded only. In a recipe file paths start from that file's folder."""
    compute_budget: int = 0
    """The run ends with the step that reaches it, before `steps`: tokens generated, and three times those trained on, and those
    that teachers have read; 0: only `steps` ends it."""
    passes: int = 1
    """Optimiser steps on the trajectories of one step; with more than one the objective's clip has something to do."""
    routing_replay: Literal["none", "R2", "R3"] = "none"
    """Tokens go in training to the experts that were chosen for them before: R2, by the trainer's pass before the first update
    of a step; R3, by the sampler."""
    tokens_at_once: int = 8192
    """Of a micro-batch, padding included. Bounds the memory, changes nothing else."""
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=3e-4, weight_decay=0.0))
    mtp_weight: float = 0.1
    """Of the MTP layer's loss, which learns beside the policy and pulls at nothing else; it drafts for the policy. 0: it stays
    as it is, and costs nothing."""
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
        for key in ("evaluate_every", "keep", "mtp_weight", "balance_weight", "compute_budget"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        unmeasured = self.tasks.curriculum == "pathology" and not self.rewards.uses("pathology")
        wanted = "rewards.pathology above 0, or 'pathology' among rewards.vetoes, which is what measures it"
        require(not unmeasured, "tasks.curriculum", self.tasks.curriculum, wanted)
        if self.teachers:
            families, taught = sorted(self.tasks.levels), sorted(self.teachers)
            require(taught == families, "teachers", taught, f"one for each family of tasks.levels: {', '.join(families)}")
            wanted = "1 with teachers: they teach by every attempt, with a spread of rewards or without"
            require(self.sampling.rounds == 1, "sampling.rounds", self.sampling.rounds, wanted)

    @property
    def records_experts(self) -> bool:
        """Whether rollouts keep the experts that each token went to: R3 replays them, and FP8 may choose others."""
        return self.routing_replay == "R3" or self.sampling.precision == "fp8"

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
    """Read a recipe: a TOML file, or the name of one in `configs/rl/`. Paths in the file start from the file's folder.

    Raises `ConfigError`, naming file and key, for whatever does not fit.
    """
    path = find_config("rl", name_or_path)
    recipe = build(RLRecipe, read_toml_mapping(path), where=str(path))
    return with_paths(recipe, lambda found: path.parent / found)


def resolve_base(recipe: RLRecipe) -> RLRecipe:
    """With absolute paths. Raises `ConfigError` where there is no base."""
    if recipe.base is None:
        raise ConfigError("base: missing; wanted the run folder or the folder of the policy to start from")
    return with_paths(recipe, Path.resolve)


def with_paths(recipe: RLRecipe, change: Callable[[Path], Path]) -> RLRecipe:
    """With every path as `change` makes it."""
    rewards = dataclasses.replace(
        recipe.rewards, model_folder=recipe.rewards.model_folder and change(recipe.rewards.model_folder)
    )
    teachers = {family: change(folder) for family, folder in recipe.teachers.items()}
    return dataclasses.replace(recipe, base=recipe.base and change(recipe.base), rewards=rewards, teachers=teachers)


def save_rl_recipe(recipe: RLRecipe, path: Path) -> None:
    save_recipe(recipe, path, "rl --recipe")
