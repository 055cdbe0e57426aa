"""Scores of text are the model's own log-probabilities, however the texts are put together."""

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from memorised import fresh, memorised, tokenizer_of

from minglm.evals.scoring import Passage, Scorer, ScoringError, split_at_choice

TEXTS = (
    "The code of Tavira is 4821. The old fox sings near the mill, and 12 + 30 = 42.",
    "def add(first, second):\n    return first + second\n",
)
IDS = st.lists(st.integers(0, 260), min_size=1, max_size=40)


def naive(model, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Nats of each token but the first, and whether it is the likeliest: one text alone, the model's plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    nats = -logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
    return nats.numpy(), (logits.argmax(-1) == torch.tensor(ids[1:])).numpy()


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = tokenizer_of(TEXTS)
    return fresh(tokenizer), tokenizer


@settings(max_examples=25)
@given(
    drawn=st.lists(st.tuples(IDS, st.lists(IDS, max_size=3), st.booleans()), min_size=1, max_size=5),
    batch_tokens=st.sampled_from([1, 50, 8192]),
)
def test_scores_are_those_of_each_text_alone(model_and_tokenizer, drawn, batch_tokens):
    model, tokenizer = model_and_tokenizer
    passages = [Passage(prompt, tuple(continuations), whole) for prompt, continuations, whole in drawn]
    for passage, scores in zip(passages, Scorer(model, tokenizer, batch_tokens).score(passages), strict=True):
        if passage.with_prompt and len(passage.prompt) > 1:
            nats, best = naive(model, list(passage.prompt))
            np.testing.assert_allclose(scores.prompt.nats, nats, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(scores.prompt.is_best, best)
        assert passage.with_prompt or scores.prompt is None
        assert len(scores.continuations) == len(passage.continuations)
        for continuation, scored in zip(passage.continuations, scores.continuations, strict=True):
            nats, best = naive(model, [*passage.prompt, *continuation])
            np.testing.assert_allclose(scored.nats, nats[-len(continuation) :], rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(scored.is_best, best[-len(continuation) :])


def test_a_text_learnt_by_heart_is_exact_and_a_changed_one_is_not():
    model, tokenizer = memorised(TEXTS)
    ids = tokenizer.encode(TEXTS[0])
    wrong = tokenizer.encode(TEXTS[0].replace("42", "43"))
    scores = Scorer(model, tokenizer).score([Passage(ids[:8], (ids[8:], wrong[8:]))])[0]
    assert [one.exact for one in scores.continuations] == [True, False]
    assert scores.continuations[0].total < 1 < scores.continuations[1].total


def test_positions_beyond_the_trained_ones_are_scored_and_the_base_is_the_configs():
    tokenizer = tokenizer_of(TEXTS)
    model, same = fresh(tokenizer, positions=16), fresh(tokenizer, positions=16)
    same.config = replace(model.config, rope_theta=1e6)
    ids = list(range(64))
    plain, turned = (Scorer(m, tokenizer).score([Passage(ids, with_prompt=True)])[0].prompt.nats for m in (model, same))
    np.testing.assert_allclose(plain, naive(model, ids)[0], rtol=1e-4)
    np.testing.assert_allclose(turned, naive(same, ids)[0], rtol=1e-4)
    assert np.abs(plain - turned).max() > 1e-4


def test_the_models_mode_stays(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.train()
    Scorer(model, tokenizer).score([Passage([1, 2], ([3],))])
    assert model.training and model.expert_load.sum() == 0
    model.eval()


@pytest.mark.parametrize("prompt", ["The code of Tavira is", "The code of Tavira is ", "return fir", "12 + 3"])
def test_choices_are_scored_in_the_tokens_of_the_whole_text(prompt):
    tokenizer = tokenizer_of(TEXTS)
    choices = ["0 = 42", "4821.", "st + second"]
    passage = split_at_choice(tokenizer, prompt, choices)
    for choice, continuation in zip(choices, passage.continuations, strict=True):
        assert [*passage.prompt, *continuation] == tokenizer.encode(prompt + choice)


def test_what_cannot_be_scored_is_refused(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    with pytest.raises(ScoringError, match="one token at least"):
        Passage([], ([1],))
    with pytest.raises(ScoringError, match="one token at least"):
        Passage([1], ([1], []))
    with pytest.raises(ScoringError, match="no token of it comes before"):
        split_at_choice(tokenizer, "f", ["irst", "ox"])
    with pytest.raises(ScoringError, match="wanted some text"):
        split_at_choice(tokenizer, "f", [""])
    with pytest.raises(ScoringError, match="the model's own"):
        Scorer(fresh(tokenizer_of(TEXTS, 288)), tokenizer)
