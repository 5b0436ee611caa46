//! Supervised fine-tuning: cross-entropy over the marked tokens, one adapter trained. `train` is the stage on examples in
//! memory; `run::sft` reads a config and files around it. Knows no other stage.

use std::borrow::Cow;

use anyhow::{Result, ensure};

use crate::config::Sft;
use crate::data::examples::batch_sampler::BatchSampler;
use crate::data::examples::objectives::SftExample;
use crate::data::examples::{Examples, chunks, pick};
use crate::host::meter::{Phase, within};
use crate::model::adapter::{Adapter, Gradients};
use crate::model::base::Base;
use crate::model::batch::{Batch, Targets};
use crate::model::block::Recompute;
use crate::model::roles::Policy;
use crate::report::{Figures, number};
use crate::train::learner::Learner;
use crate::train::progress::Progress;
use crate::train::session::Session;
use crate::train::supervised::Setup;
use crate::train::{settings, stop};
use crate::{diverged, invalid};

/// Sequences of one scoring pass.
pub(crate) const EVAL_BATCH: usize = 16;

/// The stage's figures.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// e^(mean negative log-probability) of the held-out targets before training; NaN where nothing is held out.
    pub perplexity_before: f64,
    /// And after.
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
    let Setup { base, start, recompute: checkpoint, seed } = setup;
    let start = start.clone().with_score_head(None)?;
    let learner = Learner::new(start.to_trainable(), settings::adamw_of_sft(config), config.max_grad_norm)?;
    let mut progress = Progress::new(learner);
    let batch = settings::batch_size(config.per_device_train_batch_size, config.max_tokens_per_batch);
    let accumulate = config.gradient_accumulation_steps;
    let plan = BatchSampler { seed, stream: settings::SFT_ORDER, batch, accumulate, shard: Default::default() };
    let steps = plan.steps(examples, config.num_train_epochs);
    let schedule = settings::schedule(config.learning_rate, config.warmup_steps, config.lr_scheduler_type);
    session.report.stage("sft", steps);
    // NaN has no form in JSON, where what is found once is kept.
    let found = session.once("perplexity_before", |_| perplexity(base, &start, held_out).map(Some))?;
    let perplexity_before = found.unwrap_or(f64::NAN);
    if let Some(snapshot) = session.resumed()? {
        progress.load(&snapshot)?;
    }
    session.watch(&[("learner", &mut progress.learner)])?;
    session.report.note(&match held_out.len() {
        0 => format!("sft: {} records, none held out", examples.len()),
        _ => format!("sft: {} records, held-out perplexity {perplexity_before:.3} before", examples.len()),
    });
    let mut order = plan.from(examples, progress.cursor, config.num_train_epochs);
    loop {
        session.checkpoint(progress.step, || progress.snapshot())?;
        let Some(rows) = order.next_step() else { break };
        let batches = rows.batches.iter().map(|rows| pack(&pick(examples, rows.iter().copied())?));
        let batches = batches.collect::<Result<Vec<_>>>()?;
        // 1. Forward and backward.
        let update = within(Phase::Update);
        let gradients = gradients(base, progress.learner.weights().view(), &batches, checkpoint);
        let Some(gradients) = gradients.transpose() else { continue };
        // 2. Step.
        drop(update);
        let _step = within(Phase::Step);
        let lr = schedule.lr_at(progress.step, steps) * session.lr_factor();
        let outcome = gradients.and_then(|(g, loss)| Ok((loss, progress.learner.step(g, lr)?)));
        progress.cursor = order.cursor();
        progress.step += 1;
        progress.tokens += batches.iter().map(|(batch, _)| batch.tokens().len()).sum::<usize>();
        let step = progress.step;
        let stepped = session.judge(step, outcome, &mut [("learner", &mut progress.learner)])?;
        let Some((loss, grad_norm)) = stepped else { continue };
        // 3. Figures.
        if step.is_multiple_of(config.logging_steps.max(1)) || step == steps {
            let mut figures = Figures::new();
            figures.insert("loss".into(), number(loss));
            figures.insert("grad_norm".into(), number(grad_norm));
            figures.insert("lr".into(), number(lr));
            figures.insert("tokens".into(), progress.tokens.into());
            if config.eval_steps > 0 && step.is_multiple_of(config.eval_steps) {
                let p = perplexity(base, progress.learner.weights().view(), held_out)?;
                figures.insert("eval_perplexity".into(), number(p));
            }
            session.report.step(step, &figures, &["loss", "grad_norm", "eval_perplexity"])?;
        }
    }
    let trained = progress.learner.weights().snapshot();
    let perplexity_after = perplexity(base, &trained, held_out)?;
    session.report.done();
    if !held_out.is_empty() {
        session.report.note(&format!("sft: held-out perplexity {perplexity_before:.3} -> {perplexity_after:.3}"));
    }
    Ok((trained, Summary { perplexity_before, perplexity_after, steps, tokens: progress.tokens }))
}

/// A step's gradients and loss; `None` where the process was asked to stop before the last batch. The step's number of
/// targets divides every batch's loss: accumulation changes nothing.
fn gradients(
    base: &Base,
    adapter: &Adapter,
    batches: &[(Batch, Targets)],
    checkpoint: Recompute,
) -> Result<Option<(Gradients, f64)>> {
    let count: usize = batches.iter().map(|(_, targets)| targets.rows.len()).sum();
    let weight = 1.0 / count as f64;
    let mut grads = Gradients::none(base.shapes().layers);
    let mut loss = 0f64;
    for (batch, targets) in batches {
        if stop::requested() {
            return Ok(None);
        }
        let (_, g) = Policy::new(base, Some(adapter)).gradients(batch, targets, 1.0, checkpoint, |stats| {
            loss -= stats.logprobs.iter().map(|&l| f64::from(l)).sum::<f64>() * weight;
            Ok((vec![-weight as f32; stats.logprobs.len()], vec![0.0; stats.logprobs.len()]))
        })?;
        grads.add(g)?;
    }
    ensure!(loss.is_finite(), diverged!("the loss is {loss}"));
    Ok(Some((grads, loss)))
}

/// Examples as a batch, and the tokens that their masks mark.
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

/// e^(mean negative log-probability) over all marked tokens; NaN of none.
///
/// # Errors
/// If a sequence is longer than the context.
pub fn perplexity(base: &Base, adapter: &Adapter, examples: &(impl Examples<SftExample> + ?Sized)) -> Result<f64> {
    let _phase = within(Phase::Evaluation);
    let (mut sum, mut count) = (0f64, 0usize);
    for rows in chunks(examples.len(), EVAL_BATCH) {
        let (batch, targets) = pack(&pick(examples, rows)?)?;
        let stats = Policy::new(base, Some(adapter)).logprobs(&batch, &targets, 1.0)?;
        sum -= stats.logprobs.iter().map(|&l| f64::from(l)).sum::<f64>();
        count += stats.logprobs.len();
    }
    Ok((sum / count as f64).exp())
}
