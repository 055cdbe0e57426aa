"""What a configuration costs, before anything is trained: parameters, operations, memory and time.

Everything here is arithmetic on the configuration's numbers; only `count_by_construction` makes the model, on the meta
device, to check the arithmetic by a second, independent way. A matrix product with m parameters takes 2 m floating-point
operations (FLOPs) a token.
"""

import dataclasses
import re
from dataclasses import dataclass

import torch

from minglm.config import GLMConfig
from minglm.model import GLM

PRE_TRAINING_LENGTH = 4096  # tokens; report, section 2.4


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part, of the main stack up to `head`; a tied head has 0, as the embedding counts for it.

    `mtp` is the MTP layer's body: embedding and head are the main model's. The last two count again what is counted above.
    """

    embedding: int
    attention: int  # with biases
    dense_mlp: int
    router: int
    routed_experts: int
    shared_experts: int
    norms: int
    head: int
    mtp: int
    idle: int  # routed experts of the main stack that one token does not meet
    vectors: int  # norms and biases, those of the MTP layer too: AdamW's share beside the two vocabulary tables

    @property
    def main(self) -> int:
        """Of the main stack: what the published counts (355B, 106B) mean."""
        blocks = self.attention + self.dense_mlp + self.router + self.routed_experts + self.shared_experts
        return self.embedding + blocks + self.norms + self.head

    @property
    def total(self) -> int:
        """With the MTP layer: what training holds."""
        return self.main + self.mtp

    @property
    def activated(self) -> int:
        """Of the main stack, for one token, both vocabulary tables counted."""
        return self.main - self.idle

    @property
    def activated_without_input_table(self) -> int:
        """The same without the embedding, which is looked up, not multiplied by. A tied one stays: it is the head."""
        return self.activated - (self.embedding if self.head else 0)


def count(config: GLMConfig) -> ParameterCount:
    """By formula, from the configuration's numbers alone."""
    h, vocabulary = config.hidden_size, config.vocab_size * config.hidden_size
    moe_layers = config.num_moe_layers
    dense_layers = config.num_hidden_layers - moe_layers

    expert = 3 * h * config.moe_intermediate_size
    routed, shared, router = expert * config.n_routed_experts, expert * config.n_shared_experts, h * config.n_routed_experts
    biases = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim if config.attention_bias else 0
    attention = _attention_matrices(config) + biases
    norms = 2 * h + (2 * config.head_dim if config.use_qk_norm else 0)

    # One decoder layer, the norms of the embedding, of the state and before the head, and the matrix that joins two states.
    mtp_layer = attention + norms + router + routed + shared + 3 * h + 2 * h * h
    return ParameterCount(
        embedding=vocabulary,
        attention=attention * config.num_hidden_layers,
        dense_mlp=3 * h * config.intermediate_size * dense_layers,
        router=router * moe_layers,
        routed_experts=routed * moe_layers,
        shared_experts=shared * moe_layers,
        norms=norms * config.num_hidden_layers + h,
        head=0 if config.tie_word_embeddings else vocabulary,
        mtp=mtp_layer * config.num_nextn_predict_layers,
        idle=expert * (config.n_routed_experts - config.num_experts_per_tok) * moe_layers,
        vectors=(biases + norms) * config.num_hidden_layers + h + (biases + norms + 3 * h) * config.num_nextn_predict_layers,
    )


def _attention_matrices(config: GLMConfig) -> int:
    """Parameters of q, k, v and o in one layer, without biases."""
    query_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * query_width + 2 * kv_width)


# The first pattern that a parameter's name matches says its part.
_PARTS = {
    r"^mtp\.": "mtp",
    r"embed_tokens\.": "embedding",
    r"^lm_head\.": "head",
    r"norm\.weight$": "norms",
    r"\.self_attn\.": "attention",
    r"\.mlp\.gate\.": "router",
    r"\.mlp\.experts\.": "routed_experts",
    r"\.mlp\.shared_experts\.": "shared_experts",
    r"\.mlp\.\w+_proj\.": "dense_mlp",
}


def count_by_construction(config: GLMConfig) -> ParameterCount:
    """By making the model on the meta device, which takes no memory, and adding up what it has."""
    with torch.device("meta"):
        model = GLM(config)
    counts = dict.fromkeys((field.name for field in dataclasses.fields(ParameterCount)), 0)
    for name, parameter in model.named_parameters():
        part = next(part for pattern, part in _PARTS.items() if re.search(pattern, name))
        counts[part] += parameter.numel()
        if part == "routed_experts":
            counts["idle"] += parameter[config.num_experts_per_tok :].numel()
        if parameter.ndim == 1:
            counts["vectors"] += parameter.numel()
    return ParameterCount(**counts)


def forward_flops_per_token(config: GLMConfig, sequence_length: int, mtp: bool = False) -> int:
    """FLOPs of the forward pass for one token, averaged over a sequence of `sequence_length` tokens.

    2 x (activated parameters of the matrix products) + 2 x layers x heads x head_dim x sequence_length. The second term is
    causal attention: two products over, on average, half of the sequence. Norms, biases, activations and the embedding's
    look-up are not counted. `mtp`: with the MTP layer, which calls the head a second time.
    """
    h = config.hidden_size
    attention, head = _attention_matrices(config), config.vocab_size * h
    expert_parameters = 3 * h * config.moe_intermediate_size
    experts = expert_parameters * (config.num_experts_per_tok + config.n_shared_experts) + h * config.n_routed_experts
    dense_layers = config.num_hidden_layers - config.num_moe_layers

    layers = config.num_hidden_layers
    matrices = attention * layers + experts * config.num_moe_layers + head
    matrices += 3 * h * config.intermediate_size * dense_layers
    if mtp and config.num_nextn_predict_layers:
        layers += 1
        matrices += attention + experts + 2 * h * h + head
    return 2 * matrices + 2 * layers * config.num_attention_heads * config.head_dim * sequence_length


def training_flops_per_token(config: GLMConfig, sequence_length: int) -> int:
    """FLOPs of training on one token: the MTP layer included, the backward pass twice the forward pass.

    So 6 x (activated parameters of the matrix products) + 12 x layers x heads x head_dim x sequence_length / 2. What
    activation checkpointing computes again is not counted, nor is the optimiser.
    """
    return 3 * forward_flops_per_token(config, sequence_length, mtp=True)


def kv_cache_bytes_per_token(config: GLMConfig, bytes_per_number: int = 2) -> int:
    """Memory of one token's keys and values in all layers of the main stack; bf16 by default."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_number


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that training holds from step to step, the MTP layer included. Activations come on top."""

    weights: int  # fp32 master weights
    gradients: int  # fp32
    optimizer: int  # fp32: Muon's momentum for its matrices, AdamW's two moments for all else

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def training_memory(config: GLMConfig, muon: bool = True) -> TrainingMemory:
    """With Muon for all matrices but embedding and head (see `minglm.optim`), or with AdamW for everything."""
    parameters = count(config)
    tables_and_vectors = parameters.embedding + parameters.head + parameters.vectors
    adamw = tables_and_vectors if muon else parameters.total
    optimizer = 4 * (parameters.total - adamw) + 8 * adamw
    return TrainingMemory(weights=4 * parameters.total, gradients=4 * parameters.total, optimizer=optimizer)


def activation_bytes_per_token(config: GLMConfig, activation_checkpointing: bool = False) -> int:
    """What the forward pass keeps for the backward pass on a GPU under bf16 autocast, for one token of a micro-batch.

    Counted from the tensors that autograd saves: the residual stream and the norms are fp32, what enters matrix products is
    bf16. With activation checkpointing a layer keeps its fp32 input alone. The MTP layer is included. The loss comes on top
    with the logits of one chunk, about 1 GiB whatever the batch; a test holds the formula to the real thing within 5%.
    """
    h, i, k = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    heads = config.num_attention_heads + config.num_key_value_heads
    # The norm's input; its output, cast for q, k and v; QK-norm's inputs; q, k, v and output of attention; statistics.
    attention = 4 * h + 3 * 2 * h + (2 * (query + key) if config.use_qk_norm else 0) + 2 * (2 * query + 2 * key)
    attention += 4 * (2 * config.num_attention_heads + config.num_key_value_heads) + 8
    if not config.use_qk_norm:
        attention -= 4 * heads
    dense = 4 * h + 2 * h + 2 * 2 * config.intermediate_size
    # The router sees fp32; each of a token's k rows keeps its input, gate and up, and three steps of the activation.
    routed = 4 * h + 16 * config.n_routed_experts + k * (2 * h + 2 * 5 * i + 40)
    moe = 4 * h + 2 * h + 2 * 2 * i * config.n_shared_experts + routed
    mtp = config.num_nextn_predict_layers
    layers, moe_layers = config.num_hidden_layers, config.num_moe_layers
    if activation_checkpointing:
        kept = 4 * h * layers + mtp * 2 * h + attention + max(dense, moe)  # the last two: one layer at a time
    else:
        kept = layers * attention + (layers - moe_layers) * dense + moe_layers * moe
        kept += mtp * (attention + moe - 4 * h)  # its residual stream comes out of a matrix product: bf16
    ends = 4 * h + 2 * h  # input of the final norm; gradient of the hidden states, which the loss makes at once
    return kept + ends + mtp * (3 * 4 * h + 2 * 2 * h)  # two norms and the concatenation before, norm and loss after


def report(
    config: GLMConfig,
    sequence_length: int | None = None,
    tokens: int | None = None,
    device_tflops: float | None = None,
    micro_batch_tokens: int | None = None,
) -> str:
    """All of the above as a table for people.

    sequence_length: of training, for the attention's share; by default that of GLM-4.5's pre-training, 4,096, or what the
    model can take. tokens and device_tflops (what all devices together really reach, in 10^12 FLOPs a second): with both,
    the training time. micro_batch_tokens: how many go through the model at once, for the memory of the activations. Raises
    `ValueError` where one of the two is missing or a number is not above 0.
    """
    if (tokens is None) != (device_tflops is None):
        raise ValueError("the training time needs both tokens and device_tflops; only one of them is given")
    if sequence_length is None:
        sequence_length = min(PRE_TRAINING_LENGTH, config.max_position_embeddings)
    given = {"sequence_length": sequence_length, "tokens": tokens, "device_tflops": device_tflops}
    given["micro_batch_tokens"] = micro_batch_tokens
    for name, value in given.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} = {value!r}: wanted a number above 0")
    training = training_flops_per_token(config, sequence_length)
    sections = {
        "Parameters (by formula; equal to those of the model made on the meta device)": _parameter_rows(config),
        f"FLOPs per token, in sequences of {sequence_length:,}": [
            ("forward", f"{forward_flops_per_token(config, sequence_length):,}", "without the MTP layer"),
            ("training", f"{training:,}", "with the MTP layer and the backward pass"),
        ],
        "Memory in bytes": _memory_rows(config, micro_batch_tokens or sequence_length),
    }
    if tokens is not None and device_tflops is not None:
        title = f"Training on {tokens:,} tokens at {device_tflops:,g} TFLOP/s"
        sections[title] = [("time", _duration(tokens * training / (device_tflops * 1e12)), "")]
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        lines += [f"  {name:<24}{number:>24}  {note}".rstrip() for name, number, note in rows]
    return "\n".join(lines)


Row = tuple[str, str, str]  # name, number, note


def _parameter_rows(config: GLMConfig) -> list[Row]:
    parameters = count(config)
    assert parameters == count_by_construction(config), "the formula in minglm/params.py is wrong for this configuration"
    rows = []
    for part in ("embedding", "attention", "dense_mlp", "router", "routed_experts", "shared_experts", "norms", "head"):
        number = getattr(parameters, part)
        tied = part == "head" and config.tie_word_embeddings
        note = "tied to the embedding" if tied else f"{number / parameters.main:6.2%}"
        rows.append((part.replace("_", " "), f"{number:,}", note))
    sums = {
        "main stack": parameters.main,
        "MTP layer": parameters.mtp,
        "activated per token": parameters.activated,
        "  without input table": parameters.activated_without_input_table,
    }
    return rows + [(name, f"{number:,}", _short(number)) for name, number in sums.items()]


def _memory_rows(config: GLMConfig, micro_batch_tokens: int) -> list[Row]:
    cache, longest = kv_cache_bytes_per_token(config), config.max_position_embeddings
    muon, adamw = training_memory(config), training_memory(config, muon=False)
    return [
        ("KV cache per token", f"{cache:,}", "bf16"),
        ("KV cache, full length", f"{cache * longest:,}", f"{_gib(cache * longest)} for {longest:,} tokens"),
        ("weights", f"{muon.weights:,}", f"{_gib(muon.weights)}, fp32"),
        ("gradients", f"{muon.gradients:,}", f"{_gib(muon.gradients)}, fp32"),
        ("optimiser, Muon", f"{muon.optimizer:,}", f"{_gib(muon.optimizer)}; in all {_gib(muon.total)}"),
        ("optimiser, AdamW", f"{adamw.optimizer:,}", f"{_gib(adamw.optimizer)}; in all {_gib(adamw.total)}"),
        *(
            (
                name,
                f"{kept * micro_batch_tokens:,}",
                f"{_gib(kept * micro_batch_tokens)} for {micro_batch_tokens:,} tokens, bf16",
            )
            for name, kept in (
                ("activations", activation_bytes_per_token(config)),
                ("  with checkpointing", activation_bytes_per_token(config, activation_checkpointing=True)),
            )
        ),
    ]


def _short(number: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.2f} {letter}"
    return str(number)


def _gib(number: int) -> str:
    return f"{number / 2**30:,.2f} GiB"


def _duration(seconds: float) -> str:
    for unit, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:,.1f} seconds"
