"""A decoder layer for few tokens, written as plain loops that numba compiles for the CPU at hand.

A decoding step of a small model is many tiny operations, and calling one costs more than it computes. Here a layer is two
calls. Each function stands for the lines of `minglm/model.py` that it names, on numpy arrays that share the memory of the
model's parameters and of the paged cache: nothing is copied, padded or gathered. All values are fp32.

Shapes: n tokens of any number of sequences, side by side; h hidden, d head, e experts, k experts per token, i width of an
expert, r = n * k rows, one for each token and expert of it, sorted by expert.

numba keeps what it has compiled beside this file or in the user's cache directory, so that only the first run waits for it
(about 15 seconds). All compiled functions stand in this one file, because a change to it makes numba compile them again.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, prange
from numpy import ndarray

# Sums may be added in another order, which is what lets LLVM use vectors. NaN and infinity keep their meaning.
OPTIONS = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy", "nogil": True}
# Multiplications that are worth a second thread: starting one costs a few microseconds.
WORTH_A_THREAD = 2**18


def compiled(function=None, **options):
    """Decorator: numba's, with its cache where one can be written."""
    if function is None:
        return lambda function: compiled(function, **options)
    try:
        return njit(cache=True, **OPTIONS, **options)(function)
    except RuntimeError:  # neither this folder nor the user's cache directory can be written: compile in every run
        return njit(**OPTIONS, **options)(function)


# Only loops that say `prange` run on several threads; numba need not look for others.
EXPLICIT = {
    name: name == "prange" for name in ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion", "prange")
}
threaded = compiled(parallel=EXPLICIT)


class AttentionWeights(NamedTuple):
    """`input_layernorm` and `self_attn` of a layer. Biases are zeros where the model has none; the norms of queries and keys
    are then empty."""

    norm: ndarray  # (h,)
    q: ndarray  # (heads * d, h)
    k: ndarray  # (kv_heads * d, h)
    v: ndarray
    q_bias: ndarray
    k_bias: ndarray
    v_bias: ndarray
    q_norm: ndarray  # (d,) or (0,)
    k_norm: ndarray
    o: ndarray  # (h, heads * d)


class MLPWeights(NamedTuple):
    """`post_attention_layernorm` and a dense `mlp`."""

    norm: ndarray
    gate: ndarray  # (i, h)
    up: ndarray
    down: ndarray  # (h, i)


class MoEWeights(NamedTuple):
    """`post_attention_layernorm` and a mixture-of-experts `mlp`."""

    norm: ndarray
    router: ndarray  # (e, h)
    router_bias: ndarray  # (e,)
    gate_up: ndarray  # (e, 2i, h)
    down: ndarray  # (e, h, i)
    shared_gate: ndarray
    shared_up: ndarray
    shared_down: ndarray


class Routing(NamedTuple):
    """What the router is told by the configuration."""

    k: int
    groups: int
    groups_kept: int
    normalise: bool
    scale: float


class Places(NamedTuple):
    """Where a step's tokens stand, each (n,) int64 but for the angles."""

    rows: ndarray  # of the block table
    positions: ndarray
    slots: ndarray  # of the cache: where their keys and values go
    table: ndarray  # (rows, blocks) int64
    block_size: int
    first_key: int  # earlier positions hold nothing
    cos: ndarray  # (n, rotary_dim / 2)
    sin: ndarray


# ------------------------------------------------------------------------------------------------------------- products


