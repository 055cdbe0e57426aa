"""What learns from preferences: a reward model (Bradley-Terry), or the policy itself (DPO).

A batch holds pairs as `PackedConversations` with together = 2 packs them: a row's documents 0, 2, ... are chosen, 1, 3, ...
rejected.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from minglm import ops
from minglm.checkpoint import load_model
from minglm.config import GLMConfig
from minglm.data.packing import IGNORED
from minglm.data.stream import Batch
from minglm.model import GLM, LossTotals
from minglm.posttrain.bradley_terry import bradley_terry_loss
from minglm.posttrain.dpo import dpo_loss
from minglm.posttrain.recipe import RewardRecipe
from minglm.posttrain.reward_model import RewardModel, ends
from minglm.train.device import Device
from minglm.train.learner import Learner
from minglm.train.prefetch import to_device
from minglm.train.recipe import Recipe


class PairLoss(NamedTuple):
    """Of a batch. preference: the mean over its pairs; margins (pairs,): the log-odds that the chosen answer is preferred; mtp
    and balance: over the whole step's totals."""

    preference: Tensor
    margins: Tensor
    mtp: Tensor
    balance: Tensor


class PairLearner(Learner, ABC):
    """A `Learner` on pairs; `loss` says by which objective."""

    numbers = ("loss", "preference_loss", "mtp_loss", "balance_loss", "accuracy", "gradient_norm")

    @abstractmethod
    def loss(self, batch: Batch, totals: LossTotals | None = None) -> PairLoss:
        """Of a batch; totals: what the whole step counts, by default what the batch does."""

    def step(self, batches: Sequence[Batch], learning_rate_factor: float) -> Tensor:
        """As `Learner.step`; the preference loss is the mean over all pairs of the step."""
        stage = self.stage
        counts = [torch.stack([*self.count_targets(batch), ends(batch.document_ids).sum() // 2]) for batch in batches]
        *totals, pairs = self.sum_over_ranks(torch.stack(counts).sum(0))
        numbers = torch.zeros(5, device=self.device.torch_device)
        for batch in batches:
            with self.device.autocast():
                found = self.loss(batch, LossTotals(*totals))
                share = len(found.margins) / pairs
                preference = share * found.preference
                total = preference + stage.mtp_weight * found.mtp + stage.balance_weight * found.balance
            total.backward()
            accuracy = share * right(found.margins).mean()
            numbers += torch.stack([total, preference, found.mtp, found.balance, accuracy]).detach()
        return self._finish_step(numbers, learning_rate_factor)

    def count_targets(self, batch: Batch) -> LossTotals:
        return self.model.count_targets(_chosen_labels(batch), batch.document_ids)

    @torch.no_grad()
    def margins(self, batches: Sequence[Batch]) -> Tensor:
        """Of all pairs, row by row, fp32 (pairs,) on the CPU."""
        self.model.eval()
        with self.device.autocast():
            device = self.device.torch_device
            found = torch.cat([self.loss(to_device(batch, device)).margins for batch in batches]).float().cpu()
        self.model.train()
        return found


class BradleyTerryLearner(PairLearner):
    """Trains a reward model. `checkpoint` is a reward model's, or None to begin upon the base."""

    def __init__(
        self, center_weight: float, base: Path, recipe: Recipe, config: GLMConfig, device: Device, checkpoint: Path | None
    ):
        self._center_weight, self._base = center_weight, base
        super().__init__(recipe, config, device, checkpoint)

    def loss(self, batch: Batch, totals: LossTotals | None = None) -> PairLoss:
        hidden, mtp, balance = self.model.hidden_and_side_losses(
            batch.input_ids, _chosen_labels(batch), batch.document_ids, totals
        )
        scores = self.model.scores_of(hidden, batch.document_ids)
        found = bradley_terry_loss(*rearrange(scores, "(pairs two) -> two pairs", two=2), self._center_weight)
        return PairLoss(*found, mtp, balance)

    def _make_model(self, config: GLMConfig, checkpoint: Path | None) -> RewardModel:
        device = self.device.torch_device
        if checkpoint is None:
            return RewardModel.upon(load_model(self._base, device=device))
        return load_model(checkpoint, device=device, make=RewardModel)


class DPOLearner(PairLearner):
    """Trains a policy from `base`, which is also the reference. Its MTP layer learns the chosen answers beside it, with the
    trunk detached, so that it goes on drafting for this policy."""

    def __init__(self, beta: float, base: Path, recipe: Recipe, config: GLMConfig, device: Device, checkpoint: Path | None):
        super().__init__(recipe, config, device, checkpoint or base)
        self._beta = beta
        self.reference = load_model(base, device=device.torch_device).requires_grad_(False).eval()

    def loss(self, batch: Batch, totals: LossTotals | None = None) -> PairLoss:
        hidden, mtp, balance = self.model.hidden_and_side_losses(
            batch.input_ids, _chosen_labels(batch), batch.document_ids, totals, detach_trunk=True
        )
        with torch.no_grad():
            known = self.reference.hidden_and_experts(batch.input_ids, batch.document_ids)[0]
            reference = response_log_probs(self.reference, known, batch)
        policy = response_log_probs(self.model, hidden, batch)
        found = dpo_loss(
            *rearrange(torch.stack([policy, reference]), "who (pairs two) -> (who two) pairs", two=2), beta=self._beta
        )
        return PairLoss(*found, mtp, balance)


def response_log_probs(model: GLM, hidden: Tensor, batch: Batch) -> Tensor:
    """log p of each document's answer, summed over the assistant's tokens: fp32 (documents,), row by row.

    hidden: the model's states after the final norm, (b, t, h).
    """
    learnt, last = batch.labels != IGNORED, ends(batch.document_ids)
    log_probs = ops.token_log_probs(hidden[learnt], model.lm_head.weight, batch.labels[learnt])
    before = last.flatten().cumsum(0) - last.flatten().long()  # documents that have ended before a token
    sums = torch.zeros(int(last.sum()), device=log_probs.device, dtype=log_probs.dtype)
    return sums.index_add(0, before[learnt.flatten()], log_probs)


def right(margins: Tensor) -> Tensor:
    """1 where the chosen answer is preferred, 0.5 where neither is: fp32, of the same shape."""
    return (margins > 0).float() + (margins == 0).float() / 2


def learner_of(recipe: RewardRecipe):
    """What the trainer makes of (training recipe, config, device, checkpoint), by the objective."""

    def make(training: Recipe, config: GLMConfig, device: Device, checkpoint: Path | None) -> PairLearner:
        if recipe.objective == "dpo":
            return DPOLearner(recipe.beta, recipe.base, training, config, device, checkpoint)
        return BradleyTerryLearner(recipe.center_weight, recipe.base, training, config, device, checkpoint)

    return make


def _chosen_labels(batch: Batch) -> Tensor:
    """What the MTP layer learns: of the chosen answers, whose documents have even numbers."""
    return batch.labels.masked_fill(batch.document_ids % 2 == 1, IGNORED)
