"""The laws of the model: what depends on what, what never matters, and what it costs.

Equality with the published architecture, weight for weight, is the matter of the parity tests.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import pack
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minglm import ops
from minglm.config import GLMConfig
from minglm.model import GLM, KVCache, LossTotals, MoE, Rotary, Router

LAW = settings(deadline=None, derandomize=True, max_examples=12)
SIZES = Path(__file__).parents[1] / "configs" / "model"
IGNORED, PADDING = -100, -1

SMALL = GLMConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=3,
    intermediate_size=24,
    num_attention_heads=4,
    head_dim=8,
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    routed_scaling_factor=2.5,
)


def small_model(seed: int = 0, **changes) -> GLM:
    """A model in which everything matters: no weight is 0 or 1, as biases and norms are at the start of training."""
    torch.manual_seed(seed)
    model = GLM(dataclasses.replace(SMALL, initializer_range=0.25, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.25 * torch.randn_like(parameter)
        for router in model.routers():
            router.e_score_correction_bias.normal_(std=0.1)
    return model


def random_ids(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def next_tokens(input_ids: Tensor) -> Tensor:
    return F.pad(input_ids[:, 1:], (0, 1), value=IGNORED)


def gradients(model: GLM, loss: Tensor) -> dict[str, Tensor]:
    """Of every parameter; zero where the loss does not depend on it."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, gradient in wanted.items():
        scale = max(1e-2, gradient.abs().max().item())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4 * scale, msg=name)


def add(totals: list[LossTotals]) -> LossTotals:
    return LossTotals(*(torch.stack(part).sum() for part in zip(*totals, strict=True)))


DOCUMENT = st.lists(st.integers(0, SMALL.vocab_size - 1), min_size=1, max_size=7)
DOCUMENTS = st.lists(DOCUMENT, min_size=1, max_size=5)


# ---------------------------------------------------------------- RoPE


@given(
    pairs=st.integers(1, 16),
    rest=st.integers(0, 8).map(lambda half: 2 * half),
    theta=st.floats(10.0, 1e6),
    start=st.integers(0, 500),
    seed=st.integers(0, 1000),
)
@LAW
def test_rope_turns_pair_i_by_position_times_its_frequency(pairs, rest, theta, start, seed):
    head_dim = 2 * pairs + rest
    config = GLMConfig(head_dim=head_dim, partial_rotary_factor=2 * pairs / head_dim, rope_theta=theta)
    positions = torch.arange(start, start + 4)
    x = torch.randn(1, 4, 2, head_dim, generator=torch.Generator().manual_seed(seed))
    found = ops.rotary(x, *Rotary.at(positions, config))

    frequencies = theta ** (-torch.arange(pairs).double() / pairs)
    angles = positions[:, None, None] * frequencies
    plane = torch.complex(x[..., :pairs].double(), x[..., pairs : 2 * pairs].double())
    turned = plane * torch.polar(torch.ones_like(angles), angles)
    wanted = torch.cat([turned.real, turned.imag, x[..., 2 * pairs :].double()], dim=-1)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-4)  # fp32 knows 500 radians to 3e-5


@given(query=st.integers(0, 300), key=st.integers(0, 300), shift=st.integers(0, 300), seed=st.integers(0, 1000))
@LAW
def test_attention_scores_depend_on_relative_positions_only(query, key, shift, seed):
    q, k = torch.randn(2, 1, 1, 1, SMALL.head_dim, generator=torch.Generator().manual_seed(seed))

    def score(query: int, key: int) -> Tensor:
        turned = (ops.rotary(x, *Rotary.at(torch.tensor([p]), SMALL)) for x, p in ((q, query), (k, key)))
        return (next(turned) * next(turned)).sum()

    torch.testing.assert_close(score(query, key), score(query + shift, key + shift), rtol=0, atol=2e-3)


# ---------------------------------------------------------------- router and experts


