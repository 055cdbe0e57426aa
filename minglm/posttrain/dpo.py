"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290): preferences without a reward model."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DPO(NamedTuple):
    """At least fp32. loss: a scalar; margins (pairs,): by how much the implicit reward prefers the chosen response."""

    loss: Tensor
    margins: Tensor


def dpo_loss(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float = 0.1) -> DPO:
    """The mean over pairs of -log sigmoid(margin), with

        margin = beta * [(log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))]    (eq. 7)

    All (pairs,): log-probabilities of whole responses, summed over the assistant's tokens, under the policy and under the
    frozen reference. The derivative by log p(chosen) is -beta * sigmoid(-margin) / pairs, by log p(rejected) its negative:
    a pair that is ordered well already teaches little. Raises ValueError for unequal shapes, no pairs, or beta <= 0.
    """
    tensors = [chosen, rejected, reference_chosen, reference_rejected]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1 or chosen.ndim != 1 or not chosen.numel() or not beta > 0:
        raise ValueError(f"dpo_loss: shapes {shapes}, beta {beta}: wanted four of one shape (pairs,), some pairs, beta > 0")
    wide = torch.promote_types(chosen.dtype, torch.float32)
    chosen, rejected, reference_chosen, reference_rejected = (tensor.to(wide) for tensor in tensors)
    margins = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return DPO(-F.logsigmoid(margins).mean(), margins)
