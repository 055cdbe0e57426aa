"""Which problems to attempt next: the report's two stages of difficulty (section 3.2), by measured pass rates.

The report sorts problems, each attempted 8 or 512 times: moderate ones first, and when the reward has levelled off those with
pass@8 = 0 and pass@512 > 0. Here a pool is sorted, a family's difficulty, of which there are as many problems as one likes, by
the last attempts at any of them:

    mastered   more than 7 of 8 succeed
    moderate   between 1 and 7 of 8
    hard       fewer than 1 of 8, so that eight attempts are more likely to fail than not, but one of the last 512 has succeeded
    hopeless   fewer than 1 of 8, and none of the last 512
    unknown    too few attempts to tell

Stage 1 draws from moderate pools, stage 2 from hard ones too; from unknown ones always, and seldom from any, so that no measure
grows old. With partial rewards the pass rate is the mean reward, and success a reward of 1.

Against pathologies problems are chosen one by one: these are rare, and training at large would hardly see them, so that the
report picks prompts that are likely to provoke them (section 3.4). Half of the problems are new, of any pool; half are ones
at which attempts were pathological before, each as often as its attempts were.
"""

import random
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from minglm.data.sources import TRAIN
from minglm.rl.recipe import Tasks
from minglm.tasks import FAMILIES
from minglm.tasks.task import Problem, problems

Pool = tuple[str, int]
Drawn = tuple[Pool, int]
"""A problem: its pool, and the seed that it is drawn with."""

Standing = Literal["unknown", "mastered", "moderate", "hard", "hopeless"]

FEW, RECENT, MANY = 8, 64, 512  # attempts: fewer tell nothing, those of the pass rate, those of which one must have succeeded
MODERATE = (1 / 8, 7 / 8)
WINDOW = 10  # steps whose mean reward is compared with that of as many before
LEVEL = 0.01  # rise below which it has levelled off
EXPLORED = 0.1  # of the problems come from any pool, so that no pass rate grows old
NEW = 0.5  # of the problems are new ones, among which those that provoke pathologies are found


def levelled_off(rewards: Sequence[float]) -> bool:
    """Whether the last `WINDOW` mean rewards are hardly above those of as many steps before."""
    recent = rewards[-2 * WINDOW :]
    return len(recent) == 2 * WINDOW and sum(recent[WINDOW:]) - sum(recent[:WINDOW]) < WINDOW * LEVEL


class Curriculum:
    """State: the last rewards of each pool, how many there were, the mean rewards of the steps so far, the stage, 1 or 2; and
    of each problem that provokes pathologies, which of its last attempts had one."""

    def __init__(self, tasks: Tasks, seed: int):
        self.pools: list[Pool] = [(family, level) for family, levels in tasks.levels.items() for level in levels]
        for family, level in self.pools:
            FAMILIES[family].check_difficulty(level)
        self.tasks, self.seed = tasks, seed
        self.last: dict[Pool, list[float]] = {pool: [] for pool in self.pools}  # MANY at most
        self.attempts: dict[Pool, int] = dict.fromkeys(self.pools, 0)
        self.rewards: list[float] = []
        self.stage = 1
        self.provoking: dict[Drawn, list[bool]] = {}  # MANY problems at most, the longest known first; RECENT attempts each

    def draw(self, step: int, first: int, count: int) -> list[tuple[Drawn, Problem]]:
        """Problems first, first + 1, ... of a step: a function of seed, step and number, and of the state."""
        found = []
        for number in range(first, first + count):
            (family, level), seed = drawn = self.pick(step, number)
            found.append((drawn, next(problems(FAMILIES[family], TRAIN, seed, [level]))))
        return found

    def pick(self, step: int, number: int) -> Drawn:
        rng = random.Random(f"{self.seed} {step} {number}")
        if self.tasks.curriculum == "pathology":
            if self.provoking and rng.random() >= NEW:
                return rng.choices(list(self.provoking), [statistics.fmean(shown) for shown in self.provoking.values()])[0]
            return self._one_of(self.pools, rng), rng.getrandbits(62)
        pool = self._one_of(self.pools if rng.random() < EXPLORED else self.chosen(), rng)
        return pool, rng.getrandbits(62)

    def _one_of(self, pools: list[Pool], rng: random.Random) -> Pool:
        """By the weights of their families."""
        return rng.choice([pool for pool in pools for _ in range(self.tasks.family_weights.get(pool[0], 1))])

    def rate(self, pool: Pool) -> float | None:
        """The pass rate of the last attempts; None without any."""
        recent = self.last[pool][-RECENT:]
        return statistics.fmean(recent) if recent else None

    def standing(self, pool: Pool) -> Standing:
        last, (low, high) = self.last[pool], MODERATE
        if len(last) < FEW:
            return "unknown"
        rate = self.rate(pool)
        if rate >= low:
            return "moderate" if rate <= high else "mastered"
        return "hard" if max(last) >= 1 else "hopeless"

    def chosen(self) -> list[Pool]:
        """The pools of the present stage; all, where none fits."""
        if self.tasks.curriculum == "none":
            return self.pools
        wanted = ("unknown", "moderate") if self.stage == 1 else ("unknown", "moderate", "hard")
        return [pool for pool in self.pools if self.standing(pool) in wanted] or self.pools

    def learn(self, pools: Sequence[Pool], rewards: Sequence[float]) -> None:
        """What the attempts of a step have shown."""
        for pool, reward in zip(pools, rewards, strict=True):
            self.last[pool] = [*self.last[pool], reward][-MANY:]
            self.attempts[pool] += 1
        self.rewards = [*self.rewards, statistics.fmean(rewards)][-2 * WINDOW :]
        if levelled_off(self.rewards):
            self.stage = 2

    def learn_pathologies(self, drawn: Drawn, shown: Sequence[bool]) -> None:
        """Which attempts at a problem were pathological. One whose last attempts were not is forgotten."""
        if self.tasks.curriculum != "pathology":
            return
        recent = [*self.provoking.pop(drawn, []), *shown][-RECENT:]
        if any(recent):
            self.provoking[drawn] = recent
            while len(self.provoking) > MANY:
                del self.provoking[next(iter(self.provoking))]

    def record(self) -> dict[str, dict[str, Any]]:
        """For metrics.jsonl, of each pool: attempts, pass rate, how many of the last MANY succeeded, standing."""
        return {
            f"{family} {level}": {
                "attempts": self.attempts[family, level],
                "pass_rate": self.rate((family, level)),
                "solved": sum(reward >= 1 for reward in self.last[family, level]),
                "standing": self.standing((family, level)),
            }
            for family, level in self.pools
        }

    def state_dict(self) -> dict[str, Any]:
        pools = [[*pool, self.attempts[pool], list(self.last[pool])] for pool in self.pools]
        provoking = [[*pool, seed, list(shown)] for (pool, seed), shown in self.provoking.items()]
        return {"pools": pools, "rewards": list(self.rewards), "stage": self.stage, "provoking": provoking}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for family, level, attempts, last in state["pools"]:
            self.attempts[family, level], self.last[family, level] = attempts, list(last)
        self.rewards, self.stage = list(state["rewards"]), state["stage"]
        self.provoking = {((family, level), seed): list(shown) for family, level, seed, shown in state["provoking"]}
