"""The hot operations of GLM-4.5, each named once, and the choice of gear that runs them.

Every operation below is *defined* by its naive form: a few lines of plain PyTorch to check against the paper. A faster
gear replaces an operation behind the same signature: `torch` (PyTorch's fused operations and hand-written backward
passes, the default) and `triton` (the kernels in `kernels/`, which register themselves here). An operation that a gear
lacks falls back to the gear before it. The model calls `ops.rms_norm(...)` and never knows.

Shapes: b batch, t sequence, n = b * t tokens, h hidden, k experts per token, r = n * k routed rows, e experts,
i width of an expert, v vocabulary.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

GEARS = ("naive", "torch", "triton")  # each falls back to the one before it

_implementations: dict[str, dict[str, Callable]] = {}
_gear = "torch"


def operation(naive: Callable) -> Callable:
    """Declare an operation by its naive definition; the returned function runs it in the gear in use."""
    name = naive.__name__
    _implementations[name] = {"naive": naive}

    @functools.wraps(naive)
    def run(*args, **kwargs):
        table = _implementations[name]
        for gear in GEARS[GEARS.index(_gear) :: -1]:
            if gear in table:
                return table[gear](*args, **kwargs)

    return run


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
    """Run everything inside in `gear`: "naive", "torch" or "triton". Process-wide, not per thread."""
    global _gear
    _check_gear(gear)
    before, _gear = _gear, gear
    try:
        yield
    finally:
        _gear = before


def _check_gear(gear: str) -> None:
    if gear not in GEARS:
        raise ValueError(f"gear {gear!r} does not exist; wanted one of {', '.join(GEARS)}")


# ---------------------------------------------------------------------------------------------- the naive definitions


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
def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The dense feed-forward network: x (..., h), gate and up (i, h), down (h, i) -> (..., h)."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@operation
def gather_rows(x: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    """Copy each token to the rows of its experts: x (n, h), token_of_row (r,) -> (r, h).

    `row_of_slot` (n, k), the inverse map, is for the backward pass: a token's gradient is the sum over its k rows.
    """
    return x[token_of_row]


@operation
def grouped_swiglu(rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Every expert's SwiGLU on its own rows: rows (r, h), sorted by expert; expert e owns rows ends[e-1] to ends[e].

    ends (e,) int; gate_up (e, 2i, h), gate first; down (e, h, i) -> (r, h). Rows from ends[-1] on belong to nobody and give 0.
    """
    out = torch.zeros_like(rows)
    start = 0
    for e, end in enumerate(ends.tolist()):
        gate, up = F.linear(rows[start:end], gate_up[e]).chunk(2, dim=-1)
        out[start:end] = F.linear(F.silu(gate) * up, down[e])
        start = end
    return out


@operation
def combine_rows(rows: Tensor, weights: Tensor, row_of_slot: Tensor, token_of_row: Tensor) -> Tensor:
    """Weighted sum of each token's expert outputs: rows (r, h), weights and row_of_slot (n, k) -> (n, h) in rows' dtype.

    `token_of_row` (r,), the inverse map, is for the backward pass.
    """
    return torch.einsum("nk,nkh->nh", weights.to(rows.dtype), rows[row_of_slot])


