//! A session: the environment that a stage runs in, with its report, its checkpoints and its guard.
//!
//! A stage asks for three things: the state to resume from, a checkpoint between two steps, and a verdict on each step.
//! It does not depend on a stage. Read `guard.rs` and `checkpoint_manager.rs` next.

use anyhow::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::guard::{Guard, Verdict};
use super::learner::Learner;
use super::snapshot::Snapshot;
use super::stop;
use super::world::World;
use crate::error::Interrupted;
use crate::error::counted;
use crate::host::give_back_freed;
use crate::host::meter::{Phase, within};
use crate::report::{Figures, Report, number};
use crate::train::checkpoint_manager::CheckpointManager;

const FINDINGS: &str = "findings";

/// What makes the state of a stage.
type MakeSnapshot = Box<dyn FnOnce() -> Result<Snapshot>>;

/// The session of one run of one stage.
pub struct Session {
    /// Where metrics and notices are written.
    pub report: Report,
    /// The ranks that train together. Rank 0 alone has a report and checkpoints.
    pub world: World,
    guard: Guard,
    checkpoints: Option<CheckpointManager>,
    /// The last step of a stage that is trained and whose result is not saved yet, and what makes its state.
    end: Option<(usize, MakeSnapshot)>,
    /// Optimizer steps that the learners had taken when they were given to the guard.
    had_taken: u64,
    resumed: Option<Snapshot>,
    /// Results computed once, before the first step.
    findings: Snapshot,
}

impl Session {
    /// A session without checkpoints, with the default `[guard]`.
    pub fn new(report: Report) -> Self {
        let (world, guard, findings) = (World::default(), Guard::default(), Snapshot::default());
        Self { report, world, guard, checkpoints: None, end: None, had_taken: 0, resumed: None, findings }
    }

    /// A session that reports nothing and saves nothing.
    pub fn silent() -> Self {
        Self::new(Report::silent())
    }

    /// Replaces the guard.
    pub fn guarded(mut self, guard: Guard) -> Self {
        self.guard = guard;
        self
    }

    /// Trains among the ranks of `world`.
    pub fn among(mut self, world: World) -> Self {
        self.world = world;
        self
    }

    /// Resumes from `resumed` without checkpoints, as ranks other than 0 do.
    pub fn resuming(mut self, resumed: Option<Snapshot>) -> Self {
        self.findings = resumed.as_ref().and_then(|snapshot| snapshot.all(FINDINGS)).unwrap_or_default();
        self.resumed = resumed;
        self
    }

    /// Adds checkpoints, and resumes from `resumed`.
    pub fn kept(mut self, checkpoints: CheckpointManager, resumed: Option<Snapshot>) -> Self {
        self.checkpoints = Some(checkpoints);
        self.resuming(resumed)
    }

    /// The result of `find`, computed by rank 0 once per run however often the run is resumed.
    ///
    /// # Errors
    /// Those of `find`; if the checkpoint holds something else under that name.
    pub fn once<T: Serialize + DeserializeOwned>(
        &mut self,
        name: &str,
        find: impl FnOnce(&mut Report) -> Result<T>,
    ) -> Result<T> {
        self.kept_or(name, |report, world| world.first(|| find(report)))
    }

    /// The same where all ranks find it together, and each finds the same.
    ///
    /// # Errors
    /// Those of `find` on any rank; if the checkpoint holds something else under that name.
    pub fn once_together<T: Serialize + DeserializeOwned>(
        &mut self,
        name: &str,
        find: impl FnOnce(&mut Report) -> Result<T>,
    ) -> Result<T> {
        self.kept_or(name, |report, world| world.agree(find(report)))
    }

    /// The result that a checkpoint has under this name, or what `find` finds, which checkpoints have from now on.
    fn kept_or<T: Serialize + DeserializeOwned>(
        &mut self,
        name: &str,
        find: impl FnOnce(&mut Report, &World) -> Result<T>,
    ) -> Result<T> {
        if self.findings.has(name) {
            return self.findings.get(name);
        }
        let found = find(&mut self.report, &self.world)?;
        self.findings.put(name, &found)?;
        Ok(found)
    }

    /// Whether the run goes on from a checkpoint; asked before [`Session::resumed`] is.
    pub fn is_resumed(&self) -> bool {
        self.resumed.is_some()
    }

    /// The state that the run resumes from. Called once, at the start of a stage's loop.
    ///
    /// # Errors
    /// If the checkpoint lacks the guard's state.
    pub fn resumed(&mut self) -> Result<Option<Snapshot>> {
        let resumed = self.resumed.take();
        resumed.iter().try_for_each(|snapshot| self.guard.load(snapshot))?;
        Ok(resumed)
    }

