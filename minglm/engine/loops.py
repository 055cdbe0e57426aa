"""A decoder layer for few tokens, written as plain loops that numba compiles for the CPU at hand.

A decoding step of a small model is many tiny operations, and calling one costs more than it computes. Here a layer is two
calls. Each function stands for the lines of `minglm/model.py` that it names, on numpy arrays that share the memory of the
model's parameters and of the paged cache: nothing is copied, padded or gathered. All values are fp32.

Shapes: n tokens of any number of sequences, side by side; h hidden, d head, e experts, k experts per token, i width of an
expert, r = n * k rows, one for each token and expert of it, sorted by expert.

numba keeps what it has compiled beside this file or in the user's cache directory, so that only the first run waits for it
(up to half a minute). All compiled functions stand in this one file, because a change to it makes numba compile them again.
"""

from typing import NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy import ndarray

# Sums may be added in another order, which is what lets LLVM use vectors. NaN and infinity keep their meaning.
OPTIONS = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy", "nogil": True}
# Starts numba's threads. Compiled code that comes from the cache takes them for granted, and crashes without. They share
# OpenMP with PyTorch's, whose number they would raise to that of the cores.
pytorchs_threads = torch.get_num_threads()
numba.get_num_threads()
torch.set_num_threads(pytorchs_threads)
# Multiplications that are worth a second thread: starting one costs a few microseconds.
WORTH_A_THREAD = 2**18
# Floats of a vector of the CPU at hand; LLVM splits no vector then, so that registers are enough.
FEATURES = get_host_cpu_features()
LANES = 16 if FEATURES.get("avx512f") else 8 if FEATURES.get("avx") else 4
# Fetching so far ahead of the weights in use, in bytes, hides the way from main memory; past the end of one matrix lies, as a
# rule, what is needed next, and a prefetch of what is not there does nothing.
AHEAD = 2**15
CACHE_LINE = 64
PREFETCH, TO_READ_FROM_L2 = "llvm.prefetch.p0", (0, 2, 1)
# So many tokens are as much work as reading an expert's weights.
EXPERT_ROWS = 8
# Values of activations that are worked on at a time, while all weights pass by: they stay in the nearest caches.
NEAR = 2**12


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
    name: name == "prange"
    for name in ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion", "prange")
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


