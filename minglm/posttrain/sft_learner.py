"""Fine-tuning's loss: the trainer's, and how a thinking begins that the prompt has opened."""

from pathlib import Path
from typing import NamedTuple, Self

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minglm import ops
from minglm.config import GLMConfig
from minglm.data.packing import IGNORED
from minglm.data.stream import Batch
from minglm.model import Loss, LossTotals
from minglm.tokenizer import Tokenizer
from minglm.train.device import Device
from minglm.train.learner import Learner
from minglm.train.recipe import Recipe


class ThinkingMarks(NamedTuple):
    """The ids of `<think>` and `</think>`."""

    opens: int
    closes: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        return cls(tokenizer.special_ids["<think>"], tokenizer.special_ids["</think>"])

    def forced(self, input_ids: Tensor, labels: Tensor, document_ids: Tensor) -> Tensor:
        """(b, t) bool: where the token after a `<think>` is nothing to learn by itself, and begins a thinking: what a prompt
        has opened (`minglm.chat.render_tokens`). Arguments as those of `GLM.loss`."""
        found = (input_ids == self.opens) & (labels == IGNORED)
        goes_on = (document_ids[:, 1:] == document_ids[:, :-1]) & (input_ids[:, 1:] != self.closes)
        found[:, :-1] &= goes_on
        found[:, -1] = False  # what comes next is not in the row
        return found


class SFTLearner(Learner):
    """A `Learner` of conversations. The first token of a thinking that the prompt has opened is learnt as one of those that the
    sampler draws there, `</think>` left out: loss -log(p / (1 - p of `</think>`)), whose gradient does not touch whether the
    model would think. That is learnt in the same place from samples of the automatic mode, where nothing was opened."""

    def __init__(self, marks: ThinkingMarks, recipe: Recipe, config: GLMConfig, device: Device, checkpoint: Path | None = None):
        self.marks = marks
        super().__init__(recipe, config, device, checkpoint)

    def loss(self, batch: Batch, totals: LossTotals) -> Loss:
        ids, labels, stage, head = batch.input_ids, batch.labels, self.stage, self.model.lm_head.weight
        hidden, mtp, balance = self.model.hidden_and_side_losses(ids, labels, batch.document_ids, totals)
        lm = ops.linear_cross_entropy(rearrange(hidden, "b t h -> (b t) h"), head, rearrange(labels, "b t -> (b t)"))
        forced = self.marks.forced(ids, labels, batch.document_ids)
        if forced.any():
            logits = F.linear(hidden[forced], head).float()
            logits[:, self.marks.closes] = float("-inf")
            lm = lm + F.cross_entropy(logits, ids.roll(-1, 1)[forced], reduction="sum")
        lm = lm / totals.lm.clamp(min=1)
        return Loss(lm + stage.mtp_weight * mtp + stage.balance_weight * balance, lm, mtp, balance)
