//! `fourfold sft`: from config and files to the trained adapter. Read `../sft.rs` for the stage.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::continued::continued;
use super::{Model, check_context, prepared_among, save};
use crate::config::{Config, Stage};
use crate::data::Prepared;
use crate::data::examples::Examples;
use crate::planner::passes;
use crate::report::number;
use crate::run::RunOptions;
use crate::run::memory_preflight::Parts;
use crate::run::options::Inputs;
use crate::sft;
use crate::train::supervised::Setup;

pub(super) fn run(config: &Config, out: &Path, launch: &RunOptions) -> Result<Value> {
    let settings = config.sft();
    let model = Model::of_section(&config.base)?;
    let data = prepared_among(&launch.world, config, model.checkpoint.tokenizer(), settings.completion_only_loss)?;
    let Prepared { train, held_out, .. } = data;
    check_context(&model, train.longest_sequence())?;
    let start = match &settings.adapter {
        Some(path) => continued(&model, path, config, Stage::Sft).context("[sft] adapter")?,
        None => model.fresh_adapter(&config.lora, config.seed)?,
    };
    let given = settings.adapter.as_ref().map(|_| &start);
    let inputs = Inputs::new(Stage::Sft, config)?.model("", &model)?.adapter("adapter", given)?;
    let inputs = inputs.examples("data", &train)?.examples("held-out data", &held_out)?;
    let parts = Parts { stage: Stage::Sft, policy: &model, scorer: None, start: &start, reward: None };
    let admission = parts.admit(config, |config| passes::sft(config, &train, &held_out, launch.world.size()))?;
    let mut session = inputs.begin(out, launch)?;
    let memory = admission.report(&mut session);
    let setup = Setup { base: &model.base, start: &start, recompute: admission.plan.checkpoint, seed: config.seed };
    let trained = sft::train(setup, &train, &held_out, &settings, &mut session);
    let (adapter, summary) = trained.map_err(|error| session.unsaved(error))?;
    if !launch.world.is_first() {
        return Ok(Value::Null);
    }
    let path = save(adapter, &model, &out.join("adapter")).map_err(|error| session.unsaved(error))?;
    Ok(json!({
        "stage": "sft",
        "memory": memory,
        "perplexity_before": number(summary.perplexity_before),
        "perplexity_after": number(summary.perplexity_after),
        "steps": summary.steps,
        "tokens": summary.tokens,
        "train_records": train.len(),
        "eval_records": held_out.len(),
        "adapter": path,
    }))
}
