// The storage types: how a matrix's stored bytes become numbers, and the kernels that dequantise rows of a matrix.
// The formulas and their order of operations are ggml's `dequantize_row_*`, so that every value equals the CPU's
// bit for bit. Depends on device/prelude.cu. Read ../linear/gpu_gemv.cu next: like ../embedding/gpu.cu, it reads
// weights through the types below.
//
// A unit is sixteen numbers that one thread decodes: eight at `first_column(unit)` and eight more half a span
// later. The span is chosen for each type such that neighbouring threads load neighbouring words and use most of
// their bits.

namespace stored {

// A matrix on the device. Types whose blocks are no whole number of aligned words lie in two planes: the blocks
// without their scales, and the scales. Otherwise `scales` is null.
struct Planes { const u8* main; const u8* scales; };

// Byte i of a word minus BIAS, exactly: the byte becomes the low bits of the mantissa of 2^23.
template <int BIAS> __device__ __forceinline__ float byte_minus(unsigned word, int i) {
    return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440u | i)) - (8388608.f + BIAS);
}
// Four bits become the lowest bit of four bytes each.
__device__ __forceinline__ unsigned spread(unsigned bits) { return ((bits & 15) * 0x00204081u) & 0x01010101u; }
__device__ __forceinline__ unsigned low_nibbles(unsigned word) { return word & 0x0f0f0f0fu; }
__device__ __forceinline__ unsigned high_nibbles(unsigned word) { return word >> 4 & 0x0f0f0f0fu; }
__device__ __forceinline__ float scale_at(Planes p, size_t block) { return to_float(((const f16*)p.scales)[block]); }
// Two words from an address that is a multiple of four only.
__device__ __forceinline__ U2 two_words(const u8* from) {
    U2 r;
    r.x = ((const unsigned*)from)[0];
    r.y = ((const unsigned*)from)[1];
    return r;
}
__device__ __forceinline__ unsigned word_of(U2 w, int i) { return i ? w.y : w.x; }

// Eight numbers at a time, as wide as the element type and the address allow.
__device__ __forceinline__ void store8(float* to, const float* v) {
    if (((size_t)to & 15) == 0) {
        store4(to, v);
        store4(to + 4, v + 4);
    } else {
        for (int i = 0; i < 8; i++) to[i] = v[i];
    }
}
template <class T> __device__ __forceinline__ void store8(T* to, const float* v) {
    if (((size_t)to & 15) == 0) {
        U4 w;
        w.x = pair<T>(v[0], v[1]); w.y = pair<T>(v[2], v[3]); w.z = pair<T>(v[4], v[5]); w.w = pair<T>(v[6], v[7]);
        *(U4*)to = w;
    } else {
        for (int i = 0; i < 8; i++) store(to + i, v[i]);
    }
}
// The four or eight numbers of sixteen bytes; the last argument tells the type.
__device__ __forceinline__ void split(U4 w, float* v, float) {
    v[0] = __uint_as_float(w.x); v[1] = __uint_as_float(w.y); v[2] = __uint_as_float(w.z); v[3] = __uint_as_float(w.w);
}
template <class T> __device__ __forceinline__ void split(U4 w, float* v, T) {
    const unsigned words[4] = {w.x, w.y, w.z, w.w};
    for (int i = 0; i < 4; i++) { v[2 * i] = first<T>(words[i]); v[2 * i + 1] = second<T>(words[i]); }
}
// Eight numbers from an address that is a multiple of sixteen.
__device__ __forceinline__ void load8(const float* from, float* v) {
    load4(from, v);
    load4(from + 4, v + 4);
}
template <class T> __device__ __forceinline__ void load8(const T* from, float* v) { split(*(const U4*)from, v, T()); }

// Every storage type below supplies: BLOCK and SPAN in numbers; DENSE; TABLE, whether decode() reads the table of
// NF4; Head and head(), what all units of a block share; Raw and fetch(), the unit's own words; and decode(), which
// makes the sixteen numbers of unit `u` of its block. Loading and decoding are apart so that a kernel can issue all
// loads first.
template <class S> __device__ __forceinline__ size_t first_column(size_t unit) {
    return S::SPAN * (unit / (S::SPAN / 16)) + 8 * (unit % (S::SPAN / 16));
}

