// Causal attention. For whole sequences in bf16 and f16, gpu_tiles.cu keeps scores in registers. Where it cannot (f32, wide
// heads), gpu.rs multiplies panels of queries with keys, and the softmax kernels turn the scores of a panel into probabilities
// and their gradients into those of the scores. For decoding one kernel attends from one query a sequence to the cached keys
// and values. Depends on ops/common.cu.

// ---- the softmax of a panel ----
// Rows stand by sequence, head and query; a warp takes one. Query i of its sequence sees keys first .. end, of which the
// panel's columns count from `first_key`. Probabilities of unseen keys are 0.

struct AttentionPanel {
    const u32* readable;  // Of each sequence, the keys that may be seen at all; null is all.
    u64 rows;
    u32 queries, of_sequence;  // Rows a head and rows a sequence.
    u32 sequence, first_query, first_key, keys, stride;
    u32 window;  // 0 is none.
    float scale, cap;  // A cap of 0 is none.
};
struct AttentionRow {
    u64 at;
    u32 from, to;
    // False for warps past the last row.
    __device__ __forceinline__ bool find(const AttentionPanel& p) {
        const u64 row = (u64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
        if (row >= p.rows) return false;
        const u32 i = p.first_query + (u32)(row % p.queries);
        u32 end = i + 1;
        if (p.readable) end = min(end, p.readable[p.sequence + (u32)(row / p.of_sequence)]);
        const u32 first = p.window && i + 1 > p.window ? i + 1 - p.window : 0;
        at = row * p.stride;
        from = min(first, end - 1) - p.first_key;
        to = end - p.first_key;
        return true;
    }
};
// The score that the softmax sees.
__device__ __forceinline__ float attention_score(const AttentionPanel& p, float product) {
    return p.cap > 0.f ? bend(product, p.scale / p.cap, p.cap) : product * p.scale;
}

template <class T> struct AttentionSoftmax { const float* scores; T* probabilities; AttentionPanel panel; };
template <class T> __device__ __forceinline__ void attention_softmax(const AttentionSoftmax<T>& a) {
    AttentionRow row;
    if (!row.find(a.panel)) return;
    const u32 lane = threadIdx.x & 31;
    const float* s = a.scores + row.at;
    T* out = a.probabilities + row.at;
    Running sums;
    for (u32 j = row.from + lane; j < row.to; j += 32) sums.add(attention_score(a.panel, s[j]), 0.f);
    sums.over_warp();
    const float inv = 1.f / sums.sum;
    for (u32 j = lane; j < a.panel.keys; j += 32) {
        const bool seen = j >= row.from && j < row.to;
        store(out + j, seen ? expf(attention_score(a.panel, s[j]) - sums.top) * inv : 0.f);
    }
}

// P again, and dS = slope P (dP - sum over j of P dP), the slope being that of the score by the product.
template <class T> struct AttentionSoftmaxBackward { const float* scores; const float* dp; T* probabilities; T* ds; AttentionPanel panel; };
template <class T> __device__ __forceinline__ void attention_softmax_backward(const AttentionSoftmaxBackward<T>& a) {
    AttentionRow row;
    if (!row.find(a.panel)) return;
    const u32 lane = threadIdx.x & 31;
    const float *s = a.scores + row.at, *dp = a.dp + row.at;
    T *p_out = a.probabilities + row.at, *ds_out = a.ds + row.at;
    Running sums;
    for (u32 j = row.from + lane; j < row.to; j += 32) sums.add(attention_score(a.panel, s[j]), dp[j]);
    sums.over_warp();
    const float inv = 1.f / sums.sum, mean = sums.weighted * inv;
    for (u32 j = lane; j < a.panel.keys; j += 32) {
        float p = 0.f, ds = 0.f;
        if (j >= row.from && j < row.to) {
            const float x = attention_score(a.panel, s[j]);
            p = expf(x - sums.top) * inv;
            const float t = a.panel.cap > 0.f ? x / a.panel.cap : 0.f;
            ds = a.panel.scale * (1.f - t * t) * p * (dp[j] - mean);
        }
        store(p_out + j, p);
        store(ds_out + j, ds);
    }
}

// ---- the cache: keys and values (slots, capacity, width), a row a token ----

// Numbers of the products' type.
template <class T> struct CachedNumbers { T* numbers; const void* unused; };
// Blocks of 32 numbers along a row, ggml's q8_0: signed bytes in one plane, and in another the scale that a block's bytes are
// multiplied by.
struct CachedBlocks { u8* bytes; f16* scales; };

// A warp writes a block, of which each lane has a number. The bytes are those of ggml's quantize_row_q8_0_ref; a NaN or infinite
// number makes the scale NaN or infinite, and with it every number of the block.
__device__ __forceinline__ void write_block(const CachedBlocks& to, u64 block, u32 lane, float v) {
    const float d = __fdiv_rn(warp_max(fabsf(v)), 127.f), inverse = d == 0.f ? 0.f : __fdiv_rn(1.f, d);
    const float q = fminf(fmaxf(roundf(__fmul_rn(v, inverse)), -128.f), 127.f);
    to.bytes[32 * block + lane] = (u8)(signed char)__float2int_rn(q);
    if (lane == 0) store(to.scales + block, d);
}

// Row targets[i] of the cache becomes row sources[i] of new keys and values; null sources are 0, 1, 2, ..
template <class T, class Cached> struct AttentionCacheWrite { const T* k; const T* v; Cached keys; Cached values; const u32* sources; const u32* targets; u32 width, tiles; };
template <class T> __device__ __forceinline__ void attention_cache_write(const AttentionCacheWrite<T, CachedNumbers<T> >& a) {
    const Columns c(a.tiles);
    if (c.column >= a.width) return;
    const u64 source = a.sources ? a.sources[c.row] : c.row, left = a.width - c.column;
    const Four from(source * a.width + c.column, left), to((u64)a.targets[c.row] * a.width + c.column, left);
    float v[4];
    from.read(a.k, v);
    to.write(a.keys.numbers, v);
    from.read(a.v, v);
    to.write(a.values.numbers, v);
}
template <class T> __device__ __forceinline__ void attention_cache_write(const AttentionCacheWrite<T, CachedBlocks>& a) {
    const u64 i = blockIdx.x / a.tiles, source = a.sources ? a.sources[i] : i;
    const u32 of_tile = blockDim.x / 8, first = blockIdx.x % a.tiles * of_tile, lane = threadIdx.x & 31;
    const u64 from = source * a.width + lane, to = (u64)a.targets[i] * (a.width / 32);
    for (u32 b = first + (threadIdx.x >> 5); b < min(first + of_tile, a.width / 32); b += blockDim.x >> 5) {
        write_block(a.keys, to + b, lane, load(a.k + from + 32 * b));
        write_block(a.values, to + b, lane, load(a.v + from + 32 * b));
    }
}

// The rotation of one head by the angles of its position; without rotation `half` is 0.
struct AttentionTurn {
    const float* cos;
    const float* sin;
    u32 half;
    // A warp's share of the numbers that rotate, from x to y.
    template <class T> __device__ __forceinline__ void pairs(const T* x, T* y, u32 lane) const {
        for (u32 j = lane; j < half; j += 32) {
            const float c = cos[j], s = sin[j], x0 = load(x + j), x1 = load(x + j + half);
            store(y + j, x0 * c - x1 * s);
            store(y + j + half, x1 * c + x0 * s);
        }
    }
    // Number d as `pairs` leaves it.
    template <class T> __device__ __forceinline__ float number(const T* x, u32 d) const {
        if (d >= 2 * half) return load(x + d);
        const u32 j = d < half ? d : d - half;
        const float c = cos[j], s = sin[j], x0 = load(x + j), x1 = load(x + j + half);
        return to_float(from_float<T>(d < half ? x0 * c - x1 * s : x1 * c + x0 * s));
    }
};
template <class T> __device__ __forceinline__ void append_head(const CachedNumbers<T>& to, u64 at, const T* x, const AttentionTurn& turn, u32 dim, u32 lane) {
    turn.pairs(x, to.numbers + at, lane);
    for (u32 j = 2 * turn.half + lane; j < dim; j += 32) to.numbers[at + j] = x[j];
}
template <class T> __device__ __forceinline__ void append_head(const CachedBlocks& to, u64 at, const T* x, const AttentionTurn& turn, u32 dim, u32 lane) {
    for (u32 j = 0; j < dim; j += 32) write_block(to, (at + j) / 32, lane, turn.number(x, j + lane));
}

// One token a sequence on its way into a layer's cache: q is rotated where it lies, k is rotated into the cache's row
// `targets[s]`, v is copied there. A warp takes a head. Without rotation (`half` is 0) q stays as it is.
template <class T, class Cached> struct AttentionAppend {
    T* q; const T* k; const T* v; Cached keys; Cached values; const u32* targets; const u32* positions; const float* cos; const float* sin;
    u32 count, heads, kv, dim, half;
};
template <class T, class Cached> __device__ __forceinline__ void attention_append(const AttentionAppend<T, Cached>& a) {
    const u32 all = a.heads + 2 * a.kv, warp = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    const u32 s = warp / all, h = warp % all;
    if (s >= a.count) return;
    const bool of_q = h < a.heads, of_k = !of_q && h < a.heads + a.kv;
    const u32 g = of_q ? h : (h - a.heads) % a.kv;
    const u64 from = ((u64)s * (of_q ? a.heads : a.kv) + g) * a.dim, to = ((u64)a.targets[s] * a.kv + g) * a.dim;
    AttentionTurn turn = {a.cos, a.sin, of_q || of_k ? a.half : 0};
    if (turn.half) {
        const u64 angles = (u64)a.positions[s] * turn.half;
        turn.cos += angles;
        turn.sin += angles;
    }
    if (of_q) turn.pairs(a.q + from, a.q + from, lane);
    else append_head(of_k ? a.keys : a.values, to, (of_k ? a.k : a.v) + from, turn, a.dim, lane);
}

// ---- one query a sequence ----
// A block takes 256 keys of one sequence and key/value head, for up to four of the query heads that share it, so that keys
// and values are read once for them. Sequences of more keys are cut into chunks, whose sums `attention_merge` joins.

constexpr u32 ATTENTION_CHUNK = 256, ATTENTION_TILE = 4, ATTENTION_DIM = 256, ATTENTION_THREADS = 128;

// Numbers 8 c .. 8 c + 8 of a row of `dim`, zeros past its end. Rows of a multiple of eight numbers are aligned.
template <class T> __device__ __forceinline__ void attention_eight(const T* row, u32 c, u32 dim, float* v) {
    if ((dim & 7) == 0) {
        load4(row + 8 * c, v);
        load4(row + 8 * c + 4, v + 4);
    } else {
        for (u32 e = 0; e < 8; e++) v[e] = 8 * c + e < dim ? load(row + 8 * c + e) : 0.f;
    }
}

// The same of a cached head whose first number is number `at` of the cache.
template <class T> __device__ __forceinline__ void cached_eight(const CachedNumbers<T>& from, u64 at, u32 c, u32 dim, float* v) {
    attention_eight(from.numbers + at, c, dim, v);
}
__device__ __forceinline__ void cached_eight(const CachedBlocks& from, u64 at, u32 c, u32, float* v) {
    const U2 bytes = *(const U2*)(from.bytes + at + 8 * c);
    const float d = load(from.scales + at / 32 + c / 4);
    for (u32 i = 0; i < 8; i++) v[i] = signed_byte_float(i < 4 ? bytes.x : bytes.y, i & 3) * d;
}

template <class T, class Cached> struct AttentionDecode {
    const T* q; Cached keys; Cached values; const u32* slots; const u32* lengths; T* o;
    float* parts; float* part_sums;  // (S, heads, chunks, dim) and (S, heads, chunks, 2), where there are several chunks.
    u32 heads, kv, dim, capacity, window, chunks;
    float scale, cap;
};
// The keys that the last query of a sequence of `length` sees begin here.
__device__ __forceinline__ u32 attention_first(u32 length, u32 window) { return window && length > window ? length - window : 0; }

template <class T, class Cached> __device__ __forceinline__ void attention_decode(const AttentionDecode<T, Cached>& a) {
    __shared__ float q[ATTENTION_TILE][ATTENTION_DIM], p[ATTENTION_TILE][ATTENTION_CHUNK], tops[ATTENTION_TILE], totals[ATTENTION_TILE];
    __shared__ float partial[ATTENTION_TILE][8 * ATTENTION_THREADS];
    const u32 s = blockIdx.x / a.kv, g = blockIdx.x % a.kv, group = a.heads / a.kv;
    const u32 head = g * group + ATTENTION_TILE * blockIdx.y, tile = min(ATTENTION_TILE, group - ATTENTION_TILE * blockIdx.y);
    const u32 length = a.lengths[s], begin = attention_first(length, a.window) + ATTENTION_CHUNK * blockIdx.z;
    if (begin >= length && blockIdx.z > 0) return;
    const u32 count = begin < length ? min(ATTENTION_CHUNK, length - begin) : 0, eights = (a.dim + 7) / 8;
    const u64 cached = ((u64)a.slots[s] * a.capacity + begin) * a.kv * a.dim + g * a.dim;
    const u64 next = (u64)a.kv * a.dim;

    for (u32 i = threadIdx.x; i < ATTENTION_TILE * 8 * eights; i += blockDim.x) {
        const u32 h = i / (8 * eights), d = i % (8 * eights);
        q[h][d] = h < tile && d < a.dim ? load(a.q + ((u64)s * a.heads + head + h) * a.dim + d) : 0.f;
    }
    __syncthreads();

    // Eight lanes take a key.
    const u32 lane = threadIdx.x & 7;
    for (u32 j0 = 0; j0 < count; j0 += ATTENTION_THREADS / 8) {
        const u32 j = j0 + threadIdx.x / 8;
        const u64 key = cached + min(j, count - 1) * next;
        float dots[ATTENTION_TILE];
        for (u32 h = 0; h < ATTENTION_TILE; h++) dots[h] = 0.f;
        for (u32 c = lane; c < eights; c += 8) {
            float k[8];
            cached_eight(a.keys, key, c, a.dim, k);
            for (u32 h = 0; h < ATTENTION_TILE; h++) for (u32 e = 0; e < 8; e++) dots[h] += q[h][8 * c + e] * k[e];
        }
        for (u32 h = 0; h < ATTENTION_TILE; h++) {
            for (int o = 4; o; o >>= 1) dots[h] += __shfl_xor_sync(0xffffffffu, dots[h], o);
            if (lane == 0 && j < count) p[h][j] = a.cap > 0.f ? bend(dots[h], a.scale / a.cap, a.cap) : dots[h] * a.scale;
        }
    }
    __syncthreads();

    // A warp takes a head.
    {
        const u32 h = threadIdx.x >> 5;
        Running sums;
        for (u32 j = threadIdx.x & 31; j < count; j += 32) sums.add(p[h][j], 0.f);
        sums.over_warp();
        for (u32 j = threadIdx.x & 31; j < count; j += 32) p[h][j] = expf(p[h][j] - sums.top);
        if ((threadIdx.x & 31) == 0) { tops[h] = sums.top; totals[h] = sums.sum; }
    }
    __syncthreads();

    // A thread sums eight columns over some of the values.
    const u32 at_once = ATTENTION_THREADS / eights, mine = threadIdx.x / eights, c = threadIdx.x % eights;
    if (mine < at_once) {
        float sums[ATTENTION_TILE][8];
        for (u32 h = 0; h < ATTENTION_TILE; h++) for (u32 e = 0; e < 8; e++) sums[h][e] = 0.f;
        for (u32 j = mine; j < count; j += at_once) {
            float v[8];
            cached_eight(a.values, cached + j * next, c, a.dim, v);
            for (u32 h = 0; h < ATTENTION_TILE; h++) for (u32 e = 0; e < 8; e++) sums[h][e] += p[h][j] * v[e];
        }
        for (u32 h = 0; h < ATTENTION_TILE; h++) for (u32 e = 0; e < 8; e++) partial[h][(mine * eights + c) * 8 + e] = sums[h][e];
    }
    __syncthreads();

    for (u32 i = threadIdx.x; i < tile * a.dim; i += blockDim.x) {
        const u32 h = i / a.dim, d = i % a.dim;
        float sum = 0.f;
        for (u32 m = 0; m < at_once; m++) sum += partial[h][m * eights * 8 + d];
        const u64 row = (u64)s * a.heads + head + h;
        if (a.chunks == 1) {
            store(a.o + row * a.dim + d, sum / totals[h]);
        } else {
            const u64 part = row * a.chunks + blockIdx.z;
            a.parts[part * a.dim + d] = sum;
            if (d == 0) { a.part_sums[2 * part] = tops[h]; a.part_sums[2 * part + 1] = totals[h]; }
        }
    }
}

// Joins the chunks of one sequence and head; a block each.
template <class T> struct AttentionMerge { const float* parts; const float* part_sums; const u32* lengths; T* o; u32 heads, dim, window, chunks; };
template <class T> __device__ __forceinline__ void attention_merge(const AttentionMerge<T>& a) {
    const u64 row = blockIdx.x;
    const u32 length = a.lengths[row / a.heads], seen = length - attention_first(length, a.window);
    const u32 chunks = max(1u, (seen + ATTENTION_CHUNK - 1) / ATTENTION_CHUNK);
    const float* sums = a.part_sums + 2 * row * a.chunks;
    float top = -infinity(), total = 0.f;
    for (u32 c = 0; c < chunks; c++) if (sums[2 * c] > top) top = sums[2 * c];
    for (u32 c = 0; c < chunks; c++) total += sums[2 * c + 1] * expf(sums[2 * c] - top);
    for (u32 d = threadIdx.x; d < a.dim; d += blockDim.x) {
        float sum = 0.f;
        for (u32 c = 0; c < chunks; c++) sum += a.parts[(row * a.chunks + c) * a.dim + d] * expf(sums[2 * c] - top);
        store(a.o + row * a.dim + d, sum / total);
    }
}

#define ATTENTION(T) \
    typedef AttentionSoftmax<T> AttentionSoftmax_##T; \
    typedef AttentionSoftmaxBackward<T> AttentionSoftmaxBackward_##T; \
    typedef AttentionCacheWrite<T, CachedNumbers<T> > AttentionCacheWrite_##T; \
    typedef AttentionAppend<T, CachedNumbers<T> > AttentionAppend_##T; \
    typedef AttentionDecode<T, CachedNumbers<T> > AttentionDecode_##T; \
    typedef AttentionCacheWrite<T, CachedBlocks> AttentionCacheWrite_q8_0_##T; \
    typedef AttentionAppend<T, CachedBlocks> AttentionAppend_q8_0_##T; \
    typedef AttentionDecode<T, CachedBlocks> AttentionDecode_q8_0_##T; \
    typedef AttentionMerge<T> AttentionMerge_##T; \
    KERNEL(attention_softmax_##T, AttentionSoftmax_##T, 256) { attention_softmax(a); } \
    KERNEL(attention_softmax_backward_##T, AttentionSoftmaxBackward_##T, 256) { attention_softmax_backward(a); } \
    KERNEL(attention_cache_write_##T, AttentionCacheWrite_##T, 256) { attention_cache_write(a); } \
    KERNEL(attention_append_##T, AttentionAppend_##T, 256) { attention_append(a); } \
    KERNEL(attention_decode_##T, AttentionDecode_##T, 128) { attention_decode(a); } \
    KERNEL(attention_cache_write_q8_0_##T, AttentionCacheWrite_q8_0_##T, 256) { attention_cache_write(a); } \
    KERNEL(attention_append_q8_0_##T, AttentionAppend_q8_0_##T, 256) { attention_append(a); } \
    KERNEL(attention_decode_q8_0_##T, AttentionDecode_q8_0_##T, 128) { attention_decode(a); } \
    KERNEL(attention_merge_##T, AttentionMerge_##T, 128) { attention_merge(a); }
ATTENTION(f32)
ATTENTION(bf16)
ATTENTION(f16)