@operation
def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy of softmax(hidden @ weight^T): an fp32 scalar.

    hidden (n, h), weight (v, h), labels (n,) with -100 ignored. The softmax is fp32.
    """
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, ignore_index=-100, reduction="sum")


# ------------------------------------------------------------------------------------------------------- the torch gear


def _in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, cast to its dtype. Our autograd functions call matrix products that autocast does not see inside."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
    return tensors


class _RMSNorm(torch.autograd.Function):
    """One pass forward, three backward; autograd's own backward of the composite takes ten."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, rstd = ctx.saved_tensors
        normed = x * rstd  # fp32: rstd is
        dy_x = dy * normed
        dweight = dy_x.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        # d/dx of x * rstd(x):  rstd * (g - normed * mean(g * normed))  with  g = dy * weight
        mean = (dy_x @ weight.to(dy_x.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        dx = torch.addcmul(dy * weight, normed, mean, value=-1).mul_(rstd)
        return dx.to(x.dtype), dweight, None


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
    q, k, v = _in_autocast_dtype(q, k, v)
    t, s = q.shape[1], k.shape[1]
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type == "cpu" and training and t == s <= _TiledAttention.longest:
        return _TiledAttention.apply(q, k, v, visible)
    q, k, v = (rearrange(x, "b t heads d -> b heads t d") for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if isinstance(visible, BlockMask):
        out = _compiled_flex_attention()(q, k, v, block_mask=visible, enable_gqa=grouped)
    else:
        causal = visible is None and t > 1
        out = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, enable_gqa=grouped)
    return rearrange(out, "b heads t d -> b t heads d")


class _TiledAttention(torch.autograd.Function):
    """Training attention for CPUs and sequences up to `longest`: PyTorch's flash kernel takes 1.3 to 1.7 times as long there.

    Queries go in tiles of 64 rows against the keys up to the tile's end, so nearly half of the square is never computed.
    All query heads of a group share one matrix product with their keys. A tile's weights are kept for the backward pass:
    they fit in the cache now and save a product and a softmax then. The kept weights take heads * t^2 * 2 bytes a sequence,
    which is why longer sequences go to the flash kernel.
    """

    tile = 64
    longest = 1024

    @staticmethod
    def fold(x: Tensor, kv_heads: int) -> Tensor:
        """(b, t, heads, d) -> (tiles, b, kv_heads, group * tile, d), padded with zeros to whole tiles."""
        tile = _TiledAttention.tile
        x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % tile))
        return rearrange(x, "b (n tile) (kv g) d -> n b kv (g tile) d", tile=tile, kv=kv_heads).contiguous()

    @staticmethod
    def unfold(x: Tensor, t: int) -> Tensor:
        tile = _TiledAttention.tile
        return rearrange(x, "n b kv (g tile) d -> b (n tile) (kv g) d", tile=tile)[:, :t]

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        (b, t, heads, d), kv_heads = q.shape, k.shape[2]
        tile, group = _TiledAttention.tile, heads // kv_heads
        q = _TiledAttention.fold(q, kv_heads).mul_(d**-0.5)
        k, v = (rearrange(x, "b t kv d -> b kv t d").contiguous() for x in (k, v))
        out, kept = torch.empty_like(q), []
        future = torch.full((tile, tile), float("-inf"), dtype=q.dtype).triu_(1)
        if visible is not None:
            hidden = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
            hidden = hidden.expand(b, 1, t, t)  # a mask may be one for the whole batch
        for n in range(q.shape[0]):
            start, end = n * tile, min((n + 1) * tile, t)
            for sequence in range(b):
                scores = torch.bmm(q[n, sequence], k[sequence, :, :end].mT)  # (kv, g * tile, end)
                by_head = scores.view(kv_heads, group, tile, end)
                if visible is None:
                    by_head[..., start:] += future[:, : end - start]
                else:
                    by_head[:, :, : end - start] += hidden[sequence, :, start:end, :end]
                weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
                torch.bmm(weights, v[sequence, :, :end], out=out[n, sequence])
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        return _TiledAttention.unfold(out, t)

    @staticmethod
    def backward(ctx, dout: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        b, kv_heads, t, d = k.shape
        dout = _TiledAttention.fold(dout, kv_heads)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for n in range(q.shape[0]):
            end = min((n + 1) * _TiledAttention.tile, t)
            for sequence in range(b):
                weights = kept[n * b + sequence]
                dv[sequence, :, :end].baddbmm_(weights.mT, dout[n, sequence])
                dweights = torch.bmm(dout[n, sequence], v[sequence, :, :end].mT)
                dscores = torch._softmax_backward_data(dweights, weights, -1, q.dtype)
                torch.bmm(dscores, k[sequence, :, :end], out=dq[n, sequence])
                dk[sequence, :, :end].baddbmm_(dscores.mT, q[n, sequence])
        dq = _TiledAttention.unfold(dq.mul_(d**-0.5), t)
        dk, dv = (rearrange(x, "b kv t d -> b t kv d") for x in (dk, dv))
        return dq, dk, dv, None


def _swiglu_forward(gate_up: Tensor, out: Tensor) -> Tensor:
    """silu(gate) * up for gate_up (rows, 2i) into out (rows, i)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.ops.aten.silu.out(gate, out=out).mul_(up)


def _swiglu_backward(dact: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of silu(gate) * up: the gradient of gate_up, and the activation again, (rows, 2i) and (rows, i)."""
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
        return _swiglu_forward(gate_up, x.new_empty(x.shape[0], width)) @ down.t()

    @staticmethod
    def backward(ctx, dout: Tensor):
        x, gate, up, down, gate_up = ctx.saved_tensors
        dgate_up, act = _swiglu_backward(dout @ down, gate_up)
        dgate, dup = dgate_up.chunk(2, dim=-1)
        dx = torch.mm(dgate, gate).addmm_(dup, up)
        return dx, dgate.t() @ x, dup.t() @ x, dout.t() @ act


@register("swiglu", "torch")
def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x, gate, up, down = _in_autocast_dtype(x, gate, up, down)
    flat = x.reshape(-1, x.shape[-1])  # (tokens, h)
    return _SwiGLU.apply(flat, gate, up, down).reshape(*x.shape[:-1], down.shape[0])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_slot)
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx, drows: Tensor):
        (row_of_slot,) = ctx.saved_tensors
        # A bag of embeddings is just "gather and sum", in one pass and in a fixed order (index_add is neither).
        return F.embedding_bag(row_of_slot, drows.contiguous(), mode="sum"), None, None


