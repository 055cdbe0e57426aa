"""Offsets beyond 2^31 elements: every kernel reaches the right numbers at GLM-4.5's real sizes, and only thanks to its casts.

The stacks and buffers here are as large as on a GPU, up to tens of gigabytes, but of memory that is mapped and never
touched: it costs nothing and reads as zeros. Of each kernel only the last program runs, which works on the last rows of the
last expert. An offset that wraps in 32 bits lands up to 2^31 elements *before* its buffer, so there is that much untouched
memory in front of each: it finds zeros there, or writes where nobody looks, and the result is wrong, but nothing crashes.

The second half takes the casts away, one by one, from the real source, and wants each of those kernels to be wrong.
"""

import importlib.util
import math
import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
import triton  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from kernels import rms_norm, routed_experts  # noqa: E402
from minglm import ops  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret or sys.platform != "linux", reason="runs single programs in Triton's interpreter"
)

WRAP = 2**31
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE: more than the machine has may be mapped, as long as it is not used
HIDDEN, WIDTH, EXPERTS = 5120, 1536, 160  # GLM-4.5's
ROWS, ROW_STRIDE = 150, 2**24  # of the last expert; rows this far apart: the last ones begin beyond 2^31
M, N = 16, 32  # the tile, all that is computed
LAST = slice(144, ROWS)  # rows of the last block: not a whole one


def untouched(elements: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Zeros without memory, and as much of it before them as a wrapped offset can reach."""
    mapped = mmap.mmap(-1, (WRAP + elements) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(mapped, dtype=dtype)[WRAP:]


def far_rows(width: int, filled: bool) -> Tensor:
    """(ROWS, width), rows far apart; if filled, random numbers in those of the last block."""
    rows = untouched(ROWS * ROW_STRIDE).as_strided((ROWS, width), (ROW_STRIDE, 1))
    if filled:
        rows[LAST] = torch.randn(rows[LAST].shape, generator=torch.Generator().manual_seed(width)).half()
    return rows


def far_matrices(rows: int, columns: int, experts: int, filled: bool) -> Tensor:
    """(experts, rows, columns), more than 2^31 elements; if filled, random numbers in the last expert's."""
    assert experts * rows * columns > WRAP
    matrices = untouched(experts * rows * columns).view(experts, rows, columns)
    if filled:
        numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) / math.sqrt(columns)
        matrices[-1] = numbers.half()
    return matrices


def all_rows_at_the_last_expert(experts: int) -> dict:
    ends = torch.zeros(experts, dtype=torch.int64)
    ends[-1] = ROWS
    return dict(
        slot_of_row=torch.arange(ROWS), ends=ends, EXPERTS=experts, PADDED=triton.next_power_of_2(experts), TOP_K=1
    )  # fmt: skip


def run_last_program(monkeypatch: pytest.MonkeyPatch, kernel: Callable, programs: int, **arguments: object) -> None:
    """Only the last of `programs`. The interpreter would copy every buffer onto itself afterwards: not here."""
    last = interpreter.TensorHandle(torch.tensor([programs - 1], dtype=torch.int32).numpy(), triton.language.int32)
    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", lambda self, axis: last)
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)
        names = set(kernel.arg_names)
        kernel[(1,)](**{name: value for name, value in arguments.items() if name in names})


