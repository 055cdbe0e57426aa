"""The loops compute what the model computes: over drawn architectures, sequences of any lengths, and blocks in any order."""

import dataclasses
import functools
import math
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minglm.config import GLMConfig
from minglm.engine import compiled, loops
from minglm.engine.cache import PagedCache
from minglm.engine.compiled import CompiledModel
from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.model import GLM
from minglm.train.recipe import find_config

LAW = settings(deadline=None, derandomize=True, max_examples=40)
BLOCKS = 40


@st.composite
def configs(draw) -> GLMConfig:
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    head_dim = 2 * draw(st.integers(2, 10))
    layers = draw(st.integers(1, 3))
    in_group = draw(st.integers(2, 5))
    kept = draw(st.integers(1, groups))
    return GLMConfig(
        vocab_size=draw(st.integers(5, 40)),
        hidden_size=draw(st.integers(3, 40)),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        intermediate_size=draw(st.integers(1, 30)),
        num_attention_heads=kv_heads * draw(st.integers(1, 6)),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        partial_rotary_factor=draw(st.sampled_from([0.5, 1.0])) if head_dim % 4 == 0 else 1.0,
        attention_bias=draw(st.booleans()),
        use_qk_norm=draw(st.booleans()),
        n_routed_experts=groups * in_group,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=draw(st.integers(1, kept * in_group)),
        moe_intermediate_size=draw(st.integers(1, 20)),
        n_shared_experts=draw(st.integers(1, 2)),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        tie_word_embeddings=draw(st.booleans()),
        num_nextn_predict_layers=draw(st.integers(0, 1)),
        max_position_embeddings=256,
        initializer_range=0.3,
    )


def random_model(config: GLMConfig, seed: int) -> GLM:
    """No weight at the value it starts from: norms, biases and the routers' biases matter."""
    torch.manual_seed(seed)
    model = GLM(config).eval().requires_grad_(False)
    for value in model.parameters():
        if value.ndim == 1:
            value += 0.3 * torch.randn_like(value)
    for router in model.routers():
        router.e_score_correction_bias += 0.2 * torch.randn_like(router.e_score_correction_bias)
    return model


@torch.inference_mode()
def passes(runner, model: GLM, block_size: int, seed: int, steps: list[dict[int, int]]) -> list[Tensor]:
    """What `runner` answers in passes of {row: tokens} each: states, sorted experts, logits, and the MTP layer's states."""
    layers = model.mtp.layer.index + 1 if model.mtp else model.config.num_hidden_layers
    rows = 1 + max(row for step in steps for row in step)
    cache = PagedCache(
        model.config,
        layers,
        rows * BLOCKS,
        block_size,
        rows,
        torch.device("cpu"),
        torch.float32,
        with_mtp=model.mtp is not None,
    )
    random = np.random.default_rng(seed)
    cache.table[:, :BLOCKS] = random.permutation(rows * BLOCKS).reshape(rows, BLOCKS)  # blocks in any order
    if runner is not model:  # the torch gear reads what it then hides; the loops read nothing that is not there
        cache.keys.fill_(math.nan), cache.values.fill_(math.nan)
    lengths, found = dict.fromkeys(range(rows), 0), []
    for step in steps:
        starts, counts = [lengths[row] for row in step], list(step.values())
        ids = torch.from_numpy(random.integers(0, model.config.vocab_size, (1, sum(counts))))
        hidden, experts = runner.step(ids, cache.view(list(step), starts, counts))
        found += [hidden, runner.lm_head(hidden[0])]
        if experts is not None:
            found.append(experts.sort(-1).values)
        if model.mtp is not None:
            view = cache.view(list(step), [start + 1 for start in starts], counts, first_key=1)
            found.append(runner.mtp_step(hidden, ids, view))
        for row, count in step.items():
            lengths[row] += count
    return found


# Passes as an engine makes them: prompts in pieces, decoding, drafts.
STEPS = st.lists(st.dictionaries(st.integers(0, 5), st.integers(1, 9), min_size=1), min_size=1, max_size=4)


@LAW
@given(config=configs(), seed=st.integers(0, 2**32), block_size=st.integers(1, 5), steps=STEPS)
def test_the_loops_equal_the_model(config, seed, block_size, steps):
    model = random_model(config, seed)
    wanted = passes(model, model, block_size, seed, steps)
    assert_close(passes(CompiledModel(model), model, block_size, seed, steps), wanted)


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=0, atol=2000 * torch.finfo(torch.float32).eps * scale)


NANO = GLMConfig.from_toml(find_config("model", "nano"))


@functools.cache
def tile_as_a_function(tokens: int, lanes: int):
    """Of lanes that other CPUs have, too: LLVM makes do with what there is."""
    tile = loops.tile_of(tokens, lanes)

    @numba.njit
    def four(m):
        return loops.address(m, 0, 0), loops.address(m, 1, 0), loops.address(m, 2, 0), loops.address(m, 3, 0)

    some = four if tokens == 4 else numba.njit(lambda m: (loops.address(m, 0, 0),))
    return numba.njit(lambda x, weight, numbers, out: tile(some(x), four(weight), numbers, some(out)))


