//! Direct preference optimisation (DPO): one adapter is trained on comparisons, against the reference that it started
//! as.
//!
//! It does not depend on a tokenizer or the planner. Read `loss.rs` next.

use std::borrow::Cow;

use anyhow::{Result, ensure};

use super::loss::{PairLoss, Response};
use super::responses::{Sequence, Tally, pack, spread, summed_logprobs, sums as sums_of};
use crate::config::{Dpo, DpoLoss, Supervised};
use crate::data::examples::objectives::RankedExample;
use crate::error::counted;
use crate::host::meter::{Phase, within};
use crate::invalid;
use crate::model::adapter::{Adapter, Gradients};
use crate::model::base::Base;
use crate::model::block::Recompute;
use crate::model::roles::Policy;
use crate::report::Figures;
use crate::report::progress::{Progress, Unit};
use crate::train::session::Session;
use crate::train::settings;
use crate::train::supervised::{OptimizerStep, Setup, SupervisedStage, Trained, Training};
use crate::train::world::World;

/// The stage's results; among several ranks, those of the held-out comparisons are rank 0's alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Share of held-out pairs whose better response has the higher reward; NaN if nothing is held out.
    pub accuracy: f64,
    /// Mean reward of the better held-out responses less that of the worse, in nats times beta.
    pub margin: f64,
    /// Mean held-out loss.
    pub loss: f64,
    /// Optimizer steps.
    pub steps: usize,
    /// Tokens that went through the trained policy.
    pub tokens: usize,
}

/// Trains a copy of `start` on `examples`; `held_out` only evaluates. `reference` None is the bare base. A ranking of
/// more than two responses is the mean over its pairs.
///
/// # Errors
/// If there is no example, a sequence is longer than the context, or a number is NaN or infinite.
pub fn train(
    setup: Setup<'_>,
    reference: Option<&Adapter>,
    examples: &[RankedExample],
    held_out: &[RankedExample],
    config: &Dpo,
    session: &mut Session,
) -> Result<(Adapter, Summary)> {
    if examples.is_empty() {
        return Err(invalid!("[dpo] there is no comparison to train on"));
    }
    let Setup { base, start, recompute, .. } = setup;
    let judge = Judge {
        reference: Policy::new(base, reference),
        loss: loss_of(config),
        beta: config.beta,
        evaluated_at_once: config.supervised().examples_evaluated_at_once(),
    };
    let start = start.clone().with_score_head(None)?;
    let mut training =
        Training::new(setup, &start, config.supervised(), settings::DPO_ORDER, examples, &session.world)?;
    session.report.stage("dpo", training.steps());
    session.report.note(&format!("dpo: {}, {} held out", counted(examples.len(), "comparison"), held_out.len()));
    let stored = match config.precompute_ref_log_probs {
        true => Some(judge.references(&examples.iter().collect::<Vec<_>>())?),
        false => None,
    };
    // Rank 0 evaluates.
    let held_out = if session.world.is_first() { held_out } else { &[] };
    let held_reference = judge.references(&held_out.iter().collect::<Vec<_>>())?;
    training.resume(session)?;
    let stage = Comparisons { base, judge, stored, held_out, held_reference, recompute };
    let Trained { adapter: trained, steps, tokens } = training.run(&stage, session)?;
    let after = stage.evaluation(&trained)?;
    after.distributions("dpo/eval_").for_each(|(name, found)| session.report.fact(&name, &found));
    session.report.done();
    let loss = if held_out.is_empty() { f64::NAN } else { after.loss };
    let summary = Summary { accuracy: after.accuracy(), margin: after.margin(), loss, steps, tokens };
    if !held_out.is_empty() {
        session.report.note(&format!("dpo: held-out accuracy {:.3}, margin {:.3}", summary.accuracy, summary.margin));
    }
    Ok((trained, summary))
}

/// The stage's loss and evaluation.
struct Comparisons<'w> {
    base: &'w Base,
    judge: Judge<'w>,
    /// Reference log-probabilities of the training examples, where they were computed before training.
    stored: Option<Vec<Vec<f64>>>,
    held_out: &'w [RankedExample],
    /// Reference log-probabilities of the held-out examples.
    held_reference: Vec<Vec<f64>>,
    recompute: Recompute,
}

impl Comparisons<'_> {
    fn evaluation(&self, adapter: &Adapter) -> Result<Tally> {
        self.judge.evaluate(Policy::new(self.base, Some(adapter)), self.held_out, &self.held_reference)
    }
}

/// Metrics of a step.
struct StepTally {
    /// 1 / the number of comparisons in the step, of all ranks. It divides every micro-batch's loss, so accumulation and ranks
    /// change nothing.
    weight: f64,
    tally: Tally,
}