def last_block(columns: int, experts: int) -> int:
    """Programs up to and with the last one of the last expert's last block of rows."""
    return (ROWS // M + experts) * math.ceil(columns / N)


def close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(
        found.float(), wanted.float(), rtol=0, atol=4 * torch.finfo(torch.float16).eps * max(1, wanted.abs().max())
    )


# Each case runs one kernel of `module` and says whether every number is right that it should have written.


def gate_up_is_right(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    x, matrices = far_rows(HIDDEN, filled=True), far_matrices(2 * WIDTH, HIDDEN, EXPERTS, filled=True)
    assert matrices.numel() == 2_516_582_400
    hidden, act, weights = far_rows(2 * WIDTH, filled=False), far_rows(WIDTH, filled=False), torch.rand(ROWS, 1).half()
    run_last_program(
        monkeypatch, module._gate_up_kernel, last_block(WIDTH, EXPERTS), **all_rows_at_the_last_expert(EXPERTS),
        x=x, x_stride=ROW_STRIDE, gate_up=matrices, weights=weights, hidden=hidden, hidden_stride=ROW_STRIDE,
        act=act, act_stride=ROW_STRIDE, SIZE_H=HIDDEN, SIZE_I=WIDTH, KEEP=True, BLOCK_M=M, BLOCK_N=N, BLOCK_K=1024,
    )  # fmt: skip
    gate, up = F.linear(x[LAST].float(), matrices[-1].float()).half().chunk(2, dim=-1)
    wanted = (F.silu(gate.float()) * up * weights[LAST])[:, -N:]
    return (
        close(act[LAST, -N:], wanted)
        and close(hidden[LAST, WIDTH - N : WIDTH], gate[:, -N:])
        and close(hidden[LAST, -N:], up[:, -N:])
    )


def down_is_right(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    # GLM-4.5's own stack of down matrices has half as many elements; twice the experts cross the line.
    act, matrices, out = far_rows(WIDTH, True), far_matrices(HIDDEN, WIDTH, 2 * EXPERTS, True), far_rows(HIDDEN, False)
    run_last_program(
        monkeypatch, module._rows_kernel, last_block(HIDDEN, 2 * EXPERTS), **all_rows_at_the_last_expert(2 * EXPERTS),
        left=act, left_stride=ROW_STRIDE, matrices=matrices, out=out, out_stride=ROW_STRIDE, right_step=1,
        INNER=WIDTH, COLUMNS=HIDDEN, COLUMN_STRIDE=WIDTH, BLOCK_M=M, BLOCK_N=N, BLOCK_K=512,
    )  # fmt: skip
    return close(out[LAST, -N:], F.linear(act[LAST].float(), matrices[-1, -N:].float()))


def drows_is_right(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    dhidden, matrices = far_rows(2 * WIDTH, True), far_matrices(2 * WIDTH, HIDDEN, EXPERTS, True)
    out = far_rows(HIDDEN, False)
    run_last_program(
        monkeypatch, module._rows_kernel, last_block(HIDDEN, EXPERTS), **all_rows_at_the_last_expert(EXPERTS),
        left=dhidden, left_stride=ROW_STRIDE, matrices=matrices, out=out, out_stride=ROW_STRIDE, right_step=HIDDEN,
        INNER=2 * WIDTH, COLUMNS=HIDDEN, COLUMN_STRIDE=1, BLOCK_M=M, BLOCK_N=N, BLOCK_K=1024,
    )  # fmt: skip
    return close(out[LAST, -N:], dhidden[LAST].float() @ matrices[-1, :, -N:].float())


def dact_is_right(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    dout, matrices, slots = far_rows(HIDDEN, True), far_matrices(HIDDEN, WIDTH, 2 * EXPERTS, True), 2**26
    hidden, dhidden, act = far_rows(2 * WIDTH, True), far_rows(2 * WIDTH, False), far_rows(WIDTH, False)
    weights, column_blocks = torch.rand(ROWS, 1).half(), WIDTH // N
    dweights = untouched(column_blocks * slots, torch.float32).view(column_blocks, slots)
    run_last_program(
        monkeypatch, module._dact_kernel, last_block(WIDTH, 2 * EXPERTS), **all_rows_at_the_last_expert(2 * EXPERTS),
        dout=dout, dout_stride=ROW_STRIDE, down=matrices, weights=weights, hidden=hidden, hidden_stride=ROW_STRIDE,
        dhidden=dhidden, dhidden_stride=ROW_STRIDE, act=act, act_stride=ROW_STRIDE, dweights=dweights, slots=slots,
        SIZE_H=HIDDEN, SIZE_I=WIDTH, BLOCK_M=M, BLOCK_N=N, BLOCK_K=1024,
    )  # fmt: skip
    gate, up = (x[:, -N:].float().requires_grad_() for x in hidden[LAST].chunk(2, dim=-1))
    weight = weights[LAST].float().requires_grad_()
    scaled = F.silu(gate) * up * weight
    scaled.backward(dout[LAST].float() @ matrices[-1, :, -N:].float())
    return (
        close(act[LAST, -N:], scaled.detach())
        and close(dhidden[LAST, WIDTH - N : WIDTH], gate.grad)
        and close(dhidden[LAST, -N:], up.grad)
        and close(dweights[-1, LAST], weight.grad[:, 0])
    )


def dmatrix_is_right(module: ModuleType, monkeypatch: pytest.MonkeyPatch, gather_left: bool) -> bool:
    left, right = far_rows(2 * WIDTH, True), far_rows(HIDDEN, True)
    out = far_matrices(2 * WIDTH, HIDDEN, EXPERTS, filled=False)
    run_last_program(
        monkeypatch, module._dmatrix_kernel, EXPERTS * (2 * WIDTH // M) * (HIDDEN // N), **all_rows_at_the_last_expert(EXPERTS),
        left=left, left_stride=ROW_STRIDE, right=right, right_stride=ROW_STRIDE, out=out, ROWS=2 * WIDTH, COLUMNS=HIDDEN,
        GATHER_LEFT=gather_left, BLOCK_M=M, BLOCK_N=N, BLOCK_K=M,
    )  # fmt: skip
    return close(out[-1, -M:, -N:], left[LAST, -M:].float().mT @ right[LAST, -N:].float())


def dmatrix_with_left_gathered_is_right(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    return dmatrix_is_right(module, monkeypatch, gather_left=True)


def dmatrix_with_right_gathered_is_right(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    return dmatrix_is_right(module, monkeypatch, gather_left=False)


NORM_WIDTH = 16
NORM_ROWS = WRAP // NORM_WIDTH + 3  # its results lie side by side, so only many rows make them many


def far_norm_rows(stride: int, filled: bool) -> Tensor:
    rows = untouched(NORM_ROWS * stride).as_strided((NORM_ROWS, NORM_WIDTH), (stride, 1))
    if filled:
        rows[-3:] = torch.randn(3, NORM_WIDTH, generator=torch.Generator().manual_seed(stride)).half()
    return rows


def norm_is_right(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    x, out, weight = far_norm_rows(17, True), far_norm_rows(NORM_WIDTH, False), torch.rand(NORM_WIDTH).half()
    run_last_program(
        monkeypatch, module._forward, math.ceil(NORM_ROWS / M),
        x=x, weight=weight, out=out, x_stride=17, rows=NORM_ROWS, eps=1e-5, D=NORM_WIDTH, BLOCK_ROWS=M, BLOCK_D=NORM_WIDTH,
    )  # fmt: skip
    with ops.using("naive"):
        return close(out[-3:], ops.rms_norm(x[-3:], weight, 1e-5))


def norm_backward_is_right(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> bool:
    x, dout, dx = far_norm_rows(17, True), far_norm_rows(18, True), far_norm_rows(NORM_WIDTH, False)
    weight = torch.rand(NORM_WIDTH).half()
    programs = math.ceil(NORM_ROWS / M)  # more than the launcher would start, each with one step: so that one step is enough
    partial = untouched(programs * NORM_WIDTH, torch.float32)
    run_last_program(
        monkeypatch, module._backward, programs,
        x=x, weight=weight, dout=dout, dx=dx, partial=partial, x_stride=17, dout_stride=18, rows=NORM_ROWS, eps=1e-5,
        steps=1, D=NORM_WIDTH, BLOCK_ROWS=M, BLOCK_D=NORM_WIDTH,
    )  # fmt: skip
    near = x[-3:].clone().requires_grad_()
    with ops.using("naive"):
        ops.rms_norm(near, weight, 1e-5).backward(dout[-3:])
    return close(dx[-3:], near.grad)


CASES = {
    rms_norm: [norm_is_right, norm_backward_is_right],
    routed_experts: [
        gate_up_is_right,
        down_is_right,
        drows_is_right,
        dact_is_right,
        dmatrix_with_left_gathered_is_right,
        dmatrix_with_right_gathered_is_right,
    ],
}


@pytest.mark.parametrize(
    ("module", "is_right"), [pytest.param(m, case, id=case.__name__) for m, cases in CASES.items() for case in cases]
)
def test_offsets_beyond_32_bits_reach_the_right_numbers(module, is_right, monkeypatch):
    assert is_right(module, monkeypatch)


CAST = ".to(tl.int64)"
PLACES = [
    pytest.param(module, match.start(), id=f"{Path(module.__file__).stem} line {text.count(chr(10), 0, match.start()) + 1}")
    for module, text in ((module, Path(module.__file__).read_text()) for module in CASES)
    for match in re.finditer(re.escape(CAST), text)
]


def without_cast(module: ModuleType, place: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module from its own text, one cast left out (None: none), without taking the real one's place in `minglm.ops`."""
    text = Path(module.__file__).read_text()
    if place is not None:
        assert text[place:].startswith(CAST)
        text = text[:place] + text[place + len(CAST) :]
    path = folder / "patched.py"
    path.write_text(text)
    for name, table in ops._implementations.items():
        monkeypatch.setitem(ops._implementations, name, dict(table))
    spec = importlib.util.spec_from_file_location("patched", path)
    patched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(patched)
    return patched


@pytest.mark.parametrize("module", CASES)
def test_a_copy_with_all_casts_is_right(module, tmp_path, monkeypatch):
    """So that what follows is the casts' doing and not the copy's."""
    copy = without_cast(module, None, tmp_path, monkeypatch)
    assert all(is_right(copy, monkeypatch) for is_right in CASES[module])
    assert any(module is place.values[0] for place in PLACES)


@pytest.mark.parametrize(("module", "place"), PLACES)
def test_without_any_one_cast_a_kernel_is_wrong(module, place, tmp_path, monkeypatch):
    patched = without_cast(module, place, tmp_path, monkeypatch)
    assert not all(is_right(patched, monkeypatch) for is_right in CASES[module])
