//! A run's output folder: which command it belongs to, who may write there, and which files of an earlier run are
//! removed.
//!
//! It does not depend on a stage or a model.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::host::date::utc_of;
use crate::invalid;
use crate::train::lock;
use crate::train::lock::Lock;
use crate::train::store::Store;

/// The file by which an output folder is known as ours: its first line is [`mark`].
pub(super) const RESOLVED: &str = "config.toml";
/// What `--json` prints, written when a run is finished.
pub(super) const SUMMARY: &str = "summary.json";
/// Where a run's checkpoints lie.
pub(super) const CHECKPOINTS: &str = "checkpoints";
/// Files that every command writes beside its folders.
const FILES: [&str; 5] = [SUMMARY, "metrics.jsonl", "samples.jsonl", "about.json", "report.html"];
/// What an adapter's folder holds.
const ADAPTER_FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// The adapters' folders that a command writes.
pub(super) fn adapters_of(by: &str) -> &'static [&'static str] {
    match by {
        "quickstart" => &["sft", "reward", "actor", "critic"],
        "ppo" => &["actor", "critic", "actor_ema"],
        "grpo" | "rloo" => &["actor"],
        _ => &["adapter"],
    }
}

/// `by` is the command that writes the folder.
fn mark(by: &str) -> String {
    format!("# fourfold {by}: the settings of this run, every default written out")
}

/// What config.toml holds.
fn resolved(by: &str, settings: &str) -> String {
    format!("{}\n{settings}", mark(by))
}

/// Checks that `out` can be written to by the command `by`: it is new, empty, or the folder of a former run of that
/// very command. Nothing is touched.
///
/// # Errors
/// If there is something else under that name: another's files, or what another stage made.
pub fn check_output(out: &Path, by: &str) -> Result<()> {
    let empty = out.is_dir() && fs::read_dir(out).is_ok_and(|mut entries| entries.all(|e| is_lock(&e)));
    if !out.exists() || empty {
        return Ok(());
    }
    Err(match stage_of(out) {
        Some(stage) if stage == by => return Ok(()),
        Some(other) => invalid!("{} holds a run of `fourfold {other}`; name another folder with --out", out.display()),
        None => {
            invalid!("{} exists and is no folder of a former run; name another with --out, or remove it", out.display())
        }
    })
}

/// The command whose run's folder `dir` is.
pub(super) fn stage_of(dir: &Path) -> Option<&'static str> {
    let settings = fs::read_to_string(dir.join(RESOLVED)).ok()?;
    let first = settings.lines().next()?;
    ["sft", "reward", "dpo", "kto", "ppo", "grpo", "rloo", "quickstart"].into_iter().find(|by| first == mark(by))
}

/// The base of the run in `dir`: the reward model's for a reward run.
pub(super) fn base_of(dir: &Path) -> Option<String> {
    let settings: toml::Table = fs::read_to_string(dir.join(RESOLVED)).ok()?.parse().ok()?;
    let reward = settings.get("reward_base").filter(|_| stage_of(dir) == Some("reward"));
    Some(reward.or(settings.get("base"))?.get("path")?.as_str()?.to_owned())
}

/// A run that was killed between taking the folder and writing config.toml leaves its lock alone.
fn is_lock(entry: &std::io::Result<fs::DirEntry>) -> bool {
    entry.as_ref().is_ok_and(|e| e.file_name() == crate::train::lock::NAME)
}

/// Refuses to begin anew where the command `by` left a run that is finished, or one that could be resumed. A run that
/// ended before its first checkpoint left nothing to keep.
///
/// # Errors
/// If there is one.
pub fn check_free(out: &Path, by: &str) -> Result<()> {
    let has_adapter = |name: &&str| out.join(name).join(ADAPTER_FILES[1]).exists();
    let is_finished = out.join(SUMMARY).exists();
    if !is_finished && has_checkpoint(out) {
        return Err(invalid!(
            "{} holds a run that is not finished; go on with --resume, name another folder with --out, or lose it with \
             --overwrite",
            out.display()
        ));
    }
    if !is_finished && !adapters_of(by).iter().any(has_adapter) {
        return Ok(());
    }
    let when = fs::metadata(out.join(if is_finished { SUMMARY } else { RESOLVED })).and_then(|about| about.modified());
    Err(invalid!(
        "{} holds a finished run of `fourfold {by}`{}; name another folder with --out, or replace it with --overwrite",
        out.display(),
        when.map_or_else(|_| String::new(), |when| format!(" of {}", utc_of(when)))
    ))
}

