//! Rows of a matrix by index: gather, and its backward, scatter. Losses read only some positions of a batch.
//! It does not depend on weights or other operations. Read `cpu.rs` beside it, then `score/mod.rs`.

mod cpu;
pub mod gpu;

use anyhow::{Result, bail};

use crate::device::{Array, Element};
use gpu::DeviceIndex;

/// Rows `rows` of x (N, D), in that order.
///
/// # Errors
/// If a row does not exist.
pub fn gather_rows(x: &Array, rows: &[usize]) -> Result<Array> {
    let (n, _) = x.dims2()?;
    if let Some(row) = rows.iter().find(|&&row| row >= n) {
        bail!("row {row} of {n}");
    }
    Ok(match x {
        Array::Host(x) => cpu::gather_rows(x, rows)?.into(),
        Array::Device(x) => gpu::gather(x, &DeviceIndex::new(x.device(), rows, n)?, Element::F32)?.into(),
    })
}

/// The backward of [`gather_rows`]: (n, D), zero except that row i of `values` is added to row rows\[i\].
///
/// # Errors
/// If a row does not exist.
pub fn scatter_rows(values: &Array, rows: &[usize], n: usize) -> Result<Array> {
    let (r, _) = values.dims2()?;
    if r != rows.len() || rows.iter().any(|&row| row >= n) {
        bail!("{r} rows of values for {} rows of {n}", rows.len());
    }
    Ok(match values {
        Array::Host(values) => cpu::scatter_rows(values, rows, n)?.into(),
        Array::Device(values) => {
            gpu::scatter(values, &DeviceIndex::new(values.device(), rows, n)?, Element::F32)?.into()
        }
    })
}
