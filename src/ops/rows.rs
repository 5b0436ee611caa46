//! Rows of a matrix by index: gather, and its backward, scatter. Losses read only some positions of a batch.
//! It does not depend on weights or other operations. Read `score.rs` next.

use candle_core::{Result, Tensor};

use crate::ops::cpu::{tensor, view};

/// Rows `rows` of x (N, D), in that order.
///
/// # Errors
/// If a row does not exist.
pub fn gather_rows(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    let (n, d) = x.dims2()?;
    let xs = view(x)?;
    let mut out = Vec::with_capacity(rows.len() * d);
    for &row in rows {
        if row >= n {
            candle_core::bail!("row {row} of {n}");
        }
        out.extend_from_slice(&xs[row * d..(row + 1) * d]);
    }
    tensor(out, (rows.len(), d))
}

/// The backward of [`gather_rows`]: (n, D), zero except that row i of `values` is added to row rows\[i\].
///
/// # Errors
/// If a row does not exist.
pub fn scatter_rows(values: &Tensor, rows: &[usize], n: usize) -> Result<Tensor> {
    let (r, d) = values.dims2()?;
    let vs = view(values)?;
    let mut out = vec![0f32; n * d];
    if r != rows.len() || rows.iter().any(|&row| row >= n) {
        candle_core::bail!("{r} rows of values for {} rows of {n}", rows.len());
    }
    for (value, &row) in vs.chunks_exact(d).zip(rows) {
        for (o, v) in out[row * d..(row + 1) * d].iter_mut().zip(value) {
            *o += v;
        }
    }
    tensor(out, (n, d))
}
