"""What the Triton gear promises beyond the laws in test_ops.py: ragged loads over several tiles, the same bits twice, whole
models and optimiser steps, refusals, autocast and the compiler. On a GPU if there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from packed import pack  # noqa: E402
from small_run import MODEL, run_small, small_recipe, write_text  # noqa: E402

from kernels import launch, rms_norm, routed_experts, tiles  # noqa: E402
from minglm import ops  # noqa: E402
from minglm.config import GLMConfig  # noqa: E402
from minglm.model import GLM  # noqa: E402
from minglm.optim import build_optimizer  # noqa: E402
from minglm.train.metrics import read_metrics  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parent.parent
# In the interpreter, products in bf16 are garbage without an error (triton#5424); on a GPU they are not.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
# Times the largest value: the naive gear rounds a row, its weighing and each addition to the dtype, we round less often.
TOLERANCE_IN_EPS = {torch.float32: 64, torch.float16: 8, torch.bfloat16: 8}


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype, message: str = "") -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    tolerance = TOLERANCE_IN_EPS[dtype] * torch.finfo(dtype).eps * scale
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance, msg=lambda text: f"{message}\n{text}")


def gradients(gear: str, name: str, arguments: tuple, dout: Tensor | None = None) -> list[Tensor]:
    """The operation's value and the gradients of its variables, for `dout` (by default of slowly changing numbers)."""
    with ops.using(gear):
        out = getattr(ops, name)(*arguments)
    if dout is None:
        dout = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
    variables = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, variables, dout)]


def check_equal(name: str, arguments: tuple, dtype: torch.dtype) -> None:
    wanted, found = (gradients(gear, name, arguments) for gear in ("naive", "triton"))
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert_close(one, other, dtype, f"output {index}")


# --------------------------------------------------------------------------------------------------- the routed experts

LOADS = {
    "ragged, some without tokens": [0, 17, 1, 0, 48, 16, 0],
    "one takes all": [0, 0, 61, 0],
    "the first takes all": [40, 0, 0],
    "one expert": [33],
    "whole tiles": [16, 32, 16],
    "one token": [0, 1, 0],
    "no tokens": [0, 0],
}


def experts_case(loads: list[int], dtype: torch.dtype, h: int = 70, i: int = 50) -> tuple:
    """One expert a token, in shuffled order, so that expert x has loads[x] rows. Neither h nor i is whole tiles."""
    generator = torch.Generator().manual_seed(sum(loads))
    experts = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads))
    experts = experts[torch.randperm(len(experts), generator=generator)][:, None].to(DEVICE)
    return _variables(experts, len(loads), h, i, dtype, generator)


def several_experts_case(dtype: torch.dtype, n: int = 30, k: int = 3, e: int = 5, h: int = 40, i: int = 20) -> tuple:
    generator = torch.Generator().manual_seed(1)
    experts = torch.rand(n, e, generator=generator).topk(k).indices.to(DEVICE)
    return _variables(experts, e, h, i, dtype, generator)


