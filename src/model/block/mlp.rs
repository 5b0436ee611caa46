//! The MLP sublayer of a block: gate and up of the normed input, activation, down projection and residual. Forward and
//! backward. It does not depend on attention. Read `residual.rs` beside it next.

use anyhow::Result;

use crate::device::Array;

use super::residual::before;
use super::{BlockGradients, Mlp, Pass, columns, linear, store_and_take_input, take};
use crate::model::block::residual::JoinSaved;
use crate::ops::columns::Fusion;
use crate::ops::linear::InputGradient;

/// Tensors saved for the backward of the MLP.
pub(super) struct MlpSaved {
    /// Attention's sum: the residual that the MLP is added to.
    pub(super) x2: Array,
    /// `None` if the backward recomputes them.
    gate_up: Option<Products>,
    z_out: linear::Saved,
    join: JoinSaved,
}

/// Gate and up activations, and the tensors that their linear group saved.
struct Products {
    gate: Option<Array>,
    up: Array,
    z: linear::Saved,
}

/// Whether gate and up are saved for the backward or recomputed by it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum GateUp {
    Saved,
    Recomputed,
}

impl Pass<'_> {
    /// act(gate) * up, or act(up).
    fn activate(self, Products { gate, up, .. }: &Products) -> Result<Array> {
        match gate {
            Some(gate) => self.geometry.activation.gated_forward(gate, up),
            None => self.geometry.activation.forward(up),
        }
    }

    /// Gate, if the MLP has one, and up of the MLP's input.
    fn gate_up(self, input: &Array) -> Result<Products> {
        let h = before(&self.block.mlp_norms.before, input, self.operand())?;
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
        Ok(Products { gate, up, z })
    }

    /// y (N, D) of the MLP's input and the residual x2, (N, D) each; saves nothing.
    pub(super) fn mlp_only(self, input: &Array, x2: &Array) -> Result<Array> {
        let m = self.activate(&self.gate_up(input)?)?;
        Ok(self.join(&self.block.mlp_norms).forward(&m, self.part(self.mlp_out()), x2)?.0)
    }

    /// y (N, D) of the MLP's input and the residual x2, (N, D) each, and the tensors saved for the backward.
    pub(super) fn mlp(self, input: &Array, x2: &Array, setting: GateUp) -> Result<(Array, MlpSaved)> {
        let gate_up = self.gate_up(input)?;
        let m = self.activate(&gate_up)?;
        let gate_up = Some(gate_up).filter(|_| setting == GateUp::Saved);
        let end = self.join(&self.block.mlp_norms);
        let (y, z_out, join) = end.forward(&m, self.part(self.mlp_out()), x2)?;
        Ok((y, MlpSaved { x2: x2.clone(), gate_up, z_out, join }))
    }

    /// The tensors that [`Pass::mlp`] saves, gate and up included, without y: the down projection's product is left out where
    /// nothing saved depends on it.
    pub(super) fn mlp_again(self, input: &Array, x2: &Array) -> Result<MlpSaved> {
        let (end, out) = (self.join(&self.block.mlp_norms), self.part(self.mlp_out()));
        if !end.saves_nothing() || out.lora.is_some_and(|lora| lora.dora.is_some()) {
            return Ok(self.mlp(input, x2, GateUp::Saved)?.1);
        }
        let gate_up = self.gate_up(input)?;
        let z_out = linear::saved_alone(&self.activate(&gate_up)?, &[out])?;
        Ok(MlpSaved { x2: x2.clone(), gate_up: Some(gate_up), z_out, join: JoinSaved::default() })
    }

    /// (dL/dx2 of the residual path, dL/dh), h being the MLP's normed input, of dL/dy (N, D).
    pub(super) fn mlp_backward(
        self,
        input: &Array,
        saved: &MlpSaved,
        dy: &Array,
        grads: &mut BlockGradients,
    ) -> Result<(Array, Array)> {
        let (first, out) = (self.attention_out() + 1, self.mlp_out());
        let (skip, df) = self.join(&self.block.mlp_norms).backward(&saved.join, dy)?;
        let recomputed;
        let gate_up = match &saved.gate_up {
            Some(gate_up) => gate_up,
            None => {
                recomputed = self.gate_up(input)?;
                &recomputed
            }
        };
        let m = self.activate(gate_up)?;
        let wanted = InputGradient::Wanted;
        let g = linear::backward(&m, &[self.part_back(out, wanted)], &saved.z_out, &[&df], wanted)?;
        drop(m);
        let dm = store_and_take_input(grads, out, g)?;
        let activation = self.geometry.activation;
        let d_in = match &gate_up.gate {
            Some(gate) => {
                let (dgate, dup) = activation.gated_backward(gate, &gate_up.up, &dm)?;
                match self.geometry.mlp {
                    Mlp::GatedFused => vec![columns::join(&[&dgate, &dup], Fusion::EndToEnd)?],
                    Mlp::Gated | Mlp::Plain => vec![dgate, dup],
                }
            }
            None => vec![activation.backward(&gate_up.up, &dm)?],
        };
        drop(dm);
        let h = before(&self.block.mlp_norms.before, input, self.operand())?;
        let d_in: Vec<&Array> = d_in.iter().collect();
        let g = linear::backward(&h, &self.parts_back(first..out, wanted), &gate_up.z, &d_in, wanted)?;
        Ok((skip, store_and_take_input(grads, first, g)?))
    }
}
