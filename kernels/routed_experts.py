"""The routed experts in Triton: grouped products with SwiGLU inside, forward and backward.

Every token goes to k of e experts, each a SwiGLU network of its own. Taken expert by expert that is 3 e small products, too
many launches and each too small to fill a GPU; taken as one batched product, each expert would be padded to the busiest
one. Grouped instead: the n * k (token, expert) pairs are *rows*, sorted by expert (`ops.sort_by_expert`), and one launch
runs all experts' products, tile by tile.

**A block finds its rows on the device.** A tile has rows of one expert only, so where tiles start depends on the data, but
the host must not wait to learn it. The launch has the fixed number of floor(r / m) + e row blocks, m rows each. Expert x,
whose rows are begin to end, takes block floor(begin / m) + x and those that follow; the next expert's start at
floor(end / m) + x + 1, and ceil((end - begin) / m) blocks always fit between. So a block's expert is the number of experts
whose successor starts at or before it: one load of `ends`, a comparison, a sum. Blocks left over (at most e) return at once.

**What is fused**, in the order of the data:

    forward    gate_up   gathers tokens' rows *inside* the product (no gathered copy), makes gate and up of the same columns
                         side by side, and writes act = silu(gate) * up * router weight; gate and up are kept for later
               down      act times the down matrix, one row for each token and expert
                         (then `ops.sum_rows`: the sum of each token's rows, in a fixed order)
    backward   dact      gathers dout's rows inside the product with the down matrix; from the gradient of act and the kept
                         gate and up it makes those of gate and up, act once more, and the router weights' gradient
               drows     the gradients of gate and up times the gate_up matrix (then `ops.sum_rows`)
               dmatrix   twice, once a matrix: sums over the expert's rows, a ragged inner dimension; zeros without rows

The router's weight scales act (width i), not the result (width h): the same sum, fewer numbers.

**Memory traffic**, GLM-4.5 (h = 5,120, i = 1,536, e = 160, k = 8), bf16, 4,096 tokens on one device, forward: the matrices
are 7.5 GB and are read once, whatever is done; r = 32,768 rows. Beside them
    this file     x 0.04 GB (the cache catches its k-fold reading), gate and up 0.20, act written and read 0.20,
                  rows written and read 0.67, result 0.04: 1.2 GB in 3 launches
    torch gear    gathered copy written and read 0.68, silu and the two products as passes of their own 0.70: 2.4 GB in 8
    naive gear    passes for each expert, and `index_add` copies the whole result each time: 17 GB in 2,000 launches, and the
                  host waits for each expert's token numbers
An expert sees 205 tokens then, which is 205 operations a byte of its matrices: below the 295 that an H100 needs to be busy.
More tokens per expert make it fast: longer micro-batches, or expert parallelism (20 experts a device and the tokens of 8
devices: 1,640). The programs of one row block are neighbours, so its rows are fetched once for all columns, and an expert's
row blocks follow each other while its matrix is in the cache. `python -m kernels.compile` prints operations and bytes of
each kernel.

**Exactness.** Sums are fp32 and fp32 inputs are multiplied exactly ("ieee", not TF32). gate, up, act and rows are rounded to
the inputs' dtype where they are written, and the backward pass starts from the rounded ones. No atomics: the same inputs
give the same bits. Rows are counted in 32 bits, but each offset into a stack of matrices or a buffer of rows is made in 64:
GLM-4.5's gate_up stack has 2,516,582,400 elements, more than 2^31 (Liger-Kernel#1296, flashinfer#2853). Inside one tile or
one matrix 32 bits are enough, and cost half the registers: the 64-bit part of an address is the same for the whole tile.

Shapes: r rows, m, n, k_block a tile's; `top_k` experts per token. Matrices as in `minglm.ops`: gate_up (e, 2i, h), gate first;
down (e, h, i). `slot_of_row` (r,) says which of the n * top_k slots a row is: its token is slot // top_k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import (
    LARGEST,
    MOST_ROWS,
    Cost,
    launch,
    refuse_mixed_devices,
    refuse_mixed_dtypes,
    refuse_what_cannot_run,
    rows_of,
    tile_for,
)
from minglm import ops

WIDEST = 2**22  # numbers of a row: a tile of up to 256 rows keeps within 32 bits

# ---------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _rows_of_block(ends, block, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Which expert row block `block` works for, its first row, and where that expert's rows end."""
    each = tl.arange(0, PADDED)
    end = tl.load(ends + each, mask=each < EXPERTS, other=0).to(tl.int32)
    next_begins = end // BLOCK_M + each + 1
    expert = tl.sum(((next_begins <= block) & (each < EXPERTS)).to(tl.int32))
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    first = begin + (block - begin // BLOCK_M - expert) * BLOCK_M
    return expert, first, tl.load(ends + expert).to(tl.int32)


@triton.jit
def _product(
    accumulator, left, right, right_step,
    INNER: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """accumulator (m, n) plus the sum over `INNER` of left (m, 1) and right (1, n), pointers to where their rows and columns
    start; a row's numbers lie side by side, a column's `right_step` apart."""
    for start in range(0, INNER, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        if INNER % BLOCK_K == 0:
            a = tl.load(left + inner[None, :])
            b = tl.load(right + inner[:, None] * right_step)
        else:
            a = tl.load(left + inner[None, :], mask=(inner < INNER)[None, :], other=0.0)
            b = tl.load(right + inner[:, None] * right_step, mask=(inner < INNER)[:, None], other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision="ieee")
    return accumulator


@triton.jit
def _gate_up_kernel(
    x, x_stride, gate_up, weights, slot_of_row, ends, hidden, hidden_stride, act, act_stride,
    TOP_K: tl.constexpr, SIZE_H: tl.constexpr, SIZE_I: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x (n, h) -> hidden (r, 2i), if KEEP, and act (r, i)."""
    columns: tl.constexpr = (SIZE_I + BLOCK_N - 1) // BLOCK_N
    expert, first, end = _rows_of_block(ends, tl.program_id(0) // columns, EXPERTS, PADDED, BLOCK_M)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end repeat the first ones: no masks inside the product, and nothing of them is written.
    slot = tl.load(slot_of_row + tl.where(row < end, row, first)).to(tl.int32)
    left = x + (slot // TOP_K).to(tl.int64)[:, None] * x_stride
    right = gate_up + expert.to(tl.int64) * (2 * SIZE_I * SIZE_H) + (column % SIZE_I)[None, :] * SIZE_H
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, SIZE_H, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        if SIZE_H % BLOCK_K == 0:
            a = tl.load(left + inner[None, :])
            b_gate = tl.load(right + inner[:, None])
            b_up = tl.load(right + SIZE_I * SIZE_H + inner[:, None])
        else:
            a = tl.load(left + inner[None, :], mask=(inner < SIZE_H)[None, :], other=0.0)
            b_gate = tl.load(right + inner[:, None], mask=(inner < SIZE_H)[:, None], other=0.0)
            b_up = tl.load(right + SIZE_I * SIZE_H + inner[:, None], mask=(inner < SIZE_H)[:, None], other=0.0)
        gate = tl.dot(a, b_gate, gate, input_precision="ieee")
        up = tl.dot(a, b_up, up, input_precision="ieee")

    real = (row < end)[:, None] & (column < SIZE_I)[None, :]
    dtype = act.dtype.element_ty
    gate, up = gate.to(dtype), up.to(dtype)
    if KEEP:
        kept = hidden + first.to(tl.int64) * hidden_stride
        wide = (row - first)[:, None] * hidden_stride + column[None, :]
        tl.store(kept + wide, gate, mask=real)
        tl.store(kept + SIZE_I + wide, up, mask=real)
    weight = tl.load(weights + slot).to(tl.float32)[:, None]
    gate = gate.to(tl.float32)
    scaled = gate * tl.sigmoid(gate) * up.to(tl.float32) * weight
    narrow = (row - first)[:, None] * act_stride + column[None, :]
    tl.store(act + first.to(tl.int64) * act_stride + narrow, scaled.to(dtype), mask=real)


@triton.jit
def _rows_kernel(
    left, left_stride, matrices, ends, out, out_stride, right_step,
    INNER: tl.constexpr, COLUMNS: tl.constexpr, COLUMN_STRIDE: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """left (r, INNER) times its expert's matrix -> out (r, COLUMNS), for `down` and for `drows`.

    Element (inner, column) of a matrix is inner * right_step + column * COLUMN_STRIDE numbers from its start.
    """
    columns: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    expert, first, end = _rows_of_block(ends, tl.program_id(0) // columns, EXPERTS, PADDED, BLOCK_M)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    left_rows = left + tl.where(row < end, row, first).to(tl.int64)[:, None] * left_stride
    right = matrices + expert.to(tl.int64) * (INNER * COLUMNS) + (column % COLUMNS)[None, :] * COLUMN_STRIDE
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    accumulator = _product(accumulator, left_rows, right, right_step, INNER, BLOCK_K)
    real = (row < end)[:, None] & (column < COLUMNS)[None, :]
    target = out + first.to(tl.int64) * out_stride + (row - first)[:, None] * out_stride + column[None, :]
    tl.store(target, accumulator.to(out.dtype.element_ty), mask=real)


@triton.jit
def _dact_kernel(
    dout, dout_stride, down, weights, slot_of_row, ends, hidden, hidden_stride,
    dhidden, dhidden_stride, act, act_stride, dweights, slots,
    TOP_K: tl.constexpr, SIZE_H: tl.constexpr, SIZE_I: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dout (n, h), hidden (r, 2i) -> dhidden (r, 2i), act (r, i), and dweights (column blocks, slots) fp32, to be summed."""
    columns: tl.constexpr = (SIZE_I + BLOCK_N - 1) // BLOCK_N
    expert, first, end = _rows_of_block(ends, tl.program_id(0) // columns, EXPERTS, PADDED, BLOCK_M)
    if first >= end:
        return
    row = first + tl.arange(0, BLOCK_M)
    column_block = tl.program_id(0) % columns
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slot_of_row + tl.where(row < end, row, first)).to(tl.int32)
    left = dout + (slot // TOP_K).to(tl.int64)[:, None] * dout_stride
    right = down + expert.to(tl.int64) * (SIZE_H * SIZE_I) + (column % SIZE_I)[None, :]
    dscaled = _product(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), left, right, SIZE_I, SIZE_H, BLOCK_K)

    real = (row < end)[:, None] & (column < SIZE_I)[None, :]
    wide = (row - first)[:, None] * hidden_stride + column[None, :]
    kept = hidden + first.to(tl.int64) * hidden_stride
    gate = tl.load(kept + wide, mask=real, other=0.0).to(tl.float32)
    up = tl.load(kept + SIZE_I + wide, mask=real, other=0.0).to(tl.float32)
    weight = tl.load(weights + slot).to(tl.float32)[:, None]
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    # What is made of gate and up alone comes first, and meets dscaled in one product each: the two come in different layouts
    # of registers, and every change between them costs a copy. Written as a formula would be, this spills 3 kB.
    # Columns beyond the last one have gate = up = 0 and add nothing to the sum over columns.
    dtype = act.dtype.element_ty
    product = silu * up
    narrow = (row - first)[:, None] * act_stride + column[None, :]
    tl.store(act + first.to(tl.int64) * act_stride + narrow, (product * weight).to(dtype), mask=real)
    dweight = tl.sum(dscaled * product, axis=1)
    tl.store(dweights + column_block.to(tl.int64) * slots + slot, dweight, mask=row < end)
    below = dhidden + first.to(tl.int64) * dhidden_stride
    dgate = up * sigmoid * (1 + gate * (1 - sigmoid)) * weight
    tl.store(below + wide, (dscaled * dgate).to(dtype), mask=real)
    tl.store(below + SIZE_I + wide, (dscaled * (silu * weight)).to(dtype), mask=real)


@triton.jit
def _dmatrix_kernel(
    left, left_stride, right, right_stride, slot_of_row, ends, out,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATHER_LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum over each expert's rows of left^T right -> out (e, ROWS, COLUMNS). One of the two is per token and gathered."""
    columns: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M * columns
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    end = tl.load(ends + expert).to(tl.int32)
    line = tile // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        token = tl.load(slot_of_row + row, mask=row < end, other=0).to(tl.int32) // TOP_K
        left_row = token if GATHER_LEFT else row
        right_row = row if GATHER_LEFT else token
        a = left + left_row.to(tl.int64)[None, :] * left_stride + (line % ROWS)[:, None]
        b = right + right_row.to(tl.int64)[:, None] * right_stride + (column % COLUMNS)[None, :]
        a = tl.load(a, mask=(row < end)[None, :], other=0.0)
        b = tl.load(b, mask=(row < end)[:, None], other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision="ieee")
    real = (line < ROWS)[:, None] & (column < COLUMNS)[None, :]
    target = out + expert.to(tl.int64) * (ROWS * COLUMNS) + line[:, None] * COLUMNS + column[None, :]
    tl.store(target, accumulator.to(out.dtype.element_ty), mask=real)


# -------------------------------------------------------------------------------------------------------- the launchers
#
# The costs count each matrix, token and row once: what must cross the memory bus if the cache catches all repetition.


def row_blocks(rows: int, experts: int, height: int) -> int:
    """An upper bound of the blocks that all experts' rows need, without knowing whose they are."""
    return rows // height + experts


def gate_up(
    x: Tensor, matrices: Tensor, weights: Tensor, slot_of_row: Tensor, ends: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """x (n, h), matrices (e, 2i, h), weights (n, top_k) -> act (r, i), and gate and up (r, 2i) if `keep`."""
    (n, h), (e, double, _), r = x.shape, matrices.shape, len(slot_of_row)
    i, tile = double // 2, tile_for("gate_up", x)
    act = x.new_empty(r, i)
    hidden = x.new_empty(r, 2 * i) if keep else None
    cost = Cost(2 * r * h * 2 * i, x.element_size() * (n * h + e * 2 * i * h + r * i + (r * 2 * i if keep else 0)))
    name, programs = "gate_up" if keep else "gate_up, inference", row_blocks(r, e, tile.m) * triton.cdiv(i, tile.n)
    launch(
        _gate_up_kernel, name, programs, tile, cost, x,
        x=x, x_stride=x.stride(0), gate_up=matrices, weights=weights, slot_of_row=slot_of_row, ends=ends,
        hidden=hidden if keep else act, hidden_stride=2 * i, act=act, act_stride=i,
        TOP_K=weights.shape[1], SIZE_H=h, SIZE_I=i, EXPERTS=e, PADDED=triton.next_power_of_2(e), KEEP=keep,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
    )  # fmt: skip
    return act, hidden


def _rows_product(name: str, left: Tensor, matrices: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """left (r, inner) times its expert's matrix, (inner, columns) or, transposed, (columns, inner) -> (r, columns)."""
    (r, inner), (e, *shape) = left.shape, matrices.shape
    columns, tile = shape[0 if transposed else 1], tile_for(name, left)
    out = left.new_empty(r, columns)
    cost = Cost(2 * r * inner * columns, left.element_size() * (r * inner + e * inner * columns + r * columns))
    launch(
        _rows_kernel, name, row_blocks(r, e, tile.m) * triton.cdiv(columns, tile.n), tile, cost, left,
        left=left, left_stride=left.stride(0), matrices=matrices, ends=ends, out=out, out_stride=columns,
        right_step=1 if transposed else columns, INNER=inner, COLUMNS=columns, COLUMN_STRIDE=inner if transposed else 1,
        EXPERTS=e, PADDED=triton.next_power_of_2(e), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
    )  # fmt: skip
    return out


def down(act: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """act (r, i), matrices (e, h, i) -> (r, h)."""
    return _rows_product("down", act, matrices, ends, transposed=True)


def drows(dhidden: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """dhidden (r, 2i), matrices (e, 2i, h) -> (r, h), the gradient of each row's copy of its token."""
    return _rows_product("drows", dhidden, matrices, ends, transposed=False)


def dact(
    dout: Tensor, matrices: Tensor, weights: Tensor, slot_of_row: Tensor, ends: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dout (n, h), matrices (e, h, i), weights (n, top_k), hidden (r, 2i) -> the gradient of hidden (r, 2i), the scaled
    activation once more (r, i), the gradient of weights (n, top_k)."""
    (n, h), (e, _, i), r = dout.shape, matrices.shape, len(slot_of_row)
    tile = tile_for("dact", dout)
    columns = triton.cdiv(i, tile.n)
    dhidden, act = torch.empty_like(hidden), hidden.new_empty(r, i)
    dweights = hidden.new_empty(columns, r, dtype=torch.float32)
    bytes_moved = dout.element_size() * (n * h + e * h * i + r * 2 * i + r * 2 * i + r * i) + 4 * columns * r
    launch(
        _dact_kernel, "dact", row_blocks(r, e, tile.m) * columns, tile, Cost(2 * r * h * i, bytes_moved), dout,
        dout=dout, dout_stride=dout.stride(0), down=matrices, weights=weights, slot_of_row=slot_of_row, ends=ends,
        hidden=hidden, hidden_stride=2 * i, dhidden=dhidden, dhidden_stride=2 * i, act=act, act_stride=i,
        dweights=dweights, slots=r, TOP_K=weights.shape[1], SIZE_H=h, SIZE_I=i, EXPERTS=e, PADDED=triton.next_power_of_2(e),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
    )  # fmt: skip
    return dhidden, act, dweights.sum(0).view(weights.shape).to(weights.dtype)


def dmatrix(name: str, left: Tensor, right: Tensor, slot_of_row: Tensor, ends: Tensor, top_k: int, gather_left: bool) -> Tensor:
    """Sum over each expert's rows of left^T right -> (e, left's width, right's width). The gathered one is per token (n, .),
    the other per row (r, .)."""
    r, e, lines, columns = len(slot_of_row), len(ends), left.shape[1], right.shape[1]
    tile = tile_for("dmatrix", left)
    out = left.new_empty(e, lines, columns)
    cost = Cost(2 * r * lines * columns, left.element_size() * (left.numel() + right.numel() + out.numel()))
    launch(
        _dmatrix_kernel, name, e * triton.cdiv(lines, tile.m) * triton.cdiv(columns, tile.n), tile, cost, left,
        left=left, left_stride=left.stride(0), right=right, right_stride=right.stride(0), slot_of_row=slot_of_row, ends=ends,
        out=out, TOP_K=top_k, ROWS=lines, COLUMNS=columns, GATHER_LEFT=gather_left,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
    )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------- the autograd wrapper


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, experts: Tensor, weights: Tensor, w_in: Tensor, w_out: Tensor, keep: bool) -> Tensor:
        slot_of_row, row_of_slot, ends = ops.sort_by_expert(experts, w_in.shape[0])
        act, hidden = gate_up(x, w_in, weights, slot_of_row, ends, keep)
        if keep:
            ctx.save_for_backward(x, weights, w_in, w_out, hidden, slot_of_row, row_of_slot, ends)
        return ops.sum_rows(down(act, w_out, ends), slot_of_row // experts.shape[1], row_of_slot)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        x, weights, w_in, w_out, hidden, slot_of_row, row_of_slot, ends = ctx.saved_tensors
        want_x, _, _, want_in, want_out, _ = ctx.needs_input_grad
        dout, top_k = rows_of(dout), weights.shape[1]
        dhidden, act, dweights = dact(dout, w_out, weights, slot_of_row, ends, hidden)
        dx = dw_in = dw_out = None
        if want_out:
            dw_out = dmatrix("dmatrix, down", dout, act, slot_of_row, ends, top_k, gather_left=True)
        if want_in:
            dw_in = dmatrix("dmatrix, gate_up", dhidden, x, slot_of_row, ends, top_k, gather_left=False)
        if want_x:
            dx = ops.sum_rows(drows(dhidden, w_in, ends), slot_of_row // top_k, row_of_slot)
        return dx, None, dweights, dw_in, dw_out, None


@ops.register("routed_experts", "triton")
def routed_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`minglm.ops.routed_experts` by the kernels above, in fp32, bf16 or fp16; follows autocast.

    Raises `TypeError` or `ValueError` for what they cannot do, before anything is allocated. That experts lie in 0 to e - 1
    is not looked at: the host would have to wait for the device.
    """
    refuse_shapes(x, experts, weights, gate_up, down)
    refuse_mixed_devices("routed_experts", x=x, experts=experts, weights=weights, gate_up=gate_up, down=down)
    refuse_what_cannot_run("routed_experts", x=x, weights=weights, gate_up=gate_up, down=down)
    if not ops.autocasts(x.device.type):
        refuse_mixed_dtypes("routed_experts", x=x, gate_up=gate_up, down=down)
    x, gate_up, down = ops.in_autocast_dtype(x, gate_up, down)
    weights = weights.to(x.dtype).contiguous()  # rounded to the tokens' dtype, as by definition
    keep = torch.is_grad_enabled() and any(y.requires_grad for y in (x, weights, gate_up, down))
    return _RoutedExperts.apply(rows_of(x), experts, weights, gate_up.contiguous(), down.contiguous(), keep)


def refuse_shapes(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    """Raise `ValueError` for shapes that do not belong together or are too large to count, `TypeError` for expert numbers
    that are not int64."""
    found = ", ".join(
        f"{name} {tuple(y.shape)}"
        for name, y in dict(x=x, experts=experts, weights=weights, gate_up=gate_up, down=down).items()
    )
    wanted = "wanted x (n, h), experts and weights (n, k), gate_up (e, 2i, h), down (e, h, i), none of k, h, i, e zero"
    if x.ndim != 2 or experts.ndim != 2 or down.ndim != 3:
        raise ValueError(f"routed_experts: found {found}; {wanted}")
    (n, h), (e, _, i), k = x.shape, down.shape, experts.shape[1]
    shapes = [tuple(y.shape) for y in (experts, weights, gate_up, down)]
    if shapes != [(n, k), (n, k), (e, 2 * i, h), (e, h, i)] or 0 in (k, h, i, e):
        raise ValueError(f"routed_experts: found {found}; {wanted}")
    if experts.dtype != torch.int64:
        raise TypeError(f"routed_experts: found experts in {experts.dtype}; wanted torch.int64: convert them with .long()")
    if n * k > MOST_ROWS:
        raise ValueError(
            f"routed_experts: found {n:,} tokens for {k} experts each; wanted {MOST_ROWS:,} rows at most: use fewer"
        )
    if max(2 * i, h) > WIDEST:
        raise ValueError(f"routed_experts: found rows of {max(2 * i, h):,} numbers; gear 'triton' takes {WIDEST:,} at most")
    if 2 * i * h >= LARGEST:
        raise ValueError(f"routed_experts: found {2 * i * h:,} elements in an expert's matrix; wanted fewer than {LARGEST:,}")
