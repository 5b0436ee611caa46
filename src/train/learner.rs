//! A learner: the weights under training and their optimizer.
//!
//! Views of the weights are borrowed, so no view outlives a step. A step can be computed beside the weights, while passes read
//! them, and made later; and it can be made by a thread, for which whoever reads the learner waits. It does not depend on a
//! stage or a config. Read `adamw.rs` next.

use std::collections::HashSet;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::thread::JoinHandle;

use anyhow::{Context, Error, Result, anyhow, ensure};
use candle_core::Tensor;

use super::adamw::{AdamW, AdamWConfig, AdamWState, clip_factor, clipped_norm};
use crate::device::lock;
use crate::model::adapter::{Factor, Gradients, NonBlockModule, TargetModule, TrainableAdapter, factor_name};

/// An adapter under training, with its optimizer.
#[derive(Debug)]
pub struct Learner {
    /// Empty while a thread steps.
    state: OnceLock<State>,
    stepping: Mutex<Option<Stepping>>,
    max_grad_norm: f64,
}

/// What a step changes.
#[derive(Debug)]
struct State {
    weights: TrainableAdapter,
    optimizer: AdamW,
    /// Why a step that a thread made failed.
    failed: Option<Error>,
}

/// A thread that makes a step. It is waited for when this is dropped.
#[derive(Debug)]
struct Stepping {
    thread: Option<JoinHandle<()>>,
    /// The state, with the thread until it ends.
    state: Arc<Mutex<Option<State>>>,
    /// The parameters after the step.
    parameters: Arc<OnceLock<Vec<Tensor>>>,
}

impl Stepping {
    fn wait(&mut self) -> Option<State> {
        let panicked = self.thread.take().and_then(|thread| thread.join().err());
        if let Some(panic) = panicked.filter(|_| !thread::panicking()) {
            resume_unwind(panic);
        }
        lock(&self.state).take()
    }
}

impl Drop for Stepping {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// The parameters of a learner at some time, which a thread may still compute then.
#[derive(Clone, Debug)]
pub enum Parameters {
    /// They were there.
    Now(Vec<Tensor>),
    /// They are there once the learner was waited for.
    Later(Arc<OnceLock<Vec<Tensor>>>),
}

impl Parameters {
    /// The tensors.
    ///
    /// # Errors
    /// If the learner was not waited for, or the step failed.
    pub fn tensors(&self) -> Result<Vec<Tensor>> {
        match self {
            Self::Now(tensors) => Ok(tensors.clone()),
            Self::Later(tensors) => tensors.get().cloned().context("the parameters after a step that has not ended"),
        }
    }
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
        let state = State { optimizer: AdamW::for_adapter(config, &weights)?, weights, failed: None };
        Ok(Self { state: state.into(), stepping: Mutex::default(), max_grad_norm })
    }

    /// The state after the last step, which a thread may have to make first.
    fn state(&self) -> &State {
        self.state.get_or_init(|| {
            let state = lock(&self.stepping).take().and_then(|mut stepping| stepping.wait());
            state.unwrap_or_else(|| unreachable!("a learner without a state has a thread that returns it"))
        })
    }

    fn state_mut(&mut self) -> &mut State {
        self.state();
        self.state.get_mut().unwrap_or_else(|| unreachable!("it is there now"))
    }

    /// The current weights.
    pub fn weights(&self) -> &TrainableAdapter {
        &self.state().weights
    }

    /// The optimizer's moments and step count.
    pub fn optimizer_state(&self) -> &AdamWState {
        self.state().optimizer.state()
    }

    /// Waits for a step that a thread makes.
    ///
    /// # Errors
    /// Why it failed.
    pub fn settled(&self) -> Result<()> {
        self.state().failed.as_ref().map_or(Ok(()), |error| Err(anyhow!("the last optimizer step failed: {error:#}")))
    }

