//! The linear group in bf16: what linear.rs calls where a base computes in [`ComputeDtype::Bf16`]. The low-rank branch rides
//! along: with z = s x A^T beside x, and B^T beneath W^T, one product gives x W^T + z B^T; the input's gradient likewise.
//! Knows neither the split of the work nor the adapters' own gradients; read linear.rs for both.

use std::ops::Range;

use crate::ops::cpu::bf16::{
    Bf16Kernel, Cores, Rounded, interleave, product, product_of_words, round, rows_as_columns,
};
use crate::ops::cpu::gemm::{Into, NR};
use crate::ops::cpu::pack::{with_scratch, with_words};
use crate::ops::cpu::{Out, parallel};
use crate::ops::linear::LinearWithLora;
use crate::ops::weight::{ComputeDtype, Weight};

/// At most this many rows of x make the weight's rows the tile's rows (decoding): nothing is transposed then.
pub(crate) const FEW_ROWS: usize = 16;

/// Whether this group computes in bf16: pairs want even sizes, which all real models have.
pub fn applies(k: usize, parts: &[LinearWithLora<'_>]) -> bool {
    let even = |n: usize| n.is_multiple_of(2);
    even(k) && parts.iter().all(|p| p.weight.compute() == ComputeDtype::Bf16 && even(p.weight.rows()))
}

/// x, or dy of all parts side by side, rounded once, with its low-rank columns after it.
pub struct PackedLhs {
    rounded: Rounded,
    m: usize,
    /// Columns before the low-rank ones.
    k: usize,
    /// The first few rows as a panel.
    few: Option<Vec<u32>>,
}

impl PackedLhs {
    /// Rounds x (m, k) and multiplies it with `factor` (rank, k): returns z (m, rank) f32, which joins x's columns
    /// rounded.
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

    /// x (m, k) with no low-rank columns.
    pub fn plain(x: &[f32], m: usize, k: usize, cores: Cores) -> Self {
        Self::with(Rounded::of(x, m, k, 0, cores), m, k)
    }

    fn with(rounded: Rounded, m: usize, k: usize) -> Self {
        let few = (m <= FEW_ROWS).then(|| {
            let mut panel = vec![0; rounded.words() * NR];
            rounded.as_panel(&mut panel);
            panel
        });
        Self { rounded, m, k, few }
    }

    /// y (m, width) (+)= x W^T + z B^T for the weight's rows n0..n0 + width. `b`: B (n, r) and where its part's columns
    /// start in z. `ldy`: from one row of y to the next.
    ///
    /// # Safety
    /// `y` is the address of m rows of `width` numbers that nobody else touches.
    pub unsafe fn outputs(
        &self,
        weight: &Weight,
        b: Option<(&[f32], usize, usize)>,
        (n0, width): (usize, usize),
        (y, ldy): (*mut f32, usize),
        into: Into,
    ) {
        let words = self.rounded.words();
        let fill = |i: usize, row: &mut [u32]| {
            weight.row_words(n0 + i, row);
            if let Some((b, r, offset)) = b {
                for (j, &v) in b[(n0 + i) * r..(n0 + i + 1) * r].iter().enumerate() {
                    set(row, self.k + offset + j, v);
                }
            }
        };
        match &self.few {
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
                // SAFETY: the caller's duty.
                unsafe { product(Bf16Kernel::detect(), (self.m, width), &self.rounded, 0, panel, y, ldy, into) };
            }),
        }
    }

    /// dx (m, width) (+)= dy W + dz A for the weight's columns j0..j0 + width; this is (dy | dz) of one part, dy over the
    /// weight's rows `rows`, an even number. `a`: A (r, k) where there is one. `ldx`: from one row of dx to the next.
    ///
    /// # Safety
    /// `dx` is the address of m rows of `width` numbers that nobody else touches.
    pub unsafe fn inputs(
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
                // SAFETY: the caller's duty.
                unsafe {
                    let c = dx.add(p * NR);
                    product(Bf16Kernel::detect(), (self.m, columns), &self.rounded, 0, panel, c, ldx, into);
                }
            }
        });
    }
}

/// Element `i` of a row of words.
fn set(row: &mut [u32], i: usize, value: f32) {
    let bits = u32::from(half::bf16::from_f32(value).to_bits());
    let word = &mut row[i / 2];
    *word = if i.is_multiple_of(2) { *word & 0xffff_0000 | bits } else { *word & 0xffff | bits << 16 };
}
