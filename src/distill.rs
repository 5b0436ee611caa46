//! On-policy distillation: one adapter learns a teacher's distribution over the whole vocabulary at every token of a
//! response, which the policy samples itself, the teacher samples, or the record has.
//!
//! [`train`] is the stage on examples in memory; `run/distill.rs` reads config and files around it. The divergence is
//! `ops/divergence/mod.rs`. It does not depend on another stage. Read `train/supervised.rs` next.

use std::borrow::Cow;
use std::ops::ControlFlow;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::config::{Distill, Supervised};
use crate::data::examples::objectives::{PromptExample, SftExample};
use crate::data::examples::{Example, Examples, passes, pick};
use crate::error::counted;
use crate::host::meter::{Phase, within};
use crate::invalid;
use crate::model::adapter::{Adapter, Gradients};
use crate::model::base::Base;
use crate::model::batch::{Batch, Targets};
use crate::model::block::Recompute;
use crate::model::generate::{FinishReason, Response, SamplingParams, generate};
use crate::model::roles::Policy;
use crate::ops::divergence::Divergence;
use crate::report::progress::{Progress, Unit};
use crate::report::{Figures, Report, number};
use crate::rng::{SplitMix64, derive};
use crate::train::session::Session;
use crate::train::settings;
use crate::train::stop;
use crate::train::supervised::{OptimizerStep, Setup, SupervisedStage, Training};
use crate::train::world::World;

/// What an example gives to distil on: a prompt, and where all of it was written by somebody else a whole sequence.
pub trait Prompted: Example + Clone {
    /// Token ids of the prompt, not empty.
    fn prompt(&self) -> &[u32];

    /// Token ids of prompt and response, and which of them the loss is on.
    fn whole(&self) -> Option<(&[u32], &[bool])>;
}

impl Prompted for PromptExample {
    fn prompt(&self) -> &[u32] {
        &self.tokens
    }

    fn whole(&self) -> Option<(&[u32], &[bool])> {
        None
    }
}

/// The prompt is what stands before the last response of a dialogue.
impl Prompted for SftExample {
    fn prompt(&self) -> &[u32] {
        let end = self.loss_mask.iter().rposition(|&marked| marked).unwrap_or(0);
        let before = self.loss_mask[..end].iter().rposition(|&marked| !marked).map_or(0, |at| at + 1);
        &self.tokens[..before]
    }

    fn whole(&self) -> Option<(&[u32], &[bool])> {
        Some((&self.tokens, &self.loss_mask))
    }
}

/// The teacher and the end of a response.
#[derive(Clone, Copy)]
pub struct Teaching<'w> {
    /// The teacher, on the policy's machine.
    pub teacher: Policy<'w>,
    /// Tokens that end a response.
    pub stop: &'w [u32],
    /// Decodes token ids, for samples.jsonl.
    pub decode: &'w dyn Fn(&[u32]) -> String,
}

/// The stage's results.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Mean divergence over the tokens of the policy's responses to held-out prompts before training, nats; NaN if nothing
    /// is held out.
    pub loss_before: f64,
    /// The same after training.
    pub loss_after: f64,
    /// Optimizer steps.
    pub steps: usize,
}

/// Trains a copy of `start` on `examples`; `held_out` only evaluates.
///
/// L = sum of the divergences at all tokens of an optimizer step's responses over their number.
///
/// # Errors
/// If there is no example, a prompt and a whole response are longer than a context, the guard gives up, or the process was
/// asked to stop.
pub fn train<T: Prompted>(
    setup: Setup<'_>,
    teaching: Teaching<'_>,
    examples: &(impl Examples<T> + ?Sized),
    held_out: &(impl Examples<T> + ?Sized),
    config: &Distill,
    session: &mut Session,
) -> Result<(Adapter, Summary)> {
    if examples.is_empty() {
        return Err(invalid!("[distill] there is no record to train on"));
    }
    let Setup { base, start, recompute, seed } = setup;
    let start = start.clone().with_score_head(None)?;
    let mut training =
        Training::new(setup, &start, config.supervised(), settings::DISTILL_ORDER, examples, &session.world)?;
    session.report.stage("distill", training.steps());
    let stage = Distillation { base, teaching, held_out, config, recompute, seed, example: std::marker::PhantomData };
    // JSON has no NaN, so the finding is an option.
    let found =
        session.once("loss_before", |report| stage.held_out_loss(&start, Some((report, "before"))).map(Some))?;
    let loss_before = found.unwrap_or(f64::NAN);
    training.resume(session)?;
    session.report.note(&match held_out.len() {
        0 => format!("distill: {}, none held out", counted(examples.len(), "prompt")),
        _ => format!("distill: {}, held-out loss {loss_before:.4} before", counted(examples.len(), "prompt")),
    });
    let trained = training.run(&stage, session)?;
    let loss_after = stage.held_out_loss(&trained.adapter, Some((&mut session.report, "after")))?;
    session.report.done();
    if !held_out.is_empty() {
        session.report.note(&format!("distill: held-out loss {loss_before:.4} -> {loss_after:.4} nats per token"));
    }
    Ok((trained.adapter, Summary { loss_before, loss_after, steps: trained.steps }))
}

