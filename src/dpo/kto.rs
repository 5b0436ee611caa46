//! Kahneman-Tversky optimisation (KTO): one adapter is trained on responses labelled desirable or undesirable, against
//! the reference that it started as.
//!
//! It does not depend on a tokenizer or the planner. Read `loss.rs` next.

use std::borrow::Cow;
use std::collections::HashSet;

use anyhow::{Context, Result};

use super::loss::{KtoLoss, mismatched_kl};
use super::responses::{Sequence, Tally, pack, spread, summed_logprobs, summed_logprobs_with, sums as sums_of};
use crate::config::{Kto, Supervised};
use crate::data::examples::batch_sampler::BatchSampler;
use crate::data::examples::objectives::UnpairedExample;
use crate::error::counted;
use crate::host::meter::{Phase, within};
use crate::invalid;
use crate::model::adapter::{Adapter, Gradients};
use crate::model::base::Base;
use crate::model::block::Recompute;
use crate::model::roles::Policy;
use crate::report::progress::{Progress, Unit};
use crate::report::{Figures, number};
use crate::train::session::Session;
use crate::train::settings;
use crate::train::supervised::{OptimizerStep, Setup, SupervisedStage, Trained, Training};
use crate::train::world::World;

/// The stage's results; among several ranks, those of the held-out responses are rank 0's alone.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Mean reward of the desirable held-out responses minus that of the undesirable; NaN if one kind is missing.
    pub margin: f64,
    /// Mean held-out loss; NaN if fewer than two responses are held out.
    pub loss: f64,
    /// Desirable and undesirable responses trained on.
    pub counts: [usize; 2],
    /// Optimizer steps.
    pub steps: usize,
    /// Tokens that went through the trained policy with a gradient.
    pub tokens: usize,
}

/// Trains a copy of `start` on `examples`; `held_out` only evaluates. `reference` None is the bare base.
///
/// The KL term of an optimizer step is [`mismatched_kl`] over its responses, each put after the prompt of the next one
/// in the step: TRL's estimate, over the whole step rather than a micro-batch, so that accumulation changes nothing. A
/// prompt with another's response may be longer than any record: the response then loses its last tokens, so that both
/// have `max_length` tokens, as in TRL.
///
/// # Errors
/// If there are fewer than two examples, a sequence is longer than the context, or a number is NaN or infinite.
pub fn train(
    setup: Setup<'_>,
    reference: Option<&Adapter>,
    examples: &[UnpairedExample],
    held_out: &[UnpairedExample],
    config: &Kto,
    max_length: usize,
    session: &mut Session,
) -> Result<(Adapter, Summary)> {
    check(examples.len(), held_out.len())?;
    let Kto { beta, desirable_weight, undesirable_weight, .. } = *config;
    let Setup { base, start, recompute, .. } = setup;
    let judge = Judge {
        reference: Policy::new(base, reference),
        loss: KtoLoss { beta, desirable_weight, undesirable_weight },
        max_length,
        evaluated_at_once: config.supervised().examples_evaluated_at_once(),
    };
    let start = start.clone().with_score_head(None)?;
    let mut training =
        Training::new(setup, &start, config.supervised(), settings::KTO_ORDER, examples, &session.world)?;
    let good = examples.iter().filter(|e| e.desirable).count();
    session.report.stage("kto", training.steps());
    session.report.note(&format!(
        "kto: {good} good and {}, {} held out",
        counted(examples.len() - good, "bad response"),
        held_out.len()
    ));
    if good == 0 || good == examples.len() {
        let (there, missing) = if good == 0 { ("undesirable", "desirable") } else { ("desirable", "undesirable") };
        session.report.warn(&format!(
            "kto: warning: every response is labelled {there}, so nothing shows the model what tells good from bad; add \
             {missing} ones, or look at the label column of the data"
        ));
    }
    let all: Vec<&UnpairedExample> = examples.iter().collect();
    let stored = match config.precompute_ref_log_probs {
        true => Some(judge.reference_of(&all)?),
        false => None,
    };
    // Rank 0 evaluates.
    let held_out = if session.world.is_first() { held_out } else { &[] };
    let held: Vec<&UnpairedExample> = held_out.iter().collect();
    let held_reference = judge.reference_of(&held)?;
    training.resume(session)?;
    let sampler = training.sampler();
    let stage = Responses { base, judge, examples, sampler, stored, held, held_reference, recompute };
    let Trained { adapter: trained, steps, tokens } = training.run(&stage, session)?;
    let after = stage.evaluation(&trained)?;
    after.distributions("kto/eval_").for_each(|(name, found)| session.report.fact(&name, &found));
    session.report.done();
    let loss = if held_out.len() < 2 { f64::NAN } else { after.loss };
    if held_out.len() > 1 {
        session.report.note(&format!("kto: held-out loss {loss:.4}, margin {:.3}", after.margin()));
    }
    let counts = [good, examples.len() - good];
    Ok((trained, Summary { margin: after.margin(), loss, counts, steps, tokens }))
}

