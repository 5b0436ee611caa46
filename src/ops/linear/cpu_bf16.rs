//! The linear group in bf16, for bases with [`ComputeDtype::Bf16`]. LoRA is part of the same product: with z = s x A^T
//! as further columns of x and B^T as further rows of W^T, one product gives x W^T + z B^T; likewise for the input
//! gradient. It does not depend on the other files of `linear`. Read `cpu.rs` beside it for the split of the work and
//! LoRA's gradients.

use std::ops::Range;

use crate::ops::cpu::bf16::{
    Bf16Kernel, Cores, Rounded, interleave, product, product_of_words, round, rows_as_columns,
};
use crate::ops::cpu::gemm::{Into, NR};
use crate::ops::cpu::pack::row_words;
use crate::ops::cpu::scratch::{with_scratch, with_words};
use crate::ops::cpu::{Out, parallel};
use crate::ops::weight::{ComputeDtype, Weight};

/// With at most this many rows of x (decoding), the weight's rows are the left-hand factor and need no transposition.
pub(crate) const FEW_ROWS: usize = 16;

/// Whether a group of weights with k columns computes in bf16. Pairs require even sizes, which all real models have.
pub fn applies<'a>(k: usize, mut weights: impl Iterator<Item = &'a Weight>) -> bool {
    let even = |n: usize| n.is_multiple_of(2);
    even(k) && weights.all(|w| w.compute() == ComputeDtype::Bf16 && even(w.rows()))
}

/// The packed left-hand factor: x or dy, rounded once, followed by its low-rank columns.
pub struct PackedLhs {
    rounded: Rounded,
    m: usize,
    /// Number of columns before the low-rank ones.
    k: usize,
    /// All rows as a panel, if there are at most FEW_ROWS.
    panel: Option<Vec<u32>>,
}

