// What several operations share: four numbers of a thread, and the running sums of a softmax. Depends on device/prelude.cu;
// read columns/gpu.cu and logprobs/gpu.cu for the uses.

typedef float f32;  // The suffixes of kernels' names are their element types.

// Up to four neighbouring numbers of an array: those from number `at`, of which `left` exist. Four at an aligned address move
// in one access; what does not exist reads as 0 and is not written.
struct Four {
    u64 at, left;
    __device__ __forceinline__ Four(u64 at, u64 left) : at(at), left(left) {}
    // The thread's share of a flat array of `count` numbers.
    __device__ __forceinline__ explicit Four(u64 count) : at(4 * ((u64)blockIdx.x * blockDim.x + threadIdx.x)), left(count > at ? count - at : 0) {}
    template <class T> __device__ __forceinline__ bool whole(const T* p) const { return left >= 4 && ((u64)(p + at) & (4 * sizeof(T) - 1)) == 0; }
    template <class T> __device__ __forceinline__ void read(const T* p, float* v) const {
        if (whole(p)) load4(p + at, v);
        else for (u32 i = 0; i < 4; i++) v[i] = i < left ? load(p + at + i) : 0.f;
    }
    template <class T> __device__ __forceinline__ void write(T* p, const float* v) const {
        if (whole(p)) store4(p + at, v);
        else for (u32 i = 0; i < 4; i++) if (i < left) store(p + at + i, v[i]);
    }
};

// The thread's four columns of a matrix whose rows are cut into `tiles` of four numbers a thread; a block takes one tile.
struct Columns {
    u64 row;
    u32 column;
    __device__ __forceinline__ explicit Columns(u32 tiles) : row(blockIdx.x / tiles), column(4 * (blockIdx.x % tiles * blockDim.x + threadIdx.x)) {}
    __device__ __forceinline__ Four of(u32 cols) const { return Four(row * cols + column, cols - column); }
};

// Of the numbers x seen so far: their maximum, the sum of e^(x - maximum), and that sum with a weight on each term. A NaN
// never becomes the maximum but makes the sums NaN; minus infinity adds nothing.
struct Running {
    float top, sum, weighted;
    __device__ __forceinline__ Running() : top(-infinity()), sum(0.f), weighted(0.f) {}
    __device__ __forceinline__ void add(float x, float weight) {
        if (x > top) {
            const float f = expf(top - x);
            sum = sum * f + 1.f;
            weighted = weighted * f + weight;
            top = x;
        } else if (!(x == -infinity())) {
            const float e = expf(x - top);
            sum += e;
            weighted += e * weight;
        }
    }
    // The sums as they would be against a maximum `to` >= top.
    __device__ __forceinline__ void rescale(float to) {
        const float f = top > -infinity() ? expf(top - to) : 1.f;  // Without any number the sums are 0, or NaN.
        sum *= f;
        weighted *= f;
        top = to;
    }
    __device__ __forceinline__ void merge(Running other) {
        const float to = other.top > top ? other.top : top;
        rescale(to);
        other.rescale(to);
        sum += other.sum;
        weighted += other.weighted;
    }
    // Every thread's sums become those of its warp, and of its block.
    __device__ __forceinline__ void over_warp() {
        rescale(warp_max(top));
        sum = warp_sum(sum);
        weighted = warp_sum(weighted);
    }
    __device__ __forceinline__ void over_block() {
        rescale(block_max(top));
        sum = block_sum(sum);
        weighted = block_sum(weighted);
    }
};

// cap tanh(x inner), the bend that keeps scores and logits within a cap; its slope by x is inner cap (1 - (bent / cap)^2).
__device__ __forceinline__ float bend(float x, float inner, float cap) { return cap * tanhf(x * inner); }
