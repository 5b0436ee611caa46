// The generalized Jensen-Shannon divergence between two rows of logits, strip by strip, a block a row; mod.rs has the
// formulas. The two rows come from two lm_heads. Depends on ops/common.cu and, for the shape of logits, on
// logprobs/gpu.cu.

// sums (R, 6): maximum of l, sum of e^(l - maximum), that sum weighted by l - m; the same of m, weighted by m - l.
struct DivergenceStrip {
    const float* s; const float* t; float* sums; u32 width, s_stride, t_stride, fresh; LogitShape of_s, of_t;
};
KERNEL(divergence_strip, DivergenceStrip, 256) {
    const u64 row = blockIdx.x;
    const float *s = a.s + row * a.s_stride, *t = a.t + row * a.t_stride;
    Running over_s, over_t;
    for (u32 j = threadIdx.x; j < a.width; j += blockDim.x) {
        const float l = logit_bent(a.of_s, s[j]) * a.of_s.inverse, m = logit_bent(a.of_t, t[j]) * a.of_t.inverse;
        over_s.add(l, l - m);
        over_t.add(m, m - l);
    }
    over_s.over_block();
    over_t.over_block();
    if (threadIdx.x) return;
    float* sums = a.sums + 6 * row;
    if (!a.fresh) {
        Running before;
        before.top = sums[0]; before.sum = sums[1]; before.weighted = sums[2];
        before.merge(over_s);
        over_s = before;
        before.top = sums[3]; before.sum = sums[4]; before.weighted = sums[5];
        before.merge(over_t);
        over_t = before;
    }
    sums[0] = over_s.top; sums[1] = over_s.sum; sums[2] = over_s.weighted;
    sums[3] = over_t.top; sums[4] = over_t.sum; sums[5] = over_t.weighted;
}

// The lse of both, and the KL of a beta of 0 or 1; a mixture's value and mean begin at zero.
struct DivergenceFinish { const float* sums; float* value; float* mean; float* lse_s; float* lse_t; u32 rows; float beta; };
KERNEL(divergence_finish, DivergenceFinish, 256) {
    const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= a.rows) return;
    const float* sums = a.sums + 6 * (u64)row;
    const float s = sums[0] + logf(sums[1]), t = sums[3] + logf(sums[4]);
    const float reverse = sums[2] / sums[1] - (s - t), forward = sums[5] / sums[4] - (t - s);
    const float kl = a.beta == 1.f ? reverse : a.beta == 0.f ? forward : 0.f;
    a.value[row] = kl < 0.f ? 0.f : kl;  // Rounding may leave a zero a hair below. NaN stays.
    a.mean[row] = a.beta == 1.f ? reverse : a.beta == 0.f ? -1.f : 0.f;
    a.lse_s[row] = s;
    a.lse_t[row] = t;
}

// log((1 - beta) s + beta t).
__device__ __forceinline__ float log_mixture(float log_s, float log_t, float beta) {
    const float x = log_s + log1pf(-beta), y = log_t + logf(beta);
    return x < y ? y + log1pf(expf(x - y)) : x + log1pf(expf(y - x));
}

// Adds a strip's share of the divergence to the mixture, and of sum_k s_k g_k.
struct DivergenceMixed {
    const float* s; const float* t; const float* lse_s; const float* lse_t; float* value; float* mean;
    u32 width, s_stride, t_stride; float beta; LogitShape of_s, of_t;
};
KERNEL(divergence_mixed, DivergenceMixed, 256) {
    const u64 row = blockIdx.x;
    const float *s = a.s + row * a.s_stride, *t = a.t + row * a.t_stride;
    float over_s = 0.f, over_t = 0.f;
    for (u32 j = threadIdx.x; j < a.width; j += blockDim.x) {
        const float log_s = logit_bent(a.of_s, s[j]) * a.of_s.inverse - a.lse_s[row];
        const float log_t = logit_bent(a.of_t, t[j]) * a.of_t.inverse - a.lse_t[row];
        const float log_m = log_mixture(log_s, log_t, a.beta);
        over_s += expf(log_s) * (log_s - log_m);
        over_t += expf(log_t) * (log_t - log_m);
    }
    over_s = block_sum(over_s);
    over_t = block_sum(over_t);
    if (threadIdx.x) return;
    a.mean[row] += (1.f - a.beta) * over_s;
    a.value[row] += (1.f - a.beta) * over_s + a.beta * over_t;
}

// d of the student's products in a strip; the teacher is held fixed. A thread takes one number; rows are cut into `tiles`
// of 256.
struct DivergenceBackward {
    const float* s; const float* t; const float* mean; const float* lse_s; const float* lse_t; const float* dvalue;
    float* d; u32 width, s_stride, t_stride, d_stride, tiles; float beta; LogitShape of_s, of_t;
};
KERNEL(divergence_backward, DivergenceBackward, 256) {
    const u64 row = blockIdx.x / a.tiles;
    const u32 j = blockIdx.x % a.tiles * blockDim.x + threadIdx.x;
    if (j >= a.width) return;
    const float bent = logit_bent(a.of_s, a.s[row * a.s_stride + j]);
    const float log_s = bent * a.of_s.inverse - a.lse_s[row];
    const float log_t = logit_bent(a.of_t, a.t[row * a.t_stride + j]) * a.of_t.inverse - a.lse_t[row];
    const float s = expf(log_s);
    float d;
    if (a.beta == 0.f) d = s - expf(log_t);
    else if (a.beta == 1.f) d = s * (log_s - log_t - a.mean[row]);
    else d = s * ((1.f - a.beta) * (log_s - log_mixture(log_s, log_t, a.beta)) - a.mean[row]);
    a.d[row * a.d_stride + j] = a.dvalue[row] * a.of_s.inverse * d * logit_slope(a.of_s, bent);
}
