"""The hot operations of GLM-4.5, each named once, and the choice of gear that runs them.

Every operation below is *defined* by its naive form: a few lines of plain PyTorch to check against the paper. A faster
gear replaces an operation behind the same signature: `torch` (PyTorch's fused operations and hand-written backward
passes, the default) and `triton` (the kernels in `kernels/`, which register themselves here). An operation that a gear
lacks falls back to the gear before it. The model calls `ops.rms_norm(...)` and never knows. The gear `exact`
(`minglm/exact.py`) is not about speed: it gives a token the same bits in any batch. Nothing falls back from it. The gear
`inference` (`minglm/inference.py`) is the engine's form of `torch`: few calls, and no gradients.

Shapes: b batch, t sequence, n = b * t tokens, h hidden, k experts per token, r = n * k rows, one for each token and
expert of it, e experts, i width of an expert, v vocabulary.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

GEARS = ("naive", "torch", "triton", "exact", "inference")
# Where each gear looks for an operation. What is not exact must not run there unseen.
FALLBACKS = {
    "naive": ("naive",),
    "torch": ("torch", "naive"),
    "triton": ("triton", "torch", "naive"),
    "exact": ("exact",),
    "inference": ("inference", "torch", "naive"),
}

FUSED_BY_COMPILER = ("rms_norm", "rotary", "swiglu")

_implementations: dict[str, dict[str, Callable]] = {}
_gear = "torch"


class GearError(ValueError):
    """A gear that does not exist, or that does not run here."""


def operation(naive: Callable) -> Callable:
    """Declare an operation by its naive definition; the returned function runs it in the gear in use."""
    name = naive.__name__
    _implementations[name] = {"naive": naive}

    @functools.wraps(naive)
    def run(*args, **kwargs):
        chosen = form(name, _gear)
        if torch.compiler.is_compiling() and _gear == "exact":
            _refuse_the_compiler()
        if torch.compiler.is_compiling() and chosen is not naive:
            # torch.compile fuses the naive form of elementwise work by itself; what writes into slices it must not enter,
            # nor the launchers of kernels.
            if chosen is _implementations[name].get("torch") and name in FUSED_BY_COMPILER:
                return naive(*args, **kwargs)
            return torch.compiler.disable(chosen)(*args, **kwargs)
        return chosen(*args, **kwargs)

    return run


@torch.compiler.disable  # raised while torch.compile traces, an error would only end its graph
def _refuse_the_compiler() -> None:
    raise GearError("gear 'exact' found torch.compile at work, which changes bits by fusing: leave compile off")


def form(name: str, gear: str) -> Callable:
    """The function that is operation `name` in `gear`, its own or that of the gear that it falls back to.

    Raises `GearError` where there is none.
    """
    table = _implementations[name]
    for candidate in FALLBACKS[gear]:
        if candidate in table:
            return table[candidate]
    raise GearError(f"gear {gear!r} has no operation {name!r}, and falls back to no other gear: register one")


def register(name: str, gear: str) -> Callable:
    """Decorator: the decorated function is operation `name` in `gear`. Raises `ValueError` for names that do not exist."""
    if name not in _implementations:
        raise ValueError(f"operation {name!r} is not defined; operations are {', '.join(_implementations)}")
    _check_gear(gear)

    def add(implementation: Callable) -> Callable:
        _implementations[name][gear] = implementation
        return implementation

    return add


@contextlib.contextmanager
def using(gear: str) -> Iterator[None]:
    """Run everything inside in `gear`: "naive", "torch", "triton", "exact" or "inference". Process-wide, not per thread.

    Raises `GearError` for a gear that does not exist or whose packages are not installed.
    """
    global _gear
    _check_gear(gear)
    if gear == "triton":
        _load_kernels()
    elif gear == "exact":
        importlib.import_module("minglm.exact")  # by name, at run time: it is built on this module
    elif gear == "inference":
        importlib.import_module("minglm.inference")  # likewise
    before, _gear = _gear, gear
    try:
        yield
    finally:
        _gear = before


def _check_gear(gear: str) -> None:
    if gear not in GEARS:
        raise GearError(f"gear {gear!r} does not exist; wanted one of {', '.join(GEARS)}")


def _load_kernels() -> None:
    """Import the package `kernels`, which registers its operations. By name, at run time: it lies above this module."""
    if any("triton" in table for table in _implementations.values()):
        return
    if importlib.util.find_spec("triton") is None:
        raise GearError(
            "gear 'triton' needs the package triton, which exists for Linux (pip install -r requirements.txt): "
            "install it, or use gear 'torch'"
        )
    package = importlib.import_module("kernels")
    if not any("triton" in table for table in _implementations.values()):
        raise GearError(
            f"gear 'triton': the package kernels in {package.__path__[0]} is not minglm's; wanted the one beside minglm: "
            "run from the repository, uninstall the other one, or use gear 'torch'"
        )


# ---------------------------------------------------------------------------------------------- the naive definitions


@operation
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A projection: x (..., in), weight (out, in), bias (out,) or None -> (..., out)."""
    return F.linear(x, weight, bias)


