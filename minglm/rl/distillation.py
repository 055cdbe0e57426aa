"""On-policy distillation: the policy samples, and the teacher of each problem's family says what it would have written there.

    loss = 1/N sum_i sum_t KL(pi(. | s_it) || pi_teacher(. | s_it))

    s_it: problem i and what pi itself has sampled before token t; N = tokens of the policy's own in the whole step; both
    distributions at the temperature that was sampled at

Each token's divergence is summed over the whole vocabulary. Policy gradients with the advantage -(log pi - log pi_teacher) of
the sampled token alone (Thinking Machines, On-Policy Distillation, 2025) have the same expected gradient, for
E_pi[log(pi / pi_teacher) grad log pi] = grad KL, and more noise: the sum is their mean over all that could have been sampled.
They are for teachers behind a server, which tells no more; here the teacher is a model in this process, and its pass is paid
for in either form. In both, the gradient leaves out that another policy would meet other states (a discount of 0).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minglm.checkpoint import load_model
from minglm.config import ConfigError, GLMConfig
from minglm.model import GLM, LossTotals
from minglm.rl.learner import PolicyLearner, StepNumbers
from minglm.rl.rollout import Trajectory
from minglm.rl.rows import Rows
from minglm.train.run_folder import model_folder

FORMULA = """loss = 1/N sum_i sum_t KL(pi(. | s_it) || pi_teacher(. | s_it))
s_it: problem i and what pi has sampled before token t; the teacher is that of the problem's family
N = tokens of the whole step; only tokens of the model's own count; rewards are recorded, and not learnt from"""


def reverse_kl(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(pi || pi_teacher) of each distribution: (n, vocabulary), (n, vocabulary) -> (n,), with gradient for `logits`."""
    log_probs, teacher = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (log_probs.exp() * (log_probs - teacher)).sum(-1)


def load_teachers(teachers: Mapping[str, Path], policy: GLMConfig, device: torch.device) -> dict[str, GLM]:
    """The teacher of each family; one folder is loaded once. Raises `ConfigError` for another vocabulary than the policy's."""
    loaded: dict[Path, GLM] = {}
    for family, folder in teachers.items():
        if folder not in loaded:
            loaded[folder] = load_model(model_folder(folder), device=device).requires_grad_(False).eval()
        found = loaded[folder].config.vocab_size
        if found != policy.vocab_size:
            raise ConfigError(f"teachers.{family}: {folder} has {found} ids; wanted {policy.vocab_size}, as the policy has")
    return {family: loaded[folder] for family, folder in teachers.items()}


class DistillationLearner(PolicyLearner):
    """A `PolicyLearner` that follows teachers instead of rewards. teachers: by the problem's family."""

    def __init__(self, *arguments: Any, teachers: Mapping[str, GLM]):
        super().__init__(*arguments)
        self.teachers = teachers

    def micro_batches(self, trajectories: Sequence[Trajectory]) -> Iterator[list[int]]:
        """Those of each teacher by themselves."""
        by_teacher: dict[int, list[int]] = {}
        for number, one in enumerate(trajectories):
            by_teacher.setdefault(id(self.teachers[one.problem.family]), []).append(number)
        for numbers in by_teacher.values():
            for chosen in super().micro_batches([trajectories[number] for number in numbers]):
                yield [numbers[place] for place in chosen]

    def policy_step(
        self,
        trajectories: Sequence[Trajectory],
        groups: Sequence[int],
        learning_rate_factor: float = 1.0,
        version: int | None = None,
    ) -> StepNumbers:
        """As that of `PolicyLearner`; groups make no difference."""
        chosen, batches = self.rows_of(trajectories)
        teachers = [self.teachers[trajectories[indices[0]].problem.family] for indices in chosen]
        before = self.before(batches)
        total, totals = sum(rows.sampled.sum() for rows in batches), self.totals(batches)
        loss = torch.zeros((), device=self.device.torch_device)
        for _ in range(self.passes):
            for rows, teacher, experts in zip(batches, teachers, before.replayed, strict=True):
                loss += self.follow(rows, teacher, experts, total, totals)
            norm = self.update(learning_rate_factor)
        gaps, entropy = self.looked_at(batches, before, version)
        return StepNumbers((loss / self.passes).item(), 0.0, norm.item(), 0.0, 0.0, entropy, 1.0, gaps)

    def rehearse(self, rows: Rows) -> None:
        before, totals = self.before([rows]), self.totals([rows])
        largest = max(self.teachers.values(), key=lambda one: sum(p.numel() for p in one.parameters()))
        self.follow(rows, largest, before.replayed[0], rows.sampled.sum(), totals)

    def follow(self, rows: Rows, teacher: GLM, experts: Tensor | None, total: Tensor, totals: LossTotals) -> Tensor:
        """Add a micro-batch's gradients -> its part of the loss, 0-dimensional. experts: to be replayed; total: the tokens of
        the whole step that count."""
        own, stage = rows.sampled, self.stage
        temperatures = rows.temperatures[own][:, None]
        with torch.no_grad(), self.device.autocast():
            hidden = teacher.hidden_and_experts(rows.input_ids, rows.document_ids)[0]
            wanted = teacher.lm_head(hidden[own]).float() / temperatures
        with self.model.replaying(experts):
            with self.device.autocast():
                hidden, mtp, balance = self.model.hidden_and_side_losses(
                    rows.input_ids, rows.labels, rows.document_ids, totals, detach_trunk=True, with_mtp=stage.mtp_weight > 0
                )
                ours = self.model.lm_head(hidden[own]).float() / temperatures
            loss = reverse_kl(ours, wanted).sum() / total.clamp(min=1)
            (loss + stage.mtp_weight * mtp + stage.balance_weight * balance).backward()
        return loss.detach()