@compiled
def add_products(x, x_rows, weight, first, last, out, out_rows):
    """out[out_rows[j], o] += x[x_rows[j]] . weight[o], for outputs o from `first` to `last`.

    Four tokens by four outputs at a time: eight loads for sixteen products. Sixteen sums fit a CPU's vector registers.
    """
    n, width = len(x_rows), weight.shape[1]
    zero = np.float32(0)
    o = first
    while o + 4 <= last:
        j = 0
        while j + 4 <= n:
            a, b, c, d = x_rows[j], x_rows[j + 1], x_rows[j + 2], x_rows[j + 3]
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = zero
            for i in range(width):
                w0, w1, w2, w3 = weight[o, i], weight[o + 1, i], weight[o + 2, i], weight[o + 3, i]
                xa, xb, xc, xd = x[a, i], x[b, i], x[c, i], x[d, i]
                a0, a1, a2, a3 = a0 + xa * w0, a1 + xa * w1, a2 + xa * w2, a3 + xa * w3
                b0, b1, b2, b3 = b0 + xb * w0, b1 + xb * w1, b2 + xb * w2, b3 + xb * w3
                c0, c1, c2, c3 = c0 + xc * w0, c1 + xc * w1, c2 + xc * w2, c3 + xc * w3
                d0, d1, d2, d3 = d0 + xd * w0, d1 + xd * w1, d2 + xd * w2, d3 + xd * w3
            add_four(out, out_rows[j], o, a0, a1, a2, a3)
            add_four(out, out_rows[j + 1], o, b0, b1, b2, b3)
            add_four(out, out_rows[j + 2], o, c0, c1, c2, c3)
            add_four(out, out_rows[j + 3], o, d0, d1, d2, d3)
            j += 4
        while j < n:
            a = x_rows[j]
            a0 = a1 = a2 = a3 = zero
            for i in range(width):
                xa = x[a, i]
                a0, a1 = a0 + xa * weight[o, i], a1 + xa * weight[o + 1, i]
                a2, a3 = a2 + xa * weight[o + 2, i], a3 + xa * weight[o + 3, i]
            add_four(out, out_rows[j], o, a0, a1, a2, a3)
            j += 1
        o += 4
    while o < last:  # fewer than four are left
        for j in range(n):
            a, a0 = x_rows[j], zero
            for i in range(width):
                a0 += x[a, i] * weight[o, i]
            out[out_rows[j], o] += a0
        o += 1


@compiled
def add_four(out, row, o, s0, s1, s2, s3):
    out[row, o] += s0
    out[row, o + 1] += s1
    out[row, o + 2] += s2
    out[row, o + 3] += s3


@compiled
def part_of(size, part, parts):
    """Where part `part` of `size` outputs begins: at a multiple of four."""
    return size if part == parts else size * part // parts // 4 * 4


@compiled
def parts_worth(multiplications, threads):
    return threads if multiplications > WORTH_A_THREAD else 1


@threaded
def linear(x, weight, out, threads):
    """out += x @ weight^T: x (n, in), weight (out, in)."""
    rows, outputs = np.arange(len(x)), len(weight)
    parts = parts_worth(len(x) * weight.size, threads)
    if parts == 1:
        add_products(x, rows, weight, 0, outputs, out, rows)
        return
    for part in prange(parts):
        add_products(x, rows, weight, part_of(outputs, part, parts), part_of(outputs, part + 1, parts), out, rows)


# ------------------------------------------------------------------------------------------------- norms and nonlinearities


@compiled
def exp(x):
    """e^x to 2 ulp, in arithmetic that LLVM turns into vectors, unlike the C library's: e^x = 2^n e^r with |r| <= ln(2) / 2."""
    x = min(max(x, np.float32(-87.3)), np.float32(88.7))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)  # ln(2) in two parts
    e = np.float32(1.9875691e-4)
    for coefficient in (1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 1.6666665e-1, 0.5):  # of e^r (Cephes)
        e = e * r + np.float32(coefficient)
    return (e * r * r + r + np.float32(1)) * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def sigmoid(x):
    return np.float32(1) / (np.float32(1) + exp(-x))


@compiled
def rms_norm(x, weight, eps, out):
    """x (m, d), weight (d,) -> out (m, d), which may be x."""
    m, d = x.shape
    for j in range(m):
        total = np.float32(0)
        for c in range(d):
            total += x[j, c] * x[j, c]
        scale = np.float32(1) / np.sqrt(total / np.float32(d) + np.float32(eps))
        for c in range(d):
            out[j, c] = x[j, c] * scale * weight[c]


