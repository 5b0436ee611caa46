//! Matrix-vector products for decoding (at most 12 rows of x): each weight row is dequantised once and multiplied with
//! every row of x, without packing. Each sum has the same order on one machine, whatever the number of rows of x or of
//! the weight. It does not depend on the other files of `linear`. Read `cpu.rs` beside it for the use.

use std::ops::Range;

use crate::ops::cpu::gemm::Into;
#[cfg(target_arch = "x86_64")]
use crate::ops::cpu::lane_sums;
use crate::ops::cpu::scratch::with_scratch;
use crate::ops::cpu::{Isa, Out, dot_plain};
use crate::ops::weight::Weight;

/// Up to this many rows of x are multiplied one weight row at a time; more go through panels.
pub const FEW_ROWS: usize = 12;

/// Weight rows that are multiplied together.
pub const WEIGHT_ROWS: usize = 3;

/// Outputs per work item: a multiple of WEIGHT_ROWS.
pub const PANEL: usize = 16 * WEIGHT_ROWS;

/// sums[w][i] = weight row w . x_i.
type Sums = [[f32; FEW_ROWS]; WEIGHT_ROWS];

/// Columns `columns` of y (m, n) (+)= x (m, k) W (n, k)^T, for m <= [`FEW_ROWS`].
pub fn gemv(isa: Isa, xs: &[f32], m: usize, weight: &Weight, columns: Range<usize>, out: Out, into: Into) {
    let (n, k) = (weight.rows(), weight.cols());
    with_scratch(WEIGHT_ROWS * k, |scratch| {
        let mut sums: Sums = [[0.0; FEW_ROWS]; WEIGHT_ROWS];
        for j in columns.clone().step_by(WEIGHT_ROWS) {
            let count = WEIGHT_ROWS.min(columns.end - j);
            let (rows, then) = match weight.rows_f32(j..j + count) {
                Some(rows) => (rows, Then::More),
                None => {
                    for (w, row) in scratch.chunks_exact_mut(k).enumerate().take(count) {
                        weight.row(j + w, row);
                    }
                    (&scratch[..count * k], Then::Nothing)
                }
            };
            dots(isa, rows, then, k, xs, m, &mut sums);
            for (w, sums) in sums.iter().enumerate().take(count) {
                for (i, &sum) in sums.iter().enumerate().take(m) {
                    // SAFETY: column j + w is one of the caller's, row i is below m.
                    unsafe {
                        let y = out.at(i * n + j + w);
                        *y = if into == Into::Add { *y + sum } else { sum };
                    }
                }
            }
        }
    });
}

/// What follows the rows of a call in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    /// The rows of the next calls; they are prefetched, because the weight is streamed from memory.
    More,
    /// Nothing that is used.
    Nothing,
}

/// The products of up to [`WEIGHT_ROWS`] weight rows of length k with the m rows of x.
fn dots(isa: Isa, rows: &[f32], then: Then, k: usize, xs: &[f32], m: usize, sums: &mut Sums) {
    assert!(m <= FEW_ROWS && xs.len() >= m * k && rows.len() <= WEIGHT_ROWS * k);
    #[cfg(target_arch = "x86_64")]
    if isa != Isa::Portable {
        let count = rows.len() / k;
        let mut i = 0;
        while i < m {
            let few = if m - i >= 4 { 4 } else { 1 };
            // SAFETY: the instructions were detected; rows i..i + few of xs and all `count` rows exist.
            unsafe {
                let (row, x) = (rows.as_ptr(), xs.as_ptr().add(i * k));
                match (isa, count, few) {
                    (Isa::Avx512, _, 4) => put(rows.chunks_exact(k).map(|row| dots_avx512::<4>(row, x)), i, sums),
                    (Isa::Avx512, ..) => put(rows.chunks_exact(k).map(|row| dots_avx512::<1>(row, x)), i, sums),
                    (_, 3, 4) => put(dots_avx2::<3, 4>(row, then, k, x), i, sums),
                    (_, 2, 4) => put(dots_avx2::<2, 4>(row, then, k, x), i, sums),
                    (_, 1, 4) => put(dots_avx2::<1, 4>(row, then, k, x), i, sums),
                    (_, 3, _) => put(dots_avx2::<3, 1>(row, then, k, x), i, sums),
                    (_, 2, _) => put(dots_avx2::<2, 1>(row, then, k, x), i, sums),
                    _ => put(dots_avx2::<1, 1>(row, then, k, x), i, sums),
                }
            }
            i += few;
        }
        return;
    }
    for (row, sums) in rows.chunks_exact(k).zip(sums) {
        for (x, sum) in xs.chunks_exact(k).zip(sums).take(m) {
            *sum = dot_plain(row, x);
        }
    }
}

/// Stores M sums of each weight row in columns i..i + M.
fn put<const M: usize>(found: impl IntoIterator<Item = [f32; M]>, i: usize, sums: &mut Sums) {
    for (sums, found) in sums.iter_mut().zip(found) {
        sums[i..i + M].copy_from_slice(&found);
    }
}

