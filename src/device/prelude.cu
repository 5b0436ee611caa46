// The start of every kernel text: element types, conversions, sums over warps and blocks, tensor-core products.
//
// All kernels form one text that is compiled twice. NVRTC compiles it for the card, without any header. The C++ compiler
// compiles it for the emulated machine, where emulated/host.h supplies what CUDA would. A kernel takes one struct by
// value, and the Rust struct of the same name has the same fields in the same order:
//
//     struct Scale { const float* x; float* y; u64 count; float factor; };
//     KERNEL(scale_f32, Scale, 256) {
//         u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
//         if (i < a.count) a.y[i] = a.factor * a.x[i];
//     }
//
// The arguments are called `a`. A type with a comma, such as Norm<float, bf16>, needs a `using` before KERNEL. Blocks are
// one-dimensional, of a multiple of 32 threads and at most 1,024. A fourth argument of 1 lets the compiler give a
// thread all the registers that it wants, where it would spill some for the sake of more blocks at once. Kernels use no atomics between blocks, so that results
// do not depend on the order of blocks. Shared memory is `__shared__` arrays of at most 48 KiB a kernel.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct bf16 { u16 bits; };
struct f16 { u16 bits; };
// Words and floats that are loaded and stored in one access; their addresses are multiples of their size.
struct alignas(8) U2 { u32 x, y; };
struct alignas(16) U4 { u32 x, y, z, w; };
struct alignas(16) F4 { float x, y, z, w; };

#ifdef EMULATED
#include "host.h"
#else
#define ENTRY(name, Args, threads, ...) extern "C" __global__ void __launch_bounds__(threads, ##__VA_ARGS__) name(const __grid_constant__ Args a)
#define KERNEL(name, Args, threads, ...) ENTRY(name, Args, threads, ##__VA_ARGS__)
__device__ __forceinline__ float to_float(f16 h) { float r; asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(h.bits)); return r; }
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void round_to(float v, bf16& to) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(v)); }
#else
__device__ __forceinline__ void round_to(float v, bf16& to) {
    u32 u = __float_as_uint(v);
    to.bits = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
}
#endif
__device__ __forceinline__ void round_to(float v, f16& to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(v)); }
// Loads what is read once, such as weights, without displacing activations from the first cache.
__device__ __forceinline__ u32 load_once(const u32* p) { u32 r; asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(r) : "l"(p)); return r; }
__device__ __forceinline__ U2 load_once(const U2* p) { U2 r; asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p)); return r; }
__device__ __forceinline__ U4 load_once(const U4* p) { U4 r; asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p)); return r; }
// mma(T(), c, a, b): C (16 x 8) += A (16 x 16) B (16 x 8) by one warp, with the fragments of PTX's mma.m16n8k16: four words
// of A, two of B and four sums a lane. T is bf16 or f16; sums are f32.
#if __CUDA_ARCH__ >= 800
#define MMA(T, type) \
    __device__ __forceinline__ void mma(T, float* c, const u32* a, const u32* b) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); }
MMA(bf16, "bf16")
MMA(f16, "f16")
#undef MMA
#else
// Cards of sm_75 have half the instruction, and none for bf16: `Device::supports` says so, and no such kernel is launched.
__device__ __forceinline__ void mma(f16, float* c, const u32* a, const u32* b) {
    for (int half = 0; half < 2; half++)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
}
__device__ __forceinline__ void mma(bf16, float*, const u32*, const u32*) { __trap(); }
#endif
#endif

// ---- conversions: to f32 exactly, from f32 to the nearest value, ties to even ----

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 h) { return __uint_as_float((u32)h.bits << 16); }
__device__ __forceinline__ void round_to(float v, float& to) { to = v; }
// from_float<bf16>(v): v rounded to the type.
template <class T> __device__ __forceinline__ T from_float(float v) { T to; round_to(v, to); return to; }
// One number of memory as f32, and back with rounding.
template <class T> __device__ __forceinline__ float load(const T* p) { return to_float(*p); }
template <class T> __device__ __forceinline__ void store(T* p, float v) { round_to(v, *p); }

// Two 16-bit numbers in one word, the first in the low half, as memory has them: pack, and unpack either.
template <class T> __device__ __forceinline__ u32 pair(float first, float second) {
    return from_float<T>(first).bits | (u32)from_float<T>(second).bits << 16;
}
template <class T> __device__ __forceinline__ float first(u32 word) { T h; h.bits = (u16)word; return to_float(h); }
template <class T> __device__ __forceinline__ float second(u32 word) { T h; h.bits = (u16)(word >> 16); return to_float(h); }

// Four numbers in one access: p is a multiple of 16 bytes for float, of 8 bytes for bf16 and f16.
__device__ __forceinline__ void load4(const float* p, float* v) { F4 f = *(const F4*)p; v[0] = f.x; v[1] = f.y; v[2] = f.z; v[3] = f.w; }
template <class T> __device__ __forceinline__ void load4(const T* p, float* v) {
    U2 w = *(const U2*)p;
    v[0] = first<T>(w.x); v[1] = second<T>(w.x); v[2] = first<T>(w.y); v[3] = second<T>(w.y);
}
__device__ __forceinline__ void store4(float* p, const float* v) { F4 f; f.x = v[0]; f.y = v[1]; f.z = v[2]; f.w = v[3]; *(F4*)p = f; }
template <class T> __device__ __forceinline__ void store4(T* p, const float* v) { U2 w; w.x = pair<T>(v[0], v[1]); w.y = pair<T>(v[2], v[3]); *(U2*)p = w; }

// Byte i (0..3) of a word as a float, exactly: the byte becomes the low mantissa of 2^23.
__device__ __forceinline__ float byte_float(u32 word, int i) { return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440u | i)) - 8388608.f; }
// The same for a signed byte.
__device__ __forceinline__ float signed_byte_float(u32 word, int i) { return __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x4B000000u, 0x7440u | i)) - 8388736.f; }

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

// ---- reductions; every thread receives the result, and the order of the sums does not depend on the machine ----

// The greater of two, or NaN if either is NaN. (fmaxf would hide a NaN.)
__device__ __forceinline__ float max_or_nan(float p, float q) { return p != p || p > q ? p : q; }
// Over the 32 lanes of a warp, all of which call it.
__device__ __forceinline__ float warp_sum(float v) {
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
    for (int o = 16; o; o >>= 1) v = max_or_nan(v, __shfl_xor_sync(0xffffffffu, v, o));
    return v;
}
// Over all threads of a block, all of which call it.
__device__ __forceinline__ float block_sum(float v) {
    __shared__ float sums[32];
    v = warp_sum(v);
    if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = v;
    __syncthreads();
    v = warp_sum((threadIdx.x & 31) < (blockDim.x >> 5) ? sums[threadIdx.x & 31] : 0.f);
    __syncthreads();  // `sums` may be written again.
    return v;
}
__device__ __forceinline__ float block_max(float v) {
    __shared__ float maxima[32];
    v = warp_max(v);
    if ((threadIdx.x & 31) == 0) maxima[threadIdx.x >> 5] = v;
    __syncthreads();
    v = warp_max((threadIdx.x & 31) < (blockDim.x >> 5) ? maxima[threadIdx.x & 31] : -infinity());
    __syncthreads();
    return v;
}
