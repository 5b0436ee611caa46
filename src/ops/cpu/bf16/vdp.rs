//! Rounding and products by AVX-512 BF16: VDPBF16PS adds two products to each of sixteen sums. It depends on
//! its parent module only. Read `mod.rs` beside it for the layout of elements.

use std::arch::x86_64::*;

use crate::ops::cpu::bf16::{NR, Tiles};

/// Rounds whole groups of 32 elements; returns how many elements were rounded.
///
/// # Safety
/// The machine has AVX-512 F, BW and BF16; `out` has half as many words as `row` elements, or more.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub unsafe fn round(row: &[f32], out: &mut [u32]) -> usize {
    let done = row.len() / 32 * 32;
    assert!(out.len() >= done / 2);
    for i in (0..done).step_by(32) {
        // SAFETY: i + 32 <= done.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(row.as_ptr().add(i)), _mm512_loadu_ps(row.as_ptr().add(i + 16)));
            let pairs: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(out.as_mut_ptr().add(i / 2).cast(), pairs);
        }
    }
    done
}

/// # Safety
/// The machine has AVX-512 F, BW, BF16 and F16C.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16,f16c")]
pub unsafe fn round_q8_0(blocks: &[[u8; 34]], out: &mut [[u32; 16]]) {
    for (block, out) in blocks.iter().zip(out) {
        // SAFETY: 32 bytes follow the scale; 16 words are written.
        unsafe {
            let scale = i32::from(u16::from_le_bytes([block[0], block[1]]));
            let scale = _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(scale)));
            let half = |i: usize| {
                let q = _mm_loadu_si128(block.as_ptr().add(2 + 16 * i).cast());
                _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q)), scale)
            };
            let pairs: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(half(1), half(0)));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), pairs);
        }
    }
}

/// # Safety
/// As for [`round`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub unsafe fn interleave(a: &[f32], b: &[f32], out: &mut [u32]) -> usize {
    let done = out.len().min(a.len()).min(b.len()) / 16 * 16;
    for i in (0..done).step_by(16) {
        // SAFETY: i + 16 <= done, which is at most each length.
        unsafe {
            let half = |x: &[f32]| -> __m512i {
                let h: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(_mm512_loadu_ps(x.as_ptr().add(i))));
                _mm512_cvtepu16_epi32(h)
            };
            let pairs = _mm512_or_si512(half(a), _mm512_slli_epi32::<16>(half(b)));
            _mm512_storeu_si512(out.as_mut_ptr().add(i).cast(), pairs);
        }
    }
    done
}

/// M rows from row `i` on, 32 columns.
///
/// # Safety
/// As for [`crate::ops::cpu::bf16::product`]; the machine has AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub unsafe fn tile<const M: usize>(t: Tiles, i: usize) {
    // SAFETY: columns past n are masked out of every access to C.
    unsafe {
        let mask = |from: usize| -> __mmask16 {
            let n = t.n.saturating_sub(from).min(16);
            ((1u32 << n) - 1) as u16
        };
        let masks = [mask(0), mask(16)];
        let c = t.c.add(i * t.ldc);
        let mut acc = [[_mm512_setzero_ps(); 2]; M];
        if t.add {
            for (r, row) in acc.iter_mut().enumerate() {
                row[0] = _mm512_maskz_loadu_ps(masks[0], c.add(r * t.ldc));
                row[1] = _mm512_maskz_loadu_ps(masks[1], c.wrapping_add(r * t.ldc + 16));
            }
        }
        let (a, mut b) = (t.a.add(i * t.words), t.b);
        let bh = |w: __m512i| -> __m512bh { std::mem::transmute(w) };
        for p in 0..t.words {
            let b0 = bh(_mm512_loadu_si512(b.cast()));
            let b1 = bh(_mm512_loadu_si512(b.add(16).cast()));
            for (r, row) in acc.iter_mut().enumerate() {
                let x = bh(_mm512_set1_epi32(*a.add(r * t.words + p) as i32));
                row[0] = _mm512_dpbf16_ps(row[0], x, b0);
                row[1] = _mm512_dpbf16_ps(row[1], x, b1);
            }
            b = b.add(NR);
        }
        for (r, row) in acc.iter().enumerate() {
            _mm512_mask_storeu_ps(c.add(r * t.ldc), masks[0], row[0]);
            _mm512_mask_storeu_ps(c.wrapping_add(r * t.ldc + 16), masks[1], row[1]);
        }
    }
}
