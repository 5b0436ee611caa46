//! Atomic outputs: a file or folder is written under a temporary name and renamed when it is complete and verified.
//!
//! It does not depend on what is written. Read `merged.rs` next.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::invalid;

/// Lets `make` write a file or folder under a temporary name beside `out`, and renames it to `out` on success.
///
/// # Errors
/// If `out` exists, or `make` or the renaming fails; nothing is left under either name then.
pub fn staged<T>(out: &Path, make: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let missing = missing_folders(out);
    let temporary = temporary(out)?;
    let result = make(&temporary).and_then(|made| rename(&temporary, out).map(|()| made));
    if result.is_err() {
        // The original error is returned even if the temporary files cannot be removed.
        if temporary.is_dir() { fs::remove_dir_all(&temporary) } else { fs::remove_file(&temporary) }.ok();
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
    let write = || {
        fs::create_dir(folder).with_context(|| format!("making {}", folder.display()))?;
        let made = make(folder)?;
        for (i, out) in outs.iter().enumerate().rev() {
            let renamed = rename(&folder.join(out.file_name().unwrap_or_default()), out);
            if renamed.is_err() {
                outs[i + 1..].iter().for_each(|done| drop(fs::remove_file(done)));
            }
            renamed?;
        }
        Ok(made)
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
