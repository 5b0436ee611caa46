//! The lock of an output folder: one process per folder.
//!
//! The operating system holds the lock (flock), so it ends with its process however the process ends; the file's text
//! only names the owner. It does not depend on a stage. Read `session.rs` next.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::host::date::utc;
use crate::invalid;

/// The lock's file in its folder.
pub const NAME: &str = "run.lock";

/// The lock of a folder. Dropping it empties the file, which records a clean shutdown; only a kill leaves the text. The
/// file stays: deleting a lock file would let two processes lock two files.
#[derive(Debug)]
pub struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.0.set_len(0); // the lock itself goes with the file
    }
}

/// Locks a folder until the returned value is dropped. A lock whose process is gone is taken over, and a notice is
/// printed.
///
/// # Errors
/// If another process has it, or the file cannot be written.
pub fn lock(dir: &Path) -> Result<Lock> {
    let path = dir.join(NAME);
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = opened.map_err(|e| invalid!("{}: {e}; name another folder with --out", path.display()))?;
    let mut locked = file.try_lock();
    if matches!(locked, Err(TryLockError::WouldBlock)) {
        // Who only asks whether there is an owner has the lock for a moment.
        std::thread::sleep(Duration::from_millis(50));
        locked = file.try_lock();
    }
    let (text, owner) = read(&mut file);
    match locked {
        Err(TryLockError::WouldBlock) => {
            return Err(in_use(dir, &owner));
        }
        Err(TryLockError::Error(e)) => return Err(e).with_context(|| format!("locking {}", path.display())),
        Ok(()) if !text.is_empty() => {
            crate::tell!(
                "{}: the previous run ({owner}) did not shut down cleanly; taking over its lock",
                dir.display()
            )
        }
        Ok(()) => {}
    }
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let text = json!({ "pid": std::process::id(), "host": host(), "started": started }).to_string();
    write(&mut file, &text).with_context(|| format!("writing {}", path.display()))?;
    Ok(Lock(file))
}

fn in_use(dir: &Path, owner: &str) -> anyhow::Error {
    invalid!("{} is in use by {owner}; wait for it, stop it, or name another folder with --out", dir.display())
}

/// Refuses a folder whose lock a process has; nothing is written.
///
/// # Errors
/// If one has it.
pub fn check(dir: &Path) -> Result<()> {
    owner(dir).map_or(Ok(()), |owner| Err(in_use(dir, &owner)))
}

/// Whether a process has the lock of a folder.
pub fn is_held(dir: &Path) -> bool {
    owner(dir).is_some()
}

/// The lock's text, and what it says of its owner. Without a text the owner is named less well.
fn read(file: &mut File) -> (String, String) {
    let mut text = String::new();
    let _ = file.read_to_string(&mut text);
    let owner: Value = serde_json::from_str(&text).unwrap_or_default();
    let named = format!(
        "process {} on {}, started {}",
        owner["pid"],
        owner["host"].as_str().unwrap_or("this machine"),
        owner["started"].as_u64().map_or_else(|| "at an unknown time".into(), utc)
    );
    (text, named)
}

/// The process that has the folder's lock now, in words. The lock itself is left as it is; one that was given back has no
/// text and is not touched.
pub fn owner(dir: &Path) -> Option<String> {
    let mut file = File::open(dir.join(NAME)).ok()?;
    if file.metadata().is_ok_and(|about| about.len() == 0) {
        return None;
    }
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => Some(read(&mut file).1),
        _ => None,
    }
}

fn write(file: &mut File, text: &str) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(text.as_bytes())
}

/// The machine's name, for messages.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = name.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_else(|| "an unknown machine".into());
    name.trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_refused_with_the_firsts_name_and_a_stale_lock_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path()).unwrap();
        let message = lock(dir.path()).unwrap_err().to_string();
        assert!(owner(dir.path()).unwrap().contains(&format!("process {}", std::process::id())));
        assert_eq!(check(dir.path()).unwrap_err().to_string(), message);
        assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
        let text = || std::fs::read_to_string(dir.path().join(NAME)).unwrap();
        assert!(text().contains("pid"));
        drop(first);
        assert_eq!(owner(dir.path()), None);
        check(dir.path()).unwrap();
        assert_eq!(text(), "", "a dropped lock leaves an empty file");
        std::fs::write(dir.path().join(NAME), r#"{"pid": 1}"#).unwrap(); // as if killed
        lock(dir.path()).unwrap();
    }
}
