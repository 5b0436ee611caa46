// What CUDA would supply to the kernels' text, as plain C++. Every thread of a block is a run of the kernel's function on
// a stack of its own. __syncthreads, warp shuffles and tensor-core products are barriers among those threads. The
// scheduler is in host.cpp. Only headers of C are used, so that the C++ library is not needed.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __forceinline__ inline
#define __restrict__
#define __grid_constant__
#define __shared__ static thread_local

namespace emulated {
struct Dim { unsigned x, y, z; };
struct Fiber;
struct Warp;
// A thread of the block in hand. `fiber` is the stack that it runs on: null before its start and after its end.
struct Thread { Dim index; unsigned lane; Warp* warp; Fiber* fiber; };
// `alive` threads have not returned; `waiting` of them wait, listed in `waiters`; `opened` counts. `line` is where they wait.
struct Barrier { unsigned waiting, alive, opened, line; Thread** waiters; };
struct Warp { Barrier barrier; Thread* waiters[32]; uint32_t slot[2][32][12]; };
// What kernels see of the scheduler's state.
struct Here { Thread* current; Dim block_index, block_dim, grid_dim; Barrier block; };
// All stacks lie in one region that begins at a multiple of its size and has the state's address at its end. That is faster
// than a variable of the host's thread, which a loaded library reaches by a call.
constexpr size_t REGION = 128 << 20;
inline Here* here() { return *(Here**)(((uintptr_t)__builtin_frame_address(0) | (REGION - 1)) + 1 - sizeof(Here*)); }
void wait(Barrier& b);
// Ends the launch with an error that names the thread.
[[noreturn]] void fail(const char* what, const char* file, unsigned line);
inline void wait_block(unsigned line) {
    Barrier& b = here()->block;
    if (b.waiting && b.line != line) fail("threads of one block wait at two different __syncthreads()", "", line);
    b.line = line;
    wait(b);
}
// Every lane puts a value into the warp's slots and waits. The two sets of slots alternate, so that a fast lane does not
// overwrite what a slow one still reads.
template <class T> inline uint32_t (*exchange(const T& v))[12] {
    static_assert(sizeof(T) <= sizeof(uint32_t[12]), "a value that fits a slot");
    Warp* w = here()->current->warp;
    auto slots = w->slot[w->barrier.opened & 1];
    memcpy(slots[here()->current->lane], &v, sizeof v);
    wait(w->barrier);
    return slots;
}
template <class T> inline T shuffle(const T& v, unsigned from) {
    auto slots = exchange(v);
    T r;
    memcpy(&r, slots[from & 31], sizeof r);
    return r;
}
inline unsigned lane() { return here()->current->lane; }
// A kernel of the text: bytes of its arguments and threads of its blocks.
struct Entry { const char* name; void (*run)(const void*); size_t bytes; unsigned threads; Entry* next; };
extern Entry* kernels;
}

#ifndef EMULATED_SCHEDULER  // The rest is for the kernels' text alone.
namespace emulated {
struct Registration : Entry { Registration(const char* n, void (*r)(const void*), size_t b, unsigned t) : Entry{n, r, b, t, kernels} { kernels = this; } };
}
#define KERNEL(name, Args, threads, ...) \
    static void name(const Args& a); \
    static emulated::Registration registered_##name(#name, [](const void* a) { name(*(const Args*)a); }, sizeof(Args), threads); \
    static void name(const Args& a)
#define threadIdx (emulated::here()->current->index)
#define blockIdx (emulated::here()->block_index)
#define blockDim (emulated::here()->block_dim)
#define gridDim (emulated::here()->grid_dim)
#define __syncthreads() emulated::wait_block(__LINE__)
#define __syncwarp(...) emulated::wait(emulated::here()->current->warp->barrier)

inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline float __int_as_float(int u) { float f; memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline int __float_as_int(float f) { int u; memcpy(&u, &f, 4); return u; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float2int_rn(float v) { return (int)rintf(v); }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t v = (uint64_t)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)((v >> (8 * ((selector >> (4 * i)) & 7))) & 255) << (8 * i);
    return r;
}
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T load_once(const T* p) { return *p; }
// Within a block only, whose threads take turns.
template <class T> inline T atomicAdd(T* p, T v) { T old = *p; *p = old + v; return old; }

// All lanes of a warp that have not returned take part, whatever the mask says: this is stricter than the card.
template <class T> inline T __shfl_sync(unsigned, T v, int from) { return emulated::shuffle(v, (unsigned)from); }
template <class T> inline T __shfl_xor_sync(unsigned, T v, int o) { return emulated::shuffle(v, emulated::lane() ^ (unsigned)o); }
template <class T> inline T __shfl_up_sync(unsigned, T v, unsigned o) { unsigned l = emulated::lane(); return emulated::shuffle(v, l < o ? l : l - o); }
template <class T> inline T __shfl_down_sync(unsigned, T v, unsigned o) { unsigned l = emulated::lane(); return emulated::shuffle(v, l + o > 31 ? l : l + o); }
inline unsigned __ballot_sync(unsigned mask, int yes) {
    unsigned r = yes ? 1u << emulated::lane() : 0;
    for (int o = 16; o; o >>= 1) r |= __shfl_xor_sync(mask, r, o);
    return r;
}
inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
inline int __all_sync(unsigned mask, int yes) { return __ballot_sync(mask, !yes) == 0; }

inline float to_float(f16 h) {
    unsigned s = (h.bits & 0x8000u) << 16, e = (h.bits >> 10) & 31, m = h.bits & 1023;
    if (e == 31) return __uint_as_float(s | 0x7f800000u | m << 13);
    if (e) return __uint_as_float(s | (e + 112) << 23 | m << 13);
    float v = (float)m * 5.9604644775390625e-8f;  // 2^-24
    return s ? -v : v;
}
// To the nearest, ties to even, as the card's cvt.rn does; every NaN becomes 0x7fff.
inline void round_to(float v, bf16& to) {
    unsigned u = __float_as_uint(v);
    to.bits = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
}
inline void round_to(float v, f16& to) {
    unsigned u = __float_as_uint(v), sign = u >> 16 & 0x8000u;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) to.bits = 0x7fff;
    else if (u >= 0x47800000u) to.bits = sign | 0x7c00;  // 65,536 and more
    else if (u < 0x38800000u) to.bits = sign | (__float_as_uint(__uint_as_float(u) + 0.5f) - 0x3f000000u);  // below 2^-14
    else to.bits = sign | (u + 0xfffu + ((u >> 13) & 1) - 0x38000000u) >> 13;
}
// C (16 x 8) += A (16 x 16) B (16 x 8), with the fragments that the PTX ISA gives for mma.m16n8k16. A lane's eight numbers
// of A and four of B travel as floats.
template <class T> inline void mma(T, float* c, const u32* a, const u32* b) {
    using namespace emulated;
    float mine[12];
    for (int i = 0; i < 12; i++) {
        T h;
        h.bits = (u16)((i < 8 ? a[i >> 1] : b[(i - 8) >> 1]) >> (16 * (i & 1)));
        mine[i] = to_float(h);
    }
    auto slots = exchange(mine);
    for (unsigned i = 0; i < 4; i++) {
        unsigned row = (lane() >> 2) + 8 * (i >> 1), column = 2 * (lane() & 3) + (i & 1);
        float s = 0;
        for (unsigned k = 0; k < 16; k++) {
            float x, y;
            memcpy(&x, &slots[4 * (row & 7) + ((k & 7) >> 1)][2 * ((row >> 3) + 2 * (k >> 3)) + (k & 1)], 4);
            memcpy(&y, &slots[4 * column + ((k & 7) >> 1)][8 + 2 * (k >> 3) + (k & 1)], 4);
            s += x * y;
        }
        c[i] += s;
    }
}
#endif
