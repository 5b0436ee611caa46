//! The one training loop of every supervised stage: SFT, reward model, DPO and KTO.
//!
//! It resumes, writes checkpoints, walks the examples in their order, accumulates gradients over micro-batches, steps
//! the optimizer by the schedule, lets the guard judge each step, evaluates and logs. A stage gives its loss per
//! micro-batch and its evaluation ([`SupervisedStage`]). It does not depend on a stage or on the planner. Read
//! `../sft.rs` next.

use std::borrow::Cow;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::config::SupervisedKeys;
use crate::data::examples::batch_sampler::{BatchSampler, Shard};
use crate::data::examples::{Example, Examples, pick};
use crate::diverged;
use crate::error::is_of_machine;
use crate::host::meter::{Phase, within};
use crate::model::adapter::{Adapter, Gradients};
use crate::model::base::Base;
use crate::model::block::Recompute;
use crate::report::{Figures, number};
use crate::train::learner::Learner;
use crate::train::progress::Progress;
use crate::train::session::Session;
use crate::train::snapshot::Snapshot;
use crate::train::world::World;
use crate::train::{settings, stop};

/// What a supervised stage trains from, besides its examples and its section of the config.
#[derive(Clone, Copy)]
pub struct Setup<'w> {
    /// The frozen base.
    pub base: &'w Base,
    /// The adapter that training starts from; a copy of it is trained.
    pub start: &'w Adapter,
    /// Activations that each block recomputes in the backward pass. It changes memory and time, never a result;
    /// `planner::plan::resolve` finds it where a config says `auto`.
    pub recompute: Recompute,
    /// Seed of every random draw.
    pub seed: u64,
}

/// A rank's examples of one optimizer step.
pub struct OptimizerStep<'s, T: Clone> {
    /// Number of the step in the run, from 0.
    pub number: usize,
    /// Rows of each micro-batch among the training examples.
    pub rows: &'s [&'s [usize]],
    /// The examples of each micro-batch, in the order of `rows`.
    pub batches: &'s [Vec<Cow<'s, T>>],
    /// Rows of each micro-batch of all ranks, as one rank would have them.
    pub of_all: &'s [&'s [usize]],
}

impl<T: Clone> OptimizerStep<'_, T> {
    /// The number of examples in the step, of all ranks.
    pub fn examples(&self) -> usize {
        self.of_all.iter().map(|rows| rows.len()).sum()
    }
}

/// What a stage adds to the loop.
pub trait SupervisedStage<T: Clone> {
    /// The loss and the metrics of a step, summed over its micro-batches.
    type Sums;

    /// Name of the token count in metrics.jsonl.
    const TOKENS: &'static str;
    /// Metrics shown on stderr.
    const SHOWN: &'static [&'static str];
    /// Whether the tokens of a step that the guard rejects count.
    const COUNTS_REJECTED: bool;

    /// Called before the first micro-batch of a step, with the adapter under training.
    ///
    /// # Errors
    /// Those of a forward pass, where the stage needs one.
    fn begin(&self, adapter: &Adapter, step: &OptimizerStep<'_, T>) -> Result<Self::Sums>;

    /// Called behind [`SupervisedStage::begin`]: puts what the step's loss needs of all ranks into `sums`.
    ///
    /// # Errors
    /// If a rank is gone.
    fn share(sums: &mut Self::Sums, world: &World) -> Result<()>;

    /// Gradients of one micro-batch's share of the step's loss; what it adds to the metrics goes into `sums`.
    ///
    /// # Errors
    /// If a sequence is longer than the context, or a number is NaN or infinite.
    fn gradients(
        &self,
        adapter: &Adapter,
        rows: &[usize],
        examples: &[Cow<'_, T>],
        sums: &mut Self::Sums,
    ) -> Result<Gradients>;

    /// Called behind the last micro-batch: the sums of all ranks take the place of this rank's.
    ///
    /// # Errors
    /// If a rank is gone.
    fn total(sums: &mut Self::Sums, world: &World) -> Result<()>;

    /// The step's loss.
    fn loss(sums: &Self::Sums) -> f64;

    /// The step's metrics, the loss among them.
    fn metrics(sums: &Self::Sums) -> Figures;

    /// What samples.jsonl gets of a logged step; nothing for a stage that samples nothing.
    fn samples(&self, _sums: &Self::Sums, _step: usize) -> Vec<Value> {
        vec![]
    }

    /// Metrics of the held-out examples under the adapter.
    ///
    /// # Errors
    /// If a sequence is longer than the context, or a number is NaN or infinite.
    fn evaluate(&self, adapter: &Adapter) -> Result<Figures>;
}

/// The loop's own state and settings, built before the stage evaluates anything.
pub struct Training<'e, E: ?Sized> {
    examples: &'e E,
    keys: SupervisedKeys,
    sampler: BatchSampler,
    steps: usize,
    /// `None` once it was trained.
    progress: Option<Progress>,
    layers: usize,
}

