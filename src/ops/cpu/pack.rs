//! Panels: a few rows or columns of a stored matrix, unpacked to f32 in the order that `tile::gemm` reads. With
//! weight.rs the only code that sees stored types. Knows no layer. Read linear.rs next.

use std::cell::RefCell;
use std::ops::Range;

use crate::ops::cpu::gemm::NR;
use crate::ops::weight::Weight;

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Lends a buffer of `len` numbers of unspecified content, kept by the thread for the next time.
pub fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
    if buffer.len() < len {
        // To the number: growth by doubling would hold up to twice as much for good.
        buffer.reserve_exact(len - buffer.len());
        buffer.resize(len, 0.0);
    }
    let result = f(&mut buffer[..len]);
    SCRATCH.with_borrow_mut(|kept| kept.push(buffer));
    result
}

/// Lends a buffer of `len` words at a multiple of 64 bytes, as [`with_scratch`] does.
pub fn with_words<R>(len: usize, f: impl FnOnce(&mut [u32]) -> R) -> R {
    with_scratch(len + 16, |buffer| {
        let from = buffer.as_ptr().align_offset(64).min(16);
        f(crate::ops::cpu::bf16::as_words(&mut buffer[from..from + len]))
    })
}

/// `rows` of a (n, k) matrix as the columns of a panel: `panel[j * NR + i]` = W(rows.start + i, j), for at most NR
/// rows; panel is k * NR long, columns past the last row are zero.
pub fn rows_as_columns(weight: &Weight, rows: Range<usize>, panel: &mut [f32]) {
    let k = weight.cols();
    with_scratch(16 * k, |scratch| {
        for (g, start) in (rows.start..rows.end).step_by(16).enumerate() {
            let count = 16.min(rows.end - start);
            if count == 16
                && let Some(values) = weight.rows_f32(start..start + 16)
            {
                transpose(values, k, k, &mut panel[g * 16..], NR);
                continue;
            }
            for (i, row) in scratch.chunks_exact_mut(k).enumerate() {
                if i < count { weight.row(start + i, row) } else { row.fill(0.0) }
            }
            transpose(scratch, k, k, &mut panel[g * 16..], NR);
        }
    });
    for g in rows.len().div_ceil(16)..NR / 16 {
        for row in panel.chunks_exact_mut(NR) {
            row[g * 16..(g + 1) * 16].fill(0.0);
        }
    }
}

/// Columns `cols` of all rows: `panel[i * width + j]` = W(i, cols.start + j). `cols` lies on block borders.
pub fn columns(weight: &Weight, cols: Range<usize>, panel: &mut [f32]) {
    let width = cols.len();
    for (i, row) in panel.chunks_exact_mut(width).take(weight.rows()).enumerate() {
        weight.row_part(i, cols.clone(), row);
    }
}

/// `out[j * out_stride + i]` = `values[i * stride + j]` for 16 rows i and `cols` columns j.
pub fn transpose(values: &[f32], stride: usize, cols: usize, out: &mut [f32], out_stride: usize) {
    assert!(cols == 0 || (values.len() >= 15 * stride + cols && out.len() >= (cols - 1) * out_stride + 16));
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if crate::ops::cpu::Isa::detect() == crate::ops::cpu::Isa::Avx512 {
        done = cols / 16 * 16;
        for j in (0..done).step_by(16) {
            // SAFETY: AVX-512 was detected; both 16 x 16 blocks lie inside the lengths asserted above.
            unsafe {
                transpose_16x16(values.as_ptr().add(j), stride, out.as_mut_ptr().add(j * out_stride), out_stride)
            };
        }
    }
    #[cfg(target_arch = "x86_64")]
    if crate::ops::cpu::Isa::detect() == crate::ops::cpu::Isa::Avx2 {
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

/// One block in registers: pairs, then quads, then 128-bit lanes change places.
///
/// # Safety
/// The machine has AVX-512 F; 16 rows of 16 numbers are readable at `from` and writable at `to`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn transpose_16x16(from: *const f32, stride: usize, to: *mut f32, out_stride: usize) {
    use std::arch::x86_64::*;
    let mut r = [_mm512_setzero_ps(); 16];
    for (i, row) in r.iter_mut().enumerate() {
        // SAFETY: the caller's duty.
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
        // SAFETY: the caller's duty.
        unsafe { _mm512_storeu_ps(to.add(j * out_stride), *row) };
    }
}

/// One block in registers: pairs, then quads, then 128-bit halves change places.
///
/// # Safety
/// The machine has AVX2; 8 rows of 8 numbers are readable at `from` and writable at `to`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn transpose_8x8(from: *const f32, stride: usize, to: *mut f32, out_stride: usize) {
    use std::arch::x86_64::*;
    let mut r = [_mm256_setzero_ps(); 8];
    for (i, row) in r.iter_mut().enumerate() {
        // SAFETY: the caller's duty.
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
        // SAFETY: the caller's duty.
        unsafe { _mm256_storeu_ps(to.add(j * out_stride), *row) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panels_hold_the_matrix_in_the_promised_order() {
        for (n, k) in [(32, 48), (20, 37), (7, 16), (33, 5)] {
            let values: Vec<f32> = (0..n * k).map(|i| i as f32).collect();
            let w = Weight::from_f32(&values, n, k).unwrap();
            let rows = n.saturating_sub(25)..n.min(32);
            let mut panel = vec![-1f32; k * NR];
            rows_as_columns(&w, rows.clone(), &mut panel);
            for j in 0..k {
                for i in 0..NR {
                    let want = if i < rows.len() { values[(rows.start + i) * k + j] } else { 0.0 };
                    assert_eq!(panel[j * NR + i], want, "{n}x{k} at {i},{j}");
                }
            }
            let mut part = vec![0f32; n * 3];
            columns(&w, 1..4, &mut part);
            assert_eq!(part[(n - 1) * 3], values[(n - 1) * k + 1]);
        }
    }
}
