//! Embedding and final norm/projection: everything before the first and after the last block, with the LoRA weights
//! that an adapter may have there. Forward and backward. It is the part of `base.rs` outside the blocks, in a file of its
//! own; the two therefore import each other. It does not depend on blocks. Read `base.rs` for the whole pass.

use anyhow::{Context, Result};

use crate::device::Array;

use crate::model::adapter::{Adapter, Gradients, LoraLayer, NonBlockModule};
use crate::model::base::{Base, Weights};
use crate::model::config::DecoderConfig;
use crate::ops::linear;
use crate::ops::linear::{BranchGradient, InputGradient, LinearWithLora};
use crate::ops::weight::Weight;
use crate::ops::{columns, embedding};

/// Tensors saved for the backward of both ends.
#[derive(Default)]
pub(crate) struct Saved {
    /// Tensors saved by the embedding.
    embedding: Option<embedding::Saved>,
    /// Input of the projection into the blocks, and the tensors that it saved.
    project_in: Option<(Array, linear::Saved)>,
    /// Input of the projection out of the blocks, and the tensors that it saved.
    project_out: Option<(Array, linear::Saved)>,
}

/// The embedding, the final norm and the projections of a base, with an adapter.
#[derive(Clone, Copy)]
pub(crate) struct Embeddings<'a> {
    config: &'a DecoderConfig,
    weights: &'a Weights,
    adapter: Option<&'a Adapter>,
}

impl<'a> Embeddings<'a> {
    pub(crate) fn of(base: &'a Base, adapter: Option<&'a Adapter>) -> Self {
        Self { config: base.config(), weights: base.frozen(), adapter }
    }

    fn lora(self, module: NonBlockModule) -> Option<&'a LoraLayer> {
        self.adapter.and_then(|a| a.outer(module))
    }

    fn linear(self, weight: &'a Weight, module: NonBlockModule) -> LinearWithLora<'a> {
        LinearWithLora { weight, dequantised: None, bias: None, lora: self.lora(module).map(LoraLayer::low_rank) }
    }

    /// Whether any LoRA weights before the first block are trained.
    pub(crate) fn train_below_blocks(self) -> bool {
        self.lora(NonBlockModule::Embedding).is_some() || self.lora(NonBlockModule::ProjectIn).is_some()
    }

    /// The first block's input (N, D) of tokens (N) at positions (N).
    pub(crate) fn input(self, tokens: &[u32], positions: &[u32], saved: &mut Saved) -> Result<Array> {
        let lora = self.lora(NonBlockModule::Embedding).map(LoraLayer::low_rank);
        let (mut x, of_embedding) = embedding::forward(&self.weights.embedding, tokens, lora)?;
        saved.embedding = of_embedding;
        if self.config.embedding_multiplier != 1.0 {
            x = columns::scale(&x, self.config.embedding_multiplier as f32)?;
        }
        if let Some([into, _]) = &self.weights.projections {
            let (y, k) = one(&x, self.linear(into, NonBlockModule::ProjectIn))?;
            saved.project_in = Some((x, k));
            x = columns::to_f32(y)?;
        }
        if let (Some(table), Some(first)) = (&self.weights.positions, self.config.learned_positions) {
            let rows: Vec<u32> = positions.iter().map(|p| p + first as u32).collect();
            x = columns::add(&x, &embedding::forward(table, &rows, None)?.0, 1.0)?;
        }
        Ok(x)
    }

    /// Gradients of the LoRA weights before the blocks, of dL/dx (N, D) at the first block's input.
    pub(crate) fn input_backward(self, tokens: &[u32], saved: &Saved, dx: &Array, grads: &mut Gradients) -> Result<()> {
        let lora = self.lora(NonBlockModule::Embedding);
        let mut dx = dx.clone();
        if let (Some([into, _]), Some((x, k))) = (&self.weights.projections, &saved.project_in) {
            let wanted = if lora.is_some() { InputGradient::Wanted } else { InputGradient::Unused };
            let (input, gradient) = one_backward(x, self.linear(into, NonBlockModule::ProjectIn), k, &dx, wanted)?;
            grads.outer[NonBlockModule::ProjectIn as usize] = gradient;
            if let Some(input) = input {
                dx = input;
            }
        }
        if let (Some(lora), Some(saved)) = (lora, &saved.embedding) {
            if self.config.embedding_multiplier != 1.0 {
                dx = columns::scale(&dx, self.config.embedding_multiplier as f32)?;
            }
            let g = embedding::backward(&self.weights.embedding, tokens, lora.low_rank(), saved, &dx)?;
            grads.outer[NonBlockModule::Embedding as usize] = Some(g);
        }
        Ok(())
    }

    /// Hidden states (N, E) of the last block's output (N, D).
    pub(crate) fn output(self, x: Array, saved: &mut Saved) -> Result<Array> {
        let h = match &self.weights.norm {
            Some(norm) => norm.forward(&x)?,
            None => x,
        };
        let Some([_, out]) = &self.weights.projections else { return Ok(h) };
        let (y, k) = one(&h, self.linear(out, NonBlockModule::ProjectOut))?;
        saved.project_out = Some((h, k));
        columns::to_f32(y)
    }

    /// dL/dx (N, D) of dL/dh (N, E), x being the last block's output; stores the gradient of the LoRA weights after the
    /// blocks.
    pub(crate) fn output_backward(self, x: &Array, saved: &Saved, dh: &Array, grads: &mut Gradients) -> Result<Array> {
        let dh = match (&self.weights.projections, &saved.project_out) {
            (Some([_, out]), Some((h, k))) => {
                let (input, gradient) =
                    one_backward(h, self.linear(out, NonBlockModule::ProjectOut), k, dh, InputGradient::Wanted)?;
                grads.outer[NonBlockModule::ProjectOut as usize] = gradient;
                input.context("a requested input gradient is missing")?
            }
            _ => dh.clone(),
        };
        Ok(match &self.weights.norm {
            Some(norm) => norm.backward(x, &dh, None)?,
            None => dh,
        })
    }
}

/// A group of a single linear layer.
fn one(x: &Array, part: LinearWithLora<'_>) -> Result<(Array, linear::Saved)> {
    let (mut y, saved) = linear::forward(x, &[part], None)?;
    Ok((y.pop().context("a linear group has one output per part")?, saved))
}

fn one_backward(
    x: &Array,
    part: LinearWithLora<'_>,
    saved: &linear::Saved,
    dy: &Array,
    wanted: InputGradient,
) -> Result<(Option<Array>, Option<BranchGradient>)> {
    let mut g = linear::backward(x, &[part], saved, &[dy], wanted)?;
    Ok((g.input, g.lora.pop().flatten()))
}
