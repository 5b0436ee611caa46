//! The storage types (ggml dtypes and NF4) and exact dequantisation to f32. Only this file, `dequantise.rs`,
//! `quantise.rs` and the fast path for Q8_0 in `cpu/bf16` depend on the layout of blocks. Source: ggml's
//! `dequantize_row_*`. It does not depend on matrices. Read `dequantise.rs` beside it next.

use half::f16;

use crate::ops::cpu::vectorised;
use crate::ops::storage::dequantise;

/// The storage type of a matrix. The quantised types have ggml's block layouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, missing_docs)]
pub enum StorageDType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    /// QLoRA's 4-bit normal float, in memory only: no file format has it.
    NF4,
}

impl StorageDType {
    /// All types.
    pub const ALL: [Self; 14] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::NF4,
    ];

    /// (values, bytes) of one block; a row is a whole number of blocks. Source: ggml's `block_*` structs.
    pub const fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::BF16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q8_0 => (32, 34),
            Self::Q2K => (256, 84),
            Self::Q3K => (256, 110),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
            Self::NF4 => (64, 36),
        }
    }

    /// The type with this number in a GGUF tensor table (`enum ggml_type`), if it is supported.
    pub fn from_ggml(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2K,
            11 => Self::Q3K,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::BF16,
            _ => return None,
        })
    }

    /// The usual name: `q8_0`, `q4_k`, `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Q2K => "q2_k",
            Self::Q3K => "q3_k",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
            Self::NF4 => "nf4",
        }
    }

    /// The number of this type in a GGUF tensor table; `None` for NF4, which no file format has.
    pub fn to_ggml(self) -> Option<u32> {
        (0..=30).find(|&id| Self::from_ggml(id) == Some(self))
    }

    /// Whether values are stored individually, not in blocks.
    pub const fn is_dense(self) -> bool {
        self.block().0 == 1
    }

    /// This type, or, if rows of `cols` values are not whole blocks of it, the one that llama.cpp uses in its place
    /// (`llama_tensor_get_type`: q4_k -> q5_0, q6_k -> q8_0); `None` if that does not fit either.
    pub fn for_width(self, cols: usize) -> Option<Self> {
        let smaller = match self {
            Self::Q4K | Self::NF4 => Self::Q5_0,
            Self::Q6K => Self::Q8_0,
            other => other,
        };
        [self, smaller].into_iter().find(|t| cols.is_multiple_of(t.block().0))
    }

    /// Bytes of `values` values; `None` if they are not a whole number of blocks or overflow.
    pub fn bytes_for(self, values: usize) -> Option<usize> {
        let (block, bytes) = self.block();
        if !values.is_multiple_of(block) { None } else { (values / block).checked_mul(bytes) }
    }
}

/// Dequantises `bytes` of `dtype` to f32. `out` has one element per value.
pub(crate) fn unpack(dtype: StorageDType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        StorageDType::F32 => f32s(bytes, out),
        StorageDType::F16 => f16s(bytes, out),
        StorageDType::BF16 => bf16s(bytes, out),
        StorageDType::Q8_0 => q8_0(bytes, out),
        StorageDType::Q4_0 => q4_0(bytes, out),
        StorageDType::Q4_1 => q4_1(bytes, out),
        StorageDType::Q5_0 => dequantise::q5_0(bytes, out),
        StorageDType::Q5_1 => dequantise::q5_1(bytes, out),
        StorageDType::Q2K => dequantise::q2_k(bytes, out),
        StorageDType::Q3K => dequantise::q3_k(bytes, out),
        StorageDType::Q4K => dequantise::q4_k(bytes, out),
        StorageDType::Q5K => dequantise::q5_k(bytes, out),
        StorageDType::Q6K => dequantise::q6_k(bytes, out),
        StorageDType::NF4 => nf4(bytes, out),
    }
}

vectorised! {
    fn f32s(bytes: &[u8], out: &mut [f32]) {
        for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *o = f32::from_le_bytes(*b);
        }
    }
}

vectorised! {
    fn f16s(bytes: &[u8], out: &mut [f32]) {
        for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *o = f16::from_le_bytes(*b).to_f32();
        }
    }
}

vectorised! {
    fn bf16s(bytes: &[u8], out: &mut [f32]) {
        for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *o = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
        }
    }
}

/// The values of NF4: sixteen quantiles of a normal distribution, 0 among them. Source: bitsandbytes
/// `create_normal_map`, QLoRA appendix E.
pub(crate) const NF4_VALUES: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

vectorised! {
    fn nf4(bytes: &[u8], out: &mut [f32]) {
        for (o, b) in out.as_chunks_mut::<64>().0.iter_mut().zip(bytes.as_chunks::<36>().0) {
            let top = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            for i in 0..32 {
                o[i] = NF4_VALUES[usize::from(b[4 + i] & 15)] * top;
                o[32 + i] = NF4_VALUES[usize::from(b[4 + i] >> 4)] * top;
            }
        }
    }
}

