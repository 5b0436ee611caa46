// Log-probabilities and entropy from strips of logits, a block a row; mod.rs has the formulas. The vocabulary comes
// strip by strip, and of each row only the running sums stay. Depends on ops/common.cu.

// What becomes of a product h W^T before the softmax: bent to stay within `cap` (0 is none), then times `inverse`, which is
// 1 / temperature and, without a cap, the multiplier too.
struct LogitShape { float multiplier, cap, inverse; };
__device__ __forceinline__ float logit_bent(const LogitShape& s, float product) {
    return s.cap > 0.f ? bend(product, s.multiplier / s.cap, s.cap) : product;
}
// d logit / d product at a bent logit, but for `inverse`.
__device__ __forceinline__ float logit_slope(const LogitShape& s, float bent) {
    if (!(s.cap > 0.f)) return 1.f;
    const float t = bent / s.cap;
    return s.multiplier * (1.f - t * t);
}

// sums (R, 4) are maximum, sum, sum of l e^(l - maximum) and the target's logit; best (R) is the most likely id so far. The
// strip holds columns first_id .. first_id + width of the vocabulary, in rows `stride` numbers apart. `fresh`: the first one.
struct LogprobsStrip { const float* logits; const u32* targets; float* sums; u32* best; u32 width, stride, first_id, fresh; LogitShape shape; };
KERNEL(logprobs_strip, LogprobsStrip, 256) {
    __shared__ u32 ids[32];
    const u64 row = blockIdx.x;
    const float* logits = a.logits + row * a.stride;
    Running run;
    u32 id = 0xffffffffu;
    for (u32 j = threadIdx.x; j < a.width; j += blockDim.x) {
        const float l = logit_bent(a.shape, logits[j]) * a.shape.inverse;
        if (l > run.top) id = j;
        run.add(l, l);
    }
    const float own = run.top;
    run.over_block();
    // The lowest id of those with the greatest logit; none if every logit is NaN or minus infinity.
    if (own < run.top) id = 0xffffffffu;
    for (int o = 16; o; o >>= 1) id = min(id, (u32)__shfl_xor_sync(0xffffffffu, id, o));
    if ((threadIdx.x & 31) == 0) ids[threadIdx.x >> 5] = id;
    __syncthreads();
    if (threadIdx.x) return;
    for (u32 w = 1; w < blockDim.x >> 5; w++) id = min(id, ids[w]);
    float* sums = a.sums + 4 * row;
    Running before;
    if (a.fresh) {
        a.best[row] = a.first_id;
        sums[3] = not_a_number();
    } else {
        before.top = sums[0];
        before.sum = sums[1];
        before.weighted = sums[2];
    }
    if (id != 0xffffffffu && run.top > before.top) a.best[row] = a.first_id + id;
    before.merge(run);
    sums[0] = before.top;
    sums[1] = before.sum;
    sums[2] = before.weighted;
    const u32 target = a.targets[row];
    if (target >= a.first_id && target - a.first_id < a.width) sums[3] = logit_bent(a.shape, logits[target - a.first_id]) * a.shape.inverse;
}

struct LogprobsFinish { const float* sums; float* logprobs; float* entropy; float* lse; u32 rows; };
KERNEL(logprobs_finish, LogprobsFinish, 256) {
    const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= a.rows) return;
    const float* sums = a.sums + 4 * (u64)row;
    const float lse = sums[0] + logf(sums[1]);
    a.lse[row] = lse;
    a.entropy[row] = lse - sums[2] / sums[1];
    a.logprobs[row] = sums[3] - lse;
}

// d of the products of a strip, of rows `stride` and `d_stride` numbers apart. A thread takes one number; rows are cut into
// `tiles` of 256. d may be the strip itself.
template <class T> struct LogprobsBackward {
    const float* logits; const u32* targets; const float* lse; const float* entropy; const float* dlogprobs; const float* dentropy; T* d;
    u32 width, stride, d_stride, first_id, tiles; LogitShape shape;
};
template <class T> __device__ __forceinline__ void logprobs_backward(const LogprobsBackward<T>& a) {
    const u64 row = blockIdx.x / a.tiles;
    const u32 j = blockIdx.x % a.tiles * blockDim.x + threadIdx.x;
    if (j >= a.width) return;
    const float bent = logit_bent(a.shape, a.logits[row * a.stride + j]);
    const float log_p = bent * a.shape.inverse - a.lse[row];
    float d = -expf(log_p) * (a.dlogprobs[row] + a.dentropy[row] * (log_p + a.entropy[row])) * a.shape.inverse;
    if (a.targets[row] == a.first_id + j) d += a.dlogprobs[row] * a.shape.inverse;
    store(a.d + row * a.d_stride + j, d * logit_slope(a.shape, bent));
}
#define LOGPROBS(T) \
    typedef LogprobsBackward<T> LogprobsBackward_##T; \
    KERNEL(logprobs_backward_##T, LogprobsBackward_##T, 256) { logprobs_backward(a); }
LOGPROBS(f32)
LOGPROBS(bf16)
LOGPROBS(f16)
