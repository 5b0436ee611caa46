//! `fourfold sft`. Read ../sft.rs for the stage.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Model, check_context, prepare_output, prepared, save};
use crate::config::Config;
use crate::data::Prepared;
use crate::data::examples::Examples;
use crate::report::{Report, number};
use crate::sft;

pub(super) fn run(config: &Config, out: &Path) -> Result<Value> {
    let settings = config.sft();
    let model = Model::of_section(&config.base)?;
    let data = prepared(config, model.checkpoint.tokenizer(), settings.completion_only_loss)?;
    let Prepared { train, held_out, .. } = data;
    check_context(&model, train.longest_sequence())?;
    let start = match &settings.adapter {
        Some(path) => {
            model.adapter(path).context("[sft] adapter")?.with_loraplus_lr_ratio(config.lora.loraplus_lr_ratio)
        }
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
