"""Writing text: token after token, each drawn from the model's distribution, with a KV cache."""

from collections.abc import Collection

import torch
from torch import Tensor

from minglm.model import GLM, KVCache


@torch.no_grad()
def generate(
    model: GLM,
    ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Continue a batch of prompts of equal length: ids (b, t) int64, t >= 1 -> the new ids of each sequence.

    Args:
        max_new_tokens: no sequence gets more.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: only the k likeliest tokens are drawn.
        top_p: only the likeliest tokens that together have this probability are drawn, at least one.
        stop_ids: a sequence ends before the first of these, which is not returned.
        vocab_size: ids from here on are never drawn: a model's tables may have more rows than its tokenizer has ids.
        generator: decides the draws, on the model's device; by default torch's own.

    Raises ValueError for an argument out of its range.
    """
    _check(ids, max_new_tokens, temperature, top_k, top_p)
    b, t = ids.shape
    dtype = model.lm_head.weight.dtype
    cache = KVCache(model.config, b, t + max_new_tokens, device=ids.device, dtype=dtype)
    written: list[list[int]] = [[] for _ in range(b)]
    going = set(range(b))
    for _ in range(max_new_tokens):
        logits = model(ids, cache=cache).logits[:, -1, :vocab_size]
        ids = draw(logits, temperature, top_k, top_p, generator)  # (b, 1): the only tokens that are not in the cache
        for sequence, id in enumerate(ids[:, 0].tolist()):
            if id in stop_ids:
                going.discard(sequence)
            elif sequence in going:
                written[sequence].append(id)
        if not going:
            break
    return written


def draw(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row: logits (b, v) -> (b, 1) int64. Arguments as in `generate`; computed in fp32."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        probability = ordered.softmax(-1)
        likelier = probability.cumsum(-1) - probability  # of all tokens before this one: 0 for the first, which stays
        is_tail = torch.empty_like(order, dtype=torch.bool).scatter(1, order, likelier >= top_p)
        logits = logits.masked_fill(is_tail, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def _check(ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> None:
    wanted = {
        f"ids of shape {tuple(ids.shape)}: wanted (batch, tokens) with one token at least": ids.ndim == 2 and ids.numel(),
        f"max_new_tokens = {max_new_tokens}: wanted 0 or more": max_new_tokens >= 0,
        f"temperature = {temperature}: wanted 0 or more": temperature >= 0,
        f"top_k = {top_k}: wanted 1 or more, or None": top_k is None or top_k >= 1,
        f"top_p = {top_p}: wanted above 0, up to 1": 0 < top_p <= 1,
    }
    for complaint, holds in wanted.items():
        if not holds:
            raise ValueError(complaint)
