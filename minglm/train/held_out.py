"""How well a model predicts text that it has never seen, in a unit that does not depend on the tokenizer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from minglm.data.stream import IGNORED, Batch
from minglm.model import GLM
from minglm.train.device import Device
from minglm.train.prefetch import to_device


class HeldOutError(ValueError):
    """Held-out documents that cannot be used."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Means over held-out tokens that stand for text: special tokens are neither predicted nor counted."""

    loss: float  # nats per token
    mtp_loss: float | None  # nats per token, of the MTP layer; None if it predicted nothing
    bits_per_byte: float  # of UTF-8 text


@torch.no_grad()
def evaluate_held_out(model: GLM, batches: Iterable[Batch], byte_lengths: Tensor, device: Device) -> HeldOutLoss:
    """byte_lengths (vocabulary,) int: bytes of text that each id stands for, 0 for special tokens, on the device.

    bits per byte = summed nats / ln 2 / bytes of the predicted tokens. The model's mode and expert counts stay. Raises
    HeldOutError if no token stands for text.
    """
    nats = mtp_nats = 0.0
    tokens = mtp_tokens = num_bytes = 0
    was_training = model.training
    model.eval()  # in training mode the model would count these tokens as expert load
    for batch in batches:
        batch = to_device(batch, device.torch_device)
        lengths = byte_lengths[batch.labels.clamp(min=0)]
        is_text = (batch.labels != IGNORED) & (lengths > 0)
        labels = batch.labels.masked_fill(~is_text, IGNORED)
        counts = model.count_targets(labels, batch.document_ids)
        with device.autocast():
            loss = model.loss(batch.input_ids, labels, batch.document_ids)
        nats += loss.lm.item() * counts.lm.item()
        mtp_nats += loss.mtp.item() * counts.mtp.item()
        tokens += counts.lm.item()
        mtp_tokens += counts.mtp.item()
        num_bytes += lengths[is_text].sum().item()
    model.train(was_training)
    if not num_bytes:
        raise HeldOutError("the held-out tokens hold no text to predict; give more of them, or longer documents")
    return HeldOutLoss(
        loss=nats / tokens,
        mtp_loss=mtp_nats / mtp_tokens if mtp_tokens else None,
        bits_per_byte=nats / math.log(2) / num_bytes,
    )
