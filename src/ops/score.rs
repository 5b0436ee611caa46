//! The scalar head of a reward or value model: value = w . h + b, and its backward.
//! Saved for backward: h. It does not depend on weights or other operations. Read `sample/mod.rs` next.

use candle_core::{Result, Tensor};

use crate::ops::cpu::{dot_plain, tensor, view};

/// Gradients of the scalar head.
pub struct Gradients {
    /// dL/dh (R, D).
    pub hidden: Tensor,
    /// dL/dw (1, D).
    pub weight: Tensor,
    /// dL/db (1).
    pub bias: Tensor,
}

/// Values (R) of hidden states h (R, D), with w (1, D) or (D).
///
/// # Errors
/// If shapes do not fit.
pub fn forward(h: &Tensor, w: &Tensor, bias: f32) -> Result<Vec<f32>> {
    let d = check(h, w)?;
    let (h, w) = (view(h)?, view(w)?);
    Ok(h.chunks_exact(d).map(|h| dot_plain(h, &w) + bias).collect())
}

/// Gradients of dL/dvalue (R): dL/dh = dvalue w, dL/dw = sum of dvalue h, dL/db = sum of dvalue; the sums are in f64.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(h: &Tensor, w: &Tensor, dvalues: &[f32]) -> Result<Gradients> {
    let d = check(h, w)?;
    if dvalues.len() != h.dims2()?.0 {
        candle_core::bail!("{} gradients for {:?}", dvalues.len(), h.dims());
    }
    let (mut dw, mut db) = (vec![0f64; d], 0f64);
    let mut dh = Vec::with_capacity(dvalues.len() * d);
    let (h, w) = (view(h)?, view(w)?);
    for (h, &dv) in h.chunks_exact(d).zip(dvalues) {
        db += f64::from(dv);
        for (dw, &h) in dw.iter_mut().zip(h) {
            *dw += f64::from(dv) * f64::from(h);
        }
        dh.extend(w.iter().map(|w| w * dv));
    }
    Ok(Gradients {
        hidden: tensor(dh, (dvalues.len(), d))?,
        weight: tensor(dw.into_iter().map(|v| v as f32).collect(), (1, d))?,
        bias: tensor(vec![db as f32], 1)?,
    })
}

fn check(h: &Tensor, w: &Tensor) -> Result<usize> {
    let (_, d) = h.dims2()?;
    if w.elem_count() != d {
        candle_core::bail!("a scalar head of {:?} for hidden states {:?}", w.dims(), h.dims());
    }
    Ok(d)
}
