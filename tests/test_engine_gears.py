"""The inference gear computes what the naive definitions say; in the exact gear the engine has the trainer's bits."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm import ops
from minglm.config import GLMConfig
from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.model import GLM

FEW = settings(max_examples=25, deadline=None, derandomize=True)
SEED = st.integers(0, 2**32)


def same_in_both(operation, *arguments) -> None:
    with torch.inference_mode():
        with ops.using("naive"):
            expected = operation(*arguments)
        with ops.using("inference"):
            torch.testing.assert_close(operation(*arguments), expected, rtol=1e-4, atol=1e-5)


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@FEW
@given(seed=SEED, b=st.integers(1, 4), t=st.integers(1, 5), s=st.integers(1, 20), group=st.integers(1, 3), kv=st.integers(1, 2))
def test_attention_to_a_masked_cache(seed, b, t, s, group, kv):
    q, k, v = drawn(seed, (b, t, group * kv, 8), (b, s, kv, 8), (b, s, kv, 8))
    visible = torch.rand(b, 1, t, s, generator=torch.Generator().manual_seed(seed)) < 0.7
    visible[..., 0] = True
    same_in_both(ops.attention, q, k, v, visible)


@FEW
@given(seed=SEED, t=st.integers(1, 6), heads=st.integers(1, 3), p=st.integers(1, 4))
def test_norm_rotary_swiglu_and_scores(seed, t, heads, p):
    x, cos, sin, weight = drawn(seed, (1, t, heads, 8), (t, p), (t, p), (8,))
    same_in_both(ops.rms_norm, x, weight, 1e-5)
    same_in_both(ops.rotary, x, cos, sin)
    h, gate, up, down, router = drawn(seed, (1, t, 8), (6, 8), (6, 8), (8, 6), (5, 8))
    same_in_both(ops.swiglu, h, gate, up, down)
    same_in_both(ops.router_scores, h[0], router)


CONFIG = GLMConfig(
    vocab_size=30,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    num_nextn_predict_layers=1,
    initializer_range=0.2,
)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    prompts=st.lists(st.lists(st.integers(0, 29), min_size=1, max_size=70), min_size=1, max_size=5),
    options=st.sampled_from(
        [
            {},
            {"block_size": 4, "num_blocks": 24, "max_batch_tokens": 17},
            {"block_size": 16, "draft_tokens": 2},
            {"block_size": 7, "max_running": 2},
        ]
    ),
)
def test_logprobs_in_the_exact_gear_have_the_trainers_bits(seed, prompts, options):
    torch.manual_seed(seed)
    model = GLM(CONFIG).eval()
    params = [SamplingParams(seed=i, max_tokens=12, logprobs=0) for i in range(len(prompts))]
    answers = Engine(model, None, gear="exact", **options).generate(prompts, params)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer.ids])
        with ops.using("exact"), torch.no_grad():
            hidden = model(ids[:, :-1]).hidden_states[0, len(prompt) - 1 :]
            trainer = ops.token_log_probs(hidden, model.lm_head.weight, ids[0, len(prompt) :])
        assert torch.equal(torch.tensor(answer.logprobs), trainer)


def test_the_fast_gear_lacks_these_bits():
    """So the test above can fail."""
    torch.manual_seed(0)
    model = GLM(dataclasses.replace(CONFIG, hidden_size=64)).eval()
    (answer,) = Engine(model, None).generate([[1, 2, 3]], SamplingParams(seed=0, max_tokens=30, logprobs=0))
    ids = torch.tensor([[1, 2, 3, *answer.ids]])
    with torch.no_grad():
        trainer = model(ids[:, :-1]).logits[0, 2:].log_softmax(-1).gather(1, ids[0, 3:, None])[:, 0]
    assert not torch.equal(torch.tensor(answer.logprobs), trainer)
    assert answer.logprobs == pytest.approx(trainer.tolist(), abs=1e-4)
