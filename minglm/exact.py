"""The exact gear: a token's numbers have the same bits alone, in any batch, in a prefill, chunked, or decoded with a cache.

A trainer that runs a whole sequence at once and an engine that runs it token by token compute the same sums in another
order, and so in other bits: matrix products choose their order by the number of rows, attention by the number of queries
and keys. Importance ratios of RL then differ from 1 where nothing has been learned. This gear fixes the order instead:

- a product is cut into tiles of `ROWS` rows, the last one padded with zeros. All tiles have one shape, so that they run
  through one kernel, in which a row's sum depends neither on the other rows nor on its place among them;
- attention works on blocks of `KEYS` keys from position 0. The blocks' sums are added one after the other, so that later
  blocks, which add zero, change nothing;
- a sum over few terms (a token's experts) is written as additions;
- what PyTorch computes differently at the end of a vector than within it (sigmoid and SiLU on a CPU) is written with the
  exponential, which it does not.

Only values are exact. Gradients are right but not to the bit: they are those of the torch gear, which runs again backward.
Bits are the same for one machine, dtype, device and number of threads, and for fp32, fp64 and bf16; on a GPU tiles go
one by one, so that the library sees the same product each time. `tests/test_exact.py` holds all of this to the bit.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minglm import ops

ROWS = 16  # of a tile: a decoding step pays for all of them, a prefill runs at about 75% of full speed (64 rows: 90%)
KEYS = 64  # of a block of attention
SCORES = 2**21  # scores that attention holds at once: 8 MB
LOGITS = 2**22  # logits held at once: 16 MB


class _ExactForward(torch.autograd.Function):
    """The value from the exact form, the gradients from the torch gear's form of the same operation, which runs again."""

    @staticmethod
    def forward(ctx, name: str, exact: Callable, *arguments) -> Tensor:
        ctx.name = name
        device = arguments[0].device.type
        ctx.autocast = dict(device_type=device, dtype=torch.get_autocast_dtype(device), enabled=ops.autocasts(device))
        ctx.tensors = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
        ctx.others = [None if i in ctx.tensors else x for i, x in enumerate(arguments)]
        ctx.save_for_backward(*(arguments[i] for i in ctx.tensors))
        return exact(*arguments)

    @staticmethod
    def backward(ctx, dout: Tensor):
        arguments, wanted = list(ctx.others), []
        for i, x in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            arguments[i] = x.detach().requires_grad_(ctx.needs_input_grad[i + 2])
            if arguments[i].requires_grad:
                wanted.append(i)
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            out = ops.form(ctx.name, "torch")(*arguments)
        found = torch.autograd.grad(out, [arguments[i] for i in wanted], dout.to(out.dtype))
        gradients = dict(zip(wanted, found, strict=True))
        return None, None, *(gradients.get(i) for i in range(len(arguments)))


def _exact(implementation: Callable) -> Callable:
    """Decorator: the function `_name` is the exact gear's form of operation `name`. It writes its forward pass only."""
    name = implementation.__name__.removeprefix("_")

    def run(*arguments) -> Tensor:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return _ExactForward.apply(name, implementation, *arguments)
        return implementation(*arguments)

    ops.register(name, "exact")(run)
    return implementation


# --------------------------------------------------------------------------------------------------------------- products


def _whole(x: Tensor, *multiples: int) -> Tensor:
    """x, with zeros behind it so that its last dimensions are multiples of these; contiguous, at an aligned address."""
    missing = [-size % multiple for size, multiple in zip(x.shape[-len(multiples) :], multiples, strict=True)]
    if any(missing):
        return F.pad(x, [n for m in reversed(missing) for n in (0, m)])
    x = x.contiguous()
    return x if x.data_ptr() % 64 == 0 else x.clone()  # fp64 products depend on it


