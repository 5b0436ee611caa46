//! Checkpoints on disk: one directory each, complete or ignored.
//!
//! A checkpoint is written under a temporary name, every file is synced, the directory is renamed, and its parent is
//! synced: at any moment of a crash the earlier checkpoints stand and the new one is either complete or ignored.
//! manifest.json holds the size and the SHA-256 of the other files. It does not depend on a stage. Read `session.rs`
//! next.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::snapshot::Snapshot;
use crate::report::Positions;
use crate::train::fingerprint::RunFingerprint;

const MANIFEST: &str = "manifest.json";
const FACTS: &str = "state.json";
const ARRAYS: &str = "state.safetensors";
const UNFINISHED: &str = ".unfinished";
/// Version of the layout; a reader refuses others.
const FORMAT: u32 = 1;

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileEntry {
    bytes: u64,
    sha256: String,
}

/// The contents of manifest.json.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    format: u32,
    /// Optimizer steps that were finished.
    pub step: usize,
    /// Lengths of the run's files at that step.
    pub positions: Positions,
    /// Fingerprint of the run.
    pub origin: RunFingerprint,
    files: BTreeMap<String, FileEntry>,
}

/// A checkpoint read from disk.
#[derive(Debug)]
pub struct Found {
    /// Its directory.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// Its state.
    pub snapshot: Snapshot,
}

/// The checkpoints of one run.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// The checkpoints in `dir`, which may not exist yet.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Writes a checkpoint and returns its directory. A failed write leaves nothing that a reader accepts.
    ///
    /// # Errors
    /// If the disk is full or cannot be written.
    pub fn write(
        &self,
        step: usize,
        snapshot: &Snapshot,
        positions: Positions,
        origin: &RunFingerprint,
    ) -> Result<PathBuf> {
        let facts = snapshot.facts_bytes()?;
        fs::create_dir_all(&self.dir).with_context(|| format!("making {}", self.dir.display()))?;
        let unfinished = self.dir.join(format!("checkpoint-{step}{UNFINISHED}"));
        remove(&unfinished)?;
        let target = self.free_name(step)?;
        let written = (|| {
            fs::create_dir(&unfinished)?;
            let mut files = BTreeMap::new();
            files.insert(FACTS.to_owned(), write_synced(&unfinished.join(FACTS), |to| Ok(to.write_all(&facts)?))?);
            let arrays = write_synced(&unfinished.join(ARRAYS), |to| snapshot.write_arrays(to))?;
            files.insert(ARRAYS.to_owned(), arrays);
            let manifest = Manifest { format: FORMAT, step, positions, origin: origin.clone(), files };
            let manifest = serde_json::to_vec_pretty(&manifest)?;
            write_synced(&unfinished.join(MANIFEST), |to| Ok(to.write_all(&manifest)?))?;
            sync_dir(&unfinished)?;
            fs::rename(&unfinished, &target)?;
            sync_dir(&self.dir)
        })();
        match written {
            Ok(()) => Ok(target),
            Err(error) => {
                // The space is needed; the first error is the one reported.
                let _ = fs::remove_dir_all(&unfinished);
                Err(error).with_context(|| format!("writing {}", target.display()))
            }
        }
    }

    /// Deletes the oldest checkpoints beyond `limit`.
    ///
    /// # Errors
    /// If a directory cannot be read or deleted.
    pub fn prune(&self, limit: usize) -> Result<()> {
        let all = self.checkpoints()?;
        all.iter().take(all.len().saturating_sub(limit)).try_for_each(|(_, path)| remove(path))
    }

    /// Deletes the oldest checkpoint if there is another; whether there was.
    ///
    /// # Errors
    /// If a directory cannot be read or deleted.
    pub fn remove_oldest_of_several(&self) -> Result<bool> {
        match &self.checkpoints()?[..] {
            [(_, oldest), _, ..] => remove(oldest).map(|()| true),
            _ => Ok(false),
        }
    }

    /// Deletes every checkpoint, complete or not, and nothing else.
    ///
    /// # Errors
    /// If a directory cannot be read or deleted.
    pub fn clear(&self) -> Result<()> {
        self.checkpoints()?.iter().try_for_each(|(_, path)| remove(path))
    }

    /// The checkpoints newer than `path`, complete or not: a run resumed from `path` replaces them. All of them without a path.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn after(&self, path: Option<&Path>) -> Result<Vec<PathBuf>> {
        let mut all: Vec<PathBuf> = self.checkpoints()?.into_iter().map(|(_, path)| path).collect();
        if let Some(name) = path.map(Path::file_name) {
            let at = all.iter().position(|path| path.file_name() == name);
            all.drain(..at.map_or(all.len(), |at| at + 1));
        }
        Ok(all)
    }

    /// The newest checkpoint that is intact, and why each newer one was skipped.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn newest(&self) -> Result<(Option<Found>, Vec<String>)> {
        let mut passed = vec![];
        for (_, path) in self.checkpoints()?.into_iter().rev() {
            match read(&path) {
                Ok(found) => return Ok((Some(found), passed)),
                Err(error) => passed.push(format!("{}: {error:#}", path.display())),
            }
        }
        Ok((None, passed))
    }

    /// Whether there is no checkpoint, complete or not.
    pub fn is_empty(&self) -> bool {
        self.checkpoints().is_ok_and(|all| all.is_empty())
    }

    /// Oldest first: by step, then by the number behind it.
    fn checkpoints(&self) -> Result<Vec<((usize, usize), PathBuf)>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
            entries => entries.with_context(|| format!("reading {}", self.dir.display()))?,
        };
        let mut all = vec![];
        for entry in entries {
            let path = entry?.path();
            all.extend(path.file_name().and_then(|n| number_of(n.to_str()?)).map(|number| (number, path)));
        }
        all.sort();
        Ok(all)
    }

    /// `checkpoint-12`, or `checkpoint-12.1` where that is taken: a checkpoint never replaces another.
    fn free_name(&self, step: usize) -> Result<PathBuf> {
        let taken = self.checkpoints()?.into_iter().filter(|((s, _), _)| *s == step).map(|((_, n), _)| n + 1).max();
        Ok(self.dir.join(match taken {
            None => format!("checkpoint-{step}"),
            Some(n) => format!("checkpoint-{step}.{n}"),
        }))
    }
}

