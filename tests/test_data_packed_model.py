"""Rows of a stream through the model: documents do not see, predict or draft one another, however they are packed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_stream import DOMAINS, dataset_of

from minglm.config import GLMConfig
from minglm.data.packing import PACKINGS
from minglm.data.stream import IGNORED, PADDING, Batch, MixtureStream, held_out_batches
from minglm.model import GLM

CONFIG = GLMConfig(
    vocab_size=128,
    hidden_size=16,
    intermediate_size=24,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    max_position_embeddings=64,
    initializer_range=0.3,  # large, so that a leak would show
)


@pytest.fixture(scope="module")
def model() -> GLM:
    torch.manual_seed(0)
    return GLM(CONFIG).double().eval()


@st.composite
def batches(draw) -> Batch:
    """Two to four rows of up to 20 tokens; token ids below the vocabulary's size."""
    lengths = draw(st.lists(st.integers(1, 16), min_size=2, max_size=6))
    size = draw(st.integers(2, 20))
    lengths.append(max(1, size - sum(lengths)))
    dataset = dataset_of(lengths, [0] * len(lengths))
    dataset.manifest["tokenizer"]["end_of_document_id"] = 127
    if draw(st.booleans()):
        return next(iter(held_out_batches(dataset, size, draw(st.integers(2, 4)))))
    stream = MixtureStream(dataset, "train", size, draw(st.integers(0, 99)), {DOMAINS[0]: 1}, draw(st.sampled_from(PACKINGS)))
    return stream.batch(draw(st.integers(0, 9)), draw(st.integers(2, 4)))


def unpacked(batch: Batch) -> list[Batch]:
    """Each part of a document in a batch of its own."""
    found = []
    for row in range(len(batch.input_ids)):
        for number in batch.document_ids[row].unique().tolist():
            if number != PADDING:
                part = batch.document_ids[row] == number
                ids, labels = batch.input_ids[row, part][None], batch.labels[row, part][None]
                found.append(Batch(ids, labels, torch.zeros_like(ids, dtype=torch.int32)))
    return found


@given(batches())
@settings(max_examples=25)
def test_the_loss_of_a_packed_batch_is_the_sum_of_its_documents_losses_the_mtp_layers_too(model, batch):
    def counted(some: Batch) -> np.ndarray:
        with torch.no_grad():
            loss = model.loss(some.input_ids, some.labels, some.document_ids)
        totals = model.count_targets(some.labels, some.document_ids)
        lm, mtp = totals.lm.item(), totals.mtp.item()
        return np.array([loss.lm.item() * lm, loss.mtp.item() * mtp, lm, mtp])

    np.testing.assert_allclose(counted(batch), sum(counted(part) for part in unpacked(batch)), rtol=1e-5, atol=1e-5)


@given(batches(), st.integers(0, 10**6))
@settings(max_examples=25)
def test_no_token_attends_predicts_or_is_drafted_across_documents(model, batch, seed):
    """Other tokens in one document leave what the model says of all others as it was, and are no target of theirs."""
    rng = np.random.default_rng(seed)
    row = int(rng.integers(len(batch.input_ids)))
    changed = int(rng.choice(batch.document_ids[row].unique()))  # a document, or the padding
    inside = batch.document_ids[row] == changed
    ids = batch.input_ids.clone()
    ids[row, inside] = torch.from_numpy(rng.integers(0, CONFIG.vocab_size, int(inside.sum())))
    with torch.no_grad():
        before = model(batch.input_ids, batch.document_ids, mtp=True)
        after = model(ids, batch.document_ids, mtp=True)
    others = torch.ones_like(ids, dtype=torch.bool)
    others[row, inside] = False
    others &= batch.document_ids != PADDING
    torch.testing.assert_close(after.logits[others], before.logits[others], rtol=0, atol=1e-12)
    # The layer at t drafts token t + 2 from t + 1: it does so only where both are of one document.
    documents = batch.document_ids
    drafting = others[:, :-1] & (documents[:, :-1] == documents[:, 1:])
    torch.testing.assert_close(after.mtp_logits[drafting], before.mtp_logits[drafting], rtol=0, atol=1e-12)
    drafted = model._mtp_labels(batch.labels, documents)
    assert (drafted[documents[:, :-1] != documents[:, 1:]] == IGNORED).all()
    targets = batch.labels != IGNORED
    assert torch.equal(batch.labels[targets], batch.input_ids[targets] + 1), "the token after it in the same document"
    assert torch.equal(drafted[drafted != IGNORED], batch.input_ids[:, :-1][drafted != IGNORED] + 2)
