//! The quickstart's run: SFT, reward model, PPO and merge over the embedded base, then the gold rule's scores on held-out
//! questions. PPO uses the learned reward only. Read `outcome.rs` for the table.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Error, Result};

use super::base::BASE;
use super::gold::{Gold, gold};
use super::outcome::{Example, Outcome, Responses, memory_rows, win_rate};
use super::task::{Row, Split, pairs, prompts, sft_rows};
use crate::config;
use crate::config::{Config, Supervised as _};
use crate::data::examples::objectives::{RankedExample, SftExample};
use crate::error::Interrupted;
use crate::export::Source;
use crate::export::merged;
use crate::export::merged::{Kind, MAX_SHARD_SIZE, MergedType};
use crate::host;
use crate::model::adapter::Adapter;
use crate::model::batch::{Batch, Targets};
use crate::model::generate::{FinishReason, SamplingParams, generate};
use crate::model::readers::Sharing;
use crate::model::roles::{Policy, ValueModel};
use crate::model_files::ModelFiles;
use crate::page;
use crate::page::{About, LivePage};
use crate::planner::plan;
use crate::ppo::rollout::sampling_params;
use crate::ppo::run::{PpoRun, micro_batch_tokens};
use crate::ppo::train::train;
use crate::report::Report;
use crate::report::progress::{Progress, Unit};
use crate::reward::source::RewardModel;
use crate::rng::derive;
use crate::run;
use crate::run::{Model, finish_page, is_of, placement, prepare_output, write_summary};
use crate::tokenizer::{SpecialTokens, Tokenizer};
use crate::train::session::Session;
use crate::train::settings;
use crate::train::stop;
use crate::train::supervised::Setup;
use crate::train::world::World;
use crate::{reward, sft};

/// Sizes of the data sets.
const SFT_ROWS: usize = 1536;
const PAIRS: usize = 4096;
const FLIPPED_PERCENT: usize = 15;
const HELD_OUT_ROWS: usize = 256;
const HELD_OUT_PAIRS: usize = 512;
const QUESTIONS: usize = 256;
/// Responses per generation batch in the evaluation.
const BATCH: usize = 64;

/// The settings of all three stages, as a config file would hold them.
pub fn config(seed: u64) -> Config {
    Config {
        compat: None,
        seed,
        output_dir: None,
        report_to: config::ReportTo::default(),
        base: config::Base::at("embedded"),
        reward_base: None,
        teacher: None,
        checkpoint: config::CheckpointConfig::default(),
        guard: config::Guard::default(),
        memory: config::Memory::default(),
        lora: config::Lora::default(),
        data: None,
        sft: Some(config::Sft {
            learning_rate: 3e-3,
            per_device_train_batch_size: 32,
            warmup_steps: 10,
            ..config::Sft::default()
        }),
        reward: Some(config::Reward {
            learning_rate: 3e-3,
            per_device_train_batch_size: 32,
            warmup_steps: 10,
            weight_decay: 0.01,
            ..config::Reward::default()
        }),
        dpo: None,
        kto: None,
        distill: None,
        grpo: None,
        rloo: None,
        ppo: Some(config::Ppo {
            learning_rate: 2e-3,
            total_episodes: 40 * 64,
            batch_size: 64,
            num_mini_batches: 2,
            micro_batch_size: 32,
            response_length: 48,
            kl_coef: 0.1,
            // A reward model has seen whole responses only, and some like endless ones better than any. A critic that starts as
            // the reward model predicts nothing yet, so the first advantages would be noise.
            critic_warmup: 2,
            missing_eos_penalty: Some(1.0),
            warmup_steps: 6,
            save_samples: 2,
            ..config::Ppo::default()
        }),
    }
}

/// Runs all stages and writes adapters, merged model, metrics and the resolved config to `out`.
///
/// # Errors
/// If `out` belongs to another run or cannot be written.
pub fn run(out: &Path, seed: u64) -> Result<Outcome> {
    run_with(out, &config(seed))
}

/// Refuses to replace a quickstart of other settings; the same settings give the same bytes again.
///
/// # Errors
/// If there is one; if something else is under that name.
pub fn check_free(out: &Path, seed: u64, device: Option<config::DeviceChoice>) -> Result<()> {
    run::check_output(out, "quickstart")?;
    let config = placement::settled(&config(seed).on(device), None)?;
    if is_of(out, "quickstart", &config.to_toml()?) { Ok(()) } else { run::check_free(out, "quickstart") }
}

/// Runs all stages on the machine that `--device` names.
///
/// # Errors
/// Those of [`run`]; if the machine cannot be used.
pub fn run_on(out: &Path, seed: u64, device: Option<config::DeviceChoice>) -> Result<Outcome> {
    run_with(out, &config(seed).on(device))
}

