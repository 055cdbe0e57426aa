"""The inference gear: the hot operations where nothing is learned, for CPUs and few tokens.

A decoding step of a small model is a few hundred tiny operations, so what counts is how many there are. These forms record
nothing for a backward pass, work in few calls, and touch only what the tokens need. What a form does not cover (another
device, another dtype, long prompts) goes to the torch gear. The engine runs in this gear where it is asked for `torch`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minglm import ops


@ops.register("rms_norm", "inference")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype != torch.float32 or torch.is_grad_enabled():
        return ops.form("rms_norm", "torch")(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


@ops.register("rotary", "inference")
def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    p = cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first, second, rest = x.split([p, p, x.shape[-1] - 2 * p], -1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat([*turned, rest], -1)


@ops.register("router_scores", "inference")
def _router_scores(x: Tensor, weight: Tensor) -> Tensor:
    if ops.autocasts(x.device.type):
        return ops.form("router_scores", "torch")(x, weight)
    return torch.sigmoid(F.linear(x.float(), weight.float()))


@ops.register("swiglu", "inference")
def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@ops.register("attention", "inference")
def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """One query a sequence: the heads of a group stand as queries beside each other, so no key is repeated for them."""
    (b, t, heads, d), kv_heads = q.shape, k.shape[2]
    if t > 1 or torch.is_grad_enabled() or ops.autocasts(q.device.type):
        return ops.form("attention", "torch")(q, k, v, visible)
    q = q.view(b, kv_heads, heads // kv_heads, d)
    return F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), visible).reshape(b, 1, heads, d)


@ops.register("routed_experts", "inference")
def _routed_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    (n, k), e = experts.shape, gate_up.shape[0]
    if torch.is_grad_enabled() or x.device.type != "cpu" or ops.autocasts("cpu") or n > 256:
        return ops.form("routed_experts", "torch")(x, experts, weights, gate_up, down)
    weights = weights.to(x.dtype)
    if n * k <= e:
        return _own_copies(x, experts, weights, gate_up, down)
    return _padded(x, experts, weights, gate_up, down)


def _own_copies(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each (token, expert) pair with a copy of its expert: fewer copies than experts, and no sorting."""
    n, k = experts.shape
    chosen = experts.flatten()
    rows = x[:, None, :, None].expand(n, k, x.shape[1], 1).reshape(n * k, x.shape[1], 1)
    gate, up = torch.bmm(gate_up.index_select(0, chosen), rows).chunk(2, dim=1)  # (n * k, i, 1)
    act = F.silu(gate) * up * weights.view(-1, 1, 1)
    return torch.bmm(down.index_select(0, chosen), act).view(n, k, -1).sum(1)


def _padded(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One product for all experts, each one's tokens padded to the busiest one's load."""
    (n, k), e = experts.shape, gate_up.shape[0]
    place = torch.zeros(n, e, dtype=torch.int64).scatter_(1, experts, 1).cumsum(0)  # among its expert's tokens, from 1
    capacity = int(place[-1].max())
    slot = (experts * capacity - 1 + place.gather(1, experts)).flatten()  # (n * k,)
    rows = x.new_zeros(e * capacity, x.shape[1])
    rows.index_copy_(0, slot, x.repeat_interleave(k, 0))
    gate, up = torch.bmm(rows.view(e, capacity, -1), gate_up.mT).chunk(2, dim=-1)
    out = torch.bmm(F.silu(gate).mul_(up), down.mT).view(e * capacity, -1)
    return torch.bmm(weights[:, None], out.index_select(0, slot).view(n, k, -1))[:, 0]
