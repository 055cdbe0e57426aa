"""What learns: a model and its optimiser, and the step that trains them on some micro-batches.

`Learner` is one process with the whole model. `scale/` derives one whose model and optimiser are spread over many
processes: the step is the same, and where it needs a number of all of them it asks `sum_over_ranks`.
"""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor, nn

from minglm.checkpoint import load_model, save_model
from minglm.config import GLMConfig
from minglm.data.stream import Batch
from minglm.files import write_folder_atomically
from minglm.model import GLM, DecoderLayer, Loss, LossTotals
from minglm.optim import MuonAdamW, build_optimizer
from minglm.train.device import Device
from minglm.train.recipe import Recipe
from minglm.train.stages import PlannedStage


def update(optimizer: MuonAdamW, learning_rate_factor: float) -> None:
    """One step of the optimiser at this part of its peak rates; the gradients are gone after it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_factor * group["initial_lr"]
    optimizer.step()
    optimizer.zero_grad()


class Learner:
    """A model, its optimiser, and the step that trains both."""

    rank, ranks = 0, 1  # this process, and how many take a step together, each with its own sequences
    numbers = ("loss", "lm_loss", "mtp_loss", "balance_loss", "gradient_norm")  # that a step returns first, by name

    def __init__(self, recipe: Recipe, config: GLMConfig, device: Device, checkpoint: Path | None = None):
        """The model of `config` with weights drawn from the recipe's seed, or those of `checkpoint`.

        The optimiser starts afresh: `load` brings it to where the checkpoint was.
        """
        self.recipe, self.device = recipe, device
        self.stage = recipe.plan().stages[0]
        torch.manual_seed(recipe.seed)
        self.model = self._make_model(config, checkpoint).train()
        self.model.activation_checkpointing = recipe.hardware.activation_checkpointing
        self.optimizer = self._make_optimizer()
        self.expert_load: Tensor | None = None  # of the last step, (MoE layers, E) int64
        if recipe.hardware.compile:
            for module in self.model.modules():
                if isinstance(module, DecoderLayer):
                    module.compile()

    def enter(self, stage: PlannedStage) -> None:
        """Take what follows by the stage's weights and rates, with its RoPE base; checkpoints carry the base."""
        self.stage = stage
        self.model.config = dataclasses.replace(self.model.config, rope_theta=stage.rope_theta)

    def step(self, batches: Sequence[Batch], learning_rate_factor: float) -> Tensor:
        """One optimiser step on this rank's micro-batches; nothing in it makes the host wait for the device.

        learning_rate_factor: the part of the peak rate to use. Returns fp32 numbers on the device, of all ranks together:
        `numbers` (the norm is that before clipping), and the maximal violation of each MoE layer.
        """
        # Each micro-batch is divided by what the whole step holds, so that together they are exactly one big batch.
        counts = [self.model.count_targets(batch.labels, batch.document_ids) for batch in batches]
        totals = self.sum_over_ranks(torch.stack([torch.stack(count) for count in counts]).sum(0))
        losses = torch.zeros(4, device=self.device.torch_device)
        for batch in batches:
            with self.device.autocast():
                loss = self.loss(batch, LossTotals(*totals))
            loss.total.backward()
            losses += torch.stack(loss).detach()
        return self._finish_step(losses, learning_rate_factor)

    def loss(self, batch: Batch, totals: LossTotals) -> Loss:
        """A micro-batch's part of the step's losses; totals: the denominators."""
        weights = {"mtp_weight": self.stage.mtp_weight, "balance_weight": self.stage.balance_weight}
        return self.model.loss(batch.input_ids, batch.labels, batch.document_ids, totals=totals, **weights)

    def _finish_step(self, losses: Tensor, learning_rate_factor: float) -> Tensor:
        """With all gradients there: clip, update, balance the experts. losses: this rank's parts. -> what `step` returns."""
        gradient_norm = self._clip_gradients(self.recipe.optimizer.clip_norm or math.inf)
        update(self.optimizer, learning_rate_factor)
        self.model.expert_load.copy_(self.sum_over_ranks(self.model.expert_load))
        self.expert_load = self.model.expert_load.clone()
        max_violation = self.model.update_router_bias(self.stage.router_bias_rate)
        return torch.cat([self.sum_over_ranks(losses), gradient_norm[None], max_violation])

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of this tensor over all ranks that take the step together."""
        return tensor

    def agree(self, signal: Signals | None) -> Signals | None:
        """A signal that any rank has received, so that all stop after the same step."""
        return signal

    def bad_weights(self) -> list[str]:
        """The names of the parameters that are not finite."""
        return [name for name, parameter in self.model.named_parameters() if not parameter.isfinite().all()]

    def writing(self, folder: Path) -> AbstractContextManager[Path]:
        """A folder to write into, which becomes `folder` when the block ends: `minglm.files.write_folder_atomically`."""
        return write_folder_atomically(folder)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the model into a folder that is being written; return what else must be kept, for the trainer's state."""
        save_model(self.model, folder)
        return {"optimizer": self.optimizer.state_dict()}

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Go on from a checkpoint and the state that has been read from it."""
        self.optimizer.load_state_dict(state["optimizer"])

    def _make_model(self, config: GLMConfig, checkpoint: Path | None) -> GLM:
        if checkpoint is not None:
            return load_model(checkpoint, device=self.device.torch_device)
        with torch.device("meta"):  # PyTorch's modules would draw values of their own, for nothing
            model = GLM(config)
        model.to_empty(device=self.device.torch_device)
        model.tie_weights()
        model.initialize()
        return model

    def _make_optimizer(self) -> MuonAdamW:
        return build_optimizer(self.model, **self._optimizer_settings())

    def _optimizer_settings(self) -> dict[str, Any]:
        recipe = self.recipe.optimizer
        settings = {key: getattr(recipe, key) for key in ("kind", "momentum", "betas", "weight_decay")}
        return {"lr": recipe.learning_rate, **settings}

    def _clip_gradients(self, clip_norm: float) -> Tensor:
        """Scale all gradients so that their common norm is at most `clip_norm`; return what it was, fp32, on the device."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
