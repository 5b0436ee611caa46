//! `fourfold dpo` and `fourfold kto`: from config and files to the trained adapter. Read ../dpo/pairs.rs and ../dpo/kto.rs
//! for what is trained.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Model, check_context, held_out, prepare_output, records, save};
use crate::config::Config;
use crate::data::ModelEncoder;
use crate::data::phases::{RankedExample, judged_examples, ranked_examples};
use crate::dpo::{kto, pairs};
use crate::model::adapter::Adapter;
use crate::report::{Report, number};

/// Where training starts, and the reference: the SFT adapter is both; without one a fresh adapter starts, and the bare
/// base is the reference.
fn start(config: &Config, model: &Model, adapter: Option<&PathBuf>) -> Result<(Adapter, Option<Adapter>)> {
    match adapter {
        Some(path) => {
            let sft = model.adapter(path)?.with_loraplus_lr_ratio(config.lora.loraplus_lr_ratio);
            Ok((sft.clone(), Some(sft)))
        }
        None => Ok((model.fresh_adapter(&config.lora, config.seed)?, None)),
    }
}

/// `fourfold dpo`.
pub(super) fn run(config: &Config, out: &Path) -> Result<Value> {
    let settings = config.dpo();
    let model = Model::of_section(&config.base)?;
    let encoder = ModelEncoder::new(model.checkpoint.tokenizer())?;
    let examples = ranked_examples(&records(config)?, &encoder, config.data()?)?;
    let lengths = |e: &RankedExample| e.prompt.len() + e.answers.iter().map(Vec::len).max().unwrap_or(0);
    check_context(&model, examples.0.iter().map(lengths))?;
    let (train, held_out) = held_out(config, examples)?;
    let (start, reference) = start(config, &model, settings.adapter.as_ref()).context("[dpo] adapter")?;
    prepare_output(out, "dpo", &config.to_toml()?)?;
    let mut report = Report::to_dir(out)?;
    let (base, seed) = (&model.base, config.seed);
    let (adapter, summary) =
        pairs::train(base, &start, reference.as_ref(), &train, &held_out, &settings, seed, &mut report)?;
    let path = save(adapter, &model, &out.join("adapter"))?;
    Ok(json!({
        "stage": "dpo",
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
pub(super) fn run_kto(config: &Config, out: &Path) -> Result<Value> {
    let settings = config.kto();
    let model = Model::of_section(&config.base)?;
    let encoder = ModelEncoder::new(model.checkpoint.tokenizer())?;
    let examples = judged_examples(&records(config)?, &encoder, config.data()?)?;
    // The KL term puts answers after each other's prompts.
    let longest = |of: fn(&crate::data::phases::JudgedExample) -> usize| examples.0.iter().map(of).max().unwrap_or(0);
    check_context(&model, std::iter::once(longest(|e| e.prompt.len()) + longest(|e| e.answer.len())))?;
    let (train, held_out) = held_out(config, examples)?;
    let (start, reference) = start(config, &model, settings.adapter.as_ref()).context("[kto] adapter")?;
    prepare_output(out, "kto", &config.to_toml()?)?;
    let mut report = Report::to_dir(out)?;
    let (base, seed) = (&model.base, config.seed);
    let (adapter, summary) =
        kto::train(base, &start, reference.as_ref(), &train, &held_out, &settings, seed, &mut report)?;
    let path = save(adapter, &model, &out.join("adapter"))?;
    Ok(json!({
        "stage": "kto",
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
