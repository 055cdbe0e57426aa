"""PPO's critic: what reward is still to be expected, before each token is chosen."""

from pathlib import Path

import torch
from torch import Tensor, nn

from minglm.checkpoint import load_model
from minglm.rl.rows import Rows


class Critic(nn.Module):
    """PPO's: a model of its own, from the policy's start, with a value in place of the head (1707.06347)."""

    def __init__(self, folder: Path, device: torch.device):
        super().__init__()
        self.trunk = load_model(folder, device=device)
        self.trunk.requires_grad_(True)
        self.value = nn.Linear(self.trunk.config.hidden_size, 1, device=device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, rows: Rows) -> Tensor:
        """-> (b, t) fp32: what is expected before the label is chosen."""
        hidden, _, _ = self.trunk.hidden_and_side_losses(rows.input_ids, rows.labels, rows.document_ids, detach_trunk=True)
        return self.value(hidden)[..., 0].float()
