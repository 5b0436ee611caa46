//! A learner: the weights under training and their optimizer.
//!
//! Views of the weights are borrowed, so no view outlives a step. It does not depend on a stage or a config. Read
//! `adamw.rs` next.

use std::collections::HashSet;

use anyhow::{Result, ensure};
use candle_core::Tensor;

use super::adamw::{AdamW, AdamWConfig, AdamWState, clip_factor, clipped_norm};
use crate::model::adapter::{Factor, Gradients, NonBlockModule, TargetModule, TrainableAdapter, factor_name};

/// An adapter under training, with its optimizer.
#[derive(Debug)]
pub struct Learner {
    weights: TrainableAdapter,
    optimizer: AdamW,
    max_grad_norm: f64,
}

/// Gradients that are complete and finite, and how far they are clipped.
#[derive(Debug)]
pub struct Checked {
    gradients: Gradients,
    norm: f64,
    /// What the step multiplies the gradients by.
    factor: f64,
}

impl Learner {
    /// A learner with fresh moments. `max_grad_norm`: gradients of a larger norm are scaled down to it; 0 = no
    /// clipping.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn new(weights: TrainableAdapter, config: AdamWConfig, max_grad_norm: f64) -> Result<Self> {
        Ok(Self { optimizer: AdamW::for_adapter(config, &weights)?, weights, max_grad_norm })
    }

    /// The current weights.
    pub fn weights(&self) -> &TrainableAdapter {
        &self.weights
    }

    /// The optimizer's moments and step count.
    pub fn optimizer_state(&self) -> &AdamWState {
        self.optimizer.state()
    }

    /// Restores earlier parameters, in flat order, and their optimizer state. All or nothing.
    ///
    /// # Errors
    /// If they are of another shape than this learner's.
    pub fn restore(&mut self, parameters: Vec<Tensor>, state: AdamWState) -> Result<()> {
        let lens = |s: &AdamWState| s.moments.iter().map(|m| (m.name.clone(), m.m.len())).collect::<Vec<_>>();
        ensure!(lens(&state) == lens(self.optimizer.state()), "the optimizer's state is of other parameters");
        let optimizer = AdamW::from_state(self.optimizer.config(), state)?;
        self.weights.replace(parameters)?;
        self.optimizer = optimizer;
        Ok(())
    }

    /// The largest gradient norm that is not clipped.
    fn max_norm(&self) -> f64 {
        if self.max_grad_norm > 0.0 { self.max_grad_norm } else { f64::INFINITY }
    }

    /// One clipped AdamW step; returns the gradient's norm before clipping. Nothing changes on an error.
    ///
    /// # Errors
    /// If a gradient is missing, of another shape, NaN or infinite; the message names the tensor.
    pub fn step(&mut self, gradients: Gradients, lr: f64) -> Result<f64> {
        let checked = self.checked(gradients)?;
        self.step_by(checked, lr)
    }

    /// Checks and clips gradients, so that several learners step only if all can.
    ///
    /// # Errors
    /// As for [`Learner::step`].
    pub fn checked(&self, gradients: Gradients) -> Result<Checked> {
        let gradients = self.weights.without_frozen(gradients.to_host()?)?;
        let (norm, factor) = clipped_norm(&self.weights, &gradients, self.max_norm())?;
        Ok(Checked { gradients, norm, factor })
    }

    /// One AdamW step with checked gradients of this learner; returns their norm before clipping.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn step_by(&mut self, checked: Checked, lr: f64) -> Result<f64> {
        self.take(&checked.gradients, checked.factor, lr)?;
        Ok(checked.norm)
    }

    /// Steps two learners as one optimizer would that held the parameters of both: the norm over all of them is
    /// clipped, to what the first allows. Returns each one's norm before clipping.
    ///
    /// # Errors
    /// As for [`Learner::step`].
    pub fn step_both(learners: [&mut Self; 2], gradients: [Gradients; 2], lr: f64) -> Result<[f64; 2]> {
        let [first, second] = gradients;
        let gradients = [
            learners[0].weights.without_frozen(first.to_host()?)?,
            learners[1].weights.without_frozen(second.to_host()?)?,
        ];
        let mut norms = [0.0; 2];
        for ((learner, gradients), norm) in learners.iter().zip(&gradients).zip(&mut norms) {
            (*norm, _) = clipped_norm(&learner.weights, gradients, f64::INFINITY)?;
        }
        let factor = clip_factor(norms[0].hypot(norms[1]), learners[0].max_norm());
        for (learner, gradients) in learners.into_iter().zip(gradients) {
            learner.take(&gradients, factor, lr)?;
        }
        Ok(norms)
    }

    fn take(&mut self, gradients: &Gradients, factor: f64, lr: f64) -> Result<()> {
        let mut parameters = self.weights.parameters()?;
        let flat = self.weights.flat_gradients(gradients)?;
        let ratio = self.weights.view().config().loraplus_lr_ratio;
        // As in PEFT's `create_loraplus_optimizer`, B and the magnitudes; a token table's branch is left out.
        let view = self.weights.view();
        let further: HashSet<String> = view
            .pairs()
            .filter(|(slot, _)| *slot != TargetModule::NonBlockModule(NonBlockModule::Embedding))
            .flat_map(|(slot, _)| [Factor::B, Factor::Magnitude].map(|f| factor_name(view.shapes(), slot, f)))
            .collect();
        let rate = |name: &str| if further.contains(name) { ratio * lr } else { lr };
        self.optimizer.step_with(parameters.iter_mut().collect(), &flat, factor, rate)?;
        self.weights.replace(parameters)
    }
}