// ---- dense: the numbers themselves ----

template <class E, int WIDTH> struct Dense {
    enum { BLOCK = 16, SPAN = WIDTH, DENSE = 1, TABLE = 0 };
    typedef E Element;
    struct Head {};
    struct Raw { U4 w[2][sizeof(E) / 2]; };
    static __device__ __forceinline__ float number(Planes p, size_t i) { return to_float(((const E*)p.main)[i]); }
    static __device__ __forceinline__ Head head(Planes, size_t) { return Head(); }
    static __device__ __forceinline__ Raw fetch(Planes p, size_t unit) {
        Raw r;
        const E* from = (const E*)p.main + first_column<Dense>(unit);
        for (int h = 0; h < 2; h++)
            for (int i = 0; i < (int)sizeof(E) / 2; i++) r.w[h][i] = load_once((const U4*)(from + h * SPAN / 2) + i);
        return r;
    }
    static __device__ __forceinline__ void decode(Head, const Raw& r, unsigned, float* v, const float*) {
        for (int h = 0; h < 2; h++)
            for (int i = 0; i < (int)sizeof(E) / 2; i++) split(r.w[h][i], v + 8 * h + 4 * i, E());
    }
};

// ---- blocks of 32 ----

// Numbers q - BIAS from the nibbles of eight bytes: the low ones first, sixteen columns later the high ones.
template <int BIAS> __device__ __forceinline__ float nibble(U2 q, int i) {
    const unsigned w = word_of(q, i >> 2 & 1);
    return byte_minus<BIAS>(i < 8 ? low_nibbles(w) : high_nibbles(w), i & 3);
}
// The same with a fifth bit each: `high` holds that of the block's 32 numbers, `at` is the first column.
template <int BIAS> __device__ __forceinline__ float nibble5(U2 q, unsigned high, int at, int i) {
    const unsigned w = word_of(q, i >> 2 & 1);
    const unsigned fifth = spread(high >> (at + (i < 8 ? 0 : 16) + (i & 4))) << 4;
    return byte_minus<BIAS>((i < 8 ? low_nibbles(w) : high_nibbles(w)) | fifth, i & 3);
}

// (q - 8) d. Sixteen bytes of quants; d in the plane of scales.
struct Q4_0 {
    enum { BLOCK = 32, SPAN = 32, DENSE = 0, TABLE = 0 };
    typedef f16 Head;
    typedef U2 Raw;
    static __device__ __forceinline__ Head head(Planes p, size_t block) { return ((const f16*)p.scales)[block]; }
    static __device__ __forceinline__ Raw fetch(Planes p, size_t unit) { return load_once((const U2*)p.main + unit); }
    static __device__ __forceinline__ void decode(Head h, const Raw& q, unsigned, float* v, const float*) {
        const float d = to_float(h);
#pragma unroll
        for (int i = 0; i < 16; i++) v[i] = __fmul_rn(nibble<8>(q, i), d);
    }
};

// q d + m. d, m, then sixteen bytes of quants.
struct Q4_1 {
    enum { BLOCK = 32, SPAN = 32, DENSE = 0, TABLE = 0 };
    typedef unsigned Head;
    typedef U2 Raw;
    static __device__ __forceinline__ Head head(Planes p, size_t block) {
        return *(const unsigned*)(p.main + 20 * block);
    }
    static __device__ __forceinline__ Raw fetch(Planes p, size_t unit) {
        return two_words(p.main + 20 * (unit >> 1) + 4 + 8 * (unit & 1));
    }
    static __device__ __forceinline__ void decode(Head h, const Raw& q, unsigned, float* v, const float*) {
        const float d = first<f16>(h), m = second<f16>(h);
#pragma unroll
        for (int i = 0; i < 16; i++) v[i] = __fadd_rn(__fmul_rn(nibble<0>(q, i), d), m);
    }
};