def _variables(experts: Tensor, e: int, h: int, i: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = normal(len(experts), h).to(DEVICE, dtype)
    matrices = (normal(e, 2 * i, h) / h**0.5).to(DEVICE, dtype), (normal(e, h, i) / i**0.5).to(DEVICE, dtype)
    weights = torch.rand(experts.shape, generator=generator).to(DEVICE)  # fp32, as the router's
    x, weights, *matrices = (y.requires_grad_() for y in (x, weights, *matrices))
    return x, experts, weights, *matrices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loads", LOADS.values(), ids=LOADS.keys())
def test_experts_of_any_load_equal_the_naive_definition(loads, dtype):
    check_equal("routed_experts", experts_case(loads, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_several_experts_are_summed(dtype):
    check_equal("routed_experts", several_experts_case(dtype), dtype)


def test_experts_of_whole_tiles_need_no_masks():
    """64 and 32 are multiples of the interpreter's tiles: the branch that large models take."""
    check_equal("routed_experts", experts_case([20, 0, 3], torch.float32, h=64, i=32), torch.float32)


def test_tokens_may_lie_apart_in_memory():
    x, *others = experts_case([5, 12], torch.float32)
    wide = torch.zeros(x.shape[0], 2 * x.shape[1], device=DEVICE)
    wide[:, ::2] = x.detach()
    for view in (wide[:, ::2], wide[:, : x.shape[1]], wide.t()[: x.shape[1]].t()):
        check_equal("routed_experts", (view.requires_grad_(), *others), torch.float32)


def test_what_needs_no_gradient_gets_none():
    x, experts, weights, gate_up, down = several_experts_case(torch.float32)
    wanted = gradients("triton", "routed_experts", (x, experts, weights, gate_up, down))
    frozen = gradients("triton", "routed_experts", (x, experts, weights.detach(), gate_up.detach(), down.detach()))
    assert len(frozen) == 2 and all(torch.equal(a, b) for a, b in zip(frozen, wanted, strict=False))
    only_down = gradients("triton", "routed_experts", (x.detach(), experts, weights, gate_up.detach(), down))
    assert torch.equal(only_down[1], wanted[2]) and torch.equal(only_down[2], wanted[4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_inputs_give_the_same_bits(dtype):
    """Forward and backward: no sum's order depends on anything but shapes."""
    norm = torch.randn(2000, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype).requires_grad_()
    weight = torch.rand(24, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).requires_grad_()
    for name, arguments in (("routed_experts", several_experts_case(dtype)), ("rms_norm", (norm, weight, 1e-5))):
        first, second = (gradients("triton", name, arguments) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@triton.jit
def _write_rows_of_blocks(ends, found, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr):
    block = tl.program_id(0)
    expert, first, end = routed_experts._rows_of_block(ends, block, EXPERTS, PADDED, BLOCK_M)
    tl.store(found + block * 3, expert)
    tl.store(found + block * 3 + 1, first)
    tl.store(found + block * 3 + 2, end)


@given(loads=st.lists(st.integers(0, 40), min_size=1, max_size=9), height=st.sampled_from([4, 16]))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_the_blocks_cover_each_row_once_and_never_two_experts(loads, height):
    ends = torch.tensor(loads).cumsum(0).to(DEVICE)
    blocks = routed_experts.row_blocks(sum(loads), len(loads), height)
    found = torch.zeros(blocks, 3, dtype=torch.int32, device=DEVICE)
    _write_rows_of_blocks[(blocks,)](ends, found, len(loads), triton.next_power_of_2(len(loads)), height)
    rows = [(row, expert) for expert, first, end in found.tolist() for row in range(first, min(first + height, end))]
    expert_of_row = torch.repeat_interleave(torch.arange(len(loads)), torch.tensor(loads)).tolist()
    assert rows == list(enumerate(expert_of_row))


# ------------------------------------------------------------------------------------------------------------- the norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5120), (2, 3, 5, 128), (70, 33), (5, 1), (0, 8), (2, 0, 8), (8,)], ids=str)
@pytest.mark.parametrize("weight_dtype", ["same", "fp32"])
def test_norms_of_any_shape_equal_the_naive_definition(shape, dtype, weight_dtype):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator)).to(DEVICE, dtype).requires_grad_()
    weight = torch.rand(shape[-1], generator=generator).to(DEVICE, dtype if weight_dtype == "same" else torch.float32)
    check_equal("rms_norm", (x, weight.requires_grad_(), 1e-5), dtype)


def test_rows_beyond_the_last_add_nothing_even_without_eps():
    """They read as zeros, and the root of zero has no inverse."""
    x, weight = torch.randn(3, 8, device=DEVICE).requires_grad_(), torch.rand(8, device=DEVICE).requires_grad_()
    check_equal("rms_norm", (x, weight, 0.0), torch.float32)


def test_a_norm_of_rows_apart_copies_nothing(monkeypatch):
    """Heads of queries are often a slice of a wider product."""
    wide = torch.randn(6, 40, device=DEVICE)
    seen = []
    real = launch.launch
    monkeypatch.setattr(rms_norm, "launch", lambda *args, **named: (seen.append(named), real(*args, **named)))
    with ops.using("triton"):
        out = ops.rms_norm(wide[:, 8:24], torch.ones(16, device=DEVICE), 1e-5)
    assert seen[0]["x"].data_ptr() == wide[:, 8:].data_ptr() and seen[0]["x_stride"] == 40
    with ops.using("naive"):
        assert_close(out, ops.rms_norm(wide[:, 8:24], torch.ones(16, device=DEVICE), 1e-5), torch.float32)


def test_many_rows_share_a_program_and_its_partial_sum():
    x = torch.randn(rms_norm.MOST_PARTIALS * 32 + 1, 8, device=DEVICE, requires_grad=True)
    weight = torch.rand(8, device=DEVICE, requires_grad=True)
    with launch.recording("sm_90") as launches:
        rms_norm.backward(x, weight, 1e-5, x)
    assert launches[0].arguments["steps"] == 2 and launches[0].arguments["partial"].shape == (257, 8)
    check_equal("rms_norm", (x, weight, 1e-5), torch.float32)


# ------------------------------------------------------------------------------------------ whole models and their steps


def test_the_nano_models_loss_and_all_gradients_are_the_same_in_every_gear():
    config = GLMConfig.from_toml(ROOT / "configs" / "model" / "nano.toml")
    torch.manual_seed(0)
    model = GLM(config).to(DEVICE)
    draw = torch.Generator().manual_seed(1)
    rows = [[torch.randint(config.vocab_size, (n,), generator=draw).tolist() for n in lengths] for lengths in ([5, 7], [9])]
    batch = [x.to(DEVICE) for x in pack(rows, length=12)]  # packed documents and padding
    results = {}
    for gear in ops.GEARS:
        model.zero_grad()
        with ops.using(gear):
            loss = model.loss(*batch, balance_weight=0.1)
            loss.total.backward()
        results[gear] = torch.stack(loss).detach(), {name: p.grad for name, p in model.named_parameters()}
    wanted, wanted_gradients = results.pop("naive")
    for gear, (found, found_gradients) in results.items():
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert found_gradients.keys() == wanted_gradients.keys()
        for name, gradient in wanted_gradients.items():
            assert gradient.count_nonzero() > 0, name
            scale = gradient.abs().max().item()
            torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=1e-4 * scale, msg=f"{gear}: {name}")


def test_optimiser_steps_run_in_the_triton_gear_as_in_the_torch_gear(tmp_path):
    text = write_text(tmp_path / "text.jsonl")
    losses = {}
    for gear in ("torch", "triton"):
        recipe = small_recipe(text, steps=2, gear=gear, every=100, tokens=32)
        run_small(recipe, tmp_path / gear)
        records = list(read_metrics(tmp_path / gear / "metrics.jsonl"))
        losses[gear] = [record["loss"] for record in records if record["kind"] == "step"]
    assert len(losses["triton"]) == 2
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-5)


def test_muon_moves_the_experts_by_the_kernels_gradients_as_by_the_naive_ones():
    moved = {}
    for gear in ("naive", "triton"):
        torch.manual_seed(0)
        model = GLM(MODEL).to(DEVICE)
        experts = model.model.layers[1].mlp.experts
        before = [p.detach().clone() for p in experts.parameters()]
        optimizer = build_optimizer(model, kind="muon", lr=0.01)
        with ops.using(gear):
            model.loss(torch.arange(16, device=DEVICE)[None], torch.arange(1, 17, device=DEVICE)[None]).total.backward()
        optimizer.step()
        moved[gear] = [p.detach() - old for p, old in zip(experts.parameters(), before, strict=True)]
    for found, wanted in zip(moved["triton"], moved["naive"], strict=True):
        assert wanted.abs().max() > 0
        # Muon turns a matrix into a nearly orthogonal one, which enlarges the differences of its small directions.
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.01 * wanted.abs().max().item())


# ------------------------------------------------------------------------------------------- autocast and the compiler


def test_under_autocast_the_experts_run_in_its_dtype_and_gradients_are_fp32():
    arguments = several_experts_case(torch.float32)
    cast = tuple(x.detach().half().requires_grad_() if x.is_floating_point() else x for x in arguments)
    with torch.autocast(DEVICE, torch.float16):
        found = gradients("triton", "routed_experts", arguments)
    wanted = gradients("triton", "routed_experts", cast)
    assert found[0].dtype == torch.float16 and torch.equal(found[0], wanted[0])
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other.float())


