//! A stage from its config file to its finished folder: opens the bases, reads the data, trains, saves. The only place
//! where configuration, data, model and stages meet. Read sft.rs, reward/train.rs, ppo/train.rs for the stages.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::config::{self, Config, Lora, Stage};
use crate::data::phases::{PromptExample, RankedExample, prompt_examples, ranked_examples, sft_examples};
use crate::data::{self, Entry, ModelEncoder};
use crate::model::adapter::{Adapter, LoraConfig, Provenance, TargetModules};
use crate::model::base::Base;
use crate::model::batch::Batch;
use crate::model::checkpoint::Checkpoint;
use crate::model::generate::generate;
use crate::model::roles::{Policy, Scorer};
use crate::ops::cpu;
use crate::report::{Report, number};
use crate::reward::source::{Answers, RewardModel, RewardSource};
use crate::rng::derive;
use crate::train::settings;
use crate::{invalid, memory, ppo, reward, sft};

/// An opened base with its tokenizer.
pub struct Model {
    /// Files, tokenizer, configuration.
    pub checkpoint: Checkpoint,
    /// The frozen weights.
    pub base: Base,
}

impl Model {
    /// Opens a Hugging Face directory or a GGUF file.
    ///
    /// # Errors
    /// If it is no model that can be used; the message names file and tensor.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(Checkpoint::open(path)?)
    }

    /// Over an opened checkpoint.
    ///
    /// # Errors
    /// As for [`Model::open`].
    pub fn of(checkpoint: Checkpoint) -> Result<Self> {
        let base = Base::load(&checkpoint)?;
        let model = Self { checkpoint, base };
        model.check_finite()?;
        Ok(model)
    }

    /// One token goes through the network: a NaN in any matrix or norm reaches the logits. Only then are the tensors
    /// read one by one to name it, so that opening stays a matter of mapping.
    fn check_finite(&self) -> Result<()> {
        let logits = self.base.logits(&self.base.hidden(&Batch::new(&[[0u32]])?, None)?)?;
        if cpu::view(&logits)?.iter().all(|l| l.is_finite()) {
            return Ok(());
        }
        let is_bad = |values: &[f32]| values.iter().any(|v| !v.is_finite());
        let norm = self.base.norms().into_iter().find(|(_, n)| is_bad(n)).map(|(name, _)| name);
        let name = norm.or_else(|| Some(self.base.weights().into_iter().find(|(_, w)| is_bad(&w.to_f32()))?.0));
        let model = self.checkpoint.path().map_or_else(|| "the embedded model".into(), |p| p.display().to_string());
        Err(match name {
            Some(name) => invalid!("{model}: tensor {name} holds NaN or infinite numbers; fetch the model again"),
            None => {
                invalid!("{model}: its logits are not finite: the weights are too large for f32; use another model")
            }
        })
    }

    /// An adapter from a PEFT folder that fits this base.
    ///
    /// # Errors
    /// If it does not, or was trained over other weights of the same shape.
    pub fn adapter(&self, path: &Path) -> Result<Adapter> {
        let adapter = Adapter::load(path, self.base.shapes())?;
        match &adapter.provenance().base_fingerprint {
            Some(theirs) if theirs != self.base.fingerprint() => Err(invalid!(
                "{}: this adapter was trained over another base ({}): the shapes agree, the weights do not; give that \
                 base, or train the adapter anew over this one",
                path.display(),
                adapter.provenance().base_model.as_deref().unwrap_or("its name is not recorded")
            )),
            _ => Ok(adapter),
        }
    }

    /// What an adapter of this base says of its origin.
    pub fn provenance(&self) -> Provenance {
        Provenance {
            base_model: Some(match self.checkpoint.path() {
                Some(path) => path.display().to_string(),
                None => self.base.config().model_name.clone(),
            }),
            base_fingerprint: Some(self.base.fingerprint().to_string()),
        }
    }

    /// A fresh adapter shaped by `[lora]`.
    ///
    /// # Errors
    /// If `[lora]` selects nothing of this base.
    pub fn fresh_adapter(&self, lora: &Lora, seed: u64) -> Result<Adapter> {
        Adapter::init(lora_config(lora), self.base.shapes(), derive(seed, &[settings::INIT]))
    }
}

