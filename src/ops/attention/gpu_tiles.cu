// Causal attention over whole sequences in tiles, on tensor cores: no score lies in memory (the online softmax of
// arXiv:2205.14135). Operands are bf16 or f16, heads have up to 128 numbers; gpu.rs chooses between this and panels. Depends on
// ops/common.cu.
//
// A block of four warps takes 64 queries of one head, sixteen a warp, and goes over the keys in tiles of 64. Lane 4 g + t of a
// warp has rows g and g + 8 of the fragments of mma.m16n8k16: scores of the keys 8 n + 2 t and the next one are s[n][0], s[n][1]
// for row g and s[n][2], s[n][3] for row g + 8, which is how the product with the values takes them as well. DP is the
// head's width, zeros included.

template <class T> struct AttentionTiles {
    const T* q; const T* k; const T* v; T* o;
    const U4* tiles;  // For each tile of queries: its sequence's first row and length, its first query, and the keys that may be seen.
    u32 heads, kv, dim, window, wide;  // `wide`: eight numbers can be loaded at once.
    float scale, cap;
};
// Two neighbouring numbers of a row, zeros past its end.
template <class T> __device__ __forceinline__ u32 attention_pair(const T* row, u32 d, u32 dim, bool whole) {
    if (whole) return d < dim ? *(const u32*)(row + d) : 0;
    return pair<T>(d < dim ? load(row + d) : 0.f, d + 1 < dim ? load(row + d + 1) : 0.f);
}
// Numbers 8 c .. 8 c + 8 of a row as four words, zeros past its end.
template <class T> __device__ __forceinline__ U4 attention_words(const T* row, u32 c, u32 dim, bool wide) {
    U4 w;
    if (wide && 8 * c < dim) return *(const U4*)(row + 8 * c);
    w.x = attention_pair(row, 8 * c, dim, false); w.y = attention_pair(row, 8 * c + 2, dim, false);
    w.z = attention_pair(row, 8 * c + 4, dim, false); w.w = attention_pair(row, 8 * c + 6, dim, false);
    return w;
}

