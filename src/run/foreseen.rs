//! What a stage will refuse to start with, in its own words, for the commands that show it before: lengths, a critic, adapters.
//! Nothing is loaded; an adapter that is not there yet is no fault here, since another stage of a recipe may write it. Read
//! `hints.rs` for what is said of paths.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::hints::{Wanted, check_adapter_path, has_head};
use super::model::has_score_head;
use crate::config::{Config, Stage};
use crate::data::Prepared;
use crate::data::examples::Examples as _;
use crate::distill::Prompted;
use crate::invalid;
use crate::model::adapter::Adapter;
use crate::model_files::inspect::inspect;

/// Lengths of a stage's examples, in tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lengths {
    /// Those of the longest training sequence.
    pub sequence: usize,
    /// Those of the longest prompt, training or held-out, where a stage continues prompts and has sequences, too; else 0.
    pub prompt: usize,
    /// What the models take.
    pub context: usize,
}

/// Tokens of the longest prompt, training or held-out.
///
/// # Errors
/// Examples that cannot be read.
pub fn longest_prompt<T: Prompted>(data: &Prepared<T>) -> Result<usize> {
    [&data.train, &data.held_out].into_iter().try_fold(0, |most, examples| {
        (0..examples.len()).try_fold(most, |most: usize, row| Ok(most.max(examples.get(row)?.prompt().len())))
    })
}

/// What `stage` will refuse to start with, in its words; `config` with all members of an ensemble written out.
pub fn refusals(stage: Stage, config: &Config, lengths: Lengths) -> Vec<String> {
    let name = stage.name();
    let Lengths { sequence: longest, prompt, context } = lengths;
    let mut said = vec![];
    match config.rollouts(stage).ok() {
        None => {
            if longest > context {
                said.push(format!(
                    "[data] a sequence of {longest} tokens is longer than the model's context of {context}, so `fourfold {name}` will \
                     refuse to start; set max_length = {context} or less"
                ));
            }
            if stage == Stage::Distill
                && let Err(error) = config.distill().check(config.teacher.is_some())
            {
                said.push(format!("`fourfold {name}` will refuse to start: {error}"));
            }
            let most = config.distill().max_new_tokens;
            if stage == Stage::Distill && longest <= context && prompt + most > context {
                said.push(format!(
                    "a prompt of {prompt} tokens and [distill] max_new_tokens = {most} do not fit the context of {context}, so \
                     `fourfold {name}` will refuse to start; lower max_new_tokens or [data] max_prompt_length"
                ));
            }
        }
        Some(ppo) => {
            if longest + ppo.response_length > context {
                said.push(format!(
                    "a prompt of {longest} tokens and {length} = {} do not fit the context of {context}, so `fourfold {name}` will \
                     refuse to start; lower {length} or [data] max_prompt_length",
                    ppo.response_length,
                    length = ppo.origin.key("response_length"),
                ));
            }
            if let Err(error) = ppo.check_critic(!ppo.reward_adapter.is_blank()) {
                said.push(format!("`fourfold {name}` will refuse to start: {error}"));
            }
        }
    }
    let there = adapters(stage, config).into_iter().filter(|(_, path)| is_there(path));
    let faults = there.filter_map(|(key, path)| check_adapter(&key, &path).err());
    said.extend(faults.map(|error| format!("`fourfold {name}` will refuse to start: {error:#}")));
    said
}

/// The adapters that `stage` starts from or asks for scores, of which there is nothing yet: the keys that name them, and
/// their paths.
pub fn absent_adapters(stage: Stage, config: &Config) -> Vec<(String, PathBuf)> {
    adapters(stage, config).into_iter().filter(|(_, path)| !is_there(path)).collect()
}

/// The adapters that `stage` reads, each once, with the keys that name them.
fn adapters(stage: Stage, config: &Config) -> Vec<(String, PathBuf)> {
    let mut found = config.inputs(stage);
    found.retain(|(key, path)| key.contains("adapter") && !path.as_os_str().is_empty());
    found.sort();
    found.dedup();
    found
}

/// Whether there is anything at a path; an empty folder is nothing.
fn is_there(path: &Path) -> bool {
    path.exists() && !fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

/// Checks what can be known of an adapter without its base.
fn check_adapter(key: &str, path: &Path) -> Result<()> {
    let checked = || {
        let is_scorer = key.ends_with("adapters") || key.ends_with("reward_adapter");
        let wanted = match key {
            _ if is_scorer => Wanted::RewardModel,
            "[reward] adapter" => Wanted::Any,
            _ => Wanted::Policy,
        };
        check_adapter_path(path, wanted)?;
        Adapter::check_files(path)?;
        match (is_scorer, has_head(&inspect(path)?)) {
            (true, false) => Err(invalid!(
                "{}: this adapter has no scalar head (`base_model.model.score.weight`), so it cannot score; train one with \
                 `fourfold reward`",
                path.display()
            )),
            (false, true) if key != "[reward] adapter" => Err(has_score_head(path)),
            _ => Ok(()),
        }
    };
    checked().map_err(|error: anyhow::Error| error.context(key.to_owned()))
}
