//! PPO's prompts for the reward model: all prompts of a run, and their translation into the tokens of a reward model with
//! another tokenizer. It does not depend on reward sources or on the training loop. Read `rewards.rs` next.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};

use anyhow::Result;

use super::Model;
use crate::config::{Config, Data, Ppo};
use crate::data;
use crate::data::examples::Examples;
use crate::data::examples::batch_sampler::endless;
use crate::data::examples::objectives::{PromptExample, TextEncoder, prompt_examples};
use crate::data::stream::columns;
use crate::data::stream::columns::Columns;
use crate::invalid;
use crate::train::settings;

/// Training prompts, then evaluation prompts.
pub(super) fn all_prompts<'p>(
    prompts: &'p dyn Examples<PromptExample>,
    eval_prompts: &'p [PromptExample],
) -> impl Iterator<Item = Result<Cow<'p, PromptExample>>> {
    (0..prompts.len()).map(|row| prompts.get(row)).chain(eval_prompts.iter().map(|prompt| Ok(Cow::Borrowed(prompt))))
}

/// The columns of the records that a run's rollouts and evaluations ask about, if a reward source reads them.
///
/// # Errors
/// If the records cannot be read.
pub(super) fn columns(
    prompts: &dyn Examples<PromptExample>,
    eval_prompts: &[PromptExample],
    ppo: &Ppo,
    config: &Config,
) -> Result<Option<Columns>> {
    if !ppo.reward.iter().chain(&ppo.gold).any(|part| part.kind.reads_columns()) {
        return Ok(None);
    }
    // Every refill of a rollout may answer as many prompts again.
    let count = ppo.iterations() * ppo.batch_size / ppo.num_generations * (1 + ppo.dynamic_sampling_rollouts);
    let rows: BTreeSet<usize> = match count < prompts.len() {
        true => endless(config.seed, settings::PROMPT_ORDER, prompts.len(), 0, count).into_iter().collect(),
        false => (0..prompts.len()).collect(),
    };
    let mut wanted: BTreeSet<usize> = eval_prompts.iter().map(|prompt| prompt.entry).collect();
    for row in rows {
        wanted.insert(prompts.get(row)?.entry);
    }
    columns::columns(config.data()?, &wanted).map(Some)
}

/// The first token that differs between the reward base and the policy's base, as a message; `None` if all are equal.
pub(super) fn first_token_difference(policy: &Model, scorer: &Model) -> Option<String> {
    let (ours, theirs) = (policy.checkpoint.tokenizer(), scorer.checkpoint.tokenizer());
    let ids = policy.base.config().vocab_size.max(scorer.base.config().vocab_size) as u32;
    let id = (0..ids).find(|&id| ours.token(id) != theirs.token(id))?;
    let (theirs, ours) = (theirs.token(id).unwrap_or_default(), ours.token(id).unwrap_or_default());
    Some(format!("token {id} is {theirs:?} in [reward_base] and {ours:?} in [base]"))
}

/// Maps the policy's prompt ids to what the reward model's template and tokenizer make of the same records.
///
/// # Errors
/// If the records cannot be read, or a prompt does not fit the reward model's context.
pub(super) fn translate<'p>(
    prompts: impl Iterator<Item = Result<Cow<'p, PromptExample>>>,
    encoder: &dyn TextEncoder,
    scorer: &Model,
    config: &Config,
) -> Result<HashMap<Vec<u32>, PromptExample>> {
    let mut by_record = HashMap::new();
    for prompt in prompts {
        let prompt = prompt?;
        by_record.insert(prompt.entry, prompt.tokens.clone());
    }
    let (mut ours, mut entries, mut number) = (vec![], vec![], 0);
    data::scan(config.data()?, &mut |found| {
        if let Ok(entry) = found {
            if let Some(tokens) = by_record.remove(&number) {
                ours.push(tokens);
                entries.push(entry);
            }
            number += 1;
        }
        Ok(true)
    })?;
    // Leaves room for one response token.
    let max_prompt_length = scorer.base.config().max_position_embeddings - 1;
    // These records are one phase's already; `compat` would split them again.
    let data = Data { max_prompt_length, compat: None, ..config.data()?.clone() };
    let (translated, report) = prompt_examples(&entries, encoder, &data)?;
    if translated.len() != ours.len() {
        return Err(invalid!("[reward_base] not every prompt fits the reward model: {report}"));
    }
    Ok(ours.into_iter().zip(translated).collect())
}
