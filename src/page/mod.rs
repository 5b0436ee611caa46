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
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

pub use about::About;
pub use live::{LivePage, finish};

use run_files::RunFiles;

use crate::invalid;

/// The page's name in a run's folder.
pub const NAME: &str = "report.html";
/// By this a page is known as one of this program's; it stands in the file's first bytes.
const MARK: &str = "<meta name=generator content=\"fourfold report\">";
/// The bytes of a file among which [`MARK`] is looked for.
const HEAD: u64 = 512;

/// Refuses to replace anything but a page of this program, or an empty file.
///
/// # Errors
/// If something else has the name of the page, or of the file that it is written to first.
pub fn check_replaceable(page: &Path) -> Result<()> {
    for path in [page.to_path_buf(), beside(page)] {
        let shown = path.display();
        let refused = |what: &str| invalid!("{shown} {what}, and it stays as it is; name another file with --out");
        let about = match fs::metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            found => found.map_err(|error| invalid!("{shown}: {error}; name another file with --out"))?,
        };
        if about.is_dir() {
            return Err(invalid!("{shown} is a folder; name a file in it with --out"));
        }
        if !about.is_file() {
            return Err(refused("is no regular file"));
        }
        let mut head = vec![];
        let read = fs::File::open(&path).and_then(|file| file.take(HEAD).read_to_end(&mut head));
        read.map_err(|error| invalid!("{shown}: {error}; name another file with --out"))?;
        if !head.is_empty() && !String::from_utf8_lossy(&head).contains(MARK) {
            return Err(refused("is there already and is no page of fourfold"));
        }
    }
    Ok(())
}

/// Makes the page of one run, or one page of several runs, and writes it to `to`. Returns where it is, its size and what
/// was wrong with the runs' files.
///
/// # Errors
/// If a folder holds no run, or the page cannot be written.
pub fn write(runs: &[PathBuf], to: &Path) -> Result<Value> {
    let (mut problems, mut named): (Vec<String>, Vec<(PathBuf, &PathBuf)>) = (vec![], vec![]);
    for run in runs {
        let folder = fs::canonicalize(run).unwrap_or_else(|_| run.clone());
        match named.iter().find(|(known, _)| *known == folder) {
            Some((_, first)) if *first == run => {
                problems.push(format!("{} is named twice and drawn once", run.display()))
            }
            Some((_, first)) => {
                problems.push(format!("{} is the run in {}, which is drawn once", run.display(), first.display()));
            }
            None => named.push((folder, run)),
        }
    }
    let runs = named.into_iter().map(|(_, run)| RunFiles::read(run)).collect::<Result<Vec<_>>>()?;
    let text = document::fitting(&runs)?;
    write_atomically(to, &text)?;
    problems.extend(runs.iter().flat_map(|run| run.problems.clone()));
    Ok(json!({ "report": to.display().to_string(), "bytes": text.len(), "runs": runs.len(), "problems": problems }))
}

/// Where a file is written before it takes its place.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    path.with_file_name(name)
}

/// Writes a file beside its place and renames it: a reader never sees half of it.
fn write_atomically(path: &Path, text: &str) -> Result<()> {
    let new = beside(path);
    let written = fs::File::create(&new)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written.with_context(|| format!("writing {}", path.display()))
}
