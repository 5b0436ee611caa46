//! `fourfold reward`: from config and files to the trained reward adapter. Read `reward/train.rs` for the stage.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::continued::continued;
use super::{Model, check_context, output, prepared_among, save};
use crate::config::{Config, Reward, Stage};
use crate::data::Prepared;
use crate::data::examples::Examples;
use crate::data::examples::objectives::RankedExample;
use crate::planner::passes;
use crate::report::number;
use crate::reward;
use crate::reward::dschat::Padding;
use crate::reward::ensemble::Agreement;
use crate::reward::length::LengthReport;
use crate::reward::train::log_distributions;
use crate::run::RunOptions;
use crate::run::memory_preflight::Parts;
use crate::run::options::Inputs;
use crate::train::supervised::Setup;

pub(super) fn run(config: &Config, out: &Path, launch: &RunOptions) -> Result<Value> {
    let settings = config.reward();
    let model = Model::of_section(config.reward_base())?;
    let Prepared { train, held_out, .. } = prepared_among(&launch.world, config, model.checkpoint.tokenizer(), true)?;
    check_context(&model, train.longest_sequence())?;
    let start = match &settings.adapter {
        Some(path) => continued(&model, path, config, Stage::Reward).context("[reward] adapter")?,
        None => model.fresh_adapter(&config.lora, config.seed)?,
    };
    let given = settings.adapter.as_ref().map(|_| &start);
    let inputs = Inputs::new(Stage::Reward, config)?.model("", &model)?.adapter("adapter", given)?;
    let inputs = inputs.examples("data", &train)?.examples("held-out data", &held_out)?;
    let padding = settings.compat.map(|_| padding(config, &model, &settings, &train)).transpose()?;
    let parts = Parts { stage: Stage::Reward, policy: &model, scorer: None, start: &start, reward: None };
    let admission = parts.admit(config, |config| passes::reward(config, &train, &held_out, launch.world.size()))?;
    let mut session = inputs.begin(out, launch)?;
    let memory = admission.report(&mut session);
    let setup = Setup { base: &model.base, start: &start, recompute: admission.plan.checkpoint, seed: config.seed };
    // Each member of an ensemble starts from a fresh adapter of its own, or all from the one that is given.
    let started = |member: usize| match member {
        0 => Ok(start.clone()),
        _ if settings.adapter.is_some() => Ok(start.clone()),
        _ => model.fresh_adapter(&config.lora, config.seed.wrapping_add(member as u64)),
    };
    let members = reward::train::train_members(setup, &started, &train, &held_out, &settings, padding, &mut session);
    let members = members.map_err(|error| session.unsaved(error))?;
    if !launch.world.is_first() {
        return Ok(Value::Null);
    }
    let first = members.first().context("an ensemble has a member")?;
    let (summary, response_lengths) = (first.summary, first.response_lengths.clone());
    let scores: Vec<Vec<Vec<f32>>> = members.iter().map(|member| member.scores.clone()).collect();
    let agreement = (members.len() > 1).then(|| Agreement::of(&scores)).transpose()?;
    let mut paths = vec![];
    for (member, name) in members.into_iter().zip(output::MEMBERS) {
        let saved = save(member.adapter, &model, &out.join(name));
        paths.push(saved.map_err(|error| session.unsaved(error))?);
    }
    if let Some(found) = agreement.as_ref().filter(|_| !held_out.is_empty()) {
        session.report.note(&format!(
            "reward: the mean of {} members has a held-out accuracy of {:.3}; their scores deviate by {:.3}",
            paths.len(),
            found.of_mean.accuracy,
            found.disagreement
        ));
    }
    // The result of several members is that of the mean of their scores, which no training step has computed before the end.
    let (before, after, lengths) = match &agreement {
        None => (summary.before.accuracy, summary.after, summary.lengths),
        Some(found) => (f64::NAN, found.of_mean, LengthReport::of(&found.means, &response_lengths)),
    };
    if let Some(found) = &agreement {
        log_distributions(&found.means, &mut session);
    }
    let mut found = json!({
        "stage": "reward",
        "memory": memory,
        "accuracy_before": number(before),
        "accuracy": number(after.accuracy),
        "mean_chosen_score": number(after.mean_chosen),
        "mean_rejected_score": number(after.mean_rejected),
        "eval_pairs": after.pairs,
        "center": summary.center.map(|center| json!({
            "mean": number(center.mean), "deviation": number(center.deviation), "scaled": center.is_scaled,
        })),
        "steps": summary.steps,
        "tokens": summary.tokens,
        "train_records": train.len(),
        "adapter": paths[0],
    });
    if let Some(agreement) = agreement {
        found["ensemble"] = agreement.to_json();
        found["adapters"] = paths.into();
    }
    // Beside the accuracy that they explain.
    lengths.named("").into_iter().for_each(|(name, value)| found[name] = value);
    Ok(found)
}

/// DeepSpeed-Chat's rows by the settings.
fn padding(
    config: &Config,
    model: &Model,
    settings: &Reward,
    examples: &impl Examples<RankedExample>,
) -> Result<Padding> {
    let data = config.data()?;
    let found = Padding::of(model.pad_id(data)?, data.max_length, examples)?;
    let given = settings.num_padding_at_beginning.unwrap_or(found.num_padding_at_beginning);
    Ok(Padding { num_padding_at_beginning: given, ..found })
}
