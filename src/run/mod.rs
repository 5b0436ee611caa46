//! A stage from its config file to its finished folder: open the bases, read the data, train, save.
//!
//! This is the only place where configuration, data, model and stages meet, with one file per stage. Read `sft.rs`
//! first, then the stages themselves: `../sft.rs`, `reward/train.rs`, `dpo/pairs.rs` and `ppo/train.rs`.

mod continued;
mod data_warnings;
mod describe;
pub mod device_bench;
mod distill;
mod dpo;
mod foreseen;
mod hints;
mod llama_cpp;
mod llama_process;
mod measure;
mod members;
mod memory_preflight;
mod model;
mod offload;
mod options;
mod output;
pub mod placement;
mod plan_inputs;
mod ppo;
mod prompts;
mod reward;
mod rewards;
mod rollout_servers;
mod served_rollouts;
mod sft;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::config::{Config, Stage};
use crate::data;
use crate::data::Prepared;
use crate::data::examples::objectives::{Objective, PromptExample};
use crate::data::stream::cache::Stored;
use crate::device::select;
use crate::error::F16Overflow;
use crate::host::meter;
use crate::model::adapter::Adapter;
use crate::page;
use crate::report::number;
use crate::tokenizer::Tokenizer;
use crate::train::world::World;
use crate::train::{former, stop};
use crate::{host, invalid, note, warning};

pub use data_warnings::data_warnings;
pub use describe::describe;
pub use foreseen::{Lengths, absent_adapters, longest_prompt, refusals};
pub use hints::{Wanted, check_adapter_path, check_base_path, check_described};
pub use measure::{Measured, measure, measure_among};
pub use members::{members, with_members};
pub use model::{Model, lora_config};
pub use options::{RunOptions, quoted, resuming_command};
pub use output::{
    check_free, check_not_of_run, check_output, is_of, is_settings, prepare_output, replaced, settings_beside, stopped,
    write_summary,
};
pub use plan_inputs::PlanInputs;
pub use rewards::aggregate;
pub use rollout_servers::memory_beside;

/// Runs one stage of a config; returns the object that `--json` prints, on rank 0 where there are several.
///
/// # Errors
/// If the configuration, the base or the data cannot be used, the folder is another's or in use, training fails, or the
/// process was asked to stop.
pub fn stage(stage: Stage, config: &Config, out: &Path, launch: &RunOptions) -> Result<Value> {
    if launch.world.is_first() {
        // A process was killed before its first step.
        output::put_back(out)?;
        check_output(out, stage.name())?;
    }
    let config = &with_members(stage, config)?;
    let idle = config.idle_keys(stage);
    let config = &config.read_by(stage);
    let mut settled = placement::settled(config, launch.resume.as_ref().map(|_| out))?;
    match settled_stage(stage, &settled, out, launch, &idle) {
        // The folder is untouched: a base is opened before it is made.
        Err(error) if error.is::<F16Overflow>() && placement::leave_f16(config, &mut settled, &error)? => {
            // Its keys were named the first time.
            settled_stage(stage, &settled, out, launch, &[])
        }
        done => done,
    }
}

fn settled_stage(stage: Stage, config: &Config, out: &Path, launch: &RunOptions, idle: &[String]) -> Result<Value> {
    let started = Instant::now();
    // Rank 0 alone looks into the folder.
    let finished = launch.world.first(|| match options::finished(stage, config, out, launch)? {
        Some(summary) => Ok(Some(summary)),
        None => options::check(stage, config, out, launch).map(|()| None),
    })?;
    if let Some(summary) = finished {
        return Ok(summary);
    }
    if let Some(text) = config.without_section(stage) {
        warning!("{}: warning: {text}", stage.name());
    }
    if launch.world.is_first() {
        idle.iter().for_each(|idle| warning!("{}: warning: {idle}", stage.name()));
    }
    stop::listen()?;
    memory_preflight::check_base(&config.base, config, "base")?;
    config.reward_base.as_ref().map_or(Ok(()), |base| memory_preflight::check_base(base, config, "reward_base"))?;
    config.teacher.as_ref().map_or(Ok(()), |base| memory_preflight::check_base(base, config, "teacher"))?;
    let config = &offload::chosen(stage, config, launch.world.size())?;
    // Everything that can be wrong with the input is found before the folder is touched.
    let ran = match stage {
        Stage::Sft => sft::run(config, out, launch),
        Stage::Reward => reward::run(config, out, launch),
        Stage::Dpo => dpo::run(config, out, launch),
        Stage::Kto => dpo::run_kto(config, out, launch),
        Stage::Distill => distill::run(config, out, launch),
        Stage::Ppo | Stage::Grpo | Stage::Rloo => ppo::run(stage, config, out, launch),
    };
    if !launch.world.is_first() {
        return ran;
    }
    let mut object = ran.inspect_err(|error| {
        finish_page(out, Err(error));
        if let Err(error) = output::put_back(out) {
            crate::tell!("{error:#}; the run that was in {0} is in {0}/{1}", out.display(), former::NAME);
        }
    })?;
    if former::is_left(out) {
        former::remove(out)?;
    }
    if let Some(object) = object.as_object_mut() {
        object.insert("status".into(), "finished".into());
        object.insert("wall_s".into(), number(started.elapsed().as_secs_f64()));
        let peak = host::peak_rss_bytes().map(|bytes| bytes as f64 / f64::from(1 << 20));
        object.insert("peak_rss_mib".into(), peak.map_or(Value::Null, number));
        object.insert("device".into(), device_name(stage, config)?.into());
        object.insert("output_dir".into(), out.display().to_string().into());
    }
    write_summary(out, &object).context("all adapters are saved; what is missing is the summary of --json")?;
    finish_page(out, Ok(()));
    Ok(object)
}