def test_under_autocast_the_norm_keeps_its_dtypes():
    x, weight = torch.randn(4, 8, device=DEVICE), torch.rand(8, device=DEVICE)
    with ops.using("triton"):
        wanted = ops.rms_norm(x, weight, 1e-5)
        with torch.autocast(DEVICE, torch.float16):
            found = ops.rms_norm(x, weight, 1e-5)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_under_torch_compile_the_kernels_stay_out_of_the_graph_and_run():
    x, experts, weights, gate_up, down = several_experts_case(torch.float32)
    scale = torch.rand(x.shape[1], device=DEVICE)
    ran = []

    def counting(graph, _inputs):
        ran.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def block(x: Tensor) -> Tensor:
        return ops.routed_experts(ops.rms_norm(x, scale, 1e-5) * 2, experts, weights, gate_up, down) + x

    with ops.using("triton"):
        wanted = block(x)
        found = torch.compile(block, backend=counting)(x)
    assert torch.equal(found, wanted)
    assert ran and not any("rsqrt" in target or "embedding_bag" in target for targets in ran for target in targets)


# ------------------------------------------------------------------------------------------------------------- refusals


def good_experts() -> dict:
    x, experts, weights, gate_up, down = (y.detach() for y in several_experts_case(torch.float32))
    return dict(x=x, experts=experts, weights=weights, gate_up=gate_up, down=down)


