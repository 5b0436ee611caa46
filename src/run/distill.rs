//! `fourfold distill`: opens student, teacher and records, trains, and saves the adapter. Read `../distill.rs` for the stage.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::continued::continued;
use super::foreseen::longest_prompt;
use super::{Model, check_context, prepared, save};
use crate::config::{Config, Stage};
use crate::data::examples::Examples;
use crate::data::examples::objectives::{Objective, PromptExample, SftExample, ends_of_responses};
use crate::data::stream::cache::Stored;
use crate::data::{ModelEncoder, Prepared};
use crate::distill::{self, Prompted, Teaching};
use crate::error::counted;
use crate::invalid;
use crate::model::roles::Policy;
use crate::note;
use crate::planner::passes;
use crate::report::number;
use crate::run::RunOptions;
use crate::run::memory_preflight::Parts;
use crate::run::options::Inputs;
use crate::run::placement::name_of;
use crate::train::supervised::Setup;

pub(super) fn run(config: &Config, out: &Path, launch: &RunOptions) -> Result<Value> {
    // A file without [distill] was not checked for it.
    config.distill().check(config.teacher.is_some())?;
    match config.distill().samples_all() {
        true => over::<PromptExample>(config, out, launch),
        false => over::<SftExample>(config, out, launch),
    }
}

fn over<T: Objective + Stored + Prompted + passes::Sampled>(
    config: &Config,
    out: &Path,
    launch: &RunOptions,
) -> Result<Value> {
    let settings = config.distill();
    let model = Model::of_section(&config.base)?;
    let other = match &config.teacher {
        Some(base) if *base != config.base => Some(Model::of_section(base).context("[teacher]")?),
        _ => None,
    };
    let teacher = other.as_ref().unwrap_or(&model);
    check_teacher(&model, teacher)?;
    let data: Prepared<T> =
        prepared(config, model.checkpoint.tokenizer(), true).with_context(|| settings.about_records())?;
    check_context(&model, data.train.longest_sequence())?;
    check_context(teacher, data.train.longest_sequence()).context("[teacher]")?;
    check_lengths(&[(&model, "[base]"), (teacher, "[teacher]")], longest_prompt(&data)?, &settings)?;
    let (train, held_out) = (data.train, data.held_out);
    let start = match &settings.adapter {
        Some(path) => continued(&model, path, config, Stage::Distill).context("[distill] adapter")?,
        None => model.fresh_adapter(&config.lora, config.seed)?,
    };
    let taught = settings.teacher_adapter.as_ref().map(|path| teacher.policy_adapter(path)).transpose();
    let taught = taught.context("[distill] teacher_adapter")?;
    let given = settings.adapter.as_ref().map(|_| &start);
    let inputs = Inputs::new(Stage::Distill, config)?.model("", &model)?.model("teacher ", teacher)?;
    let inputs = inputs.adapter("adapter", given)?.adapter("teacher_adapter", taught.as_ref())?;
    let inputs = inputs.examples("data", &train)?.examples("held-out data", &held_out)?;
    let parts =
        Parts { stage: Stage::Distill, policy: &model, scorer: other.as_ref(), start: &start, reward: taught.as_ref() };
    let admission = parts.admit(config, |config| passes::distill(config, &train, &held_out))?;
    let mut session = inputs.begin(out, launch)?;
    let memory = admission.report(&mut session);
    let setup = Setup { base: &model.base, start: &start, recompute: admission.plan.checkpoint, seed: config.seed };
    let stop = ends_of_responses(&ModelEncoder::new(model.checkpoint.tokenizer())?, config.data()?)?;
    let decode = |ids: &[u32]| model.checkpoint.tokenizer().decode(ids).unwrap_or_default();
    let teaching = Teaching { teacher: Policy::new(&teacher.base, taught.as_ref()), stop: &stop, decode: &decode };
    let trained = distill::train(setup, teaching, &train, &held_out, &settings, &mut session);
    let (adapter, summary) = trained.map_err(|error| session.unsaved(error))?;
    let path = save(adapter, &model, &out.join("adapter")).map_err(|error| session.unsaved(error))?;
    Ok(json!({
        "stage": "distill",
        "memory": memory,
        "loss_before": number(summary.loss_before),
        "loss_after": number(summary.loss_after),
        "steps": summary.steps,
        "train_records": train.len(),
        "eval_records": held_out.len(),
        "adapter": path,
    }))
}

/// Refuses a prompt that leaves no room for a whole response.
fn check_lengths(models: &[(&Model, &str)], prompt: usize, settings: &crate::config::Distill) -> Result<()> {
    for (model, name) in models {
        let context = model.base.config().max_position_embeddings;
        if prompt + settings.max_new_tokens > context {
            return Err(invalid!(
                "[distill] a prompt of {prompt} tokens and max_new_tokens = {} are longer than the context of {name}, \
                 {context}; lower max_new_tokens or [data] max_prompt_length",
                settings.max_new_tokens
            ));
        }
    }
    Ok(())
}

/// Checks that the teacher predicts the student's tokens on the student's machine.
fn check_teacher(student: &Model, teacher: &Model) -> Result<()> {
    let places = [student, teacher].map(|model| name_of(&model.base));
    if places[0] != places[1] {
        return Err(invalid!(
            "[teacher] lies on {} and [base] on {}; give both the same device, since their logits are compared there",
            places[1],
            places[0]
        ));
    }
    let rows = [student, teacher].map(|model| model.base.lm_head(None).weight.rows());
    let named = |model: &Model, id: u32| {
        let token = model.checkpoint.tokenizer().token(id).map(|token| token.to_string());
        // What converters to GGUF call a row of an lm_head that no token has.
        token.filter(|token| *token != format!("[PAD{id}]"))
    };
    let common = rows[0].min(rows[1]) as u32;
    let all = rows[0].max(rows[1]) as u32;
    let differs = |&id: &u32| named(student, id) != named(teacher, id);
    if let Some(id) = (0..all).find(differs) {
        let shown = |model| named(model, id).map_or_else(|| "no token".to_owned(), |token| format!("{token:?}"));
        return Err(invalid!(
            "[teacher] has another vocabulary than [base]: token {id} is {} there and {} here; distillation compares the \
             two token by token, so take a teacher with the same tokenizer",
            shown(teacher),
            shown(student)
        ));
    }
    if common < all {
        let larger = if rows[0] > rows[1] { "[base]" } else { "[teacher]" };
        note!(
            "distill: the lm_head of {larger} has {} more that no token has; they count for neither",
            counted((all - common) as usize, "row")
        );
    }
    Ok(())
}