/// Reads one checkpoint.
///
/// # Errors
/// If a file is missing or differs from the manifest's.
pub fn read(path: &Path) -> Result<Found> {
    let manifest = fs::read(path.join(MANIFEST)).with_context(|| format!("{MANIFEST} cannot be read"))?;
    let manifest: Manifest = serde_json::from_slice(&manifest).with_context(|| format!("{MANIFEST} is damaged"))?;
    ensure!(manifest.format == FORMAT, "its layout is version {}, this program reads {FORMAT}", manifest.format);
    let file = |name: &str| -> Result<Vec<u8>> {
        let expected = manifest.files.get(name).with_context(|| format!("{MANIFEST} does not list {name}"))?;
        let size = fs::metadata(path.join(name)).with_context(|| format!("{name} cannot be read"))?.len();
        ensure!(size == expected.bytes, "{name} has {size} bytes, {MANIFEST} says {}", expected.bytes);
        let bytes = fs::read(path.join(name)).with_context(|| format!("{name} cannot be read"))?;
        ensure!(entry(&bytes) == *expected, "{name} is not the file that {MANIFEST} lists (SHA-256)");
        Ok(bytes)
    };
    let snapshot = Snapshot::from_bytes(&file(FACTS)?, &file(ARRAYS)?)?;
    Ok(Found { path: path.to_path_buf(), manifest, snapshot })
}

fn number_of(name: &str) -> Option<(usize, usize)> {
    let number = name.strip_prefix("checkpoint-")?;
    let (step, n) = number.split_once('.').unwrap_or((number, "0"));
    Some((step.parse().ok()?, n.parse().ok()?))
}

