//! Split, concatenation and sums on the CPU. Read `mod.rs` beside it for the layouts.

use candle_core::{Result, Tensor};

use super::Fusion;
use crate::ops::cpu::{Buffer, parallel, tensor, vectorised, view};

/// Calls `f(start in the fused row, start in the part, length)` for each contiguous run of part `p` within a row.
fn runs(fusion: Fusion, widths: &[usize], p: usize, mut f: impl FnMut(usize, usize, usize)) {
    let before: usize = widths[..p].iter().sum();
    match fusion {
        Fusion::EndToEnd => f(before, 0, widths[p]),
        Fusion::Grouped { groups } => {
            let (all, one) = (widths.iter().sum::<usize>() / groups, widths[p] / groups);
            for g in 0..groups {
                f(g * all + before / groups, g * one, one);
            }
        }
    }
}

/// The parts (N, widths\[p\]) of x.
pub fn split(x: &Tensor, widths: &[usize], fusion: Fusion) -> Result<Vec<Tensor>> {
    let (n, width) = x.dims2()?;
    let xs = view(x)?;
    let part = |p: usize| {
        let mut y = Buffer::new(n * widths[p]);
        let out = y.out();
        parallel(n, n * widths[p], |rows| {
            for i in rows {
                // SAFETY: row i belongs to this part of the work; the runs cover it.
                let y = unsafe { out.slice(i * widths[p], widths[p]) };
                let x = &xs[i * width..(i + 1) * width];
                runs(fusion, widths, p, |from, to, len| y[to..to + len].copy_from_slice(&x[from..from + len]));
            }
        });
        // SAFETY: all rows are written.
        tensor(unsafe { y.finish() }, (n, widths[p]))
    };
    (0..widths.len()).map(part).collect()
}

/// The parts side by side: (N, sum of widths).
pub fn join(parts: &[&Tensor], widths: &[usize], fusion: Fusion) -> Result<Tensor> {
    let (n, width) = (parts.first().map_or(0, |p| p.dims()[0]), widths.iter().sum());
    let views = parts.iter().map(|p| view(p)).collect::<Result<Vec<_>>>()?;
    let mut y = Buffer::new(n * width);
    let out = y.out();
    parallel(n, n * width, |rows| {
        for i in rows {
            // SAFETY: row i belongs to this part of the work; all parts together cover it.
            let y = unsafe { out.slice(i * width, width) };
            for (p, part) in views.iter().enumerate() {
                let x = &part[i * widths[p]..(i + 1) * widths[p]];
                runs(fusion, widths, p, |to, from, len| y[to..to + len].copy_from_slice(&x[from..from + len]));
            }
        }
    });
    // SAFETY: all rows are written.
    tensor(unsafe { y.finish() }, (n, width))
}

vectorised! {
    fn sum_rows(x: &[f32], y: &[f32], factor: f32, out: &mut [f32]) {
        for ((o, &x), &y) in out.iter_mut().zip(x).zip(y) {
            *o = x + factor * y;
        }
    }
}

/// x + factor * y.
pub fn add(x: &Tensor, y: &Tensor, factor: f32) -> Result<Tensor> {
    let (n, d) = x.dims2()?;
    let (xs, ys) = (view(x)?, view(y)?);
    let mut sum = Buffer::new(n * d);
    let out = sum.out();
    parallel(n, n * d, |r| {
        let part = r.start * d..r.end * d;
        // SAFETY: rows r belong to this part of the work, and are all written.
        sum_rows(&xs[part.clone()], &ys[part.clone()], factor, unsafe { out.slice(part.start, part.len()) });
    });
    // SAFETY: all rows are written.
    tensor(unsafe { sum.finish() }, (n, d))
}

/// factor * x.
pub fn scale(x: &Tensor, factor: f32) -> Result<Tensor> {
    let (n, d) = x.dims2()?;
    tensor(view(x)?.iter().map(|v| v * factor).collect(), (n, d))
}