/// Dequantisation of the three types that are most common in decoding, with hand-written AVX-512, because the compiler
/// widens bytes in small steps.
macro_rules! by_block {
    ($name:ident, $avx512:ident, $bytes:literal, $plain:expr) => {
        fn $name(bytes: &[u8], out: &mut [f32]) {
            #[cfg(target_arch = "x86_64")]
            if crate::ops::cpu::Isa::detect() == crate::ops::cpu::Isa::Avx512 {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
                fn all(bytes: &[u8], out: &mut [f32]) {
                    for (o, b) in out.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<$bytes>().0) {
                        $avx512(b, o);
                    }
                }
                // SAFETY: AVX-512 and F16C were detected.
                return unsafe { all(bytes, out) };
            }
            let plain: fn(&[u8; $bytes], &mut [f32; 32]) = $plain;
            for (o, b) in out.as_chunks_mut::<32>().0.iter_mut().zip(bytes.as_chunks::<$bytes>().0) {
                plain(b, o);
            }
        }
    };
}

by_block!(q8_0, q8_0_avx512, 34, |b, o| {
    let d = f16::from_le_bytes([b[0], b[1]]).to_f32();
    for i in 0..32 {
        o[i] = f32::from(b[2 + i] as i8) * d;
    }
});

by_block!(q4_0, q4_0_avx512, 18, |b, o| {
    let d = f16::from_le_bytes([b[0], b[1]]).to_f32();
    for i in 0..16 {
        o[i] = (i32::from(b[2 + i] & 15) - 8) as f32 * d;
        o[16 + i] = (i32::from(b[2 + i] >> 4) - 8) as f32 * d;
    }
});

by_block!(q4_1, q4_1_avx512, 20, |b, o| {
    let (d, m) = (f16::from_le_bytes([b[0], b[1]]).to_f32(), f16::from_le_bytes([b[2], b[3]]).to_f32());
    for i in 0..16 {
        o[i] = f32::from(b[4 + i] & 15) * d + m;
        o[16 + i] = f32::from(b[4 + i] >> 4) * d + m;
    }
});

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    /// A half float, broadcast to all lanes.
    #[inline]
    #[target_feature(enable = "avx512f,f16c")]
    fn half(low: u8, high: u8) -> __m512 {
        _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16::from_le_bytes([low, high])))))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
    pub fn q8_0_avx512(b: &[u8; 34], o: &mut [f32; 32]) {
        let d = half(b[0], b[1]);
        // SAFETY: 32 bytes follow the scale, and 32 values are written.
        unsafe {
            for i in 0..2 {
                let q = _mm_loadu_si128(b.as_ptr().add(2 + 16 * i).cast());
                let q = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q));
                _mm512_storeu_ps(o.as_mut_ptr().add(16 * i), _mm512_mul_ps(q, d));
            }
        }
    }

    /// The low and the high four bits of sixteen bytes, as sixteen integers each.
    ///
    /// # Safety
    /// Sixteen bytes can be read at `q`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn nibbles(q: *const u8) -> [__m512i; 2] {
        // SAFETY: guaranteed by the caller.
        let q = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(q.cast()) });
        [_mm512_and_si512(q, _mm512_set1_epi32(15)), _mm512_srli_epi32::<4>(q)]
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
    pub fn q4_0_avx512(b: &[u8; 18], o: &mut [f32; 32]) {
        let d = half(b[0], b[1]);
        // SAFETY: sixteen bytes follow the scale, and 32 values are written.
        unsafe {
            for (i, q) in nibbles(b.as_ptr().add(2)).into_iter().enumerate() {
                let q = _mm512_cvtepi32_ps(_mm512_sub_epi32(q, _mm512_set1_epi32(8)));
                _mm512_storeu_ps(o.as_mut_ptr().add(16 * i), _mm512_mul_ps(q, d));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
    pub fn q4_1_avx512(b: &[u8; 20], o: &mut [f32; 32]) {
        let (d, m) = (half(b[0], b[1]), half(b[2], b[3]));
        // SAFETY: sixteen bytes follow the scale and the minimum, and 32 values are written.
        unsafe {
            for (i, q) in nibbles(b.as_ptr().add(4)).into_iter().enumerate() {
                // Not fused: the plain loop and ggml round twice.
                let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(q), d);
                _mm512_storeu_ps(o.as_mut_ptr().add(16 * i), _mm512_add_ps(scaled, m));
            }
        }
    }
}
#[cfg(target_arch = "x86_64")]
use avx512::{q4_0_avx512, q4_1_avx512, q8_0_avx512};