fn lora_config(lora: &Lora) -> LoraConfig {
    LoraConfig {
        r: lora.r,
        lora_alpha: lora.lora_alpha,
        use_rslora: lora.use_rslora,
        target_modules: match &lora.target_modules {
            all if all.is_all_linear() => TargetModules::AllLinear,
            config::TargetModules::One(pattern) => TargetModules::Regex(pattern.clone()),
            config::TargetModules::List(names) => TargetModules::List(names.clone()),
        },
        layers_to_transform: lora.layers_to_transform.clone(),
    }
}

/// The file by which an output folder is known as ours: its first line is [`mark`].
const RESOLVED: &str = "config.toml";

/// `by` is the command that writes the folder.
fn mark(by: &str) -> String {
    format!("# fourfold {by}: the settings of this run, every default written out")
}

/// Checks that `out` can be written to by the command `by`: it is new, empty, or the folder of a former run of that
/// very command. Nothing is touched.
///
/// # Errors
/// If there is something else under that name: another's files, or what another stage made.
pub fn check_output(out: &Path, by: &str) -> Result<()> {
    let empty = out.is_dir() && fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
    if !out.exists() || empty {
        return Ok(());
    }
    let settings = fs::read_to_string(out.join(RESOLVED)).unwrap_or_default();
    let first = settings.lines().next().unwrap_or_default();
    if first == mark(by) {
        return Ok(());
    }
    let other = ["sft", "reward", "ppo", "quickstart"].into_iter().find(|other| first == mark(other));
    Err(match other {
        Some(other) => invalid!("{} holds a run of `fourfold {other}`; name another folder with --out", out.display()),
        None => {
            invalid!("{} exists and is no folder of a former run; name another with --out, or remove it", out.display())
        }
    })
}

/// Makes the output folder, or takes one that [`check_output`] allows, and writes the resolved config into it.
///
/// # Errors
/// As for [`check_output`], and if the folder cannot be written to.
pub fn prepare_output(out: &Path, by: &str, resolved: &str) -> Result<()> {
    check_output(out, by)?;
    fs::create_dir_all(out).map_err(|e| invalid!("{}: {e}; name another folder with --out", out.display()))?;
    let path = out.join(RESOLVED);
    fs::write(&path, format!("{}\n{resolved}", mark(by)))
        .map_err(|e| invalid!("{}: {e}; name another folder with --out", path.display()))
}

/// Runs one stage of a config; returns the object that `--json` prints.
///
/// # Errors
/// If the configuration, the base or the data cannot be used, or training fails.
pub fn stage(stage: Stage, config: &Config, out: &Path) -> Result<Value> {
    let started = Instant::now();
    check_output(out, stage.name())?;
    // Everything that can be wrong with the input is found before the folder is touched.
    let mut object = match stage {
        Stage::Sft => run_sft(config, out)?,
        Stage::Reward => run_reward(config, out)?,
        Stage::Ppo => run_ppo(config, out)?,
    };
    if let Some(object) = object.as_object_mut() {
        object.insert("wall_s".into(), number(started.elapsed().as_secs_f64()));
        let peak = memory::peak_rss_bytes().map(|bytes| bytes as f64 / f64::from(1 << 20));
        object.insert("peak_rss_mib".into(), peak.map_or(Value::Null, number));
        object.insert("output_dir".into(), out.display().to_string().into());
    }
    Ok(object)
}

/// All records of `[data]`.
fn records(config: &Config) -> Result<Vec<Entry>> {
    let dataset = data::load(config.data()?)?;
    if dataset.skipped > 0 {
        eprintln!("data: {} records skipped; {}", dataset.skipped, dataset.first_skipped.unwrap_or_default());
    }
    Ok(dataset.entries)
}

