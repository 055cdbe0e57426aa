"""The model as the engine asks for it, on a CPU: `GLM`'s `step`, `mtp_step` and `lm_head` through the loops of `loops.py`.

`GLM` itself answers where the loops do not reach: other devices and dtypes, autocast, experts on other ranks, and steps of so
many tokens that PyTorch's products and attention are the faster ones.
"""

import os

import numba
import numpy as np
import torch
from torch import Tensor, nn

from minglm import ops
from minglm.engine import loops
from minglm.engine.cache import CacheView
from minglm.model import GLM, MLP, DecoderLayer, LocalDispatcher

MOST_TOKENS = 2048


class CompiledModel:
    """`model`, in fp32 on a CPU. The loops work in the memory of its parameters: new values are seen at once, new memory at the
    next call. Hooks of modules are not called."""

    def __init__(self, model: GLM):
        self.model, self.config = model, model.config
        c = model.config
        scale = float(c.routed_scaling_factor)
        self._routing = loops.Routing(c.num_experts_per_tok, c.n_group, c.topk_group, c.norm_topk_prob, scale)
        # Parameters and buffers by their owners and names: loading and moving a model may put others in their place.
        owned = [(table, name) for m in model.modules() for table in (m._parameters, m._buffers) for name in table]
        self._owned = [(table, name) for table, name in owned if table[name] is not None]
        self._addresses: list[int] = []
        self._reached = False

    def step(self, input_ids: Tensor, view: CacheView) -> tuple[Tensor, Tensor | None]:
        """As `GLM.step`: input_ids (1, n) -> states (1, n, h) and the experts of each token (MoE layers, n, K)."""
        if not self._reaches(input_ids.numel(), view.cache.keys):
            return self.model.step(input_ids, view)
        threads = threads_allowed()
        h = self._embedding[input_ids[0].numpy()]
        places = self._places(view)
        cache = view.cache.keys.numpy(), view.cache.values.numpy()
        experts = [self._run(layer, h, places, cache, threads) for layer in self._layers]
        loops.rms_norm(h, self._norm, self.config.rms_norm_eps, h)
        experts = [chosen for chosen in experts if chosen is not None]
        return torch.from_numpy(h)[None], torch.from_numpy(np.stack(experts)) if experts else None

    def mtp_step(self, hidden: Tensor, next_ids: Tensor, view: CacheView) -> Tensor:
        """As `GLM.mtp_step`: hidden (1, n, h), next_ids (1, n) -> normed states (1, n, h)."""
        if not self._reaches(next_ids.numel(), view.cache.keys):
            return self.model.mtp_step(hidden, next_ids, view)
        threads, eps = threads_allowed(), self.config.rms_norm_eps
        enorm, hnorm, eh_proj, layer, norm = self._mtp
        h = np.zeros(hidden.shape[1:], dtype=np.float32)
        loops.combine(self._embedding[next_ids[0].numpy()], hidden[0].numpy(), enorm, hnorm, eh_proj, eps, h, threads)
        cache = view.cache.keys.numpy(), view.cache.values.numpy()
        self._run(layer, h, self._places(view), cache, threads)
        loops.rms_norm(h, norm, eps, h)
        return torch.from_numpy(h)[None]

    def lm_head(self, hidden: Tensor) -> Tensor:
        """hidden (n, h), which the last step gave -> logits (n, v)."""
        if hidden.dtype != torch.float32 or not self._reached or ops.autocasts("cpu"):
            return self.model.lm_head(hidden)
        logits = np.zeros((len(hidden), len(self._head)), dtype=np.float32)
        loops.linear(hidden.numpy(), self._head, logits, threads_allowed())
        return torch.from_numpy(logits)

    def _reaches(self, tokens: int, cache: Tensor | None = None) -> bool:
        """Whether the loops can do this. Looks for new memory of the parameters first."""
        addresses = [table[name].data_ptr() for table, name in self._owned]
        if addresses != self._addresses:
            self._addresses, self._reached = addresses, is_plain(self.model)
            if self._reached:
                self._share_memory()
        wanted = cache is None or (cache.dtype == torch.float32 and cache.device.type == "cpu")
        return self._reached and wanted and tokens <= MOST_TOKENS and not ops.autocasts("cpu")

    def _share_memory(self) -> None:
        model = self.model
        self._embedding, self._norm = shared(model.model.embed_tokens.weight), shared(model.model.norm.weight)
        self._head = shared(model.lm_head.weight)
        self._layers = [(layer.index, *self._weights(layer)) for layer in model.model.layers]
        if model.mtp is not None:
            m = model.mtp
            each = (m.enorm.weight, m.hnorm.weight, m.eh_proj.weight), (m.shared_head.norm.weight,)
            self._mtp = *map(shared, each[0]), (m.layer.index, *self._weights(m.layer)), *map(shared, each[1])

    @staticmethod
    def _weights(layer: DecoderLayer) -> tuple[loops.AttentionWeights, loops.MLPWeights | loops.MoEWeights]:
        attention, mlp = layer.self_attn, layer.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        biases = (torch.zeros(len(p.weight)) if p.bias is None else p.bias for p in projections)
        norms = (getattr(norm, "weight", torch.zeros(0)) for norm in (attention.q_norm, attention.k_norm))
        tensors = [layer.input_layernorm.weight, *(p.weight for p in projections), *biases, *norms, attention.o_proj.weight]
        of_attention = loops.AttentionWeights(*map(shared, tensors))
        dense = mlp if isinstance(mlp, MLP) else mlp.shared_experts
        tensors = [dense.gate_proj.weight, dense.up_proj.weight, dense.down_proj.weight]
        norm = shared(layer.post_attention_layernorm.weight)
        if dense is mlp:
            return of_attention, loops.MLPWeights(norm, *map(shared, tensors))
        gate, experts = mlp.gate, mlp.experts
        tensors = [gate.weight, gate.e_score_correction_bias, experts.gate_up_proj, experts.down_proj, *tensors]
        return of_attention, loops.MoEWeights(norm, *map(shared, tensors))

    def _places(self, view: CacheView) -> loops.Places:
        cache = view.cache
        angles = view.positions.astype(np.float32)[:, None] * cache.inverse_frequencies.numpy()  # `Rotary.turned`
        where = view.token_rows, view.positions, view.token_slots, cache.table, cache.block_size, view.first_key
        return loops.Places(*where, np.cos(angles), np.sin(angles))

    def _run(
        self, layer: tuple, h: np.ndarray, places: loops.Places, cache: tuple[np.ndarray, np.ndarray], threads: int
    ) -> np.ndarray | None:
        """One layer, in place; cache: keys and values of all layers -> the experts of each token, if it has some."""
        index, attention, mlp = layer
        eps, (keys, values) = self.config.rms_norm_eps, cache
        loops.attention(h, attention, places, keys[index], values[index], eps, threads)
        if isinstance(mlp, loops.MLPWeights):
            return loops.mlp(h, mlp, eps, threads)
        return loops.moe(h, mlp, self._routing, eps, threads)


def shared(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor as an array."""
    return tensor.detach().numpy()


def is_plain(model: GLM) -> bool:
    """Whether all weights are contiguous fp32 on the CPU, whole (no DTensor), and all experts here."""
    tensors = [*model.parameters(), *(router.e_score_correction_bias for router in model.routers())]
    return all(
        type(t) in (nn.Parameter, Tensor) and t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous()
        for t in tensors
    ) and all(isinstance(m.dispatcher, LocalDispatcher) for m in model.modules() if hasattr(m, "dispatcher"))


# GNU's OpenMP, once used, must not be used again in a forked child: such a child computes on one thread.
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def threads_allowed() -> int:
    """`torch.get_num_threads()`, and numba told so. One where numba has no OpenMP (its own threads take turns too slowly)."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if threads == 1 or _forked or numba.threading_layer() == "workqueue":
        return 1
    if numba.get_num_threads() != threads:
        numba.set_num_threads(threads)
    return threads
