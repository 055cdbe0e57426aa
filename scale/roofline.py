"""How long a step takes by arithmetic: an estimate to compare meshes by, not a promise.

A device does nothing faster than its peak times a stated efficiency, and no link carries more than its bandwidth (the
roofline of Williams et al. 2009, with links beside the memory). What happens at the same time counts as its longest part:

    a micro-batch = max(products, gathers and reductions of FSDP) + all-to-all of the experts + root group
    a step        = micro-batches * that + the update

FSDP fetches the next layer while one runs, so its traffic hides behind the products; an all-to-all stands between a layer's
products, and so do the root group's gather (before the first layer) and reduction (after the last). Products of an expert
with few rows are bound by reading its weights, not by the peak. A collective over n ranks brings (n - 1) / n of its bytes
to each rank; over several nodes, the group's ranks in a node share what enters it, each through its own network card.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from minglm.config import GLMConfig
from minglm.params import forward_flops_per_token, training_flops_per_token
from scale.footprint import Workload, layer_sizes, muon_matrices, parameters, parameters_of_rank, root_elements
from scale.hardware import GPU
from scale.mesh import Layout

LINK_EFFICIENCY = 0.8  # what collectives reach of a link's bandwidth, and kernels of the memory's
LATENCY = 30e-6  # seconds to start a collective
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimiser step by what they go to. Those hidden behind others are counted in `total` once."""

    micro_batches: int
    products: float  # with recomputation
    fsdp: float  # gathers and reductions of layers; hidden behind products
    copies: float  # gradients summed over the dp copies; hidden, too
    all_to_all: float
    root: float
    newton_schulz: float
    exchange: float  # Muon's
    elementwise: float  # the optimiser's pass over what the rank holds

    @property
    def forward_and_backward(self) -> float:
        return max(self.products, self.fsdp + self.copies) + self.all_to_all + self.root

    @property
    def update(self) -> float:
        return self.newton_schulz + self.exchange + self.elementwise

    @property
    def total(self) -> float:
        return self.forward_and_backward + self.update


def step_time(config: GLMConfig, layout: Layout, workload: Workload, gpu: GPU, mfu: float, micro_batches: int) -> StepTime:
    """The estimate. mfu: the part of the peak that matrix products reach while they run."""
    links = Links(layout, gpu)
    micro = {
        "products": _products(config, layout, workload, gpu, mfu),
        "fsdp": _fsdp(config, layout, links),
        "copies": _copies(config, layout, links),
        "all_to_all": _all_to_all(config, layout, workload, links),
        "root": 2 * links.collective(4 * root_elements(config), "shard"),
    }
    held = sum(parameters_of_rank(config, layout, 0))
    matrices = list(muon_matrices(config))
    flops = sum(count * _newton_schulz_flops(rows, columns) for count, rows, columns in matrices)
    largest = max(_newton_schulz_flops(rows, columns) for _, rows, columns in matrices)
    return StepTime(
        micro_batches,
        **{name: micro_batches * seconds for name, seconds in micro.items()},
        newton_schulz=max(flops / layout.shards, largest) / (mfu * gpu.tflops * 1e12),
        exchange=_exchange(config, layout, links),
        elementwise=28 * held / (LINK_EFFICIENCY * gpu.memory_gb_per_s * 1e9),  # read and write 3 numbers, read a gradient
    )


# ------------------------------------------------------------------------------------------------------------- products


