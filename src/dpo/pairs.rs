//! Direct preference optimisation: one adapter trained on comparisons, against the reference that it started as. Knows
//! no file and no other stage. Read loss.rs before.

use anyhow::{Result, ensure};

use super::answers::{Sequence, Tally, pack, spread, summed_logprobs, sums};
use super::loss::{Answer, PairLoss};
use crate::config::{Dpo, DpoLoss};
use crate::data::examples::batch_sampler::{BatchSampler, BatchSize};
use crate::data::examples::objectives::RankedExample;
use crate::host::meter::{Phase, within};
use crate::invalid;
use crate::model::adapter::{Adapter, Gradients};
use crate::model::roles::Policy;
use crate::report::number;
use crate::train::learner::Learner;
use crate::train::progress::Progress;
use crate::train::session::Session;
use crate::train::supervised::Setup;
use crate::train::{settings, stop};

/// Comparisons of one scoring pass.
pub(crate) const EVAL_BATCH: usize = 8;

/// The stage's figures.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Share of held-out pairs whose better answer has the higher reward; NaN where nothing is held out.
    pub accuracy: f64,
    /// Mean reward of the better held-out answers less that of the worse, in nats times beta.
    pub margin: f64,
    /// Mean held-out loss.
    pub loss: f64,
    /// Optimizer steps.
    pub steps: usize,
    /// Tokens that went through the trained policy.
    pub tokens: usize,
}

/// Trains a copy of `start` on `examples`; `held_out` only evaluates. `reference` None is the bare base. A ranking of
/// more than two answers is the mean over its pairs.
///
/// # Errors
/// If there is no example, a sequence is longer than the context, or a number stops being finite.
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
    let Setup { base, start, recompute: checkpoint, seed } = setup;
    let judge = Judge { reference: Policy::new(base, reference), loss: loss_of(config), beta: config.beta };
    let start = start.clone().with_score_head(None)?;
    let learner = Learner::new(start.to_trainable(), settings::adamw_of_dpo(config), config.max_grad_norm)?;
    let mut progress = Progress::new(learner);
    let (batch, accumulate) =
        (BatchSize::Examples(config.per_device_train_batch_size), config.gradient_accumulation_steps);
    let plan = BatchSampler { seed, stream: settings::DPO_ORDER, batch, accumulate, shard: Default::default() };
    let steps = plan.steps(examples, config.num_train_epochs);
    let schedule = settings::schedule(config.learning_rate, config.warmup_steps, config.lr_scheduler_type);
    session.report.stage("dpo", steps);
    session.report.note(&format!("dpo: {} comparisons, {} held out", examples.len(), held_out.len()));
    let stored = match config.precompute_ref_log_probs {
        true => Some(judge.references(&examples.iter().collect::<Vec<_>>())?),
        false => None,
    };
    let held_reference = judge.references(&held_out.iter().collect::<Vec<_>>())?;
    if let Some(snapshot) = session.resumed()? {
        progress.load(&snapshot)?;
    }
    session.watch(&[("learner", &mut progress.learner)])?;
    let mut order = plan.from(examples, progress.cursor, config.num_train_epochs);
    loop {
        session.checkpoint(progress.step, || progress.snapshot())?;
        let Some(rows) = order.next_step() else { break };
        let gradients = || -> Result<Option<_>> {
            let mut grads = Gradients::none(base.shapes().layers);
            let mut tally = Tally::default();
            let mut tokens = 0;
            for &numbers in &rows.batches {
                if stop::requested() {
                    return Ok(None);
                }
                // 1. The reference's view of these answers, computed now or before.
                let micro: Vec<&RankedExample> = numbers.iter().map(|&i| &examples[i]).collect();
                let references = match &stored {
                    Some(all) => numbers.iter().map(|&i| all[i].clone()).collect(),
                    None => judge.references(&micro)?,
                };
                // 2. Forward, loss and backward; the step's comparisons divide every micro-batch's loss.
                let sequences = sequences(&micro);
                let (batch, targets) = pack(&sequences)?;
                tokens += batch.tokens().len();
                let policy = Policy::new(base, Some(progress.learner.weights().view()));
                let weight = 1.0 / rows.len() as f64;
                let (_, g) = policy.gradients(&batch, &targets, 1.0, checkpoint, |stats| {
                    tally.tokens(stats, &targets);
                    let logps = sums(&sequences, &stats.logprobs);
                    let by_sum = judge.compare(&micro, &logps, &references, weight, &mut tally)?;
                    Ok((spread(&sequences, &by_sum), vec![0.0; stats.logprobs.len()]))
                })?;
                grads.add(g)?;
            }
            Ok(Some((grads, tally, tokens)))
        };
        // Asked to stop: the checkpoint at the top of the loop ends it.
        let update = within(Phase::Update);
        let Some(gradients) = gradients().transpose() else { continue };
        // 3. Step.
        drop(update);
        let _step = within(Phase::Step);
        let lr = schedule.lr_at(progress.step, steps) * session.lr_factor();
        let outcome = gradients.and_then(|(g, tally, tokens)| {
            let grad_norm = progress.learner.step(g, lr)?;
            progress.tokens += tokens;
            Ok((tally, grad_norm))
        });
        progress.cursor = order.cursor();
        progress.step += 1;
        let step = progress.step;
        let stepped = session.judge(step, outcome, &mut [("learner", &mut progress.learner)])?;
        let Some((tally, grad_norm)) = stepped else { continue };
        if step.is_multiple_of(config.logging_steps.max(1)) || step == steps {
            let mut figures = tally.figures("");
            figures.insert("grad_norm".into(), number(grad_norm));
            figures.insert("lr".into(), number(lr));
            figures.insert("num_tokens".into(), progress.tokens.into());
            if config.eval_steps > 0 && step.is_multiple_of(config.eval_steps) {
                let view = Policy::new(base, Some(progress.learner.weights().view()));
                figures.extend(judge.evaluate(view, held_out, &held_reference)?.figures("eval_"));
            }
            session.report.step(step, &figures, &["loss", "rewards/accuracies", "rewards/margins"])?;
        }
    }
    let trained = progress.learner.weights().snapshot();
    let after = judge.evaluate(Policy::new(base, Some(&trained)), held_out, &held_reference)?;
    session.report.done();
    let loss = if held_out.is_empty() { f64::NAN } else { after.loss };
    let summary = Summary { accuracy: after.accuracy(), margin: after.margin(), loss, steps, tokens: progress.tokens };
    if !held_out.is_empty() {
        session.report.note(&format!("dpo: held-out accuracy {:.3}, margin {:.3}", summary.accuracy, summary.margin));
    }
    Ok((trained, summary))
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

