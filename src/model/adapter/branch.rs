//! One low-rank branch, where in a decoder it sits, and what PEFT's file calls its tensors. Knows no base and no file.
//! Read lora.rs for which maps get one, adapter.rs for all of them together.

use candle_core::{Device, Result, Tensor};

use crate::model::adapter::targets::{LinearShapes, NonBlockModule, TargetModule};
use crate::ops::linear::LowRank;
use crate::ops::linear::low_rank::{Dora, LoraCopy, Norms};

/// One low-rank branch: `y += scale * (x Aᵀ) Bᵀ`; with a magnitude m, `y = m / n * (x Wᵀ + scale * (x Aᵀ) Bᵀ)`, n the row
/// norms of `W + scale * B A` (DoRA).
#[derive(Clone, Debug)]
pub struct LoraLayer {
    /// (r, in) f32; of a token table (r, V).
    pub a: Tensor,
    /// (out, r) f32.
    pub b: Tensor,
    /// alpha / r, or alpha / sqrt(r).
    pub scale: f64,
    /// DoRA's m, (out) f32.
    pub magnitude: Option<Tensor>,
    norms: Norms,
    copy: LoraCopy,
}

impl LoraLayer {
    /// A plain branch.
    pub fn new(a: Tensor, b: Tensor, scale: f64) -> Self {
        Self { a, b, scale, magnitude: None, norms: Norms::default(), copy: LoraCopy::default() }
    }

    /// With DoRA's magnitude, or none.
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

    /// Rank.
    pub fn rank(&self) -> usize {
        self.a.dims()[0]
    }

    /// As the operations take it.
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

/// One of a branch's tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factor {
    /// (r, in).
    A,
    /// (out, r).
    B,
    /// (out).
    Magnitude,
}

/// The name of a branch's tensor in PEFT's file.
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

/// The head's weight in the files that this program writes.
pub const HEAD_WEIGHT: &str = "base_model.model.score.weight";
/// The head's bias; ours, not PEFT's.
pub const HEAD_BIAS: &str = "base_model.model.score.bias";
