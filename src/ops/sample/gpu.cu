// Sampling, a block per row of logits: the token that cpu.rs draws, or none where that depends on the order of cpu.rs's f64
// sums. mod.rs has the distribution; gpu.rs says what is exact and why. Depends on device/prelude.cu.

// ---- cpu.rs's f32 functions, operation by operation: intrinsics, because the compiler may not fuse them ----

// ops/cpu/math.rs exp.
__device__ __forceinline__ float sample_exp(float x) {
    x = x < -87.f ? -87.f : x;
    x = x > 88.f ? 88.f : x;
    const float shifted = __fadd_rn(__fmul_rn(x, 1.44269504088896340736f), 12582912.f), n = __fsub_rn(shifted, 12582912.f);
    const float r = __fsub_rn(__fsub_rn(x, __fmul_rn(n, 0.69314575f)), __fmul_rn(n, 1.4286068e-6f));
    float p = __fadd_rn(__fmul_rn(1.f / 720.f, r), 1.f / 120.f);
    p = __fadd_rn(__fmul_rn(p, r), 1.f / 24.f);
    p = __fadd_rn(__fmul_rn(p, r), 1.f / 6.f);
    p = __fadd_rn(__fmul_rn(p, r), 0.5f);
    p = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(p, r), r), r), 1.f);
    return __fmul_rn(p, __uint_as_float((__float_as_uint(shifted) - 0x4b400000u + 127u) << 23));
}
// ops/cpu/math.rs tanh.
__device__ __forceinline__ float sample_tanh(float x) {
    const float q = __fmul_rn(x, x);
    float near = __fadd_rn(-17.f / 315.f, __fmul_rn(q, 62.f / 2835.f));
    near = __fadd_rn(2.f / 15.f, __fmul_rn(q, near));
    near = __fadd_rn(-1.f / 3.f, __fmul_rn(q, near));
    near = __fmul_rn(x, __fadd_rn(1.f, __fmul_rn(q, near)));
    const float far = __fsub_rn(1.f, __fdiv_rn(2.f, __fadd_rn(sample_exp(__fmul_rn(2.f, x)), 1.f)));
    return q < 0.0625f ? near : far;
}

// Logits of products h W^T: cap tanh(factor product), or multiplier product where `cap` is 0. Then (logit - top) inverse, of
// which the weight of a token is the exponential.
struct SampleShape { float multiplier, factor, cap, inverse; };
__device__ __forceinline__ float sample_logit(const SampleShape& s, float product) {
    return s.cap > 0.f ? __fmul_rn(s.cap, sample_tanh(__fmul_rn(product, s.factor))) : __fmul_rn(product, s.multiplier);
}
__device__ __forceinline__ float sample_shifted(const SampleShape& s, float product, float top) {
    return __fmul_rn(__fsub_rn(sample_logit(s, product), top), s.inverse);
}
__device__ __forceinline__ float sample_weight(const SampleShape& s, float product, float top) { return sample_exp(sample_shifted(s, product, top)); }

// Two sums of the same n numbers, each in an order of its own and in f64, are nearer than this to each other: each is within
// n 2^-53 of the exact sum, and so is what cpu.rs has left of the draw.
__device__ __forceinline__ double sample_margin(u32 n, double sum) { return n * (sum * 4.44089209850062616e-16); }  // 2^-51

// No token: the host draws this row.
constexpr u32 SAMPLE_NONE = 0xffffffffu;

// ---- the greatest logit of each tile, and the lowest id that has it ----

constexpr u32 SAMPLE_TILE = 4096;

struct SampleTop { const float* logits; float* tops; u32* best; u32 vocab, tiles; SampleShape shape; };
KERNEL(sample_top, SampleTop, 256) {
    __shared__ float tops[8];
    __shared__ u32 ids[8];
    const u32 tile = blockIdx.x % a.tiles, end = min(a.vocab, SAMPLE_TILE * (tile + 1));
    const float* logits = a.logits + (u64)(blockIdx.x / a.tiles) * a.vocab;
    float top = -infinity();
    u32 id = SAMPLE_NONE;
    for (u32 j = SAMPLE_TILE * tile + threadIdx.x; j < end; j += blockDim.x) {
        const float l = sample_logit(a.shape, logits[j]);
        if (l > top) { top = l; id = j; }
    }
    for (int o = 16; o; o >>= 1) {
        const float other = __shfl_xor_sync(0xffffffffu, top, o);
        const u32 its = __shfl_xor_sync(0xffffffffu, id, o);
        if (other > top || (other == top && its < id)) { top = other; id = its; }
    }
    if ((threadIdx.x & 31) == 0) { tops[threadIdx.x >> 5] = top; ids[threadIdx.x >> 5] = id; }
    __syncthreads();
    if (threadIdx.x) return;
    for (u32 w = 1; w < 8; w++) if (tops[w] > top || (tops[w] == top && ids[w] < id)) { top = tops[w]; id = ids[w]; }
    a.tops[blockIdx.x] = top;
    a.best[blockIdx.x] = id;
}

