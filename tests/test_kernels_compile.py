"""Every kernel compiles for GPUs that are not here, spills nothing there, and what would is found."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from kernels import compile as compiling  # noqa: E402
from kernels import rms_norm, routed_experts, tiles  # noqa: E402
from minglm.config import GLMConfig  # noqa: E402

ROOT = Path(__file__).parent.parent


def run(*arguments: str, interpret: str | None = None) -> subprocess.CompletedProcess:
    """In a process of its own: what Triton's interpreter has been told to interpret cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = interpret
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def check_targets(targets: list[str], dtypes: list[str], out: Path) -> None:
    done = run("-m", "kernels.compile", "--target", *targets, "--dtype", *dtypes, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no kernel spills" in done.stdout
    results = json.loads(out.read_text())
    assert {(r["target"], r["dtype"]) for r in results} == {(target, dtype) for target in targets for dtype in dtypes}
    for target in targets:
        for dtype in dtypes:
            names = [r["kernel"] for r in results if (r["target"], r["dtype"]) == (target, dtype)]
            assert names == [launch.name for launch in compiling.record(target, dtype, 4096)]
    for r in results:
        assert r["spills"] == 0 and 0 < r["registers"] <= (512 if r["target"].startswith("gfx") else 255)
        assert r["shared"] <= r["shared_limit"] == tiles.TARGETS[r["target"]].shared_limit
        assert r["shared"] > 0 or "norm" in r["kernel"]  # AMD's wavefronts sum rows in registers
        for text in (r["kernel"], r["target"], f"{r['shared']:,} / {r['shared_limit']:,}", f"{r['flops'] / r['bytes']:.1f}"):
            assert text in done.stdout


def test_no_kernel_spills_in_bf16(tmp_path):
    check_targets(["sm_80", "sm_90", "gfx942"], ["bf16"], tmp_path / "results.json")  # all targets: in the slow test below


@pytest.mark.slow
@pytest.mark.parametrize("target", tiles.TARGETS)
def test_no_kernel_spills_on_any_target_in_any_dtype(target, tmp_path):
    check_targets([target], ["bf16", "fp16", "fp32"], tmp_path / "results.json")


UNFIT = [
    ("sm_90", "dact", (128, 128, 64, 8, 3), r"dact for sm_90 in bf16 spills \d+ bytes"),
    ("gfx942", "down", (256, 256, 32, 4, 2), r"down for gfx942 in bf16 spills \d+ registers"),
    ("sm_80", "down", (128, 128, 64, 8, 8), r"down for sm_80 in bf16 wants [\d,]+ bytes of shared memory.* 166,912"),
    ("sm_80", "drows", (16, 16, 8, 4, 2), "drows for sm_80 in bf16 does not compile: CompilationError"),
]
COMPILE_UNFIT = """
import json, sys
from kernels import compile as compiling, tiles
record = compiling.record
for target, name, tile, _ in json.loads(sys.argv[1]):
    tiles.TILES[target][2][name] = tiles.Tile(*tile)
    compiling.record = lambda *arguments: [launch for launch in record(*arguments) if launch.name == name]
    assert compiling.main(["--target", target, "--dtype", "bf16", "--workers", "1"]) == 1
"""


def test_a_tile_that_does_not_fit_its_target_is_found_and_named():
    done = run("-c", COMPILE_UNFIT, json.dumps(UNFIT))
    assert done.returncode == 0, done.stdout + done.stderr
    faults = re.findall("kernels.compile: (.*)", done.stderr)
    for (*_, message), fault in zip(UNFIT, faults, strict=True):
        assert re.match(message, fault)
    assert done.stderr.count("choose smaller tiles, more warps or fewer stages in kernels/tiles.py") == len(UNFIT)


def test_the_interpreter_is_refused():
    done = run("-m", "kernels.compile", interpret="1")
    assert done.returncode == 2
    assert "found TRITON_INTERPRET set, and interpreted kernels cannot be compiled; unset it" in done.stderr


def test_the_shapes_are_glm_4_5s():
    config = GLMConfig.from_toml(ROOT / "configs" / "model" / "glm-4.5.toml")
    assert compiling.GLM_4_5 == (
        config.hidden_size,
        config.moe_intermediate_size,
        config.n_routed_experts,
        config.num_experts_per_tok,
        config.num_attention_heads,
        config.head_dim,
    )


@pytest.mark.parametrize("dtype", compiling.DTYPES)
def test_every_kernel_is_among_the_recorded_launches(dtype):
    recorded = {launch.kernel.__name__ for launch in compiling.record("sm_90", dtype, 4096)}
    kernels = {name for name in vars(routed_experts) if name.endswith("_kernel")}
    assert recorded == kernels | {rms_norm._forward.__name__, rms_norm._backward.__name__}


@pytest.mark.parametrize("dtype", compiling.DTYPES)
def test_the_bytes_are_those_of_the_kernels_arguments(dtype):
    """Each once, but for the router's weights and the row numbers, which are few."""
    for launch in compiling.record("sm_90", dtype, 4096):
        tensors = {id(x): x for x in launch.arguments.values() if isinstance(x, torch.Tensor)}.values()
        assert launch.cost.bytes <= sum(x.nbytes for x in tensors) <= 1.01 * launch.cost.bytes, launch.name


def test_the_operations_are_six_for_each_weight_and_token_forward_and_twice_that_backward():
    shapes, tokens = compiling.GLM_4_5, 4096
    flops = {launch.name: launch.cost.flops for launch in compiling.record("sm_90", "bf16", tokens)}
    once = 2 * tokens * shapes.top_k * 3 * shapes.hidden * shapes.width
    assert flops["gate_up"] + flops["down"] == once
    assert sum(flops[name] for name in ("dact", "drows", "dmatrix, down", "dmatrix, gate_up")) == 2 * once


def test_recording_runs_nothing_and_ends():
    launches = compiling.record("sm_80", "bf16", 64)
    assert all(x.is_meta for one in launches for x in one.arguments.values() if isinstance(x, torch.Tensor))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = torch.full((2, 4), 3.0, device=device), torch.ones(4, device=device)
    torch.testing.assert_close(rms_norm.rms_norm(x, weight, 0.0), torch.ones_like(x))  # kernels run again
