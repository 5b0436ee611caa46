//! Atomic outputs: a file or folder is written under a temporary name and renamed when it is complete and verified.
//!
//! It does not depend on what is written. Read `merged.rs` next.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::invalid;

/// Lets `make` write a file or folder under a temporary name beside `out`, and renames it to `out` on success.
///
/// # Errors
/// If `out` exists, or `make` or the renaming fails; nothing is left under either name then.
pub fn staged<T>(out: &Path, make: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    if out.exists() {
        return Err(invalid!("{} already exists; remove it or name another --out", out.display()));
    }
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|e| invalid!("{}: {e}", parent.display()))?;
    let name = out.file_name().and_then(|n| n.to_str()).context("the output needs a name")?;
    let temporary = parent.join(format!(".{name}.{}.partial", std::process::id()));
    let result = make(&temporary).and_then(|made| {
        fs::rename(&temporary, out).with_context(|| format!("renaming to {}", out.display())).map(|()| made)
    });
    if result.is_err() {
        // The original error is returned even if the temporary files cannot be removed.
        if temporary.is_dir() { fs::remove_dir_all(&temporary) } else { fs::remove_file(&temporary) }.ok();
    }
    result
}