@compiled
def rotary(x, cos, sin):
    """Turn the first 2 p components of each head, in place: x (heads, d), cos and sin (p,)."""
    p = len(cos)
    for head in range(len(x)):
        for c in range(p):
            first, second = x[head, c], x[head, c + p]
            x[head, c] = first * cos[c] - second * sin[c]
            x[head, c + p] = second * cos[c] + first * sin[c]


# ------------------------------------------------------------------------------------------------------------ attention


@compiled
def attention(h, weights, places, keys, values, eps, threads):
    """h += self_attn(input_layernorm(h)), keeping the new keys and values. h (n, h); keys and values (slots, kv_heads, d),
    of this layer."""
    n, (_, kv_heads, d) = len(h), keys.shape
    x = np.empty_like(h)
    rms_norm(h, weights.norm, eps, x)
    q, k, v = repeated(weights.q_bias, n), repeated(weights.k_bias, n), repeated(weights.v_bias, n)
    linear(x, weights.q, q, threads)
    linear(x, weights.k, k, threads)
    linear(x, weights.v, v, threads)
    heads = q.shape[1] // d
    q, k, v = q.reshape(n, heads, d), k.reshape(n, kv_heads, d), v.reshape(n, kv_heads, d)
    for t in range(n):
        if len(weights.k_norm):
            rms_norm(k[t], weights.k_norm, eps, k[t])
        rotary(k[t], places.cos[t], places.sin[t])
        keys[places.slots[t]] = k[t]
        values[places.slots[t]] = v[t]
    out = np.zeros((n, heads * d), dtype=np.float32)
    attend_all(q, weights.q_norm, places, keys, values, eps, out.reshape(n, heads, d), threads)
    linear(out, weights.o, h, threads)


@compiled
def repeated(bias, n):
    """(n, outputs): `bias` for each token."""
    out = np.empty((n, len(bias)), dtype=np.float32)
    out[:] = bias
    return out


@threaded
def attend_all(q, q_norm, places, keys, values, eps, out, threads):
    """Each token's queries to the keys that it sees. The threads take turns, since neighbours are of about equal length."""
    n, heads, d = q.shape
    parts = min(n, parts_worth((places.positions.sum() + n) * heads * d * 2, threads))
    if parts == 1:
        attend_some(q, q_norm, places, keys, values, eps, out, 0, 1)
        return
    for part in prange(parts):
        attend_some(q, q_norm, places, keys, values, eps, out, part, parts)


