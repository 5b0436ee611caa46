//! The guard: what happens to a step that diverged.
//!
//! The step is skipped and counted, and the learning rate is smaller for the next steps. After several skips in a row
//! the learners are rolled back to their last good state and the rate stays smaller; after several rollbacks the run
//! ends with a diagnosis. It does not depend on a stage. Read `session.rs` next.

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

use super::learner::{Learner, Parameters};
use super::snapshot::Snapshot;
use crate::config;
use crate::diverged;
use crate::error::{Diverged, counted};

/// The guard's verdict on a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict<T> {
    /// The step is good.
    Good(T),
    /// The step was skipped, with the reason.
    Skipped(String),
    /// The step was skipped and the learners were rolled back, with the reason.
    RolledBack(String),
}

/// The guard's counts, saved in checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Counts {
    /// Skipped since the last good step.
    in_a_row: usize,
    /// Skipped in all.
    skipped: usize,
    rollbacks: usize,
    /// Good steps since the snapshot.
    good: usize,
    /// Mean length of the first rollout's responses, tokens.
    first_length: Option<f64>,
}

/// The guard of one run.
#[derive(Debug, Default)]
pub struct Guard {
    config: config::Guard,
    counts: Counts,
    /// Weights at the start of a good step, and the optimizer's state.
    last_good: Option<Snapshot>,
    /// The weights that the next step begins with, one list per learner: the learners' own storage until they step.
    before: Vec<Parameters>,
}

impl Guard {
    /// A guard with the limits of `[guard]`.
    pub fn new(config: config::Guard) -> Self {
        Self { config, ..Self::default() }
    }

    /// Its limits.
    pub fn config(&self) -> &config::Guard {
        &self.config
    }

    /// The factor of the learning rate: `lr_backoff` to the power of skips in a row and rollbacks so far.
    pub fn factor(&self) -> f64 {
        self.config.lr_backoff.powi((self.counts.in_a_row + self.counts.rollbacks) as i32)
    }

    /// Steps skipped so far.
    pub fn skipped(&self) -> usize {
        self.counts.skipped
    }

