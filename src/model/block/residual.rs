//! How a half of a block joins the residual stream: y = after(x + m inner(f)), with either norm or none.
//! Knows no attention and no MLP.

use candle_core::{Result, Tensor};

use super::{Norms, take};
use crate::ops::columns;
use crate::ops::linear;
use crate::ops::linear::LinearWithLora;
use crate::ops::norm::Norm;

/// The end of one half.
pub(super) struct Join<'a> {
    pub(super) norms: &'a Norms,
    pub(super) multiplier: f32,
}

/// What the end's backward wants: inputs of its norms, where it has them.
#[derive(Default)]
pub(super) struct JoinSaved {
    f: Option<Tensor>,
    sum: Option<Tensor>,
}

impl Join<'_> {
    /// y of the residual x and of f = linear(input), with what the linear kept.
    pub(super) fn forward(
        &self,
        input: &Tensor,
        part: LinearWithLora<'_>,
        x: &Tensor,
    ) -> Result<(Tensor, linear::Saved, JoinSaved)> {
        let mut kept = JoinSaved::default();
        let (sum, z) = if self.norms.inner.is_none() && self.multiplier == 1.0 {
            let (sum, z) = linear::forward(input, &[part], Some(x))?;
            let [sum] = take(sum);
            (sum, z)
        } else {
            let (f, z) = linear::forward(input, &[part], None)?;
            let [f] = take(f);
            let sum = match &self.norms.inner {
                Some(norm) => {
                    let sum = columns::add(x, &norm.forward(&f)?, self.multiplier)?;
                    kept.f = Some(f);
                    sum
                }
                None => columns::add(x, &f, self.multiplier)?,
            };
            (sum, z)
        };
        let Some(norm) = &self.norms.after else { return Ok((sum, z, kept)) };
        let y = norm.forward(&sum)?;
        kept.sum = Some(sum);
        Ok((y, z, kept))
    }

    /// (dL/dx past the half, dL/df).
    pub(super) fn backward(&self, kept: &JoinSaved, dy: &Tensor) -> Result<(Tensor, Tensor)> {
        let missing = || candle_core::Error::Msg("a norm's input was not kept".into());
        let dsum = match &self.norms.after {
            Some(norm) => norm.backward(kept.sum.as_ref().ok_or_else(missing)?, dy, None)?,
            None => dy.clone(),
        };
        let df = if self.multiplier == 1.0 { dsum.clone() } else { columns::scale(&dsum, self.multiplier)? };
        let df = match &self.norms.inner {
            Some(norm) => norm.backward(kept.f.as_ref().ok_or_else(missing)?, &df, None)?,
            None => df,
        };
        Ok((dsum, df))
    }
}

/// f's input: norm(x), or x itself.
pub(super) fn before(norm: &Option<Norm>, x: &Tensor) -> Result<Tensor> {
    norm.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.forward(x))
}

/// dL/dx of dL/dh, h = before(x), and of what comes past it.
pub(super) fn before_backward(norm: &Option<Norm>, x: &Tensor, dh: &Tensor, past: &Tensor) -> Result<Tensor> {
    match norm {
        Some(norm) => norm.backward(x, dh, Some(past)),
        None => columns::add(past, dh, 1.0),
    }
}
