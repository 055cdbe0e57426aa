import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.config import GLMConfig
from minglm.engine.generate import draw, generate
from minglm.model import GLM

CONFIG = GLMConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    num_attention_heads=4,
    head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    initializer_range=0.3,  # far from uniform, so that the likeliest token is clear
)


@pytest.fixture(scope="module")
def model() -> GLM:
    torch.manual_seed(0)
    return GLM(CONFIG).eval()


def uncached(model: GLM, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[-count:]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), batch=st.integers(1, 3), length=st.integers(1, 9), count=st.integers(1, 12))
def test_greedy_text_is_the_argmax_of_uncached_forward_passes(model, seed, batch, length, count):
    ids = torch.randint(0, CONFIG.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        assert generate(model, ids, count, temperature=0) == [uncached(model, row, count) for row in ids.tolist()]


def test_a_sequence_ends_before_its_first_stop_id_and_others_go_on(model):
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    free = generate(model, ids, 20, temperature=0)
    stop = free[0][3]
    stopped = generate(model, ids, 20, temperature=0, stop_ids=[stop])
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(stopped[0]) <= 3


def test_the_same_generator_seed_draws_the_same_text_and_others_do_not(model):
    ids = torch.tensor([[1, 2, 3]])

    def sample(seed: int) -> list[list[int]]:
        return generate(model, ids, 30, temperature=2.0, generator=torch.Generator().manual_seed(seed))

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)[0]) for seed in range(5)}) == 5


def test_ids_beyond_the_vocabulary_are_never_drawn(model):
    written = generate(model, torch.zeros(8, 1, dtype=torch.long), 50, temperature=10.0, vocab_size=7)
    assert {id for row in written for id in row} == set(range(7))


LOGITS = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=12)


@settings(max_examples=60, deadline=None)
@given(logits=LOGITS, top_k=st.integers(1, 12), top_p=st.floats(0.01, 0.99), temperature=st.floats(0.2, 3))
def test_draws_come_from_the_nucleus_of_the_likeliest_k(logits, top_k, top_p, temperature):
    logits = torch.tensor(logits)
    drawn = draw(logits.repeat(200, 1), temperature, top_k, top_p, torch.Generator().manual_seed(0)).flatten()
    kth = logits.sort(descending=True).values[min(top_k, len(logits)) - 1]
    probability = (logits / temperature).masked_fill(logits < kth, float("-inf")).softmax(-1)
    for id in drawn.unique().tolist():
        assert logits[id] >= kth
        # The tokens that are strictly likelier do not yet have top_p together.
        assert probability[probability > probability[id]].sum() < top_p + 1e-5


def test_a_tiny_nucleus_is_the_likeliest_token():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(logits, top_p=1e-9), draw(logits, temperature=0))
    assert torch.equal(draw(logits, top_k=1), draw(logits, temperature=0))


def test_draws_have_the_probabilities_of_the_logits():
    probability = torch.tensor([0.5, 0.25, 0.125, 0.125])
    drawn = draw(probability.log().repeat(20_000, 1), generator=torch.Generator().manual_seed(0)).flatten()
    assert torch.allclose(drawn.bincount() / 20_000, probability, atol=0.015)
    hot = draw(probability.log().repeat(20_000, 1), temperature=0.5, generator=torch.Generator().manual_seed(0)).flatten()
    assert torch.allclose(hot.bincount() / 20_000, probability**2 / (probability**2).sum(), atol=0.015)


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -1},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.5},
        {"max_new_tokens": -1},
        {"ids": torch.zeros(1, 0).long()},
    ],
)
def test_arguments_out_of_range_are_refused(model, arguments):
    arguments = {"ids": torch.zeros(1, 1).long(), "max_new_tokens": 1} | arguments
    with pytest.raises(ValueError, match="wanted"):
        generate(model, **arguments)