// Rows of words at distances that give the lanes of a warp different banks.
template <int DP> struct AttentionRows { enum { EIGHTS = DP / 8, ROW = DP / 2 + 4, PAIR = DP + 8 }; };
// Rows first .. first + COUNT of x, zeros from `end` on, as words of two neighbouring numbers of a row.
template <class T, int DP, int COUNT> __device__ __forceinline__ void attention_rows(u32* to, const T* x, u64 distance, u32 first, u32 end, u32 dim, bool wide) {
    typedef AttentionRows<DP> R;
    for (u32 i = threadIdx.x; i < COUNT * R::EIGHTS; i += blockDim.x) {
        const u32 j = i / R::EIGHTS, c = i % R::EIGHTS;
        U4 w;
        w.x = w.y = w.z = w.w = 0;
        if (first + j < end) w = attention_words(x + (first + j) * distance, c, dim, wide);
        *(U4*)(to + j * R::ROW + 4 * c) = w;
    }
}
// The same rows as words of one number of two neighbouring rows.
template <class T, int DP, int COUNT> __device__ __forceinline__ void attention_pairs(u32* to, const T* x, u64 distance, u32 first, u32 end, u32 dim, bool wide) {
    typedef AttentionRows<DP> R;
    for (u32 i = threadIdx.x; i < COUNT / 2 * R::EIGHTS; i += blockDim.x) {
        const u32 j = first + 2 * (i / R::EIGHTS), c = i % R::EIGHTS;
        u32 even[4] = {0, 0, 0, 0}, odd[4] = {0, 0, 0, 0};
        if (j < end) { const U4 w = attention_words(x + j * distance, c, dim, wide); even[0] = w.x; even[1] = w.y; even[2] = w.z; even[3] = w.w; }
        if (j + 1 < end) { const U4 w = attention_words(x + (j + 1) * distance, c, dim, wide); odd[0] = w.x; odd[1] = w.y; odd[2] = w.z; odd[3] = w.w; }
        u32* at = to + i / R::EIGHTS * R::PAIR + 8 * c;
#pragma unroll
        for (int e = 0; e < 4; e++) {
            at[2 * e] = __byte_perm(even[e], odd[e], 0x5410u);
            at[2 * e + 1] = __byte_perm(even[e], odd[e], 0x7632u);
        }
    }
}
// The lane's share of a row as the left factor of products: half r of the fragments; zeros without a row.
template <class T, int DP> __device__ __forceinline__ void attention_fragments(u32 (*f)[4], int r, const T* row, bool exists, u32 t, u32 dim, bool wide) {
#pragma unroll
    for (int c = 0; c < DP / 16; c++)
#pragma unroll
        for (int h = 0; h < 2; h++) f[c][r + 2 * h] = exists ? attention_pair(row, 16 * c + 8 * h + 2 * t, dim, wide) : 0;
}
// sums[n] = the products of sixteen rows with rows 8 n .. 8 n + 8 of shared words, N times eight of them.
template <class T, int DP, int N> __device__ __forceinline__ void attention_by_rows(float (*sums)[4], u32 (*f)[4], const u32* rows, u32 g, u32 t) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        for (int i = 0; i < 4; i++) sums[n][i] = 0.f;
#pragma unroll
        for (int c = 0; c < DP / 16; c++) {
            const u32* at = rows + (8 * n + g) * AttentionRows<DP>::ROW + 8 * c + t;
            const u32 b[2] = {at[0], at[4]};
            mma(T(), sums[n], f[c], b);
        }
    }
}
// sums += the sixteen columns of `two` times sixteen rows of shared pairs.
template <class T, int DP> __device__ __forceinline__ void attention_add_by_pairs(float (*sums)[4], const float (*two)[4], const u32* pairs, u32 g, u32 t) {
    const u32 p[4] = {pair<T>(two[0][0], two[0][1]), pair<T>(two[0][2], two[0][3]), pair<T>(two[1][0], two[1][1]), pair<T>(two[1][2], two[1][3])};
#pragma unroll
    for (int n = 0; n < DP / 8; n++) {
        const u32* at = pairs + t * AttentionRows<DP>::PAIR + 8 * n + g;
        const u32 b[2] = {at[0], at[4 * AttentionRows<DP>::PAIR]};
        mma(T(), sums[n], p, b);
    }
}
// The lane's numbers of half r of the sums, times a factor, as a row.
template <class T, int DP> __device__ __forceinline__ void attention_store(T* row, const float (*sums)[4], int r, float factor, u32 t, u32 dim, bool wide) {
#pragma unroll
    for (int n = 0; n < DP / 8; n++) {
        const u32 d = 8 * n + 2 * t;
        const float one = sums[n][2 * r] * factor, other = sums[n][2 * r + 1] * factor;
        if (wide) {
            if (d < dim) *(u32*)(row + d) = pair<T>(one, other);
        } else {
            if (d < dim) store(row + d, one);
            if (d + 1 < dim) store(row + d + 1, other);
        }
    }
}
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
// The keys that query i sees.
struct AttentionSeen {
    u32 from, to;
    __device__ __forceinline__ AttentionSeen(u32 i, bool exists, u32 readable, u32 window) {
        to = exists ? min(i + 1, readable) : 0;
        from = window && i + 1 > window ? i + 1 - window : 0;
        if (exists) from = min(from, to - 1);
    }
    __device__ __forceinline__ bool has(u32 j) const { return j >= from && j < to; }
};
__device__ __forceinline__ float attention_bent(float product, float scale, float cap) { return cap > 0.f ? bend(product, scale / cap, cap) : product * scale; }

