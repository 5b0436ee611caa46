//! The former run of a folder: its files wait in a folder within until the run that takes their place has made a step, and go back
//! where that run ends before. A run that never begins to train so costs nothing of what was there. It does not depend on a stage.
//! Read `session.rs` for when a run has made a step.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::lock;
use crate::config::RESOLVED;
use crate::invalid;

/// Where the files wait: all of them are there, and a run has begun in their place.
pub const NAME: &str = "former-run";
/// Its name while files are moved there or back: what is in it belongs to the folder, whose other files are the former run's, too.
const MOVING: &str = "former-run.moving";
/// Its name once the files are to be removed.
const REMOVED: &str = "former-run.removed";
const STATES: [&str; 3] = [NAME, MOVING, REMOVED];

/// The files of a former run that wait. The value does nothing when it is dropped: [`put_back`] is for who has ended.
#[derive(Debug)]
pub struct Former(PathBuf);

impl Former {
    /// Moves files and folders of `out`, named relative to it, to where they wait; those of `copied` are left as copies. What is
    /// not there is passed over.
    ///
    /// # Errors
    /// If one cannot be moved; all is put back then.
    pub fn set_aside(out: &Path, moved: &[PathBuf], copied: &[PathBuf]) -> Result<Self> {
        let moving = out.join(MOVING);
        if let Some(taken) = STATES.map(|name| out.join(name)).iter().find(|folder| folder.exists()) {
            return Err(invalid!(
                "{} is in the way: the run in {} is kept there until this one has made a step; rename it, or name another folder with \
                 --out",
                taken.display(),
                out.display()
            ));
        }
        let set = || -> std::io::Result<()> {
            for (name, is_copied) in
                moved.iter().map(|name| (name, false)).chain(copied.iter().map(|name| (name, true)))
            {
                let (from, to) = (out.join(name), moving.join(name));
                if !from.exists() {
                    continue;
                }
                fs::create_dir_all(to.parent().unwrap_or(&moving))?;
                fs::rename(&from, &to)?;
                // The file itself waits, so that a copy which is half written costs nothing.
                if is_copied {
                    fs::copy(&to, &from)?;
                }
            }
            fs::create_dir_all(&moving)?;
            fs::rename(&moving, out.join(NAME))
        };
        set().map(|()| Self(out.into())).map_err(|error| {
            // The first error counts.
            let _ = put_back(out, || Ok(()));
            let shown = out.display();
            match error.kind() {
                ErrorKind::CrossesDevices => invalid!(
                    "{shown}: files of the run in it are links to another disk, and cannot be kept until this run has made a step; \
                     remove them, or name another folder with --out"
                ),
                _ => invalid!("{shown}: {error}; name another folder with --out"),
            }
        })
    }

    /// Removes the files: the run in their place has made a step.
    ///
    /// # Errors
    /// If they cannot be removed.
    pub fn remove(self) -> Result<()> {
        remove(&self.0)
    }
}

/// Whether a former run's files wait in `out`, or did when a process was killed. A run of somebody's own by that name has a lock.
pub fn is_left(out: &Path) -> bool {
    let is_ours = |name: &str| match name {
        NAME => is_whole(&out.join(name)),
        _ => out.join(name).is_dir(),
    };
    out.join(lock::NAME).exists() && STATES.iter().any(|name| is_ours(name))
}

/// Whether a folder holds what was set aside of a run, which always has the run's settings: nothing gives way to anything else.
fn is_whole(aside: &Path) -> bool {
    aside.join(RESOLVED).is_file() && !aside.join(lock::NAME).exists()
}

/// Moves what waits in `out` back; `clear` removes what the run in its place has written before.
///
/// # Errors
/// Those of `clear`; if a file cannot be moved.
pub fn put_back(out: &Path, clear: impl FnOnce() -> Result<()>) -> Result<()> {
    let (aside, moving) = (out.join(NAME), out.join(MOVING));
    remove_dir(&out.join(REMOVED))?;
    if is_whole(&aside) {
        clear()?;
        fs::rename(&aside, &moving).with_context(|| format!("moving {}", aside.display()))?;
    }
    if moving.exists() {
        move_into(&moving, out).with_context(|| format!("moving {} to {}", moving.display(), out.display()))?;
    }
    remove_dir(&moving)
}

/// Removes what waits in `out`.
///
/// # Errors
/// If it cannot be removed.
pub fn remove(out: &Path) -> Result<()> {
    let (aside, removed) = (out.join(NAME), out.join(REMOVED));
    if is_whole(&aside) {
        remove_dir(&removed)?;
        // By a rename: what a process that is killed here leaves is never taken for a whole run.
        fs::rename(&aside, &removed).with_context(|| format!("moving {}", aside.display()))?;
    }
    remove_dir(&removed)
}

