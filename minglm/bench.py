"""How fast this machine trains: minglm beside Hugging Face's `Glm4MoeForCausalLM`, as ratios from one run. (How fast it
writes: `bench_decoding`; how fast it makes data: `bench_data`.)

Speeds differ from machine to machine and from minute to minute, so every number is a median over repeats in which the
contestants take turns, next to the matrix-product peak that was measured in the same minute. All contestants start from
the same weights, and their losses are compared before the clock starts.
"""

import dataclasses
import gc
import json
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from minglm import ops
from minglm.config import GLMConfig
from minglm.model import GLM
from minglm.optim import build_optimizer
from minglm.params import count, training_flops_per_token
from minglm.train.recipe import find_config


@dataclass(frozen=True)
class Workload:
    """One optimiser step on a batch of `sequences` x `length` random tokens, timed `repeats` times."""

    model: str
    sequences: int
    length: int
    repeats: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


WORKLOADS = {
    "nano": Workload("nano", sequences=16, length=256, repeats=11),
    "tiny": Workload("tiny", sequences=4, length=512, repeats=5),
}

# name -> (experts implementation of transformers or gear of ours, kind of optimiser)
CONTESTANTS = {
    "minglm, AdamW": ("torch", "adamw"),
    "minglm, Muon": ("torch", "muon"),
    "minglm, naive gear, AdamW": ("naive", "adamw"),
    "transformers eager, AdamW": ("eager", "adamw"),
    "transformers grouped_mm, AdamW": ("grouped_mm", "adamw"),
}

# Which of the profiler's entries belong to which part of a step. Forward and backward are counted together.
PARTS = {
    "attention (scores, softmax, values)": ("_TiledAttention", "scaled_dot_product"),
    "projections (q, k, v, o, router)": ("aten::linear", "AddmmBackward", "MmBackward", "aten::matmul"),
    "dense and shared feed-forward": ("_SwiGLU",),
    "routed experts": ("_RoutedExperts",),
    "norms and RoPE": ("_RMSNorm", "_Rotary"),
    "head and loss": ("_LinearCrossEntropy",),
    "optimiser": ("Optimizer.step",),
}


def measure_peak(device: torch.device) -> float:
    """The machine's fp32 matrix-product peak in FLOP/s: the best of ten 1,024-cube products."""
    a, b = torch.randn(2, 1024, 1024, device=device)
    seconds = [_timed(lambda: a @ b, device) for _ in range(10)]
    return 2 * 1024**3 / min(seconds)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _config(workload: Workload) -> GLMConfig:
    # transformers trains no MTP layer, so neither side has one.
    return dataclasses.replace(GLMConfig.from_toml(find_config("model", workload.model)), num_nextn_predict_layers=0)


