"""A trained model at work: attempts at problems in a mode, for what experts are to teach and for exams."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm

from minglm import ops
from minglm.checkpoint import load_model
from minglm.engine.engine import Engine
from minglm.rl.recipe import Mode, RLRecipe
from minglm.rl.rewards import combined
from minglm.rl.rollout import Asked, Limits, Rollouts, Trajectory
from minglm.tasks import FAMILIES
from minglm.tasks.task import Problem, different_problems
from minglm.tokenizer import Tokenizer
from minglm.train.device import choose_device

AT_ONCE = 512  # attempts between two looks at the progress


class Placed(NamedTuple):
    """A problem, and the pool that it was drawn from."""

    family: str
    level: int
    problem: Problem


def different(
    levels: Mapping[str, tuple[int, ...]], split: Literal["train", "held_out"], seed: int, count: int
) -> list[Placed]:
    """Up to `count` different problems of each pool; fewer where there are no more."""
    return [
        Placed(family, level, problem)
        for family, some in levels.items()
        for level in some
        for problem in different_problems(FAMILIES[family], split, seed, count, [level])
    ]


class Policy:
    """The model of a folder, which attempts problems as the recipe's policy does: within its lengths, judged by its rewards."""

    def __init__(self, folder: Path, recipe: RLRecipe):
        device = choose_device(recipe.hardware)
        self.tokenizer = Tokenizer.from_pretrained(folder)
        self.gear = recipe.hardware.gear
        sampling = recipe.sampling
        at_once = sampling.groups * sampling.group_size
        model = load_model(folder, device=device.torch_device).eval()
        engine = Engine(model, self.tokenizer, gear=self.gear, max_running=at_once)
        judge = combined(recipe.rewards, device.torch_device)
        self.limits = Limits.of(sampling)
        self.rollouts = Rollouts(engine, self.tokenizer, self.limits, judge=judge.apply, autocast=device.autocast)

    def attempt(self, asked: Sequence[Asked], mode: Mode, temperature: float, about: str) -> list[Trajectory]:
        """In order. thinking: every turn begins within a thinking, and does think; automatic: the model chooses."""
        self.rollouts.limits = replace(self.limits.in_mode(mode, opens_thinking=True), temperature=temperature)
        found = []
        with ops.using(self.gear), tqdm(total=len(asked), desc=f"{about}, {mode}", unit="attempt", leave=False) as bar:
            for start in range(0, len(asked), AT_ONCE):
                found += self.rollouts.collect(asked[start : start + AT_ONCE])
                bar.update(len(found) - start)
        return found


def is_right(one: Trajectory) -> bool:
    """Whether the problem's own verifier has nothing to say against it. What was cut off or malformed has not been asked."""
    return one.parts.get("verifier", 0.0) >= 1
