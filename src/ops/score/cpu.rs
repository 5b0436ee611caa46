//! The scalar head on the CPU. Formulas and checks are in `mod.rs`.

use candle_core::{Result, Tensor};

use super::Gradients;
use crate::ops::cpu::{dot_plain, tensor, view};

/// Values (R) of hidden states h (R, D), with w (1, D) or (D).
///
/// # Errors
/// If shapes do not fit.
pub fn forward(h: &Tensor, w: &Tensor, bias: f32) -> Result<Vec<f32>> {
    let (_, d) = h.dims2()?;
    let (h, w) = (view(h)?, view(w)?);
    Ok(h.chunks_exact(d).map(|h| dot_plain(h, &w) + bias).collect())
}

/// Gradients of dL/dvalue (R): dL/dh = dvalue w, dL/dw = sum of dvalue h, dL/db = sum of dvalue; the sums are in f64.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(h: &Tensor, w: &Tensor, dvalues: &[f32]) -> Result<Gradients> {
    let (_, d) = h.dims2()?;
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
        hidden: tensor(dh, (dvalues.len(), d))?.into(),
        weight: tensor(dw.into_iter().map(|v| v as f32).collect(), (1, d))?,
        bias: tensor(vec![db as f32], 1)?,
    })
}