    /// Remembers the learners' current weights, and does not wait for steps that threads make.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn watch(&mut self, learners: &[(&str, &mut Learner)]) -> Result<()> {
        self.before = learners.iter().map(|(_, learner)| learner.parameters_later()).collect::<Result<_>>()?;
        Ok(())
    }

    /// Judges a step's outcome; skips it or rolls the learners back where it diverged. Other errors pass through.
    ///
    /// # Errors
    /// Those, and the diagnosis when all rollbacks are used up.
    pub fn judge<T>(&mut self, outcome: Result<T>, learners: &mut [(&str, &mut Learner)]) -> Result<Verdict<T>> {
        let error = match outcome {
            Ok(value) => {
                self.counts.in_a_row = 0;
                if self.last_good.is_none() || self.counts.good >= self.config.snapshot_steps {
                    (self.last_good, self.counts.good) = (Some(self.proven(learners)?), 0);
                }
                self.watch(learners)?;
                self.counts.good += 1;
                return Ok(Verdict::Good(value));
            }
            Err(error) if error.chain().any(|cause| cause.is::<Diverged>()) => error,
            Err(error) => return Err(error),
        };
        let reason = format!("{error:#}");
        self.counts.in_a_row += 1;
        self.counts.skipped += 1;
        if self.counts.in_a_row <= self.config.max_skips {
            return Ok(Verdict::Skipped(reason));
        }
        if self.counts.rollbacks >= self.config.max_rollbacks {
            return Err(anyhow!(
                "training does not recover: {} skipped, {} of them in a row, after {} to good weights, \
                 with the learning rate at {} of its setting; the last reason: {reason}. Lower the \
                 learning_rate, raise warmup_steps, or look at the records and rewards of these steps; [guard] has the \
                 limits",
                match self.counts.skipped {
                    1 => "1 step was".to_owned(),
                    more => format!("{more} steps were"),
                },
                self.counts.in_a_row,
                counted(self.counts.rollbacks, "rollback"),
                self.factor()
            ));
        }
        self.counts.rollbacks += 1;
        self.counts.in_a_row = 0;
        if let Some(good) = &self.last_good {
            learners.iter_mut().try_for_each(|(name, learner)| good.restore_learner(name, learner))?;
        }
        self.watch(learners)?;
        Ok(Verdict::RolledBack(reason))
    }

    /// Judges the weights that the last step led to, by the outcome of a pass with them: no later step will. Where the pass
    /// diverged, the learners are rolled back to their last good state, and the reason is returned.
    ///
    /// # Errors
    /// Errors other than divergence, and the divergence itself where no step was ever good.
    pub fn settle(&mut self, outcome: Result<()>, learners: &mut [(&str, &mut Learner)]) -> Result<Option<String>> {
        let error = match outcome {
            Ok(()) => return Ok(None),
            Err(error) => error,
        };
        let Some(good) = self.last_good.as_ref().filter(|_| error.chain().any(|cause| cause.is::<Diverged>())) else {
            return Err(error);
        };
        learners.iter_mut().try_for_each(|(name, learner)| good.restore_learner(name, learner))?;
        self.counts.rollbacks += 1;
        self.counts.in_a_row = 0;
        self.watch(learners)?;
        Ok(Some(format!("{error:#}")))
    }

    /// The state to roll back to after a good step: the weights at its start, whose loss was finite. The weights after
    /// the step are proven only by the next one.
    fn proven(&self, learners: &[(&str, &mut Learner)]) -> Result<Snapshot> {
        let mut snapshot = Snapshot::default();
        for (i, (name, learner)) in learners.iter().enumerate() {
            learner.settled()?;
            let weights = self.before.get(i).map_or_else(|| learner.weights().parameters(), Parameters::tensors)?;
            snapshot.put_learner_at(name, learner, weights)?;
        }
        Ok(snapshot)
    }

    /// Checks a rollout against `max_kl` and `max_length_ratio`. `kl`: mean over its responses, nats; `length`: mean,
    /// tokens.
    ///
    /// # Errors
    /// A divergence that names the limit that is exceeded.
    pub fn check_rollout(&mut self, kl: f64, length: f64) -> Result<()> {
        let first = *self.counts.first_length.get_or_insert(length);
        if let Some(most) = self.config.max_kl.filter(|&most| kl > most) {
            return Err(diverged!("the KL is {kl:.3} nats per response, more than [guard] max_kl = {most}"));
        }
        if let Some(most) = self.config.max_length_ratio.filter(|&most| length > most * first) {
            return Err(diverged!(
                "responses have {length:.1} tokens on average and those of the first rollout had {first:.1}: more than \
                 [guard] max_length_ratio = {most} times as many"
            ));
        }
        Ok(())
    }

    /// Puts the counts and the last good weights into a checkpoint.
    ///
    /// # Errors
    /// None in practice.
    pub fn save(&self, into: &mut Snapshot) -> Result<()> {
        into.put("guard", &self.counts)?;
        if let Some(good) = &self.last_good {
            into.put_all("last_good", good);
        }
        Ok(())
    }

    /// Restores the counts and the last good weights from a checkpoint.
    ///
    /// # Errors
    /// If the checkpoint lacks them.
    pub fn load(&mut self, from: &Snapshot) -> Result<()> {
        self.counts = from.get("guard")?;
        self.last_good = from.all("last_good");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::adapter::{Adapter, Gradients, LinearShapes, LoraConfig, TargetModules};
    use crate::train::adamw::AdamWConfig;

    fn learner() -> Learner {
        let shapes = LinearShapes::llama(1, 4, 4, 4, 8);
        let target_modules = TargetModules::List(vec!["q_proj".into()]);
        let config = LoraConfig { r: 2, lora_alpha: 4.0, target_modules, ..LoraConfig::default() };
        let adapter = Adapter::init(config, shapes, 3).unwrap();
        Learner::new(adapter.to_trainable(), AdamWConfig::default(), 0.0).unwrap()
    }

    fn step(learner: &mut Learner, gradient: f64) -> Result<f64> {
        let weights = learner.weights().parameters().unwrap();
        let mut gradients = Gradients::none(1);
        let filled = |i: usize| (weights[i].zeros_like().unwrap() + gradient).unwrap();
        gradients.layers[0][0] = Some((filled(0), filled(1)).into());
        learner.step(gradients, 0.1)
    }

    fn weights(learner: &Learner) -> Vec<f32> {
        learner.weights().parameters().unwrap()[0].flatten_all().unwrap().to_vec1().unwrap()
    }

    fn guard() -> Guard {
        let limits = config::Guard { max_skips: 2, max_rollbacks: 1, snapshot_steps: 10, ..config::Guard::default() };
        Guard::new(limits)
    }

    /// One step through the guard.
    fn go(guard: &mut Guard, learner: &mut Learner, gradient: f64) -> Result<Verdict<f64>> {
        let outcome = step(learner, gradient);
        guard.judge(outcome, &mut [("actor", learner)])
    }

    #[test]
    fn a_nan_or_infinite_step_is_skipped_and_the_rate_is_smaller_until_a_good_step() {
        let (mut guard, mut learner) = (guard(), learner());
        assert!(matches!(go(&mut guard, &mut learner, 1.0).unwrap(), Verdict::Good(_)));
        let before = weights(&learner);
        for (bad, factor) in [(f64::NAN, 0.5), (f64::INFINITY, 0.25)] {
            let verdict = go(&mut guard, &mut learner, bad).unwrap();
            assert!(matches!(&verdict, Verdict::Skipped(reason) if reason.contains("gradient")), "{verdict:?}");
            assert_eq!((weights(&learner), guard.factor()), (before.clone(), factor));
        }
        assert!(matches!(go(&mut guard, &mut learner, 1.0).unwrap(), Verdict::Good(_)));
        assert_eq!((guard.factor(), guard.skipped()), (1.0, 2));
        assert_ne!(weights(&learner), before);
    }

    #[test]
    fn skips_in_a_row_roll_back_to_the_last_good_weights_and_then_end_the_run_with_the_reason() {
        let (mut guard, mut learner) = (guard(), learner());
        go(&mut guard, &mut learner, 1.0).unwrap();
        let good = weights(&learner);
        go(&mut guard, &mut learner, 1.0).unwrap(); // after the snapshot: lost with the rollback
        let verdicts: Vec<_> = (0..3).map(|_| go(&mut guard, &mut learner, f64::NAN).unwrap()).collect();
        assert!(matches!(verdicts[..], [Verdict::Skipped(_), Verdict::Skipped(_), Verdict::RolledBack(_)]));
        assert_eq!((weights(&learner), guard.factor()), (good, 0.5));
        // What a checkpoint holds is enough to go on alike.
        let mut snapshot = Snapshot::default();
        guard.save(&mut snapshot).unwrap();
        let mut other = self::guard();
        other.load(&snapshot).unwrap();
        for guard in [&mut guard, &mut other] {
            assert!((0..2).all(|_| go(guard, &mut learner, f64::NAN).is_ok()));
            let error = go(guard, &mut learner, f64::NAN).unwrap_err().to_string();
            assert!(error.contains("6 steps were skipped") && error.contains("the last reason"), "{error}");
        }
    }

    /// A step's loss is that of the weights before it: what the step led to is known to be good only after the next.
    #[test]
    fn a_rollback_restores_only_weights_that_a_good_step_started_from() {
        let (mut guard, mut learner) = (guard(), learner());
        guard.watch(&[("actor", &mut learner)]).unwrap();
        let start = weights(&learner);
        go(&mut guard, &mut learner, 1.0).unwrap(); // the step too far
        assert_ne!(weights(&learner), start);
        let mut snapshot = Snapshot::default();
        guard.save(&mut snapshot).unwrap();
        guard.load(&snapshot).unwrap();
        let verdicts: Vec<_> = (0..3).map(|_| go(&mut guard, &mut learner, f64::NAN).unwrap()).collect();
        assert!(matches!(verdicts[2], Verdict::RolledBack(_)));
        assert_eq!(weights(&learner), start);
    }

    #[test]
    fn weights_that_the_last_step_spoiled_are_those_of_the_last_good_step_again() {
        let (mut guard, mut learner) = (guard(), learner());
        guard.watch(&[("actor", &mut learner)]).unwrap();
        let start = weights(&learner);
        go(&mut guard, &mut learner, 1.0).unwrap();
        let after = weights(&learner);
        assert_eq!(guard.settle(Ok(()), &mut [("actor", &mut learner)]).unwrap(), None);
        assert_eq!(weights(&learner), after);
        let outcome = Err(diverged!("the loss is NaN"));
        let reason = guard.settle(outcome, &mut [("actor", &mut learner)]).unwrap();
        assert_eq!((reason.as_deref(), weights(&learner)), (Some("the loss is NaN"), start));
        let other = guard.settle(Err(anyhow!("disk on fire")), &mut []).unwrap_err();
        assert_eq!(other.to_string(), "disk on fire");
        let never = self::guard().settle(Err(diverged!("the loss is NaN")), &mut []).unwrap_err();
        assert_eq!(never.to_string(), "the loss is NaN");
    }

    #[test]
    fn an_error_other_than_divergence_is_never_skipped() {
        let error = guard().judge::<()>(Err(anyhow!("disk on fire")), &mut []).unwrap_err();
        assert_eq!(error.to_string(), "disk on fire");
    }

    #[test]
    fn a_rollout_beyond_the_limits_is_a_divergence() {
        let limits = config::Guard { max_kl: Some(10.0), max_length_ratio: Some(2.0), ..config::Guard::default() };
        let mut guard = Guard::new(limits);
        guard.check_rollout(9.0, 10.0).unwrap();
        guard.check_rollout(10.0, 20.0).unwrap();
        for (kl, length, said) in [(10.5, 10.0, "max_kl"), (1.0, 20.5, "max_length_ratio")] {
            let error = guard.check_rollout(kl, length).unwrap_err();
            assert!(error.is::<Diverged>() && error.to_string().contains(said), "{error}");
        }
        Guard::default().check_rollout(1e6, 1e6).unwrap();
    }
}
