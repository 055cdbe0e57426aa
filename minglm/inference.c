/* The inference gear's kernels for CPUs, fp32: what PyTorch can only say in many small calls or with copies of weights.

   Built by minglm/inference.py with the C compiler of the machine. All arrays are contiguous unless a stride is given.
   A token's numbers depend on that token alone, never on which others are in the call. */

#include <math.h>
#include <stdint.h>
#include <string.h>

static float dot(const float *restrict a, const float *restrict b, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* x, out (rows, d); weight (d) */
void rms_norm(const float *x, const float *weight, float *out, int64_t rows, int64_t d, float eps) {
    for (int64_t r = 0; r < rows; r++, x += d, out += d) {
        float scale = 1.0f / sqrtf(dot(x, x, d) / d + eps);
        for (int64_t i = 0; i < d; i++) out[i] = x[i] * scale * weight[i];
    }
}

/* x, out (tokens, heads, d); cos, sin (tokens, p): turns components i and i + p of each head, i < p. */
void rotary(const float *x, const float *cos, const float *sin, float *out, int64_t tokens, int64_t heads, int64_t d,
            int64_t p) {
    for (int64_t t = 0; t < tokens; t++, cos += p, sin += p)
        for (int64_t head = 0; head < heads; head++, x += d, out += d) {
            for (int64_t i = 0; i < p; i++) {
                out[i] = x[i] * cos[i] - x[i + p] * sin[i];
                out[i + p] = x[i + p] * cos[i] + x[i] * sin[i];
            }
            memcpy(out + 2 * p, x + 2 * p, (d - 2 * p) * sizeof(float));
        }
}

/* One query over one sequence's keys: q, out (d); scores (end). Inlined with d known, so that sums stay in registers. */
static inline __attribute__((always_inline)) void attend(
    const float *restrict q, const float *restrict keys, const float *restrict values, const int64_t *restrict blocks,
    float *restrict out, float *restrict scores, int64_t first, int64_t end, int64_t wide, int64_t block_size,
    const int64_t d) {
    const float scale = 1.0f / sqrtf((float)d);
    float best = -INFINITY, sum = 0, total[d];
    for (int64_t b = first / block_size; b * block_size < end; b++) {
        const int64_t from = b * block_size < first ? first : b * block_size;
        const int64_t to = (b + 1) * block_size < end ? (b + 1) * block_size : end;
        const float *key = keys + (blocks[b] * block_size + from % block_size) * wide;
        for (int64_t s = from; s < to; s++, key += wide) {
            scores[s] = dot(q, key, d) * scale;
            best = scores[s] > best ? scores[s] : best;
        }
    }
    for (int64_t s = first; s < end; s++) sum += scores[s] = expf(scores[s] - best);
    for (int64_t i = 0; i < d; i++) total[i] = 0;
    for (int64_t b = first / block_size; b * block_size < end; b++) {
        const int64_t from = b * block_size < first ? first : b * block_size;
        const int64_t to = (b + 1) * block_size < end ? (b + 1) * block_size : end;
        const float *value = values + (blocks[b] * block_size + from % block_size) * wide;
        for (int64_t s = from; s < to; s++, value += wide)
            for (int64_t i = 0; i < d; i++) total[i] += scores[s] * value[i];
    }
    for (int64_t i = 0; i < d; i++) out[i] = total[i] / sum;
}

/* Attention of single queries over the paged cache. q, out (tokens, heads, d); keys, values (slots, kv_heads, d); token t
   sees positions first to positions[t] of row rows[t] of table (rows, stride), which holds blocks. scores: work space,
   (longest). */
void paged_attention(const float *q, const float *keys, const float *values, const int64_t *table, int64_t stride,
                     const int64_t *rows, const int64_t *positions, float *out, float *scores, int64_t tokens,
                     int64_t heads, int64_t kv_heads, int64_t d, int64_t block_size, int64_t first) {
    const int64_t group = heads / kv_heads, wide = kv_heads * d;
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t *blocks = table + rows[t] * stride, end = positions[t] + 1;
        for (int64_t head = 0; head < heads; head++, q += d, out += d) {
            const int64_t at = head / group * d;
            if (d == 64) attend(q, keys + at, values + at, blocks, out, scores, first, end, wide, block_size, 64);
            else if (d == 128) attend(q, keys + at, values + at, blocks, out, scores, first, end, wide, block_size, 128);
            else attend(q, keys + at, values + at, blocks, out, scores, first, end, wide, block_size, d);
        }
    }
}

