"""What learns in RL: the policy (and PPO's critic), and the step that trains it on trajectories.

Trajectories lie one a row, padded at the right, as many rows side by side as a micro-batch has room for. In the exact gear
the log-probabilities of a row are then those that the engine gave while it sampled, to the bit.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from minglm import ops
from minglm.checkpoint import load_model
from minglm.config import GLMConfig
from minglm.model import GLM, LossTotals
from minglm.optim import MuonAdamW, build_optimizer
from minglm.rl.advantages import Advantages, advantages
from minglm.rl.algorithms import Tokens, count, policy_loss, value_loss
from minglm.rl.objective import Objective
from minglm.rl.rollout import Trajectory
from minglm.train.device import Device
from minglm.train.learner import Learner, update
from minglm.train.recipe import Recipe


class Rows(NamedTuple):
    """Some trajectories as a micro-batch, all (b, t): the token at labels[i, j] was chosen behind input_ids[i, : j + 1]."""

    input_ids: Tensor  # int64, padded with 0
    labels: Tensor  # int64, -100 in the padding
    document_ids: Tensor  # int32: 0, and -1 in the padding
    sampled: Tensor  # bool: the policy chose this label
    log_probs: Tensor  # fp32, the sampler's, where sampled
    versions: Tensor  # int64, of the sampler's weights, where sampled

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory], device: torch.device) -> "Rows":
        b, t = len(trajectories), max(len(one.ids) for one in trajectories) - 1
        rows = cls(
            torch.zeros(b, t, dtype=torch.long),
            torch.full((b, t), -100),
            torch.full((b, t), -1, dtype=torch.int32),
            torch.zeros(b, t, dtype=torch.bool),
            torch.zeros(b, t),
            torch.full((b, t), -1),
        )
        for row, one in enumerate(trajectories):
            n = len(one.ids) - 1
            ids = torch.tensor(one.ids)
            rows.input_ids[row, :n], rows.labels[row, :n] = ids[:-1], ids[1:]
            rows.document_ids[row, :n] = 0
            rows.sampled[row, :n] = torch.tensor(one.sampled[1:])
            rows.log_probs[row, :n] = torch.tensor(one.log_probs[1:])
            rows.versions[row, :n] = torch.tensor(one.versions[1:])
        return cls(*(tensor.to(device) for tensor in rows))

    @property
    def sequence_ids(self) -> Tensor:
        """(b * t,): the row of each token."""
        b, t = self.labels.shape
        return torch.arange(b, device=self.labels.device).repeat_interleave(t)


class Critic(nn.Module):
    """PPO's: a model of its own, from the policy's start, with a value in place of the head (1707.06347)."""

    def __init__(self, folder: Path, device: torch.device):
        super().__init__()
        self.trunk = load_model(folder, device=device)
        self.trunk.requires_grad_(True)
        self.value = nn.Linear(self.trunk.config.hidden_size, 1, device=device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, rows: Rows) -> Tensor:
        """-> (b, t): what is expected before the label is chosen."""
        hidden, _, _ = self.trunk.hidden_and_side_losses(rows.input_ids, rows.labels, rows.document_ids, detach_trunk=True)
        return self.value(hidden)[..., 0]


class StepNumbers(NamedTuple):
    """What a step has to tell, floats: losses, gradient norm before clipping, and per token that counts: the shares clipped
    and dropped, the entropy's estimate -log pi of what was sampled, the sampler's log-probability less the trainer's as the
    largest absolute and the mean absolute gap in nats."""

    loss: float
    value_loss: float
    gradient_norm: float
    clipped: float
    dropped: float
    entropy: float
    largest_gap: float
    mean_gap: float
    informative: float


class PolicyLearner(Learner):
    """A `Learner` whose step follows an `Objective` on trajectories."""

    def __init__(
        self,
        objective: Objective,
        recipe: Recipe,
        config: GLMConfig,
        device: Device,
        base: Path,
        checkpoint: Path | None,
        tokens_at_once: int,
        passes: int,
    ):
        """base: the folder of the policy to start from, which the critic starts from and the reference stays at; checkpoint:
        of the policy to go on with, of which `load` restores the rest. tokens_at_once: of a micro-batch, padding included.
        passes: optimiser steps on the same trajectories, all of them each time."""
        super().__init__(recipe, config, device, checkpoint or base)
        self.objective, self.tokens_at_once, self.passes = objective, tokens_at_once, passes
        self.gap_by_version: dict[int, float] = {}  # of the last step: the mean gap of the tokens that a version sampled
        self.critic = self.critic_optimizer = self.reference = None
        if objective.advantage == "gae":
            self.critic = Critic(base, device.torch_device).train()
            settings = self._optimizer_settings()
            self.critic_optimizer: MuonAdamW | None = build_optimizer(self.critic, **settings)
        if objective.kl != "none":
            self.reference: GLM | None = load_model(base, device=device.torch_device).requires_grad_(False)

    def micro_batches(self, trajectories: Sequence[Trajectory]) -> Iterator[list[int]]:
        """Indices of trajectories of about equal lengths, as many as fit; one alone may be longer."""
        order = sorted(range(len(trajectories)), key=lambda i: len(trajectories[i].ids))
        chosen: list[int] = []
        for i in order:
            if chosen and (len(chosen) + 1) * len(trajectories[i].ids) > self.tokens_at_once:
                yield chosen
                chosen = []
            chosen.append(i)
        if chosen:
            yield chosen

    def log_probs(self, model: GLM, rows: Rows) -> Tensor:
        """Of the labels, (b, t) fp32; 0 where the policy did not choose."""
        hidden = model.hidden_and_side_losses(rows.input_ids, rows.labels, rows.document_ids)[0]
        return self._of_labels(model, hidden, rows)

    @staticmethod
    def _of_labels(model: GLM, hidden: Tensor, rows: Rows) -> Tensor:
        found = ops.token_log_probs(hidden[rows.sampled], model.lm_head.weight, rows.labels[rows.sampled])
        return torch.zeros(rows.labels.shape, device=found.device).masked_scatter(rows.sampled, found)

    @torch.no_grad()
    def _before(self, batches: Sequence[Rows]) -> tuple[list[Tensor], list[Tensor] | None, list[Tensor] | None]:
        """Log-probabilities under the weights that the step starts from, of the reference, and values: each (b, t)."""
        self.model.eval()
        old = [self.log_probs(self.model, rows) for rows in batches]
        self.model.train()
        reference = None if self.reference is None else [self.log_probs(self.reference, rows) for rows in batches]
        values = None if self.critic is None else [self.critic(rows) for rows in batches]
        return old, reference, values

    def policy_step(
        self, trajectories: Sequence[Trajectory], groups: Sequence[int], learning_rate_factor: float = 1.0
    ) -> StepNumbers:
        """Train on trajectories with verdicts; groups: which of them answer the same prompt; learning_rate_factor: the part of
        the peak rate to use.

        The denominators are of the whole step, so that neither packing nor micro-batches change it.
        """
        device = self.device.torch_device
        chosen = list(self.micro_batches(trajectories))
        batches = [Rows.of([trajectories[i] for i in indices], device) for indices in chosen]
        old, reference, values = self._before(batches)
        found = self._advantages(trajectories, groups, chosen, batches, old, reference, values)

        stage, numbers = self.stage, torch.zeros(4, device=device)
        total = sum(count(self.objective, mask.flatten(), r.sequence_ids) for mask, r in zip(found.mask, batches, strict=True))
        targets = [self.model.count_targets(rows.labels, rows.document_ids) for rows in batches]
        totals = LossTotals(*torch.stack([torch.stack(each) for each in targets]).sum(0))
        for _ in range(self.passes):
            for n, rows in enumerate(batches):
                tokens = Tokens(
                    found.mask[n].flatten(),
                    rows.sequence_ids,
                    old[n].flatten(),
                    rows.log_probs.flatten(),
                    None if reference is None else reference[n].flatten(),
                )
                hidden, mtp, balance = self.model.hidden_and_side_losses(
                    rows.input_ids, rows.labels, rows.document_ids, totals, detach_trunk=True
                )
                log_probs = self._of_labels(self.model, hidden, rows).flatten()
                entropies = self._entropies(hidden, rows) if self.objective.entropy_weight else None
                loss = policy_loss(self.objective, log_probs, tokens, found.tokens[n].flatten(), total, entropies)
                (loss.total + stage.mtp_weight * mtp + stage.balance_weight * balance).backward()
                critic_loss = torch.zeros_like(loss.total)
                if self.critic is not None:
                    critic_loss = value_loss(
                        self.objective,
                        self.critic(rows).flatten(),
                        values[n].flatten(),
                        found.returns[n].flatten(),
                        tokens,
                        total,
                    )
                    critic_loss.backward()
                numbers += torch.stack([loss.total, critic_loss, loss.clipped, loss.dropped]).detach()
            clip_norm = self.recipe.optimizer.clip_norm or math.inf
            norm = self._clip_gradients(clip_norm)
            update(self.optimizer, learning_rate_factor)
            if self.critic is not None:
                nn.utils.clip_grad_norm_(self.critic.parameters(), clip_norm)
                update(self.critic_optimizer, learning_rate_factor)
            self.model.update_router_bias(self.stage.router_bias_rate)
        return self._numbers(numbers / self.passes, norm, batches, old, found)

    def _advantages(self, trajectories, groups, chosen, batches, old, reference, values) -> Advantages:
        """Those of the whole step, with every tensor cut into the micro-batches again, each (b, t)."""
        device = self.device.torch_device

        def joined(tensors: Sequence[Tensor] | None) -> Tensor | None:
            return None if tensors is None else torch.cat([tensor.flatten() for tensor in tensors])

        starts = [0]
        for indices in chosen:
            starts.append(starts[-1] + len(indices))
        ids = torch.cat([rows.sequence_ids + start for rows, start in zip(batches, starts[:-1], strict=True)])
        order = [i for indices in chosen for i in indices]
        rewards = torch.tensor([trajectories[i].verdict.reward for i in order], device=device)
        # Trajectories that were cut off are not worth what the critic expects of going on: cut off is an end with reward 0.
        tokens = Tokens(
            joined([rows.sampled for rows in batches]),
            ids,
            joined(old),
            joined([r.log_probs for r in batches]),
            joined(reference),
        )
        group_ids = torch.tensor([groups[i] for i in order], device=device)
        found = advantages(self.objective, rewards, group_ids, tokens, joined(values))
        sizes = [rows.labels.numel() for rows in batches]

        def cut(tensor: Tensor | None) -> list[Tensor] | None:
            if tensor is None:
                return None
            pieces = zip(tensor.split(sizes), batches, strict=True)
            return [rearrange(piece, "(b t) -> b t", b=len(rows.labels)) for piece, rows in pieces]

        return Advantages(cut(found.tokens), cut(found.mask), found.informative, cut(found.returns))

    def _entropies(self, hidden: Tensor, rows: Rows) -> Tensor:
        """Of the distribution of each label that the policy chose, (b * t,) fp32; 0 elsewhere."""
        log_probs = self.model.lm_head(hidden[rows.sampled]).float().log_softmax(-1)
        found = -(log_probs.exp() * log_probs).sum(-1)
        return torch.zeros(rows.labels.shape, device=found.device).masked_scatter(rows.sampled, found).flatten()

    def _numbers(self, sums: Tensor, norm: Tensor, batches: Sequence[Rows], old: Sequence[Tensor], found) -> StepNumbers:
        gaps = torch.cat([(rows.log_probs - ours)[rows.sampled].abs() for rows, ours in zip(batches, old, strict=True)])
        versions = torch.cat([rows.versions[rows.sampled] for rows in batches])
        self.gap_by_version = {version: gaps[versions == version].mean().item() for version in versions.unique().tolist()}
        entropy = -torch.cat([ours[rows.sampled] for rows, ours in zip(batches, old, strict=True)]).mean()
        loss, critic_loss, clipped, dropped = sums.tolist()
        return StepNumbers(
            loss,
            critic_loss,
            norm.item(),
            clipped,
            dropped,
            entropy.item(),
            gaps.max().item(),
            gaps.mean().item(),
            found.informative.float().mean().item(),
        )

    def save(self, folder: Path) -> dict[str, Any]:
        state = super().save(folder)
        if self.critic is not None:
            state["critic"] = {"model": self.critic.state_dict(), "optimizer": self.critic_optimizer.state_dict()}
        return state

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        super().load(checkpoint, state)
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"]["model"])
            self.critic_optimizer.load_state_dict(state["critic"]["optimizer"])
