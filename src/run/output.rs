//! A run's folder: whose it is, who may write there. Knows no stage and no model.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::invalid;

/// The file by which an output folder is known as ours: its first line is [`mark`].
const RESOLVED: &str = "config.toml";

/// `by` is the command that writes the folder.
fn mark(by: &str) -> String {
    format!("# fourfold {by}: the settings of this run, every default written out")
}

/// Checks that `out` can be written to by the command `by`: it is new, empty, or the folder of a former run of that
/// very command. Nothing is touched.
///
/// # Errors
/// If there is something else under that name: another's files, or what another stage made.
pub fn check_output(out: &Path, by: &str) -> Result<()> {
    let empty = out.is_dir() && fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
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

/// Makes the output folder, or takes one that [`check_output`] allows, and writes the resolved config into it.
///
/// # Errors
/// As for [`check_output`], and if the folder cannot be written to.
pub fn prepare_output(out: &Path, by: &str, resolved: &str) -> Result<()> {
    check_output(out, by)?;
    fs::create_dir_all(out).map_err(|e| invalid!("{}: {e}; name another folder with --out", out.display()))?;
    let path = out.join(RESOLVED);
    fs::write(&path, format!("{}\n{resolved}", mark(by)))
        .map_err(|e| invalid!("{}: {e}; name another folder with --out", path.display()))
}

/// The resolved settings of the run that an adapter's folder lies in, if it lies in one.
pub fn settings_beside(adapter: &Path) -> Option<String> {
    let settings = fs::read_to_string(adapter.parent()?.join(RESOLVED)).ok()?;
    settings.starts_with("# fourfold ").then_some(settings)
}