@given(
    group_size=st.integers(2, 4),
    n_group=st.integers(1, 4),
    data=st.data(),
    seed=st.integers(0, 1000),
)
@LAW
def test_the_router_chooses_by_the_definition(group_size, n_group, data, seed):
    """Facts, section 2.4, one token after the other."""
    topk_group = data.draw(st.integers(1, n_group))
    k = data.draw(st.integers(1, group_size * topk_group))
    norm_topk_prob = data.draw(st.booleans())
    config = dataclasses.replace(
        SMALL,
        n_routed_experts=group_size * n_group,
        num_experts_per_tok=k,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm_topk_prob,
    )
    torch.manual_seed(seed)
    router = Router(config)
    router.weight.data.normal_()
    router.e_score_correction_bias.normal_()
    x = torch.randn(5, SMALL.hidden_size)
    experts, weights, scores = router(x)

    for token in range(5):
        score = [1 / (1 + math.exp(-logit)) for logit in (router.weight.double() @ x[token].double()).tolist()]
        biased = [s + bias for s, bias in zip(score, router.e_score_correction_bias.tolist(), strict=True)]
        groups = [range(g * group_size, (g + 1) * group_size) for g in range(n_group)]
        groups.sort(key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))
        allowed = [e for group in groups[:topk_group] for e in group]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:k]
        total = sum(score[e] for e in chosen) if norm_topk_prob else 1.0
        assert set(experts[token].tolist()) == set(chosen)
        for expert, weight in zip(experts[token].tolist(), weights[token].tolist(), strict=True):
            assert weight == pytest.approx(2.5 * score[expert] / total, rel=1e-5)
        assert scores[token].tolist() == pytest.approx(score, rel=1e-5)


def test_the_mixture_is_the_weighted_sum_of_the_chosen_experts_and_the_shared_one():
    torch.manual_seed(0)
    moe = MoE(dataclasses.replace(SMALL, n_shared_experts=2))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 5, SMALL.hidden_size)
    found, _ = moe(x, None)
    assert moe.shared_experts.up_proj.weight.shape == (2 * SMALL.moe_intermediate_size, SMALL.hidden_size)
    for b in range(2):
        for t in range(5):
            token = x[b, t]
            experts, weights, _ = moe.gate(token[None])
            wanted = moe.shared_experts(token)
            for expert, weight in zip(experts[0].tolist(), weights[0], strict=True):
                gate, up = (moe.experts.gate_up_proj[expert] @ token).chunk(2)
                wanted = wanted + weight * (moe.experts.down_proj[expert] @ (F.silu(gate) * up))
            torch.testing.assert_close(found[b, t], wanted, rtol=1e-5, atol=1e-5)


def test_the_router_bias_chooses_and_never_weighs():
    model = small_model()
    router = model.routers()[0]
    x = torch.randn(20, SMALL.hidden_size)
    experts, weights, _ = router(x)
    router.e_score_correction_bias += 0.5  # the same for all: nothing changes
    same_experts, same_weights, _ = router(x)
    assert torch.equal(same_experts.sort().values, experts.sort().values)
    assert torch.equal(same_weights.sort().values, weights.sort().values)
    router.e_score_correction_bias[3] += 10
    favoured_experts, favoured_weights, scores = router(x)
    assert (favoured_experts == 3).any(1).all()
    chosen = scores.gather(1, favoured_experts)
    torch.testing.assert_close(favoured_weights, 2.5 * chosen / chosen.sum(1, keepdim=True))


def test_the_router_bias_is_no_parameter_and_gets_no_gradient():
    model = small_model()
    before = [router.e_score_correction_bias.clone() for router in model.routers()]
    input_ids = random_ids(0, 2, 10)
    model.loss(input_ids, next_tokens(input_ids)).total.backward()
    assert not any("e_score_correction_bias" in name for name, _ in model.named_parameters())
    for router, bias in zip(model.routers(), before, strict=True):
        assert not router.e_score_correction_bias.requires_grad and router.e_score_correction_bias.grad is None
        assert torch.equal(router.e_score_correction_bias, bias)


# ---------------------------------------------------------------- loss


