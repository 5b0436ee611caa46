//! The scalar head of a reward or value model: value = w . h + b, and its backward.
//! Saved for backward: h. It does not depend on weights or other operations. Read `sample/mod.rs` next.

mod cpu;

use anyhow::{Result, bail};
use candle_core::Tensor;

use crate::device::{Array, Element, Matrix};
use crate::ops::cpu::{tensor, view};
use crate::ops::rows::gpu;

/// Gradients of the scalar head.
pub struct Gradients {
    /// dL/dh (R, D).
    pub hidden: Array,
    /// dL/dw (1, D).
    pub weight: Tensor,
    /// dL/db (1).
    pub bias: Tensor,
}

/// Values (R) of hidden states h (R, D), with w (1, D) or (D).
///
/// # Errors
/// If shapes do not fit.
pub fn forward(h: &Array, w: &Tensor, bias: f32) -> Result<Vec<f32>> {
    check(h, w)?;
    match h {
        Array::Host(h) => Ok(cpu::forward(h, w, bias)?),
        Array::Device(h) => gpu::value(h, &on(h, w)?, &h.device().upload_f32(&[bias], 1, 1)?)?.to_f32(),
    }
}

/// Gradients of dL/dvalue (R): dL/dh = dvalue w, dL/dw = sum of dvalue h, dL/db = sum of dvalue. The host sums in f64.
///
/// # Errors
/// If shapes do not fit.
pub fn backward(h: &Array, w: &Tensor, dvalues: &[f32]) -> Result<Gradients> {
    let (r, d) = check(h, w)?;
    if dvalues.len() != r {
        bail!("{} gradients for {r} values", dvalues.len());
    }
    match h {
        Array::Host(h) => Ok(cpu::backward(h, w, dvalues)?),
        Array::Device(h) => {
            let dvalues = h.device().upload_f32(dvalues, r, 1)?;
            let g = gpu::value_backward(h, &on(h, w)?, &dvalues, Element::F32)?;
            let (weight, bias) = (tensor(g.weight.to_f32()?, (1, d))?, tensor(g.bias.to_f32()?, 1)?);
            Ok(Gradients { hidden: g.hidden.into(), weight, bias })
        }
    }
}

/// w on the device of h.
fn on(h: &Matrix, w: &Tensor) -> Result<Matrix> {
    h.device().upload_f32(&view(w)?, 1, w.elem_count())
}

fn check(h: &Array, w: &Tensor) -> Result<(usize, usize)> {
    let (r, d) = h.dims2()?;
    if w.elem_count() != d {
        bail!("a scalar head of {:?} for hidden states ({r}, {d})", w.dims());
    }
    Ok((r, d))
}