    /// Another learner is trained from here on: the guard forgets the former one's weights and what it skipped.
    pub fn next_learner(&mut self) {
        self.guard = Guard::new(self.guard.config().clone());
    }

    /// Gives the guard the learners' first weights. Called once, before a stage's loop. Memory freed after opening
    /// files is returned to the system.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn watch(&mut self, learners: &[(&str, &mut Learner)]) -> Result<()> {
        give_back_freed();
        self.had_taken = learners.iter().map(|(_, learner)| learner.optimizer_state().step).sum();
        self.guard.watch(learners)
    }

    /// Called between two steps, after `step` of them: writes a checkpoint if one is due; if the process was asked to
    /// stop, writes one and ends the stage. A checkpoint that cannot be written is reported, and training continues.
    ///
    /// # Errors
    /// [`Interrupted`]; the errors of `state`; a base that was changed during the run.
    pub fn checkpoint(&mut self, step: usize, state: impl FnOnce() -> Result<Snapshot>) -> Result<()> {
        let due = self.checkpoints.as_ref().is_some_and(|checkpoints| checkpoints.is_due(step));
        self.keep(step, due, state)
    }

    /// Called after the last step, where something outside can still fail: the same, due or not.
    ///
    /// # Errors
    /// As for [`Session::checkpoint`].
    pub fn last_checkpoint(&mut self, step: usize, state: impl FnOnce() -> Result<Snapshot>) -> Result<()> {
        let due = self.checkpoints.as_ref().is_some_and(|checkpoints| !checkpoints.has(step));
        self.keep(step, due, state)
    }

    fn keep(&mut self, step: usize, due: bool, state: impl FnOnce() -> Result<Snapshot>) -> Result<()> {
        let stop = self.world.any(stop::requested())?;
        let kept = self.keep_own(step, stop, due, state);
        // No rank ends the others before rank 0 has kept the state.
        if stop { self.world.barrier().and(kept) } else { kept }
    }

    fn keep_own(&mut self, step: usize, stop: bool, due: bool, state: impl FnOnce() -> Result<Snapshot>) -> Result<()> {
        let Some(checkpoints) = &mut self.checkpoints else {
            let text = || format!("stopped after {}; no state of the training was kept", counted(step, "step"));
            anyhow::ensure!(!stop, Interrupted(text()));
            return Ok(());
        };
        if !stop && !due {
            return Ok(());
        }
        if stop && checkpoints.former.is_some() {
            self.report.done();
            return Err(Error::new(Interrupted("stopped before the first step; nothing was trained".into())));
        }
        let _phase = within(Phase::Save);
        let mut snapshot = state()?;
        self.guard.save(&mut snapshot)?;
        snapshot.put_all(FINDINGS, &self.findings);
        let written = checkpoints.write(step, &snapshot, &self.report).map(|path| path.display().to_string());
        match (stop, written) {
            (false, Ok(_)) => Ok(()),
            (false, Err(error)) if error.chain().any(|cause| cause.is::<std::io::Error>()) => {
                let last = checkpoints.last_good();
                self.report.warn(&format!(
                    "no checkpoint after {}: {error:#}; training goes on; {last}",
                    counted(step, "step")
                ));
                Ok(())
            }
            (false, Err(error)) => Err(error.context(checkpoints.last_good())),
            (true, written) => {
                self.report.done();
                Err(anyhow::Error::new(Interrupted(match written {
                    Ok(path) => {
                        format!(
                            "stopped after {}; all is kept in {path}. To go on:\n  {}",
                            counted(step, "step"),
                            checkpoints.resuming()
                        )
                    }
                    Err(error) => format!(
                        "stopped after {}, which could not be kept: {error:#}; {}. To go on:\n  {}",
                        counted(step, "step"),
                        checkpoints.last_good(),
                        checkpoints.resuming()
                    ),
                })))
            }
        }
    }

    /// For an error that ends the run although its state is intact, as when a reward source fails: saves the state, and adds the
    /// command that resumes the run to the error. Where a former run waits until this one has made a step, that run is worth more
    /// than a state in which nothing was trained, which is not saved.
    pub fn failed(&mut self, error: Error, step: usize, state: impl FnOnce() -> Result<Snapshot>) -> Error {
        let error = self.failed_own(error, step, state);
        // A rank that is gone has no part in this, and the error is the one to report.
        let _ = self.world.barrier();
        error
    }

    fn failed_own(&mut self, error: Error, step: usize, state: impl FnOnce() -> Result<Snapshot>) -> Error {
        let Some(checkpoints) = &mut self.checkpoints else { return error };
        self.report.done();
        if checkpoints.former.is_some() {
            return error;
        }
        let kept = state().and_then(|mut snapshot| {
            self.guard.save(&mut snapshot)?;
            snapshot.put_all(FINDINGS, &self.findings);
            checkpoints.write_in_need(step, &snapshot, &self.report).map(|path| path.display().to_string())
        });
        let kept = match kept {
            Ok(path) => format!("all before it is kept in {path}"),
            Err(trouble) => format!("it could not be kept ({trouble:#}); {}", checkpoints.last_good()),
        };
        error.context(format!(
            "stopped after {}; {kept}. To go on:\n  {}\nThe reason",
            counted(step, "step"),
            checkpoints.resuming()
        ))
    }

    /// Keeps what makes the state after the last step, until the session ends: for [`Session::unsaved`].
    pub fn ended(&mut self, step: usize, state: impl FnOnce() -> Result<Snapshot> + 'static) {
        // Who saves no state need not keep it.
        self.end = self.checkpoints.as_ref().map(|_| (step, Box::new(state) as MakeSnapshot));
    }

    /// Another learner is trained: the former one's state goes.
    pub fn begin_again(&mut self) {
        self.end = None;
    }

    /// For an error behind the last step, as when a result cannot be saved: saves the state of that step, and adds the command that
    /// saves the result from it. Any other error is returned as it is.
    pub fn unsaved(&mut self, error: Error) -> Error {
        match self.end.take() {
            Some((step, state)) if !error.is::<Interrupted>() => self.failed_own(error, step, state),
            _ => error,
        }
    }

    /// For an error of a file that a run writes beside its state: adds what is kept, and the command that goes on from it.
    pub fn unwritten(&mut self, error: Error) -> Error {
        let Some(checkpoints) = self.checkpoints.as_ref().filter(|of| of.former.is_none()) else { return error };
        self.report.done();
        error.context(format!(
            "the run ended; {}. To go on:\n  {}\nThe reason",
            checkpoints.last_good(),
            checkpoints.resuming()
        ))
    }

    /// The factor of the learning rate for the next step.
    pub fn lr_factor(&self) -> f64 {
        self.guard.factor()
    }

    /// The value of a step's outcome, or `None` if the step was skipped, which is reported and written into the
    /// metrics.
    ///
    /// # Errors
    /// Errors other than divergence, and the guard's diagnosis.
    pub fn judge<T>(
        &mut self,
        step: usize,
        outcome: Result<T>,
        learners: &mut [(&str, &mut Learner)],
    ) -> Result<Option<T>> {
        let (reason, did) = match self.guard.judge(outcome, learners)? {
            Verdict::Good(value) => {
                if let Some(checkpoints) = self.checkpoints.as_mut().filter(|of| of.former.is_some()) {
                    // Counting waits for the steps that threads make.
                    let taken: u64 = learners.iter().map(|(_, learner)| learner.optimizer_state().step).sum();
                    if taken > self.had_taken {
                        checkpoints.let_former_go()?;
                    }
                }
                return Ok(Some(value));
            }
            Verdict::Skipped(reason) => (reason, "skipped"),
            Verdict::RolledBack(reason) => (reason, "rolled_back"),
        };
        let factor = self.guard.factor();
        self.report.warn(&format!(
            "step {step}: {reason}; {}, the learning rate is now {factor} of what was asked",
            if did == "skipped" { "it is skipped" } else { "the weights are those of the last good step again" }
        ));
        let mut figures = Figures::new();
        figures.insert("guard".into(), did.into());
        figures.insert("reason".into(), reason.into());
        figures.insert("skipped".into(), self.guard.skipped().into());
        figures.insert("lr_factor".into(), number(factor));
        self.report.step(step, &figures, &[])?;
        Ok(None)
    }

    /// Called once after the last step, with the outcome of a pass with the weights that it led to: where the pass diverged,
    /// the run ends with the last good weights, which is reported and written into the metrics.
    ///
    /// # Errors
    /// As for [`Guard::settle`].
    pub fn settle(&mut self, step: usize, outcome: Result<()>, learners: &mut [(&str, &mut Learner)]) -> Result<()> {
        let Some(reason) = self.guard.settle(outcome, learners)? else { return Ok(()) };
        self.report.warn(&format!(
            "step {step}, the last, spoiled the weights: {reason}; what is saved are the last good ones. Lower the \
             learning_rate, or raise warmup_steps"
        ));
        let mut figures = Figures::new();
        figures.insert("guard".into(), "rolled_back".into());
        figures.insert("reason".into(), reason.into());
        figures.insert("skipped".into(), self.guard.skipped().into());
        figures.insert("lr_factor".into(), number(self.guard.factor()));
        self.report.step(step, &figures, &[])
    }

    /// Checks a rollout against the guard's limits.
    ///
    /// # Errors
    /// As for [`Guard::check_rollout`].
    pub fn check_rollout(&mut self, kl: f64, length: f64) -> Result<()> {
        self.guard.check_rollout(kl, length)
    }
}