def _products(tiles: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """Each tile times one matrix: tiles (n, ROWS, in), matrix (in, out) -> (n, ROWS, out), written into `out` if given."""
    if tiles.device.type == "cpu":
        return torch.bmm(tiles, matrix.expand(len(tiles), -1, -1), out=out)
    # A GPU's library chooses the kernel of a batched product by the size of the batch.
    out = tiles.new_empty(*tiles.shape[:2], matrix.shape[1]) if out is None else out
    for tile, slot in zip(tiles, out, strict=True):
        torch.mm(tile, matrix, out=slot)
    return out


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """x (n, in), weight (out, in) -> (n, out). Sizes that are no multiples of 16 are padded: kernels treat edges apart."""
    tiles = _whole(x, ROWS, 16).view(-1, ROWS, x.shape[1] + -x.shape[1] % 16)
    return _products(tiles, _whole(weight, 16, 16).t()).flatten(0, 1)[: x.shape[0], : weight.shape[0]]


@_exact
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, weight = ops.in_autocast_dtype(x, weight)
    out = _project(x.reshape(-1, x.shape[-1]), weight)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.reshape(*x.shape[:-1], weight.shape[0])


# ----------------------------------------------------------------------------------------------------- row by row, anyway


@_exact
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # PyTorch sums each row by itself, in an order that depends on the memory's layout alone.
    return ops.form("rms_norm", "naive")(x.contiguous(), weight, eps)


# The torch gear's form multiplies and adds in one instruction, with one rounding, but not everywhere in a vector.
ops.register("rotary", "exact")(ops.form("rotary", "naive"))
ops.register("document_mask", "exact")(ops.form("document_mask", "naive"))


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _silu(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (1 + torch.exp(-wide))).to(x.dtype)


@_exact
def _router_scores(x: Tensor, weight: Tensor) -> Tensor:
    return _sigmoid(_project(x.float(), weight.float()))


# -------------------------------------------------------------------------------------------------------------- attention


@_exact
def _attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    q, k, v = ops.in_autocast_dtype(q, k, v)
    (b, t, heads, d), (s, kv_heads) = q.shape, k.shape[1:3]
    group = heads // kv_heads
    if not q.numel():
        return torch.empty_like(q)
    # All heads of a group share their keys: their queries are rows of the same tiles, in the order of their positions.
    q = (q * d**-0.5).view(b, t, kv_heads, group, d).transpose(1, 2).reshape(b * kv_heads, t * group, d)
    q = _whole(q, ROWS, 16).unflatten(1, (-1, ROWS))  # (pairs, tiles, ROWS, d), one pair a sequence and key head
    k, v = (_whole(x.transpose(1, 2).flatten(0, 1), KEYS, 16).unflatten(1, (-1, KEYS)) for x in (k, v))
    out = q.new_empty(q.shape)
    at_once = max(1, SCORES // max(1, b * heads * (s + KEYS)) * group // ROWS)  # tiles
    for tiles in range(0, q.shape[1], at_once):
        piece = slice(tiles, tiles + at_once)
        rows = torch.arange(tiles * ROWS, min((tiles + at_once) * ROWS, t * group), device=q.device)
        out[:, piece] = _attend(q[:, piece], k, v, _visible_to(rows // group, visible, t, s), kv_heads)
    return rearrange(out.flatten(1, 2)[:, : t * group, :d], "(b kv) (t g) d -> b t (kv g) d", kv=kv_heads, g=group)


def _visible_to(positions: Tensor, visible: Tensor | None, t: int, s: int) -> Tensor:
    """The keys that the queries at these positions see: positions (r,) among t queries behind s - t keys -> (b or 1, r, s)."""
    if visible is not None:
        return visible[:, 0, positions] if visible.shape[2] > 1 else visible[:, 0].expand(-1, len(positions), -1)
    keys = torch.arange(s, device=positions.device)
    return (positions[:, None] + (s - t) >= keys)[None]


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, kv_heads: int) -> Tensor:
    """q (pairs, tiles, ROWS, d), k and v (pairs, blocks, KEYS, d), visible (b or 1, rows, s) -> as q.

    Two passes, since the largest score is the same in any order: then exp(score - largest), and its sums block after block.
    """
    blocks = k.shape[1]
    if q.shape[1] > 1:  # blocks that no query sees would add zero
        seen = visible.flatten(0, 1).any(0).nonzero()
        blocks = 0 if len(seen) == 0 else int(seen[-1]) // KEYS + 1
        k, v = k[:, :blocks], v[:, :blocks]
    rows, keys = q.shape[1] * ROWS, blocks * KEYS
    visible = visible[..., :keys]
    visible = F.pad(visible, (0, keys - visible.shape[-1], 0, rows - visible.shape[1]))
    hidden = (~visible).view(-1, 1, q.shape[1], ROWS, blocks, KEYS).movedim(4, 2)  # (b, 1, blocks, tiles, ROWS, KEYS)

    scores = _blockwise(q[:, None].expand(-1, blocks, -1, -1, -1), k.mT).float()  # (pairs, blocks, tiles, ROWS, KEYS)
    scores.unflatten(0, (-1, kv_heads)).masked_fill_(hidden, float("-inf"))
    largest = scores.amax((1, 4), keepdim=True) if blocks else scores.new_zeros(())
    # A row that sees nothing, such as a tile's padding, becomes 0 / 0 and not -inf - -inf on the way.
    weights = scores.sub_(largest.clamp(min=torch.finfo(scores.dtype).min)).exp_()
    sums = weights.sum(-1, keepdim=True)
    values = _blockwise(weights.to(q.dtype), v)  # (pairs, blocks, tiles, ROWS, d)
    total = sums.new_zeros(*q.shape[:3], 1)
    out = torch.zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for block in range(blocks):
        total += sums[:, block]
        out += values[:, block]
    return (out / total).to(q.dtype)


def _blockwise(rows: Tensor, matrices: Tensor) -> Tensor:
    """rows (pairs, blocks, tiles, ROWS, x), matrices (pairs, blocks, x, y) -> (pairs, blocks, tiles, ROWS, y)."""
    pairs, blocks, tiles = rows.shape[:3]
    if tiles == 1 and rows.device.type == "cpu":  # decoding: one batch of products
        return torch.bmm(rows.reshape(-1, ROWS, rows.shape[-1]), matrices.flatten(0, 1)).view(pairs, blocks, 1, ROWS, -1)
    out = rows.new_empty(*rows.shape[:-1], matrices.shape[-1])
    for pair in range(pairs):
        for block in range(blocks):
            _products(rows[pair, block], matrices[pair, block], out[pair, block])
    return out


# --------------------------------------------------------------------------------------------------- feed-forward networks


@_exact
def _swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x, gate, up, down = ops.in_autocast_dtype(x, gate, up, down)
    flat = x.reshape(-1, x.shape[-1])
    out = _project(_silu(_project(flat, gate)) * _project(flat, up), down)
    return out.reshape(*x.shape[:-1], down.shape[0])


@_exact
def _routed_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Rows sorted by expert, each expert's rows in tiles of their own."""
    x, gate_up, down = ops.in_autocast_dtype(x, gate_up, down)
    (n, h), k, width = x.shape, experts.shape[1], down.shape[2]
    if 0 < n * k <= ROWS and x.device.type == "cpu":
        return _few_routed(x, experts.flatten(), weights.to(x.dtype).view(-1, 1), gate_up, down)
    slot_of_row, row_of_slot, ends = ops.sort_by_expert(experts, gate_up.shape[0])
    counts = ends.diff(prepend=ends.new_zeros(1))
    last_tiles = ((counts + ROWS - 1) // ROWS).cumsum(0)
    # Where each row stands among the tiles: behind the padding of all experts before its own.
    padding = (last_tiles * ROWS - ends).roll(1).index_fill_(0, ends.new_zeros(1), 0)
    place = torch.arange(n * k, device=x.device) + padding.repeat_interleave(counts, output_size=n * k)
    last_tiles = last_tiles.tolist()
    rows = x.new_zeros(last_tiles[-1] * ROWS, h + -h % 16)
    rows[place, :h] = x[slot_of_row // k]
    weight_of_row = x.new_zeros(len(rows), 1)
    weight_of_row[place, 0] = weights.to(x.dtype).flatten()[slot_of_row]

    hidden = _grouped(rows, gate_up, last_tiles)
    act = _silu(hidden[:, :width]).mul_(hidden[:, width : 2 * width]).mul_(weight_of_row)
    rows = _grouped(_whole(act, 16), down, last_tiles)
    # A bag of embeddings adds a token's rows in their order.
    return F.embedding_bag(place[row_of_slot], rows, mode="sum")[:, :h]


def _few_routed(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Decoding: each pair of token and expert has a tile and a copy of its expert, so there is nothing to sort or to loop over.

    experts (n * k,), weights (n * k, 1).
    """
    (n, h), r, width = x.shape, len(experts), down.shape[2]
    tiles = x.new_zeros(r, ROWS, h + -h % 16)
    tiles.view(n, -1, ROWS, tiles.shape[2])[:, :, 0, :h] = x[:, None]
    hidden = torch.bmm(tiles, _whole(gate_up[experts], 16, 16).mT)[:, 0]
    act = x.new_zeros(r, ROWS, width + -width % 16)
    act[:, 0, :width] = _silu(hidden[:, :width]).mul_(hidden[:, width : 2 * width]).mul_(weights)
    rows = torch.bmm(act, _whole(down[experts], 16, 16).mT)[:, 0].contiguous()
    return F.embedding_bag(torch.arange(r).view(n, -1), rows, mode="sum")[:, :h]


def _grouped(rows: Tensor, matrices: Tensor, last_tiles: list[int]) -> Tensor:
    """Each expert's tiles times its matrix: rows (tiles * ROWS, in), matrices (e, out, in) -> (tiles * ROWS, out), padded."""
    tiles = rows.view(-1, ROWS, rows.shape[1])
    matrices = _whole(matrices, 16, 16)
    out = rows.new_empty(*tiles.shape[:2], matrices.shape[1])
    for start, end, matrix in zip([0, *last_tiles], last_tiles, matrices.unbind(), strict=False):
        if start < end:
            _products(tiles[start:end], matrix.t(), out[start:end])
    return out.flatten(0, 1)


# ------------------------------------------------------------------------------------------------------- the head and loss


@_exact
def _token_log_probs(hidden: Tensor, weight: Tensor, ids: Tensor, temperatures: Tensor | None = None) -> Tensor:
    hidden, weight = ops.in_autocast_dtype(hidden, weight)
    chunk = max(1, LOGITS // (weight.shape[0] * ROWS)) * ROWS
    out = hidden.new_empty(len(ids), dtype=torch.float32)
    for start in range(0, len(ids), chunk):
        piece = slice(start, start + chunk)
        # PyTorch takes a row's largest logit and sum by itself.
        logits = _project(hidden[piece], weight).float()
        if temperatures is not None:
            logits = logits / temperatures[piece, None]
        out[piece] = logits.log_softmax(-1).gather(1, ids[piece, None])[:, 0]
    return out


@_exact
def _linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    kept = labels != -100
    return -_token_log_probs(hidden, weight, labels.masked_fill(~kept, 0)).masked_fill(~kept, 0).sum()
