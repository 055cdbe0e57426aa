"""Models that have learnt a few texts by heart, in seconds, for evaluations that must tell them from fresh ones."""

from functools import cache

import torch
from by_heart import SMALL_SHAPE

from minglm.config import GLMConfig
from minglm.model import GLM
from minglm.tokenizer import Tokenizer, train_tokenizer

PATIENCE = 800  # steps


def fresh(tokenizer: Tokenizer, seed: int = 0, positions: int = 512) -> GLM:
    """A small model without training."""
    torch.manual_seed(seed)
    config = GLMConfig(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=positions, initializer_range=0.05, **SMALL_SHAPE
    )
    return GLM(config).eval()


@cache
def tokenizer_of(texts: tuple[str, ...], vocab_size: int = 512) -> Tokenizer:
    return train_tokenizer(texts, vocab_size, show_progress=False)


@cache
def memorised(texts: tuple[str, ...], vocab_size: int = 512) -> tuple[GLM, Tokenizer]:
    """The same for everybody in a process: nobody may change the weights."""
    tokenizer = tokenizer_of(texts, vocab_size)
    return learn(fresh(tokenizer), [tokenizer.encode(text) + [tokenizer.end_of_document_id] for text in texts]), tokenizer


def learn(model: GLM, documents: list[list[int]], given: list[int] | None = None) -> GLM:
    """Train on documents of ids until they are known: of each all that follows its first `given` tokens (1). What these are
    must tell the documents apart. Raises AssertionError if it takes too long."""
    longest = max(map(len, documents))
    ids = torch.zeros(len(documents), longest, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document)
        start = given[row] - 1 if given else 0
        labels[row, start : len(document) - 1] = torch.tensor(document[start + 1 :])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model.train()
    for step in range(PATIENCE):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 20)
        loss = model.loss(ids[:, :-1], labels[:, :-1], mtp_weight=0.0)
        optimizer.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.lm.item() < 0.01:
            return model.eval()
    raise AssertionError(f"the texts were not learnt in {PATIENCE} steps: loss {loss.lm.item():.3f}")