/// The stage's loss and evaluation.
struct Distillation<'w, H: ?Sized, T> {
    base: &'w Base,
    teaching: Teaching<'w>,
    held_out: &'w H,
    config: &'w Distill,
    recompute: Recompute,
    seed: u64,
    example: std::marker::PhantomData<T>,
}

/// Token ids of prompt and response, and which of them the loss is on.
#[derive(Clone, Debug, PartialEq)]
struct Sequence {
    tokens: Vec<u32>,
    mask: Vec<bool>,
    /// Whether a sampled response ended with a stop token; true of a record's.
    ended: bool,
}

impl Sequence {
    /// A line of samples.jsonl. `when`: `iteration` or `evaluation`, with its value; `loss`: nats per token.
    fn sample(&self, when: (&str, Value), by: Option<&str>, loss: f64, decode: &dyn Fn(&[u32]) -> String) -> Value {
        let first = self.mask.iter().position(|&marked| marked).unwrap_or(self.tokens.len());
        let (prompt, response) = self.tokens.split_at(first);
        let mut sample = json!({
            when.0: when.1,
            "prompt": decode(prompt),
            "response": decode(response),
            "loss": number(loss),
            "finish_reason": if self.ended { FinishReason::Stop } else { FinishReason::Length }.name(),
        });
        if let Some(by) = by {
            sample["by"] = by.into();
        }
        sample
    }

    /// Tokens that the loss is on.
    fn targets(&self) -> usize {
        self.mask.iter().filter(|&&marked| marked).count()
    }
}

/// The mean of each sequence's values, which are those of its targets one after another.
fn means(sequences: &[Sequence], values: &[f32]) -> Vec<f64> {
    let mut rest = values;
    let mean = |sequence: &Sequence| {
        let (own, after) = rest.split_at(sequence.targets());
        rest = after;
        own.iter().map(|&value| f64::from(value)).sum::<f64>() / own.len() as f64
    };
    sequences.iter().map(mean).collect()
}

/// The sequences and the loss of a step.
struct StepSums {
    sequences: Vec<Sequence>,
    /// Sequences of micro-batches that are through.
    done: usize,
    /// 1 / the step's number of targets. It divides every micro-batch's loss, so accumulation changes nothing.
    weight: f64,
    on_policy: bool,
    loss: f64,
    /// Of each sequence that is through the mean divergence, nats per token.
    means: Vec<f64>,
}