template <class T, int DP> __device__ __forceinline__ void attention_tiles(const AttentionTiles<T>& a) {
    typedef AttentionRows<DP> R;
    __shared__ u32 keys[64 * R::ROW], values[32 * R::PAIR];
    const U4 tile = a.tiles[blockIdx.x];
    const u32 first_row = tile.x, length = tile.y, first_query = tile.z, readable = tile.w;
    const u32 head = blockIdx.y, of_kv = head / (a.heads / a.kv), warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const u64 row_of_q = (u64)a.heads * a.dim, row_of_kv = (u64)a.kv * a.dim;
    const T* k = a.k + first_row * row_of_kv + of_kv * a.dim;
    const T* v = a.v + first_row * row_of_kv + of_kv * a.dim;
    const u32 query = first_query + 16 * warp + g;
    const bool exists[2] = {query < length, query + 8 < length};
    const AttentionSeen seen[2] = {AttentionSeen(query, exists[0], readable, a.window), AttentionSeen(query + 8, exists[1], readable, a.window)};
    u32 q[DP / 16][4];
    const T* row = a.q + (u64)(first_row + query) * row_of_q + head * a.dim;
    for (int r = 0; r < 2; r++) attention_fragments<T, DP>(q, r, row + 8 * r * row_of_q, exists[r], t, a.dim, a.wide);
    float o[R::EIGHTS][4], top[2], sum[2];
#pragma unroll
    for (int n = 0; n < R::EIGHTS; n++) for (int i = 0; i < 4; i++) o[n][i] = 0.f;
    for (int r = 0; r < 2; r++) { top[r] = -infinity(); sum[r] = 0.f; }

    const u32 end = min(min(first_query + 64, length), readable), begin = AttentionSeen(first_query, true, readable, a.window).from;
    for (u32 j0 = begin & ~63u; j0 < end; j0 += 64) {
        __syncthreads();
        attention_rows<T, DP, 64>(keys, k, row_of_kv, j0, end, a.dim, a.wide);
        attention_pairs<T, DP, 64>(values, v, row_of_kv, j0, end, a.dim, a.wide);
        __syncthreads();
        float s[8][4], factor[2];
        attention_by_rows<T, DP, 8>(s, q, keys, g, t);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = top[r];
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    const float score = attention_bent(s[n][i], a.scale, a.cap);
                    s[n][i] = seen[r].has(j0 + 8 * n + 2 * t + (i & 1)) ? score : -infinity();
                    if (s[n][i] > most) most = s[n][i];
                }
            for (int x = 1; x < 4; x *= 2) {
                const float other = __shfl_xor_sync(0xffffffffu, most, x);
                if (other > most) most = other;
            }
            factor[r] = top[r] == -infinity() ? 0.f : expf(top[r] - most);
            top[r] = most;
            float more = 0.f;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    s[n][i] = s[n][i] == -infinity() ? 0.f : expf(s[n][i] - most);
                    more += s[n][i];
                }
            sum[r] = sum[r] * factor[r] + more;
        }
#pragma unroll
        for (int n = 0; n < R::EIGHTS; n++) for (int i = 0; i < 4; i++) o[n][i] *= factor[i >> 1];
#pragma unroll
        for (int c = 0; c < 4; c++) attention_add_by_pairs<T, DP>(o, s + 2 * c, values + 8 * c * R::PAIR, g, t);
    }
    T* to = a.o + (u64)(first_row + query) * row_of_q + head * a.dim;
    for (int r = 0; r < 2; r++) {
        const float inv = 1.f / quad_sum(sum[r]);
        if (exists[r]) attention_store<T, DP>(to + 8 * r * row_of_q, o, r, inv, t, a.dim, a.wide);
    }
}