/// Runs all stages with other settings, for studies. A finished quickstart in the folder stays until the new one is.
///
/// # Errors
/// Those of [`run`].
pub fn run_with(out: &Path, config: &Config) -> Result<Outcome> {
    stop::listen()?;
    if !out.join("summary.json").exists() {
        return run_in(out, config).map_err(|error| stopped(error, &kept(out)));
    }
    let made = run::replaced(out, "quickstart", &["merged"], |new| {
        let outcome = Outcome { out: out.to_path_buf(), ..run_in(new, config)? };
        write_summary(new, &outcome.to_json())?;
        Ok(outcome)
    })
    .map_err(|error| stopped(error, &format!("the quickstart that was in {} is as it was", out.display())))?;
    // Its page names the folder that it was made in.
    if let Err(error) = page::write(&[out.to_path_buf()], &out.join(page::NAME)) {
        crate::tell!("{error:#}; `fourfold report {}` makes the page again", run::quoted(&out.display().to_string()));
    }
    Ok(made)
}

/// What a quickstart that was stopped leaves.
fn kept(out: &Path) -> String {
    let is_saved = |name: &&str| out.join(name).join("adapter_config.json").exists();
    let saved: Vec<&str> = ["sft", "reward", "actor", "critic"].into_iter().filter(is_saved).collect();
    match saved.is_empty() {
        true => "no stage was finished".into(),
        false => format!("the adapters of the finished stages are in {}: {}", out.display(), saved.join(", ")),
    }
}

/// The error of a quickstart that was stopped on request with what is left of it; any other error as it is.
fn stopped(error: Error, left: &str) -> Error {
    match error.downcast::<Interrupted>() {
        Ok(Interrupted(text)) => Interrupted(format!("{text}; {left}; the same command begins anew")).into(),
        Err(error) => error,
    }
}

fn run_in(out: &Path, config: &Config) -> Result<Outcome> {
    let outcome = all_stages(out, config).inspect_err(|error| finish_page(out, Err(error)))?;
    write_summary(out, &outcome.to_json())?;
    finish_page(out, Ok(()));
    Ok(outcome)
}

