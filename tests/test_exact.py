"""The exact gear's promise, held to the bit: a token's numbers do not depend on what is computed beside it.

Compared are logits and log-probabilities of one sequence alone, in batches, behind padding, among packed documents, in a
prefill, in chunks and decoded with a cache, and those of the engine under any schedule with the trainer's.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minglm import GLM, GLMConfig, exact, ops
from minglm.engine.engine import Engine
from minglm.engine.exact import measure_cost, measure_gap, report, trainers_log_probs
from minglm.engine.sampling import SamplingParams
from minglm.model import KVCache

LAW = settings(deadline=None, derandomize=True, max_examples=25)
NANO = "configs/model/nano.toml"


def model_of(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> GLM:
    """A small model whose weights are large enough for every rounding to show."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=83, hidden_size=48, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=64)
    heads = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=16, partial_rotary_factor=0.5)
    experts = dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=16)
    return GLM(GLMConfig(**sizes | heads | experts | dict(initializer_range=0.2) | changes)).eval().to(dtype)


@st.composite
def models(draw: st.DrawFn) -> GLM:
    """Also sizes that are no multiples of anything, and one group of queries that does not divide a tile."""
    kv_heads = draw(st.integers(1, 2))
    k = draw(st.integers(1, 4))
    return model_of(
        draw(st.integers(0, 2**32)),
        vocab_size=draw(st.sampled_from([50, 83, 128])),
        hidden_size=draw(st.sampled_from([20, 48, 64])),
        num_attention_heads=kv_heads * draw(st.integers(1, 5)),
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([8, 12, 32])),
        n_routed_experts=draw(st.integers(k, 9)),
        num_experts_per_tok=k,
        moe_intermediate_size=draw(st.sampled_from([7, 16, 24])),
        use_qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
    )


lengths = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 130]))  # blocks of attention hold 64 keys


