"""What learns in RL: the policy (and PPO's critic), and the step that trains it on trajectories.

Trajectories lie one a row, padded at the right, as many rows side by side as a micro-batch has room for. In the exact gear
the log-probabilities of a row are then those that the engine gave while it sampled, to the bit.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from minglm import ops
from minglm.checkpoint import load_model
from minglm.config import GLMConfig
from minglm.model import GLM, LossTotals
from minglm.optim import MuonAdamW, build_optimizer
from minglm.rl import algorithms
from minglm.rl.advantages import Advantages, advantages
from minglm.rl.algorithms import Tokens, count, policy_loss, value_loss
from minglm.rl.critic import Critic
from minglm.rl.gaps import Gaps, measure_gaps
from minglm.rl.objective import Objective
from minglm.rl.rollout import Trajectory
from minglm.rl.rows import Rows
from minglm.train.device import Device
from minglm.train.learner import Learner, update
from minglm.train.recipe import Recipe


class Known(NamedTuple):
    """A micro-batch, and what is known of it before the step: all else (b, t), constants for the gradient."""

    rows: Rows
    experts: Tensor | None  # to be replayed, (MoE layers, b * t, K)
    old: Tensor | None  # log-probabilities under the weights that the step starts from; None: this pass is made with them
    reference: Tensor | None
    values: Tensor | None  # the critic's
    mask: Tensor  # bool: what counts
    advantages: Tensor
    returns: Tensor | None


class Before(NamedTuple):
    """What is known of the micro-batches of a step before its first update: a list each, one entry a micro-batch.

    old, reference, values: (b, t); None without a reference or critic, and of `old` where the only pass of the update is to say
    it. replayed: the experts that training replays, None for none; unreplayed: `old` if each pass routes for itself; experts:
    that the model itself chose (MoE layers, b * t, K).
    """

    old: list[Tensor | None]
    reference: list[Tensor] | None
    values: list[Tensor] | None
    replayed: list[Tensor | None]
    unreplayed: list[Tensor | None]
    experts: list[Tensor | None]


class StepNumbers(NamedTuple):
    """What a step has to tell: losses, gradient norm before clipping, and per token that counts: the shares clipped and
    dropped, the entropy's estimate -log pi of what was sampled; the share of sequences whose group says something; the gaps."""

    loss: float
    value_loss: float
    gradient_norm: float
    clipped: float
    dropped: float
    entropy: float
    informative: float
    gaps: Gaps

    def record(self) -> dict[str, Any]:
        """For metrics.jsonl, the gaps beside the others."""
        own = self._asdict()
        del own["gaps"]
        return {**own, **self.gaps._asdict()}


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
        routing_replay: Literal["none", "R2", "R3"] = "none",
    ):
        """base: the folder of the policy to start from, which the critic starts from and the reference stays at; checkpoint:
        of the policy to go on with, of which `load` restores the rest. tokens_at_once: of a micro-batch, padding included.
        passes: optimiser steps on the same trajectories, all of them each time. routing_replay: what routes tokens in training:
        each pass for itself, the pass before the first update (R2), or the sampler (R3)."""
        super().__init__(recipe, config, device, checkpoint or base)
        self.objective, self.tokens_at_once, self.passes = objective, tokens_at_once, passes
        self.routing_replay = routing_replay
        self.critic = self.critic_optimizer = self.reference = None
        if objective.advantage == "gae":
            self.critic = Critic.upon(load_model(base, device=device.torch_device)).train()
            self.critic.activation_checkpointing = recipe.hardware.activation_checkpointing
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

    def rows_of(self, trajectories: Sequence[Trajectory]) -> tuple[list[list[int]], list[Rows]]:
        """The indices of each micro-batch, and its rows on the device."""
        chosen = list(self.micro_batches(trajectories))
        return chosen, [Rows.of([trajectories[i] for i in indices], self.device.torch_device) for indices in chosen]

    def log_probs(self, model: GLM, rows: Rows) -> Tensor:
        """Of the labels, (b, t) fp32; 0 where the policy did not choose."""
        return self._of_labels(model, model.hidden_and_experts(rows.input_ids, rows.document_ids)[0], rows)

    @staticmethod
    def _of_labels(model: GLM, hidden: Tensor, rows: Rows) -> Tensor:
        """At the temperature that they were sampled at: the policy in training is the one that sampled."""
        temperatures = rows.temperatures[rows.sampled]
        found = ops.token_log_probs(hidden[rows.sampled], model.lm_head.weight, rows.labels[rows.sampled], temperatures)
        return torch.zeros(rows.labels.shape, device=found.device).masked_scatter(rows.sampled, found)

    @torch.no_grad()
    def before(self, batches: Sequence[Rows]) -> Before:
        """What the weights that the step starts from say, before the first update. Raises ValueError for R3 without experts."""
        self.model.eval()
        with self.device.autocast():
            old, experts = [], []
            for rows in batches:
                hidden, chosen = self.model.hidden_and_experts(rows.input_ids, rows.document_ids)
                old.append(self._of_labels(self.model, hidden, rows))
                experts.append(chosen)
            unreplayed, replayed = old, [None] * len(batches) if self.routing_replay == "none" else experts
            if self.routing_replay == "R3":
                replayed = [rows.experts for rows in batches]
                if any(chosen is None for chosen in replayed):
                    raise ValueError("routing_replay 'R3' found trajectories without experts; wanted rollouts that record them")
                old = []
                for rows in batches:
                    with self.model.replaying(rows.experts):
                        old.append(self.log_probs(self.model, rows))
            reference = None if self.reference is None else [self.log_probs(self.reference, rows) for rows in batches]
            values = None if self.critic is None else [self.critic.values(rows) for rows in batches]
        self.model.train()
        return Before(old, reference, values, replayed, unreplayed, experts)

    def policy_step(
        self,
        trajectories: Sequence[Trajectory],
        groups: Sequence[int],
        learning_rate_factor: float = 1.0,
        version: int | None = None,
    ) -> StepNumbers:
        """Train on trajectories with verdicts; groups: which of them answer the same prompt; learning_rate_factor: the part of
        the peak rate to use; version: of the weights that the step starts from, None for the newest that has sampled a token.

        The denominators are of the whole step, so that neither packing nor micro-batches change it.
        """
        device = self.device.torch_device
        chosen, batches = self.rows_of(trajectories)
        nothing = [None] * len(batches)
        looks_first = self._looks_first(batches)
        before = self.before(batches) if looks_first else Before(nothing, None, None, nothing, nothing, nothing)
        old, reference, values = before[:3]
        found = self._advantages(trajectories, groups, chosen, batches, old, reference, values)

        numbers = torch.zeros(4, device=device)
        known = [
            Known(*each)
            for each in zip(
                batches,
                before.replayed,
                old,
                reference or nothing,
                values or nothing,
                found.mask,
                found.tokens,
                found.returns or nothing,
                strict=True,
            )
        ]
        total = sum(count(self.objective, one.mask.flatten(), one.rows.sequence_ids) for one in known)
        totals = self.totals(batches)
        for _ in range(self.passes):
            said = []
            for one in known:
                losses, log_probs = self.backward(one, total, totals)
                numbers += losses
                said.append(log_probs)
            norm = self.update(learning_rate_factor)
        before = before if looks_first else before._replace(old=said, unreplayed=said)
        gaps, entropy = self.looked_at(batches, before, version)
        informative = found.informative.float().mean().item()
        loss, critic_loss, clipped, dropped = (numbers / self.passes).tolist()
        return StepNumbers(loss, critic_loss, norm.item(), clipped, dropped, entropy, informative, gaps)

    def _looks_first(self, batches: Sequence[Rows]) -> bool:
        """Whether something is asked of the weights that the step starts from beside what the first pass of the update says of
        them: by later passes, a critic, a reference, or those who compare routing. A quarter of the work, if not."""
        others = self.passes > 1 or self.critic is not None or self.reference is not None or self.routing_replay != "none"
        return others or any(rows.experts is not None for rows in batches)

    @staticmethod
    def looked_at(batches: Sequence[Rows], before: Before, version: int | None) -> tuple[Gaps, float]:
        """The gap between trainer and sampler, and the entropy of what was sampled: as the step has begun."""
        gaps = measure_gaps(batches, before.old, before.unreplayed, before.experts, version)
        own = [ours[rows.sampled] for rows, ours in zip(batches, before.old, strict=True)]
        return gaps, -torch.cat(own).mean().item()

    def totals(self, batches: Sequence[Rows]) -> LossTotals:
        """What the side losses divide by: the targets of the whole step."""
        targets = [self.model.count_targets(rows.labels, rows.document_ids) for rows in batches]
        return LossTotals(*torch.stack([torch.stack(each) for each in targets]).sum(0))

    def update(self, learning_rate_factor: float) -> Tensor:
        """With all gradients there, the optimisers' step -> the norm of the policy's gradient before clipping."""
        clip_norm = self.recipe.optimizer.clip_norm or math.inf
        norm = self._clip_gradients(clip_norm)
        update(self.optimizer, learning_rate_factor)
        if self.critic is not None:
            nn.utils.clip_grad_norm_(self.critic.parameters(), clip_norm)
            update(self.critic_optimizer, learning_rate_factor)
        self.model.update_router_bias(self.stage.router_bias_rate)
        return norm

    def rehearse(self, rows: Rows) -> None:
        """Go through all that a step does with a micro-batch, (b, t); its gradients mean nothing."""
        before, advantages = self.before([rows]), torch.ones(rows.labels.shape, device=rows.labels.device)
        reference, values = before.reference, before.values
        firsts = (before.replayed[0], before.old[0], reference and reference[0], values and values[0])
        known = Known(rows, *firsts, rows.sampled, advantages, torch.zeros_like(advantages))
        total = count(self.objective, rows.sampled.flatten(), rows.sequence_ids)
        self.backward(known, total, self.totals([rows]))

    def backward(self, known: Known, total: Tensor, totals: LossTotals) -> tuple[Tensor, Tensor]:
        """Add a micro-batch's gradients of all losses -> those of policy and critic, and the shares clipped and dropped, (4,)
        fp32; and what the policy says of the labels, as `log_probs` does. total, totals: what the whole step counts, for the
        policy's loss and for the side losses."""
        rows, stage = known.rows, self.stage
        with self.model.replaying(known.experts):
            with self.device.autocast():
                hidden, mtp, balance = self.model.hidden_and_side_losses(
                    rows.input_ids, rows.labels, rows.document_ids, totals, detach_trunk=True, with_mtp=stage.mtp_weight > 0
                )
                said = self._of_labels(self.model, hidden, rows)
                log_probs, old = said.flatten(), said.detach() if known.old is None else known.old
                reference = None if known.reference is None else known.reference.flatten()
                sampler = rows.log_probs.flatten()
                tokens = Tokens(known.mask.flatten(), rows.sequence_ids, old.flatten(), sampler, reference)
                entropies = self._entropies(hidden, rows) if self.objective.entropy_weight else None
                loss = policy_loss(self.objective, log_probs, tokens, known.advantages.flatten(), total, entropies)
            (loss.total + stage.mtp_weight * mtp + stage.balance_weight * balance).backward()
        critic_loss = torch.zeros_like(loss.total)
        if self.critic is not None:
            with self.device.autocast():
                values = self.critic.values(rows).flatten()
            returns = known.returns.flatten()
            critic_loss = value_loss(self.objective, values, known.values.flatten(), returns, tokens, total)
            critic_loss.backward()
        return torch.stack([loss.total, critic_loss, loss.clipped, loss.dropped]).detach(), said.detach()

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
        rewards = torch.tensor([trajectories[i].verdict.reward for i in order], dtype=torch.float32, device=device)
        # Trajectories that were cut off are not worth what the critic expects of going on: cut off is an end with reward 0.
        sampler = joined([rows.log_probs for rows in batches])
        own = sampler if old[0] is None else joined(old)  # which a KL alone asks for
        tokens = Tokens(joined([rows.sampled for rows in batches]), ids, own, sampler, joined(reference))
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
        logits = self.model.lm_head(hidden[rows.sampled]).float() / rows.temperatures[rows.sampled][:, None]
        found = algorithms.entropy(logits)
        return torch.zeros(rows.labels.shape, device=found.device).masked_scatter(rows.sampled, found).flatten()

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
