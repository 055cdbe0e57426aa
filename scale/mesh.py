"""How ranks are laid out, and what a layout asks of a model.

A rank is one process with one device. A layout is three numbers, world size = dp * fsdp * ep:

    dp      copies of the sharded model; each sees other sequences, gradients are summed
    fsdp    ranks that share one copy's parameters, gradients and optimiser state, and see other sequences, too (ZeRO-3)
    ep      ranks among which the routed experts are divided: expert e lives on rank e // (E / ep) of the group

Ranks of one ep group are neighbours (ep is the fastest number in a rank), for they exchange tokens in every layer and
should share a node. All ranks see sequences of their own. So there are two ways a tensor lies over the fsdp * ep ranks of
one copy: everything but the routed experts is cut into fsdp * ep parts along its first dimension; the routed experts are
first divided by ep, and then each rank's experts are cut into fsdp parts: whole experts, where they divide evenly, or else
rows of every expert.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from minglm.config import ConfigError, GLMConfig


class LayoutError(ConfigError):
    """A layout that does not fit the model or the number of processes. The message names what would fit."""


@dataclass(frozen=True)
class Layout:
    """How many ranks do what; see the module's docstring."""

    dp: int = 1
    """Copies of the sharded model."""
    fsdp: int = 1
    """Ranks that share one copy's parameters; see other sequences."""
    ep: int = 1
    """Ranks among which the routed experts are divided."""

    @property
    def world_size(self) -> int:
        return self.dp * self.fsdp * self.ep

    @property
    def shards(self) -> int:
        """Ranks over which all but the routed experts are cut."""
        return self.fsdp * self.ep

    def __str__(self) -> str:
        return f"dp {self.dp} x fsdp {self.fsdp} x ep {self.ep}"

    @classmethod
    def over(cls, world_size: int, dp: int = 1, fsdp: int | None = None, ep: int = 1) -> "Layout":
        """The layout of `world_size` ranks; `fsdp` None takes what the others leave. Raises `LayoutError`."""
        for name, value in (("dp", dp), ("fsdp", 1 if fsdp is None else fsdp), ("ep", ep)):
            if value < 1:
                raise LayoutError(f"{name} = {value}: wanted 1 or more")
        if fsdp is None:
            if world_size % (dp * ep):
                raise LayoutError(
                    f"{world_size} processes cannot be laid out as dp {dp} x fsdp x ep {ep}: wanted a multiple of {dp * ep}. "
                    f"Start {-(-world_size // (dp * ep)) * dp * ep} processes (torchrun --nproc-per-node), or change dp or ep"
                )
            fsdp = world_size // (dp * ep)
        layout = cls(dp, fsdp, ep)
        if layout.world_size != world_size:
            raise LayoutError(
                f"{layout} needs {layout.world_size} processes; {world_size} were started. Start {layout.world_size} "
                f"(torchrun --nproc-per-node), or leave out fsdp to have it follow"
            )
        return layout

    def check(self, config: GLMConfig) -> None:
        """Raises `LayoutError` if the model cannot be cut like this; it says what can."""
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        if experts % self.ep:
            possible = ", ".join(str(ep) for ep in range(1, experts + 1) if experts % ep == 0)
            raise LayoutError(f"ep = {self.ep}: {experts} routed experts do not divide by it; wanted one of {possible}")
        if not self._cuts(config, self.fsdp):
            raise LayoutError(
                f"fsdp = {self.fsdp}: the {experts // self.ep} experts of a rank do not divide by it, and neither do both "
                f"their rows, {2 * width} (gate and up) and {hidden} (down); wanted a divisor of one or the other, "
                f"such as {self._nearest_fsdp(config)}"
            )

    def expert_dim(self, config: GLMConfig) -> int:
        """The dimension of the stacks (experts, rows, columns) that fsdp cuts: 0, whole experts, if these divide; or 1."""
        return 0 if self.local_experts(config) % self.fsdp == 0 else 1

    def local_experts(self, config: GLMConfig) -> int:
        """Experts of each layer that an ep rank is responsible for."""
        return config.n_routed_experts // self.ep

    def _cuts(self, config: GLMConfig, fsdp: int) -> bool:
        """Whether a rank's experts divide by `fsdp`: whole ones, or the rows of each."""
        rows = (2 * config.moe_intermediate_size, config.hidden_size)
        return self.local_experts(config) % fsdp == 0 or all(row % fsdp == 0 for row in rows)

    def _nearest_fsdp(self, config: GLMConfig) -> int:
        return next(fsdp for fsdp in range(self.fsdp - 1, 0, -1) if self._cuts(config, fsdp))


@dataclass(frozen=True)
class Mesh:
    """A layout on the processes of this run: process groups by name. Made by `make_mesh`."""

    layout: Layout
    dense: DeviceMesh  # (dp, shard): everything but the routed experts
    experts: DeviceMesh  # (dp, ep, fsdp): the routed experts; ep before fsdp, as they are divided first and cut then

    @cached_property
    def ep_rank(self) -> int:
        return self.experts.get_local_rank("ep")

    @cached_property
    def ep_group(self) -> dist.ProcessGroup:
        return self.experts.get_group("ep")

    @cached_property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks that hold one copy of the model together, each element once."""
        return self.dense.get_group("shard")

    @cached_property
    def fsdp_group(self) -> dist.ProcessGroup:
        return self.experts.get_group("fsdp")

    @cached_property
    def dense_fsdp(self) -> DeviceMesh:
        """What FSDP cuts (and, with copies, replicates) everything but the routed experts over."""
        return self.dense if self.layout.dp > 1 else self.dense["shard"]

    @cached_property
    def experts_fsdp(self) -> DeviceMesh:
        """What FSDP cuts (and replicates) the routed experts of one ep rank over."""
        return self.experts["dp", "fsdp"] if self.layout.dp > 1 else self.experts["fsdp"]


def make_mesh(layout: Layout, device_type: str) -> Mesh:
    """The process groups of `layout`; every process must call it. Raises `LayoutError` for another number of processes."""
    Layout.over(dist.get_world_size(), layout.dp, layout.fsdp, layout.ep)
    dense = init_device_mesh(device_type, (layout.dp, layout.shards), mesh_dim_names=("dp", "shard"))
    ranks = torch.arange(layout.world_size).view(layout.dp, layout.fsdp, layout.ep)
    experts = DeviceMesh(device_type, ranks.permute(0, 2, 1), mesh_dim_names=("dp", "ep", "fsdp"))
    return Mesh(layout, dense, experts)


@functools.cache
def control_group() -> dist.ProcessGroup:
    """All ranks, over the network of the hosts, and patient: for what may take hours (preparing data, writing checkpoints)."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def broadcast(value: Any) -> Any:
    """The first rank's `value`, on all ranks."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=control_group())
    return box[0]


def first_rank_does(work: Callable[[], Any]) -> Any:
    """`work()`, done by the first rank alone while the others wait; all get what it returns, or raise what it raises."""
    result = error = None
    if dist.get_rank() == 0:
        try:
            result = work()
        except Exception as raised:
            error = raised
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result


def first_rank_first(work: Callable[[], Any]) -> Any:
    """`work()` on every rank, but on the first before the others: what it has prepared, they find."""
    done = []
    first_rank_does(lambda: done.append(work()))
    return done[0] if done else work()


def rows_of_rank(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """Which of `rows` rank number `rank` of `ranks` holds, (start, end), by FSDP's rule: equal parts, the last ones short."""
    part = -(-rows // ranks)
    return min(rank * part, rows), min((rank + 1) * part, rows)