// (q - 16) d. Four bytes of fifth bits, then sixteen of quants; d in the plane of scales.
struct Q5_0 {
    enum { BLOCK = 32, SPAN = 32, DENSE = 0, TABLE = 0 };
    struct Head { unsigned high; f16 d; };
    typedef U2 Raw;
    static __device__ __forceinline__ Head head(Planes p, size_t block) {
        Head h;
        h.high = *(const unsigned*)(p.main + 20 * block);
        h.d = ((const f16*)p.scales)[block];
        return h;
    }
    static __device__ __forceinline__ Raw fetch(Planes p, size_t unit) {
        return two_words(p.main + 20 * (unit >> 1) + 4 + 8 * (unit & 1));
    }
    static __device__ __forceinline__ void decode(const Head& h, const Raw& q, unsigned u, float* v, const float*) {
        const float d = to_float(h.d);
#pragma unroll
        for (int i = 0; i < 16; i++) v[i] = __fmul_rn(nibble5<16>(q, h.high, 8 * (u & 1), i), d);
    }
};

// q d + m. d, m, four bytes of fifth bits, then sixteen of quants.
struct Q5_1 {
    enum { BLOCK = 32, SPAN = 32, DENSE = 0, TABLE = 0 };
    typedef U2 Head;
    typedef U2 Raw;
    static __device__ __forceinline__ Head head(Planes p, size_t block) { return *(const U2*)(p.main + 24 * block); }
    static __device__ __forceinline__ Raw fetch(Planes p, size_t unit) {
        return *(const U2*)(p.main + 24 * (unit >> 1) + 8 + 8 * (unit & 1));
    }
    static __device__ __forceinline__ void decode(const Head& h, const Raw& q, unsigned u, float* v, const float*) {
        const float d = first<f16>(h.x), m = second<f16>(h.x);
#pragma unroll
        for (int i = 0; i < 16; i++) v[i] = __fadd_rn(__fmul_rn(nibble5<0>(q, h.y, 8 * (u & 1), i), d), m);
    }
};

// q d. 32 signed bytes; d in the plane of scales.
struct Q8_0 {
    enum { BLOCK = 32, SPAN = 16, DENSE = 0, TABLE = 0 };
    typedef f16 Head;
    typedef U4 Raw;
    static __device__ __forceinline__ Head head(Planes p, size_t block) { return ((const f16*)p.scales)[block]; }
    static __device__ __forceinline__ Raw fetch(Planes p, size_t unit) { return load_once((const U4*)p.main + unit); }
    static __device__ __forceinline__ void decode(Head h, const Raw& q, unsigned, float* v, const float*) {
        const float d = to_float(h);
        const unsigned words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 16; i++) v[i] = __fmul_rn(signed_byte_float(words[i >> 2], i & 3), d);
    }
};

// ---- blocks of 64 ----

// table[q] top. 32 bytes of quants, the low nibbles being the first 32 numbers; `top` in the plane of scales, as f32.
struct NF4 {
    enum { BLOCK = 64, SPAN = 64, DENSE = 0, TABLE = 1 };
    typedef float Head;
    typedef U2 Raw;
    static __device__ __forceinline__ Head head(Planes p, size_t block) { return ((const float*)p.scales)[block]; }
    static __device__ __forceinline__ Raw fetch(Planes p, size_t unit) { return load_once((const U2*)p.main + unit); }
    static __device__ __forceinline__ void decode(Head top, const Raw& q, unsigned, float* v, const float* table) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const unsigned name = word_of(q, i >> 2 & 1) >> (8 * (i & 3) + 4 * (i >> 3)) & 15;
            v[i] = __fmul_rn(table[name], top);
        }
    }
};
// The sixteen quantiles of a normal distribution that NF4's quants name (bitsandbytes' `create_normal_map`).
__device__ __forceinline__ float nf4_value(unsigned i) {
    const float values[16] = {-1.f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f,
        0.f, 0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.f};
    return values[i];
}
// All threads of a block call this before they decode: it fills the block's table where the type needs one.
template <class S> __device__ __forceinline__ void fill_table(float* table) {
    if (S::TABLE) {
        if (threadIdx.x < 16) table[threadIdx.x] = nf4_value(threadIdx.x);
        __syncthreads();
    }
}

