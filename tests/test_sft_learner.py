"""How a thinking begins that the prompt has opened: learnt, but for whether it begins at all."""

import functools
import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import MODEL

from minglm.data.packing import IGNORED
from minglm.data.stream import Batch
from minglm.posttrain.recipe import Conversations, SFTRecipe
from minglm.posttrain.sft_learner import SFTLearner, ThinkingMarks
from minglm.train.device import choose_device
from minglm.train.recipe import Hardware, Training

LAW = settings(max_examples=30, derandomize=True, deadline=None)
MARKS = ThinkingMarks(opens=5, closes=6)


@functools.cache
def learner() -> SFTLearner:
    training = Training(sequence_length=12, sequences_per_step=1, sequences_per_micro_batch=1, steps=1)
    recipe = SFTRecipe(
        conversations=Conversations(1, families=("weekdays",)), training=training, hardware=Hardware(device="cpu")
    )
    return SFTLearner(MARKS, recipe.as_training(MODEL), MODEL, choose_device(recipe.hardware))


def naive(ids: list[int], labels: list[int], documents: list[int]) -> float:
    """The sum, token by token."""
    with torch.no_grad():
        logits = learner().model(torch.tensor([ids]), document_ids=torch.tensor([documents])).logits[0]
    log_probs, total = logits.double().log_softmax(-1), 0.0
    for t, (id, label) in enumerate(zip(ids, labels, strict=True)):
        if label != IGNORED:
            total -= log_probs[t, label].item()
        elif id == MARKS.opens and t + 1 < len(ids) and documents[t + 1] == documents[t] and ids[t + 1] != MARKS.closes:
            total -= log_probs[t, ids[t + 1]].item() - math.log1p(-log_probs[t, MARKS.closes].exp().item())
    return total


tokens = st.lists(st.tuples(st.integers(4, 7), st.booleans(), st.sampled_from([0, 0, 1])), min_size=2, max_size=12)


@LAW
@given(tokens)
def test_an_opened_thinking_is_learnt_as_one_that_is_not_closed_at_once(drawn):
    ids, learnt, ends = map(list, zip(*drawn, strict=True))
    documents = [sum(ends[: t + 1]) for t in range(len(ids))]
    labels = [
        ids[t + 1] if t + 1 < len(ids) and learnt[t] and documents[t + 1] == documents[t] else IGNORED for t in range(len(ids))
    ]
    batch = Batch(torch.tensor([ids]), torch.tensor([labels]), torch.tensor([documents], dtype=torch.int32))
    totals = learner().model.count_targets(batch.labels, batch.document_ids)
    found = learner().loss(batch, totals)
    counted = max(1, sum(label != IGNORED for label in labels))
    torch.testing.assert_close(found.lm.item(), naive(ids, labels, documents) / counted, rtol=1e-4, atol=1e-5)
    plain = learner().model.loss(batch.input_ids, batch.labels, batch.document_ids, balance_weight=0.0)
    assert found.mtp == plain.mtp and found.balance == plain.balance


def test_whether_the_model_would_think_is_not_touched():
    """All other logits of the place have a gradient, that of the mark which would close the thinking has none."""
    model = learner().model
    ids = torch.tensor([[4, 5, 7, 8]])
    labels = torch.full_like(ids, IGNORED)
    model.zero_grad()
    batch = Batch(ids, labels, torch.zeros_like(ids, dtype=torch.int32))
    learner().loss(batch, model.count_targets(labels, batch.document_ids)).lm.backward()
    gradient = model.lm_head.weight.grad
    assert gradient[MARKS.closes].abs().sum() == 0
    others = [id for id in range(MODEL.vocab_size) if id != MARKS.closes]
    assert (gradient[others].abs().sum(1) > 0).all()
    model.zero_grad()