fn all_stages(out: &Path, config: &Config) -> Result<Outcome> {
    let config = &placement::settled(config, None)?;
    let seed = config.seed;
    let whole = Instant::now();
    let mut seconds = vec![];
    let mut lap = Instant::now();
    let mut clock = |name: &'static str, lap: &mut Instant| {
        seconds.push((name, lap.elapsed().as_secs_f64()));
        *lap = Instant::now();
    };
    // 1. The base, shared by all four roles.
    let model = Model::of_opened(embedded()?, &config.base)?;
    let (base, tokenizer) = (&model.base, model.checkpoint.tokenizer());
    let _lock = prepare_output(out, "quickstart", &config.to_toml()?)?;
    write_base(&model, &out.join("base"))?;
    let about = About::new("fourfold quickstart", &placement::name_of(base));
    let mut session = Session::new(LivePage::follow(Report::to_dir(out)?, out, about, false));
    // 2. The data.
    let text = Text { tokenizer, eos: tokenizer.eos_id().context("the embedded tokenizer has an end token")? };
    let train_rows = sft_rows(seed, SFT_ROWS, Split::Train);
    let held_rows = sft_rows(derive(seed, &[1]), HELD_OUT_ROWS, Split::Train);
    let sft_train = train_rows.iter().map(|r| text.sft(&r.row, &r.response)).collect::<Result<Vec<_>>>()?;
    let sft_held = held_rows.iter().map(|r| text.sft(&r.row, &r.response)).collect::<Result<Vec<_>>>()?;
    let ranked = |split, n| {
        let pairs = pairs(seed, n, FLIPPED_PERCENT, split);
        pairs.iter().map(|p| text.ranked(&p.row, [&p.chosen, &p.rejected])).collect::<Result<Vec<_>>>()
    };
    let (pairs_train, pairs_held) = (ranked(Split::Train, PAIRS)?, ranked(Split::HeldOut, HELD_OUT_PAIRS)?);
    clock("data", &mut lap);
    // 3. SFT: one adapter over the base.
    let fresh = model.fresh_adapter(&config.lora, seed)?;
    let settings = config.sft();
    let batch = settings::batch_size(&settings.supervised());
    let recompute = plan::resolve(settings.checkpoint, base, &fresh, plan::largest_batch(batch, &sft_train));
    let setup = Setup { base, start: &fresh, recompute, seed };
    let (sft_adapter, sft_summary) = sft::train(setup, &sft_train, &sft_held, &settings, &mut session)?;
    save(&model, &sft_adapter, &out.join("sft"))?;
    clock("sft", &mut lap);
    // 4. The reward model: another adapter, initialised from the SFT adapter.
    let settings = config.reward();
    let batch = settings::batch_size(&settings.supervised());
    let recompute = plan::resolve(settings.checkpoint, base, &sft_adapter, plan::largest_batch(batch, &pairs_train));
    let setup = Setup { base, start: &sft_adapter, recompute, seed };
    let (reward_adapter, reward_summary) =
        reward::train::train(setup, &pairs_train, &pairs_held, &settings, &mut session)?;
    save(&model, &reward_adapter, &out.join("reward"))?;
    clock("reward", &mut lap);
    // 5. PPO: the actor is initialised from SFT, the critic from the reward model; four roles, one base.
    let ppo_config = config.ppo()?;
    let questions = prompts(seed, ppo_config.total_episodes, Split::Train);
    let questions = questions.iter().map(|r| text.encode(&r.prompt)).collect::<Result<Vec<_>>>()?;
    let source = RewardModel(ValueModel::new(base, &reward_adapter)?);
    let decode = |ids: &[u32]| tokenizer.decode(ids).unwrap_or_default();
    let run = PpoRun {
        world: World::alone(),
        base,
        reward_base: base,
        sft: &sft_adapter,
        reward: Some(&reward_adapter),
        prompts: &questions,
        stop: tokenizer.eos_ids(),
        source: &source,
        decode: &decode,
        evaluation: None,
        ptx: None,
        pad: None,
        sampler: None,
        config: ppo_config,
        seed,
        recompute: plan::resolve(ppo_config.checkpoint, base, &sft_adapter, micro_batch_tokens(&questions, ppo_config)),
        sharing: Sharing::default(),
    };
    let trained = train(&run, &mut session)?;
    save(&model, &trained.actor, &out.join("actor"))?;
    if let Some(critic) = &trained.critic {
        save(&model, critic, &out.join("critic"))?;
    }
    clock("ppo", &mut lap);
    // 6. The merged model, compared with base + adapter.
    let held_out = prompts(seed, QUESTIONS, Split::HeldOut);
    let questions = held_out.iter().map(|r| text.encode(&r.prompt)).collect::<Result<Vec<_>>>()?;
    let merged = out.join("merged");
    if merged.exists() {
        fs::remove_dir_all(&merged).with_context(|| format!("replacing {}", merged.display()))?;
    }
    // Compared in f32 on every machine.
    let exact = config::Base { compute_dtype: Some(config::ComputeDtype::F32), ..config.base.clone() };
    let compared = match base.place() {
        Some(_) => Some(Model::of_opened(embedded()?, &exact)?),
        None => None,
    };
    let source = Source {
        files: &model.checkpoint,
        base: compared.as_ref().map_or(base, |model| &model.base),
        adapter: &trained.actor,
        prompts: &questions[..8],
        about: "`fourfold quickstart`: SFT, a reward model and PPO on the embedded task.",
    };
    let how = merged::Settings { dtype: MergedType::Bf16, kind: Kind::LanguageModel, max_shard_size: MAX_SHARD_SIZE };
    let comparison = merged::merge(&source, how, &merged)?;
    clock("merge", &mut lap);
    // 7. The gold rule on held-out questions, with the sampling parameters of training.
    let judge = |adapter: &Adapter| {
        let sampling = sampling_params(ppo_config, tokenizer.eos_ids());
        evaluate(&model, adapter, [&sft_adapter, &reward_adapter], &held_out, &questions, &sampling, seed)
    };
    let (before, after) = (judge(&sft_adapter)?, judge(&trained.actor)?);
    clock("judge", &mut lap);
    let examples = (0..held_out.len())
        .step_by(held_out.len() / 3)
        .take(3)
        .map(|i| Example {
            question: held_out[i].question().to_string(),
            before: before.texts[i].trim().to_string(),
            after: after.texts[i].trim().to_string(),
        })
        .collect();
    Ok(Outcome {
        sft_ppl: (sft_summary.perplexity_before, sft_summary.perplexity_after),
        reward: reward_summary.after,
        win: win_rate(&before, &after),
        memory: memory_rows(&model, &sft_adapter, &reward_adapter),
        before,
        after,
        comparison,
        examples,
        seconds,
        wall_s: whole.elapsed().as_secs_f64(),
        peak_rss_bytes: host::peak_rss_bytes(),
        out: out.to_path_buf(),
        device: placement::name_of(base),
        seed,
    })
}

/// The embedded base's files.
pub fn embedded() -> Result<ModelFiles> {
    ModelFiles::from_embedded(BASE.config, BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights)
}