// ---- blocks of 256: scales of scales ----

// q (d s) - dmin m. Sixteen bytes of scales s and minima m, 64 of quants of two bits, d, dmin.
struct Q2_K {
    enum { BLOCK = 256, SPAN = 64, DENSE = 0, TABLE = 0 };
    struct Head { unsigned d; const u8* scales; };
    typedef U2 Raw;
    static __device__ __forceinline__ Head head(Planes p, size_t block) {
        Head h;
        h.scales = p.main + 84 * block;
        h.d = *(const unsigned*)(h.scales + 80);
        return h;
    }
    static __device__ __forceinline__ Raw fetch(Planes p, size_t unit) {
        return two_words(p.main + 84 * (unit >> 4) + 16 + 32 * (unit >> 3 & 1) + 8 * (unit & 3));
    }
    static __device__ __forceinline__ void decode(const Head& h, const Raw& q, unsigned u, float* v, const float*) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // Of each group of 128 numbers, bits 2j and 2j + 1 of all bytes are the j-th 32 numbers, with two scales.
            const unsigned j = 2 * (u >> 2 & 1) + half, s = h.scales[8 * (u >> 3) + 2 * j + (u >> 1 & 1)];
            const float scale = __fmul_rn(first<f16>(h.d), (float)(s & 15));
            const float least = __fmul_rn(second<f16>(h.d), (float)(s >> 4));
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const unsigned bits = word_of(q, i >> 2) >> (2 * j) & 0x03030303u;
                v[8 * half + i] = __fsub_rn(__fmul_rn(scale, byte_minus<0>(bits, i & 3)), least);
            }
        }
    }
};

// (q - 4) (d (s - 32)). 32 bytes of third bits, 64 of quants of two bits, 12 of scales s; d in the plane of scales.
struct Q3_K {
    enum { BLOCK = 256, SPAN = 64, DENSE = 0, TABLE = 0 };
    struct Head { float d; const u8* scales; };
    struct Raw { U2 low, high; };
    static __device__ __forceinline__ Head head(Planes p, size_t block) {
        Head h;
        h.d = scale_at(p, block);
        h.scales = p.main + 108 * block + 96;
        return h;
    }
    static __device__ __forceinline__ Raw fetch(Planes p, size_t unit) {
        const u8* block = p.main + 108 * (unit >> 4);
        Raw r;
        r.high = two_words(block + 8 * (unit & 3));
        r.low = two_words(block + 32 + 32 * (unit >> 3 & 1) + 8 * (unit & 3));
        return r;
    }
    static __device__ __forceinline__ void decode(const Head& h, const Raw& q, unsigned u, float* v, const float*) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const unsigned j = 2 * (u >> 2 & 1) + half, k = 8 * (u >> 3) + 2 * j + (u >> 1 & 1);
            const unsigned low = h.scales[k & 7] >> (k < 8 ? 0 : 4) & 15;
            const unsigned high = h.scales[8 + (k & 3)] >> (2 * (k >> 2)) & 3;
            const float scale = __fmul_rn(h.d, (float)(int)(low | high << 4) - 32.f);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const unsigned third = word_of(q.high, i >> 2) >> (4 * (u >> 3) + j) & 0x01010101u;
                const unsigned bits = (word_of(q.low, i >> 2) >> (2 * j) & 0x03030303u) | third << 2;
                v[8 * half + i] = __fmul_rn(scale, byte_minus<4>(bits, i & 3));
            }
        }
    }
};

