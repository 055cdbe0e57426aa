"""The Bradley-Terry model (Biometrika 39, 1952) of preferences: a score for each answer, whose difference is a log-odds."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class BradleyTerry(NamedTuple):
    """At least fp32. loss: a scalar; margins (pairs,): the log-odds that the chosen answer is preferred."""

    loss: Tensor
    margins: Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, center_weight: float = 0.0) -> BradleyTerry:
    """The mean over pairs of

        -log sigmoid(margin) + center_weight * (chosen + rejected)^2,    margin = chosen - rejected

    chosen, rejected (pairs,): scores of answers. Preferences say nothing of their sum, and the second term holds it at 0
    (Eisenstein et al., arXiv 2312.09244), so that sigmoid(score) is how often an answer is preferred to a typical one. Raises
    ValueError for unequal shapes, no pairs, or a negative weight.
    """
    shapes = [tuple(chosen.shape), tuple(rejected.shape)]
    if shapes[0] != shapes[1] or chosen.ndim != 1 or not chosen.numel() or not center_weight >= 0:
        raise ValueError(
            f"bradley_terry_loss: shapes {shapes}, center_weight {center_weight}: wanted two of one shape (pairs,), some "
            "pairs, a weight of 0 or more"
        )
    wide = torch.promote_types(chosen.dtype, torch.float32)
    chosen, rejected = chosen.to(wide), rejected.to(wide)
    margins = chosen - rejected
    return BradleyTerry((center_weight * (chosen + rejected) ** 2 - F.logsigmoid(margins)).mean(), margins)