def tile_of(tokens: int, lanes: int = LANES):
    """A function (x, weight, numbers, out) for compiled code: out[t][o] += x[t] . weight[o] over the first `numbers` numbers,
    a multiple of `lanes`. x: the addresses of `tokens` rows; weight: those of 4 rows; out: those of 4 floats for each token.

    It is written in LLVM's own language, which says what a loop cannot. 4 by 4 take eight loads for sixteen products, and
    sixteen sums fit a CPU's vector registers. Meanwhile weights AHEAD of these are fetched: main memory is fast for those who
    read in order and need not wait. The vectors of sums are added up all at once, two vectors to one at each step.
    """

    floats = ir.VectorType(ir.FloatType(), lanes)

    @intrinsic
    def tile(_, x, weight, numbers, out):
        rows = types.UniTuple(types.intp, tokens)
        return types.void(rows, types.UniTuple(types.intp, 4), types.intp, rows), emit

    def emit(context, builder, _, arguments):
        def call(name, *values):
            kind = ir.FunctionType(ir.VoidType() if name == PREFETCH else floats, [value.type for value in values])
            return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), values)

        def pointer(address, offset, kind):
            return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

        def mask(chosen):
            return ir.Constant(ir.VectorType(ir.IntType(32), len(chosen)), chosen)

        def number(value):
            return ir.Constant(numbers.type, value)

        numbers = arguments[2]
        x, weight, out = (cgutils.unpack_tuple(builder, arguments[n]) for n in (0, 1, 3))
        totals = [cgutils.alloca_once_value(builder, ir.Constant(floats, None)) for _ in range(4 * tokens)]
        with cgutils.for_range_slice(builder, number(0), numbers, number(lanes), numbers.type) as (start, _):
            offset = builder.mul(start, number(4))  # in bytes
            w = [builder.load(pointer(address, offset, floats), align=4) for address in weight]
            for t in range(tokens):
                x_t = builder.load(pointer(x[t], offset, floats), align=4)
                for o in range(4):
                    total = totals[4 * t + o]
                    builder.store(call(f"llvm.fma.v{lanes}f32", x_t, w[o], builder.load(total)), total)
            ahead = builder.add(weight[0], builder.mul(offset, number(4)))  # the four rows are one stretch of memory
            for line in range(0, 4 * 4 * lanes, CACHE_LINE):
                line = pointer(ahead, number(AHEAD + line), ir.IntType(8))
                call(PREFETCH, line, *(ir.Constant(ir.IntType(32), flag) for flag in TO_READ_FROM_L2))
        vectors = [builder.load(total) for total in totals]
        lane_bit = lanes // 2
        while lane_bit:  # a lane ends up with the sum that has its number
            pairs = [(n, n | lane_bit) for n in range(len(vectors)) if not n & lane_bit]
            if lane_bit >= len(vectors):
                pairs = [(n, n) for n in range(len(vectors))]
            low = [lanes + lane - lane_bit if lane & lane_bit else lane for lane in range(lanes)]
            high = [lanes + lane if lane & lane_bit else lane + lane_bit for lane in range(lanes)]
            halves = [
                [builder.shuffle_vector(vectors[a], vectors[b], mask(chosen)) for chosen in (low, high)] for a, b in pairs
            ]
            vectors = [builder.fadd(*both) for both in halves]
            lane_bit //= 2
        for t in range(tokens):
            own = [4 * t % lanes + o for o in range(4)]
            four = builder.shuffle_vector(*[vectors[4 * t // lanes]] * 2, mask(own))
            address = pointer(out[t], number(0), four.type)
            builder.store(builder.fadd(builder.load(address, align=4), four), address, align=4)
        return context.get_dummy_value()

    return tile


four_by_four, one_by_four = tile_of(4), tile_of(1)


@compiled
def add_products(x, x_rows, weight, w_rows, first, last, out, out_rows):
    """out[out_rows[j], o] += x[x_rows[j]] . weight[w_rows[o]], for outputs o from `first` to `last`.

    NEAR values of x at a time.
    """
    step = max(4, NEAR // weight.shape[1] // 4 * 4)
    for start in range(0, len(x_rows), step):
        some = slice(start, min(start + step, len(x_rows)))
        add_products_of(x, x_rows[some], weight, w_rows, first, last, out, out_rows[some])


@compiled
def add_products_of(x, x_rows, weight, w_rows, first, last, out, out_rows):
    """Four outputs by four tokens or by one. Where fewer are left, the last one stands for those that are missing, and what
    comes out for these is left in `spare`."""
    n, width = len(x_rows), weight.shape[1]
    whole, spare = width // LANES * LANES, np.empty((4, 4), dtype=np.float32)
    nowhere = address(spare, 0, 0)
    for o in range(first, last, 4):
        p, q, r, s = w_rows[o], w_rows[min(o + 1, last - 1)], w_rows[min(o + 2, last - 1)], w_rows[min(o + 3, last - 1)]
        four = address(weight, p, 0), address(weight, q, 0), address(weight, r, 0), address(weight, s, 0)
        if o + 4 > last:
            for j in range(n):
                spare[:] = 0
                one_by_four((address(x, x_rows[j], 0),), four, whole, (nowhere,))
                for k in range(last - o):
                    out[out_rows[j], o + k] += spare[0, k]
            continue
        j = 0
        while j + 1 < n:
            a, b, c, d = x_rows[j], x_rows[j + 1], x_rows[min(j + 2, n - 1)], x_rows[min(j + 3, n - 1)]
            to_c = address(out, out_rows[j + 2], o) if j + 2 < n else nowhere
            to_d = address(out, out_rows[j + 3], o) if j + 3 < n else nowhere
            four_by_four(
                (address(x, a, 0), address(x, b, 0), address(x, c, 0), address(x, d, 0)),
                four,
                whole,
                (address(out, out_rows[j], o), address(out, out_rows[j + 1], o), to_c, to_d),
            )
            j += 4
        if j < n:
            one_by_four((address(x, x_rows[j], 0),), four, whole, (address(out, out_rows[j], o),))
    if whole < width:
        for j in range(n):
            for o in range(first, last):
                for i in range(whole, width):
                    out[out_rows[j], o] += x[x_rows[j], i] * weight[w_rows[o], i]


@compiled
def address(matrix, row, column):
    """Of a number in an fp32 matrix."""
    return matrix.ctypes.data + (row * matrix.shape[1] + column) * 4


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
    outputs = len(weight)
    parts = parts_worth(len(x) * weight.size, threads)
    if parts == 1:
        linear_part(x, weight, 0, outputs, out)
        return
    for part in prange(parts):
        linear_part(x, weight, part_of(outputs, part, parts), part_of(outputs, part + 1, parts), out)


@compiled
def linear_part(x, weight, first, last, out):
    """Outputs `first` to `last` of `linear`, 256 KB of weights at a time."""
    rows, outputs = np.arange(len(x)), np.arange(len(weight))
    step = max(4, 2**16 // weight.shape[1] // 4 * 4)
    for start in range(first, last, step):
        add_products(x, rows, weight, outputs, start, min(start + step, last), out, rows)


# ------------------------------------------------------------------------------------------------- norms and nonlinearities


@compiled
def exp(x):
    """e^x to 2 ulp, in arithmetic that LLVM turns into vectors, unlike the C library's: e^x = 2^n e^r with |r| <= ln(2) / 2."""
    x = min(max(x, np.float32(-87.3)), np.float32(88.3))  # where 2^n has a float
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
        scale = inverse_rms(x, j, eps)
        for c in range(d):
            out[j, c] = x[j, c] * scale * weight[c]


@compiled
def inverse_rms(x, row, eps):
    """What RMSNorm multiplies x[row] by: x (m, d)."""
    d, total = x.shape[1], np.float32(0)
    for c in range(d):
        total += x[row, c] * x[row, c]
    return np.float32(1) / np.sqrt(total / np.float32(d) + np.float32(eps))


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
    k_rows = k.reshape(-1, d)  # (n * kv_heads, d)
    for t in range(n):
        turn(k_rows, t, kv_heads, weights.k_norm, eps, places.cos, places.sin)
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
    """Tokens first, first + step, ... Everything is reached by index: a slice of an array that threads share would have them
    take turns at counting its references."""
    (n, heads, d), kv_heads = q.shape, keys.shape[1]
    group, most = heads // kv_heads, max(0, places.positions.max() + 1 - places.first_key)
    q_rows, out_rows = q.reshape(-1, d), out.reshape(-1, d)  # (n * heads, d)
    keys_rows, values_rows = keys.reshape(-1, d), values.reshape(-1, d)  # (slots * kv_heads, d)
    rows, mine, all_heads = np.empty(most, dtype=np.int64), np.empty(group, dtype=np.int64), np.arange(group)
    weights = np.empty((group, most), dtype=np.float32)
    scale = np.float32(1) / np.sqrt(np.float32(d))
    for t in range(first, n, step):
        turn(q_rows, t, heads, q_norm, eps, places.cos, places.sin)
        s = places.positions[t] + 1 - places.first_key
        for head in range(kv_heads):
            seen(places, t, kv_heads, head, rows)
            for g in range(group):
                mine[g] = t * heads + head * group + g
                for j in range(s):
                    weights[g, j] = 0
            add_products_of(q_rows, mine, keys_rows, rows, 0, s, weights, all_heads)
            for g in range(group):
                softmax(weights, g, s, scale)
                add_values(weights, g, values_rows, rows, s, out_rows, mine[g])


@compiled
def turn(x, t, heads, norm, eps, cos, sin):
    """Norm (if there is one) and RoPE of all heads of token t, in place: x (n * heads, d), norm (d,), cos and sin (n, p)."""
    d, p = x.shape[1], cos.shape[1]
    for row in range(t * heads, (t + 1) * heads):
        if len(norm):
            scale = inverse_rms(x, row, eps)
            for c in range(d):
                x[row, c] *= scale * norm[c]
        for c in range(p):
            first, second = x[row, c], x[row, c + p]
            x[row, c] = first * cos[t, c] - second * sin[t, c]
            x[row, c + p] = second * cos[t, c] + first * sin[t, c]


@compiled
def seen(places, t, kv_heads, head, rows):
    """The keys that token t sees, of its own sequence up to itself, in order, as rows of (slots * kv_heads, d)."""
    size, position, last = places.block_size, places.first_key, places.positions[t]
    while position <= last:
        block, within = position // size, position % size
        slot = places.table[places.rows[t], block] * size + within
        for _ in range(min(size - within, last + 1 - position)):
            rows[position - places.first_key] = slot * kv_heads + head
            position, slot = position + 1, slot + 1


@compiled
def softmax(scores, row, s, scale):
    """Of scale * scores[row, :s], in place: scores (rows, keys)."""
    highest = scores[row, 0]
    for j in range(s):
        highest = max(highest, scores[row, j])
    total = np.float32(0)
    for j in range(s):
        scores[row, j] = exp((scores[row, j] - highest) * scale)
        total += scores[row, j]
    share = np.float32(1) / total
    for j in range(s):
        scores[row, j] *= share


@compiled
def add_values(weights, row, values, rows, s, out, out_row):
    """out[out_row] += weights[row, :s] @ values[rows[:s]]."""
    d, j = values.shape[1], 0
    while j + 4 <= s:
        a, b, c, e = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
        wa, wb, wc, we = weights[row, j], weights[row, j + 1], weights[row, j + 2], weights[row, j + 3]
        for i in range(d):
            out[out_row, i] += wa * values[a, i] + wb * values[b, i] + wc * values[c, i] + we * values[e, i]
        j += 4
    while j < s:
        for i in range(d):
            out[out_row, i] += weights[row, j] * values[rows[j], i]
        j += 1


# --------------------------------------------------------------------------------------------------- feed-forward networks


@compiled
def mlp(h, weights, eps, threads):
    """h += mlp(post_attention_layernorm(h)), of a dense layer. h (n, h)."""
    x = np.empty_like(h)
    rms_norm(h, weights.norm, eps, x)
    swiglu(x, weights.gate, weights.up, weights.down, h, threads)


@compiled
def swiglu(x, gate, up, down, out, threads):
    """out += down(silu(gate(x)) * up(x)): x (n, h), gate and up (i, h), down (h, i)."""
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
    """out += each token through its experts, weighted. x (n, h), experts and weights (n, k).

    An expert's weights are read once for all of its tokens, and only if it has some, from front to back by one thread. What
    each of several threads adds to the tokens is kept apart and added at last.
    """
    (n, k), (e, h, width) = experts.shape, down.shape
    token, weight, ends = sort_by_expert(experts, weights, e)
    parts = parts_worth(n * k * h * width * 3, threads)
    if parts == 1:
        through_experts(x, token, weight, ends, gate_up, down, out, 0, e)
        return
    borders, others = divided(ends, parts), np.zeros((parts, n, h), dtype=np.float32)
    for part in prange(parts):
        own = others[part]
        through_experts(x, token, weight, ends, gate_up, down, own, borders[part], borders[part + 1])
    for part in range(parts):
        for t in range(n):
            for c in range(h):
                out[t, c] += others[part, t, c]


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
def divided(ends, parts):
    """Experts for each part: part p has those from borders[p] to borders[p + 1], (parts + 1,). An expert that has tokens is
    as much work as EXPERT_ROWS of them, and its tokens."""
    e = len(ends)
    work, start, total = np.empty(e, dtype=np.int64), 0, 0
    for expert in range(e):
        if ends[expert] > start:
            total += EXPERT_ROWS + ends[expert] - start
        work[expert], start = total, ends[expert]  # of all experts up to this one
    borders, part = np.full(parts + 1, e), 1
    borders[0] = 0
    for expert in range(e):
        while part < parts and work[expert] * parts > total * part:
            before = work[expert - 1] if expert else 0
            # This expert goes to the side to which more of it belongs.
            nearer = (work[expert] + before) * parts > 2 * total * part
            borders[part] = expert if nearer else expert + 1
            part += 1
    return borders


@compiled
def through_experts(x, token, weight, ends, gate_up, down, out, first, last):
    """out += the rows of experts `first` to `last`: down(weight * silu(gate(x)) * up(x))."""
    (_, h, width), start = down.shape, ends[first - 1] if first else 0
    most, begin = 0, start
    for expert in range(first, last):
        most, begin = max(most, ends[expert] - begin), ends[expert]
    rows, columns = np.arange(most), np.arange(max(2 * width, h))
    both, act = np.empty((most, 2 * width), dtype=np.float32), np.empty((most, width), dtype=np.float32)
    for expert in range(first, last):
        count, tokens = ends[expert] - start, token[start : ends[expert]]
        if count:
            both[:count] = 0
            add_products(x, tokens, gate_up[expert], columns, 0, 2 * width, both, rows[:count])
            for j in range(count):
                for c in range(width):
                    act[j, c] = both[j, c] * sigmoid(both[j, c]) * both[j, width + c] * weight[start + j]
            add_products(act, rows[:count], down[expert], columns, 0, h, out, tokens)
        start = ends[expert]
