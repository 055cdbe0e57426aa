"""The unchanged model, spread over the ranks of a mesh: experts divided, parameters cut, weights drawn or left empty.

Nothing here makes a whole model: it is built on the meta device, cut, and only then given memory, for this rank's part.

- Expert parallelism gives each rank the stacks of its own experts and a dispatcher that finds the others.
- FSDP2 (`fully_shard`) gathers a layer's parameters before it runs, frees them after, and sums the gradients: one group a
  decoder layer, one for the routed experts in it, and one for the rest (embedding, head, final norm, the MTP layer's
  matrices). The loss is normalised by the targets of all ranks, so gradients are summed and never averaged.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard

from minglm.config import GLMConfig
from minglm.model import GLM, DecoderLayer, Experts, MoE
from scale.dispatch import AllToAllDispatcher
from scale.mesh import Mesh, rows_of_rank


def build(config: GLMConfig, mesh: Mesh, device: torch.device, bf16: bool = False) -> GLM:
    """This rank's part of the model, in memory that is not yet written: `draw_weights` or a checkpoint fills it.

    bf16: the routed experts, nine tenths of the parameters, are gathered in bf16, in which autocast would multiply them
    anyway. Raises `LayoutError` if the mesh does not fit, before anything is allocated.
    """
    mesh.layout.check(config)
    with torch.device("meta"):
        model = GLM(config)
    _divide_experts(model, mesh)
    _cut(model, mesh, bf16)
    model.to_empty(device=device)
    model.expert_load.zero_()
    for router in model.routers():
        router.e_score_correction_bias.zero_()
    return model


def _divide_experts(model: GLM, mesh: Mesh) -> None:
    local, ep = mesh.layout.local_experts(model.config), mesh.layout.ep
    if ep == 1:
        return
    for module in model.modules():
        if isinstance(module, MoE):
            module.dispatcher = AllToAllDispatcher(mesh.ep_group, model.config.n_routed_experts)
        if isinstance(module, Experts):
            for name, stack in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(stack.new_empty(local, *stack.shape[1:])))


def _cut(model: GLM, mesh: Mesh, bf16: bool) -> None:
    """FSDP around what several ranks share; parameters that one rank holds alone stay as they are and are never copied."""
    layers = [module for module in model.modules() if isinstance(module, DecoderLayer)]
    stacks = {stack for layer in layers if layer.is_moe for stack in layer.mlp.experts.parameters()}
    if mesh.experts_fsdp.size() > 1:
        dim = mesh.layout.expert_dim(model.config)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None,
            reduce_dtype=torch.float32 if bf16 else None,
            cast_forward_inputs=False,
        )
        for layer in layers:
            if layer.is_moe:
                fully_shard(
                    layer.mlp.experts, mesh=mesh.experts_fsdp, mp_policy=policy, shard_placement_fn=lambda _: Shard(dim)
                )
    if mesh.dense_fsdp.size() > 1:
        for layer in layers:
            fully_shard(layer, mesh=mesh.dense_fsdp, ignored_params=stacks)
        fully_shard(model, mesh=mesh.dense_fsdp, ignored_params=stacks)
        register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for layer, following in zip(layers, layers[1:], strict=False):
        # The dispatcher makes the host wait in every layer; by then the next layer's parameters should be on their way.
        inside = [following, following.mlp.experts] if following.is_moe else [following]
        if isinstance(layer, FSDPModule):
            layer.set_modules_to_forward_prefetch([module for module in inside if isinstance(module, FSDPModule)])


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or gradient, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---------------------------------------------------------------------------------------------- who holds which part


@dataclass(frozen=True)
class Part:
    """This rank's part of a parameter. `local` shares the parameter's memory."""

    name: str
    local: Tensor
    shape: tuple[int, ...]  # of the whole parameter: of a stack, with the experts of all ranks
    is_expert: bool
    dim: int  # along which FSDP cuts
    mesh: Mesh

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that hold the other parts of the same matrices."""
        return self.mesh.fsdp_group if self.is_expert else self.mesh.shard_group

    def whole(self, tensor: Tensor) -> DTensor:
        """A tensor like `local` (a momentum, a gradient) as what it is: a part of one of the whole parameter's shape."""
        mesh = self.mesh.experts if self.is_expert else self.mesh.dense
        placements = [Replicate(), Shard(0), Shard(self.dim)] if self.is_expert else [Replicate(), Shard(self.dim)]
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=torch.Size(self.shape), stride=stride)

    def cut_out(self, whole: Tensor) -> Tensor:
        """Of a tensor of the whole parameter's shape, this rank's part: a view."""
        if self.is_expert:
            whole = whole.tensor_split(self.mesh.layout.ep)[self.mesh.ep_rank]
        start, end = rows_of_rank(whole.shape[self.dim], self.group.rank(), self.group.size())
        return whole.narrow(self.dim, start, end - start)


def parts(model: GLM, mesh: Mesh) -> list[Part]:
    """This rank's part of every parameter, in the model's order."""
    found = []
    for name, parameter in model.named_parameters():
        is_expert = ".experts." in name and parameter.ndim == 3
        shape = list(parameter.shape)
        if is_expert:
            shape[0] *= mesh.layout.ep
        dim = mesh.layout.expert_dim(model.config) if is_expert else 0
        found.append(Part(name, local(parameter.detach()), tuple(shape), is_expert, dim, mesh))
    return found


@torch.no_grad()
def draw_weights(model: GLM, parts: list[Part]) -> None:
    """First values from torch's generator, the very ones that one process would draw: whole parameter by whole parameter,
    of which this rank keeps its part. So a layout changes nothing, and the largest parameter bounds the memory."""
    for part in parts:
        whole = torch.empty(part.shape, device=part.local.device)
        model.draw(part.name, whole)
        part.local.copy_(part.cut_out(whole))