/// Whether `out` holds a checkpoint, complete or not.
pub(super) fn has_checkpoint(out: &Path) -> bool {
    !Store::at(out.join(CHECKPOINTS)).is_empty()
}

/// Makes the output folder, or takes one that [`check_output`] allows.
///
/// # Errors
/// As for [`check_output`], and if the folder cannot be made.
pub(super) fn make(out: &Path, by: &str) -> Result<()> {
    check_output(out, by)?;
    fs::create_dir_all(out).map_err(|e| invalid!("{}: {e}; name another folder with --out", out.display()))
}

/// Writes what `--json` prints of a finished run; by this file the run is known as finished.
///
/// # Errors
/// If the folder cannot be written to.
pub fn write_summary(out: &Path, summary: &Value) -> Result<()> {
    let path = out.join(SUMMARY);
    fs::write(&path, format!("{summary}\n")).with_context(|| format!("writing {}", path.display()))
}

/// Removes the files that a former run of the same command left in a folder, so that no adapter stands beside a config
/// that it was not trained by, and writes the resolved config into it. Whatever else lies there stays, folders of the
/// same names with other files in them included.
///
/// # Errors
/// If the folder cannot be written to.
pub(super) fn begin(out: &Path, by: &str, settings: &str) -> Result<()> {
    let adapters = adapters_of(by).iter().flat_map(|name| ADAPTER_FILES.map(|file| out.join(name).join(file)));
    for path in FILES.map(|name| out.join(name)).into_iter().chain(adapters) {
        match fs::remove_file(&path) {
            Err(e) if ![ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.kind()) => {
                return Err(e).with_context(|| format!("removing {} of the run before", path.display()));
            }
            _ => {}
        }
    }
    let empty = adapters_of(by).iter().chain(&[CHECKPOINTS]);
    Store::at(out.join(CHECKPOINTS)).clear()?;
    empty.for_each(|name| drop(fs::remove_dir(out.join(name)))); // fails, rightly, where something is left in it
    go_on(out, by, settings)
}

/// Writes the resolved config of a run that goes on; it is not finished any more.
///
/// # Errors
/// If the folder cannot be written to.
pub(super) fn go_on(out: &Path, by: &str, settings: &str) -> Result<()> {
    let _ = fs::remove_file(out.join(SUMMARY));
    let (path, new) = (out.join(RESOLVED), out.join(format!("{RESOLVED}.new")));
    // By a rename: the file by which the folder is known is never half there.
    fs::write(&new, resolved(by, settings))
        .and_then(|()| fs::rename(&new, &path))
        .map_err(|e| invalid!("{}: {e}; name another folder with --out", path.display()))
}

/// Is `out` the folder of a run by that command with those settings?
pub fn is_of(out: &Path, by: &str, settings: &str) -> bool {
    fs::read_to_string(out.join(RESOLVED)).is_ok_and(|text| text == resolved(by, settings))
}

/// Makes the output folder, or takes one that [`check_output`] allows and clears it, and writes the resolved config.
///
/// # Errors
/// As for [`check_output`], and if the folder cannot be written to.
pub fn prepare_output(out: &Path, by: &str, settings: &str) -> Result<Lock> {
    make(out, by)?;
    let lock = lock::lock(out)?;
    begin(out, by, settings)?;
    Ok(lock)
}

/// The resolved settings of the run that an adapter's folder lies in, if it lies in one.
pub fn settings_beside(adapter: &Path) -> Option<String> {
    let settings = fs::read_to_string(adapter.parent()?.join(RESOLVED)).ok()?;
    settings.starts_with("# fourfold ").then_some(settings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_run_removes_only_its_own_files() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path();
        prepare_output(out, "ppo", "").unwrap();
        // Runs of other commands, and someone's notes, in a folder of ppo's.
        let theirs =
            ["sft/adapter_model.safetensors", "reward/x", "adapter/adapter_config.json", "merged/model", "notes"];
        let ours = ["metrics.jsonl", "summary.json", "actor/adapter_model.safetensors", "critic/adapter_config.json"];
        let inside = ["actor/notes.md", "checkpoints/mine"];
        for name in [&theirs[..], &ours, &inside].concat() {
            fs::create_dir_all(out.join(name).parent().unwrap()).unwrap();
            fs::write(out.join(name), "x").unwrap();
        }
        prepare_output(out, "ppo", "").unwrap();
        let there = |name: &&str| out.join(name).exists();
        assert!(theirs.iter().chain(&inside).all(there));
        assert!(!ours.iter().any(there) && !out.join("critic").exists());
    }
}
