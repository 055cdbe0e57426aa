"""Expert parallelism: the dispatcher that brings tokens to experts on other ranks, and their results back.

It takes `MoE.dispatcher`'s place; the model does not change. Each (token, expert) pair is a row. Rows are sorted by expert,
so those for one rank lie together; an all-to-all with uneven splits sends them off; each rank's experts work on what has
arrived, one expert a row; a second all-to-all brings the results back into the order in which they were sent; each token's
rows are summed. The backward pass is the same way round: an all-to-all's gradient is the all-to-all with the splits swapped.

The experts are told the router's weights of the rows that they get, so that they scale the activation, as on one device.

Bytes: a step of one layer sends k rows of hidden numbers a token (bf16 under autocast) there and back, forward and backward.

Shapes: N tokens, K experts per token, R = N * K rows sent, S rows arrived, E experts, H hidden.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from minglm import ops
from minglm.model import Experts


class AllToAllDispatcher:
    """Sends rows to the ranks of `group`, where rank r holds experts r * E / ep to (r + 1) * E / ep - 1."""

    def __init__(self, group: dist.ProcessGroup, num_experts: int):
        self.group, self.num_experts = group, num_experts
        self.ranks = group.size()
        self.local_experts = num_experts // self.ranks

    def __call__(self, experts: Experts, x_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """-> the weighted sum of each token's experts (N, H). All ranks of the group must call it, with any N, even 0."""
        (x_NH,) = ops.in_autocast_dtype(x_NH)  # before it is sent, not after: half the bytes, the same bits
        slot_of_row, row_of_slot, ends_E = ops.sort_by_expert(experts_NK, self.num_experts)
        token_of_row = slot_of_row // experts_NK.shape[1]
        sent, arriving = self._exchange_counts(ends_E)

        # The host must know how many rows come: the one place where it waits for the device.
        splits = sent.sum(1).tolist(), arriving.sum(1).tolist()
        arrived_SH = _AllToAll.apply(ops.gather_rows(x_NH, token_of_row, row_of_slot), *splits, self.group)
        weights_S = _AllToAll.apply(weights_NK.flatten()[slot_of_row], *splits, self.group)

        # From each rank in turn come the rows for the first of our experts, then for the second, and so on.
        ours = torch.arange(self.local_experts, device=x_NH.device).repeat(self.ranks)
        expert_S = ours.repeat_interleave(arriving.flatten(), output_size=len(arrived_SH))
        out_SH = experts(arrived_SH, expert_S[:, None], weights_S[:, None])

        back_RH = _AllToAll.apply(out_SH, *reversed(splits), self.group)
        return ops.sum_rows(back_RH, token_of_row, row_of_slot)

    def _exchange_counts(self, ends_E: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that we send to and get from each rank for each of its or our experts: two (ranks, local experts), int64."""
        sent = ends_E.diff(prepend=ends_E.new_zeros(1)).view(self.ranks, self.local_experts)
        # A copy and not an empty tensor: in a dry run nothing arrives, and then every rank is taken to send what we send.
        arriving = sent.clone()
        dist.all_to_all_single(arriving, sent, group=self.group)
        return sent, arriving


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks, and gradients back the way they came: (R, ...) -> (S, ...)."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], arriving: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.arriving, ctx.group = sent, arriving, group
        arrived = rows.new_empty(sum(arriving), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), arriving, sent, group=group)
        return arrived

    @staticmethod
    def backward(ctx, darrived: Tensor):
        drows = darrived.new_empty(sum(ctx.sent), *darrived.shape[1:])
        dist.all_to_all_single(drows, darrived.contiguous(), ctx.sent, ctx.arriving, group=ctx.group)
        return drows, None, None, None
