// The exact KL divergence between two rows of logits, strip by strip, a block a row; mod.rs has the formulas. Depends on
// ops/common.cu and, for the shape of logits, on logprobs/gpu.cu.

// sums (R, 5): maximum of l, sum of e^(l - maximum), that sum weighted by l - m, maximum of m, sum of e^(m - maximum).
struct KlStrip { const float* p; const float* q; float* sums; u32 width, p_stride, q_stride, fresh; LogitShape shape; };
KERNEL(kl_strip, KlStrip, 256) {
    const u64 row = blockIdx.x;
    const float *p = a.p + row * a.p_stride, *q = a.q + row * a.q_stride;
    Running over_p, over_q;
    for (u32 j = threadIdx.x; j < a.width; j += blockDim.x) {
        const float l = logit_bent(a.shape, p[j]) * a.shape.inverse, m = logit_bent(a.shape, q[j]) * a.shape.inverse;
        over_p.add(l, l - m);
        over_q.add(m, 0.f);
    }
    over_p.over_block();
    over_q.over_block();
    if (threadIdx.x) return;
    float* sums = a.sums + 5 * row;
    if (!a.fresh) {
        Running before;
        before.top = sums[0]; before.sum = sums[1]; before.weighted = sums[2];
        before.merge(over_p);
        over_p = before;
        before.top = sums[3]; before.sum = sums[4]; before.weighted = 0.f;
        before.merge(over_q);
        over_q = before;
    }
    sums[0] = over_p.top; sums[1] = over_p.sum; sums[2] = over_p.weighted;
    sums[3] = over_q.top; sums[4] = over_q.sum;
}

struct KlFinish { const float* sums; float* kl; float* lse_p; float* lse_q; u32 rows; };
KERNEL(kl_finish, KlFinish, 256) {
    const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= a.rows) return;
    const float* sums = a.sums + 5 * (u64)row;
    const float p = sums[0] + logf(sums[1]), q = sums[3] + logf(sums[4]), kl = sums[2] / sums[1] - (p - q);
    a.kl[row] = kl < 0.f ? 0.f : kl;  // Rounding may leave a zero a hair below. NaN stays.
    a.lse_p[row] = p;
    a.lse_q[row] = q;
}

// d of p's products in a strip; q is held fixed. A thread takes one number; rows are cut into `tiles` of 256.
template <class T> struct KlBackward {
    const float* p; const float* q; const float* kl; const float* lse_p; const float* lse_q; const float* dkl; T* d;
    u32 width, p_stride, q_stride, d_stride, tiles; LogitShape shape;
};
template <class T> __device__ __forceinline__ void kl_backward(const KlBackward<T>& a) {
    const u64 row = blockIdx.x / a.tiles;
    const u32 j = blockIdx.x % a.tiles * blockDim.x + threadIdx.x;
    if (j >= a.width) return;
    const float bent = logit_bent(a.shape, a.p[row * a.p_stride + j]);
    const float log_p = bent * a.shape.inverse - a.lse_p[row];
    const float log_q = logit_bent(a.shape, a.q[row * a.q_stride + j]) * a.shape.inverse - a.lse_q[row];
    const float d = a.dkl[row] * a.shape.inverse * expf(log_p) * (log_p - log_q - a.kl[row]);
    store(a.d + row * a.d_stride + j, d * logit_slope(a.shape, bent));
}
#define KL(T) \
    typedef KlBackward<T> KlBackward_##T; \
    KERNEL(kl_backward_##T, KlBackward_##T, 256) { kl_backward(a); }
KL(f32)
KL(bf16)
KL(f16)