impl PackedLhs {
    /// Rounds x (m, k) and multiplies it by `factor` (rank, k)^T. The product z (m, rank) is appended to x, rounded,
    /// and returned in f32.
    pub fn of(x: &[f32], m: usize, k: usize, factor: &[f32], rank: usize) -> (Self, Vec<f32>) {
        let mut rounded = Rounded::of(x, m, k, rank, Cores::All);
        let mut z = vec![0f32; m * rank];
        let width = rounded.words();
        for r0 in (0..rank).step_by(NR) {
            let columns = NR.min(rank - r0);
            with_words(width * (NR + 16), |scratch| {
                let (panel, rows) = scratch.split_at_mut(width * NR);
                for g in 0..NR / 16 {
                    for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                        let at = r0 + g * 16 + i;
                        if at < rank { round(&factor[at * k..(at + 1) * k], row) } else { row.fill(0) }
                    }
                    rows_as_columns(rows, width, &mut panel[g * 16..]);
                }
                let out = Out::of(&mut z);
                parallel(m.div_ceil(32), m * k * columns, |tiles| {
                    let (i0, i1) = (tiles.start * 32, m.min(tiles.end * 32));
                    // SAFETY: rows i0..i1 of z belong to this part of the work.
                    unsafe {
                        let c = out.at(i0 * rank + r0);
                        product(Bf16Kernel::detect(), (i1 - i0, columns), &rounded, i0, panel, c, rank, Into::Fresh);
                    }
                });
            });
        }
        rounded.set_columns(k, &z, rank);
        (Self::with(rounded, m, k), z)
    }

    /// Rounds x (m, k), without low-rank columns.
    pub fn plain(x: &[f32], m: usize, k: usize, cores: Cores) -> Self {
        Self::with(Rounded::of(x, m, k, 0, cores), m, k)
    }

    fn with(rounded: Rounded, m: usize, k: usize) -> Self {
        let panel = (m <= FEW_ROWS).then(|| {
            let mut panel = vec![0; rounded.words() * NR];
            rounded.as_panel(&mut panel);
            panel
        });
        Self { rounded, m, k, panel }
    }

    /// y (m, width) (+)= x W^T + z B^T for the weight's rows n0..n0 + width. `b`: B (n, r), r, and the first of its
    /// columns in z. `ldy`: the row stride of y.
    ///
    /// # Safety
    /// `y` is the address of m rows of `width` elements that no other thread uses.
    pub unsafe fn forward_columns(
        &self,
        weight: &Weight,
        b: Option<(&[f32], usize, usize)>,
        (n0, width): (usize, usize),
        (y, ldy): (*mut f32, usize),
        into: Into,
    ) {
        let words = self.rounded.words();
        let fill = |i: usize, row: &mut [u32]| {
            row_words(weight, n0 + i, row);
            if let Some((b, r, offset)) = b {
                for (j, &v) in b[(n0 + i) * r..(n0 + i + 1) * r].iter().enumerate() {
                    set(row, self.k + offset + j, v);
                }
            }
        };
        match &self.panel {
            Some(x) => with_words(32 * words, |rows| {
                let (filled, rest) = rows.split_at_mut(width * words);
                filled.chunks_exact_mut(words).enumerate().for_each(|(i, row)| fill(i, row));
                rest.fill(0);
                let mut sums = [0f32; 32 * FEW_ROWS];
                // SAFETY: 32 rows of words; sums holds as many rows of FEW_ROWS.
                unsafe {
                    let c = sums.as_mut_ptr();
                    product_of_words(
                        Bf16Kernel::detect(),
                        (width, self.m),
                        rows.as_ptr(),
                        words,
                        x,
                        c,
                        FEW_ROWS,
                        Into::Fresh,
                    );
                    for i in 0..self.m {
                        for (j, sum) in sums.chunks_exact(FEW_ROWS).take(width).enumerate() {
                            let y = y.add(i * ldy + j);
                            *y = if into == Into::Add { *y + sum[i] } else { sum[i] };
                        }
                    }
                }
            }),
            None => with_words(words * (NR + 16), |scratch| {
                let (panel, rows) = scratch.split_at_mut(words * NR);
                for g in 0..NR / 16 {
                    for (i, row) in rows.chunks_exact_mut(words).enumerate() {
                        if g * 16 + i < width { fill(g * 16 + i, row) } else { row.fill(0) }
                    }
                    rows_as_columns(rows, words, &mut panel[g * 16..]);
                }
                // SAFETY: guaranteed by the caller.
                unsafe { product(Bf16Kernel::detect(), (self.m, width), &self.rounded, 0, panel, y, ldy, into) };
            }),
        }
    }

    /// dx (m, width) (+)= dy W + dz A for the weight's columns j0..j0 + width, where self is (dy | dz) of one part and
    /// dy covers the weight's rows `rows`, an even number. `a`: A (r, k) and r, if any. `ldx`: the row stride of dx.
    ///
    /// # Safety
    /// `dx` is the address of m rows of `width` elements that no other thread uses.
    pub unsafe fn backward_columns(
        &self,
        weight: &Weight,
        rows: Range<usize>,
        a: Option<(&[f32], usize)>,
        (j0, width): (usize, usize),
        (dx, ldx): (*mut f32, usize),
        into: Into,
    ) {
        let (first, n, k, words) = (rows.start, rows.len(), weight.cols(), self.rounded.words());
        let panels = width.div_ceil(NR);
        with_words(panels * words * NR, |panel| {
            with_scratch(2 * width, |rows| {
                let (even, odd) = rows.split_at_mut(width);
                let mut put = |pair: usize, even: &[f32], odd: &[f32]| {
                    for ((p, even), odd) in even.chunks(NR).enumerate().zip(odd.chunks(NR)) {
                        let at = (p * words + pair) * NR;
                        interleave(even, odd, &mut panel[at..at + even.len()]);
                        panel[at + even.len()..at + NR].fill(0);
                    }
                };
                for pair in 0..n / 2 {
                    let row = first + 2 * pair;
                    match weight.rows_f32(row..row + 2) {
                        Some(both) => put(pair, &both[j0..j0 + width], &both[k + j0..k + j0 + width]),
                        None => {
                            weight.row_part(row, j0..j0 + width, even);
                            weight.row_part(row + 1, j0..j0 + width, odd);
                            put(pair, even, odd);
                        }
                    }
                }
                let (a, r) = a.unwrap_or((&[], 0));
                odd.fill(0.0);
                for pair in 0..words - n / 2 {
                    let row = |i: usize| (i < r).then(|| &a[i * k + j0..i * k + j0 + width]);
                    match (row(2 * pair), row(2 * pair + 1)) {
                        (Some(one), Some(two)) => put(n / 2 + pair, one, two),
                        (Some(one), None) => put(n / 2 + pair, one, odd),
                        _ => put(n / 2 + pair, odd, odd),
                    }
                }
            });
            for (p, panel) in panel.chunks_exact(words * NR).enumerate() {
                let columns = NR.min(width - p * NR);
                // SAFETY: guaranteed by the caller.
                unsafe {
                    let c = dx.add(p * NR);
                    product(Bf16Kernel::detect(), (self.m, columns), &self.rounded, 0, panel, c, ldx, into);
                }
            }
        });
    }
}

/// Sets element `i` of a row of words.
fn set(row: &mut [u32], i: usize, value: f32) {
    let bits = u32::from(half::bf16::from_f32(value).to_bits());
    let word = &mut row[i / 2];
    *word = if i.is_multiple_of(2) { *word & 0xffff_0000 | bits } else { *word & 0xffff | bits << 16 };
}
