//! What was meant by a path that is no adapter or no model: the adapter in a run's folder, the base of an adapter. It does
//! not depend on a stage. Read `describe.rs` for a run's folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::Value;

use super::output;
use crate::invalid;
use crate::model_files::gguf::Gguf;
use crate::model_files::inspect::inspect;
use crate::train::{former, lock};

const ADAPTER: &str = "adapter_config.json";
const MODEL: &str = "config.json";

/// The folders directly below `dir` that hold a file of that name, in the order of their names.
fn below(dir: &Path, file: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.join(file).is_file()).collect();
    found.sort();
    found
}

/// Paths that are named at most.
const LISTED: usize = 8;

fn listed(paths: &[PathBuf]) -> String {
    let shown: Vec<String> = paths.iter().take(LISTED).map(|path| path.display().to_string()).collect();
    match paths.len().checked_sub(LISTED + 1) {
        None => shown.join(" or "),
        Some(more) => format!("{} or one of {} more", shown.join(", "), more + 1),
    }
}

/// The folder that a path lies in; the current one for a bare name.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// That a path is the folder of a run without adapters, or the name of one that a run writes; `None` if it is neither.
fn unwritten(path: &Path) -> Option<String> {
    let (shown, folder) = (path.display(), parent(path));
    let name = path.file_name().and_then(|name| name.to_str());
    let is_of = |stage: &str| output::adapters_of(stage).iter().any(|adapter| Some(*adapter) == name);
    let (run, what) = match (output::stage_of(path), output::stage_of(folder)) {
        (Some(_), _) => (path, format!("{shown} is the folder of a run that")),
        (None, Some(stage)) if is_of(stage) => {
            (folder, format!("{shown} is not there: the run in {}", folder.display()))
        }
        _ => return None,
    };
    Some(match lock::owner(run) {
        Some(owner) => format!("{what} goes on ({owner}) and writes its adapters when it ends; wait for that"),
        None if former::is_left(run) => {
            format!("{what} ended before its first step; the run before it is in {}", run.join(former::NAME).display())
        }
        None if run.join(output::SUMMARY).is_file() => format!("{what} is finished and has no such adapter"),
        None if output::has_checkpoint(run) => format!(
            "{what} ended before it wrote its adapters; go on with its command and --resume, from its newest checkpoint"
        ),
        None => format!("{what} ended before it wrote its adapters and has no checkpoint to go on from; run it again"),
    })
}

/// Checks that what is to be described is not a part of a model, an adapter or a run, a folder with such below it, or a config.
///
/// # Errors
/// If it is; the message says what to give.
pub fn check_described(path: &Path) -> Result<()> {
    let shown = path.display();
    let run = [parent(path), parent(parent(path))].into_iter().find(|folder| output::stage_of(folder).is_some());
    if path.is_file() {
        if path.with_file_name(ADAPTER).is_file() {
            return Err(invalid!("{shown} is a file; an adapter is its folder: {}", folder_of(path)));
        }
        let is_of_model =
            path.with_file_name(MODEL).is_file() || path.extension().is_some_and(|ending| ending == "gguf");
        if let Some(run) = run.filter(|_| !is_of_model) {
            return Err(invalid!("{shown} is a file of the run in {}; give that folder", run.display()));
        }
        if path.extension().is_some_and(|ending| ending == "toml") {
            return Err(invalid!(
                "{shown} is a config; `fourfold plan {shown}` says what it takes, and `fourfold keys` what its keys mean"
            ));
        }
        return Ok(());
    }
    if path.join(MODEL).is_file() || path.join(ADAPTER).is_file() {
        return Ok(());
    }
    if let Some(text) = unwritten(path) {
        return Err(invalid!("{text}"));
    }
    if !path.is_dir() {
        return Ok(());
    }
    if let Some(run) = run {
        return Err(invalid!("{shown} is a part of the run in {}; give that folder", run.display()));
    }
    let mut found = [below(path, ADAPTER), below(path, MODEL)].concat();
    let entries = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    found.extend(entries.filter(|path| {
        output::stage_of(path).is_some() || path.is_file() && path.extension().is_some_and(|ending| ending == "gguf")
    }));
    found.sort();
    found.dedup();
    match found.is_empty() {
        true => Err(invalid!(
            "{shown} holds neither a model (config.json) nor an adapter ({ADAPTER}) nor a run ({}); give the folder of one, or a .gguf \
             file",
            output::RESOLVED
        )),
        false => Err(invalid!("{shown} is itself no model, adapter or run; did you mean {}?", listed(&found))),
    }
}

/// The message for a LoRA adapter in GGUF: it is an export, which nothing here reads back.
const GGUF_ADAPTER: &str = "is a LoRA adapter in GGUF, which llama.cpp reads (--lora); give the folder with \
                            adapter_config.json that it was made from as the adapter, and a model as the base";