// d s and dmin m of group j (32 numbers) of a Q4_K or Q5_K block that begins with the words h: d, dmin and 12 bytes
// in which eight scales s and eight minima m of six bits lie interleaved.
__device__ __forceinline__ void group_scale(U4 h, unsigned j, float& scale, float& least) {
    const unsigned at = 8 * (j & 3), a = h.y >> at & 255, b = h.z >> at & 255, c = h.w >> at & 255;
    const unsigned s = j < 4 ? a & 63 : (c & 15) | (a >> 6) << 4, m = j < 4 ? b & 63 : (c >> 4) | (b >> 6) << 4;
    scale = __fmul_rn(first<f16>(h.x), (float)s);
    least = __fmul_rn(second<f16>(h.x), (float)m);
}

// q (d s) - dmin m. d, dmin, 12 bytes of scales and minima, 128 of quants.
struct Q4_K {
    enum { BLOCK = 256, SPAN = 64, DENSE = 0, TABLE = 0 };
    typedef U4 Head;
    typedef U2 Raw;
    static __device__ __forceinline__ Head head(Planes p, size_t block) { return *(const U4*)(p.main + 144 * block); }
    static __device__ __forceinline__ Raw fetch(Planes p, size_t unit) {
        return load_once((const U2*)(p.main + 144 * (unit >> 4) + 16 + 8 * (unit & 15)));
    }
    static __device__ __forceinline__ void decode(const Head& h, const Raw& q, unsigned u, float* v, const float*) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float scale, least;
            group_scale(h, 2 * (u >> 2) + half, scale, least);
#pragma unroll
            for (int i = 0; i < 8; i++)
                v[8 * half + i] = __fsub_rn(__fmul_rn(scale, nibble<0>(q, 8 * half + i)), least);
        }
    }
};

// q (d s) - dmin m with q of five bits. d, dmin, 12 bytes of scales and minima, 32 of fifth bits, 128 of quants.
struct Q5_K {
    enum { BLOCK = 256, SPAN = 64, DENSE = 0, TABLE = 0 };
    typedef U4 Head;
    struct Raw { U2 low, high; };
    static __device__ __forceinline__ Head head(Planes p, size_t block) { return *(const U4*)(p.main + 176 * block); }
    static __device__ __forceinline__ Raw fetch(Planes p, size_t unit) {
        const u8* block = p.main + 176 * (unit >> 4);
        Raw r;
        r.high = *(const U2*)(block + 16 + 8 * (unit & 3));
        r.low = load_once((const U2*)(block + 48 + 8 * (unit & 15)));
        return r;
    }
    static __device__ __forceinline__ void decode(const Head& h, const Raw& q, unsigned u, float* v, const float*) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float scale, least;
            group_scale(h, 2 * (u >> 2) + half, scale, least);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const unsigned w = word_of(q.low, i >> 2);
                const unsigned fifth = word_of(q.high, i >> 2) >> (2 * (u >> 2) + half) & 0x01010101u;
                const unsigned bits = (half ? high_nibbles(w) : low_nibbles(w)) | fifth << 4;
                v[8 * half + i] = __fsub_rn(__fmul_rn(scale, byte_minus<0>(bits, i & 3)), least);
            }
        }
    }
};

// (d s) (q - 32). 128 bytes of low nibbles, 64 of two high bits, 16 signed bytes of scales s; d in the plane of
// scales.
struct Q6_K {
    enum { BLOCK = 256, SPAN = 128, DENSE = 0, TABLE = 0 };
    struct Head { U4 scales; f16 d; };
    struct Raw { U2 low, high; };
    static __device__ __forceinline__ Head head(Planes p, size_t block) {
        Head h;
        h.scales = *(const U4*)(p.main + 208 * block + 192);
        h.d = ((const f16*)p.scales)[block];
        return h;
    }
    static __device__ __forceinline__ Raw fetch(Planes p, size_t unit) {
        const u8* block = p.main + 208 * (unit >> 4);
        Raw r;
        r.low = load_once((const U2*)(block + 8 * (unit & 15)));
        r.high = *(const U2*)(block + 128 + 32 * (unit >> 3 & 1) + 8 * (unit & 3));
        return r;
    }
    static __device__ __forceinline__ void decode(const Head& h, const Raw& q, unsigned u, float* v, const float*) {
        const float d = to_float(h.d);
        // Of each group of 128 numbers, the low nibbles of 64 bytes are the first 64 numbers and the high ones the
        // rest.
        const unsigned second = u >> 2 & 1;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const unsigned k = 4 * half + 2 * second + (u >> 1 & 1);  // Which of the group's eight scales.
            const unsigned word = half ? (u >> 3 ? h.scales.w : h.scales.y) : (u >> 3 ? h.scales.z : h.scales.x);
            const float scale = __fmul_rn(d, (float)(signed char)(word >> (8 * (k & 3)) & 255));
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const unsigned w = word_of(q.low, i >> 2);
                const unsigned top = word_of(q.high, i >> 2) >> (4 * half + 2 * second) & 0x03030303u;
                const unsigned bits = (half ? high_nibbles(w) : low_nibbles(w)) | top << 4;
                v[8 * half + i] = __fmul_rn(scale, byte_minus<32>(bits, i & 3));
            }
        }
    }
};

