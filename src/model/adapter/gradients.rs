//! Gradients of an adapter, summed over micro-batches. A missing gradient counts as zero in a sum.
//!
//! It does not depend on the backward pass or the optimizer. Read `trainable.rs` next: it lays them out flat, in the order of
//! the parameters, where a missing gradient is an error.

use anyhow::Result;
use candle_core::Tensor;

use crate::device::Array;
use crate::model::adapter::shapes::{MAX_LINEARS, TargetModule};
pub use crate::ops::linear::BranchGradient;

/// Gradients in the layout of an adapter. `None` counts as zero in a sum;
/// [`flat_gradients`](crate::model::adapter::TrainableAdapter::flat_gradients) refuses it before an optimizer step.
#[derive(Clone, Debug, Default)]
pub struct Gradients {
    /// Gradients of the blocks' branches, indexed like `Adapter::layers`.
    pub layers: Vec<[Option<BranchGradient>; MAX_LINEARS]>,
    /// Gradients of the branches outside of the blocks, by [`NonBlockModule`](crate::model::adapter::NonBlockModule).
    pub outer: [Option<BranchGradient>; 4],
    /// Gradient of the scalar head's weight, (1, D) f32.
    pub head_weight: Option<Tensor>,
    /// Gradient of the scalar head's bias, (1) f32.
    pub head_bias: Option<Tensor>,
}

impl Gradients {
    /// No gradient, for `layers` blocks.
    pub fn none(layers: usize) -> Self {
        Self { layers: (0..layers).map(|_| Default::default()).collect(), ..Self::default() }
    }

    /// Adds the gradients of another micro-batch.
    ///
    /// # Errors
    /// If the number of layers or a shape differs.
    pub fn add(&mut self, other: Self) -> Result<()> {
        let (have, more) = (self.layers.len(), other.layers.len());
        anyhow::ensure!(have == more, "gradients of {have} and of {more} layers cannot be added");
        let theirs = other.layers.into_iter().flatten().chain(other.outer);
        for (mine, theirs) in self.branches_mut().zip(theirs) {
            *mine = sum(mine.take(), theirs)?;
        }
        for (mine, theirs) in [(&mut self.head_weight, other.head_weight), (&mut self.head_bias, other.head_bias)] {
            *mine = match (mine.take(), theirs) {
                (Some(one), Some(more)) => Some((one + more)?),
                (one, other) => one.or(other),
            };
        }
        Ok(())
    }

    /// Multiplies every gradient.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn scale(&mut self, factor: f64) -> Result<()> {
        for gradient in self.branches_mut().flatten() {
            *gradient = gradient.scaled(factor as f32)?;
        }
        for gradient in [&mut self.head_weight, &mut self.head_bias].into_iter().flatten() {
            *gradient = (&*gradient * factor)?;
        }
        Ok(())
    }

    /// The same gradients on the host, where they are stepped by. Those of a device lie there until then, so that nothing
    /// waits for the device between micro-batches.
    ///
    /// # Errors
    /// If a download fails.
    pub fn to_host(mut self) -> Result<Self> {
        BranchGradient::all_to_host(self.branches_mut().flatten())?;
        Ok(self)
    }

    /// The gradients in a fixed order: A, B and the magnitude of each branch, then the head's. All lie on the host.
    ///
    /// # Errors
    /// If a download fails.
    pub fn into_slots(self) -> Result<Vec<Option<Tensor>>> {
        let gradients = self.to_host()?;
        let mut slots = vec![];
        for branch in gradients.layers.iter().flatten().chain(&gradients.outer) {
            let on_host = |array: &Array| array.host().cloned();
            slots.push(branch.as_ref().map(|branch| on_host(&branch.a)).transpose()?);
            slots.push(branch.as_ref().map(|branch| on_host(&branch.b)).transpose()?);
            slots.push(branch.as_ref().and_then(|branch| branch.magnitude.as_ref()).map(on_host).transpose()?);
        }
        slots.extend([gradients.head_weight, gradients.head_bias]);
        Ok(slots)
    }

    /// The gradients of [`Gradients::into_slots`] for `layers` blocks.
    ///
    /// # Errors
    /// If their number is another's.
    pub fn from_slots(layers: usize, slots: Vec<Option<Tensor>>) -> Result<Self> {
        let mut gradients = Self::none(layers);
        let expected = 3 * gradients.branches_mut().count() + 2;
        anyhow::ensure!(slots.len() == expected, "{} gradients where {expected} belong", slots.len());
        let mut slots = slots.into_iter();
        let mut next = || slots.next().flatten();
        for branch in gradients.branches_mut() {
            let (a, b, magnitude) = (next(), next(), next());
            *branch = a.zip(b).map(|(a, b)| BranchGradient::on_host(a, b, magnitude));
        }
        (gradients.head_weight, gradients.head_bias) = (next(), next());
        Ok(gradients)
    }

    fn branches_mut(&mut self) -> impl Iterator<Item = &mut Option<BranchGradient>> {
        self.layers.iter_mut().flatten().chain(&mut self.outer)
    }

    /// Gradient of the branch on one target module.
    pub fn at(&self, slot: TargetModule) -> Option<&BranchGradient> {
        match slot {
            TargetModule::Block { layer, linear } => self.layers.get(layer)?.get(linear)?.as_ref(),
            TargetModule::NonBlockModule(outer) => self.outer[outer as usize].as_ref(),
        }
    }
}

/// Sum of two gradients of one branch; `None` counts as zero.
pub(crate) fn sum(one: Option<BranchGradient>, other: Option<BranchGradient>) -> Result<Option<BranchGradient>> {
    Ok(match (one, other) {
        (Some(one), Some(other)) => Some(one.sum(&other)?),
        (one, other) => one.or(other),
    })
}
