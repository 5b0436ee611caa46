//! Held-out prompts, answered by sampling as in a rollout and judged: by what the policy is trained on, by a gold rule
//! where there is one, by the distance from the reference, and against the SFT model's answers. Trains nothing.
//! Read ../stats.rs for the statistics.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::train::sampling;
use crate::config::Ppo;
use crate::data::examples::objectives::PromptExample;
use crate::host::meter::{Phase, within};
use crate::model::adapter::Adapter;
use crate::model::base::Base;
use crate::model::batch::{Batch, Targets};
use crate::model::generate::{FinishReason, Response, generate};
use crate::model::roles::Policy;
use crate::report::{Figures, Report, number};
use crate::reward::source::{Answers, RewardSource};
use crate::rng::derive;
use crate::stats::{Share, distinct_n, mean};
use crate::train::settings;

/// Who asks, and who judges.
#[derive(Clone, Copy)]
pub struct Judges<'w> {
    /// Base of actor and reference.
    pub base: &'w Base,
    /// The SFT adapter: the KL is against it.
    pub sft: &'w Adapter,
    /// What the policy is trained on.
    pub source: &'w dyn RewardSource,
    /// What it is never trained on, where there is one.
    pub gold: Option<&'w dyn RewardSource>,
    /// Held out.
    pub prompts: &'w [PromptExample],
    /// Tokens that end a response.
    pub stop: &'w [u32],
    /// The text of token ids.
    pub decode: &'w dyn Fn(&[u32]) -> String,
}

/// One policy's answers to the held-out prompts, judged. All (prompts).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// As sampled.
    pub responses: Vec<Response>,
    /// By the source that the policy is trained on.
    pub scores: Vec<f64>,
    /// By the gold source.
    pub gold: Option<Vec<f64>>,
    /// Sum of log-probabilities minus the SFT model's, nats an answer.
    pub kl: Vec<f64>,
}

impl Judged {
    /// What decides which of two answers is better: the gold score, or the score where there is none.
    fn verdicts(&self) -> &[f64] {
        self.gold.as_ref().unwrap_or(&self.scores)
    }
}

/// An evaluation that can be repeated: the SFT model's answers are its baseline, the random numbers are always the same.
pub struct Evaluation<'w> {
    judges: Judges<'w>,
    config: &'w Ppo,
    seed: u64,
    baseline: Judged,
}

impl<'w> Evaluation<'w> {
    /// Without a baseline yet: see [`Evaluation::with_baseline`].
    pub fn new(judges: Judges<'w>, config: &'w Ppo, seed: u64) -> Self {
        Self { judges, config, seed, baseline: Judged::default() }
    }

    /// Has the SFT model answer.
    ///
    /// # Errors
    /// Those of generation and of the sources; if the report cannot be written.
    pub fn before(&self, report: &mut Report) -> Result<Judged> {
        self.run(&"before".into(), self.judges.sft, report)
    }

    /// With these answers of the SFT model to compare others with.
    #[must_use]
    pub fn with_baseline(mut self, baseline: Judged) -> Self {
        self.baseline = baseline;
        self
    }

    /// The SFT model's answers.
    pub fn baseline(&self) -> &Judged {
        &self.baseline
    }

    /// Answers of the policy `adapter`; the texts go to samples.jsonl, marked with `when`, once all are judged.
    ///
    /// # Errors
    /// Those of generation and of the sources; if the report cannot be written.
    pub fn run(&self, when: &Value, adapter: &Adapter, report: &mut Report) -> Result<Judged> {
        let _phase = within(Phase::Evaluation);
        let Judges { base, sft, source, gold, prompts, stop, decode } = self.judges;
        let sampling = sampling(self.config, stop);
        let temperature = if sampling.temperature > 0.0 { sampling.temperature } else { 1.0 };
        let (policy, reference) = (Policy::new(base, Some(adapter)), Policy::new(base, Some(sft)));
        let mut found = Judged { gold: gold.map(|_| vec![]), ..Judged::default() };
        let mut samples = vec![];
        for some in prompts.chunks(self.config.at_once()) {
            let ids: Vec<Vec<u32>> = some.iter().map(|p| p.tokens.clone()).collect();
            let numbers = found.scores.len() as u64..(found.scores.len() + ids.len()) as u64;
            let seeds: Vec<u64> = numbers.map(|i| derive(self.seed, &[settings::EVALUATION, i])).collect();
            let responses = generate(policy, &ids, &seeds, &sampling, |_, _| {})?;
            let sequences: Vec<Vec<u32>> =
                ids.iter().zip(&responses).map(|(p, r)| p.iter().chain(&r.tokens).copied().collect()).collect();
            let batch = Batch::new(&sequences)?;
            let lengths: Vec<usize> = responses.iter().map(|r| r.tokens.len()).collect();
            let targets = Targets::responses(&batch, &lengths)?;
            let mut theirs = reference.logprobs(&batch, &targets, temperature)?.logprobs.into_iter();
            let answers = Answers { prompts: &ids, responses: &responses, decode };
            let scores = source.scores(&answers)?;
            let verdicts = gold.map(|gold| gold.scores(&answers)).transpose()?;
            for (i, (prompt, response)) in some.iter().zip(&responses).enumerate() {
                let kl: f64 = response.logprobs.iter().zip(&mut theirs).map(|(a, b)| f64::from(a - b)).sum();
                let mut sample = json!({
                    "evaluation": when,
                    "prompt": prompt.text,
                    "response": decode(&response.tokens),
                    "score": number(f64::from(scores[i])),
                    "kl": number(kl),
                    "finish_reason": response.finish.name(),
                });
                if let (Some(verdicts), Some(all)) = (&verdicts, &mut found.gold) {
                    sample["gold"] = number(f64::from(verdicts[i]));
                    all.push(f64::from(verdicts[i]));
                }
                samples.push(sample);
                found.kl.push(kl);
                found.scores.push(f64::from(scores[i]));
            }
            found.responses.extend(responses);
            let when = when.as_str().map_or_else(|| when.to_string(), str::to_owned);
            report.note(&format!(
                "ppo: evaluation {when}: {} of {} prompts, mean score {:.3}",
                found.scores.len(),
                prompts.len(),
                mean(&found.scores)
            ));
        }
        // All or none: an evaluation that a dead source broke off is repeated when the run goes on.
        samples.iter().try_for_each(|sample| report.sample(sample))?;
        Ok(found)
    }

    /// Of answers, beside the baseline's.
    pub fn figures(&self, judged: &Judged) -> Figures {
        let texts: Vec<&[u32]> = judged.responses.iter().map(|r| &r.tokens[..]).collect();
        let lengths: Vec<f64> = texts.iter().map(|t| t.len() as f64).collect();
        let ended = judged.responses.iter().filter(|r| r.finish == FinishReason::Stop).count();
        let wins = Share::of_wins(judged.verdicts(), self.baseline.verdicts());
        let mut figures = Figures::new();
        let mut put = |name: &str, value: f64| figures.insert(format!("eval/{name}"), number(value));
        put("score", mean(&judged.scores));
        if let Some(gold) = &judged.gold {
            put("gold", mean(gold));
        }
        put("kl", mean(&judged.kl));
        put("length", mean(&lengths));
        put("ended", ended as f64 / texts.len() as f64);
        put("distinct_1", distinct_n(&texts, 1));
        put("distinct_2", distinct_n(&texts, 2));
        put("win_rate", wins.rate);
        put("win_rate_low", wins.low);
        put("win_rate_high", wins.high);
        figures
    }
}
