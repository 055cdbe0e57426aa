"""The memory of a rank: which numbers it holds under a layout, and what comes on top while it trains.

The shapes are those of the model itself, made on the meta device; how they are cut is FSDP's rule (`scale.mesh`). What the
trainer keeps, from step to step and for moments:

    always          fp32 weights, gradients and optimiser state of this rank's shards (ZeRO-3; Rajbhandari et al. 2020)
    a micro-batch   two layers gathered (one runs, the next is on its way), the gradients of two (one is made, one is being
                    reduced), the root group (embedding, head, final norm, the MTP layer's small matrices), bf16 copies of
                    fp32 weights, activations, the rows of other ranks' tokens that expert parallelism brings, and the
                    loss's chunk of logits
    the update      the parts of matrices that Muon exchanges, and the working memory of Newton-Schulz

The last two are never there at the same time. Gathered experts are divided by ep alone: an estimate that also divides them
by what does not divide them promises that a model fits where it does not (Megatron-LM#4050).
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from minglm.config import ConfigError, GLMConfig
from minglm.model import GLM
from minglm.optim import CHUNK_ELEMENTS_GPU
from minglm.params import PRE_TRAINING_LENGTH, activation_bytes_per_token, kv_cache_bytes_per_token
from scale.mesh import Layout, LayoutError, rows_of_rank

LOGITS_ELEMENTS = 2**26  # of a chunk in the loss on a GPU; minglm.ops
LOGITS_BYTES = 2 + 4 + 4 + 2  # a logit as a bf16 product, as fp32, its log-softmax, and its gradient in bf16
EXCHANGE_BYTES = 256 * 2**20  # that Muon sends at most in a round; there are four buffers of this size
NEWTON_SCHULZ_BYTES = 20  # a number: its momentum and update in fp32, gathered and not, and three bf16 steps in between


@dataclass(frozen=True)
class Workload:
    """What each rank has on its hands at once. Raises `ConfigError` for numbers that mean nothing."""

    sequence_length: int = PRE_TRAINING_LENGTH
    """Tokens."""
    sequences_per_micro_batch: int = 1
    """So many go through the model at once, on each rank its own."""
    activation_checkpointing: bool = True
    """A layer's activations are computed again in the backward pass instead of kept."""
    imbalance: float = 1.3
    """The busiest expert-parallel rank gets so many times its fair share of rows."""
    rollout_tokens: int = 8 * 8192
    """Tokens whose keys and values a rollout on this rank keeps."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "sequences_per_micro_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: wanted 1 or more")
        if self.rollout_tokens < 0:
            raise ConfigError(f"rollout_tokens = {self.rollout_tokens!r}: wanted 0 or more")
        if not 1 <= self.imbalance < math.inf:
            raise ConfigError(f"imbalance = {self.imbalance!r}: wanted 1 (perfect balance) or more")

    @property
    def tokens(self) -> int:
        """In a micro-batch of one rank."""
        return self.sequence_length * self.sequences_per_micro_batch


# ------------------------------------------------------------------------------------------------ which rank holds what


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model, or `times` of them that differ only in the layer."""

    name: str
    shape: tuple[int, ...]
    times: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_mtp(self) -> bool:
        return self.name.startswith("mtp.")

    @property
    def is_expert(self) -> bool:
        return ".experts." in self.name

    @property
    def layer(self) -> str | None:
        """Of which decoder layer: "model.layers.7", "mtp.layer", or None for what FSDP's root group holds."""
        found = re.match(r"(model\.layers\.\d+|mtp\.layer)\.", self.name)
        return found and found[1]

    @property
    def optimizer_bytes(self) -> int:
        """Of one number: Muon's momentum, or AdamW's two moments; see `minglm.optim.build_optimizer`."""
        return 8 if len(self.shape) < 2 or self.name.endswith(("embed_tokens.weight", "lm_head.weight")) else 4

    @property
    def is_muon(self) -> bool:
        return self.optimizer_bytes == 4

    def matrices(self) -> tuple[int, int, int]:
        """(how many, rows, columns) that Muon makes orthogonal one by one; see `minglm.optim.logical_matrices`."""
        *stack, rows, columns = self.shape
        halves = 2 if self.name.endswith("experts.gate_up_proj") else 1
        return self.times * math.prod(stack) * halves, rows // halves, columns

    def rows(self, config: GLMConfig, layout: Layout, rank: int) -> tuple[int, int, int]:
        """Along the dimension that is cut: how many rows this rank holds, how many FSDP gives memory to (all ranks as
        many as the first), and the numbers in one row."""
        shard = rank % layout.shards
        if not self.is_expert:
            held, length, ranks = shard, self.shape[0], layout.shards
        else:
            dim = layout.expert_dim(config)
            held, length, ranks = shard // layout.ep, self.shape[dim] // (layout.ep if dim == 0 else 1), layout.fsdp
        start, end = rows_of_rank(length, held, ranks)
        share = self.elements // (layout.ep if self.is_expert else 1)
        return end - start, rows_of_rank(length, 0, ranks)[1], share // length