def _products(config: GLMConfig, layout: Layout, workload: Workload, gpu: GPU, mfu: float) -> float:
    """Forward, backward and, with activation checkpointing, forward again: seconds of a micro-batch."""
    tokens, recompute = workload.tokens, workload.activation_checkpointing
    flops = training_flops_per_token(config, workload.sequence_length)
    if recompute:
        heads = 2 * config.vocab_size * config.hidden_size * (1 + config.num_nextn_predict_layers)
        flops += forward_flops_per_token(config, workload.sequence_length, mtp=True) - heads
    moe_layers = sum(experts > 0 for _, experts, _ in layer_sizes(config))
    rows = tokens * config.num_experts_per_tok * (workload.imbalance if layout.ep > 1 else 1)
    of_a_row = 2 * 3 * config.hidden_size * config.moe_intermediate_size
    expert_flops = (4 if recompute else 3) * of_a_row * moe_layers
    rate = mfu * gpu.tflops * 1e12
    # Each pass reads the weights, or writes their gradients: bf16.
    weight_bytes = (4 if recompute else 3) * 2 * sum(experts for _, experts, _ in layer_sizes(config)) / layout.ep
    in_experts = max(expert_flops * rows / rate, weight_bytes / (LINK_EFFICIENCY * gpu.memory_gb_per_s * 1e9))
    return (flops - expert_flops * config.num_experts_per_tok) * tokens / rate + in_experts


def _newton_schulz_flops(rows: int, columns: int) -> int:
    """Of one matrix in the textbook form: 4 m^2 n + 2 m^3 a step, m the smaller side; see `minglm.optim`."""
    m, n = sorted((rows, columns))
    return NEWTON_SCHULZ_STEPS * (4 * m * m * n + 2 * m**3)


# -------------------------------------------------------------------------------------------------------------- traffic


class Links:
    """How fast the groups of a layout move bytes: which of a group's ranks share a node decides it."""

    def __init__(self, layout: Layout, gpu: GPU):
        dp, fsdp, ep, shards = layout.dp, layout.fsdp, layout.ep, layout.shards
        node = gpu.gpus_per_node
        self.gpu = gpu
        self.groups = {
            "ep": worst_spread(ep, 1, {first * ep % node for first in range(min(dp * fsdp, node))}, node),
            "fsdp": worst_spread(fsdp, ep, {(c * shards + e) % node for c in range(min(dp, node)) for e in range(ep)}, node),
            "shard": worst_spread(shards, 1, {copy * shards % node for copy in range(min(dp, node))}, node),
            "dp": worst_spread(dp, shards, {first % node for first in range(min(shards, node))}, node),
        }
        self.sizes = {"ep": ep, "fsdp": fsdp, "shard": shards, "dp": dp}

    def leaves_node(self, group: str) -> bool:
        return self.groups[group][0] > 1

    def collective(self, whole_bytes: float, group: str) -> float:
        """Seconds of an all-gather that leaves `whole_bytes` on each rank, or of a reduce-scatter that starts with them."""
        ranks, (nodes, together) = self.sizes[group], self.groups[group]
        if ranks == 1:
            return 0.0
        inside = whole_bytes * (1 - 1 / ranks) / self.gpu.intra_node_gb_per_s if together > 1 else 0.0
        outside = whole_bytes * (1 - together / ranks) / (together * self.gpu.inter_node_gb_per_s) if nodes > 1 else 0.0
        return max(inside, outside) / (LINK_EFFICIENCY * 1e9) + LATENCY

    def exchange(self, bytes_sent: float, group: str) -> float:
        """Seconds of an all-to-all in which each rank sends `bytes_sent`, an equal part to each of the group."""
        ranks, (_, together) = self.sizes[group], self.groups[group]
        if ranks == 1:
            return 0.0
        inside = bytes_sent * (together - 1) / ranks / self.gpu.intra_node_gb_per_s
        outside = bytes_sent * (ranks - together) / ranks / self.gpu.inter_node_gb_per_s
        return max(inside, outside) / (LINK_EFFICIENCY * 1e9) + LATENCY


def worst_spread(size: int, stride: int, firsts: Iterable[int], node: int) -> tuple[int, int]:
    """Over how many nodes a group spreads, and how many of its ranks the node with the fewest of them has, at worst.

    A group is `first + stride * j` for j < size; `firsts` are where groups can start within a node of `node` ranks.
    """
    return max((_spread(size, stride, first, node) for first in firsts), key=lambda spread: (spread[0], -spread[1]))


