"""Which problems to attempt next: the report's two stages of difficulty (section 3.2), by measured pass rates.

The report picks problems; here a pool is a family's difficulty, of which there are as many problems as one likes. First come
the pools that the policy solves now and then. When the reward has levelled off, those that it hardly ever solves come in, as
soon as one attempt at them has succeeded: the report's pass@8 = 0 and pass@512 > 0.
"""

import random
from collections.abc import Sequence
from typing import Any

from minglm.data.sources import TRAIN
from minglm.rl.recipe import Tasks
from minglm.tasks import FAMILIES
from minglm.tasks.task import Problem, problems

Pool = tuple[str, int]

MODERATE = (0.125, 0.875)  # of 8 attempts one at least, and not all
MEMORY = 0.9  # of a pool's pass rate, an attempt
WINDOW = 10  # steps whose mean reward is compared with that of as many before
LEVEL = 0.01  # rise below which it has levelled off
EXPLORED = 0.1  # of the problems come from any pool, so that no pass rate grows old


class Curriculum:
    """State: the pass rate of each pool, the rewards of the steps so far, and the stage, 1 or 2."""

    def __init__(self, tasks: Tasks, seed: int):
        self.pools: list[Pool] = [(family, level) for family, levels in tasks.levels.items() for level in levels]
        for family, level in self.pools:
            FAMILIES[family].check_difficulty(level)
        self.tasks, self.seed = tasks, seed
        self.rates: dict[Pool, float] = {}
        self.solved: set[Pool] = set()
        self.rewards: list[float] = []
        self.stage = 1

    def draw(self, step: int, first: int, count: int) -> list[tuple[Pool, Problem]]:
        """Problems first, first + 1, ... of a step: a function of seed, step and number, and of the state."""
        found = []
        for number in range(first, first + count):
            (family, level), draw = self.pick(step, number)
            found.append(((family, level), next(problems(FAMILIES[family], TRAIN, draw, [level]))))
        return found

    def pick(self, step: int, number: int) -> tuple[Pool, int]:
        """The pool of a problem, and the seed that it is drawn with."""
        rng = random.Random(f"{self.seed} {step} {number}")
        pool = rng.choice(self.pools if rng.random() < EXPLORED else self.chosen())
        return pool, rng.getrandbits(62)

    def chosen(self) -> list[Pool]:
        """The pools of the present stage; all, where none fits."""
        if self.tasks.curriculum == "none":
            return self.pools
        low, high = MODERATE
        moderate = [pool for pool in self.pools if low <= self.rates.get(pool, 0.5) <= high]
        if self.stage == 2:
            moderate += [pool for pool in self.pools if self.rates.get(pool, 0.5) < low and pool in self.solved]
        return moderate or self.pools

    def learn(self, pools: Sequence[Pool], rewards: Sequence[float]) -> None:
        """What the attempts of a step have shown."""
        for pool, reward in zip(pools, rewards, strict=True):
            self.rates[pool] = MEMORY * self.rates.get(pool, reward) + (1 - MEMORY) * reward
            if reward >= 1:
                self.solved.add(pool)
        self.rewards.append(sum(rewards) / len(rewards))
        recent = self.rewards[-2 * WINDOW :]
        if len(recent) == 2 * WINDOW and sum(recent[WINDOW:]) - sum(recent[:WINDOW]) < WINDOW * LEVEL:
            self.stage = 2

    def state_dict(self) -> dict[str, Any]:
        return {
            "rates": [[*pool, rate] for pool, rate in self.rates.items()],
            "solved": [list(pool) for pool in sorted(self.solved)],
            "rewards": self.rewards[-2 * WINDOW :],
            "stage": self.stage,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rates = {(family, level): rate for family, level, rate in state["rates"]}
        self.solved = {(family, level) for family, level in state["solved"]}
        self.rewards, self.stage = list(state["rewards"]), state["stage"]