/// What the loop leaves.
pub struct Trained {
    /// The adapter after the last step.
    pub adapter: Adapter,
    /// Optimizer steps.
    pub steps: usize,
    /// Tokens of the examples trained on.
    pub tokens: usize,
}

/// The learners of the same run that are trained already, one after another.
#[derive(Clone, Debug, Default)]
pub struct Finished {
    /// Their adapters.
    pub adapters: Vec<Adapter>,
    /// Their optimizer steps, all together.
    pub steps: usize,
    /// Their tokens, likewise.
    pub tokens: usize,
}

const FINISHED: &str = "finished";
/// [`Training::run`] is called once.
const TRAINED: &str = "the learner is trained already";

impl Finished {
    /// Those of a checkpoint; none where it has none. `like` has the adapters' shape.
    ///
    /// # Errors
    /// If they are of another shape.
    pub fn load(from: &Snapshot, like: &Adapter) -> Result<Self> {
        if !from.has(FINISHED) {
            return Ok(Self::default());
        }
        let (count, steps, tokens): (usize, usize, usize) = from.get(FINISHED)?;
        let adapters = (0..count).map(|i| from.adapter(&format!("{FINISHED} {i}"), like)).collect::<Result<_>>()?;
        Ok(Self { adapters, steps, tokens })
    }

    fn save(&self, into: &mut Snapshot) -> Result<()> {
        into.put(FINISHED, &(self.adapters.len(), self.steps, self.tokens))?;
        let mut all = self.adapters.iter().enumerate();
        all.try_for_each(|(i, adapter)| into.put_adapter(&format!("{FINISHED} {i}"), adapter))
    }
}

