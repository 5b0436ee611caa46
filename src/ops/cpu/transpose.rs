//! Transposes blocks of 16 rows into the columns of a panel, in registers where the machine allows it.
//! Panels are what `gemm.rs` and `bf16/mod.rs` multiply by. It depends on `isa.rs` only. Read `pack.rs` next.

use crate::ops::cpu::isa::Isa;

/// `out[j * out_stride + i]` = `values[i * stride + j]` for 16 rows i and `cols` columns j.
pub fn transpose(values: &[f32], stride: usize, cols: usize, out: &mut [f32], out_stride: usize) {
    assert!(cols == 0 || (values.len() >= 15 * stride + cols && out.len() >= (cols - 1) * out_stride + 16));
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if Isa::detect() == Isa::Avx512 {
        done = cols / 16 * 16;
        for j in (0..done).step_by(16) {
            // SAFETY: AVX-512 was detected; both 16 x 16 blocks lie inside the lengths asserted above.
            unsafe {
                transpose_16x16(values.as_ptr().add(j), stride, out.as_mut_ptr().add(j * out_stride), out_stride)
            };
        }
    }
    #[cfg(target_arch = "x86_64")]
    if Isa::detect() == Isa::Avx2 {
        done = cols / 8 * 8;
        for j in (0..done).step_by(8) {
            for i in [0, 8] {
                // SAFETY: AVX2 was detected; both 8 x 8 blocks lie inside the lengths asserted above.
                unsafe {
                    let (from, to) = (values.as_ptr().add(i * stride + j), out.as_mut_ptr().add(j * out_stride + i));
                    transpose_8x8(from, stride, to, out_stride);
                }
            }
        }
    }
    for j in done..cols {
        for i in 0..16 {
            out[j * out_stride + i] = values[i * stride + j];
        }
    }
}

/// One block in registers: pairs, then quads, then 128-bit lanes are exchanged.
///
/// # Safety
/// The machine has AVX-512 F; 16 rows of 16 elements can be read at `from` and written at `to`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn transpose_16x16(from: *const f32, stride: usize, to: *mut f32, out_stride: usize) {
    use std::arch::x86_64::*;
    let mut r = [_mm512_setzero_ps(); 16];
    for (i, row) in r.iter_mut().enumerate() {
        // SAFETY: guaranteed by the caller.
        *row = unsafe { _mm512_loadu_ps(from.add(i * stride)) };
    }
    let mut s = [_mm512_setzero_ps(); 16];
    for i in 0..8 {
        s[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for i in 0..4 {
        let (a, b, c, d) = (s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]);
        r[4 * i] = _mm512_shuffle_ps::<0x44>(a, c);
        r[4 * i + 1] = _mm512_shuffle_ps::<0xee>(a, c);
        r[4 * i + 2] = _mm512_shuffle_ps::<0x44>(b, d);
        r[4 * i + 3] = _mm512_shuffle_ps::<0xee>(b, d);
    }
    // r[4g + c] holds, lane by lane l, column 4l + c of rows 4g..4g+4.
    for c in 0..4 {
        let a = _mm512_shuffle_f32x4::<0x88>(r[c], r[4 + c]); // lanes 0, 2 of both
        let b = _mm512_shuffle_f32x4::<0xdd>(r[c], r[4 + c]); // lanes 1, 3
        let d = _mm512_shuffle_f32x4::<0x88>(r[8 + c], r[12 + c]);
        let e = _mm512_shuffle_f32x4::<0xdd>(r[8 + c], r[12 + c]);
        s[c] = _mm512_shuffle_f32x4::<0x88>(a, d);
        s[8 + c] = _mm512_shuffle_f32x4::<0xdd>(a, d);
        s[4 + c] = _mm512_shuffle_f32x4::<0x88>(b, e);
        s[12 + c] = _mm512_shuffle_f32x4::<0xdd>(b, e);
    }
    for (j, row) in s.iter().enumerate() {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_storeu_ps(to.add(j * out_stride), *row) };
    }
}

/// One block in registers: pairs, then quads, then 128-bit halves are exchanged.
///
/// # Safety
/// The machine has AVX2; 8 rows of 8 elements can be read at `from` and written at `to`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn transpose_8x8(from: *const f32, stride: usize, to: *mut f32, out_stride: usize) {
    use std::arch::x86_64::*;
    let mut r = [_mm256_setzero_ps(); 8];
    for (i, row) in r.iter_mut().enumerate() {
        // SAFETY: guaranteed by the caller.
        *row = unsafe { _mm256_loadu_ps(from.add(i * stride)) };
    }
    let mut s = [_mm256_setzero_ps(); 8];
    for i in 0..4 {
        s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for i in 0..2 {
        let (a, b, c, d) = (s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]);
        r[4 * i] = _mm256_shuffle_ps::<0x44>(a, c);
        r[4 * i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
        r[4 * i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
        r[4 * i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
    }
    // r[4g + c] holds, half by half l, column 4l + c of rows 4g..4g+4.
    for c in 0..4 {
        s[c] = _mm256_permute2f128_ps::<0x20>(r[c], r[4 + c]);
        s[4 + c] = _mm256_permute2f128_ps::<0x31>(r[c], r[4 + c]);
    }
    for (j, row) in s.iter().enumerate() {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm256_storeu_ps(to.add(j * out_stride), *row) };
    }
}