@lru_cache
def parameters(config: GLMConfig) -> tuple[Parameter, ...]:
    """All parameters. Layers after the first mixture-of-experts layer are like it, so they are not made but counted."""
    made = min(config.num_hidden_layers, config.first_k_dense_replace + 1)
    with torch.device("meta"):
        model = GLM(dataclasses.replace(config, num_hidden_layers=made))
    last = f"model.layers.{made - 1}."
    return tuple(
        Parameter(name, tuple(p.shape), config.num_hidden_layers - made + 1 if name.startswith(last) else 1)
        for name, p in model.named_parameters()
    )


def parameters_of_rank(config: GLMConfig, layout: Layout, rank: int) -> tuple[int, int]:
    """How many numbers the shards of `rank` hold: of the main stack, and of the MTP layer. Exact, padding left out.

    Summed over the ranks of one copy they are `minglm.params.count`'s main and mtp. Raises `LayoutError` for a layout that
    does not fit the model, or a rank that it does not have.
    """
    layout.check(config)
    _check_rank(layout, rank)
    main = mtp = 0
    for parameter in parameters(config):
        held, _, row = parameter.rows(config, layout, rank)
        if parameter.is_mtp:
            mtp += held * row * parameter.times
        else:
            main += held * row * parameter.times
    return main, mtp


def _check_rank(layout: Layout, rank: int) -> None:
    if not 0 <= rank < layout.world_size:
        raise LayoutError(f"rank {rank}: {layout} has ranks 0 to {layout.world_size - 1}")


@lru_cache
def layer_sizes(config: GLMConfig) -> tuple[tuple[int, int, int], ...]:
    """Numbers in each decoder layer in the order they run, the MTP layer's last: (not in experts, in experts, in matrices
    that products under autocast read as bf16 copies)."""
    sizes: dict[str, list[int]] = {}
    times: dict[str, int] = {}
    for parameter in parameters(config):
        if parameter.layer is not None:
            size = sizes.setdefault(parameter.layer, [0, 0, 0])
            size[parameter.is_expert] += parameter.elements
            if len(parameter.shape) == 2 and not parameter.name.endswith("mlp.gate.weight"):
                size[2] += parameter.elements
            times[parameter.layer] = parameter.times
    return tuple(tuple(size) for layer, size in sizes.items() for _ in range(times[layer]))


@lru_cache
def root_elements(config: GLMConfig) -> int:
    """Numbers in FSDP's root group: all that lies in no decoder layer."""
    return sum(parameter.elements for parameter in parameters(config) if parameter.layer is None)