impl<'e, E: ?Sized> Training<'e, E> {
    /// Prepares the training of `start` among the ranks of `world`. `stream` is the stage's stream of the seed for the order of
    /// its examples.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn new<T: Example>(
        setup: Setup<'_>,
        start: &Adapter,
        keys: SupervisedKeys,
        stream: u64,
        examples: &'e E,
        world: &World,
    ) -> Result<Self>
    where
        E: Examples<T>,
    {
        let adamw = settings::adamw(&keys.optimisation);
        let learner = Learner::new(start.to_trainable(), adamw, keys.optimisation.max_grad_norm)?;
        let shard = Shard { rank: world.rank(), world_size: world.size() };
        let sampler = BatchSampler { shard, ..settings::sampler(&keys, setup.seed, stream) };
        let steps = sampler.steps(examples, keys.num_train_epochs);
        let layers = setup.base.shapes().layers;
        Ok(Self { examples, keys, sampler, steps, progress: Some(Progress::new(learner)), layers })
    }

    /// Optimizer steps of the whole run.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// The order of the examples of all ranks.
    pub fn sampler(&self) -> BatchSampler {
        self.sampler.of_all()
    }

    /// Takes up the checkpoint that the session resumes from, where there is one.
    ///
    /// # Errors
    /// If the checkpoint is of another shape.
    pub fn resume(&mut self, session: &mut Session) -> Result<()> {
        let snapshot = session.resumed()?;
        self.go_on(snapshot, session)
    }

    /// Takes up a checkpoint that the session gave already, where there is one.
    ///
    /// # Errors
    /// As for [`Training::resume`].
    pub fn go_on(&mut self, from: Option<Snapshot>, session: &mut Session) -> Result<()> {
        let progress = self.progress.as_mut().context(TRAINED)?;
        if let Some(snapshot) = from {
            progress.load(&snapshot)?;
        }
        session.watch(&[("learner", &mut progress.learner)])
    }

    /// Trains to the end of the last epoch, once. The session has the state from then on: whatever fails before the result is saved
    /// costs none of it.
    ///
    /// # Errors
    /// Those of `stage`; if the guard gives up, or the process was asked to stop.
    pub fn run<T: Example + Clone, S: SupervisedStage<T>>(
        &mut self,
        stage: &S,
        session: &mut Session,
    ) -> Result<Trained>
    where
        E: Examples<T>,
    {
        self.run_behind(None, stage, session)
    }

    /// The same as one of several learners: steps are counted behind those of the finished ones, which checkpoints hold, too,
    /// and metrics have the number of the member.
    ///
    /// # Errors
    /// Those of [`Training::run`].
    pub fn run_after<T: Example + Clone, S: SupervisedStage<T>>(
        &mut self,
        finished: &Finished,
        stage: &S,
        session: &mut Session,
    ) -> Result<Trained>
    where
        E: Examples<T>,
    {
        let progress = self.progress.as_mut().context(TRAINED)?;
        if !finished.adapters.is_empty() && progress.step == 0 {
            session.next_learner();
            session.watch(&[("learner", &mut progress.learner)])?;
        }
        self.run_behind(Some(finished), stage, session)
    }

    fn run_behind<T: Example + Clone, S: SupervisedStage<T>>(
        &mut self,
        finished: Option<&Finished>,
        stage: &S,
        session: &mut Session,
    ) -> Result<Trained>
    where
        E: Examples<T>,
    {
        let mut trained = self.progress.take().context(TRAINED)?;
        let (keys, steps, progress) = (self.keys, self.steps, &mut trained);
        let world = session.world.clone();
        let before = finished.map_or(0, |finished| finished.steps);
        let snapshot = |progress: &Progress| -> Result<Snapshot> {
            let mut snapshot = progress.snapshot()?;
            finished.map_or(Ok(()), |finished| finished.save(&mut snapshot))?;
            Ok(snapshot)
        };
        if let Some(text) = settings::unreached(&keys.optimisation, steps) {
            session.report.warn(&format!("warning: {text}"));
        }
        let schedule = settings::schedule(&keys.optimisation, keys.optimisation.learning_rate);
        let mut order = self.sampler.from(self.examples, progress.cursor, keys.num_train_epochs);
        loop {
            session.checkpoint(before + progress.step, || snapshot(progress))?;
            let Some(step) = order.next_step() else { break };
            let batches = step.batches.iter().map(|rows| pick(self.examples, rows.iter().copied()));
            let batches = batches.collect::<Result<Vec<_>>>()?;
            let tokens: usize = step.of_all.concat().into_iter().map(|row| self.examples.tokens(row)).sum();
            let owned = |of: &[&[usize]], most: usize| -> Vec<Vec<usize>> {
                of.iter().take(most).map(|rows| rows.to_vec()).collect()
            };
            let first = [owned(&step.batches, 1), owned(&step.of_all, world.size())];
            let (rows, of_all) = (&step.batches, &step.of_all);
            let step = OptimizerStep { number: progress.step, rows, batches: &batches, of_all };
            // 1. Forward and backward.
            let begun = Instant::now();
            let update = within(Phase::Update);
            let gradients = gradients(stage, progress.learner.weights().view(), &step, self.layers, &world);
            // Asked to stop: the checkpoint at the top of the loop ends the stage.
            let Some(gradients) = gradients.transpose() else { continue };
            let gradients = match gradients {
                // No learner has stepped: a resumed run repeats this step.
                Err(error) if is_of_machine(&error) => {
                    return Err(session.failed(error, before + progress.step, || snapshot(progress)));
                }
                gradients => gradients,
            };
            // 2. Optimizer step.
            drop(update);
            let _step = within(Phase::Step);
            let lr = schedule.lr_at(progress.step, steps) * session.lr_factor();
            let outcome = gradients.and_then(|(g, sums)| Ok((sums, progress.learner.step(g, lr)?)));
            progress.cursor = order.cursor();
            progress.step += 1;
            progress.tokens += if outcome.is_ok() || S::COUNTS_REJECTED { tokens } else { 0 };
            let step = progress.step;
            session.report.passed(tokens, begun.elapsed());
            let stepped = session.judge(before + step, outcome, &mut [("learner", &mut progress.learner)])?;
            if step == steps {
                let [rows, of_all] = first.each_ref().map(|of| of.iter().map(Vec::as_slice).collect::<Vec<_>>());
                let batches = &batches[..rows.len()];
                let first = OptimizerStep { number: step - 1, rows: &rows, batches, of_all: &of_all };
                let outcome = prove(stage, progress.learner.weights().view(), &first, self.layers, &world);
                session.settle(before + step, outcome, &mut [("learner", &mut progress.learner)])?;
            }
            let Some((sums, grad_norm)) = stepped else { continue };
            // 3. Metrics.
            if step.is_multiple_of(keys.logging_steps.max(1)) || step == steps {
                let mut metrics = S::metrics(&sums);
                metrics.insert("grad_norm".into(), number(grad_norm));
                metrics.insert("lr".into(), number(lr));
                if let Some(finished) = finished {
                    metrics.insert("member".into(), finished.adapters.len().into());
                }
                metrics.insert(S::TOKENS.into(), progress.tokens.into());
                metrics.insert("epoch".into(), number((step * keys.num_train_epochs) as f64 / steps as f64));
                if keys.eval_steps > 0 && step.is_multiple_of(keys.eval_steps) {
                    metrics.extend(world.first(|| stage.evaluate(progress.learner.weights().view()))?);
                }
                if let Some(lap) = world.lap()? {
                    lap.warning.iter().for_each(|text| session.report.warn(&format!("warning: {text}")));
                    metrics.extend(lap.metrics());
                }
                let samples = stage.samples(&sums, before + step);
                let logged = session.report.step(before + step, &metrics, S::SHOWN);
                let logged = logged.and_then(|()| samples.iter().try_for_each(|sample| session.report.sample(sample)));
                // A state behind a line that is missing would resume to other metrics.
                logged.map_err(|error| session.unwritten(error))?;
            }
        }
        world.check_equal(&progress.learner.weights().parameters()?)?;
        let (adapter, tokens) = (progress.learner.weights().snapshot(), progress.tokens);
        let (step, finished) = (before + progress.step, finished.cloned());
        session.ended(step, move || {
            let mut snapshot = trained.snapshot()?;
            finished.map_or(Ok(()), |finished| finished.save(&mut snapshot))?;
            Ok(snapshot)
        });
        Ok(Trained { adapter, steps, tokens })
    }
}