impl SupervisedStage<RankedExample> for Comparisons<'_> {
    type Sums = StepTally;

    const TOKENS: &'static str = "num_tokens";
    const SHOWN: &'static [&'static str] = &["loss", "rewards/accuracies", "rewards/margins"];
    const COUNTS_REJECTED: bool = false;

    fn begin(&self, _: &Adapter, step: &OptimizerStep<'_, RankedExample>) -> Result<StepTally> {
        Ok(StepTally { weight: 1.0 / step.examples() as f64, tally: Tally::default() })
    }

    fn share(_: &mut StepTally, _: &World) -> Result<()> {
        Ok(())
    }

    fn gradients(
        &self,
        adapter: &Adapter,
        rows: &[usize],
        examples: &[Cow<'_, RankedExample>],
        sums: &mut StepTally,
    ) -> Result<Gradients> {
        let StepTally { weight, tally } = sums;
        let examples: Vec<&RankedExample> = examples.iter().map(|example| &**example).collect();
        let references = match &self.stored {
            Some(all) => rows.iter().map(|&i| all[i].clone()).collect(),
            None => self.judge.references(&examples)?,
        };
        let sequences = sequences(&examples);
        let (batch, targets) = pack(&sequences)?;
        let policy = Policy::new(self.base, Some(adapter));
        let (_, gradients) = policy.gradients(&batch, &targets, 1.0, self.recompute, |stats| {
            tally.tokens(stats, &targets);
            let logps = sums_of(&sequences, &stats.logprobs);
            let by_sum = self.judge.compare(&examples, &logps, &references, *weight, tally)?;
            Ok((spread(&sequences, &by_sum), vec![0.0; stats.logprobs.len()]))
        })?;
        Ok(gradients)
    }

    fn total(sums: &mut StepTally, world: &World) -> Result<()> {
        sums.tally.total(world)
    }

    fn loss(sums: &StepTally) -> f64 {
        sums.tally.loss
    }

    fn metrics(sums: &StepTally) -> Figures {
        sums.tally.figures("")
    }

    fn evaluate(&self, adapter: &Adapter) -> Result<Figures> {
        Ok(self.evaluation(adapter)?.evaluation())
    }
}

fn loss_of(config: &Dpo) -> PairLoss {
    let label_smoothing = config.label_smoothing;
    match config.loss_type {
        DpoLoss::Sigmoid => PairLoss::Sigmoid { label_smoothing },
        DpoLoss::Robust => PairLoss::Robust { label_smoothing },
        DpoLoss::Ipo => PairLoss::Ipo,
        DpoLoss::Hinge => PairLoss::Hinge,
    }
}

/// All responses of all comparisons, best first within one.
fn sequences<'e>(examples: &[&'e RankedExample]) -> Vec<Sequence<'e>> {
    let all = examples.iter().flat_map(|e| e.responses.iter().map(|response| Sequence { prompt: &e.prompt, response }));
    all.collect()
}

/// Computes the loss from comparisons under a policy and under the reference.
struct Judge<'w> {
    reference: Policy<'w>,
    loss: PairLoss,
    beta: f64,
    /// Most comparisons per pass of an evaluation.
    evaluated_at_once: usize,
}

impl Judge<'_> {
    /// Log-probabilities of each comparison's responses under the reference, one comparison per pass: a matrix product
    /// with other rows beside them rounds the last bit differently, and the values computed once must equal those of
    /// every step.
    fn references(&self, examples: &[&RankedExample]) -> Result<Vec<Vec<f64>>> {
        let mut progress = Progress::new("reference", examples.len(), Unit::Of("comparison"));
        let one = |&example: &&RankedExample| {
            let found = summed_logprobs(self.reference, &sequences(&[example]));
            progress.add(1);
            found
        };
        examples.iter().map(one).collect()
    }

    /// dL/dlogp of every response; `weight` divides by the comparisons of the step.
    fn compare(
        &self,
        examples: &[&RankedExample],
        logps: &[f64],
        references: &[Vec<f64>],
        weight: f64,
        tally: &mut Tally,
    ) -> Result<Vec<f64>> {
        let mut by_sum = vec![0.0; logps.len()];
        let mut first = 0;
        for (example, references) in examples.iter().zip(references) {
            let k = example.responses.len();
            ensure!(
                k >= 2 && references.len() == k,
                "{k} responses compared, {} under the reference",
                references.len()
            );
            let response = |i: usize| Response {
                logp: logps[first + i],
                reference: references[i],
                tokens: example.responses[i].len(),
            };
            let share = weight / (k * (k - 1) / 2) as f64;
            for (better, worse) in (0..k).flat_map(|i| (i + 1..k).map(move |j| (i, j))) {
                let (chosen, rejected) = (response(better), response(worse));
                let found = self.loss.of(self.beta, chosen, rejected)?;
                by_sum[first + better] += share * found.chosen;
                by_sum[first + worse] += share * found.rejected;
                tally.loss += share * found.loss;
                tally.response(true, self.beta * chosen.log_ratio(), chosen.logp);
                tally.response(false, self.beta * rejected.log_ratio(), rejected.logp);
                tally.pair(chosen.log_ratio() > rejected.log_ratio());
            }
            first += k;
        }
        Ok(by_sum)
    }

    fn evaluate(&self, policy: Policy<'_>, examples: &[RankedExample], references: &[Vec<f64>]) -> Result<Tally> {
        let _phase = within(Phase::Evaluation);
        let mut tally = Tally::default();
        let mut progress = Progress::new("evaluation", examples.len(), Unit::Of("comparison"));
        let size = self.evaluated_at_once;
        for (some, references) in examples.chunks(size).zip(references.chunks(size)) {
            let some: Vec<&RankedExample> = some.iter().collect();
            let logps = summed_logprobs(policy, &sequences(&some))?;
            self.compare(&some, &logps, references, 1.0 / examples.len() as f64, &mut tally)?;
            progress.add(some.len());
        }
        Ok(tally)
    }
}
