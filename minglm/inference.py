"""The inference gear: the hot operations where nothing is learned.

A decoding step of a small model is a few hundred tiny operations, so what counts is how many there are. These forms record
nothing for a backward pass and work in few calls. What a form does not cover goes to the torch gear. The engine runs in this
gear where it is asked for `torch`; on a CPU in fp32 it has faster loops (`minglm/engine/loops.py`).
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
