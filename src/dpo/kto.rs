//! Kahneman-Tversky optimisation: one adapter trained on answers that were judged one by one, against the reference
//! that it started as. Knows no file and no other stage. Read loss.rs before.

use anyhow::{Context, Result};

use super::answers::{Sequence, Tally, pack, spread, summed_logprobs, sums};
use super::loss::{KtoLoss, mismatched_kl};
use crate::config::Kto;
use crate::data::examples::batch_sampler::{BatchSampler, BatchSize};
use crate::data::examples::objectives::UnpairedExample;
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

/// The stage's figures.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Mean reward of the good held-out answers less that of the bad; NaN where one kind is missing.
    pub margin: f64,
    /// Mean held-out loss; NaN where fewer than two are held out.
    pub loss: f64,
    /// Good and bad answers trained on.
    pub counts: [usize; 2],
    /// Optimizer steps.
    pub steps: usize,
    /// Tokens that went through the trained policy with a gradient.
    pub tokens: usize,
}

/// Trains a copy of `start` on `examples`; `held_out` only evaluates. `reference` None is the bare base.
///
/// The KL term of an optimizer step is [`mismatched_kl`] over its answers, each put after the prompt of the next one in
/// the step: TRL's estimate, over the whole step rather than a micro-batch, so that accumulation changes nothing.
///
/// # Errors
/// If there are fewer than two examples, a sequence is longer than the context, or a number stops being finite.
pub fn train(
    setup: Setup<'_>,
    reference: Option<&Adapter>,
    examples: &[UnpairedExample],
    held_out: &[UnpairedExample],
    config: &Kto,
    session: &mut Session,
) -> Result<(Adapter, Summary)> {
    if examples.len() < 2 {
        return Err(invalid!("[kto] needs two records or more to train on: the KL term puts one's answer to another"));
    }
    let Kto { beta, desirable_weight, undesirable_weight, .. } = *config;
    let Setup { base, start, recompute: checkpoint, seed } = setup;
    let judge =
        Judge { reference: Policy::new(base, reference), loss: KtoLoss { beta, desirable_weight, undesirable_weight } };
    let start = start.clone().with_score_head(None)?;
    let learner = Learner::new(start.to_trainable(), settings::adamw_of_kto(config), config.max_grad_norm)?;
    let mut progress = Progress::new(learner);
    let (batch, accumulate) =
        (BatchSize::Examples(config.per_device_train_batch_size), config.gradient_accumulation_steps);
    let plan = BatchSampler { seed, stream: settings::KTO_ORDER, batch, accumulate, shard: Default::default() };
    let per_epoch = plan.steps(examples, 1);
    let steps = per_epoch * config.num_train_epochs;
    let schedule = settings::schedule(config.learning_rate, config.warmup_steps, config.lr_scheduler_type);
    let good = examples.iter().filter(|e| e.desirable).count();
    session.report.stage("kto", steps);
    session.report.note(&format!(
        "kto: {good} good and {} bad answers, {} held out",
        examples.len() - good,
        held_out.len()
    ));
    let all: Vec<&UnpairedExample> = examples.iter().collect();
    let stored = match config.precompute_ref_log_probs {
        true => Some(judge.reference_of(&all)?),
        false => None,
    };
    let held: Vec<&UnpairedExample> = held_out.iter().collect();
    let held_reference = judge.reference_of(&held)?;
    if let Some(snapshot) = session.resumed()? {
        progress.load(&snapshot)?;
    }
    session.watch(&[("learner", &mut progress.learner)])?;
    let mut order = plan.from(examples, progress.cursor, config.num_train_epochs);
    loop {
        session.checkpoint(progress.step, || progress.snapshot())?;
        let Some(rows) = order.next_step() else { break };
        let gradients = || -> Result<Option<_>> {
            // 1. The KL term: answers after prompts that they were not given to. A lone last record takes its prompt's
            //    answer from the step before.
            let step_rows: Vec<&UnpairedExample> = rows.rows().map(|i| &examples[i]).collect();
            let (epoch, number) = (progress.step / per_epoch, progress.step % per_epoch);
            let before = match step_rows.len() {
                1 => plan.epoch(examples, epoch).step(number.saturating_sub(1)).rows().last(),
                _ => rows.rows().last(),
            };
            let before = before.context("a step has a record")?;
            let view = Policy::new(base, Some(progress.learner.weights().view()));
            let kl = judge.kl(view, &step_rows, &examples[before])?;
            // 2. Forward, loss and backward; the step's answers divide every micro-batch's loss.
            let mut grads = Gradients::none(base.shapes().layers);
            let mut tally = Tally::default();
            let mut tokens = 0;
            for &micro in &rows.batches {
                if stop::requested() {
                    return Ok(None);
                }
                let some: Vec<&UnpairedExample> = micro.iter().map(|&i| &examples[i]).collect();
                let references = match &stored {
                    Some(all) => micro.iter().map(|&i| all[i]).collect(),
                    None => judge.reference_of(&some)?,
                };
                let sequences = sequences(&some);
                let (batch, targets) = pack(&sequences)?;
                tokens += batch.tokens().len();
                let policy = Policy::new(base, Some(progress.learner.weights().view()));
                let weight = 1.0 / rows.len() as f64;
                let (_, g) = policy.gradients(&batch, &targets, 1.0, checkpoint, |stats| {
                    tally.tokens(stats, &targets);
                    let logps = sums(&sequences, &stats.logprobs);
                    let by_sum = judge.weigh(&some, &logps, &references, kl, weight, &mut tally)?;
                    Ok((spread(&sequences, &by_sum), vec![0.0; stats.logprobs.len()]))
                })?;
                grads.add(g)?;
            }
            Ok(Some((grads, tally, kl, tokens)))
        };
        // Asked to stop: the checkpoint at the top of the loop ends it.
        let update = within(Phase::Update);
        let Some(gradients) = gradients().transpose() else { continue };
        // 3. Step.
        drop(update);
        let _step = within(Phase::Step);
        let lr = schedule.lr_at(progress.step, steps) * session.lr_factor();
        let outcome = gradients.and_then(|(g, tally, kl, tokens)| {
            let grad_norm = progress.learner.step(g, lr)?;
            progress.tokens += tokens;
            Ok((tally, kl, grad_norm))
        });
        progress.cursor = order.cursor();
        progress.step += 1;
        let step = progress.step;
        let stepped = session.judge(step, outcome, &mut [("learner", &mut progress.learner)])?;
        let Some((tally, kl, grad_norm)) = stepped else { continue };
        if step.is_multiple_of(config.logging_steps.max(1)) || step == steps {
            let mut figures = tally.figures("");
            figures.insert("kl".into(), number(kl));
            figures.insert("grad_norm".into(), number(grad_norm));
            figures.insert("lr".into(), number(lr));
            figures.insert("num_tokens".into(), progress.tokens.into());
            if config.eval_steps > 0 && step.is_multiple_of(config.eval_steps) {
                let view = Policy::new(base, Some(progress.learner.weights().view()));
                figures.extend(judge.evaluate(view, &held, &held_reference)?.figures("eval_"));
            }
            session.report.step(step, &figures, &["loss", "kl", "rewards/margins"])?;
        }
    }
    let trained = progress.learner.weights().snapshot();
    let after = judge.evaluate(Policy::new(base, Some(&trained)), &held, &held_reference)?;
    session.report.done();
    let loss = if held.len() < 2 { f64::NAN } else { after.loss };
    if held.len() > 1 {
        session.report.note(&format!("kto: held-out loss {loss:.4}, margin {:.3}", after.margin()));
    }
    Ok((
        trained,
        Summary { margin: after.margin(), loss, counts: [good, examples.len() - good], steps, tokens: progress.tokens },
    ))
}