/// Refuses too few responses to train on.
///
/// # Errors
/// If there are fewer than two.
pub fn check(train: usize, held_out: usize) -> Result<()> {
    if train >= 2 {
        return Ok(());
    }
    let remedy = match held_out {
        0 => "give more records".to_owned(),
        1 => format!("1 of {} is held out: give more, or set [data] eval_rows = 0", train + 1),
        _ => format!("{held_out} of {} are held out: give more, or set [data] eval_rows = 0", train + held_out),
    };
    Err(invalid!(
        "[kto] needs two responses or more to train on, because the KL term puts one's response after another's prompt, and \
         there {} {train}; {remedy}",
        if train == 1 { "is" } else { "are" }
    ))
}

/// The stage's loss and evaluation.
struct Responses<'w> {
    base: &'w Base,
    judge: Judge<'w>,
    examples: &'w [UnpairedExample],
    sampler: BatchSampler,
    /// Reference log-probabilities of the training examples, where they were computed before training.
    stored: Option<Vec<f64>>,
    held: Vec<&'w UnpairedExample>,
    /// Reference log-probabilities of the held-out examples.
    held_reference: Vec<f64>,
    recompute: Recompute,
}

impl Responses<'_> {
    fn evaluation(&self, adapter: &Adapter) -> Result<Tally> {
        self.judge.evaluate(Policy::new(self.base, Some(adapter)), &self.held, &self.held_reference)
    }
}

/// Metrics of a step.
struct StepTally {
    /// 1 / the number of responses in the step, of all ranks. It divides every micro-batch's loss, so accumulation and ranks
    /// change nothing.
    weight: f64,
    /// This rank's log-ratios of the responses that the KL term is computed from.
    log_ratios: Vec<f64>,
    /// The KL term of the step, nats.
    kl: f64,
    tally: Tally,
}

/// The rows `own` of a rank, each with the one in front of it among `rows`, those of all ranks in a step, whichever rank has that;
/// `before` stands in front of the first.
pub(crate) fn with_others(rows: &[usize], own: &[usize], before: usize) -> Vec<(usize, usize)> {
    let own: HashSet<usize> = own.iter().copied().collect();
    let others = std::iter::once(before).chain(rows.iter().copied());
    rows.iter().copied().zip(others).filter(|(row, _)| own.contains(row)).collect()
}

impl SupervisedStage<UnpairedExample> for Responses<'_> {
    type Sums = StepTally;

    const TOKENS: &'static str = "num_tokens";
    const SHOWN: &'static [&'static str] = &["loss", "kl", "rewards/margins"];
    const COUNTS_REJECTED: bool = false;

    /// Computes the KL term from responses after prompts that they were not given to. A step with a single record (the
    /// last of an epoch) takes the last response of the step before.
    fn begin(&self, adapter: &Adapter, step: &OptimizerStep<'_, UnpairedExample>) -> Result<StepTally> {
        let rows: Vec<usize> = step.of_all.concat();
        let before = match rows.len() {
            1 => {
                let per_epoch = self.sampler.steps(self.examples, 1);
                let (epoch, number) = (step.number / per_epoch, step.number % per_epoch);
                self.sampler.epoch(self.examples, epoch).step(number.saturating_sub(1)).rows().last()
            }
            _ => rows.last().copied(),
        };
        let before = before.context("a step has a record")?;
        let pairs = with_others(&rows, &step.rows.concat(), before).into_iter();
        let pairs: Vec<_> = pairs.map(|(row, other)| (&self.examples[row], &self.examples[other])).collect();
        let log_ratios = self.judge.log_ratios(Policy::new(self.base, Some(adapter)), &pairs)?;
        Ok(StepTally { weight: 1.0 / rows.len() as f64, log_ratios, kl: f64::NAN, tally: Tally::default() })
    }

    fn share(sums: &mut StepTally, world: &World) -> Result<()> {
        sums.kl = mismatched_kl(&world.concat(std::mem::take(&mut sums.log_ratios))?);
        Ok(())
    }

    fn gradients(
        &self,
        adapter: &Adapter,
        rows: &[usize],
        examples: &[Cow<'_, UnpairedExample>],
        sums: &mut StepTally,
    ) -> Result<Gradients> {
        let StepTally { weight, kl, tally, .. } = sums;
        let examples: Vec<&UnpairedExample> = examples.iter().map(|example| &**example).collect();
        let references = match &self.stored {
            Some(all) => rows.iter().map(|&i| all[i]).collect(),
            None => self.judge.reference_of(&examples)?,
        };
        let sequences = sequences(&examples);
        let (batch, targets) = pack(&sequences)?;
        let policy = Policy::new(self.base, Some(adapter));
        let (_, gradients) = policy.gradients(&batch, &targets, 1.0, self.recompute, |stats| {
            tally.tokens(stats, &targets);
            let logps = sums_of(&sequences, &stats.logprobs);
            let by_sum = self.judge.weigh(&examples, &logps, &references, *kl, *weight, tally)?;
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
        let mut metrics = sums.tally.figures("");
        metrics.insert("kl".into(), number(sums.kl));
        metrics
    }

    fn evaluate(&self, adapter: &Adapter) -> Result<Figures> {
        Ok(self.evaluation(adapter)?.evaluation())
    }
}

fn sequences<'e>(examples: &[&'e UnpairedExample]) -> Vec<Sequence<'e>> {
    examples.iter().map(|e| Sequence { prompt: &e.prompt, response: &e.response }).collect()
}