impl<H: ?Sized, T: Prompted> Distillation<'_, H, T> {
    fn divergence(&self) -> Divergence {
        Divergence { beta: self.config.beta, temperature: 1.0 }
    }

    /// Responses of `by` to some prompts; `path` and a prompt's place among them are its stream of the seed.
    fn sample(&self, by: Policy<'_>, prompts: &[Vec<u32>], path: &[u64], first: usize) -> Result<Vec<Sequence>> {
        let sampling = SamplingParams {
            temperature: self.config.temperature,
            top_k: 0,
            top_p: 1.0,
            max_new_tokens: self.config.max_new_tokens,
            stop: self.teaching.stop.to_vec(),
        };
        let stream = derive(self.seed, path);
        let seeds: Vec<u64> = (0..prompts.len()).map(|i| derive(stream, &[(first + i) as u64])).collect();
        // Asked to stop, a step makes nothing of its responses; an evaluation ends first.
        let is_step = path.first() != Some(&settings::EVALUATION);
        let on_token =
            |_, _| if is_step && stop::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let responses = generate(by, prompts, &seeds, &sampling, on_token)?;
        let rows = |base: &Base| base.lm_head(None).weight.rows();
        let ids = rows(self.base).min(rows(self.teaching.teacher.base()));
        let sequence = |(prompt, response): (&Vec<u32>, Response)| {
            let (mut tokens, mut ended) = (response.tokens, response.finish == FinishReason::Stop);
            // A padding row of the larger lm_head, which only its model can read, ends a response. As the last of it nothing
            // is predicted from what stands in its place.
            if let Some(at) = tokens.iter().position(|&token| token as usize >= ids) {
                tokens.truncate(at);
                tokens.push(0);
                ended = true;
            }
            let mask = (0..prompt.len() + tokens.len()).map(|at| at >= prompt.len()).collect();
            Sequence { tokens: [&prompt[..], &tokens].concat(), mask, ended }
        };
        Ok(prompts.iter().zip(responses).map(sequence).collect())
    }

    /// The mean divergence over the tokens of the policy's responses to held-out prompts. With a report, some of them go to
    /// samples.jsonl, marked with the word.
    fn held_out_loss(&self, adapter: &Adapter, mut shown: Option<(&mut Report, &str)>) -> Result<f64>
    where
        H: Examples<T>,
    {
        let _phase = within(Phase::Evaluation);
        let policy = Policy::new(self.base, Some(adapter));
        let (mut sum, mut count) = (0f64, 0usize);
        let mut progress = Progress::new("evaluation", self.held_out.len(), Unit::Of("prompt"));
        for rows in passes(self.held_out, settings::evaluation_size(&self.config.supervised())) {
            progress.set(rows.start);
            let prompts: Vec<Vec<u32>> =
                pick(self.held_out, rows.clone())?.iter().map(|example| example.prompt().to_vec()).collect();
            let sequences = self.sample(policy, &prompts, &[settings::EVALUATION], rows.start)?;
            let (batch, targets) = pack(&sequences)?;
            let theirs = self.teaching.teacher.rows(&batch, &targets)?;
            let values = policy.divergence(
                &policy.rows(&batch, &targets)?,
                (self.teaching.teacher, &theirs),
                self.divergence(),
            )?;
            sum = values.iter().fold(sum, |sum, &value| sum + f64::from(value));
            count += values.len();
            if let Some((report, when)) = &mut shown {
                let left = self.config.save_samples.saturating_sub(rows.start);
                for (sequence, loss) in sequences.iter().zip(means(&sequences, &values)).take(left) {
                    let when = ("evaluation", Value::from(*when));
                    report.sample(&sequence.sample(when, None, loss, self.teaching.decode))?;
                }
            }
        }
        Ok(sum / count as f64)
    }
}