fn sequences<'e>(examples: &[&'e UnpairedExample]) -> Vec<Sequence<'e>> {
    examples.iter().map(|e| Sequence { prompt: &e.prompt, answer: &e.response }).collect()
}

/// Weighs answers under a policy against the same under the reference.
struct Judge<'w> {
    reference: Policy<'w>,
    loss: KtoLoss,
}

impl Judge<'_> {
    /// Answers under the reference, one a pass: the same bits whether computed once or in every step.
    fn reference_of(&self, examples: &[&UnpairedExample]) -> Result<Vec<f64>> {
        let mut all = Vec::with_capacity(examples.len());
        for sequence in sequences(examples) {
            all.extend(summed_logprobs(self.reference, &[sequence])?);
        }
        Ok(all)
    }

    /// The KL term of `examples`: each prompt with the answer of the example in front of it; before the first, `before`.
    fn kl(&self, policy: Policy<'_>, examples: &[&UnpairedExample], before: &UnpairedExample) -> Result<f64> {
        let answers = std::iter::once(before).chain(examples.iter().copied());
        let mixed: Vec<Sequence<'_>> = examples
            .iter()
            .zip(answers)
            .map(|(e, other)| Sequence { prompt: &e.prompt, answer: &other.response })
            .collect();
        let (ours, theirs) = (summed_logprobs(policy, &mixed)?, summed_logprobs(self.reference, &mixed)?);
        Ok(mismatched_kl(&ours.iter().zip(&theirs).map(|(a, b)| a - b).collect::<Vec<_>>()))
    }

    /// dL/dlogp of every answer; `weight` divides by the answers of the step.
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
            tally.answer(example.desirable, self.loss.beta * (logp - reference), *logp);
            by_sum.push(weight * slope);
        }
        Ok(by_sum)
    }

    /// Over all of them as one step.
    fn evaluate(&self, policy: Policy<'_>, examples: &[&UnpairedExample], references: &[f64]) -> Result<Tally> {
        let _phase = within(Phase::Evaluation);
        let mut tally = Tally::default();
        if let Some(last) = examples.last().filter(|_| examples.len() > 1) {
            let kl = self.kl(policy, examples, last)?;
            let logps = summed_logprobs(policy, &sequences(examples))?;
            self.weigh(examples, &logps, references, kl, 1.0 / examples.len() as f64, &mut tally)?;
        }
        Ok(tally)
    }
}