@compiled
def attend_some(q, q_norm, places, keys, values, eps, out, first, step):
    heads, kv_heads = q.shape[1], keys.shape[1]
    for t in range(first, len(q), step):
        if len(q_norm):
            rms_norm(q[t], q_norm, eps, q[t])
        rotary(q[t], places.cos[t], places.sin[t])
        slots = seen(places, t)
        for group in range(kv_heads):
            mine = slice(group * heads // kv_heads, (group + 1) * heads // kv_heads)
            attend(q[t, mine], slots, keys, values, group, out[t, mine])


@compiled
def seen(places, t):
    """The slots of the keys that token t sees: of its own sequence up to itself, in order, (keys,)."""
    row, first, last = places.rows[t], places.first_key, places.positions[t]
    slots = np.empty(last + 1 - first, dtype=np.int64)
    for position in range(first, last + 1):
        block = places.table[row, position // places.block_size]
        slots[position - first] = block * places.block_size + position % places.block_size
    return slots


@compiled
def attend(q, slots, keys, values, group, out):
    """Softmax attention of the heads of one group, q and out (heads, d), to one head of the cache."""
    (heads, d), s = q.shape, len(slots)
    scale = np.float32(1) / np.sqrt(np.float32(d))
    scores = np.empty(s, dtype=np.float32)
    for head in range(heads):
        j = 0
        while j + 4 <= s:
            k0, k1, k2, k3 = slots[j], slots[j + 1], slots[j + 2], slots[j + 3]
            s0 = s1 = s2 = s3 = np.float32(0)
            for c in range(d):
                x = q[head, c]
                s0, s1 = s0 + x * keys[k0, group, c], s1 + x * keys[k1, group, c]
                s2, s3 = s2 + x * keys[k2, group, c], s3 + x * keys[k3, group, c]
            scores[j], scores[j + 1], scores[j + 2], scores[j + 3] = s0 * scale, s1 * scale, s2 * scale, s3 * scale
            j += 4
        while j < s:
            s0 = np.float32(0)
            for c in range(d):
                s0 += q[head, c] * keys[slots[j], group, c]
            scores[j] = s0 * scale
            j += 1
        softmax(scores)
        for j in range(s):
            weight, slot = scores[j], slots[j]
            for c in range(d):
                out[head, c] += weight * values[slot, group, c]


@compiled
def softmax(scores):
    """In place, (keys,)."""
    highest = scores.max()
    total = np.float32(0)
    for j in range(len(scores)):
        scores[j] = exp(scores[j] - highest)
        total += scores[j]
    for j in range(len(scores)):
        scores[j] /= total


# --------------------------------------------------------------------------------------------------- feed-forward networks


@compiled
def mlp(h, weights, eps, threads):
    """h += mlp(post_attention_layernorm(h)), of a dense layer. h (n, h)."""
    x = np.empty_like(h)
    rms_norm(h, weights.norm, eps, x)
    swiglu(x, weights.gate, weights.up, weights.down, h, threads)


@compiled
def swiglu(x, gate, up, down, out, threads):
    """out += down(silu(gate(x)) * up(x))."""
    act, ups = np.zeros((len(x), len(gate)), dtype=np.float32), np.zeros((len(x), len(gate)), dtype=np.float32)
    linear(x, gate, act, threads)
    linear(x, up, ups, threads)
    for j in range(len(x)):
        for c in range(len(gate)):
            act[j, c] *= sigmoid(act[j, c]) * ups[j, c]
    linear(act, down, out, threads)


@compiled
def combine(next_embedding, hidden, enorm, hnorm, eh_proj, eps, out, threads):
    """`MTP.combine`: out += eh_proj([enorm(next_embedding), hnorm(hidden)]), all (n, h)."""
    n, h = hidden.shape
    both, half = np.empty((n, 2 * h), dtype=np.float32), np.empty((n, h), dtype=np.float32)
    rms_norm(next_embedding, enorm, eps, half)
    both[:, :h] = half
    rms_norm(hidden, hnorm, eps, half)
    both[:, h:] = half
    linear(both, eh_proj, out, threads)


@compiled
def moe(h, weights, routing, eps, threads):
    """h += mlp(post_attention_layernorm(h)), of a mixture-of-experts layer. h (n, h) -> the experts of each token (n, k)."""
    n = len(h)
    x = np.empty_like(h)
    rms_norm(h, weights.norm, eps, x)
    scores = np.zeros((n, len(weights.router)), dtype=np.float32)
    linear(x, weights.router, scores, threads)
    chosen = np.empty((n, routing.k), dtype=np.int64)
    chosen_weights = np.empty((n, routing.k), dtype=np.float32)
    for t in range(n):
        route(scores[t], weights.router_bias, routing, chosen[t], chosen_weights[t])
    routed_experts(x, chosen, chosen_weights, weights.gate_up, weights.down, h, threads)
    swiglu(x, weights.shared_gate, weights.shared_up, weights.shared_down, h, threads)
    return chosen


@compiled
def route(logits, bias, routing, experts, weights):
    """`Router` for one token: logits (e,), which become the scores -> experts (k,) and their weights (k,)."""
    e = len(logits)
    biased = np.empty(e, dtype=np.float32)
    for expert in range(e):
        logits[expert] = sigmoid(logits[expert])
        biased[expert] = logits[expert] + bias[expert]  # the bias chooses and never weighs
    if routing.groups > 1:
        hide_groups(biased.reshape(routing.groups, e // routing.groups), routing.groups_kept)
    take_largest(biased, experts)
    total = np.float32(1e-20)
    for j in range(routing.k):
        weights[j] = logits[experts[j]]
        total += weights[j]
    for j in range(routing.k):
        weights[j] *= np.float32(routing.scale) / total if routing.normalise else np.float32(routing.scale)


@compiled
def hide_groups(grouped, kept):
    """All but the best `kept` groups, judged by their two best experts, become -inf: grouped (groups, e / groups)."""
    groups = len(grouped)
    judged = np.empty(groups, dtype=np.float32)
    for group in range(groups):
        best = np.empty(2, dtype=np.int64)
        take_largest(grouped[group].copy(), best)
        judged[group] = grouped[group, best[0]] + grouped[group, best[1]]
    best = np.empty(kept, dtype=np.int64)
    take_largest(judged, best)
    for group in range(groups):
        if not (best == group).any():
            grouped[group] = -np.inf


@compiled
def take_largest(values, indices):
    """The indices of the largest values, as many as `indices` has places. Different ones, also where values are NaN."""
    taken = np.zeros(len(values), dtype=np.bool_)
    for j in range(len(indices)):
        best = -1
        for index in range(len(values)):
            if not taken[index] and (best < 0 or values[index] > values[best]):
                best = index
        taken[best] = True
        indices[j] = best


@threaded
def routed_experts(x, experts, weights, gate_up, down, out, threads):
    """out += each token through its experts, weighted. x (n, h), experts and weights (n, k). An expert's weights are read
    once for all of its tokens, and only if it has some. Each thread has a part of every expert's outputs, so that nobody
    waits for the busiest expert, and none writes where another does."""
    (n, k), (e, h, width) = experts.shape, down.shape
    token, weight, ends = sort_by_expert(experts, weights, e)
    act, ups = np.zeros((n * k, width), dtype=np.float32), np.zeros((n * k, width), dtype=np.float32)
    parts = parts_worth(n * k * h * width * 3, threads)
    if parts == 1:
        experts_in(x, token, weight, ends, gate_up, act, ups, 0, width)
        experts_out(act, token, ends, down, out, 0, h)
        return
    for part in prange(parts):
        first, last = part_of(width, part, parts), part_of(width, part + 1, parts)
        experts_in(x, token, weight, ends, gate_up, act, ups, first, last)
    for part in prange(parts):
        experts_out(act, token, ends, down, out, part_of(h, part, parts), part_of(h, part + 1, parts))


@compiled
def sort_by_expert(experts, weights, e):
    """-> the token of each row, its weight, both (r,), and where each expert's rows end, (e,)."""
    n, k = experts.shape
    ends = np.zeros(e, dtype=np.int64)
    for t in range(n):
        for j in range(k):
            ends[experts[t, j]] += 1
    place = np.empty(e, dtype=np.int64)
    total = 0
    for expert in range(e):
        place[expert] = total
        total += ends[expert]
        ends[expert] = total
    token, weight = np.empty(n * k, dtype=np.int64), np.empty(n * k, dtype=np.float32)
    for t in range(n):
        for j in range(k):
            row = place[experts[t, j]]
            token[row], weight[row] = t, weights[t, j]
            place[experts[t, j]] += 1
    return token, weight, ends


@compiled
def experts_in(x, token, weight, ends, gate_up, act, ups, first, last):
    """act = weight * silu(gate(x)) * up(x): columns `first` to `last` of all rows, (r, i)."""
    rows, width = np.arange(len(token)), act.shape[1]
    start = 0
    for expert in range(len(ends)):
        mine = slice(start, ends[expert])
        if mine.stop > start:
            add_products(x, token[mine], gate_up[expert, :width], first, last, act, rows[mine])
            add_products(x, token[mine], gate_up[expert, width:], first, last, ups, rows[mine])
        start = mine.stop
    for row in range(len(token)):
        for c in range(first, last):
            act[row, c] *= sigmoid(act[row, c]) * ups[row, c] * weight[row]


@compiled
def experts_out(act, token, ends, down, out, first, last):
    """out += down(act): columns `first` to `last`, each row's to its token."""
    rows = np.arange(len(token))
    start = 0
    for expert in range(len(ends)):
        mine = slice(start, ends[expert])
        if mine.stop > start:
            add_products(act, rows[mine], down[expert], first, last, out, token[mine])
        start = mine.stop