fn entry(bytes: &[u8]) -> FileEntry {
    FileEntry { bytes: bytes.len() as u64, sha256: format!("{:x}", Sha256::digest(bytes)) }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("deleting {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// A file being written: its digest is computed from the bytes passed in, not from the bytes read back.
struct Digested {
    file: BufWriter<File>,
    digest: Sha256,
    bytes: u64,
}

impl Write for Digested {
    fn write(&mut self, part: &[u8]) -> std::io::Result<usize> {
        let taken = self.file.write(part)?;
        self.digest.update(&part[..taken]);
        self.bytes += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Writes a new file with `content` and syncs it.
fn write_synced(path: &Path, content: impl FnOnce(&mut Digested) -> Result<()>) -> Result<FileEntry> {
    let file = BufWriter::new(File::create_new(path)?);
    let mut to = Digested { file, digest: Sha256::new(), bytes: 0 };
    content(&mut to)?;
    to.flush()?;
    to.file.get_ref().sync_all()?;
    Ok(FileEntry { bytes: to.bytes, sha256: format!("{:x}", to.digest.finalize()) })
}

/// Syncs the names in a directory. Where directories cannot be opened as files, the system does so.
fn sync_dir(path: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(path)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path().join("checkpoints"));
        (dir, store)
    }

    fn write(store: &Store, step: usize) -> PathBuf {
        let mut snapshot = Snapshot::default();
        snapshot.put("at", &step).unwrap();
        store.write(step, &snapshot, Positions::default(), &RunFingerprint::default()).unwrap()
    }

    fn newest(store: &Store) -> (Option<usize>, Vec<String>) {
        let (found, passed) = store.newest().unwrap();
        (found.map(|f| f.snapshot.get("at").unwrap()), passed)
    }

    #[test]
    fn the_newest_is_chosen_by_number_and_the_oldest_are_deleted_first() {
        let (_dir, store) = store();
        assert_eq!(newest(&store).0, None);
        for step in [2, 9, 10] {
            write(&store, step);
        }
        assert_eq!(newest(&store).0, Some(10));
        assert!(write(&store, 10).ends_with("checkpoint-10.1"), "a checkpoint never replaces another");
        store.prune(3).unwrap();
        let left: Vec<_> = store.checkpoints().unwrap().into_iter().map(|(n, _)| n).collect();
        assert_eq!(left, [(9, 0), (10, 0), (10, 1)]);
        let after = |name: &str| store.after(Some(&store.dir.join(name))).unwrap();
        assert_eq!(after("checkpoint-9"), ["checkpoint-10", "checkpoint-10.1"].map(|name| store.dir.join(name)));
        assert!(after("checkpoint-10.1").is_empty() && after("checkpoint-7").is_empty());
        assert_eq!(store.after(None).unwrap().len(), 3);
    }

    /// Damage by a crash, a full disk or a failing disk: the reader falls back, and reports why.
    #[test]
    fn every_damage_is_noticed_and_the_previous_checkpoint_is_read() {
        type Damage = (&'static str, fn(&Path));
        let damages: [Damage; 6] = [
            ("manifest.json cannot be read", |p| fs::remove_file(p.join(MANIFEST)).unwrap()),
            ("manifest.json is damaged", |p| truncate(&p.join(MANIFEST))),
            ("state.json has", |p| truncate(&p.join(FACTS))),
            ("state.safetensors cannot be read", |p| fs::remove_file(p.join(ARRAYS)).unwrap()),
            ("SHA-256", |p| {
                let mut bytes = fs::read(p.join(FACTS)).unwrap();
                *bytes.last_mut().unwrap() ^= 1;
                fs::write(p.join(FACTS), bytes).unwrap();
            }),
            ("layout", |p| {
                let text = fs::read_to_string(p.join(MANIFEST)).unwrap();
                fs::write(p.join(MANIFEST), text.replace("\"format\": 1", "\"format\": 7")).unwrap();
            }),
        ];
        for (said, damage) in damages {
            let (_dir, store) = store();
            write(&store, 1);
            damage(&write(&store, 2));
            let (found, passed) = newest(&store);
            assert_eq!(found, Some(1), "{said}");
            assert!(passed.len() == 1 && passed[0].contains("checkpoint-2") && passed[0].contains(said), "{passed:?}");
        }
    }

    #[test]
    fn an_unfinished_directory_is_ignored_and_can_be_written_again() {
        let (_dir, store) = store();
        fs::create_dir_all(store.dir.join("checkpoint-5.unfinished")).unwrap();
        fs::write(store.dir.join("checkpoint-5.unfinished/state.json"), "{").unwrap();
        assert_eq!(newest(&store), (None, vec![]));
        write(&store, 5);
        assert_eq!(newest(&store), (Some(5), vec![]));
    }

    fn truncate(path: &Path) {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    }
}
