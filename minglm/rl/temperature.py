"""Dynamic sampling temperature (report, section 3.2): the surer a policy has become, the less a fixed temperature explores.

When the mean reward has levelled off, the policy is tried at a range of temperatures on problems set aside. The next phase has
the highest one that costs no more than 1% of the best one's reward. A mean over a hundred problems is uncertain by more
than that, so a choice is only as good as the problems are many; the attempts share their seeds, which helps a little.
"""

from collections.abc import Mapping
from typing import Any

from minglm.rl.curriculum import WINDOW, levelled_off
from minglm.rl.recipe import Sampling

LOSS = 0.01  # of the best reward


class Temperature:
    """State: the present temperature, and the mean rewards of the steps since it was last chosen."""

    def __init__(self, sampling: Sampling):
        self.value, self.choices = sampling.temperature, sorted(sampling.temperatures)
        self.rewards: list[float] = []

    def learn(self, reward: float) -> bool:
        """The mean reward of a step -> whether it is time to choose."""
        self.rewards = [*self.rewards, reward][-2 * WINDOW :]
        return bool(self.choices) and levelled_off(self.rewards)

    def choose(self, rewards: Mapping[float, float]) -> None:
        """By each choice's reward on problems set aside. The next phase begins."""
        best = max(rewards.values())
        self.value = max(choice for choice, reward in rewards.items() if reward >= best - LOSS * abs(best))
        self.rewards = []

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "rewards": list(self.rewards)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.rewards = state["value"], list(state["rewards"])
