//! Atomic outputs: a file or folder is written under a temporary name and renamed when it is complete and verified. An error
//! and a signal (SIGINT, SIGTERM, SIGHUP) leave neither.
//!
//! It does not depend on what is written. Read `merged.rs` next.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::invalid;
use crate::train::stop;

/// What is written under a temporary name now, and the folders that were made for it.
static UNFINISHED: Mutex<Vec<(PathBuf, Vec<PathBuf>)>> = Mutex::new(vec![]);
/// Time between two looks for a signal.
const LOOK_EVERY: Duration = Duration::from_millis(20);

fn unfinished() -> MutexGuard<'static, Vec<(PathBuf, Vec<PathBuf>)>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A temporary output that a signal removes, for as long as this value lives.
struct Unfinished<'p>(&'p Path);

impl<'p> Unfinished<'p> {
    fn new(path: &'p Path, folders: &[PathBuf]) -> Result<Self> {
        listen()?;
        unfinished().push((path.into(), folders.to_vec()));
        Ok(Self(path))
    }

    /// Lets `finish` give the output its name; a signal comes before it or after it.
    fn finish<T>(&self, finish: impl FnOnce() -> T) -> T {
        let mut all = unfinished();
        let done = finish();
        all.retain(|(path, _)| path != self.0);
        done
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        self.finish(|| ());
    }
}

/// Has a thread wait for the first signal, which removes what is not finished and ends the process with exit code 130. Whoever
/// computes for long before the output is begun calls it first.
///
/// # Errors
/// If the system refuses the handlers or the thread.
pub fn listen() -> Result<()> {
    static ONCE: Once = Once::new();
    let mut listening = Ok(());
    ONCE.call_once(|| listening = begin_to_listen());
    listening
}

fn begin_to_listen() -> Result<()> {
    let asked = Arc::new(AtomicBool::new(false));
    stop::to_flag(&asked)?;
    let wait = move || {
        while !asked.load(Ordering::Relaxed) {
            std::thread::sleep(LOOK_EVERY);
        }
        // Held until the process ends: nothing gets its name any more.
        let all = unfinished();
        for (path, folders) in all.iter() {
            // A file that was just made in the folder fails the first try.
            for _ in 0..3 {
                if remove(path).is_ok() {
                    break;
                }
            }
            remove_folders(folders);
        }
        match all.is_empty() {
            true => crate::tell!("stopped"),
            false => crate::tell!("stopped; nothing was written"),
        }
        std::process::exit(stop::EXIT_CODE);
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).context("waiting for signals")?;
    Ok(())
}

fn remove(path: &Path) -> std::io::Result<()> {
    if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

/// Lets `make` write a file or folder under a temporary name beside `out`, and renames it to `out` on success.
///
/// # Errors
/// If `out` exists, or `make` or the renaming fails; nothing is left under either name then.
pub fn staged<T>(out: &Path, make: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let missing = missing_folders(out);
    let temporary = temporary(out)?;
    let unfinished = Unfinished::new(&temporary, &missing)?;
    let result = make(&temporary).and_then(|made| unfinished.finish(|| rename(&temporary, out)).map(|()| made));
    if result.is_err() {
        // The original error is returned even if the temporary files cannot be removed.
        remove(&temporary).ok();
        remove_folders(&missing);
    }
    result
}

/// The folders above `out` that are not there yet, the innermost first.
fn missing_folders(out: &Path) -> Vec<PathBuf> {
    let above = out.ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty());
    above.take_while(|folder| !folder.exists()).map(Path::to_path_buf).collect()
}

/// Removes folders that were made for an output which did not come about; one that holds something else stays.
fn remove_folders(made: &[PathBuf]) {
    made.iter().for_each(|folder| drop(fs::remove_dir(folder)));
}

/// Lets `make` write files into a temporary folder under the names of `outs`, which lie in one folder, and renames them to
/// `outs` on success: the first at last, since readers begin with it.
///
/// # Errors
/// If one of `outs` exists, or `make` or a renaming fails; nothing is left under any name then.
pub fn staged_files<T>(outs: &[PathBuf], make: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let missing = outs.first().map(|out| missing_folders(out)).unwrap_or_default();
    let named = outs.iter().map(|out| Ok((temporary(out)?, out))).collect::<Result<Vec<_>>>()?;
    let (folder, _) = named.first().context("the output needs a name")?;
    let unfinished = Unfinished::new(folder, &missing)?;
    let name_all = || -> Result<()> {
        for (i, out) in outs.iter().enumerate().rev() {
            let renamed = rename(&folder.join(out.file_name().unwrap_or_default()), out);
            if renamed.is_err() {
                outs[i + 1..].iter().for_each(|done| drop(fs::remove_file(done)));
            }
            renamed?;
        }
        Ok(())
    };
    let write = || {
        fs::create_dir(folder).with_context(|| format!("making {}", folder.display()))?;
        let made = make(folder)?;
        unfinished.finish(name_all).map(|()| made)
    };
    let result = write();
    fs::remove_dir_all(folder).ok();
    if result.is_err() {
        remove_folders(&missing);
    }
    result
}

/// The temporary name of an output that must not exist; its folder is made.
fn temporary(out: &Path) -> Result<PathBuf> {
    if out.exists() {
        return Err(invalid!("{} already exists; remove it or name another --out", out.display()));
    }
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|e| invalid!("{}: {e}", parent.display()))?;
    let name = out.file_name().and_then(|n| n.to_str()).context("the output needs a name")?;
    Ok(parent.join(format!(".{name}.{}.partial", std::process::id())))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("renaming to {}", to.display()))
}
