"""`python -m kernels.compile`: compile every kernel for GPUs that are not here, and look for spills.

The launchers run as in training, on meta tensors of GLM-4.5's shapes, while `launch.recording` writes down what they would
start; Triton's own binder turns the recorded arguments into the variant that a GPU would get, and its compiler makes the
machine code. So nothing here repeats what the launchers say: another block size there is another one here.

Spills are registers that did not fit and went to memory inside the innermost loop. NVIDIA: bytes, from `ptxas -v`; AMD:
registers, from the metadata in the assembly. The exit code is 1 if anything spills, exceeds the target's shared memory or
does not compile.
"""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import triton
import tyro
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import create_function_from_signature

from kernels.launch import Launch, recording
from kernels.rms_norm import rms_norm
from kernels.routed_experts import routed_experts
from kernels.tiles import TARGETS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Shapes(NamedTuple):
    """A model's sizes as the kernels meet them; by default GLM-4.5's, of which the tests know."""

    hidden: int = 5120
    width: int = 1536
    """Of one expert."""
    experts: int = 160
    top_k: int = 8
    heads: int = 96
    head_dim: int = 128


GLM_4_5 = Shapes()


@dataclass(frozen=True)
class Compile:
    """Compile all kernels ahead of time at GLM-4.5's shapes; print shared memory, registers, spills, and the work of each.

    Needs no GPU. The exit code is 1 if anything spills, exceeds the target's shared memory or does not compile.
    """

    target: tuple[Literal[tuple(TARGETS)], ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    """GPU architectures."""
    dtype: tuple[Literal[tuple(DTYPES)], ...] = tuple(DTYPES)
    """Of tokens and weights."""
    shapes: Shapes = GLM_4_5
    """Of another model."""
    tokens: int = 4096
    """On one device, for operations and bytes."""
    workers: int = os.cpu_count() or 1
    """Processes that compile at the same time."""
    json: Path | None = None
    """Also write the results to this file."""


@dataclass(frozen=True)
class Result:
    """What the compiler made of one kernel. `spills`: bytes (NVIDIA) or registers (AMD); `registers` of a thread."""

    kernel: str
    target: str
    dtype: str
    warps: int
    stages: int
    shared: int
    shared_limit: int
    registers: int
    spills: int
    flops: int
    bytes: int
    error: str = ""

    def fault(self) -> str:
        """What is wrong with it, or an empty string."""
        name = f"{self.kernel} for {self.target} in {self.dtype}"
        if self.error:
            return f"{name} does not compile: {self.error}"
        if self.spills:
            return f"{name} spills {self.spills} {'registers' if self.target.startswith('gfx') else 'bytes'}"
        if self.shared > self.shared_limit:
            return f"{name} wants {self.shared:,} bytes of shared memory; the target has {self.shared_limit:,}"
        return ""


def record(target: str, dtype: str, tokens: int, shapes: Shapes = GLM_4_5) -> list[Launch]:
    """Every launch of a training step's and a forward pass's operations, each variant once. Allocates nothing."""

    def meta(*shape: int, kind: torch.dtype = DTYPES[dtype]) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta", requires_grad=kind.is_floating_point)

    s = shapes
    experts = meta(tokens, s.top_k, kind=torch.int64)
    matrices = meta(s.experts, 2 * s.width, s.hidden), meta(s.experts, s.hidden, s.width)
    with recording(target) as launches:
        for shape in ((tokens, s.hidden), (tokens, s.heads, s.head_dim)):
            rms_norm(meta(*shape), meta(shape[-1]), 1e-5).sum().backward()
        routed_experts(meta(tokens, s.hidden), experts, meta(tokens, s.top_k, kind=torch.float32), *matrices).sum().backward()
        with torch.no_grad():
            routed_experts(meta(tokens, s.hidden), experts, meta(tokens, s.top_k, kind=torch.float32), *matrices)
    if DTYPES[dtype] != torch.float32:  # under autocast the norms' weights stay fp32
        with recording(target) as mixed:
            rms_norm(meta(tokens, s.heads, s.head_dim), meta(s.head_dim, kind=torch.float32), 1e-5).sum().backward()
        launches += [launch._replace(name=f"{launch.name}, fp32 weight") for launch in mixed]
    return list({_variant(launch): launch for launch in reversed(launches)}.values())[::-1]


def _variant(launch: Launch) -> tuple:
    """What the compiler sees of a launch: names and constants, but not which tensor."""
    arguments = ((k, v.dtype if isinstance(v, torch.Tensor) else v) for k, v in launch.arguments.items())
    return launch.kernel, launch.tile, tuple(arguments)


def compile_launch(launch: Launch, target: str, dtype: str) -> Result:
    """Compile the variant of the kernel that this launch would start on `target`."""
    gpu = TARGETS[target]
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages}
    shared = registers = spills = 0
    error = ""
    log = io.StringIO()
    try:
        # Always compile: a cached kernel has no log. Triton prints that of ptxas.
        with _compiler_knobs(), contextlib.redirect_stdout(log):
            compiled = triton.compile(_source(launch, gpu, options), target=GPUTarget(*gpu[:3]), options=options)
        shared = compiled.metadata.shared
        registers, spills = _read_ptxas(log.getvalue()) if gpu.backend == "cuda" else _read_amdgcn(compiled.asm["amdgcn"])
    except Exception as failure:  # whatever the compiler raises is this row's result, and fails the whole command
        error = f"{type(failure).__name__}: {failure}".strip().splitlines()[0]
    return Result(
        launch.name, target, dtype, *launch.tile[3:], shared, gpu.shared_limit, registers, spills, *launch.cost, error
    )  # fmt: skip