@register("gather_rows", "torch")
def _gather_rows(x: Tensor, token_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    return _GatherRows.apply(x, token_of_row, row_of_slot)


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor, row_of_slot: Tensor, token_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, row_of_slot, token_of_row)
        return F.embedding_bag(row_of_slot, rows, mode="sum", per_sample_weights=weights.to(rows.dtype))

    @staticmethod
    def backward(ctx, dout: Tensor):
        rows, weights, row_of_slot, token_of_row = ctx.saved_tensors
        drows = dout.index_select(0, token_of_row)  # (r, h)
        dweight_of_row = (drows * rows).sum(-1, dtype=weights.dtype)  # (r,)
        weight_of_row = torch.empty_like(dweight_of_row, dtype=rows.dtype)
        weight_of_row[row_of_slot.flatten()] = weights.flatten().to(rows.dtype)
        drows *= weight_of_row[:, None]
        return drows, dweight_of_row[row_of_slot], None, None


@register("combine_rows", "torch")
def _combine_rows(rows: Tensor, weights: Tensor, row_of_slot: Tensor, token_of_row: Tensor) -> Tensor:
    return _CombineRows.apply(rows, weights, row_of_slot, token_of_row)


class _GroupedSwiGLU(torch.autograd.Function):
    """For CPUs: one matrix product an expert, written straight into its slice, on rows that are still in the cache.

    The loop's length is the number of experts, never the data's. The backward pass recomputes the activation (cheap) from
    the gate and up projections (kept).
    """

    @staticmethod
    def forward(ctx, rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ends = ends.tolist()
        width = down.shape[-1]
        hidden = rows.new_empty(rows.shape[0], 2 * width)
        out = torch.empty_like(rows)
        start = 0
        for end, w_in, w_out in zip(ends, gate_up.unbind(), down.unbind(), strict=True):
            torch.mm(rows[start:end], w_in.t(), out=hidden[start:end])
            act = _swiglu_forward(hidden[start:end], rows.new_empty(end - start, width))
            torch.mm(act, w_out.t(), out=out[start:end])
            start = end
        out[start:] = 0
        ctx.ends = ends
        ctx.save_for_backward(rows, gate_up, down, hidden)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        rows, gate_up, down, hidden = ctx.saved_tensors
        drows, dgate_up, ddown = torch.empty_like(rows), torch.empty_like(gate_up), torch.empty_like(down)
        experts = zip(ctx.ends, gate_up.unbind(), down.unbind(), dgate_up.unbind(), ddown.unbind(), strict=True)
        start = 0
        for end, w_in, w_out, dw_in, dw_out in experts:
            dhidden, act = _swiglu_backward(dout[start:end] @ w_out, hidden[start:end])
            torch.mm(dout[start:end].t(), act, out=dw_out)
            torch.mm(dhidden.t(), rows[start:end], out=dw_in)
            torch.mm(dhidden, w_in, out=drows[start:end])
            start = end
        drows[start:] = 0
        return drows, None, dgate_up, ddown


@register("grouped_swiglu", "torch")
def _grouped_swiglu(rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    rows, gate_up, down = _in_autocast_dtype(rows, gate_up, down)
    run = _grouped_swiglu_on_gpu if rows.device.type == "cuda" else _GroupedSwiGLU.apply
    return run(rows, ends, gate_up, down)


def _grouped_swiglu_on_gpu(rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One grouped product a projection; the group ends stay on the device, so the host never waits."""
    ends = ends.to(torch.int32)
    # The tail that belongs to nobody is uninitialised memory in every product's result (transformers#48205): in the
    # output, and in the gradient of the rows, which the first mask clears on its way back.
    unowned = (torch.arange(rows.shape[0], device=rows.device) >= ends[-1])[:, None]
    rows = rows.masked_fill(unowned, 0)
    gate, up = F.grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends).masked_fill(unowned, 0)


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
        for start in range(0, hidden.shape[0], chunk):
            x, target = hidden[start : start + chunk], labels[start : start + chunk, None]
            kept = target != -100
            target = target.masked_fill(~kept, 0)
            logits = (x @ weight.t()).float()  # (chunk, v)
            logsumexp = logits.logsumexp(-1, keepdim=True)
            total += ((logsumexp - logits.gather(1, target)) * kept).sum()
            if not (want_hidden or want_weight):
                continue
            # d loss / d logits = softmax - one_hot, and nothing for ignored tokens
            dlogits = logits.sub_(logsumexp).exp_()
            dlogits.scatter_add_(1, target, torch.full_like(logsumexp, -1.0)).mul_(kept)
            dlogits = dlogits.to(x.dtype)
            if want_hidden:
                torch.mm(dlogits, weight, out=dhidden[start : start + chunk])
            if want_weight:
                if weight.dtype == torch.float32:
                    dweight.addmm_(dlogits.t(), x)
                else:
                    dweight += dlogits.t() @ x
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
    hidden, weight = _in_autocast_dtype(hidden, weight)
    return _LinearCrossEntropy.apply(hidden, weight, labels)