/// The embedded base as a Hugging Face directory, for other commands and other tools.
fn write_base(model: &Model, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    let mut files = model.checkpoint.side_files()?;
    files.push(("model.safetensors".into(), BASE.weights.to_vec()));
    for (name, content) in files {
        fs::write(dir.join(&name), content).with_context(|| format!("writing {}", dir.join(&name).display()))?;
    }
    Ok(())
}

/// Encodes the task's texts.
struct Text<'t> {
    tokenizer: &'t Tokenizer,
    eos: u32,
}

impl Text<'_> {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, SpecialTokens::None)
    }

    fn response(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode(text)?;
        ids.push(self.eos);
        Ok(ids)
    }

    fn sft(&self, row: &Row, response: &str) -> Result<SftExample> {
        let mut tokens = self.encode(&row.prompt)?;
        let prompt = tokens.len();
        tokens.extend(self.response(response)?);
        let loss_mask = (0..tokens.len()).map(|i| i >= prompt).collect();
        Ok(SftExample { tokens, loss_mask })
    }

    fn ranked(&self, row: &Row, responses: [&String; 2]) -> Result<RankedExample> {
        let responses = responses.into_iter().map(|a| self.response(a)).collect::<Result<Vec<_>>>()?;
        Ok(RankedExample { prompt: self.encode(&row.prompt)?, responses, label: Default::default() })
    }
}

fn save(model: &Model, adapter: &Adapter, path: &Path) -> Result<()> {
    adapter.clone().with_provenance(model.provenance()).save(path)
}

/// Samples one policy's responses to the held-out questions and scores them.
fn evaluate(
    model: &Model,
    adapter: &Adapter,
    [sft, reward]: [&Adapter; 2],
    held_out: &[Row],
    questions: &[Vec<u32>],
    sampling: &SamplingParams,
    seed: u64,
) -> Result<Responses> {
    let (base, tokenizer) = (&model.base, model.checkpoint.tokenizer());
    let (policy, reference) = (Policy::new(base, Some(adapter)), Policy::new(base, Some(sft)));
    let reward = ValueModel::new(base, reward)?;
    let mut found = Responses::default();
    let mut progress = Progress::new("judging", held_out.len(), Unit::Of("question"));
    for (chunk, (rows, ids)) in held_out.chunks(BATCH).zip(questions.chunks(BATCH)).enumerate() {
        let first = (chunk * BATCH) as u64;
        let seeds: Vec<u64> = (0..ids.len() as u64).map(|i| derive(seed, &[settings::EVALUATION, first + i])).collect();
        let responses = generate(policy, ids, &seeds, sampling, |_, _| {})?;
        let sequences: Vec<Vec<u32>> =
            ids.iter().zip(&responses).map(|(p, r)| p.iter().chain(&r.tokens).copied().collect()).collect();
        let batch = Batch::new(&sequences)?;
        let lengths: Vec<usize> = responses.iter().map(|r| r.tokens.len()).collect();
        let targets = Targets::responses(&batch, &lengths)?;
        let mut ref_logprobs = reference.logprobs(&batch, &targets, sampling.temperature)?.logprobs.into_iter();
        found.rewards.extend(reward.scores(&batch)?);
        for (row, response) in rows.iter().zip(&responses) {
            let kl = response.logprobs.iter().zip(&mut ref_logprobs).map(|(a, b)| f64::from(a - b)).sum();
            let text = tokenizer.decode(&response.tokens)?;
            let ended = response.finish == FinishReason::Stop;
            let score: Gold = gold(row, &text, ended);
            found.gold.push(score);
            found.kl.push(kl);
            found.ended += usize::from(ended);
            found.texts.push(text);
        }
        progress.add(rows.len());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::invalid;

    #[test]
    fn a_quickstart_that_was_stopped_names_the_adapters_that_are_left() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path();
        let says = |error: Error| stopped(error, &kept(out)).to_string();
        let stop = || Error::from(Interrupted("stopped after 3 steps".into()));
        assert_eq!(says(stop()), "stopped after 3 steps; no stage was finished; the same command begins anew");
        for name in ["sft", "reward"] {
            fs::create_dir(out.join(name)).unwrap();
            fs::write(out.join(name).join("adapter_config.json"), "{}").unwrap();
        }
        let left = format!("the adapters of the finished stages are in {}: sft, reward", out.display());
        assert_eq!(says(stop()), format!("stopped after 3 steps; {left}; the same command begins anew"));
        assert!(stopped(stop(), "x").is::<Interrupted>(), "its exit code is that of a run that was stopped");
        assert_eq!(says(invalid!("no")), "no");
    }
}
