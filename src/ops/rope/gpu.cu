// Rotary positions: within the first 2h numbers of every head (x_j, x_{j+h}) -> (x_j cos - x_{j+h} sin, x_{j+h} cos + x_j sin);
// the rest of the head is copied. cos and sin are tables (positions, h) made on the host. A block
// takes a row, a thread one pair or one copied number at a time, each read before it is written, so y may be x.

template <class T> struct RopeRotate {
    const T* x; T* y; const unsigned* positions; const float* cos; const float* sin; u32 heads, head, half; float sign;
};
template <class T> __device__ __forceinline__ void rope_rotate(const RopeRotate<T>& a) {
    const u32 each = a.head - a.half;  // h pairs, then the numbers past 2h.
    const u64 row = (u64)blockIdx.x * a.heads * a.head, angles = (u64)a.positions[blockIdx.x] * a.half;
    for (u32 i = threadIdx.x; i < a.heads * each; i += blockDim.x) {
        const u32 j = i % each;
        const u64 at = row + i / each * a.head + j;
        if (j >= a.half) {
            a.y[at + a.half] = a.x[at + a.half];
            continue;
        }
        const float c = a.cos[angles + j], s = a.sign * a.sin[angles + j], x0 = load(a.x + at), x1 = load(a.x + at + a.half);
        store(a.y + at, x0 * c - x1 * s);
        store(a.y + at + a.half, x1 * c + x0 * s);
    }
}
#define ROPE(T) \
    typedef RopeRotate<T> RopeRotate_##T; \
    KERNEL(rope_rotate_##T, RopeRotate_##T, 256) { rope_rotate(a); }
ROPE(f32)
ROPE(bf16)
ROPE(f16)
