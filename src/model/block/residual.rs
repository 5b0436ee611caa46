//! The residual connection of a sublayer: y = after(x + m inner(f)), where each norm is optional. The families'
//! placements of norms are cases of it. It does not depend on attention or the MLP.

use anyhow::{Result, anyhow};

use crate::device::{Array, Element};

use super::{Norms, take};
use crate::ops::columns;
use crate::ops::linear::{self, LinearWithLora};
use crate::ops::norm::Norm;

/// The residual connection of one sublayer.
pub(super) struct Join<'a> {
    pub(super) norms: &'a Norms,
    pub(super) multiplier: f32,
}

/// Tensors saved for the backward: the inputs of the norms that exist.
#[derive(Default)]
pub(super) struct JoinSaved {
    f: Option<Array>,
    sum: Option<Array>,
}

impl Join<'_> {
    /// Whether the backward needs nothing that only the forward's output can tell.
    pub(super) fn saves_nothing(&self) -> bool {
        self.norms.inner.is_none() && self.norms.after.is_none()
    }

    /// y of the residual x and of f = linear(input), with the tensors saved by the linear layer and by this connection.
    pub(super) fn forward(
        &self,
        input: &Array,
        part: LinearWithLora<'_>,
        x: &Array,
    ) -> Result<(Array, linear::Saved, JoinSaved)> {
        let mut saved = JoinSaved::default();
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
                    saved.f = Some(f);
                    sum
                }
                None => columns::add(x, &f, self.multiplier)?,
            };
            (sum, z)
        };
        let Some(norm) = &self.norms.after else { return Ok((sum, z, saved)) };
        let y = norm.forward(&sum)?;
        saved.sum = Some(sum);
        Ok((y, z, saved))
    }

    /// (dL/dx of the residual path, dL/df) of dL/dy.
    pub(super) fn backward(&self, saved: &JoinSaved, dy: &Array) -> Result<(Array, Array)> {
        let missing = || anyhow!("the input of a norm was not saved");
        let dsum = match &self.norms.after {
            Some(norm) => norm.backward(saved.sum.as_ref().ok_or_else(missing)?, dy, None)?,
            None => dy.clone(),
        };
        let df = if self.multiplier == 1.0 { dsum.clone() } else { columns::scale(&dsum, self.multiplier)? };
        let df = match &self.norms.inner {
            Some(norm) => norm.backward(saved.f.as_ref().ok_or_else(missing)?, &df, None)?,
            None => df,
        };
        Ok((dsum, df))
    }
}

/// The input of f, which multiplies operands of `operand` on a device: norm(x), or x without a norm.
pub(super) fn before(norm: &Option<Norm>, x: &Array, operand: Element) -> Result<Array> {
    norm.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.forward_to(x, operand))
}

/// dL/dx of dL/dh, h = before(x), plus `skip`, the gradient of the residual path.
pub(super) fn before_backward(norm: &Option<Norm>, x: &Array, dh: &Array, skip: &Array) -> Result<Array> {
    match norm {
        Some(norm) => norm.backward(x, dh, Some(skip)),
        None => columns::add(skip, dh, 1.0),
    }
}
