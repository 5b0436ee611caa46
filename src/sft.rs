//! Supervised fine-tuning: one adapter is trained by cross-entropy on the tokens that the loss mask marks.
//!
//! [`train`] is the stage on examples in memory; `run/sft.rs` reads config and files around it. It does not depend on
//! another stage. Read `train/supervised.rs` next.

use std::borrow::Cow;

use anyhow::Result;

use crate::config::{Sft, Supervised};
use crate::data::examples::objectives::SftExample;
use crate::data::examples::{Examples, PassSize, passes, pick};
use crate::error::counted;
use crate::host::meter::{Phase, within};
use crate::invalid;
use crate::model::adapter::{Adapter, Gradients};
use crate::model::base::Base;
use crate::model::batch::{Batch, Targets};
use crate::model::block::Recompute;
use crate::model::roles::Policy;
use crate::report::progress::{Progress, Unit};
use crate::report::{Figures, number};
use crate::train::session::Session;
use crate::train::settings;
use crate::train::supervised::{OptimizerStep, Setup, SupervisedStage, Training};
use crate::train::world::World;

/// The stage's results.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// e^(mean negative log-probability) of the held-out targets before training; NaN if nothing is held out.
    pub perplexity_before: f64,
    /// The same after training, on rank 0; NaN on others.
    pub perplexity_after: f64,
    /// Optimizer steps.
    pub steps: usize,
    /// Tokens that went through the network in training.
    pub tokens: usize,
}

/// Trains a copy of `start` on `examples`; `held_out` only evaluates.
///
/// L = -sum of log-probabilities of an optimizer step's targets over their number.
///
/// # Errors
/// If there is no example, a sequence is longer than the context, the guard gives up, or the process was asked to stop.
pub fn train(
    setup: Setup<'_>,
    examples: &(impl Examples<SftExample> + ?Sized),
    held_out: &(impl Examples<SftExample> + ?Sized),
    config: &Sft,
    session: &mut Session,
) -> Result<(Adapter, Summary)> {
    if examples.is_empty() {
        return Err(invalid!("[sft] there is no record to train on"));
    }
    let Setup { base, start, recompute, .. } = setup;
    let start = start.clone().with_score_head(None)?;
    let mut training =
        Training::new(setup, &start, config.supervised(), settings::SFT_ORDER, examples, &session.world)?;
    session.report.stage("sft", training.steps());
    // JSON has no NaN, so the finding is an option.
    let size = settings::evaluation_size(&config.supervised());
    let found = session.once("perplexity_before", |_| perplexity(base, &start, held_out, size).map(Some))?;
    let perplexity_before = found.unwrap_or(f64::NAN);
    training.resume(session)?;
    session.report.note(&match held_out.len() {
        0 => format!("sft: {}, none held out", counted(examples.len(), "record")),
        _ => format!("sft: {}, held-out perplexity {perplexity_before:.3} before", counted(examples.len(), "record")),
    });
    let trained = training.run(&CrossEntropy { base, held_out, size, recompute }, session)?;
    let perplexity_after = match session.world.is_first() {
        true => perplexity(base, &trained.adapter, held_out, size)?,
        false => f64::NAN,
    };
    session.report.done();
    if !held_out.is_empty() {
        session.report.note(&format!("sft: held-out perplexity {perplexity_before:.3} -> {perplexity_after:.3}"));
    }
    let summary = Summary { perplexity_before, perplexity_after, steps: trained.steps, tokens: trained.tokens };
    Ok((trained.adapter, summary))
}

/// The stage's loss and evaluation.
struct CrossEntropy<'w, H: ?Sized> {
    base: &'w Base,
    held_out: &'w H,
    size: PassSize,
    recompute: Recompute,
}

/// The loss of a step.
struct StepLoss {
    /// This rank's number of targets in the step.
    targets: usize,
    /// 1 / the number of targets in the step, of all ranks. It divides every micro-batch's loss, so accumulation and ranks
    /// change nothing.
    weight: f64,
    loss: f64,
}

