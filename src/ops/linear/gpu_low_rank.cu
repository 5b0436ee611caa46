// The low-rank parts of products of many rows, in one pass over the result: y = residual + bias + the sum over up to three parts of
// Z F. The product with the frozen weight is added to it afterwards, by beta = 1. As products of their own, which read and write y
// again, the parts would take as much time as a quarter of the weight's product. Depends on device/prelude.cu; gpu_low_rank.rs
// launches it.

// Z (rows, rank) from its first column on; F (cols, rank), or (rank, cols) with `by_rank` of the launch.
template <class T> struct LowRankPart { const T* z; const T* factor; u32 rank, unused; };
template <class T, class Y> struct LowRankOutputs {
    LowRankPart<T> parts[3];
    const float* residual;  // (rows, cols), or null.
    const float* bias;      // (cols), or null.
    Y* y;
    u32 count, rows, cols, z_stride, by_rank, unused;
};

// The four numbers p[0], p[step], ... as two words; from the rank on they are 0. `wide` loads them in one access.
template <class T> __device__ __forceinline__ U2 four_ranks(const T* p, u32 left, u64 step, bool wide) {
    U2 w;
    if (wide && left >= 4) return *(const U2*)p;
    u32 h[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) h[i] = i < left ? p[i * step].bits : 0;
    w.x = h[0] | h[1] << 16;
    w.y = h[2] | h[3] << 16;
    return w;
}

// A warp takes 32 rows and 64 columns of y, a block of four warps 256 columns. Ranks go in steps of 16, the k of mma.m16n8k16; which
// of them the hardware calls which k does not matter, because the sum is over all, so lane 4 g + t takes four neighbours from 4 t on.
// The columns of a product are not neighbours either: column n of product s is column 8 (n / 2) + 2 s + n % 2 of 32, so that a
// lane's sums of four products are eight neighbouring columns from 8 t on.
template <class T, class Y> __device__ __forceinline__ void low_rank_outputs(const LowRankOutputs<T, Y>& a) {
    const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const u32 first_column = 256 * blockIdx.x + 64 * (threadIdx.x >> 5), first_row = 32 * blockIdx.y;
    if (first_column >= a.cols) return;
    float c[2][8][4];
#pragma unroll
    for (int m = 0; m < 2; m++)
        for (int n = 0; n < 8; n++)
            for (int i = 0; i < 4; i++) c[m][n][i] = 0.f;
    for (u32 p = 0; p < a.count; p++) {
        const LowRankPart<T>& part = a.parts[p];
        const bool wide_z = (((u64)part.z & 7) | (a.z_stride & 3)) == 0;
        const bool wide_rows = (((u64)part.factor & 7) | (part.rank & 3)) == 0;
        const bool wide_columns = (((u64)part.factor & 15) | (a.cols & 7)) == 0;
#pragma unroll 1
        for (u32 base = 0; base < part.rank; base += 16) {
            const u32 rank = base + 4 * t, left = part.rank > rank ? part.rank - rank : 0;
            u32 z[2][4];
#pragma unroll
            for (u32 m = 0; m < 2; m++) {
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    const u32 row = first_row + 16 * m + 8 * half + g;
                    const U2 w = four_ranks(part.z + (u64)row * a.z_stride + rank, row < a.rows ? left : 0, 1, wide_z);
                    z[m][half] = w.x;
                    z[m][2 + half] = w.y;
                }
            }
#pragma unroll
            for (u32 group = 0; group < 2; group++) {
                const u32 eight = first_column + 32 * group + 8 * (g >> 1);
                U2 f[4];
                if (a.by_rank && wide_columns) {
                    U4 w[4];
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        w[i].x = w[i].y = w[i].z = w[i].w = 0;
                        if (i < left && eight < a.cols) w[i] = *(const U4*)(part.factor + (u64)(rank + i) * a.cols + eight);
                    }
                    // The first or the second number of each word, of two ranks.
                    const u32 which = g & 1 ? 0x7632 : 0x5410;
                    f[0].x = __byte_perm(w[0].x, w[1].x, which); f[0].y = __byte_perm(w[2].x, w[3].x, which);
                    f[1].x = __byte_perm(w[0].y, w[1].y, which); f[1].y = __byte_perm(w[2].y, w[3].y, which);
                    f[2].x = __byte_perm(w[0].z, w[1].z, which); f[2].y = __byte_perm(w[2].z, w[3].z, which);
                    f[3].x = __byte_perm(w[0].w, w[1].w, which); f[3].y = __byte_perm(w[2].w, w[3].w, which);
                } else {
#pragma unroll
                    for (u32 s = 0; s < 4; s++) {
                        const u32 column = eight + 2 * s + (g & 1), there = column < a.cols ? left : 0;
                        if (a.by_rank) f[s] = four_ranks(part.factor + (u64)rank * a.cols + column, there, a.cols, false);
                        else f[s] = four_ranks(part.factor + (u64)column * part.rank + rank, there, 1, wide_rows);
                    }
                }
#pragma unroll
                for (u32 s = 0; s < 4; s++) {
                    const u32 b[2] = {f[s].x, f[s].y};
                    mma(T(), c[0][4 * group + s], z[0], b);
                    mma(T(), c[1][4 * group + s], z[1], b);
                }
            }
        }
    }
#pragma unroll
    for (u32 m = 0; m < 2; m++) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 row = first_row + 16 * m + 8 * half + g;
            if (row >= a.rows) continue;
#pragma unroll
            for (u32 group = 0; group < 2; group++) {
#pragma unroll
                for (u32 four = 0; four < 2; four++) {
                    const u32 column = first_column + 32 * group + 8 * t + 4 * four;
                    if (column >= a.cols) continue;
                    float v[4], w[4];
#pragma unroll
                    for (u32 i = 0; i < 4; i++) v[i] = c[m][4 * group + 2 * four + (i >> 1)][2 * half + (i & 1)];
                    const Four numbers((u64)row * a.cols + column, a.cols - column), vector(column, a.cols - column);
                    if (a.bias) {
                        vector.read(a.bias, w);
                        for (int i = 0; i < 4; i++) v[i] += w[i];
                    }
                    if (a.residual) {
                        numbers.read(a.residual, w);
                        for (int i = 0; i < 4; i++) v[i] += w[i];
                    }
                    numbers.write(a.y, v);
                }
            }
        }
    }
}

#define LOW_RANK_OUTPUTS(T, Y) \
    typedef LowRankOutputs<T, Y> LowRankOutputs_##T##_##Y; \
    KERNEL(low_rank_outputs_##T##_##Y, LowRankOutputs_##T##_##Y, 128) { low_rank_outputs(a); }
LOW_RANK_OUTPUTS(bf16, bf16)
LOW_RANK_OUTPUTS(bf16, f32)
LOW_RANK_OUTPUTS(f16, f16)
LOW_RANK_OUTPUTS(f16, f32)
