//! `fourfold ppo`, `fourfold grpo` and `fourfold rloo`: opens models and data, trains, and evaluates on held-out prompts before and
//! after. Read `ppo/train.rs` for the training loop, `rewards.rs` for how reward sources are built.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::continued::continued;
use super::prompts::{all_prompts, columns, first_token_difference, translate};
use super::rewards::{Adapters, RewardSourceBuilder};
use super::rollout_servers::RolloutServer;
use super::{Model, llama_cpp, output, prepared_among, rollout_servers, save};
use crate::config::{Config, CriticStart, Ppo, Ptx, RewardKind, Stage};
use crate::data;
use crate::data::examples::objectives::{PromptExample, SftExample, TextEncoder, end_of_responses, ends_of_responses};
use crate::data::examples::{Examples, Ids};
use crate::data::{ModelEncoder, Prepared, Subset};
use crate::error::counted;
use crate::invalid;
use crate::note;
use crate::planner::passes;
use crate::ppo::evaluate::{Evaluation, EvaluationInputs};
use crate::ppo::run::{PpoRun, check};
use crate::ppo::sampler::Sampler;
use crate::ppo::train::train_then;
use crate::run::RunOptions;
use crate::run::memory_preflight::Parts;
use crate::run::options::Inputs;
use crate::stats::mean_and_error;

