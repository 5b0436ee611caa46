//! The two ends of a decoder: tokens -> the first block's input, the last block's output -> what the head reads. With
//! the branches that an adapter may have there, forward and reverse. Read base.rs for what lies between.

use anyhow::{Context, Result};
use candle_core::Tensor;

use crate::model::adapter::{Adapter, Gradients, LoraLayer, NonBlockModule};
use crate::model::base::{Base, Weights};
use crate::model::config::DecoderConfig;
use crate::ops::linear;
use crate::ops::linear::{BranchGradient, InputGradient, LinearWithLora};
use crate::ops::weight::Weight;
use crate::ops::{columns, embedding};

/// What the reverse of both ends wants.
#[derive(Default)]
pub(crate) struct Saved {
    lookup: Option<embedding::Saved>,
    /// The map into the blocks: its input, and what it kept.
    project_in: Option<(Tensor, linear::Saved)>,
    /// The map out of them, likewise.
    project_out: Option<(Tensor, linear::Saved)>,
}

/// A base's ends as one pass sees them.
#[derive(Clone, Copy)]
pub(crate) struct Embeddings<'a> {
    config: &'a DecoderConfig,
    weights: &'a Weights,
    adapter: Option<&'a Adapter>,
}

impl<'a> Embeddings<'a> {
    pub(crate) fn of(base: &'a Base, adapter: Option<&'a Adapter>) -> Self {
        Self { config: base.config(), weights: base.parts(), adapter }
    }

    fn branch(self, outer: NonBlockModule) -> Option<&'a LoraLayer> {
        self.adapter.and_then(|a| a.outer(outer))
    }

    fn part(self, weight: &'a Weight, outer: NonBlockModule) -> LinearWithLora<'a> {
        LinearWithLora { weight, bias: None, lora: self.branch(outer).map(LoraLayer::low_rank) }
    }

    /// Whether anything before the first block trains.
    pub(crate) fn trains_before(self) -> bool {
        self.branch(NonBlockModule::Embedding).is_some() || self.branch(NonBlockModule::ProjectIn).is_some()
    }

    /// The first block's input (N, D) of tokens (N) at positions (N).
    pub(crate) fn start(self, tokens: &[u32], positions: &[u32], kept: &mut Saved) -> Result<Tensor> {
        let lora = self.branch(NonBlockModule::Embedding).map(LoraLayer::low_rank);
        let (mut x, lookup) = embedding::forward(&self.weights.embedding, tokens, lora)?;
        kept.lookup = lookup;
        if self.config.embedding_multiplier != 1.0 {
            x = columns::scale(&x, self.config.embedding_multiplier as f32)?;
        }
        if let Some([into, _]) = &self.weights.projections {
            let (y, k) = one(&x, self.part(into, NonBlockModule::ProjectIn))?;
            kept.project_in = Some((x, k));
            x = y;
        }
        if let (Some(table), Some(first)) = (&self.weights.positions, self.config.learned_positions) {
            let rows: Vec<u32> = positions.iter().map(|p| p + first as u32).collect();
            x = columns::add(&x, &embedding::forward(table, &rows, None)?.0, 1.0)?;
        }
        Ok(x)
    }

    /// Gradients of the branches before the blocks, of dL/dx (N, D) at the first block's input.
    pub(crate) fn start_backward(self, tokens: &[u32], kept: &Saved, dx: &Tensor, grads: &mut Gradients) -> Result<()> {
        let lookup = self.branch(NonBlockModule::Embedding);
        let mut dx = dx.clone();
        if let (Some([into, _]), Some((x, k))) = (&self.weights.projections, &kept.project_in) {
            let wanted = if lookup.is_some() { InputGradient::Wanted } else { InputGradient::Unused };
            let (input, branch) = one_backward(x, self.part(into, NonBlockModule::ProjectIn), k, &dx, wanted)?;
            grads.outer[NonBlockModule::ProjectIn as usize] = branch;
            if let Some(input) = input {
                dx = input;
            }
        }
        if let (Some(pair), Some(kept)) = (lookup, &kept.lookup) {
            if self.config.embedding_multiplier != 1.0 {
                dx = columns::scale(&dx, self.config.embedding_multiplier as f32)?;
            }
            let g = embedding::backward(&self.weights.embedding, tokens, pair.low_rank(), kept, &dx)?;
            grads.outer[NonBlockModule::Embedding as usize] = Some(g);
        }
        Ok(())
    }

    /// Hidden states (N, E) of the last block's output (N, D).
    pub(crate) fn finish(self, x: Tensor, kept: &mut Saved) -> Result<Tensor> {
        let h = match &self.weights.norm {
            Some(norm) => norm.forward(&x)?,
            None => x,
        };
        let Some([_, out]) = &self.weights.projections else { return Ok(h) };
        let (y, k) = one(&h, self.part(out, NonBlockModule::ProjectOut))?;
        kept.project_out = Some((h, k));
        Ok(y)
    }

    /// dL/dx (N, D) of dL/dh (N, E), with the gradient of the branch out of the blocks; x is the last block's output.
    pub(crate) fn finish_backward(
        self,
        x: &Tensor,
        kept: &Saved,
        dh: &Tensor,
        grads: &mut Gradients,
    ) -> Result<Tensor> {
        let dh = match (&self.weights.projections, &kept.project_out) {
            (Some([_, out]), Some((h, k))) => {
                let (input, branch) =
                    one_backward(h, self.part(out, NonBlockModule::ProjectOut), k, dh, InputGradient::Wanted)?;
                grads.outer[NonBlockModule::ProjectOut as usize] = branch;
                input.context("an input gradient was asked for and not made")?
            }
            _ => dh.clone(),
        };
        Ok(match &self.weights.norm {
            Some(norm) => norm.backward(x, &dh, None)?,
            None => dh,
        })
    }
}

/// A single map.
pub(crate) fn one(x: &Tensor, part: LinearWithLora<'_>) -> Result<(Tensor, linear::Saved)> {
    let (mut y, kept) = linear::forward(x, &[part], None)?;
    Ok((y.pop().context("a linear gives one output a part")?, kept))
}

fn one_backward(
    x: &Tensor,
    part: LinearWithLora<'_>,
    kept: &linear::Saved,
    dy: &Tensor,
    wanted: InputGradient,
) -> Result<(Option<Tensor>, Option<BranchGradient>)> {
    let mut g = linear::backward(x, &[part], kept, &[dy], wanted)?;
    Ok((g.input, g.lora.pop().flatten()))
}
