// Rows picked by number, their transpose, and the value head. Depends on ops/common.cu.

// y[i] = x[index[i]].
template <class X, class Y> struct RowsGather { const X* x; const u32* index; Y* y; u32 cols, tiles; };
template <class X, class Y> __device__ __forceinline__ void rows_gather(const RowsGather<X, Y>& a) {
    const Columns c(a.tiles);
    if (c.column >= a.cols) return;
    float v[4];
    Four((u64)a.index[c.row] * a.cols + c.column, a.cols - c.column).read(a.x, v);
    c.of(a.cols).write(a.y, v);
}

// y[target] += the sum of x[order[k]], k in starts[t] .. starts[t + 1], for each target t. A row of blocks takes one target, so that
// each row of y has one writer, and sums go in the order of x.
template <class X, class Y> struct RowsScatter { const X* x; const u32* targets; const u32* starts; const u32* order; Y* y; u32 cols, tiles; };
template <class X, class Y> __device__ __forceinline__ void rows_scatter(const RowsScatter<X, Y>& a) {
    const Columns c(a.tiles);
    if (c.column >= a.cols) return;
    const Four y((u64)a.targets[c.row] * a.cols + c.column, a.cols - c.column);
    float sums[4], v[4];
    y.read(a.y, sums);
    for (u32 k = a.starts[c.row]; k < a.starts[c.row + 1]; k++) {
        Four((u64)a.order[k] * a.cols + c.column, y.left).read(a.x, v);
        for (int i = 0; i < 4; i++) sums[i] += v[i];
    }
    y.write(a.y, sums);
}

// values[i] = w . h[i] + b, a warp a row; b is one number on the device.
template <class H> struct RowsValue { const H* h; const float* weight; const float* bias; float* values; u64 rows; u32 cols; };
template <class H> __device__ __forceinline__ void rows_value(const RowsValue<H>& a) {
    const u64 row = (u64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (row >= a.rows) return;
    float s = 0.f;
    for (u32 j = threadIdx.x & 31; j < a.cols; j += 32) s += load(a.h + row * a.cols + j) * a.weight[j];
    s = warp_sum(s);
    if ((threadIdx.x & 31) == 0) a.values[row] = s + *a.bias;
}

// dh[i, j] = dvalues[i] w[j].
template <class H> struct RowsValueBackward { const float* dvalues; const float* weight; H* dh; u32 cols, tiles; };
template <class H> __device__ __forceinline__ void rows_value_backward(const RowsValueBackward<H>& a) {
    const Columns c(a.tiles);
    if (c.column >= a.cols) return;
    const Four numbers = c.of(a.cols);
    float v[4];
    Four(c.column, numbers.left).read(a.weight, v);
    for (int i = 0; i < 4; i++) v[i] *= a.dvalues[c.row];
    numbers.write(a.dh, v);
}

#define ROWS_PAIR(X, Y) \
    typedef RowsGather<X, Y> RowsGather_##X##_##Y; \
    typedef RowsScatter<X, Y> RowsScatter_##X##_##Y; \
    KERNEL(rows_gather_##X##_##Y, RowsGather_##X##_##Y, 256) { rows_gather(a); } \
    KERNEL(rows_scatter_##X##_##Y, RowsScatter_##X##_##Y, 256) { rows_scatter(a); }
#define ROWS_VALUE(H) \
    typedef RowsValue<H> RowsValue_##H; \
    typedef RowsValueBackward<H> RowsValueBackward_##H; \
    KERNEL(rows_value_##H, RowsValue_##H, 256) { rows_value(a); } \
    KERNEL(rows_value_backward_##H, RowsValueBackward_##H, 256) { rows_value_backward(a); }
#define ROWS_NARROW(T) ROWS_PAIR(f32, T) ROWS_PAIR(T, f32) ROWS_PAIR(T, T) ROWS_VALUE(T)
ROWS_PAIR(f32, f32)
ROWS_VALUE(f32)
ROWS_NARROW(bf16)
ROWS_NARROW(f16)
