"""`minglm.train.learner.Learner` on many ranks: the same step, with sums over ranks where it needs the whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import Signals
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minglm.config import GLMConfig
from minglm.files import write_folder_atomically
from minglm.model import GLM
from minglm.optim import MuonAdamW
from minglm.train.device import Device
from minglm.train.learner import Learner
from minglm.train.recipe import Recipe
from scale import checkpoint as sharded_checkpoint
from scale.mesh import Mesh, broadcast, control_group
from scale.muon import ShardedMuonAdamW
from scale.shard import build, draw_weights, local, parts


class ShardedLearner(Learner):
    """A model and its optimiser, spread over the ranks of a mesh. Every method must be called by all ranks."""

    def __init__(self, mesh: Mesh, recipe: Recipe, config: GLMConfig, device: Device, checkpoint: Path | None = None):
        """As `Learner`; weights drawn here are those that one process would draw. Raises `LayoutError` for an unfit mesh,
        and `CheckpointError` for an unfit checkpoint, before anything is allocated."""
        self.mesh = mesh
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        super().__init__(recipe, config, device, checkpoint)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor

    def agree(self, signal: Signals | None) -> Signals | None:
        highest = torch.tensor(0 if signal is None else int(signal))
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=control_group())
        return Signals(int(highest)) if highest else None

    def bad_weights(self) -> list[str]:
        bad = torch.stack([(~part.local.isfinite()).any() for part in self.parts]).long()
        found = self.sum_over_ranks(bad).tolist()
        return [part.name for part, count in zip(self.parts, found, strict=True) if count]

    @contextmanager
    def writing(self, folder: Path) -> Iterator[Path]:
        """The first rank makes the folder and gives it its name when all ranks have written; all go on together."""
        if self.rank == 0:
            with write_folder_atomically(folder) as aside:
                yield Path(broadcast(str(aside)))
                dist.barrier(group=control_group())
        else:
            yield Path(broadcast(None))
            dist.barrier(group=control_group())
        dist.barrier(group=control_group())

    def save(self, folder: Path) -> dict[str, Any]:
        sharded_checkpoint.save(folder, self.model, self.parts, self.optimizer)
        if self.rank == 0:
            self.model.config.save_pretrained(folder)
        return {}

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        sharded_checkpoint.load(checkpoint, self.model, self.parts, self.optimizer)

    def _make_model(self, config: GLMConfig, checkpoint: Path | None) -> GLM:
        if checkpoint is not None:
            sharded_checkpoint.check(checkpoint, config, self.rank, self.ranks)
        model = build(config, self.mesh, self.device.torch_device, self.device.bf16)
        self.parts = parts(model, self.mesh)
        if checkpoint is None:
            draw_weights(model, self.parts)
        return model

    def _make_optimizer(self) -> MuonAdamW:
        return ShardedMuonAdamW(self.model, self.parts, **self._optimizer_settings())

    def _clip_gradients(self, clip_norm: float) -> Tensor:
        gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.mesh.layout.shards > 1:
            squares = norm.square()
            dist.all_reduce(squares, group=self.mesh.shard_group)  # its ranks hold each number of the model once
            norm = squares.sqrt()
        # As torch.nn.utils.clip_grad_norm_ does it.
        torch._foreach_mul_(gradients, (clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm
