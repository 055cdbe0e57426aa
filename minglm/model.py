"""GLM-4.5, whole and in one file (arXiv 2508.06471, section 2; exact operations as in Hugging Face's `glm4_moe`).

What is unusual about this architecture:
- attention with 2.5 times the usual number of heads, grouped keys and values, biases on q, k and v, RoPE on half of each
  head, and (in GLM-4.5, not in Air) RMSNorm on queries and keys;
- deep and narrow: the first layers are dense, all others a mixture of many small experts beside one shared expert;
- a sigmoid router that chooses by score plus a bias, weighs by the score alone, and learns the bias outside of autograd,
  from the load (loss-free balancing, arXiv 2408.15664);
- one more layer that predicts the token after the next (multi-token prediction, MTP).

Shapes: b batch, t sequence, h hidden, d head, v vocabulary. In routing code suffixes say the layout: N tokens, K experts
per token, E experts, H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minglm import ops
from minglm.config import GLMConfig


class Linear(nn.Linear):
    """A projection whose product is an operation of `ops`, so that a gear can replace it."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned weight, statistics in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Rotary(NamedTuple):
    """Cosines and sines of RoPE's angles at the positions in use, fp32, (t, rotary_dim / 2)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, config: GLMConfig) -> "Rotary":
        """positions (t,) int. The inverse frequencies are spread over the *rotated* part of a head."""
        return cls.turned(positions, cls.inverse_frequencies(config, positions.device))

    @staticmethod
    def inverse_frequencies(config: GLMConfig, device: torch.device) -> Tensor:
        """fp32 (rotary_dim / 2,)."""
        exponents = torch.arange(0, config.rotary_dim, 2, device=device, dtype=torch.float32) / config.rotary_dim
        return 1.0 / config.rope_theta**exponents

    @classmethod
    def turned(cls, positions: Tensor, inverse_frequencies: Tensor) -> "Rotary":
        """The same from frequencies that are kept: a decoding step would spend as long on them as on a layer's attention."""
        angles = positions.float()[:, None] * inverse_frequencies
        return cls(angles.cos(), angles.sin())


class Cache(Protocol):
    """What the model asks of a cache of keys and values: where the new tokens stand, and to attend to all that they see.

    A pass over t new tokens calls `begin(t)` first, then `attend` for each layer, then `end(t)`.
    """

    def begin(self, t: int) -> Rotary:
        """-> the angles at the positions of the new tokens, the same for each row of the batch."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep k and v (b, t, kv_heads, d) of the new tokens; -> the attention of q (b, t, heads, d), in q's shape."""

    def end(self, t: int) -> None:
        """All layers have kept their keys and values."""


class KVCache:
    """Keys and values of all layers for one batch of sequences of equal length, in one preallocated block.

    keys and values: (layers, b, max_length, kv_heads, d). `length` tokens are filled. The engine's paged cache is in
    `minglm/engine/cache.py`.
    """

    def __init__(self, config: GLMConfig, batch: int, max_length: int, device=None, dtype: torch.dtype = torch.float32):
        self.config = config
        shape = (config.num_hidden_layers, batch, max_length, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def begin(self, t: int) -> Rotary:
        end = self.length + t
        if end > self.keys.shape[2]:
            raise ValueError(f"the KV cache holds {self.keys.shape[2]} tokens; position {end - 1} does not fit")
        positions = torch.arange(self.length, end, device=self.keys.device)
        # Several queries behind the cached keys: causal from the position of each. One sees all there is.
        keys = torch.arange(end, device=self.keys.device)
        self.visible = rearrange(positions[:, None] >= keys, "t s -> 1 1 t s") if t > 1 else None
        return Rotary.at(positions, self.config)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = self.length + q.shape[1]
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return ops.attention(q, self.keys[layer, :, :end].to(q.dtype), self.values[layer, :, :end].to(q.dtype), self.visible)

    def end(self, t: int) -> None:
        self.length += t


class Attention(nn.Module):
    """Grouped-query attention with partial RoPE and optional QK-norm (norm before RoPE)."""

    def __init__(self, config: GLMConfig):
        super().__init__()
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = Linear(query_width, config.hidden_size, bias=False)
        # One weight of size head_dim for all heads.
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()

    def forward(self, x: Tensor, rotary: Rotary, visible: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))  # (b, t, heads, d)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = ops.rotary(self.q_norm(q), *rotary)
        k = ops.rotary(self.k_norm(k), *rotary)
        out = ops.attention(q, k, v, visible) if cache is None else cache.attend(layer, q, k, v)
        return self.o_proj(out.flatten(2))  # (b, t, heads * d)


class MLP(nn.Module):
    """SwiGLU feed-forward network without biases: the dense layers and the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class RouterStatistics(NamedTuple):
    """What a MoE layer reports of one forward pass. Returned, never stored by the layer: activation checkpointing runs the
    layer twice and must not count twice (torchtitan#1593)."""

    experts: Tensor  # (N, K) int64: the experts chosen for each token
    load: Tensor | None  # (E,) int64: tokens each expert was given, padding left out; None with a cache, where nothing learns
    balance: Tensor | None  # fp32 scalar: sequence-level balance loss, summed over the batch's sequences; None with a cache


class Router(nn.Module):
    """Sigmoid top-k router, in fp32 from end to end. `weight` (E, H); `e_score_correction_bias` (E,) learned from the load."""

    def __init__(self, config: GLMConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        self.replayed: Tensor | None = None  # (N, K): see `GLM.replaying`

    def _apply(self, fn, recurse: bool = True):
        """`model.bfloat16()` must not reach the bias: its steps of 0.001 vanish in bf16 (sglang#31213)."""
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        self.e_score_correction_bias = exact.to(moved.device) if moved.dtype != torch.float32 else moved
        return self

    def forward(self, x_NH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, H) -> the chosen experts (N, K) int64, their weights (N, K) fp32, all scores (N, E) fp32."""
        scores_NE = ops.router_scores(x_NH, self.weight)
        experts_NK = self.choose(scores_NE.detach())
        if self.replayed is not None:
            experts_NK = torch.where(self.replayed < 0, experts_NK, self.replayed)
        weights_NK = scores_NE.gather(1, experts_NK)  # without the bias: it chooses and never weighs
        if self.config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return experts_NK, weights_NK * self.config.routed_scaling_factor, scores_NE

    def choose(self, scores_NE: Tensor) -> Tensor:
        """The best K by score plus bias; with groups, only among the best groups, judged by their two best experts."""
        biased_NE = scores_NE + self.e_score_correction_bias
        if self.config.n_group > 1:
            grouped = rearrange(biased_NE, "n (group e) -> n group e", group=self.config.n_group)
            group_score = grouped.topk(2, dim=-1).values.sum(-1)  # (n, group)
            best = group_score.topk(self.config.topk_group, dim=-1).indices
            kept = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, best, True)
            grouped = grouped.masked_fill(~kept[..., None], float("-inf"))
            biased_NE = rearrange(grouped, "n group e -> n (group e)")
        return biased_NE.topk(self.config.num_experts_per_tok, dim=-1, sorted=False).indices


def sequence_balance_loss(scores: Tensor, experts: Tensor, real: Tensor) -> Tensor:
    """DeepSeek-V3's balance loss (arXiv 2412.19437, eq. 17-20), summed over the sequences: an fp32 scalar.

    scores (b, t, E), experts (b, t, K), real (b, t) bool, False at padding. For each sequence, sum over experts of f * P:
    f = E / (K * tokens) * count, P = mean of the scores normalised over experts. Balanced routing gives about 1.
    """
    num_experts, k = scores.shape[-1], experts.shape[-1]
    tokens = real.sum(1, keepdim=True).clamp(min=1)  # (b, 1)
    given = real[..., None].expand_as(experts).to(scores.dtype)
    count = scores.new_zeros(scores.shape[0], num_experts).scatter_add(1, experts.flatten(1), given.flatten(1))  # (b, E)
    share = scores / scores.sum(-1, keepdim=True)
    mean_share = torch.einsum("bte,bt->be", share, real.to(share.dtype)) / tokens
    return (count * (num_experts / k) / tokens * mean_share).sum()


class Experts(nn.Module):
    """The routed experts' SwiGLU weights, stacked: one grouped product a projection, however many experts there are."""

    def __init__(self, config: GLMConfig):
        super().__init__()
        e, h, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, h))
        self.down_proj = nn.Parameter(torch.empty(e, h, i))

    def forward(self, x_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        return ops.routed_experts(x_NH, experts_NK, weights_NK, self.gate_up_proj, self.down_proj)


class LocalDispatcher:
    """Brings tokens to their experts where one device holds all experts: there is nothing to bring.

    Expert parallelism puts another object into `MoE.dispatcher`, which exchanges the tokens between devices, lets each
    device's experts work on what has arrived, and exchanges the results back. The model's code stays the same.
    """

    def __call__(self, experts: Experts, x_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """-> the weighted sum of each token's experts (N, H)."""
        return experts(x_NH, experts_NK, weights_NK)


class MoE(nn.Module):
    """Routed experts plus the shared expert, which sees every token and is not scaled."""

    def __init__(self, config: GLMConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)
        self.dispatcher = LocalDispatcher()

    def forward(self, x: Tensor, real: Tensor | None, counted: bool = True) -> tuple[Tensor, RouterStatistics]:
        """x (b, t, H), real (b, t) bool, False at padding (None: no padding) -> (b, t, H) and the statistics, those for
        training only if `counted`."""
        b, t, _ = x.shape
        x_NH = x.flatten(0, 1)
        experts_NK, weights_NK, scores_NE = self.gate(x_NH)
        routed_NH = self.dispatcher(self.experts, x_NH, experts_NK, weights_NK)
        out = routed_NH.view_as(x) + self.shared_experts(x)
        if not counted:
            return out, RouterStatistics(experts_NK, None, None)

        real = torch.ones(b, t, dtype=torch.bool, device=x.device) if real is None else real
        given = rearrange(real, "b t -> (b t) 1").expand_as(experts_NK).long()
        load = torch.zeros(scores_NE.shape[1], dtype=torch.int64, device=x.device)
        load.scatter_add_(0, experts_NK.flatten(), given.flatten())
        balance = sequence_balance_loss(
            rearrange(scores_NE, "(b t) e -> b t e", b=b), rearrange(experts_NK, "(b t) k -> b t k", b=b), real
        )
        return out, RouterStatistics(experts_NK, load, balance)


class DecoderLayer(nn.Module):
    """Attention, then a dense or a mixture-of-experts feed-forward network, each behind a norm and around a residual."""

    def __init__(self, config: GLMConfig, index: int):
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = index >= config.first_k_dense_replace
        self.mlp = MoE(config) if self.is_moe else MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, h: Tensor, rotary: Rotary, visible: Tensor | None, real: Tensor | None, cache: Cache | None = None
    ) -> tuple[Tensor, RouterStatistics | None]:
        h = h + self.self_attn(self.input_layernorm(h), rotary, visible, cache, self.index)
        x = self.post_attention_layernorm(h)
        if not self.is_moe:
            return h + self.mlp(x), None
        out, statistics = self.mlp(x, real, counted=cache is None)
        return h + out, statistics


class Trunk(nn.Module):
    """Embedding, decoder layers, final norm: what Hugging Face calls `model`."""

    def __init__(self, config: GLMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class SharedHead(nn.Module):
    """The MTP layer's own norm before the head that it shares with the main model."""

    def __init__(self, config: GLMConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTP(nn.Module):
    """Multi-token prediction: from the trunk's state at t and the token at t + 1, one more decoder layer predicts t + 2.

    Embedding and head are the main model's (DeepSeek-V3, arXiv 2412.19437, section 2.2; report, section 2.1).
    """

    def __init__(self, config: GLMConfig):
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = DecoderLayer(config, max(config.num_hidden_layers, config.first_k_dense_replace))  # always MoE
        self.shared_head = SharedHead(config)

    def combine(self, next_embedding: Tensor, hidden: Tensor) -> Tensor:
        """next_embedding: of the tokens at t + 1; hidden: trunk's output at t, after its final norm; both (b, t, h)."""
        return self.eh_proj(torch.cat([self.enorm(next_embedding), self.hnorm(hidden)], dim=-1))


@dataclass(frozen=True)
class GLMOutput:
    """`logits` (b, t, v); `hidden_states` (b, t, h) after the final norm; `mtp_logits` (b, t - 1, v) when asked for."""

    logits: Tensor
    hidden_states: Tensor
    mtp_logits: Tensor | None = None


class LossTotals(NamedTuple):
    """What each part of the loss is averaged over: targets of the head, targets of the MTP layer, sequences. int64 scalars,
    on the device; add those of all micro-batches and ranks, so that a split batch gives the gradient of the whole."""

    lm: Tensor
    mtp: Tensor
    sequences: Tensor


class Loss(NamedTuple):
    """fp32 scalars: total = lm + mtp_weight * mtp + balance_weight * balance. Cross-entropies are in nats per target."""

    total: Tensor
    lm: Tensor
    mtp: Tensor
    balance: Tensor


class GLM(nn.Module):
    """GLM-4.5 for causal language modelling: trunk `model`, `lm_head`, and the MTP layer under `mtp` (None without one).

    Works in training on any device and dtype, and on the meta device. Parameter names are those of `Glm4MoeForCausalLM`.
    """

    def __init__(self, config: GLMConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MTP(config) if config.num_nextn_predict_layers else None
        self.tie_weights()
        # Recompute each layer in the backward pass instead of keeping its activations.
        self.activation_checkpointing = False
        # Tokens given to each expert since the last `update_router_bias`, (MoE layers, E); the MTP layer's row is last.
        load = torch.zeros(len(self.routers()), config.n_routed_experts, dtype=torch.int64)
        self.register_buffer("expert_load", load, persistent=False)
        self.initialize()

    def tie_weights(self) -> None:
        """With tied embeddings, make head and embedding one parameter again, after something gave each its own memory."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all weights anew from torch's generator: matrices normal with `initializer_range`, norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            self.draw(name, parameter)
        for router in self.routers():
            router.e_score_correction_bias.zero_()
        self.expert_load.zero_()

    @torch.no_grad()
    def draw(self, name: str, values: Tensor) -> None:
        """Write the first values of the parameter called `name` into `values`, which has its whole shape."""
        if name.endswith("bias"):
            values.zero_()
        elif "norm" in name:
            values.fill_(1.0)
        else:
            values.normal_(std=self.config.initializer_range)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = None, device="cpu") -> "GLM":
        """Read a Hugging Face folder; see `minglm.checkpoint.load_model`."""
        from minglm.checkpoint import load_model  # the one import that looks upwards: for the name users expect here

        return load_model(folder, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = 5 * 2**30) -> None:
        """Write a Hugging Face folder; see `minglm.checkpoint.save_model`."""
        from minglm.checkpoint import save_model

        save_model(self, folder, max_shard_bytes)

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        mtp: bool = False,
    ) -> GLMOutput:
        """input_ids (b, t) int64 -> `GLMOutput`.

        document_ids (b, t) int: tokens see only their own document; -1 marks padding. cache: the tokens continue those that
        it holds. mtp: also the MTP layer's logits, whose position t predicts token t + 2. Raises `ValueError` for ids
        outside the vocabulary (on CPU), for `mtp` without an MTP layer, or for document_ids together with a cache.
        """
        self._check(input_ids, document_ids, cache, mtp)
        hidden, _ = self._run_trunk(input_ids, document_ids, cache)
        mtp_logits = None
        if mtp:
            mtp_hidden, _ = self._run_mtp(hidden, input_ids, document_ids)
            mtp_logits = self.lm_head(mtp_hidden)
        return GLMOutput(self.lm_head(hidden), hidden, mtp_logits)

    def step(self, input_ids: Tensor, cache: Cache) -> tuple[Tensor, Tensor | None]:
        """What an engine asks of the trunk: input_ids (b, t) int64 continue what `cache` holds. -> the states after the final
        norm (b, t, h), for `lm_head`; the experts of each token (MoE layers, b * t, K) int64, None without MoE layers."""
        hidden, statistics = self._run_trunk(input_ids, None, cache)
        return hidden, torch.stack([s.experts for s in statistics]) if statistics else None

    def hidden_and_experts(self, input_ids: Tensor, document_ids: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """input_ids, document_ids (b, t) as in `forward` -> the states after the final norm (b, t, h), and the experts of each
        token (MoE layers, b * t, K) int64, None without MoE layers. Nothing counts as load."""
        self._check(input_ids, document_ids, None, False)
        hidden, statistics = self._run_trunk(input_ids, document_ids, None)
        return hidden, torch.stack([s.experts for s in statistics]) if statistics else None

    @contextmanager
    def replaying(self, experts: Tensor | None) -> Iterator[None]:
        """Within the block tokens go to the experts that were chosen for them before, as RL wants it where sampler and trainer
        would choose differently: experts (MoE layers of the trunk, b * t, K) int64, -1 where a token's own choice holds; None
        replays nothing. Only the choice is replayed: the weights are of the present scores, and gradients reach the router.
        With activation checkpointing the backward pass belongs into the block."""
        routers = [layer.mlp.gate for layer in self.model.layers if layer.is_moe]
        try:
            for router, chosen in zip(routers, [None] * len(routers) if experts is None else experts, strict=True):
                router.replayed = chosen
            yield
        finally:
            for router in routers:
                router.replayed = None

    def mtp_step(self, hidden: Tensor, next_ids: Tensor, cache: Cache) -> Tensor:
        """The same for the MTP layer: hidden (b, t, h), the trunk's states or, for drafts beyond the first, what this method
        returned; next_ids (b, t) int64, the tokens after each. -> normed states (b, t, h): their logits are of the token
        after that. The layer's entries of `cache` have the positions of `next_ids`."""
        x = self.mtp.combine(self.model.embed_tokens(next_ids), hidden)
        t = x.shape[1]
        h, _ = self.mtp.layer(x, cache.begin(t), None, None, cache)
        cache.end(t)
        return self.mtp.shared_head.norm(h)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        document_ids: Tensor | None = None,
        mtp_weight: float = 0.3,
        balance_weight: float = 1e-4,
        totals: LossTotals | None = None,
        detach_trunk: bool = False,
    ) -> Loss:
        """The training loss (report, section 2.2). No logits of the whole batch are ever held.

        input_ids, labels, document_ids (b, t); labels are already shifted (labels[t] is token t + 1), -100 is ignored. The
        MTP loss at t predicts labels[t + 1], where t and t + 1 are of one document. The balance loss is summed over MoE
        layers and averaged over sequences. `totals`: the denominators, from `count_targets` over the whole step; None means
        this batch alone. `detach_trunk` keeps the MTP loss out of the main model, embedding and head included: it then trains
        the MTP layer alone, as RL wants it (SkyRL#1832). In training mode, `expert_load` grows by the tokens that each
        expert was given. Raises `ValueError` for shapes that differ and (on CPU) for ids and labels outside the vocabulary.
        """
        hidden, mtp, balance = self.hidden_and_side_losses(input_ids, labels, document_ids, totals, detach_trunk)
        totals = self.count_targets(labels, document_ids) if totals is None else totals
        lm = self._cross_entropy(hidden, labels) / totals.lm.clamp(min=1)
        return Loss(lm + mtp_weight * mtp + balance_weight * balance, lm, mtp, balance)

    def hidden_and_side_losses(
        self,
        input_ids: Tensor,
        labels: Tensor,
        document_ids: Tensor | None = None,
        totals: LossTotals | None = None,
        detach_trunk: bool = False,
        with_mtp: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `loss` is made of, for objectives that ask something else of the head, as RL does: the states after the final
        norm (b, t, h), the MTP loss and the balance loss. Arguments and what is raised as in `loss`; without `with_mtp` the MTP
        layer, a quarter to a third of a small model's work, is left out, and its loss is 0."""
        self._check(input_ids, document_ids, None, False)
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels have shape {tuple(labels.shape)}: wanted input_ids' {tuple(input_ids.shape)}")
        self._check_vocabulary("labels", labels.masked_fill(labels == -100, 0))
        totals = self.count_targets(labels, document_ids) if totals is None else totals
        hidden, statistics = self._run_trunk(input_ids, document_ids, None)
        mtp = torch.zeros((), device=hidden.device)
        if with_mtp and self.mtp is not None and input_ids.shape[1] > 1:
            mtp_hidden, mtp_statistics = self._run_mtp(hidden, input_ids, document_ids, detach_trunk)
            statistics.append(mtp_statistics)
            mtp_labels = self._mtp_labels(labels, document_ids)
            mtp = self._cross_entropy(mtp_hidden, mtp_labels, detach_trunk) / totals.mtp.clamp(min=1)
        balance = torch.zeros((), device=hidden.device)
        if statistics:
            balance = torch.stack([s.balance for s in statistics]).sum() / totals.sequences.clamp(min=1)
            if self.training:
                self.expert_load[: len(statistics)] += torch.stack([s.load for s in statistics])
        return hidden, mtp, balance

    def count_targets(self, labels: Tensor, document_ids: Tensor | None = None) -> LossTotals:
        """The denominators of `loss` for labels and document_ids (b, t); add them up over the micro-batches of a step."""
        mtp = (self._mtp_labels(labels, document_ids) != -100).sum()
        real = torch.ones_like(labels, dtype=torch.bool) if document_ids is None else document_ids >= 0
        return LossTotals((labels != -100).sum(), mtp, real.any(1).sum())

    @torch.no_grad()
    def update_router_bias(self, rate: float) -> Tensor:
        """Loss-free balancing, once an optimiser step: bias += rate * sign(mean load - load), then the counts restart.

        A layer whose router is frozen keeps its bias (Megatron-LM#4785). Under data parallelism sum `expert_load` over the
        ranks first. Returns the maximal violation of each MoE layer, max load / mean load - 1, fp32 (layers,).
        """
        load, num_experts = self.expert_load, self.config.n_routed_experts
        total = load.sum(1, keepdim=True)
        # Whole numbers compare exactly where bf16 would flip signs (Megatron-LM#7081): mean > load, times the experts.
        steps = rate * torch.sign(total - num_experts * load).float()
        for router, step in zip(self.routers(), steps, strict=True):
            if router.weight.requires_grad:
                router.e_score_correction_bias += step
        share = load.amax(1) * num_experts / total[:, 0].clamp(min=1)  # of the busiest expert, 1 = fair
        max_violation = torch.where(total[:, 0] > 0, share - 1, 0.0)  # a layer that saw no token violates nothing
        self.expert_load.zero_()
        return max_violation.float()

    def routers(self) -> list[Router]:
        """The routers of all MoE layers in order; the MTP layer's is last."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def _check(self, input_ids: Tensor, document_ids: Tensor | None, cache: Cache | None, mtp: bool) -> None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}: wanted (batch, sequence)")
        self._check_vocabulary("input_ids", input_ids)
        if document_ids is not None and document_ids.shape != input_ids.shape:
            raise ValueError(f"document_ids have shape {tuple(document_ids.shape)}: wanted {tuple(input_ids.shape)}")
        if document_ids is not None and cache is not None:
            raise ValueError("document_ids and a KV cache cannot be used together")
        if mtp and self.mtp is None:
            raise ValueError("mtp=True, but this model has no MTP layer (num_nextn_predict_layers = 0, or not in its folder)")
        if mtp and cache is not None:
            raise ValueError("mtp=True and a KV cache cannot be used together")

    def _check_vocabulary(self, name: str, ids: Tensor) -> None:
        # Looking at the values would make the host wait for another device, so only the CPU looks.
        if ids.device.type == "cpu" and ids.numel():
            low, high = ids.aminmax()
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"{name} hold {low} to {high}: wanted 0 to {self.config.vocab_size - 1}, the vocabulary")

    def _run_trunk(
        self, input_ids: Tensor, document_ids: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, list[RouterStatistics]]:
        """-> the states after the final norm (b, t, h), and the statistics of the MoE layers."""
        h = self.model.embed_tokens(input_ids)
        t = input_ids.shape[1]
        rotary = Rotary.at(torch.arange(t, device=h.device), self.config) if cache is None else cache.begin(t)
        visible = None if document_ids is None else ops.document_mask(document_ids)
        real = None if document_ids is None else document_ids >= 0
        statistics = []
        for layer in self.model.layers:
            h, layer_statistics = self._run_layer(layer, h, rotary, visible, real, cache)
            if layer_statistics is not None:
                statistics.append(layer_statistics)
        if cache is not None:
            cache.end(t)
        return self.model.norm(h), statistics

    def _run_mtp(
        self, hidden: Tensor, input_ids: Tensor, document_ids: Tensor | None, detach_trunk: bool = False
    ) -> tuple[Tensor, RouterStatistics]:
        """hidden (b, t, h) from the trunk -> the MTP layer's normed states (b, t - 1, h), and its statistics."""
        next_embedding = self.model.embed_tokens(input_ids[:, 1:])
        if detach_trunk:
            next_embedding, hidden = next_embedding.detach(), hidden.detach()
        x = self.mtp.combine(next_embedding, hidden[:, :-1])
        # Only differences of positions matter to RoPE, so the shift by one token needs no care.
        rotary = Rotary.at(torch.arange(x.shape[1], device=x.device), self.config)
        # A document's last position mixes in the first token of the next one. No target hangs on it, its own document has no
        # later token that could attend to it, and as padding it counts neither as load nor in the balance loss.
        visible = None if document_ids is None else ops.document_mask(document_ids[:, :-1])
        real = None
        if document_ids is not None:
            real = (document_ids[:, :-1] >= 0) & (document_ids[:, :-1] == document_ids[:, 1:])
        h, statistics = self._run_layer(self.mtp.layer, x, rotary, visible, real, None)
        return self.mtp.shared_head.norm(h), statistics

    def _run_layer(self, layer: DecoderLayer, *inputs) -> tuple[Tensor, RouterStatistics | None]:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def _cross_entropy(self, hidden: Tensor, labels: Tensor, detach_head: bool = False) -> Tensor:
        """Summed over targets: hidden (b, t, h), labels (b, t)."""
        head = self.lm_head.weight.detach() if detach_head else self.lm_head.weight
        return ops.linear_cross_entropy(rearrange(hidden, "b t h -> (b t) h"), head, rearrange(labels, "b t -> (b t)"))

    @staticmethod
    def _mtp_labels(labels: Tensor, document_ids: Tensor | None) -> Tensor:
        """Targets of the MTP layer (b, t - 1): labels of the next position, unless that is in another document."""
        shifted = labels[:, 1:]
        if document_ids is None:
            return shifted
        return shifted.masked_fill(document_ids[:, 1:] != document_ids[:, :-1], -100)
