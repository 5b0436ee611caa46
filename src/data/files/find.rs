//! `[data] path` -> the files behind it: a file, a pattern, a folder. Knows no record. Read read.rs next.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::config::Source;
use crate::data::formats::presets::train_split;
use crate::invalid;

/// How a file's records are written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Json,
    Text,
    /// Comma- or tab-separated.
    Delimited(u8),
    Parquet,
}

/// The kind that a file's name says.
pub(crate) fn kind(path: &Path) -> Option<Kind> {
    let name = path.file_name()?.to_str()?.to_lowercase();
    let plain = name.strip_suffix(".gz").unwrap_or(&name);
    match plain.rsplit_once('.')?.1 {
        "json" | "jsonl" | "ndjson" => Some(Kind::Json),
        "txt" => Some(Kind::Text),
        "csv" => Some(Kind::Delimited(b',')),
        "tsv" => Some(Kind::Delimited(b'\t')),
        "parquet" if plain == name => Some(Kind::Parquet),
        _ => None,
    }
}

const KINDS: &str = ".json, .jsonl, .ndjson, .csv, .tsv or .txt, each also with .gz, or .parquet";

/// Folders deeper than this are links in a circle.
const MAX_DEPTH: usize = 32;

/// What a source's paths stand for.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Files {
    /// In the order of the paths, and of their names within one.
    pub files: Vec<PathBuf>,
    /// Files that a folder or pattern has and that are not read.
    pub ignored: Vec<PathBuf>,
}

/// The files of a source. Of folders, those in them and in their folders, in the order of their names, that have a known
/// ending and, with `split`, that word in their name or their folder's; names that begin with a dot or an underscore are
/// passed over, as every tool does that writes marker files. A `preset` without `split` means its training split, where the
/// folder has one.
///
/// # Errors
/// A path that is not there or stands for no readable file.
pub(crate) fn files(source: &Source) -> Result<Files> {
    let mut all = Files::default();
    for path in source.path.as_slice() {
        let shown = path.display();
        let before = all.files.len();
        let failed = |error: std::io::Error| invalid!("[data] path {shown}: {error}");
        match std::fs::metadata(path) {
            Ok(about) if about.is_dir() => {
                let left = all.ignored.len();
                walk(path, path, split_of(source), 0, &mut all)?;
                if all.files.len() == before && source.split.is_none() {
                    all.ignored.truncate(left);
                    walk(path, path, None, 0, &mut all)?;
                }
                if all.files.len() == before {
                    let of = source.split.as_ref().map(|name| format!(" of split {name:?}")).unwrap_or_default();
                    return Err(invalid!("[data] path {shown}: the folder has no file{of} that ends in {KINDS}"));
                }
            }
            Ok(_) if kind(path).is_none() => {
                return Err(invalid!(
                    "[data] path {shown}: the name must end in {KINDS}; convert other tables to JSON lines"
                ));
            }
            Ok(_) => all.files.push(path.clone()),
            Err(error) => match path.to_str() {
                Some(text) if text.contains(['*', '?', '[']) => {
                    let found = glob::glob(text)
                        .map_err(|error| invalid!("[data] path {shown} is no pattern of paths: {error}"))?;
                    for item in found {
                        let item = item.map_err(|error| invalid!("[data] path {shown}: {error}"))?;
                        match item.is_file() && !is_hidden(&item) && kind(&item).is_some() {
                            true => all.files.push(item),
                            false => all.ignored.push(item),
                        }
                    }
                    if all.files.len() == before {
                        return Err(invalid!("[data] path {shown}: no file of that pattern ends in {KINDS}"));
                    }
                }
                Some(text) if is_hub_id(text) => {
                    let folder = from_hub(text, source)?;
                    walk(&folder, &folder, split_of(source), 0, &mut all)?;
                    if all.files.len() == before {
                        return Err(invalid!("[data] path {shown}: the data set has no file that ends in {KINDS}"));
                    }
                }
                _ => return Err(failed(error)),
            },
        }
    }
    Ok(all)
}

/// The split asked for, or the one that a preset trains on.
fn split_of(source: &Source) -> Option<&str> {
    source.split.as_deref().or(source.preset.map(train_split))
}

fn walk(root: &Path, folder: &Path, split: Option<&str>, depth: usize, all: &mut Files) -> Result<()> {
    let failed = |error: std::io::Error| invalid!("[data] path {}: {error}", folder.display());
    if depth > MAX_DEPTH {
        return Err(invalid!("[data] path {}: more than {MAX_DEPTH} folders deep", folder.display()));
    }
    let mut inside = Vec::new();
    for item in std::fs::read_dir(folder).map_err(failed)? {
        inside.push(item.map_err(failed)?.path());
    }
    inside.sort();
    for item in inside {
        let hidden = is_hidden(&item);
        if item.is_dir() {
            if !hidden {
                walk(root, &item, split, depth + 1, all)?;
            }
        } else if !hidden && kind(&item).is_some() && split.is_none_or(|split| is_of(&item, root, split)) {
            all.files.push(item);
        } else {
            all.ignored.push(item);
        }
    }
    Ok(())
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(['.', '_']))
}

/// Is `split` a word of the path below the folder? `data/train-00000-of-00002.parquet` is of `train`.
fn is_of(path: &Path, root: &Path, split: &str) -> bool {
    let below = path.strip_prefix(root).unwrap_or(path).to_string_lossy();
    below.split(|c: char| !c.is_alphanumeric()).any(|word| word == split)
}

/// `owner/name`, which is no path that is there.
fn is_hub_id(text: &str) -> bool {
    let part = |part: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(plain)
    };
    matches!(text.split_once('/'), Some((owner, name)) if part(owner) && part(name)) && kind(Path::new(text)).is_none()
}

/// The folder of a data set's files, fetched where they are missing.
#[cfg(feature = "hub")]
fn from_hub(id: &str, source: &Source) -> Result<PathBuf> {
    use crate::model_files::hub::{Hub, RepoKind};
    let split = split_of(source);
    let wanted = |name: &str| {
        let path = Path::new(name);
        // Not the `dataset_infos.json` and the like that describe a set.
        let describes = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("dataset_info"));
        !describes
            && !is_hidden(path)
            && kind(path).is_some()
            && split.is_none_or(|split| is_of(path, Path::new(""), split))
    };
    Hub::from_env()?.fetch(RepoKind::Dataset, id, source.revision.as_deref().unwrap_or("main"), &wanted)
}

#[cfg(not(feature = "hub"))]
fn from_hub(id: &str, _: &Source) -> Result<PathBuf> {
    Err(invalid!(
        "[data] path {id}: there is no such file or folder; a data set of the hub needs a build with --features hub"
    ))
}