@operation
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension: x (..., d), weight (d,) -> (..., d).

    The statistic is fp32; the normed value is cast back to x's dtype before it meets the weight (facts, section 2.2).
    """
    x32 = x.float()
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * rstd).to(x.dtype) * weight


@operation
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Partial RoPE: turns the first 2 * p components of each head, pairing component i with i + p (half-split layout).

    x (b, t, heads, d); cos and sin (t, p), fp32 -> (b, t, heads, d) in x's dtype.
    """
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # (t, 1, p), the same for every head
    p = cos.shape[-1]
    first, second, rest = x[..., :p], x[..., p : 2 * p], x[..., 2 * p :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


@operation
def document_mask(document_ids: Tensor) -> Tensor:
    """Which keys a query sees when documents are packed: earlier tokens of its own document. (b, t) -> (b, 1, t, t) bool.

    Made once a step and handed to `attention` in every layer; a gear may return its own form of it.
    """
    t = document_ids.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool, device=document_ids.device).tril()
    return (document_ids[:, None, :, None] == document_ids[:, None, None, :]) & causal


@operation
def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Grouped-query softmax attention, scaled by d^-0.5, softmax in fp32.

    q (b, t, heads, d); k, v (b, s, kv_heads, d). `visible` (b, 1, t, s) bool says which keys a query sees; None means plain
    causal with t == s, or, for a single query t == 1, all of the s keys. -> (b, t, heads, d).
    """
    group = q.shape[2] // k.shape[2]
    k, v = (repeat(x, "b s kv d -> b (kv group) s d", group=group) for x in (k, v))
    scores = rearrange(q, "b t heads d -> b heads t d") @ k.mT * q.shape[-1] ** -0.5
    if visible is None:
        t, s = scores.shape[-2:]
        visible = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    return rearrange(weights @ v, "b heads t d -> b t heads d")


@operation
def router_scores(x: Tensor, weight: Tensor) -> Tensor:
    """How well each expert suits each token, before any bias: x (n, h), weight (e, h) -> (n, e) in 0 to 1, all of it fp32."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.sigmoid(F.linear(x.float(), weight.float()))


@operation
def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The dense feed-forward network: x (..., h), gate and up (i, h), down (h, i) -> (..., h)."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@operation
def routed_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each token through its k experts, weighted and summed: sum_k weights[n, k] * SwiGLU_experts[n, k](x[n]).

    x (n, h); experts (n, k) int64, different ones for a token; weights (n, k); gate_up (e, 2i, h), gate first; down (e, h, i)
    -> (n, h) in x's dtype.
    """
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, slot = torch.where(experts == e)
        gate, up = F.linear(x[token], gate_up[e]).chunk(2, dim=-1)
        row = F.linear(F.silu(gate) * up, down[e])
        out = out.index_add(0, token, row * weights[token, slot, None].to(x.dtype))
    return out


@operation
def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy of softmax(hidden @ weight^T): an fp32 scalar.

    hidden (n, h), weight (v, h), labels (n,) with -100 ignored. The softmax is fp32.
    """
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=-100, reduction="sum")


