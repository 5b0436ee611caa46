//! The checkpoint manager: decides when a run's state is saved, and checks that the base's files have not changed.
//!
//! It does not depend on a stage. Read `store.rs` next.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Error, Result};

use crate::config::CheckpointConfig;
use crate::error::counted;
use crate::model_files::ModelFiles;
use crate::report::Report;
use crate::train::fingerprint::RunFingerprint;
use crate::train::former::Former;
use crate::train::lock::Lock;
use crate::train::snapshot::Snapshot;
use crate::train::store::Store;

/// The checkpoint manager of one run.
#[derive(Debug)]
pub struct CheckpointManager {
    /// The checkpoints on disk.
    pub store: Store,
    /// `[checkpoint]`.
    pub saving: CheckpointConfig,
    /// Fingerprint of the run.
    pub origin: RunFingerprint,
    /// The base's files, checked whenever a checkpoint is written.
    pub bases: Vec<BaseFiles>,
    /// The command that resumes the run, for messages.
    pub command: String,
    /// Steps and directory of the last checkpoint that was written or resumed from.
    pub last: Option<(usize, PathBuf)>,
    /// What this run takes the place of, which waits until it has made a step.
    pub former: Option<Former>,
    /// The folder's lock, held as long as the run: no other process writes into the folder.
    pub lock: Lock,
}

impl CheckpointManager {
    /// Whether a checkpoint is due after `step` steps.
    pub fn is_due(&self, step: usize) -> bool {
        let every = self.saving.save_steps;
        every > 0 && step > 0 && step.is_multiple_of(every) && !self.has(step)
    }

    /// Whether the last checkpoint is the one after `step` steps.
    pub fn has(&self, step: usize) -> bool {
        self.last.as_ref().is_some_and(|(last, _)| *last == step)
    }

    /// Removes what this run has taken the place of: it has made a step.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn let_former_go(&mut self) -> Result<()> {
        self.former.take().map_or(Ok(()), Former::remove)
    }

    /// Writes a checkpoint and deletes those beyond `save_total_limit`.
    ///
    /// # Errors
    /// If the disk cannot be written, or the base has been changed during the run.
    pub fn write(&mut self, step: usize, snapshot: &Snapshot, report: &Report) -> Result<&Path> {
        for base in &mut self.bases {
            if let Some(warning) = base.check()? {
                report.warn(&warning);
            }
        }
        self.let_former_go()?;
        let positions = report.positions()?;
        let path = self.store.write(step, snapshot, positions, &self.origin)?;
        self.store.prune(self.saving.save_total_limit)?;
        Ok(&self.last.insert((step, path)).1)
    }

    /// As [`CheckpointManager::write`], for a run that ends with an error. On a full disk older checkpoints make room, of which the
    /// newest stays.
    ///
    /// # Errors
    /// As for [`CheckpointManager::write`].
    pub fn write_in_need(&mut self, step: usize, snapshot: &Snapshot, report: &Report) -> Result<PathBuf> {
        let mut has_last = self.last.is_some();
        loop {
            let written = self.write(step, snapshot, report).map(Path::to_path_buf);
            let Err(error) = &written else { return written };
            has_last &= is_full(error) && self.store.remove_oldest_of_several()?;
            if !has_last {
                return written;
            }
        }
    }

    /// The command that resumes the run, or begins it anew where there is no checkpoint yet.
    pub fn resuming(&self) -> String {
        let more = if self.last.is_some() { "" } else { " --from-start" };
        format!("{}{more}", self.command)
    }

    /// The last checkpoint, for messages.
    pub fn last_good(&self) -> String {
        match &self.last {
            Some((step, path)) => {
                format!("the last good checkpoint is {}, after {}", path.display(), counted(*step, "step"))
            }
            None => "there is no checkpoint yet".into(),
        }
    }
}

/// Whether there is no room on the disk.
fn is_full(error: &Error) -> bool {
    let kinds = [ErrorKind::StorageFull, ErrorKind::QuotaExceeded];
    error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>()).any(|cause| kinds.contains(&cause.kind()))
}

/// Identity of a file as the system reports it. Times are only compared for being equal.
#[derive(Clone, Debug, PartialEq)]
struct Identity {
    path: PathBuf,
    bytes: u64,
    modified: Option<SystemTime>,
    inode: u64,
}

/// The weight files of a base, and the fingerprint that they had when the run began.
#[derive(Clone, Debug)]
pub struct BaseFiles {
    path: PathBuf,
    fingerprint: String,
    files: Vec<Identity>,
}

impl BaseFiles {
    /// The files of an opened model; `None` for a model that is not in files.
    ///
    /// # Errors
    /// If the files' metadata cannot be read.
    pub fn of(checkpoint: &ModelFiles) -> Result<Option<Self>> {
        let Some(path) = checkpoint.path() else { return Ok(None) };
        Ok(Some(Self { path: path.into(), fingerprint: checkpoint.fingerprint(), files: identities(path)? }))
    }

    /// Checks that the files are those that the run started with. If other files have taken their names, the weights in
    /// memory are still the old ones, and a warning is returned. If the files themselves were written into, the weights
    /// in memory changed too.
    ///
    /// # Errors
    /// If the base has been changed in place.
    pub fn check(&mut self) -> Result<Option<String>> {
        let now = identities(&self.path).unwrap_or_default();
        if now == self.files {
            return Ok(None);
        }
        let same_files = now.iter().map(|f| (&f.path, f.inode)).eq(self.files.iter().map(|f| (&f.path, f.inode)));
        let path = self.path.display();
        let equal = ModelFiles::open(&self.path).is_ok_and(|c| c.fingerprint() == self.fingerprint);
        anyhow::ensure!(
            equal || !same_files,
            "{path} was written into while it was being trained on, so the weights in memory have changed; nothing more \
             is saved: put the base back and resume from the last checkpoint"
        );
        self.files = now;
        Ok((!equal).then(|| {
            format!(
                "{path} was replaced by another base during the run; training goes on with the weights in memory, and \
                 resuming will need the former file"
            )
        }))
    }
}

fn identities(path: &Path) -> Result<Vec<Identity>> {
    let mut paths = vec![];
    if path.is_dir() {
        for entry in fs::read_dir(path).with_context(|| format!("reading {}", path.display()))? {
            paths.push(entry?.path());
        }
        paths.retain(|p| p.extension().is_some_and(|e| e == "safetensors" || e == "gguf"));
        paths.sort();
    } else {
        paths.push(path.into());
    }
    let identity = |path: PathBuf| {
        let meta = fs::metadata(&path).with_context(|| format!("reading {}", path.display()))?;
        Ok(Identity { bytes: meta.len(), modified: meta.modified().ok(), inode: inode(&meta), path })
    };
    paths.into_iter().map(identity).collect()
}

#[cfg(unix)]
fn inode(meta: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(meta)
}

#[cfg(not(unix))]
fn inode(_: &fs::Metadata) -> u64 {
    0
}