def tokens(model: GLM, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    with torch.no_grad(), ops.using("exact"):
        yield


def cut(draw: st.DrawFn, t: int) -> list[int]:
    """t as a sum of chunks."""
    ends = draw(st.lists(st.integers(1, t), max_size=6), label="ends of chunks")
    ends = sorted({*ends, t})
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def in_chunks(model: GLM, ids: Tensor, chunks: list[int]) -> Tensor:
    """Logits (b, t, v), a chunk at a time, with a cache."""
    cache = KVCache(model.config, *ids.shape, dtype=model.lm_head.weight.dtype)
    return torch.cat([model(chunk, cache=cache).logits for chunk in ids.split(chunks, dim=1)], dim=1)


# --------------------------------------------------------------------------------------------------------- the model's laws


@given(model=models(), t=lengths, batch=st.integers(2, 5), data=st.data())
@LAW
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(model, t, batch, data):
    ids = tokens(model, batch, t)
    row = data.draw(st.integers(0, batch - 1))
    with exactly():
        alone, together = model(ids[row : row + 1], mtp=t > 1), model(ids, mtp=t > 1)
    assert torch.equal(alone.logits[0], together.logits[row])
    assert t == 1 or torch.equal(alone.mtp_logits[0], together.mtp_logits[row])


@given(model=models(), t=lengths, more=st.integers(1, 70))
@LAW
def test_tokens_that_follow_change_nothing(model, t, more):
    ids = tokens(model, 2, t + more)
    with exactly():
        assert torch.equal(model(ids[:, :t]).logits, model(ids).logits[:, :t])


@given(model=models(), t=lengths, padding=st.integers(1, 70))
@LAW
def test_padding_changes_nothing(model, t, padding):
    ids = tokens(model, 2, t + padding)
    documents = torch.zeros_like(ids)
    documents[0, t:] = -1
    with exactly():
        assert torch.equal(model(ids, documents).logits[0, :t], model(ids[:1, :t]).logits[0])


@given(model=models(), before=lengths, t=lengths, after=st.integers(0, 40))
@LAW
def test_packed_neighbours_change_nothing(model, before, t, after):
    """Packing shifts a document's positions, and RoPE's angles with them, so the comparison is at the same place: other
    neighbours there, and for the first document none at all."""
    ids = tokens(model, 2, before + t + after)
    place = slice(before, before + t)
    ids[1, place] = ids[0, place]
    documents = torch.tensor([0] * before + [1] * t + [2] * after).expand_as(ids)
    with exactly():
        packed = model(ids, documents).logits
        assert torch.equal(packed[0, place], packed[1, place])
        assert torch.equal(packed[0, :before], model(ids[:1, :before]).logits[0])


@given(model=models(), t=lengths, batch=st.integers(1, 3), data=st.data())
@LAW
def test_a_prefill_in_any_chunks_has_the_bits_of_the_whole(model, t, batch, data):
    ids = tokens(model, batch, t)
    with exactly():
        assert torch.equal(in_chunks(model, ids, cut(data.draw, t)), model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_token_by_token_has_the_bits_of_a_prefill(dtype, batch):
    model = model_of(dtype=dtype)
    ids = tokens(model, batch, 135)
    with exactly():
        assert torch.equal(in_chunks(model, ids, [1] * 135), model(ids).logits)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_nano_model_has_the_same_bits_whatever_the_number_of_threads_shares(threads):
    """With several threads PyTorch and its libraries part the work by its amount."""
    before = torch.get_num_threads()
    model = GLM(GLMConfig.from_toml(NANO)).eval()
    ids = tokens(model, 6, 150)
    try:
        torch.set_num_threads(threads)
        with exactly():
            whole = model(ids).logits
            assert torch.equal(torch.cat([model(row[None]).logits for row in ids]), whole)
            assert torch.equal(in_chunks(model, ids[:2], [140, *[1] * 10]), whole[:2])
    finally:
        torch.set_num_threads(before)


@given(model=models(), n=st.integers(1, 100), chunk=st.integers(1, 3))
@LAW
def test_log_probabilities_are_those_of_the_logits_in_chunks_of_any_size(model, n, chunk):
    ids = tokens(model, 1, n + 1)
    with exactly(), pytest.MonkeyPatch.context() as patch:
        out = model(ids[:, :-1])
        wanted = out.logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        arguments = out.hidden_states[0], model.lm_head.weight, ids[0, 1:]
        assert torch.equal(ops.token_log_probs(*arguments), wanted)
        patch.setattr(exact, "LOGITS", chunk * exact.ROWS * model.config.vocab_size)
        assert torch.equal(ops.token_log_probs(*arguments), wanted)


@given(seed=st.integers(0, 2**32), at_once=st.integers(1, 2**14), t=lengths)
@LAW
def test_attention_has_the_same_bits_however_many_scores_it_holds_at_once(seed, at_once, t):
    q, k, v = torch.randn(3, 2, t, 4, 16, generator=torch.Generator().manual_seed(seed))
    k, v = k[:, :, :2], v[:, :, :2]
    with exactly(), pytest.MonkeyPatch.context() as patch:
        whole = ops.attention(q, k, v, None)
        patch.setattr(exact, "SCORES", at_once)
        assert torch.equal(ops.attention(q, k, v, None), whole)


# ----------------------------------------------------------------------------------------------------- engine and trainer


@given(
    model=models(),
    prompts=st.lists(lengths, min_size=1, max_size=5),
    new=st.integers(1, 12),
    block_size=st.sampled_from([4, 16, 24]),
    spare_blocks=st.integers(0, 6),
    max_batch_tokens=st.sampled_from([16, 50, 2048]),
    drafts=st.integers(0, 2),
)
@settings(LAW, max_examples=20)
def test_the_engines_log_probabilities_are_the_trainers(
    model, prompts, new, block_size, spare_blocks, max_batch_tokens, drafts
):
    """Under any mix of lengths, chunked prefills, blocks so few that requests are preempted, and drafts."""
    longest = max(prompts) + new + drafts + 1
    blocks = -(-longest // block_size) + 1 + spare_blocks
    engine = Engine(
        model,
        None,
        block_size=block_size,
        num_blocks=blocks,
        max_batch_tokens=max_batch_tokens,
        draft_tokens=drafts,
        gear="exact",
    )
    ids = [tokens(model, t, seed=i).tolist() for i, t in enumerate(prompts)]
    params = [SamplingParams(seed=i, max_tokens=new, logprobs=0, ignore_stop=True) for i in range(len(ids))]
    completions = engine.generate(ids, params)
    for completion in completions:
        with exactly():
            wanted = trainers_log_probs(model, completion.prompt_ids + completion.ids)[-new:]
        assert len(completion.ids) == new
        assert torch.equal(torch.tensor(completion.logprobs), wanted)


def test_preemption_and_shared_prefixes_change_no_bit():
    model = model_of()
    prefix = tokens(model, 40).tolist()
    prompts = [prefix + tokens(model, 3 * i + 1, seed=i).tolist() for i in range(8)]
    engine = Engine(model, None, block_size=8, num_blocks=24, gear="exact")
    params = [SamplingParams(seed=i, max_tokens=30, logprobs=0, ignore_stop=True) for i in range(8)]
    completions = engine.generate(prompts, params)
    assert engine.stats.preemptions > 0
    for completion in completions:
        with exactly():
            wanted = trainers_log_probs(model, completion.prompt_ids + completion.ids)[-30:]
        assert torch.equal(torch.tensor(completion.logprobs), wanted)


def test_the_measured_gap_of_engine_and_trainer_is_zero_in_the_exact_gear_alone():
    model = model_of(hidden_size=64, num_attention_heads=8)
    sizes = dict(sequences=5, prompt_tokens=20, new_tokens=50)
    assert measure_gap(model, "exact", **sizes) == (0.0, 0.0, 250)
    fast = measure_gap(model, "torch", **sizes)
    assert 0 < fast.mean <= fast.largest < 1e-3


def test_costs_are_measured_and_reported(monkeypatch):
    model = model_of()
    costs = measure_cost(model, repeats=1, new_tokens=2)
    assert [cost.ratio > 0 for cost in costs] == [True] * 3
    monkeypatch.setattr("minglm.engine.exact.measure_cost", lambda model: costs)
    text = report(model)
    assert "gear exact  largest gap 0.00e+00, mean 0.00e+00" in text
    assert all(f"{cost.work:34}" in text and f"{cost.ratio:.2f} times" in text for cost in costs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_to_the_gradients_of_the_torch_gear(autocast, checkpointing):
    # Without mixture-of-experts layers: in bf16 the gears need not agree which of two close experts is the better.
    model = model_of(first_k_dense_replace=3, num_nextn_predict_layers=0, initializer_range=0.05).train()
    model.activation_checkpointing = checkpointing
    ids, gradients = tokens(model, 3, 71), {}
    for gear in ("torch", "exact"):
        model.zero_grad()
        with ops.using(gear), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = model.loss(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).total
        with ops.using(gear):
            total.backward()
        gradients[gear] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    difference = (gradients["exact"] - gradients["torch"]).norm() / gradients["torch"].norm()
    assert difference < (2e-2 if autocast else 1e-5)


# ------------------------------------------------------------------------------------------------------ these laws can fail


def gaps(model: GLM, gear: str) -> dict[str, float]:
    """Largest absolute difference of logits between one pass over a batch and other ways to the same tokens."""
    ids = tokens(model, 2, 100)
    with torch.no_grad(), ops.using(gear):
        whole, head = model(ids), model.lm_head.weight
        rows = list(zip(whole.hidden_states[0], ids[1], strict=True))
        others = {
            "alone": torch.cat([model(row[None]).logits for row in ids]),
            "decoded": torch.cat([in_chunks(model, row[None], [1] * 100) for row in ids]),
            "chunks": in_chunks(model, ids, [3, 50, 47]),
            "log-probabilities": torch.cat([ops.token_log_probs(row[None], head, id[None]) for row, id in rows]),
        }
        wanted = dict.fromkeys(others, whole.logits)
        wanted["log-probabilities"] = ops.token_log_probs(whole.hidden_states[0], head, ids[1])
    return {name: (other - wanted[name]).abs().max().item() for name, other in others.items()}


def nano() -> GLM:
    torch.manual_seed(0)
    model = GLM(GLMConfig.from_toml(NANO)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    return model


@pytest.mark.parametrize("gear", ["naive", "torch"])
def test_other_gears_break_these_laws(gear):
    found = gaps(nano(), gear)
    assert min(found[name] for name in ("alone", "decoded", "chunks")) > 0


def test_the_exact_gear_has_no_gap_at_all():
    assert set(gaps(nano(), "exact").values()) == {0.0}


@pytest.mark.parametrize("name", ["linear", "attention", "router_scores", "swiglu", "routed_experts", "token_log_probs"])
def test_one_inexact_operation_is_enough_to_break_them(name, monkeypatch):
    model = nano()
    with ops.using("exact"):  # registers its operations
        monkeypatch.setitem(ops._implementations[name], "exact", ops.form(name, "torch"))
    assert max(gaps(model, "exact").values()) > 0


class Recorder(TorchDispatchMode):
    """What PyTorch computes: the names of its operations, how many rows batched products have, and which dimensions are
    summed over."""

    def __init__(self):
        super().__init__()
        self.names, self.rows, self.summed = set(), set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name == "bmm":
            self.rows.add(args[0].shape[1])
        elif name in ("sum", "mean"):
            self.summed.update(dim if dim < 0 else dim - args[0].ndim for dim in args[1])
        elif name == "_log_softmax":
            self.summed.add(args[1] if args[1] < 0 else args[1] - args[0].ndim)
        return func(*args, **kwargs or {})


# What may run: moves of numbers; arithmetic that IEEE 754 defines to the bit; functions that PyTorch computes alike
# everywhere in a vector (tried below); whole numbers; sums and choices that each stay within one row, and products.
MOVES = (
    "_to_copy _unsafe_view alias cat clone constant_pad_nd copy_ detach embedding empty_like expand gather index"
    " index_fill_ index_select masked_fill_ new_empty new_zeros permute repeat_interleave roll select slice split"
    " split_with_sizes t transpose unbind unsqueeze view zeros zeros_like"
)
# pow: squares, and RoPE's frequencies, always the same ones.
IEEE = "add add_ clamp div mul mul_ neg pow reciprocal sub sub_"
SAME_EVERYWHERE = ("exp", "exp_", "rsqrt", "cos", "sin")
WHOLE_NUMBERS = (
    "_local_scalar_dense aminmax any arange bitwise_not cumsum floor_divide ge index_put_ lt nonzero promote_types"
    " searchsorted sort"
)
WITHIN_ROWS = "_embedding_bag_forward_only _log_softmax amax bmm mean sum topk"
KNOWN = {*MOVES.split(), *IEEE.split(), *SAME_EVERYWHERE, *WHOLE_NUMBERS.split(), *WITHIN_ROWS.split()}


def test_only_operations_of_known_order_run_and_every_product_is_a_tile():
    model = model_of(use_qk_norm=True, attention_bias=True)
    ids = tokens(model, 2, 70)
    with exactly():
        hidden = model(ids).hidden_states[0]
        with Recorder() as record:
            in_chunks(model, ids, [40, 20, 1, 1, 8])
            ops.token_log_probs(hidden, model.lm_head.weight, ids[0])
    assert not record.names - KNOWN, f"is the order of these known: {sorted(record.names - KNOWN)}?"
    assert record.rows == {exact.ROWS}
    assert record.summed == {-1}


@pytest.mark.parametrize("name", SAME_EVERYWHERE)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_functions_are_the_same_everywhere_in_a_vector(name, threads):
    before = torch.get_num_threads()
    x = torch.rand(70_001, generator=torch.Generator().manual_seed(0)) * 6 + 0.01
    function = getattr(torch, name)
    try:
        torch.set_num_threads(threads)
        whole = function(x.clone())
        for start, size in [(0, 1), (5, 1), (100, 7), (33, 31), (64, 16), (3, 65), (17, 69_000), (40_000, 1)]:
            piece = slice(start, start + size)
            assert torch.equal(function(x[piece].clone()), whole[piece]), (start, size)
    finally:
        torch.set_num_threads(before)
