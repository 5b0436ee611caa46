//! `fourfold ppo`, with the evaluation on held-out prompts before and after. Read ../ppo/train.rs for the stage.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::rewards::Adapters;
use super::{Model, prepared, save};
use crate::config::{Config, CriticStart, Data, Ppo, Ptx, RewardKind, Stage};
use crate::data;
use crate::data::examples::objectives::{PromptExample, SftExample, TextEncoder, prompt_examples};
use crate::data::examples::{Examples, Ids};
use crate::data::{ModelEncoder, Part, Prepared};
use crate::model::adapter::Adapter;
use crate::planner::passes;
use crate::ppo::evaluate::{Evaluation, Judges};
use crate::run::RunOptions;
use crate::run::memory_preflight::Parts;
use crate::run::options::Inputs;
use crate::run::rewards::RewardSourceBuilder;
use crate::stats::mean_and_error;
use crate::{invalid, ppo};

pub(super) fn run(config: &Config, out: &Path, launch: &RunOptions) -> Result<Value> {
    let settings = config.ppo()?;
    let model = Model::of_section(&config.base)?;
    // One base serves all four roles where both sections name the same files, opened alike.
    let other = match &config.reward_base {
        Some(base) if *base != config.base => Some(Model::of_section(base)?),
        _ => None,
    };
    let scorer = other.as_ref().unwrap_or(&model);
    let Prepared { train: prompts, held_out, .. } = prepared(config, model.checkpoint.tokenizer(), true)?;
    let asked: Vec<PromptExample> = (0..held_out.len().min(settings.eval_prompts))
        .map(|row| held_out.get(row).map(Cow::into_owned))
        .collect::<Result<_>>()?;
    let reward_encoder = ModelEncoder::new(scorer.checkpoint.tokenizer())?;
    let translated = match first_difference(&model, scorer) {
        None => None,
        Some(difference) => {
            eprintln!("ppo: {difference}: the reward model reads prompts and answers in its own tokens");
            Some(translate(all_prompts(&prompts, &asked), &reward_encoder, scorer, config)?)
        }
    };
    let sft = match &settings.adapter {
        Some(path) => model
            .adapter(path)
            .context("[ppo] adapter")?
            .with_loraplus_lr_ratio(config.lora.loraplus_lr_ratio)
            .with_score_head(None)?,
        None => model.fresh_adapter(&config.lora, config.seed)?,
    };
    let adapters = Adapters::open(settings, scorer)?;
    let start = start(&model, scorer, &sft, adapters.main(), translated.is_some());
    let text = settings.ptx.as_ref().map(|ptx| text(ptx, settings, &model, config)).transpose()?;
    let ids = Ids(&prompts);
    ppo::train::check(start, &ids, settings)?;
    let pad = settings.compat.map(|_| model.pad_id(config.data()?)).transpose()?;
    let workshop = RewardSourceBuilder {
        scorer,
        retokenise: translated.as_ref().map(|prompts| (&reward_encoder as &dyn TextEncoder, prompts)),
        prompts: &prompts,
        asked: &asked,
        pad,
    };
    let source = workshop.source(settings, &adapters)?;
    let gold = workshop.gold(settings, &adapters)?;
    let given = settings.adapter.as_ref().map(|_| &sft);
    let mut inputs = Inputs::new(Stage::Ppo, config)?.model("", &model)?.model("reward ", scorer)?;
    inputs = inputs.adapter("adapter", given)?;
    for (name, adapter) in adapters.all() {
        inputs = inputs.adapter(&name, Some(adapter))?;
    }
    inputs = inputs.examples("prompts", &prompts)?.examples("held-out prompts", &asked)?;
    if let Some(text) = &text {
        inputs = inputs.examples("text", text)?;
    }
    if settings.reward.iter().chain(&settings.gold).any(|part| part.kind == RewardKind::Exact) {
        let all: Vec<_> = all_prompts(&prompts, &asked).collect::<Result<_>>()?;
        inputs = inputs.texts("answers", all.iter().map(|prompt| prompt.answer.as_deref()));
    }
    if let Some(translated) = &translated {
        let theirs: Vec<Vec<u32>> = all_prompts(&prompts, &asked)
            .map(|prompt| Ok(translated.get(&prompt?.tokens).cloned().unwrap_or_default()))
            .collect::<Result<_>>()?;
        inputs = inputs.examples("prompts for the reward model", &theirs)?;
    }
    let lengths: Vec<usize> = asked.iter().map(|prompt| prompt.tokens.len()).collect();
    let contexts = [start.base, start.reward_base].map(|base| base.config().max_position_embeddings);
    let facts =
        passes::Asked { held_out: &lengths, context: contexts[0].min(contexts[1]), other_tokens: translated.is_some() };
    let parts =
        Parts { stage: Stage::Ppo, policy: &model, scorer: other.as_ref(), start: &sft, reward: adapters.main() };
    let admission = parts.admit(config, |config| passes::ppo(config, &ids, facts))?;
    let mut session = inputs.begin(out, launch)?;
    let memory = admission.report(&session);
    let tokenizer = model.checkpoint.tokenizer();
    let mut stop = tokenizer.eos_ids().to_vec();
    stop.extend(pad.filter(|pad| !tokenizer.eos_ids().contains(pad)));
    let (stop, decode) = (&stop[..], |ids: &[u32]| tokenizer.decode(ids).unwrap_or_default());
    let judges = Judges {
        base: &model.base,
        sft: &sft,
        source: &*source,
        gold: gold.as_deref(),
        prompts: &asked,
        stop,
        decode: &decode,
    };
    let evaluation = Evaluation::new(judges, settings, config.seed);
    let before = session.once("before", |report| evaluation.before(report))?;
    let evaluation = evaluation.with_baseline(before);
    let task = ppo::train::Task {
        start,
        prompts: &ids,
        stop,
        source: &*source,
        decode: &decode,
        evaluation: Some(&evaluation).filter(|_| !asked.is_empty()),
        ptx: text.as_ref().map(|blocks| blocks as &dyn Examples<SftExample>),
        pad,
        recompute: admission.plan.checkpoint,
    };
    let (trained, after) = ppo::train::train_then(task, settings, config.seed, &mut session, |trained, report| {
        evaluation.run(&"after".into(), &trained.actor, report)
    })?;
    let actor = save(trained.actor.clone(), &model, &out.join("actor"))?;
    let critic_model = if settings.critic == CriticStart::Actor || translated.is_some() { &model } else { scorer };
    let critic = trained.critic.map(|critic| save(critic, critic_model, &out.join("critic"))).transpose()?;
    let ema = trained.ema.map(|ema| save(ema, &model, &out.join("actor_ema"))).transpose()?;
    let before = evaluation.baseline();
    let gain: Vec<f64> = after.scores.iter().zip(&before.scores).map(|(a, b)| a - b).collect();
    let last = trained.last;
    Ok(json!({
        "stage": "ppo",
        "memory": memory,
        "kl": last.get("objective/kl"),
        "scores": last.get("objective/scores"),
        "eval_score_before": mean_and_error(&before.scores),
        "eval_score_after": mean_and_error(&after.scores),
        "eval_score_gain": mean_and_error(&gain),
        "eval_prompts": asked.len(),
        "eval": evaluation.figures(&after),
        "last": last,
        "actor": actor,
        "critic": critic,
        "actor_ema": ema,
    }))
}