// The backward in two kernels. The first has the tiles of queries: it goes over the keys once for the softmax's sums, which it
// leaves in `stats`, and once for dL/dq. The second has tiles of 64 keys and goes over the queries that see them, head by head
// of their group, for dL/dk and dL/dv. With P the probabilities and dP = dO V^T: dS = slope P (dP - delta), delta the sum over a
// query's keys of P dP; dq = dS k, dk = dS^T q, dv = P^T dO.
template <class T> struct AttentionTilesBackward {
    const T* q; const T* k; const T* v; const T* d_o; T* dq; T* dk; T* dv;
    float* stats;  // (N, heads, 2): the logarithm of a row's sum of e^score, and delta.
    const U4* tiles;
    u32 heads, kv, dim, window, wide;
    float scale, cap;
};
template <class T> __device__ __forceinline__ float attention_slope(const AttentionTilesBackward<T>& a, float score) {
    if (!(a.cap > 0.f)) return a.scale;
    const float bent = score / a.cap;
    return a.scale * (1.f - bent * bent);
}

template <class T, int DP> __device__ __forceinline__ void attention_tiles_dq(const AttentionTilesBackward<T>& a) {
    typedef AttentionRows<DP> R;
    __shared__ u32 keys[32 * R::ROW], values[32 * R::ROW], key_pairs[16 * R::PAIR];
    const U4 tile = a.tiles[blockIdx.x];
    const u32 first_row = tile.x, length = tile.y, first_query = tile.z, readable = tile.w;
    const u32 head = blockIdx.y, of_kv = head / (a.heads / a.kv), warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const u64 row_of_q = (u64)a.heads * a.dim, row_of_kv = (u64)a.kv * a.dim;
    const T* k = a.k + first_row * row_of_kv + of_kv * a.dim;
    const T* v = a.v + first_row * row_of_kv + of_kv * a.dim;
    const u32 query = first_query + 16 * warp + g;
    const bool exists[2] = {query < length, query + 8 < length};
    const AttentionSeen seen[2] = {AttentionSeen(query, exists[0], readable, a.window), AttentionSeen(query + 8, exists[1], readable, a.window)};
    const u64 at = (u64)(first_row + query) * row_of_q + head * a.dim;
    u32 q[DP / 16][4], d_o[DP / 16][4];
    for (int r = 0; r < 2; r++) {
        attention_fragments<T, DP>(q, r, a.q + at + 8 * r * row_of_q, exists[r], t, a.dim, a.wide);
        attention_fragments<T, DP>(d_o, r, a.d_o + at + 8 * r * row_of_q, exists[r], t, a.dim, a.wide);
    }
    const u32 end = min(min(first_query + 64, length), readable), begin = AttentionSeen(first_query, true, readable, a.window).from;
    float top[2], sum[2], weighted[2];
    for (int r = 0; r < 2; r++) { top[r] = -infinity(); sum[r] = weighted[r] = 0.f; }
    for (u32 j0 = begin & ~31u; j0 < end; j0 += 32) {
        __syncthreads();
        attention_rows<T, DP, 32>(keys, k, row_of_kv, j0, end, a.dim, a.wide);
        attention_rows<T, DP, 32>(values, v, row_of_kv, j0, end, a.dim, a.wide);
        __syncthreads();
        float s[4][4], dp[4][4];
        attention_by_rows<T, DP, 4>(s, q, keys, g, t);
        attention_by_rows<T, DP, 4>(dp, d_o, values, g, t);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = top[r];
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    const float score = attention_bent(s[n][i], a.scale, a.cap);
                    s[n][i] = seen[r].has(j0 + 8 * n + 2 * t + (i & 1)) ? score : -infinity();
                    if (s[n][i] > most) most = s[n][i];
                }
            for (int x = 1; x < 4; x *= 2) {
                const float other = __shfl_xor_sync(0xffffffffu, most, x);
                if (other > most) most = other;
            }
            const float factor = top[r] == -infinity() ? 0.f : expf(top[r] - most);
            top[r] = most;
            sum[r] *= factor;
            weighted[r] *= factor;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    if (s[n][i] == -infinity()) continue;
                    const float e = expf(s[n][i] - most);
                    sum[r] += e;
                    weighted[r] += e * dp[n][i];
                }
        }
    }
    float all[2], delta[2], dq[R::EIGHTS][4];
    for (int r = 0; r < 2; r++) {
        const float total = quad_sum(sum[r]);
        all[r] = top[r] + logf(total);
        delta[r] = quad_sum(weighted[r]) / total;
        if (exists[r] && t == 0) {
            float* stats = a.stats + 2 * ((u64)(first_row + query + 8 * r) * a.heads + head);
            stats[0] = all[r];
            stats[1] = delta[r];
        }
    }