    /// The weights that the next step begins with, without waiting for a thread that makes them: the learner's own storage
    /// until it steps.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn parameters_later(&self) -> Result<Parameters> {
        let of_thread = lock(&self.stepping).as_ref().map(|stepping| Arc::clone(&stepping.parameters));
        match of_thread {
            Some(parameters) => Ok(Parameters::Later(parameters)),
            None => Ok(Parameters::Now(self.weights().parameters()?)),
        }
    }

    /// Restores earlier parameters, in flat order, and their optimizer state. All or nothing.
    ///
    /// # Errors
    /// If they are of another shape than this learner's.
    pub fn restore(&mut self, parameters: Vec<Tensor>, state: AdamWState) -> Result<()> {
        let lens = |s: &AdamWState| s.moments.iter().map(|m| (m.name.clone(), m.m.len())).collect::<Vec<_>>();
        let own = self.state_mut();
        ensure!(lens(&state) == lens(own.optimizer.state()), "the optimizer's state is of other parameters");
        let optimizer = AdamW::from_state(own.optimizer.config(), state)?;
        own.weights.replace(parameters)?;
        (own.optimizer, own.failed) = (optimizer, None);
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
        self.settled()?;
        let gradients = self.weights().without_frozen(gradients.to_host()?)?;
        let (norm, factor) = clipped_norm(self.weights(), &gradients, self.max_norm())?;
        Ok(Checked { gradients, norm, factor })
    }

    /// One AdamW step with checked gradients of this learner; returns their norm before clipping.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn step_by(&mut self, checked: Checked, lr: f64) -> Result<f64> {
        self.state_mut().take(&checked.gradients, checked.factor, lr)?;
        Ok(checked.norm)
    }

    /// [`Learner::step_by`] by a thread; returns the gradients' norm before clipping. Whoever reads the learner waits for it.
    /// Where the system has no room for a thread, the step is made at once.
    ///
    /// # Errors
    /// As for [`Learner::step_by`]: of a step by a thread it is the error of [`Learner::settled`], and so of the next step.
    pub fn step_later(&mut self, checked: Checked, lr: f64) -> Result<f64> {
        self.settled()?;
        let Checked { gradients, norm, factor } = checked;
        let state = Arc::new(Mutex::new(self.state.take()));
        let gradients = Arc::new(gradients);
        let parameters = Arc::new(OnceLock::new());
        let (of_thread, its_gradients, its_parameters) = (state.clone(), gradients.clone(), parameters.clone());
        let steps = move || {
            if let Some(state) = &mut *lock(&of_thread) {
                state.failed = state.take(&its_gradients, factor, lr).err();
                // Those before the step, where it failed.
                let after = state.weights.parameters().ok();
                after.map(|after| its_parameters.set(after)).transpose().ok();
            }
        };
        // The builder returns an error where the system has no room for a thread; `thread::spawn` would panic.
        match thread::Builder::new().name("optimizer".into()).spawn(steps) {
            Ok(thread) => {
                *lock(&self.stepping) = Some(Stepping { thread: Some(thread), state, parameters });
            }
            Err(_) => {
                if let Some(back) = lock(&state).take() {
                    self.state = back.into();
                }
                self.state_mut().take(&gradients, factor, lr)?;
            }
        }
        Ok(norm)
    }

    /// Computes the step that [`Learner::step`] would make, to the same bits, and leaves the learner as it is.
    /// [`Learner::commit`] makes it. Until then weights and moments are held twice.
    ///
    /// # Errors
    /// As for [`Learner::step`].
    pub fn prepared(&self, gradients: Gradients, lr: f64) -> Result<Prepared> {
        let Checked { gradients, norm, factor } = self.checked(gradients)?;
        let own = self.state();
        let (parameters, flat) = (own.weights.parameters()?, own.weights.flat_gradients(&gradients)?);
        let (parameters, state) = own.optimizer.stepped(&parameters, &flat, factor, own.rates(lr))?;
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
        let own = self.state_mut();
        own.optimizer.check_next(&state)?;
        own.weights.replace(parameters)?;
        own.optimizer.replace_state(state);
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
            learners[0].weights().without_frozen(first.to_host()?)?,
            learners[1].weights().without_frozen(second.to_host()?)?,
        ];
        learners.iter().try_for_each(|learner| learner.settled())?;
        let mut norms = [0.0; 2];
        for ((learner, gradients), norm) in learners.iter().zip(&gradients).zip(&mut norms) {
            (*norm, _) = clipped_norm(learner.weights(), gradients, f64::INFINITY)?;
        }
        let factor = clip_factor(norms[0].hypot(norms[1]), learners[0].max_norm());
        for (learner, gradients) in learners.into_iter().zip(gradients) {
            learner.state_mut().take(&gradients, factor, lr)?;
        }
        Ok(norms)
    }
}

impl State {
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
    fn a_step_by_a_thread_has_the_bits_of_a_step_for_whoever_reads_the_learner() {
        let (mut at_once, mut later) = (learner(), learner());
        let same = |all: Vec<Tensor>, of: &Learner| {
            let bits = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            all.iter().zip(of.weights().parameters().unwrap()).all(|(ours, theirs)| bits(ours) == bits(&theirs))
        };
        for (step, by) in [0.25, -0.5, 0.001].into_iter().enumerate() {
            let lr = 0.01 / (1 + step) as f64;
            let gradients = gradients(&at_once, by);
            let before = later.parameters_later().unwrap();
            // The second step waits for the first, which nobody has read.
            assert_eq!(matches!(before, Parameters::Later(_)), step > 0);
            let checked = later.checked(gradients.clone()).unwrap();
            assert!(same(before.tensors().unwrap(), &at_once), "those that the step begins with");
            let norm = later.step_later(checked, lr).unwrap();
            assert_eq!(norm, at_once.step(gradients, lr).unwrap());
        }
        let after = later.parameters_later().unwrap();
        assert!(matches!(after, Parameters::Later(_)) && bits(&later) == bits(&at_once));
        assert!(same(after.tensors().unwrap(), &at_once));
        assert!(matches!(later.parameters_later().unwrap(), Parameters::Now(_)), "it was waited for");
        // One that nobody reads ends with its learner.
        let checked = later.checked(gradients(&later, 0.5)).unwrap();
        later.step_later(checked, 0.01).unwrap();
        drop(later);
    }

    #[test]
    fn a_step_by_a_thread_that_fails_is_the_error_of_all_that_comes_after() {
        let mut learner = learner();
        let before = bits(&learner);
        let mut checked = learner.checked(gradients(&learner, 0.25)).unwrap();
        checked.gradients.head_weight = None;
        learner.step_later(checked, 0.01).unwrap();
        let error = learner.settled().unwrap_err().to_string();
        assert!(error.contains("the last optimizer step failed") && error.contains("score.weight"), "{error}");
        let next = learner.step(gradients(&learner, 0.25), 0.01).unwrap_err();
        assert_eq!(next.to_string(), error);
        assert_eq!(Snapshot::default().put_learner("x", &learner).unwrap_err().to_string(), error);
        // Going back to what was saved mends it.
        let parameters = learner.weights().parameters().unwrap();
        learner.restore(parameters, learner.optimizer_state().clone()).unwrap();
        assert!(bits(&learner) == before);
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
