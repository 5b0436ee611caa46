//! `fourfold reward`. Read ../reward/train.rs for the stage.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Model, check_context, held_out, prepare_output, records, save};
use crate::config::Config;
use crate::data::ModelEncoder;
use crate::data::phases::{RankedExample, ranked_examples};
use crate::report::{Report, number};
use crate::reward;

pub(super) fn run(config: &Config, out: &Path) -> Result<Value> {
    let settings = config.reward();
    let model = Model::of_section(config.reward_base())?;
    let encoder = ModelEncoder::new(model.checkpoint.tokenizer())?;
    let examples = ranked_examples(&records(config)?, &encoder, config.data()?)?;
    let lengths = |e: &RankedExample| e.prompt.len() + e.answers.iter().map(Vec::len).max().unwrap_or(0);
    check_context(&model, examples.0.iter().map(lengths))?;
    let (train, held_out) = held_out(config, examples)?;
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
