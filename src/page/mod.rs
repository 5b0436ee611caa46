//! The page of a run: `report.html` in its folder, one file that opens from the disk, and the page of several runs.
//!
//! A page is made from the files of a run's folder alone, so `fourfold report` makes it again at any time; while a run goes
//! on, [`LivePage`] follows it and writes the page anew. The page loads nothing and talks to nobody. It does not depend on
//! data or on a tokenizer. Read `run_files.rs` for what is read, `document.rs` for the whole page, `figure.rs` for a curve.

mod about;
pub(crate) mod catalogue;
mod compare;
pub(crate) mod document;
pub(crate) mod figure;
pub(crate) mod html;
mod live;
pub(crate) mod run_files;
pub(crate) mod samples;
mod settings;
pub(crate) mod status;
mod tail;
pub(crate) mod thin;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

pub use about::About;
pub use live::{LivePage, finish};

use run_files::RunFiles;

/// The page's name in a run's folder.
pub const NAME: &str = "report.html";

/// Makes the page of one run, or one page of several runs, and writes it to `to`. Returns where it is, its size and what
/// was wrong with the runs' files.
///
/// # Errors
/// If a folder holds no run, or the page cannot be written.
pub fn write(runs: &[PathBuf], to: &Path) -> Result<Value> {
    let runs = runs.iter().map(|run| RunFiles::read(run)).collect::<Result<Vec<_>>>()?;
    let text = document::fitting(&runs)?;
    write_atomically(to, &text)?;
    let problems: Vec<String> = runs.iter().flat_map(|run| run.problems.clone()).collect();
    Ok(json!({ "report": to.display().to_string(), "bytes": text.len(), "runs": runs.len(), "problems": problems }))
}

/// Writes a file beside its place and renames it: a reader never sees half of it.
fn write_atomically(path: &Path, text: &str) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let written = fs::File::create(&new)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written.with_context(|| format!("writing {}", path.display()))
}