#pragma unroll
    for (int n = 0; n < R::EIGHTS; n++) for (int i = 0; i < 4; i++) dq[n][i] = 0.f;
    for (u32 j0 = begin & ~31u; j0 < end; j0 += 32) {
        __syncthreads();
        attention_rows<T, DP, 32>(keys, k, row_of_kv, j0, end, a.dim, a.wide);
        attention_rows<T, DP, 32>(values, v, row_of_kv, j0, end, a.dim, a.wide);
        attention_pairs<T, DP, 32>(key_pairs, k, row_of_kv, j0, end, a.dim, a.wide);
        __syncthreads();
        float s[4][4], dp[4][4];
        attention_by_rows<T, DP, 4>(s, q, keys, g, t);
        attention_by_rows<T, DP, 4>(dp, d_o, values, g, t);
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int r = i >> 1;
                const float score = attention_bent(s[n][i], a.scale, a.cap);
                s[n][i] = seen[r].has(j0 + 8 * n + 2 * t + (i & 1)) ? attention_slope(a, score) * expf(score - all[r]) * (dp[n][i] - delta[r]) : 0.f;
            }
#pragma unroll
        for (int c = 0; c < 2; c++) attention_add_by_pairs<T, DP>(dq, s + 2 * c, key_pairs + 8 * c * R::PAIR, g, t);
    }
    for (int r = 0; r < 2; r++)
        if (exists[r]) attention_store<T, DP>(a.dq + at + 8 * r * row_of_q, dq, r, 1.f, t, a.dim, a.wide);
}

