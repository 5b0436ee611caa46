//! A learner: the weights under training and their optimizer.
//!
//! Views of the weights are borrowed, so no view outlives a step. A step can be computed beside the weights, while passes read
//! them, and made later. It does not depend on a stage or a config. Read `adamw.rs` next.

use std::collections::HashSet;
use std::panic::resume_unwind;
use std::thread;

use anyhow::{Context, Result, ensure};
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

/// A step that is computed and not made: parameters and moments beside those of the learner, which has not changed.
#[derive(Debug)]
pub struct Prepared {
    parameters: Vec<Tensor>,
    state: AdamWState,
    /// The gradients' norm before clipping.
    norm: f64,
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

    /// Computes the step that [`Learner::step`] would make, to the same bits, and leaves the learner as it is.
    /// [`Learner::commit`] makes it. Until then weights and moments are held twice.
    ///
    /// # Errors
    /// As for [`Learner::step`].
    pub fn prepared(&self, gradients: Gradients, lr: f64) -> Result<Prepared> {
        let Checked { gradients, norm, factor } = self.checked(gradients)?;
        let (parameters, flat) = (self.weights.parameters()?, self.weights.flat_gradients(&gradients)?);
        let (parameters, state) = self.optimizer.stepped(&parameters, &flat, factor, self.rates(lr))?;
        Ok(Prepared { parameters, state, norm })
    }

    /// [`Learner::prepared`] on a thread of its own while `passes` run on this one. Returns the step, or why there is none, and
    /// what the passes return.
    ///
    /// # Errors
    /// Those of the passes, before those of the step; if the system refuses a thread, before the passes.
    pub fn prepared_while<T>(
        &self,
        gradients: Gradients,
        lr: f64,
        passes: impl FnOnce() -> Result<T>,
    ) -> Result<(Result<Prepared>, T)> {
        thread::scope(|scope| {
            // The builder returns an error where the system has no room for a thread; `Scope::spawn` would panic.
            let thread = thread::Builder::new()
                .name("optimizer".into())
                .spawn_scoped(scope, move || self.prepared(gradients, lr))
                .context("starting the thread of the optimizer's step")?;
            let found = passes();
            let prepared = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
            Ok((prepared, found?))
        })
    }

    /// Makes a step that [`Learner::prepared`] computed; returns the gradients' norm before clipping.
    ///
    /// # Errors
    /// If the learner has stepped since, or the step is another one's: it is unchanged then. If a tensor cannot be made.
    pub fn commit(&mut self, prepared: Prepared) -> Result<f64> {
        let Prepared { parameters, state, norm } = prepared;
        self.optimizer.check_next(&state)?;
        self.weights.replace(parameters)?;
        self.optimizer.replace_state(state);
        Ok(norm)
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
        let (flat, rates) = (self.weights.flat_gradients(gradients)?, self.rates(lr));
        self.optimizer.step_with(parameters.iter_mut().collect(), &flat, factor, rates)?;
        self.weights.replace(parameters)
    }

    /// The learning rate of each parameter by its name.
    fn rates(&self, lr: f64) -> impl Fn(&str) -> f64 + use<> {
        let ratio = self.weights.view().config().loraplus_lr_ratio;
        // As in PEFT's `create_loraplus_optimizer`, B and the magnitudes; a token table's branch is left out.
        let view = self.weights.view();
        let further: HashSet<String> = view
            .pairs()
            .filter(|(slot, _)| *slot != TargetModule::NonBlockModule(NonBlockModule::Embedding))
            .flat_map(|(slot, _)| [Factor::B, Factor::Magnitude].map(|f| factor_name(view.shapes(), slot, f)))
            .collect();
        move |name| if further.contains(name) { ratio * lr } else { lr }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Diverged;
    use crate::model::adapter::{Adapter, LinearShapes, LoraConfig, TargetModules};
    use crate::train::snapshot::Snapshot;

    /// Clipped from a norm of 0.5 on, B at four times A's rate, with weight decay and a head.
    fn learner() -> Learner {
        let target_modules = TargetModules::List(vec!["q_proj".into(), "down_proj".into()]);
        let config = LoraConfig { r: 2, target_modules, loraplus_lr_ratio: 4.0, ..LoraConfig::default() };
        let adapter = Adapter::init(config, LinearShapes::llama(2, 4, 4, 4, 8), 1).unwrap().with_head(1).unwrap();
        let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() };
        Learner::new(adapter.to_trainable(), config, 0.5).unwrap()
    }

    fn gradients(learner: &Learner, by: f64) -> Gradients {
        let mut all = Gradients::none(2);
        let like = |t: &Tensor| ((t * 0.5).unwrap() + by).unwrap();
        for (slot, pair) in learner.weights().view().pairs() {
            let TargetModule::Block { layer, linear } = slot else { unreachable!("branches of blocks alone") };
            all.layers[layer][linear] = Some((like(&pair.a), like(&pair.b)).into());
        }
        all.head_weight = learner.weights().view().head().map(|head| like(&head.weight));
        all
    }

    fn bits(learner: &Learner) -> (Vec<u8>, Vec<u8>) {
        let mut all = Snapshot::default();
        all.put_learner("x", learner).unwrap();
        all.to_bytes().unwrap()
    }

    #[test]
    fn a_prepared_step_has_the_bits_of_a_step_and_changes_nothing_before_it_is_made() {
        let (mut at_once, mut later) = (learner(), learner());
        for (step, by) in [0.25, -0.5, 0.001].into_iter().enumerate() {
            let lr = 0.01 / (1 + step) as f64;
            let before = bits(&later);
            let gradients = gradients(&later, by);
            let (prepared, seen) =
                later.prepared_while(gradients.clone(), lr, || Ok(bits(&later))).map(|(p, s)| (p.unwrap(), s)).unwrap();
            assert!(seen == before && bits(&later) == before);
            assert_eq!(later.commit(prepared).unwrap(), at_once.step(gradients, lr).unwrap());
            assert!(bits(&later) == bits(&at_once) && bits(&later) != before, "step {step}");
        }
    }

    #[test]
    fn a_step_that_was_prepared_before_another_one_is_refused() {
        let mut learner = learner();
        let [one, two] = [0.25, 0.5].map(|by| learner.prepared(gradients(&learner, by), 0.01).unwrap());
        learner.commit(two).unwrap();
        let before = bits(&learner);
        let error = learner.commit(one).unwrap_err().to_string();
        assert!(error.contains("after 1 steps") && bits(&learner) == before, "{error}");
    }

    #[test]
    fn a_gradient_that_is_nan_is_the_error_of_a_step_after_the_errors_of_the_passes() {
        let mut learner = learner();
        let before = bits(&learner);
        let nan = || gradients(&learner, f64::NAN);
        let (prepared, found) = learner.prepared_while(nan(), 0.01, || Ok(7)).unwrap();
        let failed = learner.prepared_while(nan(), 0.01, || Err::<(), _>(anyhow::anyhow!("no memory"))).unwrap_err();
        let (error, nan) = (prepared.unwrap_err(), nan());
        assert!(error.is::<Diverged>() && found == 7 && failed.to_string() == "no memory");
        assert_eq!(error.to_string(), learner.step(nan, 0.01).unwrap_err().to_string());
        assert!(bits(&learner) == before);
    }
}