# ------------------------------------------------------------------------------------------------------------- in bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they are for."""

    weights: int  # fp32
    gradients: int  # fp32
    optimizer: int  # fp32
    unsharded_layers: int  # two: experts bf16, all else fp32
    layer_gradients: int  # one whole (experts bf16), one in the fp32 buffer that is reduced
    root_weights: int  # fp32, from forward to backward
    root_gradient: int  # fp32, whole
    weight_copies: int  # bf16, kept by autograd
    activations: int
    expert_rows: int
    loss: int
    exchange: int  # Muon's
    newton_schulz: int
    kv_cache: int  # bf16
    reserve: int

    @property
    def held(self) -> int:
        """From step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def micro_batch(self) -> int:
        """On top, in the backward pass of a micro-batch; the forward pass needs less."""
        gathered = self.unsharded_layers + self.layer_gradients + self.root_weights + self.root_gradient + self.weight_copies
        return gathered + self.activations + self.expert_rows + self.loss

    @property
    def update(self) -> int:
        """On top, while the optimiser works."""
        return self.exchange + self.newton_schulz

    @property
    def total(self) -> int:
        """At the fullest moment of training."""
        return self.held + max(self.micro_batch, self.update) + self.reserve

    @property
    def rollout(self) -> int:
        """While this rank samples between two steps: weights, optimiser state, what a forward pass gathers, and the KV
        cache. Gradients are released after a step."""
        gathered = self.unsharded_layers + self.root_weights
        return self.weights + self.optimizer + gathered + self.kv_cache + self.reserve


def memory_of_rank(config: GLMConfig, layout: Layout, rank: int, workload: Workload, reserve: int = 0) -> Memory:
    """What `rank` needs, in bytes. reserve: for what nobody can count (CUDA context, NCCL buffers, fragmentation).

    Raises `LayoutError` as `parameters_of_rank` does.
    """
    layout.check(config)
    _check_rank(layout, rank)
    weights = optimizer = matrices = 0
    for parameter in parameters(config):
        held, allocated, row = parameter.rows(config, layout, rank)
        weights += 4 * allocated * row * parameter.times
        optimizer += parameter.optimizer_bytes * held * row * parameter.times
        if parameter.is_muon:
            matrices += allocated * row * parameter.times
    root, table = root_elements(config), config.vocab_size * config.hidden_size
    heads = 1 + config.num_nextn_predict_layers
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        unsharded_layers=_two_layers(config, layout, expert_bytes=2) + _gathered_copy(config, layout),
        layer_gradients=_two_layers(config, layout, expert_bytes=3),  # 2 in the one, 4 in the other
        root_weights=4 * root if layout.world_size > 1 else 0,
        # Each loss makes the head's gradient in its forward pass.
        root_gradient=4 * max(root if layout.world_size > 1 else 0, heads * table),
        weight_copies=_weight_copies(config, workload.activation_checkpointing),
        activations=activation_bytes_per_token(config, workload.activation_checkpointing) * workload.tokens,
        expert_rows=_expert_rows(config, layout, workload),
        loss=_loss(config, workload),
        exchange=min(4 * EXCHANGE_BYTES, 4 * 4 * matrices) if layout.shards > 1 else 0,
        newton_schulz=NEWTON_SCHULZ_BYTES * _newton_schulz_elements(config, layout, matrices),
        kv_cache=kv_cache_bytes_per_token(config) * workload.rollout_tokens,
        reserve=reserve,
    )


def most_memory(config: GLMConfig, layout: Layout, workload: Workload, reserve: int = 0) -> Memory:
    """Of the rank that needs most. It is the first: FSDP gives no later rank more rows of anything."""
    return memory_of_rank(config, layout, 0, workload, reserve)


def _two_layers(config: GLMConfig, layout: Layout, expert_bytes: int) -> int:
    """Bytes of the largest two neighbours among the layers, with the experts of one ep rank; all other numbers take 4.
    What one rank holds alone is neither gathered nor reduced."""
    dense_bytes = 4 if layout.world_size > 1 else 0
    expert_bytes = expert_bytes if layout.dp * layout.fsdp > 1 else 0
    sizes = [dense_bytes * dense + expert_bytes * experts // layout.ep for dense, experts, _ in layer_sizes(config)]
    return max((sum(pair) for pair in zip(sizes, sizes[1:], strict=False)), default=sizes[0])


def _gathered_copy(config: GLMConfig, layout: Layout) -> int:
    """FSDP2 gathers along the first dimension. Where experts are cut along the second, it makes a copy in order."""
    if layout.fsdp == 1 or layout.expert_dim(config) == 0:
        return 0
    return 2 * max(experts for _, experts, _ in layer_sizes(config)) // layout.ep


def _weight_copies(config: GLMConfig, activation_checkpointing: bool) -> int:
    """bf16 copies of fp32 weights that autograd saves with each product; with checkpointing, of one layer at a time."""
    copied = [matrices for _, _, matrices in layer_sizes(config)]
    return 2 * (max(copied) if activation_checkpointing else sum(copied))


def _expert_rows(config: GLMConfig, layout: Layout, workload: Workload) -> int:
    """What the routed experts of one layer work with beside what they keep, and what more they keep on the busiest rank."""
    if not any(experts for _, experts, _ in layer_sizes(config)):
        return 0
    h, i, k = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    sent = workload.tokens * k
    if layout.ep == 1:
        return int(sent * (2 * 2 * h + 2 * 5 * i))
    arrived = workload.imbalance * sent
    # Rows as they arrive, results in the experts' order and in the senders'; results that came back; gradients inside.
    working = 2 * h * (3 * arrived + sent) + 2 * 5 * i * arrived
    moe_layers = sum(experts > 0 for _, experts, _ in layer_sizes(config))
    layers_kept = 1 if workload.activation_checkpointing else moe_layers
    surplus = (arrived - sent) * (2 * h + 2 * 5 * i + 40) * layers_kept  # as in activation_bytes_per_token
    return math.ceil(working + surplus)


def _loss(config: GLMConfig, workload: Workload) -> int:
    """The head's bf16 copy, a bf16 product for its gradient and a chunk of logits; or, going back, the gradient scaled."""
    chunk = min(workload.tokens, max(64, LOGITS_ELEMENTS // config.vocab_size)) * config.vocab_size
    table = config.vocab_size * config.hidden_size
    return max(LOGITS_BYTES * chunk + 4 * table, 6 * table)


def _newton_schulz_elements(config: GLMConfig, layout: Layout, held: int) -> int:
    """Numbers of the matrices that are made orthogonal together: a chunk, but at least one matrix, at most all."""
    largest = max(rows * columns for _, rows, columns in muon_matrices(config))
    return max(largest, min(held, CHUNK_ELEMENTS_GPU))


def muon_matrices(config: GLMConfig) -> Iterator[tuple[int, int, int]]:
    """(how many, rows, columns) of all matrices that Muon updates."""
    return (parameter.matrices() for parameter in parameters(config) if parameter.is_muon)
