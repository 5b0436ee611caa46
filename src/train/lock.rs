//! One process a folder. The lock is the system's (flock), so it ends with its process however that ends; the file's text
//! only says who has it. Knows no stage.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::invalid;

/// The lock's file in its folder.
pub const NAME: &str = "run.lock";

/// A folder taken. Dropped, it says that its owner ended in good order, on every way out but a kill. The file stays: deleting
/// a lock file lets two processes lock two files.
#[derive(Debug)]
pub struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.0.set_len(0); // the lock itself goes with the file
    }
}

/// Takes the lock of a folder, for as long as what it returns lives. A lock whose process is gone is taken over and told.
///
/// # Errors
/// If another process has it, or the file cannot be written.
pub fn lock(dir: &Path) -> Result<Lock> {
    let path = dir.join(NAME);
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = opened.map_err(|e| invalid!("{}: {e}; name another folder with --out", path.display()))?;
    let mut text = String::new();
    let locked = file.try_lock();
    let _ = file.read_to_string(&mut text); // whoever has it, it can only be told worse
    let owner: Value = serde_json::from_str(&text).unwrap_or_default();
    let owner = format!(
        "process {} on {} (begun {} s after 1970)",
        owner["pid"],
        owner["host"].as_str().unwrap_or("this machine"),
        owner["started"]
    );
    match locked {
        Err(TryLockError::WouldBlock) => {
            return Err(invalid!(
                "{} is in use by {owner}; wait for it, stop it, or name another folder with --out",
                dir.display()
            ));
        }
        Err(TryLockError::Error(e)) => return Err(e).with_context(|| format!("locking {}", path.display())),
        Ok(()) if !text.is_empty() => eprintln!("{}: its last run, {owner}, ended without a word", dir.display()),
        Ok(()) => {}
    }
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let text = json!({ "pid": std::process::id(), "host": host(), "started": started }).to_string();
    write(&mut file, &text).with_context(|| format!("writing {}", path.display()))?;
    Ok(Lock(file))
}

fn write(file: &mut File, text: &str) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(text.as_bytes())
}

/// The machine's name, for people.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = name.or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_else(|| "an unknown machine".into());
    name.trim().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_refused_with_the_firsts_name_and_a_lock_left_behind_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path()).unwrap();
        let message = lock(dir.path()).unwrap_err().to_string();
        assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
        let text = || std::fs::read_to_string(dir.path().join(NAME)).unwrap();
        assert!(text().contains("pid"));
        drop(first);
        assert_eq!(text(), "", "an owner that ends says so, however it ends");
        std::fs::write(dir.path().join(NAME), r#"{"pid": 1}"#).unwrap(); // as if killed
        lock(dir.path()).unwrap();
    }
}
