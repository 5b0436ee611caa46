//! Split and concatenation of fused projections (fused QKV, fused gate/up), and the sums of a residual path.
//! `split` and `join` are each other's backward. It does not depend on weights or other operations.
//! Read `cpu.rs` beside it, then `activation/mod.rs`.

mod cpu;
pub mod gpu;

use anyhow::{Result, bail};

use crate::device::{Array, Element};

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
        bail!("a row of {width} cannot be split into {widths:?} {fusion:?}");
    }
    Ok(())
}

/// The parts (N, widths\[p\]) of x (N, sum of widths).
///
/// # Errors
/// If widths and x do not fit.
pub fn split(x: &Array, widths: &[usize], fusion: Fusion) -> Result<Vec<Array>> {
    check(fusion, widths, x.dims2()?.1)?;
    Ok(match x {
        Array::Host(x) => cpu::split(x, widths, fusion)?.into_iter().map(Array::Host).collect(),
        Array::Device(x) => gpu::split(x, widths, fusion)?.into_iter().map(Array::Device).collect(),
    })
}

/// The inverse of [`split`]: (N, sum of widths) of the parts.
///
/// # Errors
/// If the parts do not fit.
pub fn join(parts: &[&Array], fusion: Fusion) -> Result<Array> {
    let widths = parts.iter().map(|p| Ok(p.dims2()?.1)).collect::<Result<Vec<_>>>()?;
    check(fusion, &widths, widths.iter().sum())?;
    let Some(first) = parts.first() else { bail!("no parts to join") };
    let n = first.dims2()?.0;
    for part in parts {
        if part.dims2()?.0 != n {
            bail!("parts with different numbers of rows");
        }
    }
    Ok(match first {
        Array::Host(_) => {
            let parts = parts.iter().map(|p| p.host()).collect::<Result<Vec<_>>>()?;
            cpu::join(&parts, &widths, fusion)?.into()
        }
        Array::Device(_) => {
            let parts = parts.iter().map(|p| p.device()).collect::<Result<Vec<_>>>()?;
            gpu::join(&parts, fusion)?.into()
        }
    })
}

/// x + factor * y, all (N, D).
///
/// # Errors
/// If shapes differ.
pub fn add(x: &Array, y: &Array, factor: f32) -> Result<Array> {
    let (shape, other) = (x.dims2()?, y.dims2()?);
    if shape != other {
        bail!("{shape:?} and {other:?} cannot be added");
    }
    Ok(match x {
        Array::Host(x) => cpu::add(x, y.host()?, factor)?.into(),
        Array::Device(x) => gpu::add(x, y.device()?, factor, Element::F32)?.into(),
    })
}

/// factor * x, (N, D).
///
/// # Errors
/// If x is not an f32 matrix.
pub fn scale(x: &Array, factor: f32) -> Result<Array> {
    Ok(match x {
        Array::Host(x) => cpu::scale(x, factor)?.into(),
        Array::Device(x) => gpu::scale(x, factor, x.element())?.into(),
    })
}

/// x as f32, which the residual stream is in on every machine; an array that is f32 already is returned as it is.
///
/// # Errors
/// If device memory is out.
pub fn to_f32(x: Array) -> Result<Array> {
    Ok(match &x {
        Array::Device(matrix) if matrix.element() != Element::F32 => gpu::cast(matrix, Element::F32)?.into(),
        _ => x,
    })
}
