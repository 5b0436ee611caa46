//! A run's folder: whose it is, who may write there, and what of a former run goes. Knows no stage and no model.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result};

use crate::invalid;
use crate::train::store::Store;

/// The file by which an output folder is known as ours: its first line is [`mark`].
const RESOLVED: &str = "config.toml";
/// What `--json` prints, written when a run is finished.
pub(super) const SUMMARY: &str = "summary.json";
/// Where a run's checkpoints lie.
pub(super) const CHECKPOINTS: &str = "checkpoints";
/// What runs make besides their JSON lines. A run that begins anew removes those of the run before it, so that no adapter
/// stands beside a config that it was not trained by.
const RESULTS: [&str; 11] = [
    SUMMARY,
    CHECKPOINTS,
    "adapter",
    "actor",
    "actor_ema",
    "critic",
    "sft",
    "reward",
    "merged",
    "metrics.jsonl",
    "samples.jsonl",
];

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
    let settings = fs::read_to_string(out.join(RESOLVED)).unwrap_or_default();
    let first = settings.lines().next().unwrap_or_default();
    if first == mark(by) {
        return Ok(());
    }
    let other = ["sft", "reward", "dpo", "kto", "ppo", "quickstart"].into_iter().find(|other| first == mark(other));
    Err(match other {
        Some(other) => invalid!("{} holds a run of `fourfold {other}`; name another folder with --out", out.display()),
        None => {
            invalid!("{} exists and is no folder of a former run; name another with --out, or remove it", out.display())
        }
    })
}

/// A run that was killed between taking the folder and writing config.toml leaves its lock alone.
fn is_lock(entry: &std::io::Result<fs::DirEntry>) -> bool {
    entry.as_ref().is_ok_and(|e| e.file_name() == super::lock::NAME)
}

/// Refuses to begin anew where a run stands that could be resumed.
///
/// # Errors
/// If there is one.
pub(super) fn check_unfinished(out: &Path) -> Result<()> {
    if out.join(SUMMARY).exists() || Store::at(out.join(CHECKPOINTS)).is_empty() {
        return Ok(());
    }
    Err(invalid!(
        "{} holds a run that is not finished; go on with --resume, name another folder with --out, or lose it with \
         --overwrite",
        out.display()
    ))
}

/// Makes the output folder, or takes one that [`check_output`] allows.
///
/// # Errors
/// As for [`check_output`], and if the folder cannot be made.
pub(super) fn make(out: &Path, by: &str) -> Result<()> {
    check_output(out, by)?;
    fs::create_dir_all(out).map_err(|e| invalid!("{}: {e}; name another folder with --out", out.display()))
}

/// Removes what a former run left in a folder, and writes the resolved config into it.
///
/// # Errors
/// If the folder cannot be written to.
pub(super) fn begin(out: &Path, by: &str, settings: &str) -> Result<()> {
    for name in RESULTS {
        let path = out.join(name);
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removed {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(e).with_context(|| format!("removing {} of the run before", path.display()));
            }
            _ => {}
        }
    }
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
pub(super) fn is_of(out: &Path, by: &str, settings: &str) -> bool {
    fs::read_to_string(out.join(RESOLVED)).is_ok_and(|text| text == resolved(by, settings))
}

/// Makes the output folder, or takes one that [`check_output`] allows and clears it, and writes the resolved config.
///
/// # Errors
/// As for [`check_output`], and if the folder cannot be written to.
pub fn prepare_output(out: &Path, by: &str, settings: &str) -> Result<()> {
    make(out, by)?;
    begin(out, by, settings)
}
