// gemv: y (rows, n) = x (rows, k) W^T [+ z B^T] [+ bias] [+ residual] for few rows, straight from the stored bytes of
// W (n, k), as decoding needs it: the time is that of reading W once. Up to three maps of one input go in one launch. Sums
// are f32; W's values are rounded to x's type T first, so that the result is that of dequantising to T and multiplying. Reads
// W through the storage types of ops/storage/gpu.cu.
//
// Three kernels: `gemv_<type>_<T>` takes every type, T and k, and up to 16 rows; `gemv_tensor_` and `gemv_wide_` use the
// tensor cores, for the types that decoding meets most, T of two bytes and k a multiple of 64, the first up to 16 rows and the
// second up to 64. gpu_gemv.rs chooses. `low_rank_inputs_<T>` makes the z of all maps: s x A^T.

// One map of a launch. y, the residual: one of the two pointers each, by the element type; both null where there is no
// residual. z and b are null where there is no branch.
template <class T> struct GemvMap {
    stored::Planes weight;
    float* y_f32; T* y;
    const float* residual_f32; const T* residual;
    const float* bias;
    const T* z; const T* b;  // (rows, z_stride) from this map's first column on, and B (n, rank).
    unsigned n, rank, z_stride, first_block;
};
template <class T> struct Gemv {
    GemvMap<T> maps[3];
    const T* x;
    unsigned count, rows, k;
};

