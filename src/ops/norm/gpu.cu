// RMS norm and layer norm of rows, forward and backward; mod.rs has the formulas. A matrix (N, W) is N W / D rows of D
// numbers: the norms of single heads have D smaller than W. Rows of more than 1,024 numbers get a block each, shorter ones a
// warp each. A row whose mean square is infinite or NaN becomes NaN, as on the CPU.

// The threads that share one row: a whole block, or one warp of it.
struct NormBlock {
    u64 row; u32 first, step;
    __device__ __forceinline__ NormBlock() : row(blockIdx.x), first(threadIdx.x), step(blockDim.x) {}
    __device__ __forceinline__ float sum(float v) const { return block_sum(v); }
};
struct NormWarp {
    u64 row; u32 first, step;
    __device__ __forceinline__ NormWarp()
        : row((u64)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5)), first(threadIdx.x & 31), step(32) {}
    __device__ __forceinline__ float sum(float v) const { return warp_sum(v); }
};

// 1 / sqrt(mean + eps). 1 / sqrt(inf) would be 0 and the row all zeros: a number again, and the wrong one.
__device__ __forceinline__ float norm_inverse(float mean, float eps) {
    return mean < infinity() ? 1.f / sqrtf(mean + eps) : not_a_number();
}

// Calls f(numbers, i) for the thread's fours of a row that begins at number `at`; i counts within the row.
template <class R, class F> __device__ __forceinline__ void norm_each(const R& r, u64 at, u32 width, F f) {
    for (u32 i = 4 * r.first; i < width; i += 4 * r.step) f(Four(at + i, width - i), Four(i, width - i));
}

// The mean that is taken off (0 for RMS) and the inverse root of a row.
template <class R, class X> __device__ __forceinline__ float norm_statistics(const R& r, const X* x, u64 at, u32 width, bool layer, float eps, float& mean) {
    mean = 0.f;
    if (layer) {
        float s = 0.f;
        norm_each(r, at, width, [&](Four n, Four) {
            float v[4];
            n.read(x, v);
            s += (v[0] + v[1]) + (v[2] + v[3]);
        });
        mean = r.sum(s) / (float)width;
    }
    float squares = 0.f;
    norm_each(r, at, width, [&](Four n, Four) {
        float v[4];
        n.read(x, v);
        for (u32 i = 0; i < 4; i++) if (i < n.left) { float c = v[i] - mean; squares += c * c; }
    });
    return norm_inverse(r.sum(squares) / (float)width, eps);
}

// `bias` is null for RMS norms and the b of layer norms, whose mean is taken off.
template <class X, class Y> struct NormForward { const X* x; const float* weight; const float* bias; Y* y; u64 rows; u32 width; float eps; };
template <class R, class X, class Y> __device__ __forceinline__ void norm_forward(const NormForward<X, Y>& a) {
    const R r;
    if (r.row >= a.rows) return;
    const u64 at = r.row * a.width;
    float mean;
    const float inv = norm_statistics(r, a.x, at, a.width, a.bias != nullptr, a.eps, mean);
    norm_each(r, at, a.width, [&](Four n, Four column) {
        float v[4], w[4], b[4] = {0.f, 0.f, 0.f, 0.f};
        n.read(a.x, v);
        column.read(a.weight, w);
        if (a.bias) column.read(a.bias, b);
        for (int i = 0; i < 4; i++) v[i] = (v[i] - mean) * inv * w[i] + b[i];
        n.write(a.y, v);
    });
}

// `past` is null or what the residual path brings, added to dx; `layer` is 1 for layer norms.
template <class X, class G, class Y> struct NormBackward {
    const X* x; const float* weight; const G* dy; const float* past; Y* dx; u64 rows; u32 width, layer; float eps;
};
template <class R, class X, class G, class Y> __device__ __forceinline__ void norm_backward(const NormBackward<X, G, Y>& a) {
    const R r;
    if (r.row >= a.rows) return;
    const u64 at = r.row * a.width;
    float mean;
    const float inv = norm_statistics(r, a.x, at, a.width, a.layer != 0, a.eps, mean);
    float dot = 0.f, sum = 0.f;
    norm_each(r, at, a.width, [&](Four n, Four column) {
        float x[4], g[4], w[4];
        n.read(a.x, x);
        n.read(a.dy, g);
        column.read(a.weight, w);
        for (int i = 0; i < 4; i++) {  // Past the end w and g are 0.
            dot += (x[i] - mean) * (g[i] * w[i]);
            sum += g[i] * w[i];
        }
    });
    dot = r.sum(dot);
    // inv g - x c for RMS; for layer norms g is first freed of its mean.
    const float c = dot * inv * inv * inv / (float)a.width;
    const float off = a.layer ? r.sum(sum) / (float)a.width : 0.f;
    norm_each(r, at, a.width, [&](Four n, Four column) {
        float x[4], g[4], w[4], past[4] = {0.f, 0.f, 0.f, 0.f};
        n.read(a.x, x);
        n.read(a.dy, g);
        column.read(a.weight, w);
        if (a.past) n.read(a.past, past);
        for (int i = 0; i < 4; i++) x[i] = past[i] + ((g[i] * w[i] - off) * inv - (x[i] - mean) * c);
        n.write(a.dx, x);
    });
}

#define NORM_FORWARD(X, Y) \
    typedef NormForward<X, Y> NormForward_##X##_##Y; \
    KERNEL(norm_forward_##X##_##Y, NormForward_##X##_##Y, 256) { norm_forward<NormBlock>(a); } \
    KERNEL(norm_forward_short_##X##_##Y, NormForward_##X##_##Y, 256) { norm_forward<NormWarp>(a); }
#define NORM_BACKWARD(X, G, Y) \
    typedef NormBackward<X, G, Y> NormBackward_##X##_##G##_##Y; \
    KERNEL(norm_backward_##X##_##G##_##Y, NormBackward_##X##_##G##_##Y, 256) { norm_backward<NormBlock>(a); } \
    KERNEL(norm_backward_short_##X##_##G##_##Y, NormBackward_##X##_##G##_##Y, 256) { norm_backward<NormWarp>(a); }
// A block's norms read the residual stream, which is f32, and norms of heads read narrow numbers and give them back.
#define NORM_NARROW(T) \
    NORM_FORWARD(f32, T) NORM_FORWARD(T, T) \
    NORM_BACKWARD(f32, T, f32) NORM_BACKWARD(T, f32, T) NORM_BACKWARD(T, T, T)
NORM_FORWARD(f32, f32)
NORM_BACKWARD(f32, f32, f32)
NORM_NARROW(bf16)
NORM_NARROW(f16)
