"""Sampling in FP8, emulated to the bit: the sampler's own copy of the policy, whose linear layers have gone through e4m3.

As in the report's rollouts (section 3.5) and in published FP8 checkpoints of the family: weights of linear layers, experts
among them, in blocks of 128 x 128 with a scale each; embedding, head, router, norms and biases stay as they are, by the kind
of the module and not by parts of names. The products themselves are computed in the copy's dtype: what the weights lose is
here, what 8-bit activations and caches would lose beside is not.
"""

import copy

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minglm.model import GLM, Experts, Linear

BLOCK = 128  # rows and columns that share a scale
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def through_fp8(weight: Tensor) -> Tensor:
    """weight (..., out, in), floating -> what an FP8 engine computes with, in the same shape and dtype: each block divided by
    its largest absolute value over 448, rounded to e4m3, and multiplied again. Blocks at the edges may be smaller."""
    rows, columns = weight.shape[-2:]
    whole = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = rearrange(whole, "... (r a) (c b) -> ... r c a b", a=BLOCK, b=BLOCK)
    scale = blocks.abs().amax((-2, -1), keepdim=True) / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    blocks = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return rearrange(blocks, "... r c a b -> ... (r a) (c b)")[..., :rows, :columns].to(weight.dtype)


def quantised_names(model: GLM) -> set[str]:
    """The parameters that are in FP8: matrices of linear layers and experts, without the head."""
    names = set()
    for path, module in model.named_modules():
        if isinstance(module, Linear) and module is not model.lm_head:
            names.add(f"{path}.weight")
        if isinstance(module, Experts):
            names |= {f"{path}.{name}" for name, _ in module.named_parameters()}
    return names


@torch.no_grad()
def fp8_state(model: GLM) -> dict[str, Tensor]:
    """The model's state as an FP8 engine has it, for `Engine.update_weights`."""
    names = quantised_names(model)
    return {name: through_fp8(value) if name in names else value for name, value in model.state_dict().items()}


def fp8_copy(model: GLM) -> GLM:
    """A model of its own memory with the weights of `fp8_state`, for inference."""
    sampler = copy.deepcopy(model).requires_grad_(False).eval()
    sampler.load_state_dict(fp8_state(model))
    return sampler
