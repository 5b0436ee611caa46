//! `fourfold ppo`, with the evaluation on held-out prompts before and after. Read ../ppo/train.rs for the stage.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Model, held_out, prepare_output, records, save};
use crate::config::{self, Config};
use crate::data::ModelEncoder;
use crate::data::phases::{PromptExample, prompt_examples};
use crate::model::adapter::Adapter;
use crate::model::generate::generate;
use crate::model::roles::{Policy, Scorer};
use crate::report::{Report, number};
use crate::reward::source::{Answers, RewardModel, RewardSource};
use crate::rng::derive;
use crate::train::settings;
use crate::{invalid, ppo};

pub(super) fn run(config: &Config, out: &Path) -> Result<Value> {
    let settings = config.ppo()?;
    let model = Model::of_section(&config.base)?;
    // One base serves all four roles where both sections name the same files, opened alike.
    let other = match &config.reward_base {
        Some(base) if *base != config.base => Some(Model::of_section(base)?),
        _ => None,
    };
    let scorer = other.as_ref().unwrap_or(&model);
    check_same_tokens(&model, scorer)?;
    let encoder = ModelEncoder::new(model.checkpoint.tokenizer())?;
    let examples = prompt_examples(&records(config)?, &encoder, config.data()?)?;
    let (prompts, held_out) = held_out(config, examples)?;
    let sft = match &settings.adapter {
        Some(path) => model.adapter(path).context("[ppo] adapter")?.with_score_head(None)?,
        None => model.fresh_adapter(&config.lora, config.seed)?,
    };
    let reward = scorer.adapter(&settings.reward_adapter).context("[ppo] reward_adapter")?;
    let start = ppo::train::Start { base: &model.base, reward_base: &scorer.base, sft: &sft, reward: Some(&reward) };
    let reward = Scorer::new(&scorer.base, &reward)
        .with_context(|| format!("[ppo] reward_adapter = {}", settings.reward_adapter.display()))?;
    let ids: Vec<Vec<u32>> = prompts.iter().map(|p| p.tokens.clone()).collect();
    let asked = &held_out[..held_out.len().min(settings.eval_prompts)];
    let asked_ids: Vec<Vec<u32>> = asked.iter().map(|p| p.tokens.clone()).collect();
    ppo::train::check(start, &[&ids[..], &asked_ids].concat(), settings)?;
    prepare_output(out, "ppo", &config.to_toml()?)?;
    let mut report = Report::to_dir(out)?;
    let tokenizer = model.checkpoint.tokenizer();
    let decode = |ids: &[u32]| tokenizer.decode(ids).unwrap_or_default();
    let source = RewardModel(reward);
    let task = ppo::train::Task { start, prompts: &ids, stop: tokenizer.eos_ids(), source: &source, decode: &decode };
    let evaluation =
        Evaluation { start, source: &source, prompts: asked, stop: tokenizer.eos_ids(), settings, seed: config.seed };
    let before = evaluation.run("before", &sft, &decode, &mut report)?;
    let trained = ppo::train::train(task, settings, config.seed, &mut report)?;
    let actor = save(trained.actor.clone(), &model, &out.join("actor"))?;
    let critic = save(trained.critic, scorer, &out.join("critic"))?;
    let ema = trained.ema.map(|ema| save(ema, &model, &out.join("actor_ema"))).transpose()?;
    let after = evaluation.run("after", &trained.actor, &decode, &mut report)?;
    let gain: Vec<f64> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
    let last = trained.last;
    Ok(json!({
        "stage": "ppo",
        "kl": last.get("objective/kl"),
        "scores": last.get("objective/scores"),
        "eval_score_before": mean_and_error(&before),
        "eval_score_after": mean_and_error(&after),
        "eval_score_gain": mean_and_error(&gain),
        "eval_prompts": asked.len(),
        "last": last,
        "actor": actor,
        "critic": critic,
        "actor_ema": ema,
    }))
}

/// The reward model reads the policy's token ids, so both must mean the same texts by them.
fn check_same_tokens(policy: &Model, scorer: &Model) -> Result<()> {
    let (ours, theirs) = (policy.checkpoint.tokenizer(), scorer.checkpoint.tokenizer());
    let differs = |id: &u32| ours.token(*id) != theirs.token(*id);
    let ids = policy.base.config().vocab_size.max(scorer.base.config().vocab_size) as u32;
    match (0..ids).find(differs) {
        Some(id) => Err(invalid!(
            "[reward_base] has another tokenizer than [base]: token {id} is {:?} there and {:?} here; use a reward base \
             with the policy's tokenizer",
            theirs.token(id).unwrap_or_default(),
            ours.token(id).unwrap_or_default()
        )),
        None => Ok(()),
    }
}

/// Held-out prompts, answered by sampling and scored by the learned reward.
struct Evaluation<'w> {
    start: ppo::train::Start<'w>,
    source: &'w dyn RewardSource,
    prompts: &'w [PromptExample],
    stop: &'w [u32],
    settings: &'w config::Ppo,
    seed: u64,
}

impl Evaluation<'_> {
    /// The score of one answer to each prompt; the texts go to samples.jsonl, marked with `when`.
    fn run(
        &self,
        when: &str,
        adapter: &Adapter,
        decode: &dyn Fn(&[u32]) -> String,
        report: &mut Report,
    ) -> Result<Vec<f64>> {
        let sampling = ppo::train::sampling(self.settings, self.stop);
        let policy = Policy::new(self.start.base, Some(adapter));
        let mut scores: Vec<f64> = vec![];
        for some in self.prompts.chunks(self.settings.batch_size) {
            let ids: Vec<Vec<u32>> = some.iter().map(|p| p.tokens.clone()).collect();
            let numbers = scores.len() as u64..(scores.len() + ids.len()) as u64;
            let seeds: Vec<u64> = numbers.map(|i| derive(self.seed, &[settings::EVALUATION, i])).collect();
            let responses = generate(policy, &ids, &seeds, &sampling, |_, _| {})?;
            let answers = Answers { prompts: &ids, responses: &responses, decode };
            for ((prompt, response), score) in some.iter().zip(&responses).zip(self.source.scores(&answers)?) {
                report.sample(&json!({
                    "evaluation": when,
                    "prompt": prompt.text,
                    "response": decode(&response.tokens),
                    "score": number(f64::from(score)),
                    "finish_reason": response.finish.name(),
                }))?;
                scores.push(f64::from(score));
            }
            let mean = scores.iter().sum::<f64>() / scores.len() as f64;
            let all = self.prompts.len();
            report.note(&format!("ppo: evaluation {when}: {} of {all} prompts, mean score {mean:.3}", scores.len()));
        }
        Ok(scores)
    }
}

/// `{"mean", "standard_error"}`, nulls of nothing.
fn mean_and_error(values: &[f64]) -> Value {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    json!({ "mean": number(mean), "standard_error": number((variance / n).sqrt()) })
}