pub(super) fn run(stage: Stage, config: &Config, out: &Path, options: &RunOptions) -> Result<Value> {
    let world = &options.world;
    let (of_all, name) = (config.of_ranks(stage, world.size()), stage.name());
    let ppo = of_all.rollouts(stage)?;
    let model = Model::of_section(&config.base)?;
    // One base serves all four roles if both sections name the same files with the same options.
    let other = match &config.reward_base {
        Some(base) if *base != config.base => Some(Model::of_section(base)?),
        _ => None,
    };
    let scorer = other.as_ref().unwrap_or(&model);
    let Prepared { train: prompts, held_out, .. } = prepared_among(world, config, model.checkpoint.tokenizer(), true)?;
    let ppo = &ppo.over(prompts.len());
    let eval_prompts: Vec<PromptExample> = (0..held_out.len().min(ppo.eval_prompts))
        .map(|row| held_out.get(row).map(Cow::into_owned))
        .collect::<Result<_>>()?;
    if ppo.eval_prompts > 0 && eval_prompts.is_empty() && world.is_first() {
        crate::tell!(
            "{name}: warning: {} = {} has no prompts to evaluate on: [data] holds none out; set eval_rows or eval_fraction, or \
             give other prompts",
            ppo.origin.key("eval_prompts"),
            ppo.eval_prompts
        );
    } else if eval_prompts.len() < ppo.eval_prompts && world.is_first() {
        crate::tell!(
            "{name}: {} = {}, and [data] holds {} out: these are evaluated",
            ppo.origin.key("eval_prompts"),
            ppo.eval_prompts,
            counted(eval_prompts.len(), "prompt")
        );
    }
    let reward_encoder = ModelEncoder::new(scorer.checkpoint.tokenizer())?;
    let translated = match first_token_difference(&model, scorer) {
        None => None,
        Some(difference) => {
            note!("{name}: {difference}: the reward model reads prompts and responses in its own tokens");
            let end = end_of_responses(&reward_encoder, config.data()?)?;
            Some((translate(all_prompts(&prompts, &eval_prompts), &reward_encoder, scorer, config)?, end))
        }
    };
    let sft = match &ppo.adapter {
        Some(path) => continued(&model, path, config, stage).with_context(|| ppo.origin.key("adapter"))?,
        None => model.fresh_adapter(&config.lora, config.seed)?,
    };
    ppo.servers().map_or(Ok(()), |servers| llama_cpp::check(servers, &model, &sft, ppo.origin.name()))?;
    let adapters = Adapters::open(ppo, scorer)?;
    // The critic's values belong to the policy's tokens: if the reward model has other tokens, the critic uses the policy's
    // base and cannot be initialised from the reward model.
    let (reward_base, reward) = match translated {
        None => (&scorer.base, adapters.main()),
        Some(_) => (&model.base, None),
    };
    let text = ppo.ptx.as_ref().map(|ptx| text_blocks(ptx, ppo, &model, config)).transpose()?;
    let ids = Ids(&prompts);
    check(&model.base, reward_base, reward, &ids, ppo)?;
    let pad = ppo.compat.map(|_| model.pad_id(config.data()?)).transpose()?;
    let columns = columns(&prompts, &eval_prompts, ppo, config)?;
    let builder = RewardSourceBuilder {
        scorer,
        retokenise: translated.as_ref().map(|(prompts, end)| (&reward_encoder as &dyn TextEncoder, prompts, *end)),
        prompts: &prompts,
        eval_prompts: &eval_prompts,
        pad,
        columns: columns.as_ref(),
        section: ppo.origin.name(),
        world,
    };
    let source = builder.source(ppo, &adapters)?;
    let gold = builder.gold(ppo, &adapters)?;
    let given = ppo.adapter.as_ref().map(|_| &sft);
    let mut inputs = Inputs::new(stage, config)?.model("", &model)?.model("reward ", scorer)?;
    inputs = inputs.adapter("adapter", given)?;
    for (name, adapter) in adapters.all() {
        inputs = inputs.adapter(&name, Some(adapter))?;
    }
    inputs = inputs.examples("prompts", &prompts)?.examples("held-out prompts", &eval_prompts)?;
    if let Some(text) = &text {
        inputs = inputs.examples("text", text)?;
    }
    if ppo.reward.iter().chain(&ppo.gold).any(|part| part.kind == RewardKind::Exact) {
        let all: Vec<_> = all_prompts(&prompts, &eval_prompts).collect::<Result<_>>()?;
        inputs = inputs.texts("answers", all.iter().map(|prompt| prompt.answer.as_deref()));
    }
    if let Some(columns) = &columns {
        let sorted: BTreeMap<_, _> = columns.iter().collect();
        let texts: Vec<String> =
            sorted.values().map(|record| Value::from(record.columns.clone()).to_string()).collect();
        inputs = inputs.texts("columns", texts.iter().map(|text| Some(text.as_str())));
    }
    if let Some((translated, _)) = &translated {
        let translations: Vec<Vec<u32>> = all_prompts(&prompts, &eval_prompts)
            .map(|prompt| Ok(translated.get(&prompt?.tokens).map(|known| known.tokens.clone()).unwrap_or_default()))
            .collect::<Result<_>>()?;
        inputs = inputs.examples("prompts for the reward model", &translations)?;
    }
    let lengths: Vec<usize> = eval_prompts.iter().map(|prompt| prompt.tokens.len()).collect();
    let contexts = [&model.base, reward_base].map(|base| base.config().max_position_embeddings);
    let facts = passes::Asked {
        held_out: &lengths,
        context: contexts[0].min(contexts[1]),
        other_tokens: translated.is_some(),
        ranks: world.size(),
    };
    let open = |servers| rollout_servers::open(servers, &model, ppo.origin.name(), out, world.is_first());
    let sampler = ppo.servers().map(open).transpose()?;
    let parts = Parts { stage, policy: &model, scorer: other.as_ref(), start: &sft, reward: adapters.main() };
    let preflight = parts.admit(&of_all, |config| passes::ppo(config, &ids, facts))?;
    let is_new = !out.exists();
    let mut session = inputs.begin(out, options)?;
    let memory = preflight.report(&mut session);
    if let Some((text, _)) = rollout_servers::memory_beside(ppo) {
        session.report.note(&text);
    }
    let tokenizer = model.checkpoint.tokenizer();
    let mut stop = match ppo.compat {
        Some(_) => tokenizer.eos_ids().to_vec(),
        None => ends_of_responses(&ModelEncoder::new(tokenizer)?, config.data()?)?,
    };
    stop.extend(pad.filter(|pad| !tokenizer.eos_ids().contains(pad)));
    let (stop, decode) = (&stop[..], |ids: &[u32]| tokenizer.decode(ids).unwrap_or_default());
    let inputs = EvaluationInputs {
        base: &model.base,
        sft: &sft,
        source: &*source,
        gold: gold.as_deref(),
        prompts: &eval_prompts,
        stop,
        decode: &decode,
        world,
    };
    // Rank 0 alone asks the servers.
    let asked = |sampler: &dyn RolloutServer| world.first(|| sampler.begin(&sft, session.is_resumed()));
    if let Err(error) = sampler.as_deref().map_or(Ok(()), asked) {
        // Its adapters go with it.
        drop(sampler);
        if world.is_first() && !session.is_resumed() {
            // The error counts.
            let _ = output::undo(out, name, is_new);
        }
        return Err(error);
    }
    let evaluation = Evaluation::new(inputs, ppo, config.seed);
    let before = session.once_together("before", |report| evaluation.before(report))?;
    let evaluation = evaluation.with_baseline(before);
    let run = PpoRun {
        base: &model.base,
        reward_base,
        sft: &sft,
        reward,
        prompts: &ids,
        stop,
        source: &*source,
        decode: &decode,
        evaluation: Some(&evaluation).filter(|_| !eval_prompts.is_empty()),
        ptx: text.as_ref().map(|blocks| blocks as &dyn Examples<SftExample>),
        pad,
        sampler: sampler.as_deref().map(|sampler| sampler as &dyn Sampler),
        config: ppo,
        seed: config.seed,
        recompute: preflight.plan.checkpoint,
        sharing: preflight.plan.sharing(),
        world,
    };
    let (trained, after) =
        train_then(&run, &mut session, |trained, report| evaluation.run(&"after".into(), &trained.actor, report))?;
    if !world.is_first() {
        return Ok(Value::Null);
    }
    let mut saved = |adapter, model: &Model, name: &str| {
        save(adapter, model, &out.join(name)).map_err(|error| session.unwritten(error))
    };
    let actor = saved(trained.actor.clone(), &model, "actor")?;
    let critic_model = if ppo.critic == CriticStart::Actor || translated.is_some() { &model } else { scorer };
    let critic = trained.critic.map(|critic| saved(critic, critic_model, "critic")).transpose()?;
    let ema = trained.ema.map(|ema| saved(ema, &model, "actor_ema")).transpose()?;
    let before = evaluation.baseline();
    let gain: Vec<f64> = after.scores.iter().zip(&before.scores).map(|(a, b)| a - b).collect();
    let last = trained.last;
    Ok(json!({
        "stage": name,
        "memory": memory,
        "kl": last.get("objective/kl"),
        "scores": last.get("objective/scores"),
        "eval_score_before": mean_and_error(&before.scores),
        "eval_score_after": mean_and_error(&after.scores),
        "eval_score_gain": mean_and_error(&gain),
        "eval_prompts": eval_prompts.len(),
        "eval": evaluation.metrics(&after),
        "last": last,
        "actor": actor,
        "critic": critic,
        "actor_ema": ema,
    }))
}

/// Text blocks of `[ppo.ptx]`.
fn text_blocks(ptx: &Ptx, ppo: &Ppo, model: &Model, config: &Config) -> Result<Subset<SftExample>> {
    let (data, context) = (config.data()?, model.base.config().max_position_embeddings);
    let size = ptx.block_size.unwrap_or(data.max_prompt_length + ppo.response_length);
    if size > context {
        return Err(invalid!(
            "[ppo.ptx] blocks of {size} tokens are longer than the model's context of {context}; set block_size = {context} \
             or less"
        ));
    }
    let found =
        data::ptx_blocks(&ptx.path, data, model.checkpoint.tokenizer(), config.seed, size).context("[ppo.ptx]")?;
    note!("ppo: {} of {size} tokens of text; {}", counted(found.train.len(), "block"), found.report);
    Ok(found.train)
}
