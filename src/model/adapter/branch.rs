//! One LoRA or DoRA branch beside a frozen linear map, and the names of its tensors in PEFT's files.
//!
//! Formulas: arXiv:2106.09685 (LoRA), arXiv:2402.09353 (DoRA). It does not depend on the base or on reading files. Read
//! `weights.rs` next: it holds all branches of an adapter.

use candle_core::{Device, Result, Tensor};

use crate::model::adapter::shapes::{LinearShapes, NonBlockModule, TargetModule};
use crate::ops::linear::LowRank;
use crate::ops::linear::low_rank::{Dora, LoraCopy, Norms};

/// One LoRA branch: `y += scale * (x Aᵀ) Bᵀ`; with a magnitude m, `y = m / n * (x Wᵀ + scale * (x Aᵀ) Bᵀ)`, n being the
/// row norms of `W + scale * B A` (DoRA).
#[derive(Clone, Debug)]
pub struct LoraLayer {
    /// Factor A, (r, in) f32; (r, V) on the embedding matrix.
    pub a: Tensor,
    /// Factor B, (out, r) f32.
    pub b: Tensor,
    /// Scale of the branch: alpha / r, or alpha / sqrt(r) with rsLoRA.
    pub scale: f64,
    /// DoRA's magnitude m, (out) f32; `None` for plain LoRA.
    pub magnitude: Option<Tensor>,
    norms: Norms,
    copy: LoraCopy,
}

impl LoraLayer {
    /// A LoRA branch without magnitude.
    pub fn new(a: Tensor, b: Tensor, scale: f64) -> Self {
        Self { a, b, scale, magnitude: None, norms: Norms::default(), copy: LoraCopy::default() }
    }

    /// The same branch with DoRA's magnitude, or without one.
    #[must_use]
    pub fn with_magnitude(self, magnitude: Option<Tensor>) -> Self {
        Self { magnitude, ..self }
    }

    /// The same weights with caches of their own. An optimiser step calls it, so that the weights before the step, which may
    /// still be in use, keep their copy on a device.
    #[must_use]
    pub(crate) fn with_own_caches(self) -> Self {
        Self { norms: Norms::default(), copy: LoraCopy::default(), ..self }
    }

    /// Rank r.
    pub fn rank(&self) -> usize {
        self.a.dims()[0]
    }

    /// The branch as the argument that operations take.
    pub fn low_rank(&self) -> LowRank<'_> {
        let dora = self.magnitude.as_ref().map(|magnitude| Dora { magnitude, norms: &self.norms });
        LowRank { a: &self.a, b: &self.b, scale: self.scale, dora, copy: Some(&self.copy) }
    }

    pub(crate) fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            a: self.a.to_device(device)?,
            b: self.b.to_device(device)?,
            magnitude: self.magnitude.as_ref().map(|m| m.to_device(device)).transpose()?,
            ..self.clone()
        })
    }
}

/// Which tensor of a branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factor {
    /// Factor A, (r, in).
    A,
    /// Factor B, (out, r).
    B,
    /// DoRA's magnitude, (out).
    Magnitude,
}

/// The name of a branch's tensor in PEFT's files.
pub fn factor_name(shapes: &LinearShapes, slot: TargetModule, factor: Factor) -> String {
    let kind = match (slot, factor) {
        (_, Factor::Magnitude) => "lora_magnitude_vector",
        (TargetModule::NonBlockModule(NonBlockModule::Embedding), Factor::A) => "lora_embedding_A",
        (TargetModule::NonBlockModule(NonBlockModule::Embedding), Factor::B) => "lora_embedding_B",
        (_, Factor::A) => "lora_A.weight",
        (_, Factor::B) => "lora_B.weight",
    };
    format!("base_model.model.{}.{kind}", shapes.path(slot))
}

/// Name of the scalar head's weight in the files that this program writes.
pub const HEAD_WEIGHT: &str = "base_model.model.score.weight";
/// Name of the scalar head's bias: an extension of this program, which PEFT does not have.
pub const HEAD_BIAS: &str = "base_model.model.score.bias";
