"""How well a model predicts text that it has never seen, in a unit that does not depend on the tokenizer."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minglm.data.stream import IGNORED, PADDING, Batch
from minglm.model import GLM
from minglm.train.device import Device
from minglm.train.prefetch import to_device


class HeldOutError(ValueError):
    """Held-out documents that cannot be used."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Means over held-out tokens that stand for text: special tokens are neither predicted nor counted, unless asked for."""

    loss: float  # nats per token
    mtp_loss: float | None  # nats per token, of the MTP layer; None if it predicted nothing
    bits_per_byte: float  # of UTF-8 text


def share_of_rank(batches: Sequence[Batch], rank: int, ranks: int) -> list[Batch]:
    """Every `ranks`-th batch; some shares end with padding, for all ranks go through a spread model equally often."""
    share = list(batches[rank::ranks])
    if len(share) < -(-len(batches) // ranks):
        like = batches[0]
        labels, documents = torch.full_like(like.labels, IGNORED), torch.full_like(like.document_ids, PADDING)
        share.append(Batch(like.input_ids, labels, documents))
    return share


@torch.no_grad()
def evaluate_held_out(
    model: GLM,
    batches: Iterable[Batch],
    byte_lengths: Tensor,
    device: Device,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    counts_specials: bool = False,
) -> HeldOutLoss:
    """byte_lengths (vocabulary,) int: bytes of text that each id stands for, 0 for special tokens, on the device.

    bits per byte = summed nats / ln 2 / bytes of the predicted tokens, over all ranks' batches. counts_specials: predict
    special tokens, too: in conversations they say where thinking and turns end. The model's mode and expert
    counts stay. Raises HeldOutError if no token stands for text.
    """
    sums = torch.zeros(5, dtype=torch.float64)  # nats and tokens of the head, of the MTP layer, and bytes
    was_training = model.training
    model.eval()  # in training mode the model would count these tokens as expert load
    for batch in batches:
        batch = to_device(batch, device.torch_device)
        lengths = byte_lengths[batch.labels.clamp(min=0)]
        is_text = (batch.labels != IGNORED) & (lengths > 0)
        labels = batch.labels if counts_specials else batch.labels.masked_fill(~is_text, IGNORED)
        counts = model.count_targets(labels, batch.document_ids)
        with device.autocast():
            loss = model.loss(batch.input_ids, labels, batch.document_ids)
        lm, mtp, lm_tokens, mtp_tokens = (x.item() for x in (loss.lm, loss.mtp, counts.lm, counts.mtp))
        num_bytes = lengths[is_text].sum().item()
        sums += torch.tensor([lm * lm_tokens, lm_tokens, mtp * mtp_tokens, mtp_tokens, num_bytes], dtype=torch.float64)
    model.train(was_training)
    nats, tokens, mtp_nats, mtp_tokens, num_bytes = sum_over_ranks(sums).tolist()
    if not num_bytes:
        raise HeldOutError("the held-out tokens hold no text to predict; give more of them, or longer documents")
    return HeldOutLoss(
        loss=nats / tokens,
        mtp_loss=mtp_nats / mtp_tokens if mtp_tokens else None,
        bits_per_byte=nats / math.log(2) / num_bytes,
    )
