"""Adapters: nothing at first, the same merged as beside the weights, and nothing else moves."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import MODEL

from minglm.checkpoint import load_model
from minglm.model import GLM
from minglm.posttrain.lora import adapters, add_lora, merge
from minglm.posttrain.recipe import LoRA

LAW = settings(max_examples=6, derandomize=True, deadline=None)


def model_of(seed: int) -> GLM:
    torch.manual_seed(seed)
    return GLM(MODEL).eval()


@cache
def ids_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(MODEL.vocab_size, (2, 13), generator=torch.Generator().manual_seed(0))
    return ids[:, :-1], ids[:, 1:]


def outputs(model: GLM) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(ids_and_labels()[0], mtp=True)
    return [found.logits, found.mtp_logits]


def learn(model: GLM) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # with B at zero, A has no gradient in the first step
        model.loss(*ids_and_labels()).total.backward()
        optimizer.step()
        optimizer.zero_grad()


@LAW
@given(st.integers(0, 99), st.integers(1, 4), st.floats(0.5, 32))
def test_fresh_adapters_change_no_bit_and_merged_ones_give_what_they_gave_beside_the_weights(seed, rank, alpha):
    model = model_of(seed)
    before, weights = outputs(model), {name: value.clone() for name, value in model.state_dict().items()}
    add_lora(model, LoRA(rank, alpha), seed)
    assert all(map(torch.equal, outputs(model), before))
    learn(model)
    beside = outputs(model)
    assert not any(map(torch.equal, beside, before))
    merged = merge(model)
    assert all(map(torch.equal, outputs(merged), beside)) and all(map(torch.equal, outputs(model), beside))
    after = merged.state_dict()
    assert list(after) == list(weights) and not adapters(merged)
    moved = {name for name in after if not torch.equal(after[name], weights[name])}
    wanted = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "experts.gate_up_proj", "experts.down_proj")
    assert moved == {name for name in weights if name.endswith(wanted) and "shared" not in name}


def test_the_merged_model_is_an_ordinary_folder(tmp_path):
    model = model_of(0)
    add_lora(model, LoRA(2))
    learn(model)
    merge(model).save_pretrained(tmp_path)
    assert all(map(torch.equal, outputs(load_model(tmp_path).eval()), outputs(model)))


def test_only_adapters_have_gradients_and_one_set_of_them_is_enough():
    model = model_of(0)
    add_lora(model, LoRA(2))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == adapters(model).keys() and len(trainable) == 2 * (4 * 3 + 2 * 2)
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(model, LoRA(2))
    bias = [router.e_score_correction_bias.clone() for router in model.routers()]
    model.train().loss(*ids_and_labels())
    model.update_router_bias(1.0)
    assert all(torch.equal(a, r.e_score_correction_bias) for a, r in zip(bias, model.routers(), strict=True))
