//! Evaluation on held-out prompts: responses are sampled as in a rollout and measured by the training reward, by a gold
//! reward if there is one, by the KL to the reference, and by the win rate against the SFT model's responses. It does not
//! depend on the training loop. Read `stats.rs` for the statistics.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::rollout::{SampledTokens, sampling_params};
use crate::config::Ppo;
use crate::data::examples::objectives::PromptExample;
use crate::host::meter::{Phase, within};
use crate::model::adapter::Adapter;
use crate::model::base::Base;
use crate::model::batch::{Batch, Targets};
use crate::model::generate::{FinishReason, Response, generate};
use crate::model::roles::Policy;
use crate::report::{Metrics, Report, number};
use crate::reward::source::{RewardInputs, RewardSource};
use crate::rng::derive;
use crate::stats::{Histogram, Share, distinct_n, mean};
use crate::train::settings;
use crate::train::world::World;

/// The inputs of an evaluation.
#[derive(Clone, Copy)]
pub struct EvaluationInputs<'w> {
    /// Base of actor and reference.
    pub base: &'w Base,
    /// SFT adapter: the reference of the KL.
    pub sft: &'w Adapter,
    /// Reward source that the policy is trained on.
    pub source: &'w dyn RewardSource,
    /// Gold reward source that the policy is never trained on, if there is one.
    pub gold: Option<&'w dyn RewardSource>,
    /// Held-out prompts.
    pub prompts: &'w [PromptExample],
    /// Tokens that end a response.
    pub stop: &'w [u32],
    /// Decodes token ids.
    pub decode: &'w dyn Fn(&[u32]) -> String,
    /// The ranks that share the prompts.
    pub world: &'w World,
}

/// One policy's responses to the held-out prompts with their scores. Every list has one entry per prompt.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluated {
    /// Sampled responses.
    pub responses: Vec<Response>,
    /// Scores of the reward source that the policy is trained on.
    pub scores: Vec<f64>,
    /// Scores of the gold source.
    pub gold: Option<Vec<f64>>,
    /// Sum of log-probabilities minus those of the SFT model, nats per response; empty where no KL is measured.
    pub kl: Vec<f64>,
}

impl Evaluated {
    /// The distributions of the scores, as columns of metrics.jsonl.
    pub fn distributions(&self) -> Metrics {
        let all = [("score", Some(&self.scores)), ("gold", self.gold.as_ref())];
        let found = all.into_iter().filter_map(|(name, scores)| Some((name, Histogram::of(scores?.iter().copied())?)));
        found.map(|(name, found)| (format!("histogram/eval/{name}"), found.to_json())).collect()
    }

    /// Scores that decide which of two responses wins: the gold scores, or the training scores if there are none.
    fn deciding_scores(&self) -> &[f64] {
        self.gold.as_ref().unwrap_or(&self.scores)
    }
}

/// (B) sums of the log-probabilities of responses less those of the reference, nats.
fn kl_of_responses(
    reference: Policy<'_>,
    prompts: &[Vec<u32>],
    responses: &[Response],
    temperature: f64,
) -> Result<Vec<f64>> {
    let both = prompts.iter().zip(responses);
    let sequences: Vec<Vec<u32>> = both.map(|(p, r)| p.iter().chain(&r.tokens).copied().collect()).collect();
    let batch = Batch::new(&sequences)?;
    let lengths: Vec<usize> = responses.iter().map(|r| r.tokens.len()).collect();
    let targets = Targets::responses(&batch, &lengths)?;
    let mut found = reference.logprobs(&batch, &targets, temperature)?.logprobs.into_iter();
    let of = |response: &Response| response.logprobs.iter().zip(&mut found).map(|(a, b)| f64::from(a - b)).sum();
    Ok(responses.iter().map(of).collect())
}

/// A repeatable evaluation: the baseline is the SFT model, and the random numbers are the same in every call.
pub struct Evaluation<'w> {
    inputs: EvaluationInputs<'w>,
    config: &'w Ppo,
    seed: u64,
    baseline: Evaluated,
}

impl<'w> Evaluation<'w> {
    /// An evaluation without a baseline: see [`Evaluation::with_baseline`].
    pub fn new(inputs: EvaluationInputs<'w>, config: &'w Ppo, seed: u64) -> Self {
        Self { inputs, config, seed, baseline: Evaluated::default() }
    }

    /// Evaluates the SFT model.
    ///
    /// # Errors
    /// Those of generation and of the reward sources; if the report cannot be written.
    pub fn before(&self, report: &mut Report) -> Result<Evaluated> {
        self.run(&"before".into(), self.inputs.sft, report)
    }

    /// Sets the SFT model's responses, with which win rates compare.
    #[must_use]
    pub fn with_baseline(mut self, baseline: Evaluated) -> Self {
        self.baseline = baseline;
        self
    }

    /// The SFT model's responses.
    pub fn baseline(&self) -> &Evaluated {
        &self.baseline
    }