@given(rows=st.lists(DOCUMENTS, min_size=1, max_size=3), packed=st.booleans(), seed=st.integers(0, 1000))
@LAW
def test_the_loss_is_the_mean_cross_entropy_of_the_next_token_and_of_the_one_after(rows, packed, seed):
    model = small_model(seed)
    input_ids, labels, document_ids = pack(rows, length=max(sum(map(len, row)) for row in rows) + 1)
    if not packed:
        labels, document_ids = next_tokens(input_ids), None
    loss = model.loss(input_ids, labels, document_ids, mtp_weight=0.3, balance_weight=0.01)
    out = model(input_ids, document_ids, mtp=True)

    lm, mtp = [], []
    for b in range(input_ids.shape[0]):
        for t in range(input_ids.shape[1]):
            if labels[b, t] != IGNORED:
                lm.append(-out.logits[b, t].log_softmax(-1)[labels[b, t]])
                # Two labels in a row: positions t, t + 1 and t + 2 are of one document.
                if t > 0 and labels[b, t - 1] != IGNORED:
                    mtp.append(-out.mtp_logits[b, t - 1].log_softmax(-1)[labels[b, t]])
    for found, terms in ((loss.lm, lm), (loss.mtp, mtp)):
        torch.testing.assert_close(found, torch.stack(terms).mean() if terms else torch.tensor(0.0))
    torch.testing.assert_close(loss.total, loss.lm + 0.3 * loss.mtp + 0.01 * loss.balance)
    totals = model.count_targets(labels, document_ids)
    assert (totals.lm, totals.mtp, totals.sequences) == (len(lm), len(mtp), len(rows))


def test_weights_and_totals_scale_the_parts_of_the_loss():
    model = small_model()
    input_ids = random_ids(0, 2, 10)
    labels = next_tokens(input_ids)
    one = model.loss(input_ids, labels, mtp_weight=0.0, balance_weight=0.0)
    assert one.total == one.lm and one.mtp > 0 and one.balance > 0
    doubled = LossTotals(*(2 * total for total in model.count_targets(labels)))
    half = model.loss(input_ids, labels, totals=doubled)
    for part in ("lm", "mtp", "balance"):
        torch.testing.assert_close(2 * getattr(half, part), getattr(one, part))


def test_a_batch_without_targets_has_zero_loss_and_finite_gradients():
    model = small_model()
    input_ids, _, document_ids = pack([[[1]], [[2]]], length=3)
    loss = model.loss(input_ids, torch.full_like(input_ids, IGNORED), document_ids)
    assert loss.lm == 0 and loss.mtp == 0
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss.total).values())


@given(rows=st.lists(DOCUMENTS, min_size=2, max_size=4), cut=st.integers(1, 3), seed=st.integers(0, 1000))
@LAW
def test_micro_batches_with_the_totals_of_the_step_give_the_gradient_of_one_batch(rows, cut, seed):
    model = small_model(seed)
    batch = pack(rows, length=max(sum(map(len, row)) for row in rows))
    whole = model.loss(*batch, balance_weight=0.1)
    wanted = gradients(model, whole.total)

    pieces = list(zip(*(x.split(cut) for x in batch), strict=True))
    totals = add([model.count_targets(labels, document_ids) for _, labels, document_ids in pieces])
    losses = [model.loss(*piece, balance_weight=0.1, totals=totals) for piece in pieces]
    torch.testing.assert_close(sum(loss.total for loss in losses), whole.total)
    assert_same_gradients(gradients(model, sum(loss.total for loss in losses)), wanted)


# ---------------------------------------------------------------- multi-token prediction


@given(changed=st.integers(0, 11), seed=st.integers(0, 1000))
@LAW
def test_mtp_at_t_sees_the_token_at_t_plus_1_and_nothing_after(changed, seed):
    model = small_model(seed)
    before = random_ids(seed, 1, 12)
    after = before.clone()
    after[0, changed] = (after[0, changed] + 1) % SMALL.vocab_size
    with torch.no_grad():
        one, other = model(before, mtp=True), model(after, mtp=True)
    assert one.mtp_logits.shape == (1, 11, SMALL.vocab_size)
    difference = (one.logits - other.logits).abs().amax(-1)[0]
    assert (difference[:changed] < 1e-5).all() and difference[changed] > 1e-3
    difference = (one.mtp_logits - other.mtp_logits).abs().amax(-1)[0]
    first = max(0, changed - 1)
    assert (difference[:first] < 1e-5).all() and difference[first] > 1e-3


