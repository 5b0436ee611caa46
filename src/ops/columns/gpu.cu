// Sums, scales and cuts of matrices: the parts of fused projections, the residual path, biases, DoRA's column scales and
// norms. Reductions over rows go in fixed chunks, so that results are the same bits every time.

// Copies one part (rows, width) of a fused projection out of its rows, or into them with `join` = 1. In a row of `fused` numbers
// the part has runs of `run` numbers, `all` numbers apart, the first at `before`.
template <class T> struct ColumnsPart { const T* from; T* to; u32 fused, width, run, all, before, join, tiles; };
template <class T> __device__ __forceinline__ void columns_part(const ColumnsPart<T>& a) {
    const Columns c(a.tiles);
    if (c.column >= a.width) return;
    // Four columns of one run are neighbours on both sides.
    const u32 step = a.run % 4 == 0 ? 4 : 1;
    for (u32 column = c.column; column < c.column + 4 && column < a.width; column += step) {
        const Four part(c.row * a.width + column, step), whole(c.row * a.fused + column / a.run * a.all + a.before + column % a.run, step);
        float v[4];
        if (a.join) {
            part.read(a.from, v);
            whole.write(a.to, v);
        } else {
            whole.read(a.from, v);
            part.write(a.to, v);
        }
    }
}

// out = x + factor y. out may be x or y.
template <class X, class Y, class O> struct ColumnsAdd { const X* x; const Y* y; O* out; u64 count; float factor; };
template <class X, class Y, class O> __device__ __forceinline__ void columns_add(const ColumnsAdd<X, Y, O>& a) {
    Four f(a.count);
    float x[4], y[4];
    f.read(a.x, x);
    f.read(a.y, y);
    for (int i = 0; i < 4; i++) x[i] = x[i] + a.factor * y[i];
    f.write(a.out, x);
}

// y = factor x, rounded to y's type.
template <class X, class Y> struct ColumnsScale { const X* x; Y* y; u64 count; float factor; };
template <class X, class Y> __device__ __forceinline__ void columns_scale(const ColumnsScale<X, Y>& a) {
    Four f(a.count);
    float x[4];
    f.read(a.x, x);
    for (int i = 0; i < 4; i++) x[i] *= a.factor;
    f.write(a.y, x);
}

// y[:, j] = x[:, j] factor[j] + bias[j]; either vector may be null. y may be x.
template <class X, class Y> struct ColumnsAffine { const X* x; const float* factor; const float* bias; Y* y; u32 cols, tiles; };
template <class X, class Y> __device__ __forceinline__ void columns_affine(const ColumnsAffine<X, Y>& a) {
    const Columns c(a.tiles);
    if (c.column >= a.cols) return;
    const Four numbers = c.of(a.cols), vector(c.column, a.cols - c.column);
    float v[4], w[4];
    numbers.read(a.x, v);
    if (a.factor) {
        vector.read(a.factor, w);
        for (int i = 0; i < 4; i++) v[i] *= w[i];
    }
    if (a.bias) {
        vector.read(a.bias, w);
        for (int i = 0; i < 4; i++) v[i] += w[i];
    }
    numbers.write(a.y, v);
}

// out[c, j] = sum over the rows i of chunk c of weight[i] x[i, j] u[i, j]; `u` and `weight` may be null. With `add` the sum
// joins what is there. A thread sums one column of a chunk of 128 rows.
template <class X, class U> struct ColumnsSum { const X* x; const U* u; const float* weight; float* out; u64 rows; u32 cols, add; };
template <class X, class U> __device__ __forceinline__ void columns_sum(const ColumnsSum<X, U>& a) {
    const u32 j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= a.cols) return;
    const u64 first = 128ull * blockIdx.y, last = first + 128 < a.rows ? first + 128 : a.rows;
    float s = 0.f;
    for (u64 i = first; i < last; i++) {
        const u64 at = i * a.cols + j;
        float v = load(a.x + at);
        if (a.u) v *= load(a.u + at);
        if (a.weight) v *= a.weight[i];
        s += v;
    }
    float* out = a.out + (u64)blockIdx.y * a.cols + j;
    *out = a.add ? *out + s : s;
}

