//! `fourfold dpo` and `fourfold kto`: from config and files to the trained adapter. Read `dpo/pairs.rs` and
//! `dpo/kto.rs` for the stages.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::continued::continued;
use super::{Model, check_context, prepared_among, save};
use crate::config::{Config, Stage};
use crate::data::examples::Examples;
use crate::data::examples::objectives::{RankedExample, UnpairedExample};
use crate::data::{PairLabel, Prepared};
use crate::dpo::{kto, pairs};
use crate::model::adapter::Adapter;
use crate::planner::passes;
use crate::report::number;
use crate::run::RunOptions;
use crate::run::memory_preflight::Parts;
use crate::run::options::Inputs;
use crate::train::supervised::Setup;

/// Where training starts, and the reference: the SFT adapter is both; without one a fresh adapter starts, and the bare
/// base is the reference.
fn start(
    config: &Config,
    model: &Model,
    adapter: Option<&PathBuf>,
    stage: Stage,
) -> Result<(Adapter, Option<Adapter>)> {
    match adapter {
        Some(path) => {
            let sft = continued(model, path, config, stage)?;
            Ok((sft.clone(), Some(sft)))
        }
        None => Ok((model.fresh_adapter(&config.lora, config.seed)?, None)),
    }
}

/// `fourfold dpo`.
pub(super) fn run(config: &Config, out: &Path, launch: &RunOptions) -> Result<Value> {
    let settings = config.dpo();
    let model = Model::of_section(&config.base)?;
    let data: Prepared<RankedExample> = prepared_among(&launch.world, config, model.checkpoint.tokenizer(), true)?;
    check_context(&model, data.train.longest_sequence())?;
    let (train, held_out) = (data.train.to_vec()?, data.held_out.to_vec()?);
    let (start, reference) = start(config, &model, settings.adapter.as_ref(), Stage::Dpo).context("[dpo] adapter")?;
    let inputs = Inputs::new(Stage::Dpo, config)?.model("", &model)?.adapter("adapter", reference.as_ref())?;
    let inputs = inputs.examples("data", &train)?.examples("held-out data", &held_out)?;
    let parts = Parts { stage: Stage::Dpo, policy: &model, scorer: None, start: &start, reward: None };
    let admission = parts.admit(config, |config| passes::dpo(config, &train, &held_out, launch.world.size()))?;
    let mut session = inputs.begin(out, launch)?;
    let memory = admission.report(&mut session);
    if train.iter().any(|example| example.label != PairLabel::default()) {
        session.report.warn(
            "dpo: warning: records have \"chosen_probability\" or \"margin\", which only the reward stage reads; here every chosen \
             response counts as the better one",
        );
    }
    let setup = Setup { base: &model.base, start: &start, recompute: admission.plan.checkpoint, seed: config.seed };
    let trained = pairs::train(setup, reference.as_ref(), &train, &held_out, &settings, &mut session);
    let (adapter, summary) = trained.map_err(|error| session.unsaved(error))?;
    if !launch.world.is_first() {
        return Ok(Value::Null);
    }
    let path = save(adapter, &model, &out.join("adapter")).map_err(|error| session.unsaved(error))?;
    Ok(json!({
        "stage": "dpo",
        "memory": memory,
        "eval_rewards/accuracies": number(summary.accuracy),
        "eval_rewards/margins": number(summary.margin),
        "eval_loss": number(summary.loss),
        "steps": summary.steps,
        "tokens": summary.tokens,
        "train_records": train.len(),
        "eval_records": held_out.len(),
        "adapter": path,
    }))
}

/// `fourfold kto`.
pub(super) fn run_kto(config: &Config, out: &Path, launch: &RunOptions) -> Result<Value> {
    let settings = config.kto();
    let model = Model::of_section(&config.base)?;
    let data: Prepared<UnpairedExample> = prepared_among(&launch.world, config, model.checkpoint.tokenizer(), true)?;
    kto::check(data.train.len(), data.held_out.len())?;
    let (train, held_out) = (data.train.to_vec()?, data.held_out.to_vec()?);
    check_context(&model, data.train.longest_sequence())?;
    // The KL term puts responses after each other's prompts.
    let max_length = config.data()?.max_length.min(model.base.config().max_position_embeddings);
    let (start, reference) = start(config, &model, settings.adapter.as_ref(), Stage::Kto).context("[kto] adapter")?;
    let inputs = Inputs::new(Stage::Kto, config)?.model("", &model)?.adapter("adapter", reference.as_ref())?;
    let inputs = inputs.examples("data", &train)?.examples("held-out data", &held_out)?;
    let parts = Parts { stage: Stage::Kto, policy: &model, scorer: None, start: &start, reward: None };
    let admission = parts.admit(config, |config| passes::kto(config, &train, &held_out, launch.world.size()))?;
    let mut session = inputs.begin(out, launch)?;
    let memory = admission.report(&mut session);
    let setup = Setup { base: &model.base, start: &start, recompute: admission.plan.checkpoint, seed: config.seed };
    let trained = kto::train(setup, reference.as_ref(), &train, &held_out, &settings, max_length, &mut session);
    let (adapter, summary) = trained.map_err(|error| session.unsaved(error))?;
    if !launch.world.is_first() {
        return Ok(Value::Null);
    }
    let path = save(adapter, &model, &out.join("adapter")).map_err(|error| session.unsaved(error))?;
    Ok(json!({
        "stage": "kto",
        "memory": memory,
        "eval_rewards/margins": number(summary.margin),
        "eval_loss": number(summary.loss),
        "desirable": summary.counts[0],
        "undesirable": summary.counts[1],
        "steps": summary.steps,
        "tokens": summary.tokens,
        "eval_records": held_out.len(),
        "adapter": path,
    }))
}
