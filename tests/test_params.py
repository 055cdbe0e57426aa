"""What `params` says is what a model has, an optimiser keeps and a forward pass computes, by ways that share no formula."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from minglm import ops
from minglm.config import GLMConfig
from minglm.model import GLM, KVCache
from minglm.optim import build_optimizer
from minglm.params import (
    activation_bytes_per_token,
    count,
    count_by_construction,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    report,
    training_flops_per_token,
    training_memory,
)

LAW = settings(deadline=None, derandomize=True, max_examples=40)
SIZES = Path(__file__).parents[1] / "configs" / "model"
GLM_45, AIR = (GLMConfig.from_toml(SIZES / f"{name}.toml") for name in ("glm-4.5", "glm-4.5-air"))


@st.composite
def configs(draw) -> GLMConfig:
    group_size, n_group = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    topk_group = draw(st.integers(1, n_group))
    kv_heads = draw(st.integers(1, 3))
    return GLMConfig(
        vocab_size=draw(st.integers(1, 300)),
        hidden_size=draw(st.integers(1, 64)),
        num_hidden_layers=draw(st.integers(1, 6)),
        first_k_dense_replace=draw(st.integers(0, 7)),
        intermediate_size=draw(st.integers(1, 96)),
        num_attention_heads=kv_heads * draw(st.integers(1, 4)),
        num_key_value_heads=kv_heads,
        head_dim=4 * draw(st.integers(1, 8)),
        attention_bias=draw(st.booleans()),
        use_qk_norm=draw(st.booleans()),
        n_routed_experts=group_size * n_group,
        num_experts_per_tok=draw(st.integers(1, group_size * topk_group)),
        moe_intermediate_size=draw(st.integers(1, 40)),
        n_shared_experts=draw(st.integers(1, 3)),
        n_group=n_group,
        topk_group=topk_group,
        num_nextn_predict_layers=draw(st.integers(0, 1)),
        tie_word_embeddings=draw(st.booleans()),
    )


# ---------------------------------------------------------------- parameters


@given(config=configs())
@LAW
def test_the_formula_counts_what_the_model_has(config):
    parameters = count(config)
    assert parameters == count_by_construction(config)
    model = GLM(config)
    assert parameters.total == sum(p.numel() for p in model.parameters())
    assert parameters.main == sum(p.numel() for name, p in model.named_parameters() if not name.startswith("mtp."))


@pytest.mark.parametrize("counted", [count, count_by_construction])
def test_the_published_sizes_have_the_published_numbers_of_parameters(counted):
    glm_45, air = counted(GLM_45), counted(AIR)
    assert (glm_45.main, glm_45.mtp) == (352_797_814_784, 3_988_069_632)
    assert (air.main, air.mtp) == (106_852_245_504, 2_375_059_456)
    assert (glm_45.activated, glm_45.activated_without_input_table) == (33_632_251_904, 32_856_305_664)
    assert (air.activated, air.activated_without_input_table) == (13_424_123_904, 12_803_366_912)


@given(config=configs())
@LAW
def test_activated_are_the_parameters_that_one_token_moves(config):
    """The gradient of one token's logits shows which routed experts it met; all else is activated by definition."""
    config = dataclasses.replace(config, num_nextn_predict_layers=0, initializer_range=1.0)
    model = GLM(config)
    model(torch.zeros(1, 1, dtype=torch.long)).logits.sum().backward()
    met = 0
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            experts = parameter.grad.flatten(1).count_nonzero(1) > 0
            # A gradient may be exactly 0 by chance (saturated, or rounded away), but an expert that was not met has none.
            assert experts.sum() <= config.num_experts_per_tok
            met += config.num_experts_per_tok * parameter[0].numel()
        else:
            met += parameter.numel()
    parameters = count(config)
    assert parameters.activated == met
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert parameters.activated_without_input_table == met - looked_up


# ---------------------------------------------------------------- operations


def counted_flops(config: GLMConfig, sequence_length: int, mtp: bool) -> int:
    """Matrix products of the naive definitions, as PyTorch counts them, in a forward pass over one sequence."""
    model = GLM(config).eval()
    with torch.no_grad(), ops.using("naive"), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, sequence_length, dtype=torch.long), mtp=mtp)
    return counter.get_total_flops()


def surplus(config: GLMConfig, sequence_length: int, layers: int, moe_layers: int) -> int:
    """What PyTorch counts and we do not: in the naive definitions, the hidden half of causal attention is computed, and the
    statistic of the balance loss is a product."""
    attention = 2 * config.num_attention_heads * config.head_dim * sequence_length**2
    sums = 2 * config.n_routed_experts * sequence_length
    return layers * attention + moe_layers * sums


@given(config=configs(), t=st.integers(2, 9))
@LAW
def test_the_forward_pass_has_the_flops_that_pytorch_counts(config, t):
    counted = counted_flops(config, t, mtp=False) - surplus(config, t, config.num_hidden_layers, config.num_moe_layers)
    assert counted == t * forward_flops_per_token(config, t)


@given(config=configs(), t=st.integers(2, 9))
@LAW
def test_the_mtp_layer_costs_what_it_adds(config, t):
    """It runs over one position less than the sequence has."""
    config = dataclasses.replace(config, num_nextn_predict_layers=1)
    added = counted_flops(config, t + 1, mtp=True) - counted_flops(config, t + 1, mtp=False) - surplus(config, t, 1, 1)
    assert added == t * (forward_flops_per_token(config, t, mtp=True) - forward_flops_per_token(config, t))


