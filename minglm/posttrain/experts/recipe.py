"""A recipe of expert iteration, in one TOML file (examples in `configs/experts/`). Nothing here needs torch.

The tables of a file are recipes of the commands that do the work, so that every key of `sft` and `rl` can stand there. What
all runs of RL share stands once in [rl], and [experts.NAME] and [unified_rl] say where they differ; [unified_sft] says where it
differs from [start].
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minglm.config import ConfigError, build, read_toml_mapping
from minglm.posttrain.recipe import SFTRecipe
from minglm.posttrain.recipe import with_paths as with_sft_paths
from minglm.rl.recipe import RLRecipe
from minglm.rl.recipe import with_paths as with_rl_paths
from minglm.train.ablation import parse_variation
from minglm.train.recipe import Hardware, find_config, save_recipe
from minglm.train.stages import require


@dataclass(frozen=True)
class Harvest:
    """Which answers of the experts the unified model learns (report, section 3.1, rejection sampling)."""

    problems: int
    """Of each difficulty of each family; fewer where a family has no more different ones."""
    problems_of: Mapping[str, int] = field(default_factory=dict)
    """Of a domain's, where they are to be others: more where few answers are right, fewer where most are."""
    responses: int = 4
    """Attempts at each, with thinking and as many without."""
    kept: int = 2
    """Different ones that are kept of each mode, at most."""
    temperature: float = 1.0
    repeats: int = 4
    """Dropped: a response in which some tokens stand so many times in a row."""
    repeated_tokens: int = 16
    """And fill as many tokens, at least: a number may have four zeros."""
    times_median: float = 3.0
    """Dropped: a response longer than so many times the median of what is right in its family, difficulty and mode."""
    score: float = 0.5
    """Dropped: a response to which a reward model, where the expert's rewards have one, gives less."""
    easy_share: float = 0.5
    """The part of the problems, from the one that is solved most often on, that counts as easy."""
    easy_kept: float = 0.5
    """The part of the easy ones that stays, with one response of each mode: the report drops the easier half."""
    balance: float = 3.0
    """Of each domain, one mode has at most so many times the samples of the other one."""
    at_once: float = 0.75
    """The automatic mode answers at once where so many of the answers without thinking are right, or as many as of those with
    it, and else thinks."""

    def __post_init__(self) -> None:
        for key in ("problems", "responses", "kept", "repeated_tokens"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for domain, count in self.problems_of.items():
            require(count >= 1, f"problems_of.{domain}", count, "1 or more")
        require(self.repeats >= 2, "repeats", self.repeats, "2 or more")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        for key in ("times_median", "balance"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for key in ("score", "easy_share", "easy_kept", "at_once"):
            require(0 <= getattr(self, key) <= 1, key, getattr(self, key), "0 to 1")

    def count(self, domain: str) -> int:
        """Problems of each difficulty of each of its families."""
        return self.problems_of.get(domain, self.problems)


@dataclass(frozen=True)
class Exam:
    """How models are compared: one attempt at each held-out problem in each mode."""

    problems: int = 32
    """Of each difficulty of each family, to judge by; as many others decide whether a round is kept."""
    temperature: float = 1.0
    turns: int | None = None
    """Of one attempt, at most; by default as in RL on the unified model, where fewer make sense: to try one call after another
    does not pay then."""

    def __post_init__(self) -> None:
        require(self.problems >= 1, "problems", self.problems, "1 or more")
        require(self.turns is None or self.turns >= 1, "turns", self.turns, "1 or more")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")


@dataclass(frozen=True)
class ExpertsRecipe:
    """Everything that decides an expert iteration."""

    start: SFTRecipe
    """The cold start, from the base."""
    experts: Mapping[str, RLRecipe]
    """Domain -> the RL of its expert, from the cold start, on the domain's families."""
    harvest: Harvest
    unified_sft: SFTRecipe
    """Self-distillation, from the base, on the experts' answers; its weights of modes hold, and `file_share` says how much of
    it is their answers, the rest being demonstrations."""
    unified_rl: RLRecipe
    """RL on the unified model, on the families of all domains."""
    base: Path | None = None
    """The mid-trained model: a run folder, or a Hugging Face folder with its tokenizer."""
    seed: int = 1
    """Everything random hangs on it: it is put into all recipes."""
    experts_at_once: int = 1
    """So many of their runs side by side, each on its share of the cores: the first ones first, so let the longest be there.
    So are the two other ways to one model, where they are compared."""
    rounds: int = 2
    """Of answers, SFT and RL. The first round's answers are the experts'; in later ones those of `regenerated` domains are the
    unified model's own, after its RL (report, section 3.3, iterative self-distillation). Their SFT goes on from the last kept
    round's model, on other demonstrations."""
    regenerated: tuple[str, ...] = ("agent",)
    exam: Exam = field(default_factory=Exam)
    hardware: Hardware = field(default_factory=Hardware)
    """Of all runs."""

    def __post_init__(self) -> None:
        require(bool(self.experts), "experts", {}, "a domain at least")
        for key in ("experts_at_once", "rounds"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        for key, named in (("regenerated", self.regenerated), ("harvest.problems_of", self.harvest.problems_of)):
            unknown = sorted(set(named) - set(self.experts))
            require(not unknown, key, tuple(unknown), f"domains of experts: {', '.join(self.experts)}")
        families = [family for one in self.experts.values() for family in one.tasks.levels]
        twice = sorted({family for family in families if families.count(family) > 1})
        require(not twice, "experts", twice, "each family in one domain: it says who teaches it")

    @property
    def levels(self) -> dict[str, tuple[int, ...]]:
        """Of all domains: family -> difficulties."""
        return {family: levels for one in self.experts.values() for family, levels in one.tasks.levels.items()}

    @property
    def domain_of(self) -> dict[str, str]:
        """By family."""
        return {family: domain for domain, one in self.experts.items() for family in one.tasks.levels}


def load_experts_recipe(name_or_path: str | Path, changes: Sequence[str] = ()) -> ExpertsRecipe:
    """Read a recipe: a TOML file, or the name of one in `configs/experts/`. changes: `table.key=value`, in its place.

    Raises `ConfigError`, naming file and key, for whatever does not fit.
    """
    path = find_config("experts", name_or_path)
    mapping = read_toml_mapping(path)
    whole = "rl" not in mapping
    for change in changes:
        if whole and change.startswith("rl."):
            wanted = f"{' or '.join(f'experts.{name}' for name in mapping.get('experts', {}))} or unified_rl in place of rl"
            raise ConfigError(f"set = {change!r}: {path} says of each run by itself what it is, without [rl]; wanted {wanted}")
        _change(mapping, change)
    recipe = build(ExpertsRecipe, _resolved(mapping, str(path)), where=str(path))
    recipe = dataclasses.replace(recipe, base=recipe.base and path.parent / recipe.base)
    return with_paths(recipe, lambda found: path.parent / found)


def save_experts_recipe(recipe: ExpertsRecipe, path: Path) -> None:
    save_recipe(recipe, path, "experts --recipe")


def with_paths(recipe: ExpertsRecipe, change: Callable[[Path], Path]) -> ExpertsRecipe:
    """With the paths in all of its recipes as `change` makes them, and with its seed and hardware there."""
    own = {"seed": recipe.seed, "hardware": recipe.hardware}

    def sft(one: SFTRecipe) -> SFTRecipe:
        return dataclasses.replace(with_sft_paths(one, change), **own)

    def rl(one: RLRecipe) -> RLRecipe:
        return dataclasses.replace(with_rl_paths(one, change), **own)

    return dataclasses.replace(
        recipe,
        start=sft(recipe.start),
        experts={domain: rl(one) for domain, one in recipe.experts.items()},
        unified_sft=sft(recipe.unified_sft),
        unified_rl=rl(recipe.unified_rl),
    )


def scaled(recipe: ExpertsRecipe, factor: float) -> ExpertsRecipe:
    """With every length times `factor`: samples and steps of fine-tuning, steps of RL, problems of answers and exams."""

    def times(count: int) -> int:
        return max(1, round(factor * count))

    def sft(one: SFTRecipe) -> SFTRecipe:
        conversations = dataclasses.replace(one.conversations, samples=times(one.conversations.samples))
        training = dataclasses.replace(one.training, scale=factor * one.training.scale)
        return dataclasses.replace(one, conversations=conversations, training=training)

    def rl(one: RLRecipe) -> RLRecipe:
        return dataclasses.replace(one, steps=times(one.steps))

    return dataclasses.replace(
        recipe,
        start=sft(recipe.start),
        experts={domain: rl(one) for domain, one in recipe.experts.items()},
        harvest=dataclasses.replace(
            recipe.harvest,
            problems=times(recipe.harvest.problems),
            problems_of={domain: times(count) for domain, count in recipe.harvest.problems_of.items()},
        ),
        unified_sft=sft(recipe.unified_sft),
        unified_rl=rl(recipe.unified_rl),
        exam=dataclasses.replace(recipe.exam, problems=times(recipe.exam.problems)),
    )


def _change(mapping: dict[str, Any], text: str) -> None:
    """`experts.agent.steps=40`. Unknown keys are found when the recipe is built."""
    key_path, values = parse_variation(text)
    *tables, key = key_path.split(".")
    if len(values) != 1:
        raise ConfigError(f"set = {text!r}: found {len(values)} values; wanted table.key=value")
    for name in tables:
        mapping = mapping.setdefault(name, {})
        if not isinstance(mapping, dict):
            raise ConfigError(f"set = {text!r}: {name} is {mapping!r}; wanted a table")
    mapping[key] = values[0]


def _resolved(mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Every recipe whole: what is shared put into each. A resolved recipe stays as it is."""
    found = {key: value for key, value in mapping.items() if key != "rl"}
    shared, start, experts = (_table(mapping, name, where) for name in ("rl", "start", "experts"))
    own = {domain: _table(experts, domain, where) for domain in experts}
    found["experts"] = {domain: _merged(shared, table) for domain, table in own.items()}
    levels: dict[str, Any] = {}
    for table in found["experts"].values():
        levels |= table.get("tasks", {}).get("levels", {})
    unified = _merged(_merged(shared, _table(mapping, "unified_rl", where)), {"tasks": {"levels": levels}})
    return {**found, "unified_rl": unified, "unified_sft": _merged(start, _table(mapping, "unified_sft", where))}


def _table(mapping: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    found = mapping.get(name, {})
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: {name} = {found!r}; wanted a table")
    return found


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Tables within tables key by key, the second's values in place of the first's."""
    both = {
        key: _merged(first[key], value) if isinstance(value, Mapping) and isinstance(first.get(key), Mapping) else value
        for key, value in second.items()
    }
    return {**first, **both}