@operation
def token_log_probs(hidden: Tensor, weight: Tensor, ids: Tensor, temperatures: Tensor | None = None) -> Tensor:
    """Log-probability of each token under softmax(hidden @ weight^T / temperature): hidden (n, h), weight (v, h), ids (n,),
    temperatures (n,) fp32, None for 1 -> (n,) fp32."""
    logits = F.linear(hidden, weight).float()
    if temperatures is not None:
        logits = logits / temperatures[:, None]
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------------- the torch gear


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device. The meta device has none, and torch refuses the question there."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, cast to its dtype. Our autograd functions call matrix products that autocast does not see inside."""
    device = tensors[0].device.type
    if autocasts(device):
        return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
    return tensors


class _RMSNorm(torch.autograd.Function):
    """Few passes over memory: autograd's own backward of the composite takes ten, this one four and two vector products."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, dy: Tensor):
        saved_x, weight, saved_rstd = ctx.saved_tensors
        d = saved_x.shape[-1]
        rstd = saved_rstd.reshape(-1, 1)
        x, dy, w = saved_x.reshape(-1, d).to(rstd.dtype), dy.reshape(-1, d).to(rstd.dtype), weight.to(rstd.dtype)
        product = dy * x
        dweight = (rstd.t() @ product)[0]
        # y = x * rstd * w, rstd = (mean(x^2) + eps)^-1/2:  dx = rstd * dy * w - x * rstd^3 * mean(dy * w * x)
        mean = (product @ w)[:, None] / d
        dx = torch.addcmul(x * (mean * rstd.pow(3)).neg_(), dy * rstd, w)
        return dx.to(saved_x.dtype).view_as(saved_x), dweight.to(weight.dtype), None


@register("rms_norm", "torch")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _RMSNorm.apply(x, weight, eps)


class _Rotary(torch.autograd.Function):
    """RoPE into one fresh buffer; the backward pass is the turn by the opposite angle."""

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
        p = cos.shape[-1]
        first, second = x[..., :p], x[..., p : 2 * p]
        out = torch.empty_like(x)
        torch.mul(first, cos, out=out[..., :p]).addcmul_(second, sin, value=-direction)
        torch.mul(second, cos, out=out[..., p : 2 * p]).addcmul_(first, sin, value=direction)
        out[..., 2 * p :] = x[..., 2 * p :]
        return out

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        ctx.save_for_backward(cos, sin)
        return _Rotary.turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _Rotary.turn(dy, *ctx.saved_tensors, -1), None, None


@register("rotary", "torch")
def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _Rotary.apply(x, cos, sin)


@functools.cache
def _compiled_flex_attention() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


@register("document_mask", "torch")
def _document_mask(document_ids: Tensor) -> Tensor | BlockMask:
    if document_ids.device.type != "cuda":
        return _implementations["document_mask"]["naive"](document_ids)
    b, t = document_ids.shape

    def same_document(b, _head, query, key):
        return (query >= key) & (document_ids[b, query] == document_ids[b, key])

    # Blocks of 128 x 128 that are all hidden are never computed, and t x t booleans never exist: 16 GiB at 128K tokens.
    return create_block_mask(same_document, b, None, t, t, device=document_ids.device)


@register("attention", "torch")
def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | BlockMask | None) -> Tensor:
    q, k, v = in_autocast_dtype(q, k, v)
    t, s = q.shape[1], k.shape[1]
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type == "cpu" and training and t == s:
        first_keys = _TiledAttention.first_keys(t, q.shape[0], visible)
        if _TiledAttention.fits(t, first_keys):
            return _TiledAttention.apply(q, k, v, visible, first_keys)
    q, k, v = (rearrange(x, "b t heads d -> b heads t d") for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if isinstance(visible, BlockMask):
        out = _compiled_flex_attention()(q, k, v, block_mask=visible, enable_gqa=grouped)
    else:
        causal = visible is None and t > 1
        out = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, enable_gqa=grouped)
    return rearrange(out, "b heads t d -> b t heads d")


class _TiledAttention(torch.autograd.Function):
    """Training attention for CPUs: PyTorch's flash kernel takes 1.6 to 1.9 times as long for up to 2,048 tokens, and more where
    documents are packed.

    Queries go in tiles of 64 rows against the keys from the first that any of them sees up to the tile's end, so nearly half
    of the square is never computed, and of packed documents hardly more than their own squares. All query heads of a group
    share one matrix product with their keys. A tile's weights are kept for the backward pass: they fit in the cache now and
    save a product and a softmax then. Kept are heads * 4 bytes a score; where that is more than causal attention to `longest`
    tokens has, the flash kernel takes over.

    Inside, a stack of m = b * kv_heads (sequence, key head) pairs is worked on, a few sequences at a time: as many as have
    2 MB of scores, which is what the cores' own caches hold.
    """

    tile = 64
    longest = 2048
    scores_at_once = 2**19

    @staticmethod
    def fold(x: Tensor, kv_heads: int) -> Tensor:
        """(b, t, heads, d) -> (tiles, m, group * tile, d), padded with zeros to whole tiles."""
        tile = _TiledAttention.tile
        if x.shape[1] % tile:
            x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % tile))
        x = rearrange(x, "b (n tile) (kv g) d -> n (b kv) (g tile) d", tile=tile, kv=kv_heads)
        return x.clone(memory_format=torch.contiguous_format)  # always a copy: the queries are then scaled in place

    @staticmethod
    def unfold(x: Tensor, t: int, kv_heads: int) -> Tensor:
        tile = _TiledAttention.tile
        return rearrange(x, "n (b kv) (g tile) d -> b (n tile) (kv g) d", tile=tile, kv=kv_heads)[:, :t]

    @staticmethod
    def first_keys(t: int, b: int, visible: Tensor | None) -> list[list[int]]:
        """For each tile of queries and each sequence: the first key that any of the tile's queries sees."""
        starts = range(0, t, _TiledAttention.tile)
        if visible is None or isinstance(visible, FakeTensor):  # which has no values to look at
            return [[0] * b for _ in starts]
        seen = visible[:, 0].expand(b, t, t).view(torch.uint8)
        return [seen[:, start : start + _TiledAttention.tile].amax(1).argmax(-1).tolist() for start in starts]

    @staticmethod
    def fits(t: int, first_keys: list[list[int]]) -> bool:
        """Whether the weights of one sequence are few enough to be kept."""
        tile, longest = _TiledAttention.tile, _TiledAttention.longest
        scores = sum(tile * (min((n + 1) * tile, t) - min(first, default=0)) for n, first in enumerate(first_keys))
        return scores <= longest * (longest + tile) // 2

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, first_keys: list[list[int]]) -> Tensor:
        (b, t, heads, d), kv_heads = q.shape, k.shape[2]
        tile, group = _TiledAttention.tile, heads // kv_heads
        q = _TiledAttention.fold(q, kv_heads).mul_(d**-0.5)
        k, v = (rearrange(x, "b t kv d -> (b kv) t d").contiguous() for x in (k, v))
        out, kept = torch.empty_like(q), []
        future = torch.full((tile, tile), float("-inf"), dtype=q.dtype).triu_(1)
        if visible is not None:
            visible = visible.expand(b, 1, t, t)  # a mask may be one for the whole batch
        sequences = max(1, _TiledAttention.scores_at_once // max(1, heads * tile * t))
        work = []  # the pairs and the keys of each product
        for n in range(q.shape[0]):
            for first in range(0, b, sequences):
                last = min(first + sequences, b)
                keys = slice(min(first_keys[n][first:last]), min((n + 1) * tile, t))
                work.append((n, slice(first * kv_heads, last * kv_heads), keys))
        for n, pairs, keys in work:
            start, end, width = n * tile, keys.stop, keys.stop - keys.start
            scores = torch.bmm(q[n, pairs], k[pairs, keys].mT)  # (pairs, group * tile, width)
            if visible is None:
                scores.view(-1, group, tile, width)[..., start:] += future[:, : end - start]
            else:
                seen = visible[pairs.start // kv_heads : pairs.stop // kv_heads, :, None, start:end, keys]
                hidden = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, float("-inf"))
                scores.view(-1, kv_heads, group, tile, width)[:, :, :, : end - start] += hidden
            weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
            torch.bmm(weights, v[pairs, keys], out=out[n, pairs])
            kept.append(weights)
        ctx.kv_heads, ctx.work = kv_heads, work
        ctx.save_for_backward(q, k, v, *kept)
        return _TiledAttention.unfold(out, t, kv_heads)

    @staticmethod
    def backward(ctx, dout: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        t, d = k.shape[1:]
        dout = _TiledAttention.fold(dout, ctx.kv_heads)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (n, pairs, keys), weights in zip(ctx.work, kept, strict=True):
            dv[pairs, keys] += torch.bmm(weights.mT, dout[n, pairs])
            dweights = torch.bmm(dout[n, pairs], v[pairs, keys].mT)
            dscores = torch._softmax_backward_data(dweights, weights, -1, q.dtype)
            torch.bmm(dscores, k[pairs, keys], out=dq[n, pairs])
            dk[pairs, keys] += torch.bmm(dscores.mT, q[n, pairs])
        dq = _TiledAttention.unfold(dq.mul_(d**-0.5), t, ctx.kv_heads)
        dk, dv = (rearrange(x, "(b kv) t d -> b t kv d", kv=ctx.kv_heads) for x in (dk, dv))
        return dq, dk, dv, None, None


def _swiglu_forward(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: gate_up (rows, 2i) -> (rows, i)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(dact: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of silu(gate) * up: that of gate_up, (rows, 2i), and the activation again, (rows, i)."""
    gate, up = gate_up.chunk(2, dim=-1)
    dgate_up = torch.empty_like(gate_up)
    dgate, dup = dgate_up.chunk(2, dim=-1)
    act = F.silu(gate)
    torch.mul(dact, act, out=dup)
    torch.ops.aten.silu_backward.grad_input(dact * up, gate, grad_input=dgate)
    return dgate_up, act.mul_(up)


class _SwiGLU(torch.autograd.Function):
    """Gate and up projections side by side in one buffer, kept; the activation is cheap and is made again going back."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        width = gate.shape[0]
        gate_up = x.new_empty(x.shape[0], 2 * width)
        torch.mm(x, gate.t(), out=gate_up[:, :width])
        torch.mm(x, up.t(), out=gate_up[:, width:])
        ctx.save_for_backward(x, gate, up, down, gate_up)
        return _swiglu_forward(gate_up) @ down.t()

    @staticmethod
    def backward(ctx, dout: Tensor):
        x, gate, up, down, gate_up = ctx.saved_tensors
        dgate_up, act = _swiglu_backward(dout @ down, gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        dx = torch.mm(dgate, gate).addmm_(dup, up)
        return dx, dgate.t() @ x, dup.t() @ x, dout.t() @ act


@register("swiglu", "torch")
def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x, gate, up, down = in_autocast_dtype(x, gate, up, down)
    flat = x.reshape(-1, x.shape[-1])  # (tokens, h)
    return _SwiGLU.apply(flat, gate, up, down).reshape(*x.shape[:-1], down.shape[0])


def sort_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows are the n * k (token, expert) pairs, sorted by expert. experts (n, k) -> which slot n * k + k each row comes from,
    (r,); which row each slot has become, (n, k); where each expert's rows end, (e,). All int64, without a host sync."""
    sorted_experts, slot_of_row = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_experts, torch.arange(num_experts, device=experts.device), right=True)
    row_of_slot = torch.empty_like(slot_of_row)
    row_of_slot[slot_of_row] = torch.arange(len(slot_of_row), device=experts.device)
    return slot_of_row, row_of_slot.view_as(experts), ends


def _sum_rows(rows: Tensor, row_of_slot: Tensor) -> Tensor:
    """Sum each token's k rows: (r, h) -> (n, h). A bag of embeddings is "gather and sum" without the gathered copy, and in a
    fixed order; index_add is neither."""
    return F.embedding_bag(row_of_slot, rows, mode="sum")


class _RoutedExperts(torch.autograd.Function):
    """For CPUs: one matrix product an expert and projection, written straight into its slice of a shared buffer.

    An expert's tokens are gathered just before they are needed and are still in the cache then; all rows at once would
    go through main memory, forward and backward. The router's weights scale the activation, which is narrower than the
    result. Going back, the activation is made again (cheap) from the gate and up projections (kept). The loops' length
    is the number of experts, never the data's.
    """

    @staticmethod
    def forward(ctx, x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        slot_of_row, row_of_slot, ends = sort_by_expert(experts, gate_up.shape[0])
        ends = ends.tolist()
        pieces = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        token_of_row = slot_of_row // experts.shape[1]
        tokens = [token_of_row[piece] for piece in pieces]  # each expert's
        weights = weights.flatten()[slot_of_row, None]  # (r, 1)

        hidden = x.new_empty(len(slot_of_row), gate_up.shape[1])
        for piece, token, w_in in zip(pieces, tokens, gate_up.unbind(), strict=True):
            torch.mm(x.index_select(0, token), w_in.t(), out=hidden[piece])
        act = _swiglu_forward(hidden).mul_(weights)
        rows = x.new_empty(len(slot_of_row), x.shape[1])
        for piece, w_out in zip(pieces, down.unbind(), strict=True):
            torch.mm(act[piece], w_out.t(), out=rows[piece])
        ctx.pieces, ctx.tokens = pieces, tokens
        ctx.save_for_backward(x, weights, gate_up, down, hidden, row_of_slot)
        return _sum_rows(rows, row_of_slot)

    @staticmethod
    def backward(ctx, dout: Tensor):
        x, weights, gate_up, down, hidden, row_of_slot = ctx.saved_tensors
        dout = dout.contiguous()
        dact = hidden.new_empty(hidden.shape[0], down.shape[-1])  # of the weighted activation
        for piece, token, w_out in zip(ctx.pieces, ctx.tokens, down.unbind(), strict=True):
            torch.mm(dout.index_select(0, token), w_out, out=dact[piece])
        dhidden, act = _swiglu_backward(dact * weights, hidden)
        dweights = dact.mul_(act).sum(-1)[row_of_slot]
        act.mul_(weights)
        drows, dgate_up, ddown = x.new_empty(hidden.shape[0], x.shape[1]), torch.empty_like(gate_up), torch.empty_like(down)
        each = zip(ctx.pieces, ctx.tokens, gate_up.unbind(), dgate_up.unbind(), ddown.unbind(), strict=True)
        for piece, token, w_in, dw_in, dw_out in each:
            torch.mm(dout.index_select(0, token).t(), act[piece], out=dw_out)
            torch.mm(dhidden[piece].t(), x.index_select(0, token), out=dw_in)
            torch.mm(dhidden[piece], w_in, out=drows[piece])
        return _sum_rows(drows, row_of_slot), None, dweights, dgate_up, ddown


class _GatherRows(torch.autograd.Function):
    """Copies of tokens, (n, h) -> (r, h); the backward pass is the sum below and not an index_put, which would sort again."""

    @staticmethod
    def forward(ctx, x: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_slot)
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx, drows: Tensor):
        return _sum_rows(drows.contiguous(), *ctx.saved_tensors), None, None


class _SumRows(torch.autograd.Function):
    """The sum of each token's rows, (r, h) -> (n, h): the transpose of `_GatherRows`."""

    @staticmethod
    def forward(ctx, rows: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row)
        return _sum_rows(rows, row_of_slot)

    @staticmethod
    def backward(ctx, dout: Tensor):
        return dout.index_select(0, *ctx.saved_tensors), None, None


def gather_rows(x: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    """A copy of its token for each row, (n, h) -> (r, h), where `sort_by_expert` has brought the rows into order."""
    return _GatherRows.apply(x, token_of_row, row_of_slot)


def sum_rows(rows: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    """The sum of each token's rows, (r, h) -> (n, h): the transpose of `gather_rows`."""
    return _SumRows.apply(rows, token_of_row, row_of_slot)


def _grouped_products(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """For GPUs: one grouped product a projection. Where the groups end stays on the device, so the host never waits."""
    slot_of_row, row_of_slot, ends = sort_by_expert(experts, gate_up.shape[0])
    ends = ends.to(torch.int32)
    token_of_row = slot_of_row // experts.shape[1]
    rows = gather_rows(x, token_of_row, row_of_slot)
    gate, up = F.grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, dim=-1)
    act = F.silu(gate) * up * weights.flatten()[slot_of_row, None]
    return sum_rows(F.grouped_mm(act, down.mT, offs=ends), token_of_row, row_of_slot)


@register("routed_experts", "torch")
def _routed_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    x, gate_up, down = in_autocast_dtype(x, gate_up, down)
    weights = weights.to(x.dtype)
    run = _grouped_products if x.device.type == "cuda" else _RoutedExperts.apply
    return run(x, experts, weights, gate_up, down)


class _LinearCrossEntropy(torch.autograd.Function):
    """Chunks of tokens: logits, loss and both gradients at once, so that (n, v) logits never exist and are made only once."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # Logits of a chunk: 4 MB on a CPU, so that they stay in its cache; up to 256 MB elsewhere.
        elements = 2**20 if hidden.device.type == "cpu" else 2**26
        chunk = max(64, elements // weight.shape[0])
        want_hidden, want_weight, _ = ctx.needs_input_grad
        dhidden = torch.empty_like(hidden) if want_hidden else None
        # Sums over chunks are fp32, whatever the weights are.
        dweight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, max(1, hidden.shape[0]), chunk):
            x, target = hidden[start : start + chunk], labels[start : start + chunk, None]
            kept = target != -100
            target = target.masked_fill(~kept, 0)
            logp = (x @ weight.t()).float().log_softmax(-1)  # (chunk, v)
            total -= (logp.gather(1, target) * kept).sum()
            if not (want_hidden or want_weight):
                continue
            # d loss / d logits = softmax - one_hot; an ignored token has none, which its row of x and dhidden say cheaper.
            dlogits = logp.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32)).to(x.dtype)
            if want_hidden:
                rows = dhidden[start : start + chunk]
                torch.mm(dlogits, weight, out=rows).mul_(kept)
            if want_weight and weight.dtype == torch.float32:
                dweight.addmm_(dlogits.t(), x * kept)
            elif want_weight:
                dweight += dlogits.t() @ (x * kept)
        ctx.save_for_backward(dhidden, dweight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, dtotal: Tensor):
        dhidden, dweight = ctx.saved_tensors
        return (
            None if dhidden is None else dhidden * dtotal.to(dhidden.dtype),
            None if dweight is None else (dweight * dtotal).to(ctx.dtype),
            None,
        )


@register("linear_cross_entropy", "torch")
def _linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    hidden, weight = in_autocast_dtype(hidden, weight)
    hidden, labels = _targets(hidden, labels)
    return _LinearCrossEntropy.apply(hidden, weight, labels)


def _targets(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """On a CPU those that have a label alone, a quarter of what SFT reads; elsewhere the host would wait for their number."""
    if hidden.device.type != "cpu":
        return hidden, labels
    rows = (labels != -100).nonzero()[:, 0]
    return hidden.index_select(0, rows), labels[rows]