/// A pass of each rank's first micro-batch of the last step with the weights that the step led to. A step's loss is that of the
/// weights before it, and after the last one no other step shows whether they are good.
fn prove<T: Clone, S: SupervisedStage<T>>(
    stage: &S,
    adapter: &Adapter,
    step: &OptimizerStep<'_, T>,
    layers: usize,
    world: &World,
) -> Result<()> {
    let _update = within(Phase::Update);
    gradients(stage, adapter, step, layers, world).map(drop)
}

/// The gradients of a step and its sums, of all ranks; `None` where the process was asked to stop before the last micro-batch.
/// Several ranks stop between two steps alone, since they have to do so together.
fn gradients<T: Clone, S: SupervisedStage<T>>(
    stage: &S,
    adapter: &Adapter,
    step: &OptimizerStep<'_, T>,
    layers: usize,
    world: &World,
) -> Result<Option<(Gradients, S::Sums)>> {
    let mut sums = world.agree(stage.begin(adapter, step))?;
    S::share(&mut sums, world)?;
    let mut own = || {
        let mut gradients = Gradients::none(layers);
        for (rows, examples) in step.rows.iter().zip(step.batches) {
            if world.is_alone() && stop::requested() {
                return Ok(None);
            }
            gradients.add(stage.gradients(adapter, rows, examples, &mut sums)?)?;
        }
        Ok(Some(gradients))
    };
    let Some(gradients) = world.agree(own())? else { return Ok(None) };
    let gradients = world.sum_gradients(gradients)?;
    S::total(&mut sums, world)?;
    let loss = S::loss(&sums);
    ensure!(loss.is_finite(), diverged!("the loss is {loss}"));
    Ok(Some((gradients, sums)))
}
