//! A result that appears under its name whole and proven, or not at all. Knows nothing of what is made.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::invalid;

/// Has `make` write a file or a folder under a temporary name beside `out`, and renames it when that has gone well.
///
/// # Errors
/// If `out` exists, `make` fails, or the disk refuses; nothing is left under either name then.
pub fn staged<T>(out: &Path, make: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    if out.exists() {
        return Err(invalid!("{} is there already; remove it or name another --out", out.display()));
    }
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|e| invalid!("{}: {e}", parent.display()))?;
    let name = out.file_name().and_then(|n| n.to_str()).context("the output needs a name")?;
    let temporary = parent.join(format!(".{name}.{}.partial", std::process::id()));
    let result = make(&temporary).and_then(|made| {
        fs::rename(&temporary, out).with_context(|| format!("renaming to {}", out.display())).map(|()| made)
    });
    if result.is_err() {
        // The error at hand matters more than whether the leftovers could be removed.
        if temporary.is_dir() { fs::remove_dir_all(&temporary) } else { fs::remove_file(&temporary) }.ok();
    }
    result
}
