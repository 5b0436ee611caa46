//! What the path of a reward adapter stands for: one adapter, or all members of an ensemble where it is the folder of the run
//! that trained them. Weights are not loaded. Read `config/ensembles.rs` for where a config names one.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::output::{MEMBERS, RESOLVED, stage_of};
use crate::config::{Config, Stage};
use crate::error::counted;
use crate::invalid;
use crate::train::lock;

/// The adapters that a path stands for: all members if it is the folder of a run of `[reward] ensemble`, else itself.
///
/// # Errors
/// If the run's folder holds another number of members than the run has.
pub fn members(path: &Path) -> Result<Vec<PathBuf>> {
    let wanted = ensemble_of(path);
    if wanted < 2 {
        return Ok(vec![path.into()]);
    }
    let is_adapter = |path: &PathBuf| path.join("adapter_config.json").is_file();
    let found: Vec<PathBuf> = MEMBERS.iter().map(|name| path.join(name)).filter(is_adapter).collect();
    if found.len() == wanted {
        return Ok(found);
    }
    let (shown, of) = (path.display(), counted(wanted, "reward model"));
    Err(match lock::owner(path) {
        Some(owner) => invalid!("{shown} is the folder of a run of {of} that goes on ({owner}); wait for its end"),
        None => invalid!(
            "{shown} is the folder of a run of {of} and holds {} of them; if the run was stopped, finish it with --resume; if \
             not, name the adapters that are meant one by one",
            found.len()
        ),
    })
}

/// The number of reward models that the run in a folder trains; 1 if it is no run of the reward stage.
fn ensemble_of(path: &Path) -> usize {
    let settings = || fs::read_to_string(path.join(RESOLVED)).ok()?.parse::<toml::Table>().ok();
    let wanted = || settings()?.get("reward")?.get("ensemble")?.as_integer()?.try_into().ok();
    Some(path).filter(|path| stage_of(path) == Some("reward")).and_then(|_| wanted()).unwrap_or(1)
}

/// The config with every adapter of a reward written out, as [`members`] finds them, for a stage that reads one.
///
/// # Errors
/// Those of [`members`], with the key that names the folder.
pub fn with_members(stage: Stage, config: &Config) -> Result<Config> {
    // The stage may be the one that trains them.
    if !stage.has_rollouts() {
        return Ok(config.clone());
    }
    config.with_members(&|path, key| members(path).with_context(|| key.to_owned()))
}