/// Refuses a sequence that the base cannot take, before anything is made or trained.
fn check_context(model: &Model, lengths: impl Iterator<Item = usize>) -> Result<()> {
    let context = model.base.config().max_position_embeddings;
    match lengths.max() {
        Some(longest) if longest > context => Err(invalid!(
            "[data] a sequence of {longest} tokens is longer than the model's context of {context}; set max_length = \
             {context} or less"
        )),
        _ => Ok(()),
    }
}

/// Says what became of the records, refuses an empty phase, and holds some examples out: (training, held-out).
fn held_out<T>(config: &Config, (examples, report): (Vec<T>, data::phases::Report)) -> Result<(Vec<T>, Vec<T>)> {
    eprintln!("data: {report}");
    if examples.is_empty() {
        return Err(invalid!("[data] no record can be used ({report})"));
    }
    data::split(examples, config.data()?.eval_size(), config.seed)
}

fn run_sft(config: &Config, out: &Path) -> Result<Value> {
    let settings = config.sft();
    let model = Model::open(&config.base.path)?;
    let encoder = ModelEncoder::new(model.checkpoint.tokenizer())?;
    let examples = sft_examples(&records(config)?, &encoder, config.data()?, settings.completion_only_loss)?;
    check_context(&model, examples.0.iter().map(|e| e.tokens.len()))?;
    let (train, held_out) = held_out(config, examples)?;
    let start = match &settings.adapter {
        Some(path) => model.adapter(path).context("[sft] adapter")?,
        None => model.fresh_adapter(&config.lora, config.seed)?,
    };
    prepare_output(out, "sft", &config.to_toml()?)?;
    let mut report = Report::to_dir(out)?;
    let (adapter, summary) = sft::train(&model.base, &start, &train, &held_out, &settings, config.seed, &mut report)?;
    let path = save(adapter, &model, &out.join("adapter"))?;
    Ok(json!({
        "stage": "sft",
        "perplexity_before": number(summary.perplexity_before),
        "perplexity_after": number(summary.perplexity_after),
        "steps": summary.steps,
        "tokens": summary.tokens,
        "train_records": train.len(),
        "eval_records": held_out.len(),
        "adapter": path,
    }))
}

fn run_reward(config: &Config, out: &Path) -> Result<Value> {
    let settings = config.reward();
    let model = Model::open(&config.reward_base().path)?;
    let encoder = ModelEncoder::new(model.checkpoint.tokenizer())?;
    let examples = ranked_examples(&records(config)?, &encoder, config.data()?)?;
    let lengths = |e: &RankedExample| e.prompt.len() + e.answers.iter().map(Vec::len).max().unwrap_or(0);
    check_context(&model, examples.0.iter().map(lengths))?;
    let (train, held_out) = held_out(config, examples)?;
    let start = match &settings.adapter {
        Some(path) => model.adapter(path).context("[reward] adapter")?,
        None => model.fresh_adapter(&config.lora, config.seed)?,
    };
    prepare_output(out, "reward", &config.to_toml()?)?;
    let mut report = Report::to_dir(out)?;
    let (adapter, summary) =
        reward::train::train(&model.base, &start, &train, &held_out, &settings, config.seed, &mut report)?;
    let path = save(adapter, &model, &out.join("adapter"))?;
    Ok(json!({
        "stage": "reward",
        "accuracy_before": number(summary.before.accuracy),
        "accuracy": number(summary.after.accuracy),
        "mean_chosen_score": number(summary.after.mean_chosen),
        "mean_rejected_score": number(summary.after.mean_rejected),
        "eval_pairs": summary.after.pairs,
        "steps": summary.steps,
        "tokens": summary.tokens,
        "train_records": train.len(),
        "adapter": path,
    }))
}

fn run_ppo(config: &Config, out: &Path) -> Result<Value> {
    let settings = config.ppo()?;
    let model = Model::open(&config.base.path)?;
    // One base serves all four roles where both configs name the same files.
    let other = match &config.reward_base {
        Some(base) if base.path != config.base.path => Some(Model::open(&base.path)?),
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

/// Saves under its base's name; returns the path as text.
fn save(adapter: Adapter, model: &Model, path: &Path) -> Result<String> {
    adapter.with_provenance(model.provenance()).save(path)?;
    Ok(PathBuf::from(path).display().to_string())
}