def _batch(workload: Workload, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random tokens, (b, t), and the labels that are the same tokens shifted."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = _config(workload).vocab_size
    ids = torch.randint(0, vocab_size, (workload.sequences, workload.length + 1), generator=generator).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _transformers_model(model: GLM, implementation: str) -> nn.Module:
    """transformers' model with our weights; the names in memory are the same."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = Glm4MoeConfig(**model.config.to_dict())
    twin = Glm4MoeForCausalLM._from_config(config, attn_implementation="sdpa")
    twin.set_experts_implementation(implementation)
    twin.load_state_dict(model.state_dict())
    return twin


def build_step(name: str, workload: Workload, device: torch.device) -> Callable[[], Tensor]:
    """A function that runs one full training step of the contestant and returns its loss, an fp32 scalar."""
    implementation, kind = CONTESTANTS[name]
    torch.manual_seed(0)
    model = GLM(_config(workload))
    input_ids, labels = _batch(workload, device)
    if implementation in ops.GEARS:
        model.to(device).train()
        optimizer = build_optimizer(model, lr=1e-4, kind=kind)

        def loss() -> Tensor:
            with ops.using(implementation):
                return model.loss(input_ids, labels, balance_weight=0.0).total

    else:
        twin = _transformers_model(model, implementation).to(device).train()
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

        def loss() -> Tensor:
            return twin(input_ids, shift_labels=labels, labels=labels, use_cache=False).loss

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def _high_water() -> int:
    """Peak memory of this process in bytes. (Linux's `ru_maxrss` would be inherited from the process that started it.)"""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _peak_bytes(name: str, workload: Workload, threads: int) -> int:
    """Runs in a fresh process: how far three steps push its peak memory above that of the imports."""
    torch.set_num_threads(threads)
    import transformers  # noqa: F401  its import counts for nobody

    before = _high_water()
    step = build_step(name, workload, torch.device("cpu"))
    for _ in range(3):
        step()
    return _high_water() - before


def peak_memory(name: str, workload: Workload) -> int:
    """Peak memory of a contestant in bytes: weights, gradients, optimiser state and activations, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (name, workload, torch.get_num_threads()))


def shares(name: str, workload: Workload, device: torch.device) -> dict[str, float]:
    """Each part's share of one step of our model, from PyTorch's profiler; "everything else" is what no entry names."""
    step = build_step(name, workload, device)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    found = dict.fromkeys(PARTS, 0.0)
    claimed_until: dict[int, float] = {}
    # Events in order of their start: the outermost named event claims its time, what it calls is inside it.
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        if event.time_range.start < claimed_until.get(event.thread, -math.inf):
            continue
        for part, names in PARTS.items():
            if any(event.name.startswith((n, f"aten::{n}", f"autograd::engine::evaluate_function: {n}")) for n in names):
                found[part] += event.time_range.elapsed_us() / 1e6
                claimed_until[event.thread] = event.time_range.end
                break
    found["everything else"] = max(0.0, seconds - sum(found.values()))
    total = sum(found.values())
    return {part: spent / total for part, spent in found.items()}


def run(size: str, device: str = "auto", repeats: int | None = None, memory: bool = True) -> dict:
    """Time all contestants on one workload ("nano" or "tiny"). -> tokens/s, bytes, shares and ratios, ready for `report`."""
    workload = WORKLOADS[size]
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    steps = {name: build_step(name, workload, where) for name in CONTESTANTS}
    losses = {name: step().item() for name, step in steps.items()}  # the first step also warms up
    if max(losses.values()) - min(losses.values()) > 1e-4 * abs(losses["minglm, AdamW"]):
        raise RuntimeError(f"the contestants do not compute the same loss: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = []
    for _ in tqdm(range(repeats or workload.repeats), desc=f"bench {size}", unit="round"):
        peaks.append(measure_peak(where))
        for name, step in steps.items():
            seconds[name].append(_timed(step, where))
    del steps
    gc.collect()
    speed = {name: workload.tokens / statistics.median(values) for name, values in seconds.items()}
    flops = training_flops_per_token(_config(workload), workload.length)
    return {
        "size": size,
        "device": str(where),
        "threads": torch.get_num_threads(),
        "tokens_per_step": workload.tokens,
        "parameters": count(_config(workload)).total,
        "peak_flops": statistics.median(peaks),
        "training_flops_per_token": flops,
        "tokens_per_second": speed,
        "peak_bytes": {name: peak_memory(name, workload) for name in CONTESTANTS} if memory and where.type == "cpu" else {},
        "shares": shares("minglm, Muon", workload, where),
    }


def report(result: dict) -> str:
    """The measured table as text."""
    speed = result["tokens_per_second"]
    fastest = max(speed[name] for name in speed if name.startswith("transformers"))
    lines = [
        f"{result['size']}: {result['parameters'] / 1e6:.2f}M parameters, {result['tokens_per_step']:,} tokens a step, "
        f"{result['device']}, {result['threads']} threads, fp32 matrix-product peak {result['peak_flops'] / 1e9:.0f} GFLOP/s",
        f"{'full training step':34}{'tokens/s':>10}{'x transformers':>16}{'of peak':>9}{'memory':>10}",
    ]
    for name, tokens in speed.items():
        used = tokens * result["training_flops_per_token"] / result["peak_flops"]
        memory = result["peak_bytes"].get(name)
        lines.append(
            f"{name:34}{tokens:>10,.0f}{tokens / fastest:>16.2f}{used:>9.0%}"
            + (f"{memory / 2**20:>7,.0f} MB" if memory else f"{'-':>10}")
        )
    lines.append("share of a step (minglm, Muon): " + ", ".join(f"{p} {s:.0%}" for p, s in result["shares"].items()))
    return "\n".join(lines)


def main(sizes: tuple[str, ...], out: Path | None, repeats: int | None = None) -> None:
    """Run and print training, data and decoding at `sizes`; with `out`, append the results there, one JSON object a line."""
    from minglm import bench_data, bench_decoding

    for size in sizes:
        result = run(size, repeats=repeats)
        print(report(result))
        step_seconds = result["tokens_per_step"] / result["tokens_per_second"]["minglm, Muon"]
        result |= bench_data.run(WORKLOADS[size], step_seconds)
        print(bench_data.report(result) + "\n")
        result |= bench_decoding.run(size, repeats=repeats or 3)
        print(bench_decoding.report(result) + "\n")
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