fn is_gguf_adapter(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "gguf") && Gguf::open(path).is_ok_and(|file| file.is_adapter())
}

/// What an adapter is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Anything.
    Any,
    /// Writing text: it has no score head.
    Policy,
    /// Scoring responses: it has a score head, and is no critic.
    RewardModel,
}

impl Wanted {
    /// Whether an adapter's folder is of that kind; one that cannot be read is refused by who opens it.
    fn fits(self, adapter: &Path) -> bool {
        let is_critic = adapter.file_name().is_some_and(|name| name == "critic");
        match (self, inspect(adapter)) {
            (Self::Any, _) | (_, Err(_)) => true,
            (Self::Policy, Ok(found)) => !has_head(&found),
            (Self::RewardModel, Ok(found)) => has_head(&found) && !is_critic,
        }
    }
}

/// Whether what `inspect` found is an adapter with a score head.
pub(super) fn has_head(found: &Value) -> bool {
    found["head"].as_array().is_some_and(|head| !head.is_empty())
}

/// The adapters in a folder, or else those of the runs in it.
fn adapters_below(dir: &Path) -> Vec<PathBuf> {
    let found = below(dir, ADAPTER);
    if !found.is_empty() {
        return found;
    }
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut runs: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    runs.sort();
    runs.iter().flat_map(|run| below(run, ADAPTER)).collect()
}

/// Checks that a path given as an adapter is not something else that is known.
///
/// # Errors
/// If it is a folder with adapters below it, such as a run's, or a model; the message says what to give.
pub fn check_adapter_path(path: &Path, wanted: Wanted) -> Result<()> {
    let shown = path.display();
    if path.join(ADAPTER).is_file() {
        return Ok(());
    }
    let adapters = adapters_below(path);
    if !adapters.is_empty() {
        let what = if output::stage_of(path).is_some() { "the folder of a run" } else { "no adapter" };
        let fitting: Vec<PathBuf> = adapters.iter().filter(|adapter| wanted.fits(adapter)).cloned().collect();
        return Err(match (&fitting[..], wanted) {
            ([], Wanted::RewardModel) => invalid!(
                "{shown} is {what}, and none of the adapters in it is a reward model's ({}); give that of a run of the reward stage",
                listed(&adapters)
            ),
            ([], _) => invalid!(
                "{shown} is {what}, and the adapters in it have score heads ({}); give that of an SFT, DPO or KTO run, or a PPO run's \
                 actor",
                listed(&adapters)
            ),
            _ => invalid!("{shown} is {what}; did you mean {}?", listed(&fitting)),
        });
    }
    if let Some(text) = unwritten(path) {
        return Err(invalid!("{text}"));
    }
    if is_gguf_adapter(path) {
        return Err(invalid!("{shown} {GGUF_ADAPTER}"));
    }
    if path.join(MODEL).is_file() || path.extension().is_some_and(|ending| ending == "gguf") {
        return Err(invalid!("{shown} is a model, not an adapter; give it as the base"));
    }
    if path.is_file() && path.with_file_name(ADAPTER).is_file() {
        return Err(invalid!("{shown} is a file; an adapter is its folder: {}", folder_of(path)));
    }
    Ok(())
}

/// Checks that a path given as a base is not something else that is known.
///
/// # Errors
/// If it is an adapter, or a folder with models below it, such as a run's; the message says what to give.
pub fn check_base_path(path: &Path) -> Result<()> {
    let shown = path.display();
    if is_gguf_adapter(path) {
        return Err(invalid!("{shown} {GGUF_ADAPTER}"));
    }
    if path.join(MODEL).is_file() || !path.is_dir() {
        return Ok(());
    }
    if let Ok(text) = fs::read_to_string(path.join(ADAPTER)) {
        let config: Value = serde_json::from_str(&text).unwrap_or_default();
        let base = config["base_model_name_or_path"].as_str().unwrap_or("its base");
        return Err(invalid!("{shown} is an adapter; give {base} as the base, and this as the adapter"));
    }
    let models = below(path, MODEL);
    if !models.is_empty() {
        return Err(invalid!("{shown} is no model; did you mean {}?", listed(&models)));
    }
    if output::stage_of(path).is_some() {
        let adapters = below(path, ADAPTER);
        let and =
            if adapters.is_empty() { String::new() } else { format!(", and {} as the adapter", listed(&adapters)) };
        return Err(invalid!(
            "{shown} is the folder of a run, not a model; give its base ({}) as the base{and}",
            output::base_of(path).unwrap_or_else(|| "see its config.toml".into())
        ));
    }
    Ok(())
}

fn folder_of(path: &Path) -> String {
    parent(path).display().to_string()
}
