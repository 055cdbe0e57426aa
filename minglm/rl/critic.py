"""PPO's critic: what reward is still to be expected, before each token is chosen."""

from torch import Tensor

from minglm.posttrain.reward_model import RewardModel
from minglm.rl.rows import Rows


class Critic(RewardModel):
    """A reward model that is read at every token: a model of its own, upon the policy's start (1707.06347)."""

    def values(self, rows: Rows) -> Tensor:
        """-> (b, t) fp32: what is expected before the label is chosen."""
        hidden, _, _ = self.hidden_and_side_losses(rows.input_ids, rows.labels, rows.document_ids)
        return self.lm_head(hidden)[..., 0].float()