    /// Evaluates the policy `adapter`. The texts go to samples.jsonl, marked with `when`, after all are scored.
    ///
    /// # Errors
    /// Those of generation and of the reward sources; if the report cannot be written.
    pub fn run(&self, when: &Value, adapter: &Adapter, report: &mut Report) -> Result<Evaluated> {
        let _phase = within(Phase::Evaluation);
        let EvaluationInputs { base, sft, source, gold, prompts, stop, decode, world } = self.inputs;
        // Evaluations are compared with each other, so that a weight which moves has its last value in all of them.
        source.set_progress(1.0);
        let sampling = sampling_params(self.config, stop);
        let temperature = if sampling.temperature > 0.0 { sampling.temperature } else { 1.0 };
        let policy = Policy::new(base, Some(adapter));
        let reference = self.config.measure_kl.then(|| Policy::new(base, Some(sft)));
        let mut found = Evaluated { gold: gold.map(|_| vec![]), ..Evaluated::default() };
        let mut samples = vec![];
        let mut sampled = SampledTokens::new("evaluation", prompts.len(), &sampling);
        for chunk in prompts.chunks(self.config.at_once()) {
            let ids: Vec<Vec<u32>> = chunk.iter().map(|p| p.tokens.clone()).collect();
            let numbers = found.scores.len() as u64..(found.scores.len() + ids.len()) as u64;
            let seeds: Vec<u64> = numbers.map(|i| derive(self.seed, &[settings::EVALUATION, i])).collect();
            let of_rank = world.share(ids.len(), |mine| {
                let (ids, seeds) = (&ids[mine.clone()], &seeds[mine]);
                if ids.is_empty() {
                    return Ok(vec![]);
                }
                sampled.batch(ids.len());
                let responses = generate(policy, ids, seeds, &sampling, |s, token| sampled.token(s, token))?;
                let kl = match reference {
                    Some(reference) => Some(kl_of_responses(reference, ids, &responses, temperature)?),
                    None => None,
                };
                Ok(responses
                    .into_iter()
                    .enumerate()
                    .map(|(i, response)| (response, kl.as_ref().map(|kl| kl[i])))
                    .collect())
            })?;
            let (responses, kl): (Vec<Response>, Vec<Option<f64>>) = of_rank.into_iter().unzip();
            let entries: Vec<usize> = chunk.iter().map(|p| p.entry).collect();
            let inputs = RewardInputs { prompts: &ids, responses: &responses, entries: &entries, decode, known: &[] };
            let scores = source.scores(&inputs)?;
            let gold_scores = gold.map(|gold| gold.scores(&inputs)).transpose()?;
            for (i, (prompt, response)) in chunk.iter().zip(&responses).enumerate() {
                let kl = kl[i];
                let mut sample = json!({
                    "evaluation": when,
                    "prompt": prompt.text,
                    "response": decode(&response.tokens),
                    "score": number(f64::from(scores[i])),
                    "kl": kl.map(number),
                    "finish_reason": response.finish.name(),
                });
                if let (Some(gold_scores), Some(all)) = (&gold_scores, &mut found.gold) {
                    sample["gold"] = number(f64::from(gold_scores[i]));
                    all.push(f64::from(gold_scores[i]));
                }
                samples.push(sample);
                found.kl.extend(kl);
                found.scores.push(f64::from(scores[i]));
            }
            found.responses.extend(responses);
            let when = when.as_str().map_or_else(|| when.to_string(), str::to_owned);
            report.note(&format!(
                "{}: evaluation {when}: {} of {} prompts, mean score {:.3}",
                self.config.origin.name(),
                found.scores.len(),
                prompts.len(),
                mean(&found.scores)
            ));
        }
        // All samples or none: an evaluation that a reward source interrupts is repeated when the run is resumed.
        samples.iter().try_for_each(|sample| report.sample(sample))?;
        Ok(found)
    }

    /// Metrics of an evaluation, compared with the baseline.
    pub fn metrics(&self, evaluated: &Evaluated) -> Metrics {
        let texts: Vec<&[u32]> = evaluated.responses.iter().map(|r| &r.tokens[..]).collect();
        let lengths: Vec<f64> = texts.iter().map(|t| t.len() as f64).collect();
        let ended = evaluated.responses.iter().filter(|r| r.finish == FinishReason::Stop).count();
        let wins = Share::of_wins(evaluated.deciding_scores(), self.baseline.deciding_scores());
        let mut metrics = Metrics::new();
        let mut put = |name: &str, value: f64| metrics.insert(format!("eval/{name}"), number(value));
        put("score", mean(&evaluated.scores));
        if let Some(gold) = &evaluated.gold {
            put("gold", mean(gold));
        }
        if !evaluated.kl.is_empty() {
            put("kl", mean(&evaluated.kl));
        }
        put("length", mean(&lengths));
        put("ended", ended as f64 / texts.len() as f64);
        put("distinct_1", distinct_n(&texts, 1));
        put("distinct_2", distinct_n(&texts, 2));
        put("win_rate", wins.rate);
        put("win_rate_low", wins.low);
        put("win_rate_high", wins.high);
        metrics
    }
}
