//! Split and concatenation of fused projections (fused QKV, fused gate/up), and the sums of a residual path.
//! `split` and `join` are each other's backward. It does not depend on weights or other operations.
//! Read `cpu.rs` beside it, then `activation/mod.rs`.

mod cpu;

use candle_core::{Result, Tensor};

/// The layout of a fused projection's parts within a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fusion {
    /// One part after the other: q q q k v (Phi-3, GPT-2).
    EndToEnd,
    /// In groups, each with one slice per part: q k v, q k v, q k v (GPT-NeoX, one group per head).
    Grouped {
        /// Groups per row.
        groups: usize,
    },
}

fn check(fusion: Fusion, widths: &[usize], width: usize) -> Result<()> {
    let whole = match fusion {
        Fusion::EndToEnd => true,
        Fusion::Grouped { groups } => groups > 0 && widths.iter().all(|w| w % groups == 0),
    };
    if !whole || widths.iter().sum::<usize>() != width {
        candle_core::bail!("a row of {width} cannot be split into {widths:?} {fusion:?}");
    }
    Ok(())
}

/// The parts (N, widths\[p\]) of x (N, sum of widths).
///
/// # Errors
/// If widths and x do not fit.
pub fn split(x: &Tensor, widths: &[usize], fusion: Fusion) -> Result<Vec<Tensor>> {
    check(fusion, widths, x.dims2()?.1)?;
    cpu::split(x, widths, fusion)
}

/// The inverse of [`split`]: (N, sum of widths) of the parts.
///
/// # Errors
/// If the parts do not fit.
pub fn join(parts: &[&Tensor], fusion: Fusion) -> Result<Tensor> {
    let widths = parts.iter().map(|p| Ok(p.dims2()?.1)).collect::<Result<Vec<_>>>()?;
    let n = parts.first().map_or(0, |p| p.dims()[0]);
    check(fusion, &widths, widths.iter().sum())?;
    if parts.iter().any(|p| p.dims()[0] != n) {
        candle_core::bail!("parts with different numbers of rows");
    }
    cpu::join(parts, &widths, fusion)
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
    cpu::add(x, y, factor)
}

/// factor * x, (N, D).
///
/// # Errors
/// If x is not an f32 matrix.
pub fn scale(x: &Tensor, factor: f32) -> Result<Tensor> {
    cpu::scale(x, factor)
}