EXPERTS_REFUSED = {
    "fp64": (lambda a: {name: y.double() if y.is_floating_point() else y for name, y in a.items()}, TypeError, "x in float64"),
    "integers": (lambda a: a | dict(x=a["x"].int()), TypeError, "x in int32; gear 'triton' takes float32"),
    "experts in int32": (lambda a: a | dict(experts=a["experts"].int()), TypeError, r"int32; wanted torch.int64.*\.long"),
    "two dtypes": (lambda a: a | dict(x=a["x"].half()), TypeError, "x in float16.*gate_up in float32.*autocast"),
    "two devices": (lambda a: a | dict(down=a["down"].to("meta")), ValueError, "down on meta; wanted all on one device"),
    "tokens of another width": (lambda a: a | dict(x=a["x"][:, 1:]), ValueError, r"x \(30, 39\).*wanted x \(n, h\)"),
    "too few weights": (lambda a: a | dict(weights=a["weights"][1:]), ValueError, r"weights \(29, 3\)"),
    "one down matrix too few": (lambda a: a | dict(down=a["down"][1:]), ValueError, r"down \(4, 40, 20\)"),
    "an odd gate_up": (lambda a: a | dict(gate_up=a["gate_up"][:, 1:]), ValueError, r"gate_up \(5, 39, 40\)"),
    "a batch of sequences": (lambda a: a | dict(x=a["x"][None]), ValueError, r"x \(1, 30, 40\)"),
    "no experts per token": (
        lambda a: a | dict(experts=a["experts"][:, :0], weights=a["weights"][:, :0]), ValueError, "none of k, h, i, e zero",
    ),
    "rows that 32 bits cannot count": (
        lambda a: a | {name: a[name][:1].expand(2**29, 3) for name in ("experts", "weights")}
        | dict(x=a["x"][:1].expand(2**29, 40)), ValueError, "536,870,912 tokens for 3 experts.*rows at most",
    ),
    "a matrix that 32 bits cannot count": (
        lambda a: a | dict(x=a["x"][:, :1].expand(30, 2**16), gate_up=a["gate_up"][:, :1, :1].expand(5, 2**15, 2**16),
                           down=a["down"][:, :1, :1].expand(5, 2**16, 2**14)), ValueError, "2,147,483,648 elements",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS_REFUSED)
def test_experts_that_cannot_run_are_refused_before_anything_is_made(name, monkeypatch):
    change, error, message = EXPERTS_REFUSED[name]
    arguments = change(good_experts())
    refuse_to_work(monkeypatch)
    with ops.using("triton"), pytest.raises(error, match=f"(?s)routed_experts: found .*{message}"):
        ops.routed_experts(**arguments)


NORMS_REFUSED = {
    "fp64": (torch.zeros(2, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64), TypeError, "x in float64"),
    "integers": (torch.zeros(2, 4, dtype=torch.int64), torch.ones(4), TypeError, "x in int64"),
    "two devices": (torch.zeros(2, 4, device="meta"), torch.ones(4), ValueError, "x on meta, weight on cpu"),
    "another width": (torch.zeros(2, 4), torch.ones(5), ValueError, r"x \(2, 4\) and weight \(5,\)"),
    "a matrix of weights": (torch.zeros(2, 4), torch.ones(2, 4), ValueError, r"weight \(2, 4\)"),
    "no width": (torch.zeros(2, 0), torch.ones(0), ValueError, "rows of 0 numbers"),
    "a row for no register file": (torch.zeros(1, 2**16), torch.ones(2**16), ValueError, "65,536 numbers.*use gear 'torch'"),
    "rows that 32 bits cannot count": (torch.zeros(1, 4).expand(2**30 + 1, 4), torch.ones(4), ValueError, "1,073,741,825 rows"),
}


@pytest.mark.parametrize("name", NORMS_REFUSED)
def test_norms_that_cannot_run_are_refused_before_anything_is_made(name, monkeypatch):
    x, weight, error, message = NORMS_REFUSED[name]
    monkeypatch.setattr(launch, "target_of", lambda device: "interpreter")  # these tensors are on the CPU even beside a GPU
    refuse_to_work(monkeypatch)
    with ops.using("triton"), pytest.raises(error, match=f"rms_norm: found .*{message}"):
        ops.rms_norm(x, weight, 1e-5)


def refuse_to_work(monkeypatch) -> None:
    """From here on, nothing may be allocated by the ways that the kernels' files use."""

    def fail(*_args, **_named):
        raise AssertionError("something was made before the refusal")

    for name in ("new_empty", "contiguous", "to", "reshape"):
        monkeypatch.setattr(Tensor, name, fail)
    monkeypatch.setattr(torch, "empty_like", fail)


def test_tensors_on_the_cpu_are_refused_without_the_interpreter():
    script = """
import torch
from minglm import ops
with ops.using("triton"):
    try:
        ops.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)
    except ops.GearError as error:
        print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "found tensors on cpu; wanted a GPU of NVIDIA or AMD. Use gear 'torch', or set TRITON_INTERPRET=1" in found.stdout


def test_a_launch_of_too_many_programs_is_refused():
    with pytest.raises(ValueError, match="2,147,483,648 blocks; wanted fewer"):
        launch.launch(rms_norm._forward, "norm", 2**31, tiles.norm_tile(8), launch.Cost(0, 0), torch.ones(1))


# -------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("gpu", "target"),
    [((8, 0), "sm_80"), ((8, 7), "sm_86"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 1), "sm_120"), ((7, 5), None)],
)
def test_a_gpu_without_a_row_of_its_own_takes_the_newest_older_one(gpu, target):
    assert launch.nearest_target(*gpu) == target


def test_every_target_has_tiles_for_every_matrix_kernel():
    assert tiles.TILES.keys() == tiles.TARGETS.keys() | {"interpreter"}
    for table in tiles.TILES.values():
        assert table.keys() == {2, 4}
        for by_kernel in table.values():
            assert by_kernel.keys() == {"gate_up", "down", "dact", "drows", "dmatrix"}
            assert all(size >= 16 and size & (size - 1) == 0 for tile in by_kernel.values() for size in tile[:3])


@given(d=st.integers(1, rms_norm.LONGEST))
@settings(deadline=None, derandomize=True)
def test_a_norms_block_holds_whole_rows_in_few_registers(d):
    tile = tiles.norm_tile(d)
    assert d <= tile.n < 2 * d or tile.n == d == 1
    assert tile.m * tile.n <= 64 * 32 * tile.warps