/// All answers of all comparisons, best first within one.
fn sequences<'e>(examples: &[&'e RankedExample]) -> Vec<Sequence<'e>> {
    let all = examples.iter().flat_map(|e| e.responses.iter().map(|answer| Sequence { prompt: &e.prompt, answer }));
    all.collect()
}

/// Compares answers under a policy with the same under the reference.
struct Judge<'w> {
    reference: Policy<'w>,
    loss: PairLoss,
    beta: f64,
}

impl Judge<'_> {
    /// Each comparison's answers under the reference, a comparison a pass: a product over other rows beside it rounds
    /// otherwise in the last bit, and what is computed once must equal what is computed in every step.
    fn references(&self, examples: &[&RankedExample]) -> Result<Vec<Vec<f64>>> {
        examples.iter().map(|&example| summed_logprobs(self.reference, &sequences(&[example]))).collect()
    }

    /// dL/dlogp of every answer; `weight` divides by the comparisons of the step.
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
            ensure!(k >= 2 && references.len() == k, "{k} answers compared, {} under the reference", references.len());
            let answer = |i: usize| Answer {
                logp: logps[first + i],
                reference: references[i],
                tokens: example.responses[i].len(),
            };
            let share = weight / (k * (k - 1) / 2) as f64;
            for (better, worse) in (0..k).flat_map(|i| (i + 1..k).map(move |j| (i, j))) {
                let (chosen, rejected) = (answer(better), answer(worse));
                let found = self.loss.of(self.beta, chosen, rejected)?;
                by_sum[first + better] += share * found.chosen;
                by_sum[first + worse] += share * found.rejected;
                tally.loss += share * found.loss;
                tally.answer(true, self.beta * chosen.log_ratio(), chosen.logp);
                tally.answer(false, self.beta * rejected.log_ratio(), rejected.logp);
                tally.pair(chosen.log_ratio() > rejected.log_ratio());
            }
            first += k;
        }
        Ok(by_sum)
    }

    fn evaluate(&self, policy: Policy<'_>, examples: &[RankedExample], references: &[Vec<f64>]) -> Result<Tally> {
        let _phase = within(Phase::Evaluation);
        let mut tally = Tally::default();
        for (some, references) in examples.chunks(EVAL_BATCH).zip(references.chunks(EVAL_BATCH)) {
            let some: Vec<&RankedExample> = some.iter().collect();
            let logps = summed_logprobs(policy, &sequences(&some))?;
            self.compare(&some, &logps, references, 1.0 / examples.len() as f64, &mut tally)?;
        }
        Ok(tally)
    }
}
