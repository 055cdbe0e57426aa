"""The planner says what ranks really hold, takes the best mesh, and gives the reason for every other; launch scripts work.

What a rank holds is compared with PyTorch's own cutting of the real model's tensors, a way that shares no formula.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.run import get_args_parser
from torch.utils._python_dispatch import TorchDispatchMode

from minglm.config import ConfigError, GLMConfig
from minglm.model import GLM, DecoderLayer
from minglm.params import count, training_memory
from minglm.train.device import Device
from minglm.train.recipe import Recipe, load_recipe
from scale.dry_run import dry_run
from scale.footprint import layer_sizes, most_memory, muon_matrices, parameters, root_elements
from scale.hardware import GPUS, find_gpu
from scale.mesh import Layout, LayoutError
from scale.plan import Setting, Workload, main, memory_of_rank, parameters_of_rank, plan, report
from scale.report import launch
from scale.roofline import Links, step_time, worst_spread
from scale.search import AS_GOOD, GIB, divisors, remedies
from scale.train import check

LAW = settings(deadline=None, derandomize=True, max_examples=30)
ROOT = Path(__file__).parents[1]
SIZES = sorted((ROOT / "configs" / "model").glob("*.toml"))
GLM_45 = GLMConfig.from_toml(ROOT / "configs/model/glm-4.5.toml")
AIR = GLMConfig.from_toml(ROOT / "configs/model/glm-4.5-air.toml")


@st.composite
def configs(draw) -> GLMConfig:
    kv_heads = draw(st.integers(1, 2))
    return GLMConfig(
        vocab_size=draw(st.integers(1, 60)),
        hidden_size=draw(st.integers(1, 24)),
        num_hidden_layers=draw(st.integers(1, 6)),
        first_k_dense_replace=draw(st.integers(0, 7)),
        intermediate_size=draw(st.integers(1, 24)),
        num_attention_heads=kv_heads * draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        head_dim=4 * draw(st.integers(1, 3)),
        attention_bias=draw(st.booleans()),
        use_qk_norm=draw(st.booleans()),
        n_routed_experts=draw(st.integers(2, 12)),
        num_experts_per_tok=draw(st.integers(1, 2)),
        moe_intermediate_size=draw(st.integers(1, 12)),
        num_nextn_predict_layers=draw(st.integers(0, 1)),
        tie_word_embeddings=draw(st.booleans()),
    )


@st.composite
def config_and_layout(draw) -> tuple[GLMConfig, Layout]:
    """Odd ones, too, whose rows do not divide evenly."""
    config = draw(configs())
    ep = draw(st.sampled_from(divisors(config.n_routed_experts)))
    layout = Layout(draw(st.integers(1, 3)), draw(st.integers(1, 6)), ep)
    try:
        layout.check(config)
    except LayoutError:
        assume(False)
    return config, layout


def meta_model(config: GLMConfig) -> GLM:
    with torch.device("meta"):
        return GLM(config)


def chunk(tensor: torch.Tensor, ranks: int, rank: int, dim: int = 0) -> torch.Tensor:
    """What PyTorch's chunk gives a rank, which is FSDP's rule."""
    pieces = tensor.chunk(ranks, dim)
    return pieces[rank] if rank < len(pieces) else tensor.narrow(dim, 0, 0)


# ---------------------------------------------------------------- what each rank holds


@given(config_and_layout())
@LAW
def test_a_rank_holds_what_pytorch_cuts_for_it(drawn):
    config, layout = drawn
    model = meta_model(config)
    for rank in range(layout.world_size):
        shard = rank % layout.shards
        held = {True: 0, False: 0}
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3:
                local = chunk(parameter, layout.ep, shard % layout.ep)
                part = chunk(local, layout.fsdp, shard // layout.ep, layout.expert_dim(config))
            else:
                part = chunk(parameter, layout.shards, shard)
            held[name.startswith("mtp.")] += part.numel()
        assert parameters_of_rank(config, layout, rank) == (held[False], held[True])


@given(config_and_layout())
@LAW
def test_the_ranks_of_a_copy_hold_the_model_once(drawn):
    config, layout = drawn
    for copy in range(layout.dp):
        ranks = range(copy * layout.shards, (copy + 1) * layout.shards)
        main, mtp = (sum(numbers) for numbers in zip(*(parameters_of_rank(config, layout, r) for r in ranks), strict=True))
        assert (main, mtp) == (count(config).main, count(config).mtp)


@pytest.mark.parametrize("path", SIZES, ids=lambda path: path.stem)
def test_shipped_sizes_are_held_once(path):
    config = GLMConfig.from_toml(path)
    tried = 0
    for layout in (Layout(1, 1, 1), Layout(2, 3, 1), Layout(1, 16, 32), Layout(2, 32, 8), Layout(1, 1, 32), Layout(1, 128, 4)):
        try:
            layout.check(config)
        except LayoutError:
            continue
        tried += 1
        sums = [sum(n) for n in zip(*(parameters_of_rank(config, layout, r) for r in range(layout.shards)), strict=True)]
        assert sums == [count(config).main, count(config).mtp]
    assert tried >= 3


def test_512_ranks_hold_the_published_numbers():
    held = [parameters_of_rank(GLM_45, Layout(1, 64, 8), rank) for rank in range(512)]
    assert sum(main for main, _ in held) == 352_797_814_784
    assert sum(mtp for _, mtp in held) == 3_988_069_632
    assert len(set(held)) > 1  # uneven: 160 rows of a router over 512 ranks


@given(configs())
@LAW
def test_parameters_are_those_of_the_model(config):
    expected = sorted((re.sub(r"\.\d+\.", ".N.", name), tuple(p.shape)) for name, p in meta_model(config).named_parameters())
    found = sorted((re.sub(r"\.\d+\.", ".N.", p.name), p.shape) for p in parameters(config) for _ in range(p.times))
    assert found == expected


@given(configs())
@LAW
def test_layers_and_root_are_those_that_fsdp_groups(config):
    model = meta_model(config)
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    sizes = []
    for layer in layers:
        experts = sum(p.numel() for p in layer.parameters() if p.ndim == 3)
        sizes.append((sum(p.numel() for p in layer.parameters()) - experts, experts))
    assert [size[:2] for size in layer_sizes(config)] == sizes
    assert root_elements(config) == sum(p.numel() for p in model.parameters()) - sum(map(sum, sizes))


@pytest.mark.parametrize("config", [GLM_45, AIR], ids=["glm-4.5", "air"])
def test_muon_counts_each_matrix_of_a_stack(config):
    experts = (config.num_moe_layers + 1) * config.n_routed_experts
    of_experts = {(config.moe_intermediate_size, config.hidden_size), (config.hidden_size, config.moe_intermediate_size)}
    # Gate, up and down of each expert; the shared expert's have the same shapes.
    assert sum(n for n, *shape in muon_matrices(config) if tuple(shape) in of_experts) == 3 * (
        experts + config.num_moe_layers + 1
    )


# ---------------------------------------------------------------- memory


@given(config_and_layout())
@LAW
def test_state_of_all_ranks_is_that_of_the_model(drawn):
    """Optimiser state exactly; weights and gradients with FSDP's padding, less than a row of each parameter a rank."""
    config, layout = drawn
    memories = [memory_of_rank(config, layout, rank, Workload(8)) for rank in range(layout.shards)]
    whole = training_memory(config)
    assert sum(memory.optimizer for memory in memories) == whole.optimizer
    assert {memory.weights for memory in memories} == {memory.gradients for memory in memories}
    padding = sum(memory.weights for memory in memories) - whole.weights
    a_row = sum(4 * p.times * p.elements // p.shape[0] for p in parameters(config))
    assert 0 <= padding < layout.shards * a_row
    if layout.shards == 1:
        assert padding == 0


@given(config_and_layout())
@LAW
def test_no_rank_needs_more_than_the_most(drawn):
    config, layout = drawn
    totals = [memory_of_rank(config, layout, rank, Workload(8), 5).total for rank in range(layout.world_size)]
    assert max(totals) == most_memory(config, layout, Workload(8), 5).total


@given(configs())
@LAW
def test_two_layers_are_gathered_at_a_time(config):
    layers = [layer for layer in meta_model(config).modules() if isinstance(layer, DecoderLayer)]
    sizes = [sum(p.numel() * (2 if p.ndim == 3 else 4) for p in layer.parameters()) for layer in layers]
    largest = max(map(sum, zip(sizes, sizes[1:], strict=False)), default=sizes[0])
    assert memory_of_rank(config, Layout(dp=2), 0, Workload(8)).unsharded_layers == largest


def test_what_a_rank_holds_alone_is_neither_gathered_nor_reduced():
    memory = most_memory(GLM_45, Layout(), Workload())
    assert memory.unsharded_layers == memory.layer_gradients == memory.root_weights == memory.exchange == 0
    with_experts_apart, all_apart = (most_memory(GLM_45, layout, Workload()) for layout in (Layout(ep=8), Layout(dp=2, ep=8)))
    assert 0 < with_experts_apart.unsharded_layers < all_apart.unsharded_layers


@pytest.mark.parametrize("config", [GLM_45, AIR], ids=["glm-4.5", "air"])
def test_memory_grows_with_work_and_shrinks_with_ranks(config):
    layout = Layout(1, 8, 8)

    def total(layout: Layout = layout, **changes) -> int:
        return most_memory(config, layout, Workload(**changes)).total

    assert total() < total(sequences_per_micro_batch=2) < total(sequences_per_micro_batch=2, sequence_length=8192)
    assert total() < total(activation_checkpointing=False)
    assert total() < total(imbalance=2.0)
    assert total(Layout(1, 64, 8)) < total(Layout(1, 32, 8)) < total(Layout(1, 16, 8)) < total()
    gathered = [most_memory(config, Layout(1, 64 // ep, ep), Workload()).unsharded_layers for ep in (1, 2, 4, 8, 16, 32)]
    assert gathered == sorted(gathered, reverse=True) and len(set(gathered)) == len(gathered)
    short, long = (most_memory(config, layout, Workload(rollout_tokens=n)) for n in (1000, 2000))
    assert long.rollout - short.rollout == short.kv_cache > 0 and long.total == short.total


def test_the_moments_do_not_add_up():
    """When the optimiser works, no layer is gathered."""
    memory = most_memory(GLM_45, Layout(1, 64, 8), Workload())
    assert memory.total == memory.held + max(memory.micro_batch, memory.update)
    assert 0 < memory.update < memory.micro_batch


class Casts(TorchDispatchMode):
    """Counts the copies that are made of tensors of one shape in another dtype."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_to_copy" in str(func) and tuple(args[0].shape) == self.shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_autocast_keeps_no_copies_of_weights():
    """With its cache it would keep one of each until the forward pass ends, FSDP or not: 24 GiB a rank for GLM-4.5."""
    linear, x = nn.Linear(16, 24), torch.randn(4, 16)
    with Casts((24, 16)) as casts, Device(torch.device("cpu"), True, "").autocast():
        linear(x)
        linear(x)
    assert casts.count == 2


def test_autograd_keeps_a_copy_of_each_weight_unless_a_layer_is_computed_again():
    config = GLMConfig(num_nextn_predict_layers=0, num_hidden_layers=3)
    kept: dict[bool, int] = {}
    for checkpointing in (False, True):
        model = GLM(config)
        model.activation_checkpointing = checkpointing
        shapes = {tuple(p.shape) for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n and "mlp.gate." not in n}
        shapes |= {shape[::-1] for shape in shapes}
        sizes: dict[int, int] = {}
        alive = []

        def pack(x: torch.Tensor, shapes=shapes, sizes=sizes, alive=alive) -> torch.Tensor:
            if x.dtype == torch.bfloat16 and tuple(x.shape) in shapes:
                sizes[x.untyped_storage().data_ptr()] = x.nbytes
            alive.append(x)
            return x

        ids = torch.zeros(1, 7, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.loss(ids, ids)
        kept[checkpointing] = sum(sizes.values())
    assert kept[False] == most_memory(config, Layout(), Workload(8, activation_checkpointing=False)).weight_copies
    assert kept[True] == 0


def test_the_real_launcher_holds_gathers_and_needs_what_was_planned():
    """A step of GLM-4.5 with fewer layers as the first of 64 ranks, on tensors without memory, counted as it runs."""
    config = dataclasses.replace(GLM_45, num_hidden_layers=4)
    layout = Layout(1, 8, 8)
    (run,) = dry_run(config, layout, 4096, 1, True, ranks=(0,))
    memory = memory_of_rank(config, layout, 0, Workload())
    assert (run.main, run.mtp) == parameters_of_rank(config, layout, 0)
    counters = sum(4 * parameter.times for parameter in parameters(config) if not parameter.is_muon)  # AdamW's, of steps
    assert run.state_bytes == memory.held + counters  # nothing is padded here
    # Groups: 5 layers (one is the MTP's), the experts of 2 of them, the rest. Each is gathered twice, the rest once.
    assert run.collectives["allgather_base"][0] == 2 * (5 + 2) + 1
    assert run.collectives["reduce_scatter_base"][0] == 5 + 2 + 1
    # Nothing overlaps in a dry run, tokens are balanced, and there is no reserve.
    assert 0.6 < run.peak_bytes / memory.total < 1


# ---------------------------------------------------------------- time


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 9))
@LAW
def test_the_worst_group_is_found_among_all(dp, fsdp, ep, node):
    layout = Layout(dp, fsdp, ep)
    ranks = torch.arange(layout.world_size).view(dp, fsdp, ep)
    groups = {
        "ep": ranks.reshape(-1, ep),
        "fsdp": ranks.permute(0, 2, 1).reshape(-1, fsdp),
        "shard": ranks.reshape(dp, -1),
        "dp": ranks.reshape(dp, -1).T,
    }
    links = Links(layout, dataclasses.replace(GPUS["h100"], gpus_per_node=node))
    for name, members in groups.items():
        spreads = []
        for group in members:
            counts = torch.bincount(group // node)
            counts = counts[counts > 0]
            spreads.append((len(counts), -int(counts.min())))
        nodes, together = max(spreads)
        assert links.groups[name] == (nodes, -together), (name, layout, node)


def test_a_group_within_a_node_never_uses_the_network():
    slow = dataclasses.replace(GPUS["h100"], inter_node_gb_per_s=1e-6)
    times = [step_time(GLM_45, Layout(1, 1, 8), Workload(), gpu, 0.4, 1) for gpu in (GPUS["h100"], slow)]
    assert times[0] == times[1]
    assert step_time(GLM_45, Layout(1, 2, 8), Workload(), slow, 0.4, 1).fsdp > 100 * times[0].fsdp
    assert worst_spread(8, 1, {0}, 8) == (1, 8) and worst_spread(8, 1, {4}, 8) == (2, 4)


@pytest.mark.parametrize("name", ["tflops", "memory_gb_per_s", "intra_node_gb_per_s", "inter_node_gb_per_s"])
def test_a_faster_gpu_never_takes_longer(name):
    faster = dataclasses.replace(GPUS["h100"], **{name: 10 * getattr(GPUS["h100"], name)})
    changed = False
    for layout in (Layout(2, 16, 16), Layout(1, 64, 8), Layout(1, 512, 1), Layout(1, 1, 8)):
        before, after = (step_time(GLM_45, layout, Workload(), gpu, 0.4, 4) for gpu in (GPUS["h100"], faster))
        assert all(getattr(after, field.name) <= getattr(before, field.name) for field in dataclasses.fields(after))
        changed |= after != before
    assert changed


# ---------------------------------------------------------------- the choice


SETTING = Setting(GLM_45, GPUS["h100"])


@pytest.mark.parametrize(
    "setting, gpus",
    [
        (SETTING, 512),
        (SETTING, 1280),
        (Setting(AIR, GPUS["h200"]), 64),
        (Setting(AIR, GPUS["a100-80"]), 96),
        (Setting(GLMConfig(), GPUS["a100-40"], Workload(256)), 6),
        (Setting(GLMConfig(), GPUS["h100"], Workload(256)), 1),
    ],
)
def test_the_chosen_mesh_is_the_best_of_all_that_fit(setting, gpus):
    made = plan(setting, gpus)
    layouts = [
        Layout(dp, fsdp, gpus // dp // fsdp)
        for dp in range(1, gpus + 1)
        for fsdp in range(1, gpus // dp + 1)
        if gpus % (dp * fsdp) == 0
    ]
    fitting = {}
    for layout in layouts:
        try:
            layout.check(setting.config)
        except LayoutError:
            continue
        if most_memory(setting.config, layout, setting.workload, setting.reserve).total <= setting.gpu.memory_bytes:
            micro_batches = setting.micro_batches(gpus)
            time = step_time(setting.config, layout, setting.workload, setting.gpu, setting.mfu, micro_batches)
            fitting[layout] = time.total
    chosen = made.chosen.layout
    assert {candidate.layout for candidate in made.candidates} == set(layouts)
    assert {candidate.layout for candidate in made.candidates if candidate.fits(setting.gpu)} == set(fitting)
    as_good = [layout for layout in fitting if fitting[layout] <= AS_GOOD * min(fitting.values())]
    assert chosen in as_good and chosen.shards == min(layout.shards for layout in as_good)


def test_every_neighbour_has_a_verdict():
    text = report(plan(SETTING, 512))
    table = text.partition("Neighbouring meshes")[2].partition("\n\n")[0].splitlines()[1:]
    assert all(
        re.match(r"[* ] dp \d+ +fsdp (\d+|-) +ep \d+ +(does not divide: |needs \d|fits: |chosen: )", line) for line in table
    )
    assert sum(line.startswith("*") for line in table) == sum("chosen" in line for line in table) == 1
    for words in ("160 routed experts by ep 64", "by dp x ep =", "GiB of 79", "times slower: "):
        assert any(words in line for line in table), words
    for line in table:
        dp, fsdp, ep = re.match(r"[* ] dp (\d+) +fsdp (\d+|-) +ep (\d+)", line).groups()
        assert ("by dp x ep" in line) == (fsdp == "-") == (512 % (int(dp) * int(ep)) != 0)
        if fsdp != "-":
            candidate = next(c for c in plan(SETTING, 512).candidates if c.layout == Layout(int(dp), int(fsdp), int(ep)))
            assert ("does not divide" in line) == bool(candidate.error)
            assert ("needs" in line) == (not candidate.error and not candidate.fits(SETTING.gpu))


def test_forced_numbers_are_kept():
    made = plan(SETTING, 512, dp=1, ep=8)
    assert made.chosen.layout == Layout(1, 64, 8) and len(made.candidates) == 1
    assert {c.layout.ep for c in plan(SETTING, 512, ep=4).candidates} == {4}


@pytest.mark.parametrize("asked, batches", [(1, 1), (2**21, 1), (16 * 2**20, 8), (17_000_000, 8), (18_000_000, 9)])
def test_tokens_per_step_are_what_all_ranks_take(asked, batches):
    made = plan(dataclasses.replace(SETTING, tokens_per_step=asked), 512)
    assert made.tokens_per_step == batches * 512 * 4096
    assert ("rounded from" in report(made)) == (asked != made.tokens_per_step)


def test_remedies_fit_and_fewer_gpus_do_not():
    made = plan(SETTING, 64)
    assert made.chosen is None
    (remedy,) = remedies(made)
    gpus = int(re.fullmatch(r"--gpus (\d+)", remedy)[1])
    assert plan(SETTING, gpus).chosen is not None and plan(SETTING, gpus // 2).chosen is None
    assert remedy in report(made)


def test_a_cheaper_remedy_comes_first():
    workload = Workload(sequences_per_micro_batch=64, activation_checkpointing=False)
    setting = dataclasses.replace(SETTING, workload=workload)
    first, second = remedies(plan(setting, 512))
    assert first == "--activation-checkpointing --sequences-per-micro-batch 2"
    for sequences, fits in ((2, True), (4, False)):
        lighter = dataclasses.replace(workload, sequences_per_micro_batch=sequences, activation_checkpointing=True)
        assert (plan(dataclasses.replace(SETTING, workload=lighter), 512).chosen is not None) == fits
    assert second.startswith("--gpus 1024") or "--activation-checkpointing" in second
    assert plan(SETTING, 512).chosen is not None


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ("glm-4.5 --gpus 512 --gpu h1000", "--gpu h1000: wanted one of a100-40, a100-80, h100, h200, b200, mi300x"),
        ("glm-4.5 --gpus 500", "--gpus 500 does not fill nodes of 8: the nearest that do are 496 and 504"),
        ("glm-4.5 --gpus 0", "--gpus 0: wanted 1 or more"),
        ("glm-4.5 --gpus 512 --ep 7", "--ep 7: 512 GPUs do not divide by it; the nearest that do are 4 and 8"),
        ("glm-4.5 --gpus 512 --ep 64", "ep = 64: 160 routed experts do not divide by it; wanted one of 1, 2, 4, 5"),
        ("glm-4.5 --gpus 512 --dp 4 --fsdp 4 --ep 4", "the product 64 must divide 512 GPUs"),
        ("nano --gpus 8 --sequence-length 5000", "sequence_length = 5000: the model takes 2048"),
        ("nano --gpus 8 --sequence-length 0", "sequence_length = 0: wanted 1 or more"),
        ("nano --gpus 8 --sequences-per-micro-batch 0", "sequences_per_micro_batch = 0: wanted 1 or more"),
        ("nano --gpus 8 --imbalance 0.5", "imbalance = 0.5: wanted 1"),
        ("nano --gpus 8 --mfu 1.5", "mfu = 1.5: wanted above 0, up to 1"),
        ("nano --gpus 8 --tokens-per-step 0", "tokens_per_step = 0: wanted 1 or more"),
        ("nano --gpus 8 --reserve-gib 200", "reserve_gib = 200: wanted 0 or more, and less than the GPU's 79 GiB"),
        ("nano --gpus 8 --memory-gib -1", "memory_gib = -1.0: wanted a number above 0"),
        ("nano --gpus 8 --inter-node-gbps 0", "inter_node_gb_per_s = 0.0: wanted a number above 0"),
        ("nano --gpus 8 --gpus-per-node 0", "gpus_per_node = 0: wanted a number above 0"),
        ("nowhere --gpus 8", "nowhere: no such file, and model 'nowhere' is none of"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(capsys, arguments, complaint):
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and complaint in err and err.count("\n") == 1


def test_a_rank_that_is_not_there_is_refused():
    with pytest.raises(LayoutError, match="rank 8: .* has ranks 0 to 7"):
        parameters_of_rank(GLM_45, Layout(1, 1, 8), 8)
    with pytest.raises(LayoutError, match="160 routed experts do not divide"):
        memory_of_rank(GLM_45, Layout(1, 1, 7), 0, Workload())
    with pytest.raises(ConfigError, match="the nearest is 'h200'"):
        find_gpu("H200")


# ---------------------------------------------------------------- command line


def run(capsys, arguments: str) -> tuple[int, str]:
    code = main(arguments.split())
    return code, capsys.readouterr().out


def test_the_plan_shows_what_the_functions_say(capsys):
    code, out = run(capsys, "configs/model/glm-4.5.toml --gpus 512 --gpu h100 --dp 1 --ep 8")
    layout = Layout(1, 64, 8)
    assert code == 0 and f"Mesh: {layout}" in out
    assert "352,797,814,784 in the main stack, 3,988,069,632 in the MTP layer" in out
    for rank in (0, 256, 511):
        main_stack, mtp = parameters_of_rank(GLM_45, layout, rank)
        assert f"rank {rank}" in out and f"{main_stack:,}" in out and f"{mtp:,}" in out
    memory = most_memory(GLM_45, layout, Workload(), 6 * GIB)
    for field in dataclasses.fields(memory):
        assert f"{getattr(memory, field.name) / GIB:,.2f}" in out, field.name
    assert f"{memory.total / GIB:,.2f}" in out and f"{memory.rollout / GIB:,.2f}" in out
    assert "an estimate" in out and "days for 22T tokens" in out and "--dp 1 --fsdp 64 --ep 8" in out


@pytest.mark.parametrize(
    "arguments",
    [f"{path.stem} --gpus {gpus} --gpu {gpu}" for path, gpus, gpu in zip(SIZES, (64, 512, 6, 1, 16), GPUS, strict=False)]
    + ["glm-4.5 --gpus 4096 --gpu b200", "nano --gpus 512", "mini --gpus 6 --gpus-per-node 3 --gpu mi300x", "glm-4.5 --gpus 8"],
)
def test_any_size_and_number_of_gpus_is_planned_in_less_than_100_columns(capsys, arguments):
    start = time.perf_counter()
    code, out = run(capsys, arguments)
    assert time.perf_counter() - start < 10
    assert max(map(len, out.splitlines())) < 100
    assert code == (0 if "Mesh: " in out else 1)
    assert ("Nothing fits" in out) == (code == 1) == ("scale.train" not in out)


def test_numbers_of_the_gpu_can_be_replaced(capsys):
    _, roomy = run(capsys, "glm-4.5 --gpus 64 --memory-gib 400 --inter-node-gbps 800")
    assert "Mesh: " in roomy and "of 400 GiB" in roomy
    _, tight = run(capsys, "nano --gpus 1 --memory-gib 6.01")
    assert "Nothing fits" in tight


def test_a_published_folder_is_planned(capsys, tmp_path):
    folder = tmp_path / "glm"
    folder.mkdir()
    AIR.save_pretrained(folder)
    (code, out), (_, file_out) = (
        run(capsys, f"{folder} --gpus 64 --gpu h200"),
        run(capsys, f"{folder}/config.json --gpus 64 --gpu h200"),
    )
    assert code == 0 and "106,852,245,504" in out and out == file_out
    assert "There is no configs/recipe/glm.toml for this model" in out


def test_a_dry_run_gets_what_was_planned(capsys, monkeypatch):
    """The module is scale's own; here only what it is asked."""
    calls = []
    module = type(sys)("scale.dry_run")
    module.dry_run = lambda *args, **kwargs: calls.append((args, kwargs)) or ["a rank"]
    module.report = lambda runs, config, layout: f"dry: {runs} {layout}"
    monkeypatch.setitem(sys.modules, "scale.dry_run", module)
    code, out = run(capsys, "nano --gpus 8 --ep 4 --dp 1 --dry-run")
    assert code == 0 and out.endswith("dry: ['a rank'] dp 1 x fsdp 2 x ep 4\n")
    ((config, layout, *rest), named) = calls[0]
    assert layout == Layout(1, 2, 4) and rest == [2048, 1, True] and named == {"ranks": (0, 4, 7)}
    assert config.n_routed_experts == 32


# ---------------------------------------------------------------- launching


def trainer_options() -> str:
    command = [sys.executable, "-m", "scale.train", "nano", "--help"]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    return set(re.findall(r"--[\w.-]+", trainer_options()))


def check_torchrun(arguments: list[str], known_options: set[str]) -> list[str]:
    """That torchrun takes the arguments, and the trainer those behind its name; returns the latter."""
    parsed = get_args_parser().parse_args(arguments)
    assert parsed.module and parsed.training_script == "scale.train"
    assert importlib.util.find_spec("scale.train") is not None
    options = {option for option in parsed.training_script_args if option.startswith("--")}
    assert {"--dp", "--ep"} <= options <= known_options, options - known_options
    return parsed.training_script_args


def with_options(recipe: Recipe, arguments: list[str]) -> Recipe:
    """The recipe with --table.key value and --table.flag."""
    for option, value in zip(arguments, [*arguments[1:], "--"], strict=True):
        if option.startswith("--") and "." in option:
            table, key = option[2:].replace("-", "_").split(".")
            new = key.startswith("no_") is False if value.startswith("--") else int(value)
            changed = dataclasses.replace(getattr(recipe, table), **{key.removeprefix("no_"): new})
            recipe = dataclasses.replace(recipe, **{table: changed})
    return recipe


@pytest.mark.parametrize(
    "model, gpus, tokens", [("nano", 8, 2**16), ("mini", 16, 2**19), ("mini", 64, 2**19), ("glm-4.5", 512, 2**26)]
)
def test_the_printed_command_is_one_that_torchrun_and_the_trainer_take(model, gpus, tokens, known_options):
    config = GLMConfig.from_toml(ROOT / "configs" / "model" / f"{model}.toml")
    made = plan(Setting(config, GPUS["h100"], Workload(2048), tokens), gpus, dp=1, ep=4)  # three different numbers
    text = launch(made, f"configs/model/{model}.toml")
    assert "Not before" not in text
    words = shlex.split(re.search(r"^  torchrun ((?:.*\\\n)*.*)", text, re.M)[1].replace("\\\n", " "))
    arguments = check_torchrun(words, known_options)
    layout = made.chosen.layout
    assert arguments[0] == f"configs/recipe/{model}.toml"
    assert f"--dp {layout.dp} --fsdp {layout.fsdp} --ep {layout.ep}" in " ".join(arguments)
    assert (f"--nodes {gpus // 8} " in text) == (gpus > 8)
    if "There is no" in text:
        assert f"training.sequences_per_step = {made.tokens_per_step // 2048}" in text
    else:
        recipe = with_options(load_recipe(model), arguments)
        check(recipe, layout)
        assert recipe.training.sequences_per_step * recipe.training.sequence_length == made.tokens_per_step
        assert recipe.hardware.activation_checkpointing


def test_a_plan_that_does_not_fit_the_recipes_stages_says_so():
    config = GLMConfig.from_toml(ROOT / "configs" / "model" / "glm-4.5.toml")
    made = plan(Setting(config, GPUS["h100"], Workload(2048), 2**19), 512, dp=1, ep=4)
    assert "Not before this is changed in configs/recipe/glm-4.5.toml" in launch(made, "configs/model/glm-4.5.toml")


@pytest.mark.parametrize("script", ["one_node.sh", "node.sh", "slurm.sbatch"])
def test_scripts_are_valid_shell(script):
    path = ROOT / "scale" / "launch" / script
    subprocess.run(["bash", "-n", path], check=True, timeout=10)
    assert os.access(path, os.X_OK) and "set -euo pipefail" in path.read_text()


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """Stand-ins for Slurm's commands and torchrun, which write down how they are called; srun runs two nodes' parts.

    torchrun's starts a rank, hands SIGTERM on to it as the real one does, and writes down how it ended.
    """
    programs = {
        "srun": """
            import json, os, subprocess, sys
            assert sys.argv[1] == "--kill-on-bad-exit=1"
            nodes = [subprocess.Popen(sys.argv[2:]) for _ in range(2)]
            sys.exit(max(node.wait() for node in nodes))
        """,
        "scontrol": """
            import os, sys
            if sys.argv[1:3] == ["show", "hostnames"]:
                print("node-1\\nnode-2")
            else:
                open(os.environ["CALLS"] + "/scontrol", "a").write(" ".join(sys.argv[1:]))
        """,
        "torchrun": """
            import json, os, signal, subprocess, sys, time
            calls, me = os.environ["CALLS"], os.getpid()
            json.dump([sys.argv[1:], os.environ["OMP_NUM_THREADS"]], open(f"{calls}/torchrun-{me}", "w"))
            if os.environ.get("CODE"):
                sys.exit(int(os.environ["CODE"]))
            saving = "import signal, sys, time; n = []; signal.signal(signal.SIGTERM, lambda *_: n.append(1))\\n"
            saving += "print('up', flush=True)\\nwhile not n: time.sleep(0.02)\\ntime.sleep(0.3); print(len(n)); sys.exit(143)"
            rank = subprocess.Popen([sys.executable, "-c", saving], stdout=subprocess.PIPE, text=True)
            rank.stdout.readline()
            signals = []
            signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
            open(f"{calls}/up-{me}", "w").write(str(rank.pid))
            end = time.time() + 20
            while not signals and rank.poll() is None and time.time() < end:
                time.sleep(0.02)
            rank.terminate()
            open(f"{calls}/ended-{me}", "w").write(f"{rank.wait()} {rank.stdout.read().strip()} {len(signals)}")
            sys.exit(1)
        """,
    }
    for name, program in programs.items():
        (tmp_path / name).write_text(f"#!{sys.executable}\n{textwrap.dedent(program)}")
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    for name in ("OMP_NUM_THREADS", "PORT", "OPTIONS", "FSDP", "CODE", "RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    slurm = {"JOB_ID": "20077", "JOB_NUM_NODES": "2", "JOB_NODELIST": "node-[1-2]", "GPUS_PER_NODE": "h100:8"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name, value in {"RECIPE": "nano", "RUN_FOLDER": str(tmp_path / "run folder"), "DP": "2", "EP": "8"}.items():
        monkeypatch.setenv(name, value)
    return calls


def submit() -> subprocess.Popen:
    command = ["bash", "scale/launch/slurm.sbatch"]
    return subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_the_slurm_script_starts_what_torchrun_and_the_trainer_take(cluster, monkeypatch, known_options):
    monkeypatch.setenv("CODE", "0")
    monkeypatch.setenv("OPTIONS", "--training.steps 7\n  --hardware.activation-checkpointing")
    job = submit()
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 0, out
    calls = [json.loads(path.read_text()) for path in cluster.glob("torchrun-*")]
    assert len(calls) == 2 and calls[0] == calls[1]
    arguments = check_torchrun(calls[0][0], known_options)
    assert arguments[:5] == ["nano", "--dp", "2", "--ep", "8"] and arguments[-2:] == [
        "7",
        "--hardware.activation-checkpointing",
    ]
    assert arguments[arguments.index("--run-folder") + 1].endswith("run folder")
    parsed = get_args_parser().parse_args(calls[0][0])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_endpoint) == ("2", "8", "node-1:20077")
    assert not (cluster / "scontrol").exists()


def test_a_job_that_is_asked_to_stop_saves_and_queues_up_again(cluster):
    """The signal goes to all processes of the step, as Slurm sends it; each rank must see one SIGTERM, and no SIGUSR1."""
    job = submit()
    end = time.time() + 20
    while len(list(cluster.glob("up-*"))) < 2 and time.time() < end:
        time.sleep(0.05)
    for pid in session(job.pid) - {job.pid}:
        if "srun" not in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1]:
            os.kill(pid, signal.SIGUSR1)
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 0 and "queueing up again" in out
    assert (cluster / "scontrol").read_text() == "requeue 20077"
    assert [path.read_text() for path in cluster.glob("ended-*")] == ["143 1 1"] * 2


def session(leader: int) -> set[int]:
    """All processes of a session."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[3]) == leader:
                found.add(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
    return found


def test_a_failed_job_is_not_queued_again(cluster, monkeypatch):
    monkeypatch.setenv("CODE", "3")
    job = submit()
    out, _ = job.communicate(timeout=30)
    assert job.returncode == 3, out
    assert not (cluster / "scontrol").exists()


def one_node(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    command = [ROOT / "scale" / "launch" / "one_node.sh", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30)


def test_one_node_starts_what_torchrun_and_the_trainer_take(cluster, monkeypatch, known_options, tmp_path):
    monkeypatch.setenv("CODE", "0")
    done = one_node("-n", "4", "-r", "1", "-l", "logs here", "nano", "--dp", "2", "--ep", "2", "--seed", "3", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    ((arguments, threads),) = [json.loads(path.read_text()) for path in cluster.glob("torchrun-*")]
    assert check_torchrun(arguments, known_options) == ["nano", "--dp", "2", "--ep", "2", "--seed", "3"]
    parsed = get_args_parser().parse_args(arguments)
    assert (parsed.nproc_per_node, parsed.max_restarts, parsed.log_dir, parsed.standalone) == ("4", 1, "logs here", True)
    assert int(threads) >= 1


@pytest.mark.parametrize("arguments", [[], ["--dp", "2"], ["-n", "four", "nano"], ["-x", "nano"]])
def test_one_node_refuses_with_its_usage(cluster, arguments):
    done = one_node(*arguments)
    assert done.returncode == 2 and "one_node.sh" in done.stderr and not list(cluster.glob("torchrun-*"))
    assert one_node("-h").stdout.startswith("usage: scale/launch/one_node.sh")


@pytest.mark.parametrize("missing", ["RECIPE", "RUN_FOLDER"])
def test_a_job_without_recipe_or_folder_is_refused(cluster, monkeypatch, missing):
    monkeypatch.delenv(missing)
    job = submit()
    out, _ = job.communicate(timeout=30)
    assert job.returncode != 0 and missing in out and not list(cluster.glob("torchrun-*"))
