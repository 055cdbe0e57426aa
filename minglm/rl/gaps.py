"""How far the sampler's log-probabilities are from the trainer's, and where that comes from."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minglm.rl.rows import Rows


class Gaps(NamedTuple):
    """Over the tokens that the policy chose, floats but for the last; gap: absolute difference of log-probabilities, in nats.

    largest_gap, mean_gap: with the trainer's pass before the first update, by which the step corrects. fresh_gap: the mean over
    tokens of the present weights, which is what precision and routing do; stale_gap: over older ones, what staleness does
    besides; both 0 without such tokens. own_routing_gap: the mean if each side routes for itself; with R3, which replays the
    sampler's routing, the difference to mean_gap is what routing does. rerouted: the share of tokens that trainer and sampler
    send to different experts in one layer at least; 0 where the sampler's experts are not recorded. staleness and
    largest_staleness: how many updates older than the present weights those that sampled a token are; gap_by_staleness: the
    mean gap of the tokens of each age that there is.
    """

    largest_gap: float
    mean_gap: float
    fresh_gap: float
    stale_gap: float
    own_routing_gap: float
    rerouted: float
    staleness: float
    largest_staleness: float
    gap_by_staleness: dict[int, float]


def measure_gaps(
    batches: Sequence[Rows],
    old: Sequence[Tensor],
    unreplayed: Sequence[Tensor],
    experts: Sequence[Tensor | None],
    version: int | None,
) -> Gaps:
    """old: the trainer's log-probabilities (b, t) as it trains on them; unreplayed: those by its own routing; experts: of that
    routing, (MoE layers, b * t, K); version: of the present weights, None for the newest among the tokens'."""
    own = [rows.sampled for rows in batches]

    def chosen(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor[mask] for tensor, mask in zip(tensors, own, strict=True)])

    sampler = chosen([rows.log_probs for rows in batches])
    gaps, apart = (sampler - chosen(old)).abs(), (sampler - chosen(unreplayed)).abs()
    versions = chosen([rows.versions for rows in batches])
    ages = ((versions.max() if version is None else version) - versions).float()
    rerouted = chosen([_rerouted(rows, theirs) for rows, theirs in zip(batches, experts, strict=True)])
    numbers = [
        gaps.max(),
        gaps.mean(),
        _mean(gaps[ages <= 0]),
        _mean(gaps[ages > 0]),
        apart.mean(),
        rerouted.float().mean(),
        ages.mean(),
        ages.max(),
    ]
    by_staleness = {int(age): gaps[ages == age].mean().item() for age in ages.unique().tolist()}
    return Gaps(*torch.stack(numbers).tolist(), by_staleness)


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, values.numel())


def _rerouted(rows: Rows, experts: Tensor | None) -> Tensor:
    """Where the recorded experts are others than `experts`, in whatever order: (b, t) bool."""
    if rows.experts is None or experts is None:
        return torch.zeros_like(rows.sampled)
    others = rows.experts.sort(-1).values != experts.sort(-1).values
    return (others & (rows.experts >= 0)).any(-1).any(0).view_as(rows.sampled)