// The sixteen numbers of a unit of the whole matrix.
template <class S> __device__ __forceinline__ void decode_unit(Planes p, size_t unit, float* v, const float* table) {
    const typename S::Head head = S::head(p, unit / (S::BLOCK / 16));
    const typename S::Raw raw = S::fetch(p, unit);
    S::decode(head, raw, (unsigned)(unit % (S::BLOCK / 16)), v, table);
}

// One number of the matrix where the type is dense; never called for the others.
template <class S, bool DENSE> struct Single {
    static __device__ __forceinline__ float number(Planes, size_t) { return 0.f; }
};
template <class S> struct Single<S, true> {
    static __device__ __forceinline__ float number(Planes p, size_t i) { return S::number(p, i); }
};

typedef Dense<float, 16> F32;
typedef Dense<f16, 16> F16;
typedef Dense<bf16, 16> BF16;

}  // namespace stored

// Every storage type with the name its kernels bear.
#define FOR_EVERY_STORED_TYPE(X) \
    X(f32, stored::F32) X(f16, stored::F16) X(bf16, stored::BF16) X(q4_0, stored::Q4_0) X(q4_1, stored::Q4_1) \
    X(q5_0, stored::Q5_0) X(q5_1, stored::Q5_1) X(q8_0, stored::Q8_0) X(q2_k, stored::Q2_K) X(q3_k, stored::Q3_K) \
    X(q4_k, stored::Q4_K) X(q5_k, stored::Q5_K) X(q6_k, stored::Q6_K) X(nf4, stored::NF4)

// ---- dequantise: the numbers first .. first + count of the matrix, row-major, as T. A thread makes sixteen. ----

struct Dequantise { stored::Planes weight; void* out; u64 first, count; };
template <class S, class T> __device__ __forceinline__ void dequantise(const Dequantise& a) {
    __shared__ float table[16];
    stored::fill_table<S>(table);
    const size_t at = 16 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= a.count) return;
    T* out = (T*)a.out;
    if (S::DENSE && (a.first % 16 != 0 || at + 16 > a.count)) {
        for (size_t i = at; i < a.count && i < at + 16; i++)
            store(out + i, stored::Single<S, S::DENSE != 0>::number(a.weight, a.first + i));
        return;
    }
    const size_t unit = (a.first + at) / 16, column = stored::first_column<S>(unit) - a.first;
    float v[16];
    stored::decode_unit<S>(a.weight, unit, v, table);
    stored::store8(out + column, v);
    stored::store8(out + column + S::SPAN / 2, v + 8);
}
#define DEQUANTISE(name, S) \
    KERNEL(dequantise_##name##_f32, Dequantise, 256) { dequantise<S, float>(a); } \
    KERNEL(dequantise_##name##_bf16, Dequantise, 256) { dequantise<S, bf16>(a); } \
    KERNEL(dequantise_##name##_f16, Dequantise, 256) { dequantise<S, f16>(a); }
FOR_EVERY_STORED_TYPE(DEQUANTISE)