impl<H: Examples<T> + ?Sized, T: Prompted> SupervisedStage<T> for Distillation<'_, H, T> {
    type Sums = StepSums;

    const TOKENS: &'static str = "record_tokens";
    const SHOWN: &'static [&'static str] = &["loss", "grad_norm", "eval_loss"];
    const COUNTS_REJECTED: bool = true;

    fn begin(&self, adapter: &Adapter, step: &OptimizerStep<'_, T>) -> Result<StepSums> {
        let _phase = within(Phase::Rollout);
        let number = step.number as u64;
        let draw = SplitMix64::new(derive(self.seed, &[settings::DISTILL_SAMPLES, number])).uniform();
        let on_policy = draw < self.config.lmbda;
        let policy = Policy::new(self.base, Some(adapter));
        let by = match (on_policy, self.config.seq_kd) {
            (true, _) => Some(policy),
            (false, true) => Some(self.teaching.teacher),
            (false, false) => None,
        };
        let mut sequences: Vec<Sequence> = vec![];
        for examples in step.batches {
            match by {
                Some(by) => {
                    let prompts: Vec<Vec<u32>> = examples.iter().map(|example| example.prompt().to_vec()).collect();
                    let path = [settings::DISTILL_SAMPLES, number, 1];
                    sequences.extend(self.sample(by, &prompts, &path, sequences.len())?);
                }
                None => {
                    for example in examples {
                        let (tokens, mask) = example.whole().ok_or_else(|| {
                            invalid!(
                                "[distill] lmbda = {} takes responses of records, which have none",
                                self.config.lmbda
                            )
                        })?;
                        sequences.push(Sequence { tokens: tokens.to_vec(), mask: mask.to_vec(), ended: true });
                    }
                }
            }
        }
        let targets = sequences.iter().flat_map(|sequence| &sequence.mask).filter(|&&marked| marked).count();
        Ok(StepSums { sequences, done: 0, weight: 1.0 / targets as f64, on_policy, loss: 0.0, means: vec![] })
    }

    fn share(_: &mut StepSums, world: &World) -> Result<()> {
        ensure!(world.is_alone(), "distillation trains in one process");
        Ok(())
    }

    fn gradients(
        &self,
        adapter: &Adapter,
        _: &[usize],
        examples: &[Cow<'_, T>],
        sums: &mut StepSums,
    ) -> Result<Gradients> {
        let here = sums.done..sums.done + examples.len();
        let (batch, targets) = pack(&sums.sequences[here.clone()])?;
        sums.done += examples.len();
        let theirs = self.teaching.teacher.rows(&batch, &targets)?;
        let teacher = (self.teaching.teacher, &theirs);
        let policy = Policy::new(self.base, Some(adapter));
        let (values, gradients) = policy.divergence_gradients(
            &batch,
            &targets,
            teacher,
            self.divergence(),
            self.recompute,
            sums.weight as f32,
        )?;
        sums.loss += values.iter().map(|&value| f64::from(value)).sum::<f64>() * sums.weight;
        sums.means.extend(means(&sums.sequences[here], &values));
        Ok(gradients)
    }

    fn total(_: &mut StepSums, _: &World) -> Result<()> {
        Ok(())
    }

    fn loss(sums: &StepSums) -> f64 {
        sums.loss
    }

    fn metrics(sums: &StepSums) -> Figures {
        let count = sums.sequences.len() as f64;
        let cut = sums.sequences.iter().filter(|sequence| !sequence.ended).count() as f64;
        Figures::from_iter([
            ("loss".to_owned(), number(sums.loss)),
            ("on_policy".to_owned(), number(f64::from(u8::from(sums.on_policy)))),
            ("completions/mean_length".to_owned(), number(1.0 / (sums.weight * count))),
            ("completions/clipped_ratio".to_owned(), number(cut / count)),
        ])
    }

    fn samples(&self, sums: &StepSums, step: usize) -> Vec<Value> {
        let by = match (sums.on_policy, self.config.seq_kd) {
            (true, _) => "policy",
            (false, true) => "teacher",
            (false, false) => "record",
        };
        let all = sums.sequences.iter().zip(&sums.means).take(self.config.save_samples);
        all.map(|(sequence, &loss)| sequence.sample(("iteration", step.into()), Some(by), loss, self.teaching.decode))
            .collect()
    }

    fn evaluate(&self, adapter: &Adapter) -> Result<Figures> {
        Ok(Figures::from_iter([("eval_loss".to_owned(), number(self.held_out_loss(adapter, None)?))]))
    }
}

fn pack(sequences: &[Sequence]) -> Result<(Batch, Targets)> {
    let tokens: Vec<&[u32]> = sequences.iter().map(|sequence| &sequence.tokens[..]).collect();
    let mask: Vec<bool> = sequences.iter().flat_map(|sequence| sequence.mask.iter().copied()).collect();
    let batch = Batch::new(&tokens)?;
    let targets = Targets::masked(&batch, &mask)?;
    Ok((batch, targets))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequences_loss_is_the_mean_over_its_own_targets() {
        let sequence =
            |mask: &[bool], ended| Sequence { tokens: (0..mask.len() as u32).collect(), mask: mask.to_vec(), ended };
        let both = [sequence(&[false, true, true], true), sequence(&[false, false, true], false)];
        assert_eq!(means(&both, &[1.0, 2.0, 5.0]), [1.5, 5.0]);
        let decode = |ids: &[u32]| format!("{ids:?}");
        let said = both[1].sample(("iteration", 3.into()), Some("policy"), 5.0, &decode);
        let want = json!({
            "iteration": 3, "prompt": "[0, 1]", "response": "[2]", "loss": 5.0, "finish_reason": "length", "by": "policy"
        });
        assert_eq!(said, want);
    }

    #[test]
    fn the_prompt_of_a_dialogue_is_what_stands_before_its_last_response() {
        let mask = [false, false, true, true, false, true, true];
        let example = SftExample { tokens: (10..17).collect(), loss_mask: mask.to_vec() };
        assert_eq!(example.prompt(), [10, 11, 12, 13, 14]);
        let example = SftExample { tokens: vec![7, 8], loss_mask: vec![false, true] };
        assert_eq!(example.prompt(), [7]);
    }
}