def _source(launch: Launch, gpu: NamedTuple, options: dict) -> object:
    """As `JITFunction.run` makes it, with the backend of `gpu` in place of the active driver's."""
    backend = triton.compiler.make_backend(GPUTarget(*gpu[:3]))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, _ = bind(**launch.arguments, **options)
    _, signature, constants, attributes = launch.kernel._pack_args(backend, options, bound, specialization, None)
    return triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)


@contextlib.contextmanager
def _compiler_knobs() -> Iterator[None]:
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        yield


def _read_ptxas(log: str) -> tuple[int, int]:
    """Registers of a thread and bytes spilled."""
    registers = re.findall(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise RuntimeError(f"found no register counts in the log of ptxas: {log!r}")
    return max(map(int, registers)), sum(int(stores) + int(loads) for stores, loads in spills)


def _read_amdgcn(assembly: str) -> tuple[int, int]:
    """Vector registers of a thread (accumulation registers among them) and registers spilled."""
    found = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", assembly)}
    missing = {"vgpr_count", "vgpr_spill_count", "sgpr_spill_count"} - found.keys()
    if missing:
        raise RuntimeError(f"found no {', '.join(sorted(missing))} in the assembly")
    return found["vgpr_count"], found["vgpr_spill_count"] + found["sgpr_spill_count"]


def _compile_one(target: str, dtype: str, tokens: int, shapes: Shapes, index: int) -> Result:
    return compile_launch(record(target, dtype, tokens, shapes)[index], target, dtype)


def compile_all(command: Compile) -> list[Result]:
    """Every kernel in every dtype for every target, in that order of loops from the inside out."""
    jobs = [
        (target, dtype, command.tokens, command.shapes, index)
        for target in command.target
        for dtype in command.dtype
        for index in range(len(record(target, dtype, command.tokens, command.shapes)))
    ]
    bar = {"total": len(jobs), "desc": "compiling", "unit": "kernel", "leave": False}
    if command.workers == 1:
        return [_compile_one(*job) for job in tqdm(jobs, **bar)]
    context = multiprocessing.get_context("spawn")  # torch's and the compiler's threads do not survive a fork
    with ProcessPoolExecutor(min(command.workers, len(jobs)), context) as pool:
        return list(tqdm(pool.map(_compile_one, *zip(*jobs, strict=True)), **bar))


def table(results: list[Result]) -> str:
    """Registers, shared memory and spills of each kernel, target and dtype."""
    head = f"{'kernel':35} {'target':7} {'dtype':5} {'warps':>5} {'stages':>6} {'shared / limit':>17}"
    lines = [f"{head} {'registers':>9} {'spills':>6}"]
    for r in results:
        shared = f"{r.shared:,} / {r.shared_limit:,}"
        lines.append(
            f"{r.kernel:35} {r.target:7} {r.dtype:5} {r.warps:5} {r.stages:6} {shared:>17} {r.registers:9} {r.spills:6}"
            + ("  <- " + r.fault().partition(f"in {r.dtype} ")[2] if r.fault() else "")
        )
    return "\n".join(lines)


def work(results: list[Result]) -> str:
    """Operations, bytes and operations a byte of each kernel, which depend on the dtype and not on the target."""
    each = {(r.kernel, r.dtype): r for r in results}
    lines = [f"{'kernel':35} {'dtype':5} {'GFLOP':>10} {'GB moved':>9} {'FLOP/byte':>9}"]
    for r in each.values():
        lines.append(f"{r.kernel:35} {r.dtype:5} {r.flops / 1e9:10,.1f} {r.bytes / 1e9:9.3f} {r.flops / r.bytes:9.1f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a kernel is not fit for its target, 2 for what cannot be done as asked."""
    command = tyro.cli(Compile, prog="python -m kernels.compile", args=arguments)
    if triton.knobs.runtime.interpret:
        print(
            "kernels.compile: found TRITON_INTERPRET set, and interpreted kernels cannot be compiled; unset it", file=sys.stderr
        )
        return 2
    shapes = "GLM-4.5's shapes" if command.shapes == GLM_4_5 else command.shapes
    print(f"compile: {', '.join(command.target)} in {', '.join(command.dtype)}, at {shapes}\n")
    results = compile_all(command)
    print(table(results))
    print(f"\nwork of one launch, {command.tokens:,} tokens on the device, each byte moved once:\n\n{work(results)}")
    if command.json is not None:
        command.json.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n")
        print(f"\nmade: {command.json}")
    faults = [fault for fault in map(Result.fault, results) if fault]
    if faults:
        print(
            "\nkernels.compile: "
            + "\n".join(faults)
            + "\nchoose smaller tiles, more warps or fewer stages in kernels/tiles.py",
            file=sys.stderr,
        )
        return 1
    print("\nno kernel spills, and all keep within the shared memory of their targets")
    return 0


if __name__ == "__main__":
    sys.exit(main())