namespace stored {
// The map that the block works for.
template <class T> __device__ __forceinline__ const GemvMap<T>& map_of_block(const Gemv<T>& a) {
    return a.maps[a.count > 2 && blockIdx.x >= a.maps[2].first_block ? 2 : a.count > 1 && blockIdx.x >= a.maps[1].first_block];
}
template <class T> __device__ __forceinline__ void finish(const GemvMap<T>& p, unsigned m, unsigned n, float v) {
    const size_t i = (size_t)m * p.n + n;
    if (p.b) {
        const T *z = p.z + (size_t)m * p.z_stride, *b = p.b + (size_t)n * p.rank;
        unsigned r = 0;
        if ((((size_t)z | (size_t)b) & 15) == 0) {
            for (; r + 8 <= p.rank; r += 8) {
                float s[8], t[8];
                load8(z + r, s);
                load8(b + r, t);
#pragma unroll
                for (int e = 0; e < 8; e++) v += s[e] * t[e];
            }
        }
        for (; r < p.rank; r++) v += load(z + r) * load(b + r);
    }
    if (p.bias) v += p.bias[n];
    if (p.residual_f32) v += p.residual_f32[i];
    else if (p.residual) v += to_float(p.residual[i]);
    if (p.y_f32) p.y_f32[i] = v;
    else store(p.y + i, v);
}
template <class T> __device__ __forceinline__ float rounded(float v) { return to_float(from_float<T>(v)); }

// ---- every type: a warp computes one column of y. Its lanes share the units of W's row. ---- A thread's sums lie
// in shared memory, so that the loop over the rows of x need not be unrolled: with 14 types and three T that would
// take many seconds to compile.

template <class S, class T> __device__ __forceinline__ void gemv_plain(const Gemv<T>& a) {
    __shared__ float sums[16][256];
    __shared__ float table[16];
    fill_table<S>(table);
    const GemvMap<T>& map = map_of_block(a);
    const unsigned lane = threadIdx.x & 31, n = 8 * (blockIdx.x - map.first_block) + (threadIdx.x >> 5);
    if (n >= map.n) return;
    for (unsigned m = 0; m < a.rows; m++) sums[m][threadIdx.x] = 0.f;
    if (S::DENSE && a.k % 16 != 0) {
        for (unsigned i = lane; i < a.k; i += 32) {
            const float w = rounded<T>(Single<S, S::DENSE != 0>::number(map.weight, (size_t)n * a.k + i));
            for (unsigned m = 0; m < a.rows; m++) sums[m][threadIdx.x] += w * load(a.x + (size_t)m * a.k + i);
        }
    } else {
        const unsigned units = a.k / 16;
        for (unsigned u = lane; u < units; u += 32) {
            float w[16];
            decode_unit<S>(map.weight, (size_t)n * units + u, w, table);
#pragma unroll
            for (int i = 0; i < 16; i++) w[i] = rounded<T>(w[i]);
            const T* x = a.x + first_column<S>(u);
#pragma unroll 1
            for (unsigned m = 0; m < a.rows; m++, x += a.k) {
                float v[16], s = sums[m][threadIdx.x];
                load8(x, v);
                load8(x + S::SPAN / 2, v + 8);
#pragma unroll
                for (int i = 0; i < 16; i++) s += w[i] * v[i];
                sums[m][threadIdx.x] = s;
            }
        }
    }
    float mine = 0.f;
#pragma unroll 1
    for (unsigned m = 0; m < a.rows; m++) {
        const float all = warp_sum(sums[m][threadIdx.x]);
        if (lane == m) mine = all;
    }
    if (lane < a.rows) finish(map, lane, n, mine);
}

// ---- tensor cores: a block of eight warps computes sixteen columns of y per GROUP, for up to 8 TILES rows ---- Sixteen
// rows of W are the operand with 16 rows of mma.m16n8k16, x (eight of its rows at a time) the one with 8 columns. A slab is
// 64 numbers of k. The warps of a group share its slabs in runs of four. Of a slab, lane 4g + t holds unit t of W's rows g
// and g + 8 and the same sixteen columns of x's row g; which of them the hardware calls which k does not matter,
// because the sum is over all. With more rows, x is what a block reads most of: several groups then read the same of it at
// about the same time, once from the second cache.

// A unit as eight words of two T each. Dense weights of type T are used as they lie.
template <class S, class T> struct Words {
    typedef typename S::Head Head;
    typedef typename S::Raw Raw;
    static __device__ __forceinline__ void of(const Head& h, const Raw& r, unsigned u, u32* o, const float* table) {
        float v[16];
        S::decode(h, r, u, v, table);
#pragma unroll
        for (int i = 0; i < 8; i++) o[i] = pair<T>(v[2 * i], v[2 * i + 1]);
    }
};
template <class T, int WIDTH> struct Words<Dense<T, WIDTH>, T> {
    typedef typename Dense<T, WIDTH>::Head Head;
    typedef typename Dense<T, WIDTH>::Raw Raw;
    static __device__ __forceinline__ void of(const Head&, const Raw& r, unsigned, u32* o, const float*) {
        for (int h = 0; h < 2; h++) {
            const U4 w = r.w[h][0];
            o[4 * h] = w.x; o[4 * h + 1] = w.y; o[4 * h + 2] = w.z; o[4 * h + 3] = w.w;
        }
    }
};

template <class S, class T, int TILES, int GROUPS> __device__ __forceinline__ void gemv_tensor(const Gemv<T>& a) {
    enum { SHARES = 8 / GROUPS, COLUMNS = 16 * GROUPS };
    __shared__ float sums[SHARES][8 * TILES][COLUMNS];
    __shared__ float table[16];
    fill_table<S>(table);
    // Blocks of 256 numbers have one head a run; of smaller ones, each unit of a slab reads its own.
    enum { SHARED = S::BLOCK == 256, HEADS = SHARED ? 1 : 4, UNITS = S::BLOCK / 16 };
    const unsigned warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const GemvMap<T>& map = map_of_block(a);
    const unsigned first = COLUMNS * (blockIdx.x - map.first_block), slabs = a.k / 64;
    const unsigned share = warp / GROUPS, group = 16 * (warp % GROUPS);
    // The first units of this lane's two rows of W. A ragged end reads the last row again, and nothing comes of it.
    const unsigned row[2] = {min(first + group + g, map.n - 1) * (a.k / 16),
                             min(first + group + g + 8, map.n - 1) * (a.k / 16)};
    // Few addresses are kept in registers; many would not fit there.
    enum { KEPT = TILES <= 2 };
    const T* rows_of_x[TILES];
    float c[TILES][4];
#pragma unroll
    for (int m = 0; m < TILES; m++) {
        if (KEPT) rows_of_x[m] = a.x + (size_t)min(8 * m + g, a.rows - 1) * a.k;
        for (int i = 0; i < 4; i++) c[m][i] = 0.f;
    }
    for (unsigned base = 4 * share; base < slabs; base += 4 * SHARES) {
        typename S::Head heads[2][HEADS];
        typename S::Raw raw[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {  // All loads first.
            if (base + i < slabs) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const unsigned unit = row[r] + 4 * (base + i) + t;
                    if (i == 0 || !SHARED) heads[r][SHARED ? 0 : i] = S::head(map.weight, unit / UNITS);
                    raw[r][i] = S::fetch(map.weight, unit);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (base + i < slabs) {
                unsigned w[2][8];
#pragma unroll
                for (int r = 0; r < 2; r++)
                    Words<S, T>::of(heads[r][SHARED ? 0 : i], raw[r][i], (4 * i + t) % UNITS, w[r], table);
                const size_t column = first_column<S>(4 * (base + i) + t);
#pragma unroll
                for (int m = 0; m < TILES; m++) {
                    if (m > 0 && a.rows <= 8u * m) break;
                    const T* x = (KEPT ? rows_of_x[m] : a.x + (size_t)min(8 * m + g, a.rows - 1) * a.k) + column;
                    const U4 v[2] = {*(const U4*)x, *(const U4*)(x + S::SPAN / 2)};
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const unsigned *p = w[0] + 4 * h, *q = w[1] + 4 * h;
                        const unsigned a0[4] = {p[0], q[0], p[1], q[1]}, b0[2] = {v[h].x, v[h].y};
                        const unsigned a1[4] = {p[2], q[2], p[3], q[3]}, b1[2] = {v[h].z, v[h].w};
                        mma(T(), c[m], a0, b0);
                        mma(T(), c[m], a1, b1);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < TILES; m++)
        for (int i = 0; i < 4; i++) sums[share][8 * m + 2 * t + (i & 1)][group + g + 8 * (i >> 1)] = c[m][i];
    __syncthreads();
    for (unsigned i = threadIdx.x; i < a.rows * COLUMNS; i += blockDim.x) {
        const unsigned m = i / COLUMNS, n = i % COLUMNS;
        if (first + n >= map.n) continue;
        float v = 0.f;
        for (int s = 0; s < SHARES; s++) v += sums[s][m][n];
        finish(map, m, first + n, v);
    }
}
}  // namespace stored

// z (rows, stride) = scale x A^T for up to three maps side by side: a block computes one column for eight rows.
template <class T> struct LowRankInputs {
    const T* a[3];
    const T* x;
    T* z;
    float scale[3];
    unsigned end[3];  // One past the last column of each map.
    unsigned rows, k, stride, wide;  // `wide`: eight numbers can be loaded at once.
};
template <class T> __device__ __forceinline__ void low_rank_inputs(const LowRankInputs<T>& a) {
    __shared__ float sums[8][8];
    const unsigned j = blockIdx.x, map = (j >= a.end[0]) + (j >= a.end[1]), from = 8 * blockIdx.y, rows = min(8u, a.rows - from);
    const T* x = a.x + (size_t)from * a.k;
    const T* w = a.a[map] + (size_t)(j - (map ? a.end[map - 1] : 0)) * a.k;
    float s[8];
#pragma unroll
    for (unsigned m = 0; m < 8; m++) s[m] = 0.f;
    if (a.wide) {
        for (unsigned c = 8 * threadIdx.x; c < a.k; c += 8 * blockDim.x) {
            float v[8];
            stored::load8(w + c, v);
#pragma unroll
            for (unsigned m = 0; m < 8; m++) {
                if (m < rows) {
                    float u[8];
                    stored::load8(x + (size_t)m * a.k + c, u);
#pragma unroll
                    for (int e = 0; e < 8; e++) s[m] += v[e] * u[e];
                }
            }
        }
    } else {
        for (unsigned c = threadIdx.x; c < a.k; c += blockDim.x) {
            const float v = load(w + c);
#pragma unroll
            for (unsigned m = 0; m < 8; m++) if (m < rows) s[m] += v * load(x + (size_t)m * a.k + c);
        }
    }
#pragma unroll
    for (unsigned m = 0; m < 8; m++) {
        if (m < rows) {
            const float all = warp_sum(s[m]);
            if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5][m] = all;
        }
    }
    __syncthreads();
    if (threadIdx.x < rows) {
        float all = 0.f;
        for (int w = 0; w < 8; w++) all += sums[w][threadIdx.x];
        store(a.z + (size_t)(from + threadIdx.x) * a.stride + j, a.scale[map] * all);
    }
}
#define LOW_RANK_INPUTS(T) KERNEL(low_rank_inputs_##T, LowRankInputs<T>, 256) { low_rank_inputs(a); }
typedef float f32;
LOW_RANK_INPUTS(f32)
LOW_RANK_INPUTS(bf16)
LOW_RANK_INPUTS(f16)

#define GEMV(name, S) \
    KERNEL(gemv_##name##_f32, Gemv<float>, 256) { stored::gemv_plain<S, float>(a); } \
    KERNEL(gemv_##name##_bf16, Gemv<bf16>, 256) { stored::gemv_plain<S, bf16>(a); } \
    KERNEL(gemv_##name##_f16, Gemv<f16>, 256) { stored::gemv_plain<S, f16>(a); }
FOR_EVERY_STORED_TYPE(GEMV)

// Dense types with a span of 64: the four lanes of a slab then load neighbouring words.
typedef stored::Dense<f16, 64> DenseF16;
typedef stored::Dense<bf16, 64> DenseBf16;
#define GEMV_TENSOR(name, S) \
    KERNEL(gemv_tensor_##name##_bf16, Gemv<bf16>, 256, 1) { stored::gemv_tensor<S, bf16, 2, 1>(a); } \
    KERNEL(gemv_tensor_##name##_f16, Gemv<f16>, 256, 1) { stored::gemv_tensor<S, f16, 2, 1>(a); } \
    KERNEL(gemv_wide_##name##_bf16, Gemv<bf16>, 256, 1) { stored::gemv_tensor<S, bf16, 8, 4>(a); } \
    KERNEL(gemv_wide_##name##_f16, Gemv<f16>, 256, 1) { stored::gemv_tensor<S, f16, 8, 4>(a); }
GEMV_TENSOR(f16, DenseF16)
GEMV_TENSOR(bf16, DenseBf16)
GEMV_TENSOR(q8_0, stored::Q8_0)
GEMV_TENSOR(q4_0, stored::Q4_0)
GEMV_TENSOR(q4_k, stored::Q4_K)
GEMV_TENSOR(q6_k, stored::Q6_K)
GEMV_TENSOR(nf4, stored::NF4)