fn remove_dir(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(e).with_context(|| format!("removing {}", folder.display())),
        _ => Ok(()),
    }
}

/// Moves files and folders; files replace those of their names, and folders are merged. The lock stays.
///
/// # Errors
/// If one cannot be moved.
pub fn move_into(from: &Path, to: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(from)? {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
        let target = to.join(&name);
        match name == lock::NAME {
            true => {}
            false if path.is_dir() && target.is_dir() => move_into(&path, &target)?,
            false => fs::rename(&path, &target)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(root: &Path, name: &str, text: &str) {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), text).unwrap();
    }

    /// Every file below a folder with its text, sorted.
    fn files(root: &Path) -> Vec<(String, String)> {
        let mut found = vec![];
        for path in fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()) {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            match path.is_dir() {
                true => found.extend(files(&path).into_iter().map(|(below, text)| (format!("{name}/{below}"), text))),
                false => found.push((name, fs::read_to_string(&path).unwrap())),
            }
        }
        found.sort();
        found
    }

    fn names() -> ([PathBuf; 4], [PathBuf; 1]) {
        (
            ["config.toml", "summary.json", "adapter/weights", "checkpoints/checkpoint-2"].map(Into::into),
            ["metrics".into()],
        )
    }

    /// Wherever the process is killed, the next one finds the former run whole, or has removed it.
    #[test]
    fn what_waits_goes_back_whole_from_every_state_that_a_kill_leaves() {
        let begin = || {
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), lock::NAME, "");
            for name in ["config.toml", "adapter/weights", "adapter/notes", "checkpoints/checkpoint-2/state", "metrics"]
            {
                write(dir.path(), name, "former");
            }
            let before = files(dir.path());
            (dir, before)
        };
        let clear = |out: &Path| fs::remove_file(out.join("metrics")).context("clear");
        // 1. Killed after the run in its place has begun.
        let (dir, before) = begin();
        let (moved, copied) = names();
        Former::set_aside(dir.path(), &moved, &copied).unwrap();
        let out = dir.path();
        assert!(is_left(out) && !out.join("config.toml").exists() && out.join("adapter/notes").exists());
        assert_eq!(fs::read_to_string(out.join("metrics")).unwrap(), "former", "a copy");
        write(out, "config.toml", "new");
        put_back(out, || clear(out)).unwrap();
        assert_eq!((files(out), is_left(out)), (before, false));
        // 2. Killed while it was moved there: half of it has been, and the copy is half written.
        let (dir, before) = begin();
        let out = dir.path();
        write(out, &format!("{MOVING}/metrics"), "former");
        write(out, "metrics", "for");
        fs::create_dir_all(out.join(MOVING).join("adapter")).unwrap();
        fs::rename(out.join("adapter/weights"), out.join(MOVING).join("adapter/weights")).unwrap();
        put_back(out, || panic!("nothing is cleared")).unwrap();
        assert_eq!((files(out), is_left(out)), (before, false));
        // 3. Killed while it was removed.
        let (dir, _) = begin();
        let out = dir.path();
        Former::set_aside(out, &moved, &[]).unwrap().remove().unwrap();
        assert!(!is_left(out));
        write(out, &format!("{REMOVED}/config.toml"), "former");
        put_back(out, || panic!("nothing is cleared")).unwrap();
        assert!(!out.join("config.toml").exists() && !is_left(out));
    }

    #[test]
    fn what_is_no_former_run_by_that_name_makes_nothing_give_way() {
        for name in ["former-run/notes.txt", "former-run"] {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path();
            [lock::NAME, "config.toml", "metrics", name].iter().for_each(|name| write(out, name, "own"));
            let before = files(out);
            assert!(!is_left(out), "{name}");
            put_back(out, || panic!("nothing is cleared")).unwrap();
            let error = Former::set_aside(out, &["config.toml".into()], &[]).unwrap_err().to_string();
            assert!(error.contains("former-run is in the way") && files(out) == before, "{name}: {error}");
        }
    }

    #[test]
    fn a_folder_of_somebodys_own_by_that_name_stays_and_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path();
        ["config.toml", "former-run/config.toml", "former-run/run.lock"]
            .iter()
            .for_each(|name| write(out, name, "own"));
        let before = files(out);
        assert!(!is_left(out), "a folder of runs");
        write(out, lock::NAME, "");
        assert!(!is_left(out), "a run with another in it");
        let error = Former::set_aside(out, &["config.toml".into()], &[]).unwrap_err().to_string();
        assert!(error.contains("former-run is in the way") && error.contains("--out"), "{error}");
        fs::remove_file(out.join(lock::NAME)).unwrap();
        assert_eq!(files(out), before);
    }
}
