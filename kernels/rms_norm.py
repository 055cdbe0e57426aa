"""RMSNorm in Triton, forward and backward: one pass over memory each.

    y = round(x * rstd) * w,   rstd = (mean(x^2) + eps)^-1/2          (rounded to x's dtype before it meets the weight)

A norm does four operations a number and moves four bytes for it in bf16: one operation a byte, where an H100 needs 295 to be
busy. Time is bytes, so each number is to cross the memory bus as seldom as possible. Bytes moved for N numbers in bf16:

                   forward                          backward
    this file      4 N (reads x, writes y)          6 N (reads x and dy, writes dx)
    torch gear     18 N in 4 passes                 66 N in 9 passes
    naive gear     36 N in 6 passes                 about 75 N in 11 passes
    (naive: float, square, mean, times rstd, back to bf16, times weight; each reads and writes all numbers, most in fp32)

How. A row is read once and stays in registers: a program holds whole rows (padded to a power of two; the padding is masked
and costs no traffic), so mean and result come from the same load. Short rows, such as the 128 numbers of a head in
QK-norm, are taken 32 at a time.

Backward, with n = x * rstd and g = dy * w:

    dx = rstd * (g - n * mean(g * n)),      dw = sum over rows of dy * round(n)

rstd is made again from x, which must be read anyway: nothing but the inputs is kept. The sum of dw runs over all rows, and
atomic additions would sum in another order every time. Instead a program walks over a fixed run of rows with its own dw in
registers and writes it once, as a row of `partial` (programs, d), which is then summed; the number of programs depends on
the shape only, so the same inputs give the same bits. `partial` is written and read, 8 d bytes a program: for 4,096 tokens of
5,120 numbers 21 MB beside the 126 MB of x, dy and dx.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import MOST_ROWS, Cost, launch, refuse_what_cannot_run, rows_of
from kernels.tiles import norm_tile
from minglm import ops

LONGEST = 32_768  # numbers of a row: it stays in registers
MOST_PARTIALS = 512  # programs of the backward pass: four for each of an H100's 132 processors


@triton.jit
def _rstd(numbers, is_row, eps, D: tl.constexpr):
    """(mean of a row's squares + eps)^-1/2, (rows, 1). Rows beyond the last are zeros, infinite without eps: one there."""
    return tl.rsqrt(tl.where(is_row, tl.sum(numbers * numbers, axis=1) / D + eps, 1.0))[:, None]


@triton.jit
def _forward(
    x, weight, out, x_stride, rows, eps, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    real = (row < rows)[:, None] & (column < D)[None, :]
    loaded = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=real, other=0.0)
    numbers = loaded.to(tl.float32)
    normed = (numbers * _rstd(numbers, row < rows, eps, D)).to(loaded.dtype).to(tl.float32)
    scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64)[:, None] * D + column[None, :], normed * scale[None, :], mask=real)


@triton.jit
def _backward(
    x, weight, dout, dx, partial, x_stride, dout_stride, rows, eps, steps,
    D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`steps` blocks of rows a program; `partial` (programs, D) fp32 takes its share of the weight's gradient."""
    column = tl.arange(0, BLOCK_D)
    scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    dscale = tl.zeros([BLOCK_D], tl.float32)
    for step in range(steps):
        row = (tl.program_id(0) * steps + step) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        real = (row < rows)[:, None] & (column < D)[None, :]
        loaded = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=real, other=0.0)
        above = tl.load(dout + row.to(tl.int64)[:, None] * dout_stride + column[None, :], mask=real, other=0.0).to(tl.float32)
        numbers = loaded.to(tl.float32)
        rstd = _rstd(numbers, row < rows, eps, D)
        normed = numbers * rstd
        dscale += tl.sum(above * normed.to(loaded.dtype).to(tl.float32), axis=0)
        dnormed = above * scale[None, :]
        mean = tl.sum(dnormed * normed, axis=1) / D
        below = rstd * (dnormed - normed * mean[:, None])
        tl.store(dx + row.to(tl.int64)[:, None] * D + column[None, :], below, mask=real)
    tl.store(partial + tl.program_id(0) * D + column, dscale, mask=column < D)