// ---- the sum of weights in cpu.rs's order, and the draw from all tokens ----
// cpu.rs sums the weights in sixteen f32 numbers, the i-th into number i % 16, and then those. Sixteen lanes of the first warp
// do that, while each of the other warps makes the weights of a span of the next chunk and sums them in f64.

constexpr u32 SAMPLE_SPAN = 256, SAMPLE_CHUNK = 8 * SAMPLE_SPAN, SAMPLE_SPANS = 2048;
constexpr u32 SAMPLE_GREEDY = 0, SAMPLE_ALL = 1;  // Else sample_kept draws.

// drawn (R, 4): the token, the bits of (its logit - top) inverse, of the sum and of top. totals (R): the sums in f64.
struct SampleSums {
    const float* logits; const float* tops; const u32* best; const double* draws; u32* drawn; double* totals;
    u32 vocab, tiles, mode; SampleShape shape;
};
KERNEL(sample_sums, SampleSums, 288) {
    __shared__ float weights[2][SAMPLE_CHUNK];
    __shared__ double spans[SAMPLE_SPANS], before;
    __shared__ u32 chosen;
    const u64 row = blockIdx.x;
    const float* logits = a.logits + row * a.vocab;
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, chunks = (a.vocab + SAMPLE_CHUNK - 1) / SAMPLE_CHUNK;
    float top = -infinity(), sum = 0.f;
    u32 best = 0;
    for (u32 t = 0; t < a.tiles; t++) {
        const float other = a.tops[row * a.tiles + t];
        if (other > top) { top = other; best = a.best[row * a.tiles + t]; }
    }
    for (u32 c = 0; c <= chunks; c++) {
        if (warp) {
            if (c < chunks) {
                const u32 at = SAMPLE_SPAN * (warp - 1) + lane;
                double of_span = 0.;
#pragma unroll
                for (u32 i = 0; i < SAMPLE_SPAN; i += 32) {
                    const u32 j = SAMPLE_CHUNK * c + at + i;
                    const float w = j < a.vocab ? sample_weight(a.shape, logits[j], top) : 0.f;
                    weights[c & 1][at + i] = w;
                    of_span += w;
                }
                for (int o = 16; o; o >>= 1) of_span += __shfl_xor_sync(0xffffffffu, of_span, o);
                if (lane == 0) spans[SAMPLE_CHUNK / SAMPLE_SPAN * c + warp - 1] = of_span;
            }
        } else if (c && lane < 16) {
            const float* w = weights[(c - 1) & 1];
            const u32 count = min(SAMPLE_CHUNK, a.vocab - SAMPLE_CHUNK * (c - 1));
#pragma unroll 8
            for (u32 i = lane; i < count; i += 16) sum = __fadd_rn(sum, w[i]);
        }
        __syncthreads();
    }
    if (!warp) for (int o = 8; o; o >>= 1) sum = __fadd_rn(sum, __shfl_down_sync(0xffffffffu, sum, o));
    const u32 count = (a.vocab + SAMPLE_SPAN - 1) / SAMPLE_SPAN;
    const double target = __dmul_rn(a.draws[row], (double)sum);  // Of the first thread.
    u32* drawn = a.drawn + 4 * row;
    if (threadIdx.x == 0) {
        drawn[2] = __float_as_uint(sum);
        drawn[3] = __float_as_uint(top);
        double total = 0.;
        u32 span = 0;
        for (; span < count; span++) {
            const double next = total + spans[span];
            if (a.mode == SAMPLE_ALL && next > target) break;
            total = next;
        }
        a.totals[row] = total;
        before = total;
        chosen = span;
        if (a.mode == SAMPLE_GREEDY) {
            drawn[0] = best;
            drawn[1] = __float_as_uint(sample_shifted(a.shape, logits[best], top));
        }
    }
    if (a.mode != SAMPLE_ALL) return;
    __syncthreads();
    const u32 first = SAMPLE_SPAN * chosen;
    if (threadIdx.x < SAMPLE_SPAN && first + threadIdx.x < a.vocab) weights[0][threadIdx.x] = sample_weight(a.shape, logits[first + threadIdx.x], top);
    __syncthreads();
    if (threadIdx.x) return;
    // The first token at which the running sum exceeds the target, or the last of all, if cpu.rs is sure to find the same.
    double s = before, next = before;
    u32 id = first;
    for (; id < min(first + SAMPLE_SPAN, a.vocab); id++) {
        next = s + weights[0][id - first];
        if (next > target) break;
        s = next;
    }
    const double margin = sample_margin(a.vocab, next > target ? next : target);
    bool sure;
    if (chosen == count) {
        id = a.vocab - 1;
        sure = target - s > margin;
    } else {
        sure = next - target > margin && (id == 0 || target - s > margin);
    }
    drawn[0] = sure ? id : SAMPLE_NONE;
    if (sure) drawn[1] = __float_as_uint(sample_shifted(a.shape, logits[id], top));
}

// ---- the draw from the most likely tokens ----

constexpr u32 SAMPLE_KEPT = 1024;

// A key per token, greater for the more likely, and of equally likely ones for the lower id. Weights are below 2^30 as words.
__device__ __forceinline__ u64 sample_key(float weight, u32 id) { return (u64)__float_as_uint(weight) << 34 | (0xffffffffu - id); }

