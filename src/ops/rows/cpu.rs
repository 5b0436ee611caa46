//! Gather and scatter of rows on the CPU. Formulas and checks are in `mod.rs`.

use candle_core::{Result, Tensor};

use crate::ops::cpu::{tensor, view};

/// Rows `rows` of x (N, D), in that order.
///
/// # Errors
/// If a row does not exist.
pub fn gather_rows(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let (_, d) = x.dims2()?;
    let xs = view(x)?;
    let mut out = Vec::with_capacity(rows.len() * d);
    for &row in rows {
        out.extend_from_slice(&xs[row * d..(row + 1) * d]);
    }
    tensor(out, (rows.len(), d))
}

/// The backward of [`gather_rows`]: (n, D), zero except that row i of `values` is added to row rows\[i\].
///
/// # Errors
/// If a row does not exist.
pub fn scatter_rows(values: &Tensor, rows: &[usize], n: usize) -> Result<Tensor> {
    let (_, d) = values.dims2()?;
    let vs = view(values)?;
    let mut out = vec![0f32; n * d];
    for (value, &row) in vs.chunks_exact(d).zip(rows) {
        for (o, v) in out[row * d..(row + 1) * d].iter_mut().zip(value) {
            *o += v;
        }
    }
    tensor(out, (n, d))
}