def test_mtp_joins_the_state_at_t_with_the_token_at_t_plus_1():
    """The definition, step by step; positions are those of the tokens at t + 1."""
    model = small_model()
    mtp = model.mtp
    input_ids = random_ids(0, 2, 12)
    out = model(input_ids, mtp=True)
    embedding = mtp.enorm(model.model.embed_tokens(input_ids[:, 1:]))
    x = torch.cat([embedding, mtp.hnorm(out.hidden_states[:, :-1])], dim=-1) @ mtp.eh_proj.weight.t()
    h, _ = mtp.layer(x, Rotary.at(torch.arange(1, 12), model.config), visible=None, real=None)
    torch.testing.assert_close(model.lm_head(mtp.shared_head.norm(h)), out.mtp_logits)


@pytest.mark.parametrize("tied", [False, True])
def test_detach_trunk_keeps_the_mtp_loss_out_of_the_trunk_and_changes_nothing_else(tied):
    model = small_model(tie_word_embeddings=tied)
    input_ids = random_ids(0, 2, 10)
    free = model.loss(input_ids, next_tokens(input_ids))
    detached = model.loss(input_ids, next_tokens(input_ids), detach_trunk=True)
    assert [x.item() for x in detached] == [x.item() for x in free]
    assert_same_gradients(gradients(model, detached.lm), gradients(model, free.lm))
    leaking = gradients(model, free.mtp)
    for name, gradient in gradients(model, detached.mtp).items():
        if name.startswith("mtp."):
            torch.testing.assert_close(gradient, leaking[name], msg=name)
        else:  # the trunk, the embedding and the head: what the model says stays as it is (SkyRL#1832)
            assert leaking[name].count_nonzero() > 0 and gradient.count_nonzero() == 0, name


def test_the_mtp_layer_can_be_left_out_and_nothing_else_changes():
    model = small_model()
    input_ids = random_ids(0, 2, 10)
    whole, without = (model.hidden_and_side_losses(input_ids, next_tokens(input_ids), with_mtp=one) for one in (True, False))
    assert whole[1] > 0 == without[1] and torch.equal(whole[0], without[0]) and without[2] < whole[2]  # one layer less
    without[0].sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith("mtp."))


def test_a_single_token_has_no_token_after_the_next():
    model = small_model()
    one = torch.tensor([[3], [4]])
    assert model(one, mtp=True).mtp_logits.shape == (2, 0, SMALL.vocab_size)
    assert model.loss(one, one).mtp == 0


def test_without_an_mtp_layer_its_loss_is_zero():
    model = small_model(num_nextn_predict_layers=0)
    input_ids = random_ids(0, 2, 10)
    loss = model.loss(input_ids, next_tokens(input_ids))
    assert model.mtp is None and loss.mtp == 0 and loss.lm > 0
    assert len(model.expert_load) == SMALL.num_moe_layers


# ---------------------------------------------------------------- documents and padding


@given(documents=st.lists(DOCUMENT, min_size=2, max_size=5), data=st.data(), seed=st.integers(0, 1000))
@LAW
def test_no_document_is_touched_by_another(documents, data, seed):
    model = small_model(seed)
    changed = data.draw(st.integers(0, len(documents) - 1))
    others = [[(x + 1) % SMALL.vocab_size for x in d] if i == changed else d for i, d in enumerate(documents)]
    length = sum(map(len, documents))
    input_ids, _, document_ids = pack([documents], length)
    with torch.no_grad():
        one = model(input_ids, document_ids, mtp=True)
        other = model(pack([others], length)[0], document_ids, mtp=True)
    untouched = document_ids != changed
    torch.testing.assert_close(one.logits[untouched], other.logits[untouched], rtol=0, atol=1e-5)
    # The MTP layer's position t is of a document if t and t + 1 are.
    inside = untouched[:, 1:] & (document_ids[:, 1:] == document_ids[:, :-1])
    torch.testing.assert_close(one.mtp_logits[inside], other.mtp_logits[inside], rtol=0, atol=1e-5)