impl<H: Examples<SftExample> + ?Sized> SupervisedStage<SftExample> for CrossEntropy<'_, H> {
    type Sums = StepLoss;

    const TOKENS: &'static str = "tokens";
    const SHOWN: &'static [&'static str] = &["loss", "grad_norm", "eval_perplexity"];
    const COUNTS_REJECTED: bool = true;

    fn begin(&self, _: &Adapter, step: &OptimizerStep<'_, SftExample>) -> Result<StepLoss> {
        let targets = |example: &Cow<'_, SftExample>| example.loss_mask.iter().filter(|&&marked| marked).count();
        let targets: usize = step.batches.iter().flatten().map(targets).sum();
        Ok(StepLoss { targets, weight: f64::NAN, loss: 0.0 })
    }

    fn share(sums: &mut StepLoss, world: &World) -> Result<()> {
        let mut targets = [sums.targets as f64];
        world.sum(&mut targets)?;
        sums.weight = 1.0 / targets[0];
        Ok(())
    }

    fn gradients(
        &self,
        adapter: &Adapter,
        _: &[usize],
        examples: &[Cow<'_, SftExample>],
        sums: &mut StepLoss,
    ) -> Result<Gradients> {
        let (batch, targets) = pack(examples)?;
        let policy = Policy::new(self.base, Some(adapter));
        let (_, gradients) = policy.gradients(&batch, &targets, 1.0, self.recompute, |stats| {
            sums.loss -= stats.logprobs.iter().map(|&l| f64::from(l)).sum::<f64>() * sums.weight;
            Ok((vec![-sums.weight as f32; stats.logprobs.len()], vec![0.0; stats.logprobs.len()]))
        })?;
        Ok(gradients)
    }

    fn total(sums: &mut StepLoss, world: &World) -> Result<()> {
        world.sum(std::slice::from_mut(&mut sums.loss))
    }

    fn loss(sums: &StepLoss) -> f64 {
        sums.loss
    }

    fn metrics(sums: &StepLoss) -> Figures {
        Figures::from_iter([("loss".to_owned(), number(sums.loss))])
    }

    fn evaluate(&self, adapter: &Adapter) -> Result<Figures> {
        let perplexity = perplexity(self.base, adapter, self.held_out, self.size)?;
        Ok(Figures::from_iter([("eval_perplexity".to_owned(), number(perplexity))]))
    }
}

/// Packs examples into a batch; the targets are the tokens that their masks mark.
pub(crate) fn pack(examples: &[Cow<'_, SftExample>]) -> Result<(Batch, Targets)> {
    let (mut sequences, mut mask) = (vec![], vec![]);
    for example in examples {
        sequences.push(&example.tokens[..]);
        mask.extend_from_slice(&example.loss_mask);
    }
    let batch = Batch::new(&sequences)?;
    let targets = Targets::masked(&batch, &mask)?;
    Ok((batch, targets))
}

/// e^(mean negative log-probability) over all marked tokens, in passes of `size`; NaN if there is none. The mean is summed
/// token by token in f64, so that passes of another size change no more than the rounding of the matrix products.
///
/// # Errors
/// If a sequence is longer than the context.
pub fn perplexity(
    base: &Base,
    adapter: &Adapter,
    examples: &(impl Examples<SftExample> + ?Sized),
    size: PassSize,
) -> Result<f64> {
    let _phase = within(Phase::Evaluation);
    let (mut sum, mut count) = (0f64, 0usize);
    let mut progress = Progress::new("evaluation", examples.len(), Unit::Of("record"));
    for rows in passes(examples, size) {
        progress.set(rows.start);
        let (batch, targets) = pack(&pick(examples, rows)?)?;
        let stats = Policy::new(base, Some(adapter)).logprobs(&batch, &targets, 1.0)?;
        sum = stats.logprobs.iter().fold(sum, |sum, &logprob| sum - f64::from(logprob));
        count += stats.logprobs.len();
    }
    Ok((sum / count as f64).exp())
}