/// A prompt with another example's response, which loses the tokens past `max_length`. The prompt is shorter than that,
/// since a response token of its own follows it.
fn mismatched<'e>(example: &'e UnpairedExample, other: &'e UnpairedExample, max_length: usize) -> Sequence<'e> {
    let room = max_length.saturating_sub(example.prompt.len()).max(1);
    Sequence { prompt: &example.prompt, response: &other.response[..other.response.len().min(room)] }
}

/// Computes the loss from responses under a policy and under the reference.
struct Judge<'w> {
    reference: Policy<'w>,
    loss: KtoLoss,
    /// Most tokens of a prompt with another's response.
    max_length: usize,
    /// Most responses per pass of an evaluation.
    evaluated_at_once: usize,
}

impl Judge<'_> {
    /// Log-probabilities of responses under the reference, one response per pass: the same bits whether computed once
    /// or in every step.
    fn reference_of(&self, examples: &[&UnpairedExample]) -> Result<Vec<f64>> {
        let mut all = Vec::with_capacity(examples.len());
        let mut progress = Progress::new("reference", examples.len(), Unit::Of("response"));
        for sequence in sequences(examples) {
            all.extend(summed_logprobs(self.reference, &[sequence])?);
            progress.add(1);
        }
        Ok(all)
    }

    /// log(policy / reference) of each first example's prompt with the second's response.
    fn log_ratios(&self, policy: Policy<'_>, pairs: &[(&UnpairedExample, &UnpairedExample)]) -> Result<Vec<f64>> {
        let mixed: Vec<Sequence<'_>> =
            pairs.iter().map(|(example, other)| mismatched(example, other, self.max_length)).collect();
        let (ours, theirs) = (summed_logprobs(policy, &mixed)?, summed_logprobs(self.reference, &mixed)?);
        Ok(ours.iter().zip(&theirs).map(|(a, b)| a - b).collect())
    }

    /// dL/dlogp of every response; `weight` divides by the responses of the step.
    fn weigh(
        &self,
        examples: &[&UnpairedExample],
        logps: &[f64],
        references: &[f64],
        kl: f64,
        weight: f64,
        tally: &mut Tally,
    ) -> Result<Vec<f64>> {
        let mut by_sum = Vec::with_capacity(logps.len());
        for ((example, logp), reference) in examples.iter().zip(logps).zip(references) {
            let (loss, slope) = self.loss.of(logp - reference, example.desirable, kl)?;
            tally.loss += weight * loss;
            tally.response(example.desirable, self.loss.beta * (logp - reference), *logp);
            by_sum.push(weight * slope);
        }
        Ok(by_sum)
    }

    /// Metrics of all examples as one step.
    fn evaluate(&self, policy: Policy<'_>, examples: &[&UnpairedExample], references: &[f64]) -> Result<Tally> {
        let _phase = within(Phase::Evaluation);
        let mut tally = Tally::default();
        if let Some(last) = examples.last().filter(|_| examples.len() > 1) {
            let others = std::iter::once(*last).chain(examples.iter().copied());
            let pairs: Vec<_> = examples.iter().copied().zip(others).collect();
            let (mut log_ratios, mut logps) = (vec![], vec![]);
            for some in pairs.chunks(self.evaluated_at_once) {
                log_ratios.extend(self.log_ratios(policy, some)?);
            }
            let kl = mismatched_kl(&log_ratios);
            let mut progress = Progress::new("evaluation", examples.len(), Unit::Of("response"));
            for some in examples.chunks(self.evaluated_at_once) {
                logps.extend(summed_logprobs_with(policy, &sequences(some), |more| progress.add(more))?);
            }
            self.weigh(examples, &logps, references, kl, 1.0 / examples.len() as f64, &mut tally)?;
        }
        Ok(tally)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// TRL's `DataCollatorForUnpairedPreference`: `(prompt_ids + KL_completion_ids)[:max_length]`.
    #[test]
    fn a_mismatched_response_is_cut_at_the_end_where_both_pass_max_length() {
        let example = |prompt, response| UnpairedExample {
            prompt: vec![1; prompt],
            response: vec![2; response],
            desirable: true,
        };
        let length = |prompt: usize, response: usize, max_length: usize| {
            let (own, other) = (example(prompt, 1), example(1, response));
            let pair = mismatched(&own, &other, max_length);
            (pair.prompt.len(), pair.response.len())
        };
        assert_eq!(length(12, 14, 17), (12, 5));
        assert_eq!(length(3, 14, 17), (3, 14));
        assert_eq!(length(16, 14, 17), (16, 1));
    }
}