/// Writes a run's last page; a failure is reported, since it costs nothing that was trained.
pub(crate) fn finish_page(out: &Path, ended: Result<(), &anyhow::Error>) {
    if let Err(error) = page::finish(out, ended) {
        crate::tell!("{error:#}; `fourfold report {}` makes the page again", quoted(&out.display().to_string()));
    }
}

/// The machines of a stage's bases in words; one if they share it.
fn device_name(stage: Stage, config: &Config) -> Result<String> {
    let trained = if stage == Stage::Reward { config.reward_base() } else { &config.base };
    let other = if stage.has_rollouts() { config.reward_base() } else { trained };
    let name = |section: &crate::config::Base| -> Result<String> {
        Ok(select(section.device())?.device.map_or_else(|| "cpu".into(), |device| device.name()))
    };
    let (first, second) = (name(trained)?, name(other)?);
    Ok(if first == second { first } else { format!("{first}, reward base on {second}") })
}

/// Refuses a sequence that the base cannot take, before anything is made or trained.
fn check_context(model: &Model, longest: usize) -> Result<()> {
    let context = model.base.config().max_position_embeddings;
    match longest > context {
        true => Err(invalid!(
            "[data] a sequence of {longest} tokens is longer than the model's context of {context}; set max_length = \
             {context} or less"
        )),
        false => Ok(()),
    }
}

/// The examples of `[data]` for a stage, with a word on what became of the records.
fn prepared<T: Objective + Stored>(
    config: &Config,
    tokenizer: &Tokenizer,
    completion_only: bool,
) -> Result<Prepared<T>> {
    prepared_among(&World::default(), config, tokenizer, completion_only)
}

/// The examples of `[data]` for an objective. Columns that the reward of a stage with rollouts reads are not reported as unread.
///
/// # Errors
/// Those of [`data::prepare`].
pub fn examples<T: Objective + Stored>(
    config: &Config,
    tokenizer: &Tokenizer,
    completion_only: bool,
) -> Result<Prepared<T>> {
    let mut prepared: Prepared<T> = data::prepare(config.data()?, tokenizer, config.seed, completion_only)?;
    if let Some(ppo) = config.ppo.as_ref().filter(|_| T::NAME == PromptExample::NAME) {
        prepared.report.without_unread(&ppo.columns_read(), config.data()?);
    }
    Ok(prepared)
}

/// The same on every rank; rank 0 has the word.
fn prepared_among<T: Objective + Stored>(
    world: &World,
    config: &Config,
    tokenizer: &Tokenizer,
    completion_only: bool,
) -> Result<Prepared<T>> {
    // Rank 0 writes the cache, which the others read.
    let prepared: Prepared<T> = world.first_then_others(|| examples(config, tokenizer, completion_only))?;
    let report = &prepared.report;
    match &prepared.cache {
        Some(path) => note!("data: {report}; tokens in {}", path.display()),
        None => note!("data: {report}"),
    }
    for warning in data_warnings(&prepared, config.data()?) {
        warning!("warning: {warning}");
    }
    Ok(prepared)
}

/// Saves under its base's name; returns the path as text.
fn save(adapter: Adapter, model: &Model, path: &Path) -> Result<String> {
    let _phase = meter::within(meter::Phase::Save);
    adapter.with_provenance(model.provenance()).save(path)?;
    Ok(PathBuf::from(path).display().to_string())
}
