//! The second half of a block: the MLP of the normed input, and its way back into the residual stream. Forward and
//! reverse.

use candle_core::{Result, Tensor};

use super::residual::before;
use super::{BlockGradients, Mlp, Pass, columns, keep, linear, take};
use crate::model::block::residual::JoinSaved;
use crate::ops::columns::Fusion;
use crate::ops::linear::InputGradient;

pub(super) struct MlpSaved {
    /// Attention's sum: the residual that the MLP joins.
    pub(super) x2: Tensor,
    wide: Option<Wide>,
    z_out: linear::Saved,
    join: JoinSaved,
}

/// What the MLP's input is widened to, and what that linear kept.
struct Wide {
    gate: Option<Tensor>,
    up: Tensor,
    z: linear::Saved,
}

/// Whether the reverse finds that or makes it again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum GateUp {
    Saved,
    Recomputed,
}

impl Pass<'_> {
    /// act(gate) * up, or act(up).
    fn activated(self, Wide { gate, up, .. }: &Wide) -> Result<Tensor> {
        match gate {
            Some(gate) => self.geometry.activation.gated_forward(gate, up),
            None => self.geometry.activation.forward(up),
        }
    }

    /// Gate, where there is one, and up of the MLP's input.
    fn widened(self, input: &Tensor) -> Result<Wide> {
        let h = before(&self.block.mlp_norms.before, input)?;
        let (outputs, z) = linear::forward(&h, &self.parts(self.attention_out() + 1..self.mlp_out()), None)?;
        let (gate, up) = match self.geometry.mlp {
            Mlp::Gated => {
                let [gate, up] = take(outputs);
                (Some(gate), up)
            }
            Mlp::GatedFused => {
                let [fused] = take(outputs);
                let half = fused.dims2()?.1 / 2;
                let [gate, up] = take(columns::split(&fused, &[half, half], Fusion::EndToEnd)?);
                (Some(gate), up)
            }
            Mlp::Plain => {
                let [up] = take(outputs);
                (None, up)
            }
        };
        Ok(Wide { gate, up, z })
    }

    /// y (N, D) of the MLP's input and the residual x2, (N, D) each, keeping nothing.
    pub(super) fn mlp_only(self, input: &Tensor, x2: &Tensor) -> Result<Tensor> {
        let m = self.activated(&self.widened(input)?)?;
        Ok(self.join(&self.block.mlp_norms).forward(&m, self.part(self.mlp_out()), x2)?.0)
    }

    /// y (N, D) of the MLP's input and the residual x2, (N, D) each, and what the reverse wants.
    pub(super) fn mlp(self, input: &Tensor, x2: &Tensor, widened: GateUp) -> Result<(Tensor, MlpSaved)> {
        let wide = self.widened(input)?;
        let m = self.activated(&wide)?;
        let wide = Some(wide).filter(|_| widened == GateUp::Saved);
        let end = self.join(&self.block.mlp_norms);
        let (y, z_out, join) = end.forward(&m, self.part(self.mlp_out()), x2)?;
        Ok((y, MlpSaved { x2: x2.clone(), wide, z_out, join }))
    }

    /// (dL/dx2 past the MLP, dL/dh), h the MLP's normed input, of dL/dy (N, D).
    pub(super) fn mlp_backward(
        self,
        input: &Tensor,
        kept: &MlpSaved,
        dy: &Tensor,
        grads: &mut BlockGradients,
    ) -> Result<(Tensor, Tensor)> {
        let (first, out) = (self.attention_out() + 1, self.mlp_out());
        let (past, df) = self.join(&self.block.mlp_norms).backward(&kept.join, dy)?;
        let made;
        let wide = match &kept.wide {
            Some(wide) => wide,
            None => {
                made = self.widened(input)?;
                &made
            }
        };
        let m = self.activated(wide)?;
        let g = linear::backward(&m, &[self.part(out)], &kept.z_out, &[&df], InputGradient::Wanted)?;
        drop(m);
        let dm = keep(grads, out, g)?;
        let activation = self.geometry.activation;
        let d_in = match &wide.gate {
            Some(gate) => {
                let (dgate, dup) = activation.gated_backward(gate, &wide.up, &dm)?;
                match self.geometry.mlp {
                    Mlp::GatedFused => vec![columns::join(&[&dgate, &dup], Fusion::EndToEnd)?],
                    Mlp::Gated | Mlp::Plain => vec![dgate, dup],
                }
            }
            None => vec![activation.backward(&wide.up, &dm)?],
        };
        drop(dm);
        let h = before(&self.block.mlp_norms.before, input)?;
        let d_in: Vec<&Tensor> = d_in.iter().collect();
        let g = linear::backward(&h, &self.parts(first..out), &wide.z, &d_in, InputGradient::Wanted)?;
        Ok((past, keep(grads, first, g)?))
    }
}