def forward_cost(rows: int, d: int, x_bytes: int, weight_bytes: int, out_bytes: int) -> Cost:
    """Square and add, times rstd, times weight; read x and the weight, write the result."""
    return Cost(4 * rows * d, rows * d * (x_bytes + out_bytes) + d * weight_bytes)


def backward_cost(rows: int, d: int, x_bytes: int, weight_bytes: int, out_bytes: int, programs: int) -> Cost:
    """Read x, dy and the weight, write dx and the partial sums of dw, which are fp32."""
    return Cost(12 * rows * d, rows * d * (2 * x_bytes + out_bytes) + d * (weight_bytes + 4 * programs))


def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (rows, d) with any distance between rows, weight (d,) -> (rows, d) in the dtype that both promote to."""
    rows, d = x.shape
    tile = norm_tile(d)
    out = x.new_empty(rows, d, dtype=torch.promote_types(x.dtype, weight.dtype))
    cost = forward_cost(rows, d, x.element_size(), weight.element_size(), out.element_size())
    launch(
        _forward, f"rms_norm forward, {d}", triton.cdiv(rows, tile.m), tile, cost, x,
        x=x, weight=weight, out=out, x_stride=x.stride(0), rows=rows, eps=eps, D=d, BLOCK_ROWS=tile.m, BLOCK_D=tile.n,
    )  # fmt: skip
    return out


def backward(x: Tensor, weight: Tensor, eps: float, dout: Tensor) -> tuple[Tensor, Tensor]:
    """x and dout (rows, d), weight (d,) -> the gradients of x and of the weight."""
    rows, d = x.shape
    tile = norm_tile(d)
    steps = max(1, triton.cdiv(triton.cdiv(rows, tile.m), MOST_PARTIALS))
    programs = triton.cdiv(rows, tile.m * steps)
    dx, partial = x.new_empty(rows, d), x.new_empty(programs, d, dtype=torch.float32)
    cost = backward_cost(rows, d, x.element_size(), weight.element_size(), dout.element_size(), programs)
    launch(
        _backward, f"rms_norm backward, {d}", programs, tile, cost, x,
        x=x, weight=weight, dout=dout, dx=dx, partial=partial, x_stride=x.stride(0), dout_stride=dout.stride(0),
        rows=rows, eps=eps, steps=steps, D=d, BLOCK_ROWS=tile.m, BLOCK_D=tile.n,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return forward(rows_of(x), weight, eps).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        x, weight = ctx.saved_tensors
        dx, dweight = backward(rows_of(x), weight, ctx.eps, rows_of(dout))
        return dx.view(x.shape), dweight, None


@ops.register("rms_norm", "triton")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`minglm.ops.rms_norm` by the kernels above: x (..., d), weight (d,), fp32, bf16 or fp16 -> (..., d).

    Raises `TypeError` or `ValueError` for what they cannot do, before anything is allocated.
    """
    refuse_what_cannot_run("rms_norm", x=x, weight=weight)
    if weight.ndim != 1 or x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"rms_norm: found x {tuple(x.shape)} and weight {tuple(weight.shape)}; wanted x (..., d), weight (d,)")
    d = weight.shape[0]
    if not 1 <= d <= LONGEST:
        raise ValueError(f"rms_norm: found rows of {d:,} numbers; gear 'triton' takes 1 to {LONGEST:,}: use gear 'torch'")
    if x.numel() // d > MOST_ROWS:
        raise ValueError(
            f"rms_norm: found {x.numel() // d:,} rows; gear 'triton' takes {MOST_ROWS:,} at most: use gear 'torch'"
        )
    return _RMSNorm.apply(x, weight.contiguous(), eps)
