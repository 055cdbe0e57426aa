"""The inference gear: the hot operations where nothing is learned, for CPUs and few tokens.

A decoding step of a small model is a few hundred tiny operations, so what counts is how many there are. These forms record
nothing for a backward pass, work in few calls, and touch only what the tokens need: kernels in C where the machine has a
compiler (`minglm/native.py`), else PyTorch's own operations. What a form does not cover (another device, another dtype,
long prompts) goes to the torch gear. The engine runs in this gear where it is asked for `torch`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minglm import native, ops

ROWS = 4
FEW_TOKENS = 256  # beyond, PyTorch's products are large enough to be the faster ones


def is_native(x: Tensor) -> bool:
    """Whether the C kernels work on x: they read fp32 on a CPU, and nothing may want gradients."""
    return can_be_native(x) and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def can_be_native(x: Tensor) -> bool:
    """The same, but for what a context manager decides."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and native.library() is not None


def _is_a_row(x: Tensor, weight: Tensor) -> bool:
    """So few tokens that a product only reads its weights, and a library's preparations would take longer."""
    return x.numel() <= ROWS * x.shape[-1] and weight.dtype == torch.float32 and is_native(x)


@ops.register("linear", "inference")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_a_row(x, weight):
        return ops.form("linear", "torch")(x, weight, bias)
    (n, h), tokens = weight.shape, x.numel() // x.shape[-1]
    x, out, places = x.contiguous(), torch.empty(*x.shape[:-1], n), torch.empty(tokens, dtype=torch.int64)
    native.library().linear(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        places.data_ptr(),
        tokens,
        h,
        n,
    )
    return out


@ops.register("rms_norm", "inference")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if is_native(x):
        x, out = x.contiguous(), torch.empty(x.shape)
        d = x.shape[-1]
        native.library().rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // d, d, eps)
        return out
    if x.dtype != torch.float32 or torch.is_grad_enabled():
        return ops.form("rms_norm", "torch")(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


@ops.register("rotary", "inference")
def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    p = cos.shape[-1]
    if x.shape[0] == 1 and is_native(x):
        x, cos, sin, out = x.contiguous(), cos.contiguous(), sin.contiguous(), torch.empty(x.shape)
        native.library().rotary(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), *x.shape[1:], p)
        return out
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
    if _is_a_row(x, gate):
        (i, h), o, tokens = gate.shape, down.shape[0], x.numel() // x.shape[-1]
        x, out, work = x.contiguous(), torch.empty(*x.shape[:-1], o), torch.empty(tokens * 2 * i)
        places = torch.empty(tokens, dtype=torch.int64)
        pointers = (tensor.data_ptr() for tensor in (x, gate, up, down, out, work, places))
        native.library().swiglu(*pointers, tokens, h, i, o)
        return out
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
    if torch.is_grad_enabled() or x.device.type != "cpu" or ops.autocasts("cpu") or n > FEW_TOKENS:
        return ops.form("routed_experts", "torch")(x, experts, weights, gate_up, down)
    if is_native(x) and gate_up.dtype == torch.float32:
        return _one_by_one(x, experts, weights, gate_up, down)
    weights = weights.to(x.dtype)
    if n * k <= e:
        return _own_copies(x, experts, weights, gate_up, down)
    return _padded(x, experts, weights, gate_up, down)


def _one_by_one(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    (n, k), (e, h, i) = experts.shape, down.shape
    x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
    out, work, places = torch.empty(x.shape), torch.empty(n * (3 * i + h)), torch.empty(3 * n, dtype=torch.int64)
    pointers = (tensor.data_ptr() for tensor in (x, experts, weights, gate_up, down, out, work, places, places[2 * n :]))
    native.library().routed_experts(*pointers, n, k, e, h, i)
    return out


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    rows: Tensor,
    positions: Tensor,
    block_size: int,
    first: int,
    longest: int,
) -> Tensor:
    """Attention of single queries straight from a paged cache, only where `is_native`: q (n, heads, d); keys and values
    (slots, kv_heads, d); table (rows, blocks) int64; rows, positions (n,) int64: query i sees positions first to
    positions[i] of its row, all below `longest`. -> (n, heads, d)."""
    (n, heads, d), kv_heads = q.shape, keys.shape[1]
    q, out, scores = q.contiguous(), torch.empty(q.shape), torch.empty(longest)
    native.library().paged_attention(
        q.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        table.data_ptr(),
        table.stride(0),
        rows.data_ptr(),
        positions.data_ptr(),
        out.data_ptr(),
        scores.data_ptr(),
        n,
        heads,
        kv_heads,
        d,
        block_size,
        first,
    )
    return out


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