@cache
def _spread(size: int, stride: int, first: int, node: int) -> tuple[int, int]:
    counts: dict[int, int] = {}
    for j in range(size):
        index = (first + stride * j) // node
        counts[index] = counts.get(index, 0) + 1
    return len(counts), min(counts.values())


def _fsdp(config: GLMConfig, layout: Layout, links: Links) -> float:
    """Gathers before forward and backward, and the reduction: seconds of a micro-batch.

    A layer that is computed again in the backward pass is gathered already.
    """
    seconds = 0.0
    for (dense, experts, _), layers in _distinct(layer_sizes(config)):
        seconds += layers * 3 * links.collective(4 * dense, "shard")
        if experts:
            local = experts / layout.ep
            seconds += layers * (2 * links.collective(2 * local, "fsdp") + links.collective(4 * local, "fsdp"))
    return seconds


def _copies(config: GLMConfig, layout: Layout, links: Links) -> float:
    """All-reduce of this rank's gradient shards over the copies: a reduce-scatter and an all-gather."""
    if layout.dp == 1:
        return 0.0
    layers = len(layer_sizes(config))
    return 2 * (links.collective(4 * sum(parameters_of_rank(config, layout, 0)), "dp") + 2 * (layers - 1) * LATENCY)


def _all_to_all(config: GLMConfig, layout: Layout, workload: Workload, links: Links) -> float:
    """Rows to the experts and back, forward, backward and (recomputed) forward again."""
    moe_layers = sum(experts > 0 for _, experts, _ in layer_sizes(config))
    rows = workload.imbalance * workload.tokens * config.num_experts_per_tok
    times = 2 * (3 if workload.activation_checkpointing else 2)
    return moe_layers * times * links.exchange(2 * config.hidden_size * rows, "ep")


def _exchange(config: GLMConfig, layout: Layout, links: Links) -> float:
    """Momentum to the owners of matrices and updates back, fp32. Experts that are cut whole have their owner already."""
    dense = experts = 0
    for parameter in parameters(config):
        if parameter.is_muon:
            held, _, row = parameter.rows(config, layout, 0)
            if parameter.is_expert:
                experts += held * row * parameter.times
            else:
                dense += held * row * parameter.times
    seconds = 2 * links.exchange(4 * dense, "shard")
    if layout.expert_dim(config) == 1:
        seconds += 2 * links.exchange(4 * experts, "fsdp")
    return seconds


def _distinct(layers: tuple[tuple[int, int, int], ...]) -> Iterable[tuple[tuple[int, int, int], int]]:
    return ((layer, layers.count(layer)) for layer in dict.fromkeys(layers))


def slower_because(chosen: StepTime, other: StepTime, layout: Layout, gpu: GPU) -> str:
    """In words, what `other` (the time under `layout`) loses most by, compared with `chosen`."""
    names = ("all_to_all", "root", "newton_schulz", "exchange", "elementwise")
    losses = {name: getattr(other, name) - getattr(chosen, name) for name in names}
    traffic = other.fsdp + other.copies
    if other.products >= traffic:
        critical = "products"
    else:
        critical = "copies" if other.copies - chosen.copies > other.fsdp - chosen.fsdp else "fsdp"
    losses[critical] = max(other.products, traffic) - max(chosen.products, chosen.fsdp + chosen.copies)
    reasons = {
        "products": "busiest experts take longer" if layout.ep > 1 else "weights of all experts are read for few rows each",
        "fsdp": f"gathers 1/{layout.ep} of each layer's experts" if layout.ep > 1 else "gathers all experts of each layer",
        "copies": "sums the gradients of the copies",
        "all_to_all": "all-to-all leaves the node" if Links(layout, gpu).leaves_node("ep") else "all-to-all carries more",
        "root": "embedding and head cross more nodes",
        "newton_schulz": "each copy orthogonalises for itself",
        "exchange": "Muon exchanges more",
        "elementwise": "each rank updates more",
    }
    return reasons[max(losses, key=losses.get)]