@given(config=configs(), t=st.integers(1, 5000))
@LAW
def test_training_is_three_forward_passes_with_the_mtp_layer(config, t):
    assert training_flops_per_token(config, t) == 3 * forward_flops_per_token(config, t, mtp=True)
    if config.num_nextn_predict_layers == 0:
        assert forward_flops_per_token(config, t, mtp=True) == forward_flops_per_token(config, t)


def test_flops_of_the_published_size_are_six_times_the_activated_parameters_and_attention():
    """All but norms and biases are matrix products: 0.01% of the activated parameters."""
    main = 6 * count(GLM_45).activated_without_input_table + 12 * 92 * 96 * 128 * 4096 // 2
    assert 3 * forward_flops_per_token(GLM_45, 4096) == pytest.approx(main, rel=1e-4)


# ---------------------------------------------------------------- memory


@given(config=configs(), kind=st.sampled_from(["muon", "adamw"]))
@settings(LAW, max_examples=10)
def test_memory_is_what_the_optimizer_keeps(config, kind):
    model = GLM(config)
    optimizer = build_optimizer(model, lr=1e-3, kind=kind)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    memory = training_memory(config, muon=kind == "muon")
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters())
    states = [x for state in optimizer.state.values() for x in state.values() if x.ndim > 0]
    assert memory.optimizer == sum(x.nbytes for x in states)
    assert memory.total == memory.weights + memory.gradients + memory.optimizer


def test_the_kv_cache_has_the_published_size():
    assert kv_cache_bytes_per_token(GLM_45) == 376_832
    assert kv_cache_bytes_per_token(AIR) == 188_416
    assert kv_cache_bytes_per_token(GLM_45) * 131_072 == 46 * 2**30


@given(config=configs(), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
@LAW
def test_the_kv_cache_takes_what_is_said(config, dtype):
    cache = KVCache(config, batch=1, max_length=10, dtype=dtype)
    assert cache.keys.nbytes + cache.values.nbytes == 10 * kv_cache_bytes_per_token(config, dtype.itemsize)


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": False}, {"num_experts_per_tok": 8}, {"num_nextn_predict_layers": 1}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_take_the_memory_that_autograd_saves(changes, checkpointing, monkeypatch):
    """The operations that GPUs use, run on a CPU: grouped products and the flash kernel, under bf16 autocast."""
    monkeypatch.setattr(ops._RoutedExperts, "apply", ops._grouped_products)
    monkeypatch.setattr(ops._TiledAttention, "longest", 0)
    config = GLMConfig(hidden_size=256, num_hidden_layers=5, vocab_size=64, num_nextn_predict_layers=0)
    config = dataclasses.replace(config, **changes)
    saved = saved_bytes(config, 160, checkpointing) - saved_bytes(config, 32, checkpointing)
    expected = 128 * activation_bytes_per_token(config, checkpointing)
    if checkpointing:  # what is kept; the layer that is being recomputed comes later
        one_more = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers + 1)
        expected -= 128 * (activation_bytes_per_token(one_more) - activation_bytes_per_token(config))
    assert saved == pytest.approx(expected, rel=0.05)


def saved_bytes(config: GLMConfig, t: int, checkpointing: bool) -> int:
    model = GLM(config)
    model.activation_checkpointing = checkpointing
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, sizes = [], {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(x)  # so that no address is given to another tensor
        return x

    ids = torch.zeros(1, t, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.loss(ids, ids)
    return sum(sizes.values())


# ---------------------------------------------------------------- report


def test_the_report_shows_the_numbers():
    text = report(GLM_45)
    for number in ("352,797,814,784", "3,988,069,632", "33.63 B", "32.86 B", "376,832", "46.00 GiB"):
        assert number in text
    assert "FLOPs per token, in sequences of 4,096" in text and "Training on" not in text
    assert max(map(len, text.splitlines())) <= 100


@given(config=configs())
@settings(LAW, max_examples=10)
def test_the_parts_in_the_report_add_up(config):
    numbers = {
        name.strip(): int(number.replace(",", ""))
        for name, number in re.findall(r"^  (\D{24}) *([\d,]+)", report(config), re.M)
    }
    parts = "embedding, attention, dense mlp, router, routed experts, shared experts, norms, head".split(", ")
    assert sum(numbers[part] for part in parts) == numbers["main stack"]


def test_training_time_is_operations_over_speed():
    days = 10**12 * training_flops_per_token(AIR, 4096) / (1000 * 400e12) / 86_400
    assert f"{days:,.1f} days" in report(AIR, tokens=10**12, device_tflops=400_000)
    shorter = report(AIR, sequence_length=128, tokens=10**12, device_tflops=400_000)
    assert "in sequences of 128" in shorter and f"{days:,.1f} days" not in shorter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(tokens=10), "needs both tokens and device_tflops"),
        (dict(device_tflops=10.0), "needs both tokens and device_tflops"),
        (dict(tokens=0, device_tflops=1.0), "tokens = 0: wanted a number above 0"),
        (dict(tokens=5, device_tflops=-1.0), "device_tflops = -1.0: wanted a number above 0"),
        (dict(sequence_length=0), "sequence_length = 0: wanted a number above 0"),
    ],
)
def test_a_wrong_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        report(GLMConfig(), **arguments)
