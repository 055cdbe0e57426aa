"""LoRA (arXiv 2106.09685): W becomes W + alpha / rank * B A, and only the two thin matrices A and B are learnt.

On the projections of attention, and on the stacks of routed experts, where each expert has an A and a B of its own; the MTP
layer's are among them. B starts at zero, so that a model with fresh adapters is to the bit the model without. The weights are
put together before each use, so every gear works on them as they are; what is saved is gradients' and optimiser's memory.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from minglm.checkpoint import load_model, save_model
from minglm.config import GLMConfig
from minglm.model import GLM, Attention, Experts
from minglm.posttrain.recipe import LoRA
from minglm.posttrain.sft_learner import SFTLearner, ThinkingMarks
from minglm.train.device import Device
from minglm.train.recipe import Recipe


class LowRank(nn.Module):
    """W (..., out, in) -> W + scale * b @ a, with a (..., rank, in) and b (..., out, rank)."""

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator):
        super().__init__()
        *stack, rows, cols = weight.shape
        a = torch.randn(*stack, rank, cols, generator=generator) / cols**0.5
        self.a = nn.Parameter(a.to(weight.device, weight.dtype))
        self.b = nn.Parameter(weight.new_zeros(*stack, rows, rank))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a)


def add_lora(model: GLM, lora: LoRA, seed: int = 0) -> None:
    """Freeze all weights of `model` and give it adapters, in place. Raises ValueError if it has some already."""
    if adapters(model):
        raise ValueError("the model has adapters already; merge them first")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for module, name in _adapted(model):
        low_rank = LowRank(getattr(module, name), lora.rank, lora.alpha / lora.rank, generator)
        parametrize.register_parametrization(module, name, low_rank)


def adapters(model: GLM) -> dict[str, Tensor]:
    """The learnt matrices by name, as they are in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith((".0.a", ".0.b"))}


@torch.no_grad()
def merge(model: GLM) -> GLM:
    """An ordinary model with the adapters' products added into its weights. Weights without adapters are the same memory.

    (PyTorch's `remove_parametrizations` on a deep copy would take the weights from the original, too: they share a class.)
    """
    with torch.device("meta"):
        merged = GLM(model.config)
    weights = {}
    for name in merged.state_dict():
        path, _, leaf = name.rpartition(".")
        weights[name] = getattr(model.get_submodule(path), leaf).detach()
    merged.load_state_dict(weights, assign=True)
    merged.tie_weights()
    merged.expert_load = torch.zeros_like(model.expert_load)
    return merged.train(model.training)


def _adapted(model: GLM) -> list[tuple[nn.Module, str]]:
    found: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if isinstance(module, Attention):
            found += [(projection, "weight") for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj)]
        elif isinstance(module, Experts):
            found += [(module, "gate_up_proj"), (module, "down_proj")]
    return found


class LoRALearner(SFTLearner):
    """Learns adapters on `base`. Checkpoints hold the merged model, and the adapters in the trainer's state."""

    def __init__(
        self,
        lora: LoRA,
        base: Path,
        marks: ThinkingMarks,
        recipe: Recipe,
        config: GLMConfig,
        device: Device,
        checkpoint: Path | None = None,
    ):
        self._lora, self._base = lora, base
        super().__init__(marks, recipe, config, device, checkpoint)

    def save(self, folder: Path) -> dict[str, Any]:
        save_model(merge(self.model), folder)
        return {"optimizer": self.optimizer.state_dict(), "adapters": adapters(self.model)}

    @torch.no_grad()
    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        super().load(checkpoint, state)
        for name, values in adapters(self.model).items():
            values.copy_(state["adapters"][name])

    def _make_model(self, config: GLMConfig, checkpoint: Path | None) -> GLM:
        model = load_model(self._base, device=self.device.torch_device)
        add_lora(model, self._lora, self.recipe.seed)
        return model
