//! `fourfold reward`. Read ../reward/train.rs for the stage.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Model, check_context, prepare_output, prepared, save};
use crate::config::Config;
use crate::data::Prepared;
use crate::data::examples::Examples;
use crate::report::{Report, number};
use crate::reward;

pub(super) fn run(config: &Config, out: &Path) -> Result<Value> {
    let settings = config.reward();
    let model = Model::of_section(config.reward_base())?;
    let Prepared { train, held_out, .. } = prepared(config, model.checkpoint.tokenizer(), true)?;
    check_context(&model, train.longest_sequence())?;
    let start = match &settings.adapter {
        Some(path) => {
            model.adapter(path).context("[reward] adapter")?.with_loraplus_lr_ratio(config.lora.loraplus_lr_ratio)
        }
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