// squares[i] = sum over j of (w[i, j] + scale sum over q of b[i, q] a[q, j])^2, for DoRA's norms. A block takes eight rows, so
// that a number of A is read once for all of them.
template <class W, class F> struct ColumnsSquares { const W* w; const F* factor_a; const F* factor_b; float* squares; u32 rows, cols, rank; float scale; };
template <class W, class F> __device__ __forceinline__ void columns_squares(const ColumnsSquares<W, F>& a) {
    const u32 first = 8 * blockIdx.x, rows = a.rows - first < 8 ? a.rows - first : 8;
    float sums[8];
    for (int r = 0; r < 8; r++) sums[r] = 0.f;
    for (u32 j = threadIdx.x; j < a.cols; j += blockDim.x) {
        float branch[8];
        for (int r = 0; r < 8; r++) branch[r] = 0.f;
        for (u32 q = 0; q < a.rank; q++) {
            const float v = load(a.factor_a + (u64)q * a.cols + j);
            for (u32 r = 0; r < rows; r++) branch[r] += v * load(a.factor_b + (u64)(first + r) * a.rank + q);
        }
        for (u32 r = 0; r < rows; r++) {
            const float v = load(a.w + (u64)(first + r) * a.cols + j) + a.scale * branch[r];
            sums[r] += v * v;
        }
    }
    for (u32 r = 0; r < rows; r++) {
        const float s = block_sum(sums[r]);
        if (threadIdx.x == 0) a.squares[first + r] = s;
    }
}

// From the squares of norms n and the magnitudes m: norms = n, factors = m / n, and 0 where n is 0.
struct ColumnsDora { const float* squares; const float* magnitudes; float* norms; float* factors; u32 count; };
KERNEL(columns_dora, ColumnsDora, 256) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.count) return;
    const float n = sqrtf(a.squares[i]);
    a.norms[i] = n;
    a.factors[i] = n == 0.f ? 0.f : a.magnitudes[i] / n;
}

// y = sums / norms, and 0 where the norm is 0: DoRA's gradient by its magnitudes.
struct ColumnsRatio { const float* sums; const float* norms; float* y; u32 count; };
KERNEL(columns_ratio, ColumnsRatio, 256) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.count) return;
    a.y[i] = a.norms[i] == 0.f ? 0.f : a.sums[i] / a.norms[i];
}

#define COLUMNS_PART(T) \
    typedef ColumnsPart<T> ColumnsPart_##T; \
    KERNEL(columns_part_##T, ColumnsPart_##T, 256) { columns_part(a); }
#define COLUMNS_ADD(X, Y, O) \
    typedef ColumnsAdd<X, Y, O> ColumnsAdd_##X##_##Y##_##O; \
    KERNEL(columns_add_##X##_##Y##_##O, ColumnsAdd_##X##_##Y##_##O, 256) { columns_add(a); }
#define COLUMNS_SCALE(X, Y) \
    typedef ColumnsScale<X, Y> ColumnsScale_##X##_##Y; \
    KERNEL(columns_scale_##X##_##Y, ColumnsScale_##X##_##Y, 256) { columns_scale(a); }
#define COLUMNS_AFFINE(X, Y) \
    typedef ColumnsAffine<X, Y> ColumnsAffine_##X##_##Y; \
    KERNEL(columns_affine_##X##_##Y, ColumnsAffine_##X##_##Y, 256) { columns_affine(a); }
#define COLUMNS_SUM(X, U) \
    typedef ColumnsSum<X, U> ColumnsSum_##X##_##U; \
    KERNEL(columns_sum_##X##_##U, ColumnsSum_##X##_##U, 128) { columns_sum(a); }
#define COLUMNS_SQUARES(W, F) \
    typedef ColumnsSquares<W, F> ColumnsSquares_##W##_##F; \
    KERNEL(columns_squares_##W##_##F, ColumnsSquares_##W##_##F, 256) { columns_squares(a); }
#define COLUMNS_NARROW(T) \
    COLUMNS_PART(T) \
    COLUMNS_ADD(f32, f32, T) COLUMNS_ADD(f32, T, f32) COLUMNS_ADD(f32, T, T) \
    COLUMNS_ADD(T, f32, f32) COLUMNS_ADD(T, f32, T) COLUMNS_ADD(T, T, f32) COLUMNS_ADD(T, T, T) \
    COLUMNS_SCALE(f32, T) COLUMNS_SCALE(T, f32) COLUMNS_SCALE(T, T) \
    COLUMNS_AFFINE(f32, T) COLUMNS_AFFINE(T, f32) COLUMNS_AFFINE(T, T) \
    COLUMNS_SUM(f32, T) COLUMNS_SUM(T, f32) COLUMNS_SUM(T, T) \
    COLUMNS_SQUARES(f32, T) COLUMNS_SQUARES(T, f32) COLUMNS_SQUARES(T, T)
COLUMNS_PART(f32)
COLUMNS_ADD(f32, f32, f32)
COLUMNS_SCALE(f32, f32)
COLUMNS_SCALE(bf16, f16)
COLUMNS_SCALE(f16, bf16)
COLUMNS_AFFINE(f32, f32)
COLUMNS_SUM(f32, f32)
COLUMNS_SQUARES(f32, f32)
COLUMNS_NARROW(bf16)
COLUMNS_NARROW(f16)