template <class T, int DP> __device__ __forceinline__ void attention_tiles_dkv(const AttentionTilesBackward<T>& a) {
    typedef AttentionRows<DP> R;
    __shared__ u32 queries[32 * R::ROW], grads[32 * R::ROW], query_pairs[16 * R::PAIR], grad_pairs[16 * R::PAIR];
    const U4 tile = a.tiles[blockIdx.x];
    const u32 first_row = tile.x, length = tile.y, first_key = tile.z, readable = tile.w;
    const u32 of_kv = blockIdx.y, group = a.heads / a.kv, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const u64 row_of_q = (u64)a.heads * a.dim, row_of_kv = (u64)a.kv * a.dim;
    const u32 key = first_key + 16 * warp + g;
    const bool exists[2] = {key < length, key + 8 < length};
    const u64 at = (u64)(first_row + key) * row_of_kv + of_kv * a.dim;
    u32 k[DP / 16][4], v[DP / 16][4];
    for (int r = 0; r < 2; r++) {
        attention_fragments<T, DP>(k, r, a.k + at + 8 * r * row_of_kv, exists[r], t, a.dim, a.wide);
        attention_fragments<T, DP>(v, r, a.v + at + 8 * r * row_of_kv, exists[r], t, a.dim, a.wide);
    }
    float dk[R::EIGHTS][4], dv[R::EIGHTS][4];
#pragma unroll
    for (int n = 0; n < R::EIGHTS; n++) for (int i = 0; i < 4; i++) dk[n][i] = dv[n][i] = 0.f;
    // The queries that see any key of the tile. The last key that may be seen is seen by all later queries.
    u32 end = first_key < readable ? length : 0;
    if (a.window && first_key + 64 < readable) end = min(end, first_key + 63 + a.window);
    for (u32 head = of_kv * group; head < (of_kv + 1) * group; head++) {
        const T* q = a.q + first_row * row_of_q + head * a.dim;
        const T* d_o = a.d_o + first_row * row_of_q + head * a.dim;
        const float* stats = a.stats + 2 * ((u64)first_row * a.heads + head);
        for (u32 i0 = first_key; i0 < end; i0 += 32) {
            __syncthreads();
            attention_rows<T, DP, 32>(queries, q, row_of_q, i0, end, a.dim, a.wide);
            attention_rows<T, DP, 32>(grads, d_o, row_of_q, i0, end, a.dim, a.wide);
            attention_pairs<T, DP, 32>(query_pairs, q, row_of_q, i0, end, a.dim, a.wide);
            attention_pairs<T, DP, 32>(grad_pairs, d_o, row_of_q, i0, end, a.dim, a.wide);
            __syncthreads();
#pragma unroll 1
            for (u32 half = 0; half < 2; half++) {
                float s[2][4], dp[2][4];
                attention_by_rows<T, DP, 2>(s, k, queries + 16 * half * R::ROW, g, t);
                attention_by_rows<T, DP, 2>(dp, v, grads + 16 * half * R::ROW, g, t);
#pragma unroll
                for (int n = 0; n < 2; n++)
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        const u32 i = i0 + 16 * half + 8 * n + 2 * t + c;
                        const AttentionSeen seen(i, i < end, readable, a.window);
                        const u64 of_stats = 2 * (u64)(i < end ? i : first_key) * a.heads;
                        const float all = stats[of_stats], delta = stats[of_stats + 1];
#pragma unroll
                        for (int r = 0; r < 2; r++) {
                            const float score = attention_bent(s[n][2 * r + c], a.scale, a.cap);
                            const float p = seen.has(key + 8 * r) ? expf(score - all) : 0.f;
                            s[n][2 * r + c] = p;
                            dp[n][2 * r + c] = seen.has(key + 8 * r) ? attention_slope(a, score) * p * (dp[n][2 * r + c] - delta) : 0.f;
                        }
                    }
                attention_add_by_pairs<T, DP>(dv, s, grad_pairs + 8 * half * R::PAIR, g, t);
                attention_add_by_pairs<T, DP>(dk, dp, query_pairs + 8 * half * R::PAIR, g, t);
            }
        }
    }
    for (int r = 0; r < 2; r++) {
        if (!exists[r]) continue;
        attention_store<T, DP>(a.dk + at + 8 * r * row_of_kv, dk, r, 1.f, t, a.dim, a.wide);
        attention_store<T, DP>(a.dv + at + 8 * r * row_of_kv, dv, r, 1.f, t, a.dim, a.wide);
    }
}
#define ATTENTION_TILES(T) \
    typedef AttentionTiles<T> AttentionTiles_##T; \
    typedef AttentionTilesBackward<T> AttentionTilesBackward_##T; \
    KERNEL(attention_tiles_64_##T, AttentionTiles_##T, 128, 1) { attention_tiles<T, 64>(a); } \
    KERNEL(attention_tiles_128_##T, AttentionTiles_##T, 128, 1) { attention_tiles<T, 128>(a); } \
    KERNEL(attention_tiles_dq_64_##T, AttentionTilesBackward_##T, 128, 1) { attention_tiles_dq<T, 64>(a); } \
    KERNEL(attention_tiles_dq_128_##T, AttentionTilesBackward_##T, 128, 1) { attention_tiles_dq<T, 128>(a); } \
    KERNEL(attention_tiles_dkv_64_##T, AttentionTilesBackward_##T, 128, 1) { attention_tiles_dkv<T, 64>(a); } \
    KERNEL(attention_tiles_dkv_128_##T, AttentionTilesBackward_##T, 128, 1) { attention_tiles_dkv<T, 128>(a); }
ATTENTION_TILES(bf16)
ATTENTION_TILES(f16)