/// Where PPO starts. Values stand on the policy's tokens: a critic beside a reward model over other tokens lives on the
/// policy's base, and cannot start as that reward model.
fn start<'w>(
    model: &'w Model,
    scorer: &'w Model,
    sft: &'w Adapter,
    reward: Option<&'w Adapter>,
    other_tokens: bool,
) -> ppo::train::Start<'w> {
    let (reward_base, reward) = if other_tokens { (&model.base, None) } else { (&scorer.base, reward) };
    ppo::train::Start { base: &model.base, reward_base, sft, reward }
}

/// The blocks of `[ppo.ptx]`.
fn text(ptx: &Ptx, settings: &Ppo, model: &Model, config: &Config) -> Result<Part<SftExample>> {
    let (data, context) = (config.data()?, model.base.config().max_position_embeddings);
    let size = ptx.block_size.unwrap_or(data.max_prompt_length + settings.response_length);
    if size > context {
        return Err(invalid!(
            "[ppo.ptx] blocks of {size} tokens are longer than the model's context of {context}; set block_size = {context} \
             or less"
        ));
    }
    let found =
        data::ptx_blocks(&ptx.path, data, model.checkpoint.tokenizer(), config.seed, size).context("[ppo.ptx]")?;
    eprintln!("ppo: {} blocks of {size} tokens of text; {}", found.train.len(), found.report);
    Ok(found.train)
}

/// How the reward base's tokens differ from the policy's, if they do.
fn first_difference(policy: &Model, scorer: &Model) -> Option<String> {
    let (ours, theirs) = (policy.checkpoint.tokenizer(), scorer.checkpoint.tokenizer());
    let ids = policy.base.config().vocab_size.max(scorer.base.config().vocab_size) as u32;
    let id = (0..ids).find(|&id| ours.token(id) != theirs.token(id))?;
    let (theirs, ours) = (theirs.token(id).unwrap_or_default(), ours.token(id).unwrap_or_default());
    Some(format!("token {id} is {theirs:?} in [reward_base] and {ours:?} in [base]"))
}

/// Those to train on, then those held out.
pub(super) fn all_prompts<'p>(
    prompts: &'p dyn Examples<PromptExample>,
    asked: &'p [PromptExample],
) -> impl Iterator<Item = Result<Cow<'p, PromptExample>>> {
    (0..prompts.len()).map(|row| prompts.get(row)).chain(asked.iter().map(|prompt| Ok(Cow::Borrowed(prompt))))
}

/// The policy's prompt ids -> the same records' prompts as the reward model's template and tokenizer make them.
fn translate<'p>(
    prompts: impl Iterator<Item = Result<Cow<'p, PromptExample>>>,
    encoder: &dyn TextEncoder,
    scorer: &Model,
    config: &Config,
) -> Result<HashMap<Vec<u32>, Vec<u32>>> {
    let mut asked_of = HashMap::new();
    for prompt in prompts {
        let prompt = prompt?;
        asked_of.insert(prompt.entry, prompt.tokens.clone());
    }
    let (mut ours, mut entries, mut number) = (vec![], vec![], 0);
    data::scan(config.data()?, &mut |found| {
        if let Ok(entry) = found {
            if let Some(tokens) = asked_of.remove(&number) {
                ours.push(tokens);
                entries.push(entry);
            }
            number += 1;
        }
        Ok(true)
    })?;
    // Room for one token of a response.
    let max_prompt_length = scorer.base.config().max_position_embeddings - 1;
    // They are one phase's already: no second split.
    let data = Data { max_prompt_length, compat: None, ..config.data()?.clone() };
    let (theirs, report) = prompt_examples(&entries, encoder, &data)?;
    if theirs.len() != ours.len() {
        return Err(invalid!("[reward_base] not every prompt fits the reward model: {report}"));
    }
    Ok(ours.into_iter().zip(theirs.into_iter().map(|prompt| prompt.tokens)).collect())
}
