//! Fused projections cut into their parts and put together again, and the plain sums of a residual path. Each backward
//! is the other function. Knows no layer. Read activation.rs next.

use candle_core::{Result, Tensor};

use super::cpu::{Buffer, parallel, tensor, view};

/// How the parts of a fused projection stand in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fusion {
    /// One after the other: q q q k v (Phi-3, GPT-2).
    EndToEnd,
    /// Group by group, one slice of each part in turn: q k v, q k v, q k v, for so many groups (GPT-NeoX: heads).
    Grouped {
        /// Groups a row.
        groups: usize,
    },
}

/// Where part `p`'s numbers of a row are: `f(start in the fused row, start in the part, length)` for each run.
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

fn check(fusion: Fusion, widths: &[usize], width: usize) -> Result<()> {
    let whole = match fusion {
        Fusion::EndToEnd => true,
        Fusion::Grouped { groups } => groups > 0 && widths.iter().all(|w| w % groups == 0),
    };
    if !whole || widths.iter().sum::<usize>() != width {
        candle_core::bail!("a row of {width} cannot be cut into {widths:?} {fusion:?}");
    }
    Ok(())
}

/// The parts (N, widths\[p\]) of x (N, sum of widths).
///
/// # Errors
/// If widths and x do not fit.
pub fn split(x: &Tensor, widths: &[usize], fusion: Fusion) -> Result<Vec<Tensor>> {
    let (n, width) = x.dims2()?;
    check(fusion, widths, width)?;
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

/// The inverse of [`split`]: (N, sum of widths) of the parts.
///
/// # Errors
/// If the parts do not fit.
pub fn join(parts: &[&Tensor], fusion: Fusion) -> Result<Tensor> {
    let widths = parts.iter().map(|p| Ok(p.dims2()?.1)).collect::<Result<Vec<_>>>()?;
    let (n, width) = (parts.first().map_or(0, |p| p.dims()[0]), widths.iter().sum());
    check(fusion, &widths, width)?;
    if parts.iter().any(|p| p.dims()[0] != n) {
        candle_core::bail!("parts of unequal length");
    }
    let views = parts.iter().map(|p| view(p)).collect::<Result<Vec<_>>>()?;
    let mut y = Buffer::new(n * width);
    let out = y.out();
    parallel(n, n * width, |rows| {
        for i in rows {
            // SAFETY: row i belongs to this part of the work; all parts together cover it.
            let y = unsafe { out.slice(i * width, width) };
            for (p, part) in views.iter().enumerate() {
                let x = &part[i * widths[p]..(i + 1) * widths[p]];
                runs(fusion, &widths, p, |to, from, len| y[to..to + len].copy_from_slice(&x[from..from + len]));
            }
        }
    });
    // SAFETY: all rows are written.
    tensor(unsafe { y.finish() }, (n, width))
}

super::cpu::vectorised! {
    fn sum_rows(x: &[f32], y: &[f32], factor: f32, out: &mut [f32]) {
        for ((o, &x), &y) in out.iter_mut().zip(x).zip(y) {
            *o = x + factor * y;
        }
    }
}

/// x + factor * y, all (N, D).
///
/// # Errors
/// If shapes differ.
pub fn add(x: &Tensor, y: &Tensor, factor: f32) -> Result<Tensor> {
    let (n, d) = x.dims2()?;
    if y.dims() != [n, d] {
        candle_core::bail!("{:?} and {:?} cannot be added", x.dims(), y.dims());
    }
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

/// factor * x, (N, D).
///
/// # Errors
/// If x is no f32 matrix.
pub fn scale(x: &Tensor, factor: f32) -> Result<Tensor> {
    let (n, d) = x.dims2()?;
    tensor(view(x)?.iter().map(|v| v * factor).collect(), (n, d))
}