// Draws among the `kept` most likely tokens, which are all that top-k leaves (`exact`), or else as many as there is room for:
// then there is no token if top-p leaves more.
struct SampleKept { const float* logits; const double* draws; const double* totals; u32* drawn; double top_p; u32 vocab, kept, exact; SampleShape shape; };
KERNEL(sample_kept, SampleKept, 512) {
    __shared__ u32 counts[256], need, digit, is_found, taken;
    __shared__ u64 keys[SAMPLE_KEPT], sorted[SAMPLE_KEPT];
    const u64 row = blockIdx.x;
    const float* logits = a.logits + row * a.vocab;
    u32* drawn = a.drawn + 4 * row;
    const float top = __uint_as_float(drawn[3]);
    const u32 lane = threadIdx.x & 31;
    // The lowest key that is kept, a byte at a time from the highest: `need` of the keys that begin with `prefix` are kept.
    if (threadIdx.x == 0) { need = a.kept; taken = 0; }
    u64 prefix = 0;
    u32 shift = 56;
    for (;; shift -= 8) {
        if (threadIdx.x < 256) counts[threadIdx.x] = 0;
        __syncthreads();
        for (u32 j = threadIdx.x; j < a.vocab; j += blockDim.x) {
            const u64 key = sample_key(sample_weight(a.shape, logits[j], top), j);
            if (shift == 56 || (key ^ prefix) >> (shift + 8) == 0) atomicAdd(&counts[(key >> shift) & 255], 1u);
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            // A lane takes eight digits, the first lane the highest.
            const u32 highest = 255 - 8 * lane, left = need;
            u32 own = 0;
            for (u32 i = 0; i < 8; i++) own += counts[highest - i];
            u32 upto = own;
            for (u32 o = 1; o < 32; o <<= 1) {
                const u32 more = __shfl_up_sync(0xffffffffu, upto, o);
                if (lane >= o) upto += more;
            }
            __syncwarp();
            if (upto >= left && upto - own < left) {
                u32 still = left - (upto - own), d = highest;
                while (counts[d] < still) still -= counts[d--];
                digit = d;
                need = still;
                is_found = counts[d] == still;
            }
        }
        __syncthreads();
        prefix |= (u64)digit << shift;
        if (is_found || shift == 0) break;
    }
    for (u32 j = threadIdx.x; j < a.vocab; j += blockDim.x) {
        const u64 key = sample_key(sample_weight(a.shape, logits[j], top), j);
        if (key >> shift >= prefix >> shift) {
            const u32 at = atomicAdd(&taken, 1u);
            if (at < SAMPLE_KEPT) keys[at] = key;
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < a.kept; i += blockDim.x) {
        const u64 key = keys[i];
        u32 rank = 0;
        for (u32 k = 0; k < a.kept; k++) rank += keys[k] > key;
        sorted[rank] = key;
    }
    __syncthreads();
    if (threadIdx.x) return;
    double total = 0., margin = 0., mass = 0.;
    if (a.exact) for (u32 i = 0; i < a.kept; i++) total += __uint_as_float((u32)(sorted[i] >> 34));
    const double limit = __dmul_rn(a.top_p, a.exact ? total : a.totals[row]);
    if (!a.exact) margin = sample_margin(a.vocab, limit);
    bool sure = a.exact;
    u32 count = 0;
    while (count < a.kept) {
        mass += __uint_as_float((u32)(sorted[count++] >> 34));
        if (mass >= limit) {
            sure = a.exact || mass - limit > margin;
            break;
        }
        if (limit - mass <= margin) break;
    }
    double rest = __dmul_rn(a.draws[row], mass);
    u32 id = 0;
    for (u32 i = 0; i < count; i++) {
        id = 0xffffffffu - (u32)sorted[i];
        rest -= __uint_as_float((u32)(sorted[i] >> 34));
        if (rest < 0.) break;
    }
    drawn[0] = sure ? id : SAMPLE_NONE;
    if (sure) drawn[1] = __float_as_uint(sample_shifted(a.shape, logits[id], top));
}

// ---- from one step to the next, without the host ----

// The results `drawn` (R, 4) of a step are kept in `kept`, and the input of the next one is written: its numbers `next` (N), with the
// tokens that were drawn from number `tokens` on. Without `next` the results are kept alone. A row that the host has to draw has no
// token; the embedding makes NaN of it, and what follows in that row is not read.
struct SampleTurn { const u32* drawn; u32* kept; const u32* next; u32* input; u32 rows, numbers, tokens; };
KERNEL(sample_turn, SampleTurn, 256) {
    for (u32 i = threadIdx.x; i < 4 * a.rows; i += blockDim.x) a.kept[i] = a.drawn[i];
    if (!a.next) return;
    for (u32 i = threadIdx.x; i < a.numbers; i += blockDim.x) {
        const u32 row = i - a.tokens;  // Below `rows` for tokens alone: before them it wraps around.
        a.input[i] = row < a.rows ? a.drawn[4 * row] : a.next[i];
    }
}