/* rows[j] of m tokens times one weight row each: four tokens share a load of the weights. out is strided by `step`. */
static void rows_times(const float *const *x, const float *weight, float *out, int64_t m, int64_t n, int64_t step) {
    int64_t j = 0;
    for (; j + 4 <= m; j += 4) {
        const float *restrict a = x[j], *restrict b = x[j + 1], *restrict c = x[j + 2], *restrict e = x[j + 3];
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
        for (int64_t i = 0; i < n; i++) {
            s0 += a[i] * weight[i];
            s1 += b[i] * weight[i];
            s2 += c[i] * weight[i];
            s3 += e[i] * weight[i];
        }
        out[j * step] = s0, out[(j + 1) * step] = s1, out[(j + 2) * step] = s2, out[(j + 3) * step] = s3;
    }
    for (; j < m; j++) out[j * step] = dot(x[j], weight, n);
}

/* x, out (tokens, h); experts (tokens, k); weights (tokens, k); gate_up (e, 2i, h), gate first; down (e, h, i).
   Expert after expert, so that each one's weights are read once. work: floats (tokens, 3i + h), pointers: (2 tokens),
   members: (tokens). */
void routed_experts(const float *x, const int64_t *experts, const float *weights, const float *gate_up, const float *down,
                    float *out, float *work, const float **pointers, int64_t *members, int64_t tokens, int64_t k,
                    int64_t e, int64_t h, int64_t i) {
    float *both = work, *act = work + tokens * 2 * i, *result = act + tokens * i;
    memset(out, 0, tokens * h * sizeof(float));
    for (int64_t expert = 0; expert < e; expert++, gate_up += 2 * i * h, down += h * i) {
        int64_t m = 0;
        for (int64_t slot = 0; slot < tokens * k; slot++)
            if (experts[slot] == expert) members[m++] = slot;
        if (m == 0) continue;
        for (int64_t j = 0; j < m; j++) pointers[j] = x + members[j] / k * h;
        for (int64_t r = 0; r < 2 * i; r++) rows_times(pointers, gate_up + r * h, both + r, m, h, 2 * i);
        for (int64_t j = 0; j < m; j++) {
            const float *gate = both + j * 2 * i, *up = gate + i, weight = weights[members[j]];
            for (int64_t c = 0; c < i; c++) act[j * i + c] = gate[c] / (1 + expf(-gate[c])) * up[c] * weight;
            pointers[j] = act + j * i;
        }
        for (int64_t r = 0; r < h; r++) rows_times(pointers, down + r * i, result + r, m, i, h);
        for (int64_t j = 0; j < m; j++) {
            float *to = out + members[j] / k * h;
            for (int64_t c = 0; c < h; c++) to[c] += result[j * h + c];
        }
    }
}

/* x (tokens, h), weight (n, h), bias (n) or NULL -> out (tokens, n). pointers: (tokens). */
void linear(const float *x, const float *weight, const float *bias, float *out, const float **pointers, int64_t tokens,
            int64_t h, int64_t n) {
    for (int64_t t = 0; t < tokens; t++) pointers[t] = x + t * h;
    for (int64_t r = 0; r < n; r++) {
        rows_times(pointers, weight + r * h, out + r, tokens, h, n);
        if (bias)
            for (int64_t t = 0; t < tokens; t++) out[t * n + r] += bias[r];
    }
}

/* x (tokens, h); gate, up (i, h); down (o, i) -> out (tokens, o). work: (tokens, 2i); pointers: (tokens). */
void swiglu(const float *x, const float *gate, const float *up, const float *down, float *out, float *work,
            const float **pointers, int64_t tokens, int64_t h, int64_t i, int64_t o) {
    float *act = work, *raised = work + tokens * i;
    linear(x, gate, NULL, act, pointers, tokens, h, i);
    linear(x, up, NULL, raised, pointers, tokens, h, i);
    for (int64_t j = 0; j < tokens * i; j++) act[j] = act[j] / (1 + expf(-act[j])) * raised[j];
    linear(act, down, NULL, out, pointers, tokens, i, o);
}