@LAW
@given(st.sampled_from([1, 4]), st.sampled_from([4, 8, 16]), st.integers(0, 5), st.integers(0, 3), st.integers(0, 2**32))
def test_a_tile_is_the_products_of_its_rows(tokens, lanes, steps, more, seed):
    random = np.random.default_rng(seed)
    numbers = steps * lanes
    x, weight = (random.standard_normal((rows, numbers + more + 1), dtype=np.float32) for rows in (tokens, 4))
    before = random.standard_normal((tokens, 5), dtype=np.float32)
    out = before.copy()
    tile_as_a_function(tokens, lanes)(x, weight, numbers, out)
    found = out[:, :4] - before[:, :4].astype(np.float64)
    wanted = x[:, :numbers].astype(np.float64) @ weight[:, :numbers].T
    size = np.abs(x[:, :numbers]) @ np.abs(weight[:, :numbers]).T + np.abs(before[:, :4])
    assert (np.abs(found - wanted) <= np.finfo(np.float32).eps * (steps + 5) * size).all()
    assert (out[:, 4] == before[:, 4]).all()  # what lies behind is left alone


def test_two_threads_compute_the_same_and_the_same_bits_again():
    """At a size that is worth them: each output is summed by one thread, whoever comes first."""
    model = random_model(NANO, 0)
    steps = [{row: 8 for row in range(12)}, {row: 1 for row in range(12)}]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(passes(CompiledModel(model), model, 16, 0, steps))
    finally:
        torch.set_num_threads(before)
    for one, two, again in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
        assert torch.equal(two, again)


def same_answers(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> bool:
    """Whether the engine writes what it writes without the loops."""
    plain = Engine(engine.model, None, draft_tokens=engine.draft_tokens)
    plain.runner = engine.model
    return [a.ids for a in engine.generate(prompts, params)] == [a.ids for a in plain.generate(prompts, params)]


GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: [p.mul_(-1) for p in model.parameters()],  # new values
        lambda model: [setattr(p, "data", torch.randn_like(p) * 0.3) for p in model.parameters()],  # new memory
        lambda model: setattr(model.lm_head, "weight", nn.Parameter(torch.randn_like(model.lm_head.weight))),
        lambda model: model.gate_of_first_layer().fill_(0.5),
        lambda model: model.bfloat16(),  # where the loops do not reach
        lambda model: [setattr(p, "data", p.data.t().contiguous().t()) for p in model.parameters() if p.ndim == 2],
    ],
)
def test_changed_weights_are_seen_at_once(change):
    model = random_model(dataclasses.replace(NANO, num_hidden_layers=2), 1)
    model.gate_of_first_layer = lambda: model.routers()[0].e_score_correction_bias
    engine = Engine(model, None)
    prompts = [[1, 2, 3], [4, 5]]
    assert same_answers(engine, prompts, GREEDY)
    first = [answer.ids for answer in engine.generate(prompts, GREEDY)]
    change(model)
    engine.blocks.forget_prefixes()
    assert same_answers(engine, prompts, GREEDY)
    assert first  # what came before was computed with the old weights


def test_weights_that_are_not_numbers_crash_nothing():
    model = random_model(dataclasses.replace(NANO, num_hidden_layers=2), 1)
    engine = Engine(model, None)
    for value in model.parameters():
        value.fill_(math.nan)
    (answer,) = engine.generate([[1, 2, 3]], dataclasses.replace(GREEDY, return_experts=True))
    assert len(answer.ids) == 8
    assert all(len(set(row)) == NANO.num_experts_per_tok for row in answer.experts.flatten(0, 1).tolist())


@LAW
@given(values=st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=50))
def test_exp_is_right_to_two_units_in_the_last_place(values):
    x = np.array(values, dtype=np.float32)
    found = np.array([loops.exp(value) for value in x])
    wanted = np.exp(np.clip(x, np.float32(-87.3), np.float32(88.3)).astype(np.float64))
    np.testing.assert_allclose(found, wanted, rtol=2.5e-7)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_loops_leave_pytorch_its_number_of_threads(threads):
    """numba starts as many as there are cores, and would tell the OpenMP that both use."""
    program = "import torch; import minglm.engine.loops; print(torch.get_num_threads())"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert int(found.stdout) == threads


def test_a_forked_child_computes_on_one_thread():
    before = compiled._forked
    try:
        compiled._note_fork()
        assert compiled.threads_allowed() == 1
    finally:
        compiled._forked = before


@given(st.lists(st.integers(0, 40), min_size=1, max_size=24), st.integers(1, 6))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_threads_share_all_experts_and_none_has_much_more_than_its_part(counts, parts):
    borders = loops.divided(np.cumsum(counts), parts)
    assert borders[0] == 0 and borders[-1] == len(counts) and len(borders) == parts + 1
    assert (np.diff(borders) >= 0).all()
    work = [loops.EXPERT_ROWS + count if count else 0 for count in counts]
    shares = [sum(work[first:last]) for first, last in zip(borders, borders[1:], strict=False)]
    assert max(shares) <= sum(work) / parts + max(work)


@given(st.integers(0, 2**32), st.integers(1, 5))
@settings(deadline=None, derandomize=True, max_examples=8)
def test_experts_give_the_same_on_any_number_of_threads(seed, threads):
    rng = np.random.default_rng(seed)
    n, k, e, h, width = 24, 3, 7, 64, 96  # enough work for a second thread
    x, gate_up, down = (rng.standard_normal(shape, dtype=np.float32) for shape in ((n, h), (e, 2 * width, h), (e, h, width)))
    experts, weights = rng.integers(0, e, (n, k)), rng.random((n, k), dtype=np.float32)
    assert loops.parts_worth(n * k * h * width * 3, threads) == threads
    alone, together = np.zeros((n, h), dtype=np.float32), np.zeros((n, h), dtype=np.float32)
    loops.routed_experts(x, experts, weights, gate_up, down, alone, 1)
    loops.routed_experts(x, experts, weights, gate_up, down, together, threads)
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())
