"""Trajectories as a micro-batch of tensors: one a row, padded at the right."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from minglm.rl.rollout import Trajectory


class Rows(NamedTuple):
    """Some trajectories as a micro-batch, all (b, t): the token at labels[i, j] was chosen behind input_ids[i, : j + 1]."""

    input_ids: Tensor  # int64, padded with 0
    labels: Tensor  # int64, -100 in the padding
    document_ids: Tensor  # int32: 0, and -1 in the padding
    sampled: Tensor  # bool: the policy chose this label
    log_probs: Tensor  # fp32, the sampler's, where sampled
    temperatures: Tensor  # fp32: what the policy was sampled at, and is trained at
    versions: Tensor  # int64, of the weights that sampled, where sampled
    experts: Tensor | None = None  # (MoE layers, b * t, K) int64, of the sampler, -1 where it has none; None if unrecorded

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], device: torch.device) -> "Rows":
        b, t = len(trajectories), max(len(one.ids) for one in trajectories) - 1
        rows = cls(
            torch.zeros(b, t, dtype=torch.long),
            torch.full((b, t), -100),
            torch.full((b, t), -1, dtype=torch.int32),
            torch.zeros(b, t, dtype=torch.bool),
            torch.zeros(b, t),
            torch.ones(b, t),
            torch.full((b, t), -1),
        )
        for row, one in enumerate(trajectories):
            n = len(one.ids) - 1
            ids = torch.tensor(one.ids)
            rows.input_ids[row, :n], rows.labels[row, :n] = ids[:-1], ids[1:]
            rows.document_ids[row, :n] = 0
            rows.sampled[row, :n] = torch.tensor(one.sampled[1:])
            rows.log_probs[row, :n] = torch.tensor(one.log_probs[1:])
            rows.temperatures[row] = one.temperature
            rows.versions[row, :n] = torch.tensor(one.versions[1:])
        tensors = [*rows[:-1], _experts(trajectories, t)]
        return cls(*(None if tensor is None else tensor.to(device) for tensor in tensors))

    @property
    def sequence_ids(self) -> Tensor:
        """(b * t,): the row of each token."""
        b, t = self.labels.shape
        return torch.arange(b, device=self.labels.device).repeat_interleave(t)


def _experts(trajectories: Sequence[Trajectory], t: int) -> Tensor | None:
    """As `Rows.experts`, from those of the trajectories that have recorded some."""
    recorded = [(row, one.experts) for row, one in enumerate(trajectories) if one.experts is not None]
    if not recorded:
        return None
    found = torch.full((len(trajectories), t, *recorded[0][1].shape[1:]), -1)  # (b, t, layers, K)
    for row, experts in recorded:
        found[row, : len(experts)] = experts.long()
    return rearrange(found, "b t layers k -> layers (b t) k")