@given(documents=DOCUMENTS, left=st.integers(0, 3), right=st.integers(0, 3), seed=st.integers(0, 1000))
@LAW
def test_packed_documents_have_the_loss_and_gradient_of_separate_ones(documents, left, right, seed):
    """Wherever they lie in the row, with padding before and behind."""
    model = small_model(seed)
    packed = pack([documents], sum(map(len, documents)) + right, left)
    separate = [pack([[document]], len(document)) for document in documents]
    totals = add([model.count_targets(labels, document_ids) for _, labels, document_ids in separate])
    assert model.count_targets(*packed[1:])[:2] == totals[:2]

    found = model.loss(*packed, balance_weight=0.0)
    wanted = [model.loss(*one, balance_weight=0.0, totals=totals) for one in separate]
    torch.testing.assert_close(found.lm, sum(loss.lm for loss in wanted))
    torch.testing.assert_close(found.mtp, sum(loss.mtp for loss in wanted))
    assert_same_gradients(gradients(model, found.total), gradients(model, sum(loss.total for loss in wanted)))


@given(
    rows=st.lists(DOCUMENTS, min_size=1, max_size=3),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    empty_rows=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
@LAW
def test_padding_changes_no_part_of_the_loss_no_gradient_and_no_load(rows, left, right, empty_rows, seed):
    model = small_model(seed)
    length = max(sum(map(len, row)) for row in rows)
    results = []
    for batch in (pack(rows, length), pack(rows + [[]] * empty_rows, length + right, left)):
        loss = model.loss(*batch, balance_weight=0.1)
        results.append((torch.stack(loss), gradients(model, loss.total), model.expert_load.clone()))
        model.expert_load.zero_()
    (wanted, wanted_gradients, wanted_load), (found, found_gradients, load) = results
    torch.testing.assert_close(found, wanted)
    assert_same_gradients(found_gradients, wanted_gradients)
    assert torch.equal(load, wanted_load)


def test_one_document_a_row_is_the_same_as_no_document_ids():
    model = small_model()
    input_ids = random_ids(0, 2, 10)
    with torch.no_grad():
        one, other = model(input_ids, mtp=True), model(input_ids, torch.full((2, 10), 7), mtp=True)
    torch.testing.assert_close(one.logits, other.logits)
    torch.testing.assert_close(one.mtp_logits, other.mtp_logits)


# ---------------------------------------------------------------- cache


@given(cuts=st.sets(st.integers(1, 11)), seed=st.integers(0, 1000))
@LAW
def test_decoding_in_pieces_with_a_cache_equals_the_full_pass(cuts, seed):
    model = small_model(seed)
    input_ids = random_ids(seed, 2, 12)
    cache = KVCache(model.config, batch=2, max_length=12)
    ends = [*sorted(cuts), 12]
    with torch.no_grad():
        wanted = model(input_ids).logits
        pieces = [model(input_ids[:, start:end], cache=cache).logits for start, end in zip([0, *ends], ends, strict=False)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, rtol=1e-4, atol=1e-4)
    assert cache.length == 12
    with pytest.raises(ValueError, match="holds 12 tokens; position 12 does not fit"):
        model(input_ids[:, :1], cache=cache)


# ---------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_changes_no_bit_of_loss_gradients_and_load(autocast):
    batch = pack([[[1, 2, 3, 4, 5], [6, 7, 8]], [[9], [10, 11, 12]]], length=9)
    results = []
    for switch in (False, True):
        model = small_model()
        model.activation_checkpointing = switch
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.loss(*batch)
        loss.total.backward()
        results.append([*loss, model.expert_load, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_activation_checkpointing_keeps_fewer_tensors():
    """Else the test above would pass with a switch that does nothing."""
    kept = []
    for switch in (False, True):
        model = small_model()
        model.activation_checkpointing = switch
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            input_ids = random_ids(0, 2, 10)
            model.loss(input_ids, next_tokens(input_ids))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


# ---------------------------------------------------------------- dtypes and devices


def cast_parts(model: GLM) -> GLM:
    model.model.bfloat16()
    model.mtp.half()
    return model


def load_into_bf16(model: GLM) -> GLM:
    loaded = GLM(model.config).bfloat16()
    loaded.load_state_dict(model.state_dict())
    return loaded


CASTS: dict[str, Callable[[GLM], GLM]] = {
    "bfloat16()": lambda model: model.bfloat16(),
    "half()": lambda model: model.half(),
    "double()": lambda model: model.double(),
    "to(dtype)": lambda model: model.to(torch.bfloat16),
    "to(device, dtype)": lambda model: model.to("cpu", torch.float16),
    "to(tensor)": lambda model: model.to(torch.zeros(1, dtype=torch.bfloat16)),
    "there and back": lambda model: model.bfloat16().float(),
    "of parts": cast_parts,
    "of a copy": lambda model: copy.deepcopy(model).bfloat16(),
    "of what is loaded into": load_into_bf16,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_no_cast_reaches_the_router_bias(cast):
    """In bf16, 1,000 of these biases would be 8: they differ by less than its steps."""
    model = small_model()
    for router in model.routers():
        router.e_score_correction_bias.copy_(1.0 + torch.arange(SMALL.n_routed_experts) * 2**-20)
    before = [router.e_score_correction_bias.clone() for router in model.routers()]
    for router, bias in zip(cast(model).routers(), before, strict=True):
        assert router.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(router.e_score_correction_bias, bias)


def test_the_state_dict_holds_the_router_bias_in_fp32_and_no_load():
    state = small_model().bfloat16().state_dict()
    biases = [name for name in state if name.endswith("e_score_correction_bias")]
    assert len(biases) == SMALL.num_moe_layers + 1
    assert all(state[name].dtype == torch.float32 for name in biases)
    assert "expert_load" not in state


@pytest.mark.parametrize("how", ["bfloat16()", "autocast"])
def test_bf16_stays_close_to_fp32(how):
    model = small_model()
    input_ids = random_ids(0, 2, 24)
    with torch.no_grad():
        wanted = model(input_ids, mtp=True)
    if how == "bfloat16()":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = model(input_ids, mtp=True)
        loss = model.loss(input_ids, next_tokens(input_ids)).total
    loss.backward()
    for one, other in ((found.logits, wanted.logits), (found.mtp_logits, wanted.mtp_logits)):
        assert one.dtype == torch.bfloat16
        assert ((one - other).norm() / other.norm()).item() < 0.1
    assert loss.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all(), name


@given(seed=st.integers(0, 1000), n_group=st.sampled_from([1, 2, 4]))
@LAW
def test_the_router_computes_in_fp32_under_autocast_and_in_a_bf16_model(seed, n_group):
    torch.manual_seed(seed)
    router = Router(dataclasses.replace(SMALL, n_group=n_group, topk_group=max(1, n_group - 1), num_experts_per_tok=2))
    router.weight.data.normal_()
    router.bfloat16()
    x = torch.randn(6, SMALL.hidden_size).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x)
    router.weight.data = router.weight.data.float()
    for one, other in zip(found, router(x.float()), strict=True):
        assert torch.equal(one, other)


def test_the_355b_model_is_made_on_the_meta_device_in_seconds():
    start = time.perf_counter()
    with torch.device("meta"):
        model = GLM(GLMConfig.from_toml(SIZES / "glm-4.5.toml"))
    assert time.perf_counter() - start < 20
    assert all(x.is_meta for x in [*model.parameters(), *model.buffers()])
    # More elements than int32 can count: offsets into it must not be int32.
    assert model.model.layers[3].mlp.experts.gate_up_proj.numel() == 2_516_582_400 > 2**31


def test_a_model_from_the_meta_device_becomes_a_real_one():
    with torch.device("meta"):
        model = GLM(SMALL)
    model.to_empty(device="cpu")
    wanted = GLM(SMALL)
    for one in (model, wanted):
        torch.manual_seed(3)
        one.initialize()
    for (name, one), other in zip(model.state_dict().items(), wanted.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert model.expert_load.count_nonzero() == 0


def test_initial_weights_have_the_configured_spread():
    model = GLM(GLMConfig(initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0)), name


def test_tied_embedding_and_head_are_one_parameter():
    model = small_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert model.bfloat16().lm_head.weight is model.model.embed_tokens.weight


# ---------------------------------------------------------------- what it costs


class Operations(TorchDispatchMode):
    """Records the name of every operation that runs inside, and the largest tensor that any of them makes."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.itemsize)
        return out


def run_recorded(model: GLM, input_ids: Tensor, document_ids: Tensor | None = None) -> Operations:
    with Operations() as operations:
        model.loss(input_ids, next_tokens(input_ids), document_ids).total.backward()
    return operations


def test_the_loss_never_holds_the_logits_of_the_whole_batch():
    model = small_model(vocab_size=4000)
    input_ids = random_ids(0, 4, 256)
    with ops.using("naive"):
        assert run_recorded(model, input_ids).largest >= 4 * 255 * 4000
    assert run_recorded(model, input_ids).largest <= 2**20


@pytest.mark.parametrize("packed", [False, True])
def test_which_operations_run_depends_on_shapes_alone(packed):
    """No loop over the data's tokens, documents or busy experts; and one sort in each mixture-of-experts layer."""
    model = small_model(n_routed_experts=16)
    names = []
    for seed in range(4):
        document_ids = random_ids(seed, 2, 12).sort().values if packed else None
        model.zero_grad()
        names.append(run_recorded(model, random_ids(seed, 2, 12), document_ids).names)
    assert all(other == names[0] for other in names)
    assert sum("aten.sort" in name for name in names[0]) == SMALL.num_moe_layers + 1


@pytest.mark.parametrize("packed", [False, True])
def test_the_host_never_waits_for_the_device_in_a_training_step(packed, monkeypatch):
    """Fake tensors have no values: whoever asks for one (`.item()`, `if x > 0`, `nonzero`) fails."""
    model = small_model(head_dim=16, moe_intermediate_size=16).bfloat16()
    input_ids = random_ids(0, 2, 10)
    document_ids = torch.zeros(2, 10, dtype=torch.long) if packed else None

    def step():
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.loss(input_ids, next_tokens(input_ids), document_ids).total.backward()
            model.update_router_bias(0.001)

    # What is only done on CPUs: look at the ids, hand each expert its own tokens, and the head those that have a label.
    with pytest.raises(DataDependentOutputException):
        step()
    monkeypatch.setattr(GLM, "_check_vocabulary", lambda *arguments: None)
    with pytest.raises(RuntimeError):
        step()
    monkeypatch.setattr(ops._RoutedExperts, "apply", ops._grouped_products)
    with pytest.raises(DynamicOutputShapeException):
        step()
    monkeypatch.setattr(ops, "_targets", lambda hidden, labels: (hidden, labels))
    step()


# ---------------------------------------------------------------- load


def test_the_load_counts_each_real_token_k_times_in_training_only():
    model = small_model()
    batch = pack([[[1, 2, 3, 4, 5], [6, 7, 8]], [[9]]], length=10)
    model.eval()
    model.loss(*batch)
    assert model.expert_load.count_nonzero() == 0
    model.train()
    model(batch[0], batch[2], mtp=True)
    assert model.expert_load.count_nonzero() == 0
    model.loss(*batch)
    model.loss(*batch)
    # 9 tokens in the trunk; in the MTP layer 4 + 2 + 0 positions with a next token in the same document.
    assert model.expert_load.sum(1).tolist() == [2 * 3 * 9] * SMALL.num_moe_layers + [2 * 3 * 6]
    assert model.expert_load.dtype == torch.int64


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(input_ids=torch.tensor([[0, 50]])), "input_ids hold 0 to 50: wanted 0 to 49, the vocabulary"),
        (dict(input_ids=torch.tensor([[-1, 3]])), "input_ids hold -1 to 3: wanted 0 to 49"),
        (dict(input_ids=torch.tensor([1, 2])), r"input_ids have shape \(2,\): wanted \(batch, sequence\)"),
        (dict(document_ids=torch.zeros(2, 4)), r"document_ids have shape \(2, 4\): wanted \(1, 4\)"),
        (dict(mtp=True, cache=KVCache(SMALL, 1, 8)), "mtp=True and a KV cache cannot be used together"),
        (
            dict(document_ids=torch.zeros(1, 4, dtype=torch.long), cache=KVCache(SMALL, 1, 8)),
            "document_ids and a KV cache cannot be used together",
        ),
    ],
)
def test_a_wrong_input_is_refused_in_words(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_model()(**{"input_ids": torch.tensor([[1, 2, 3, 4]]), **arguments})


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels have shape \(1, 3\): wanted input_ids' \(1, 4\)"):
        small_model().loss(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))


def test_mtp_logits_of_a_model_without_the_layer_are_refused():
    with pytest.raises(ValueError, match="this model has no MTP layer"):
        small_model(num_nextn_predict_layers=0)(torch.tensor([[1, 2]]), mtp=True)