/// Four chains of sixteen partial sums per row, so that additions overlap.
///
/// # Safety
/// The machine has AVX-512 F; `x` holds M rows as long as `row`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn dots_avx512<const M: usize>(row: &[f32], x: *const f32) -> [f32; M] {
    use std::arch::x86_64::*;
    let k = row.len();
    let mut acc = [[_mm512_setzero_ps(); 4]; M];
    let mut j = 0;
    // SAFETY: every access is below k, or masked to it.
    unsafe {
        while j + 64 <= k {
            for c in 0..4 {
                let w = _mm512_loadu_ps(row.as_ptr().add(j + c * 16));
                for (i, a) in acc.iter_mut().enumerate() {
                    a[c] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x.add(i * k + j + c * 16)), a[c]);
                }
            }
            j += 64;
        }
        while j < k {
            let mask: __mmask16 = if k - j >= 16 { !0 } else { (1u32 << (k - j)).wrapping_sub(1) as u16 };
            let w = _mm512_maskz_loadu_ps(mask, row.as_ptr().add(j));
            for (i, a) in acc.iter_mut().enumerate() {
                a[0] = _mm512_fmadd_ps(w, _mm512_maskz_loadu_ps(mask, x.add(i * k + j)), a[0]);
            }
            j += 16;
        }
    }
    std::array::from_fn(|i| {
        let [a, b, c, d] = acc[i];
        _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)))
    })
}

/// One chain of eight partial sums per product: three weight rows and four rows of x make twelve chains, which overlap.
/// The rows of the call after next are prefetched: 47 GFLOP/s instead of 32 on a Zen 3 core, over 400 MB of rows of
/// 576.
///
/// # Safety
/// The machine has AVX2 and FMA; `rows` holds W rows and `x` M rows of length k.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn dots_avx2<const W: usize, const M: usize>(
    rows: *const f32,
    then: Then,
    k: usize,
    x: *const f32,
) -> [[f32; M]; W] {
    use std::arch::x86_64::*;
    let whole = k / 8 * 8;
    let mut acc = [[_mm256_setzero_ps(); M]; W];
    // SAFETY: every access is below k in its row.
    unsafe {
        for j in (0..whole).step_by(8) {
            let mut row = [_mm256_setzero_ps(); W];
            for (w, row) in row.iter_mut().enumerate() {
                *row = _mm256_loadu_ps(rows.add(w * k + j));
                // A cache line has sixteen f32. The address may be past the weight: a prefetch never faults.
                if then == Then::More && j % 16 == 0 {
                    _mm_prefetch::<_MM_HINT_T0>(rows.wrapping_add((w + 2 * W) * k + j).cast());
                }
            }
            for i in 0..M {
                let x = _mm256_loadu_ps(x.add(i * k + j));
                for (acc, &row) in acc.iter_mut().zip(&row) {
                    acc[i] = _mm256_fmadd_ps(row, x, acc[i]);
                }
            }
        }
        let mut sums = [[0f32; M]; W];
        for (w, sums) in sums.iter_mut().enumerate() {
            if M == 4 {
                let four = lane_sums([acc[w][0], acc[w][1 % M], acc[w][2 % M], acc[w][3 % M]]);
                _mm_storeu_ps(sums.as_mut_ptr(), four);
            } else {
                for (sum, &lanes) in sums.iter_mut().zip(&acc[w]) {
                    *sum = _mm_cvtss_f32(lane_sums([lanes; 4]));
                }
            }
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = (whole..k).fold(*sum, |sum, j| sum + *rows.add(w * k + j) * *x.add(i * k + j));
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    fn random(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = SplitMix64::new(seed);
        (0..n).map(|_| rng.uniform() as f32 - 0.5).collect()
    }

    #[test]
    fn every_instruction_set_equals_the_plain_sum_however_rows_are_grouped() {
        for isa in Isa::available() {
            for k in [5, 8, 37, 64, 203] {
                let (rows, xs) = (random(WEIGHT_ROWS * k, 1), random(FEW_ROWS * k, 2));
                let alone = |w: usize, i: usize| {
                    let mut sums = [[0.0; FEW_ROWS]; WEIGHT_ROWS];
                    dots(isa, &rows[w * k..(w + 1) * k], Then::Nothing, k, &xs[i * k..(i + 1) * k], 1, &mut sums);
                    sums[0][0]
                };
                for (count, m) in [(3, 12), (3, 7), (2, 5), (1, 3), (2, 8)] {
                    let mut sums = [[f32::NAN; FEW_ROWS]; WEIGHT_ROWS];
                    dots(isa, &rows[..count * k], Then::More, k, &xs, m, &mut sums);
                    for (w, sums) in sums.iter().enumerate().take(count) {
                        for (i, &got) in sums.iter().enumerate().take(m) {
                            let term = |j: usize| f64::from(rows[w * k + j]) * f64::from(xs[i * k + j]);
                            let want: f64 = (0..k).map(term).sum();
                            // 203 products of size 1/4: rounding stays far below 1e-5.
                            assert!((f64::from(got) - want).abs() < 1e-5, "{isa:?} {count} {m} {k}");
                            assert_eq!(got, alone(w, i), "{isa:?}: grouping changed a sum");
                        }
                    }
                }
            }
        }
    }
}
