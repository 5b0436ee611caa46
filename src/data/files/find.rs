//! `[data] path` -> the files to read: one file, a glob pattern, a folder, or a data set of the Hugging Face hub.
//!
//! A file's type is taken from its name. This file does not depend on `formats` or the record types. Read
//! `data/files/read.rs` next.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::config::{RUN_FILES, Source, is_run};
use crate::invalid;

/// The container in which a file's records are written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum FileType {
    /// A JSON array, or JSON lines.
    Json,
    /// Plain text, one record per line.
    Text,
    /// A table with this delimiter: a comma or a tab.
    Delimited(u8),
    /// A Parquet file.
    Parquet,
}

/// The type of a file, by the ending of its name; None for any other ending.
pub(crate) fn file_type(path: &Path) -> Option<FileType> {
    let name = path.file_name()?.to_str()?.to_lowercase();
    let plain = name.strip_suffix(".gz").unwrap_or(&name);
    match plain.rsplit_once('.')?.1 {
        "json" | "jsonl" | "ndjson" => Some(FileType::Json),
        "txt" => Some(FileType::Text),
        "csv" => Some(FileType::Delimited(b',')),
        "tsv" => Some(FileType::Delimited(b'\t')),
        "parquet" if plain == name => Some(FileType::Parquet),
        _ => None,
    }
}

/// Files that describe a data set or a folder and hold no records, although their endings are known: those that the library
/// `datasets` ignores or writes beside the records, an adapter's, and notices. They are read only where the config names them.
const SIDE_FILES: [&str; 15] = [
    "adapter_config.json",
    "config.json",
    "croissant.json",
    "dataset-metadata.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "datapackage.json",
    "license.txt",
    "metadata.json",
    "notice.txt",
    "package.json",
    "readme.txt",
    "requirements.txt",
    "state.json",
];

/// The endings of known file types, for messages.
const ENDINGS: &str = ".json, .jsonl, .ndjson, .csv, .tsv or .txt, each also with .gz, or .parquet";

/// Maximum depth of folders: a deeper one is taken for a cycle of links.
const MAX_DEPTH: usize = 32;

/// The files of one source.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Files {
    /// Files to read, in the order of the paths, and of their names within one path.
    pub files: Vec<PathBuf>,
    /// Files in the folders and patterns that are not read.
    pub ignored: Vec<PathBuf>,
}

/// The files of a source. A folder is read with its subfolders, in the order of the names: the files that have a known ending and,
/// with `split`, that word in their name or their folder's. Names that begin with a dot or an underscore are ignored, as in every
/// tool that writes marker files, and so are files that describe a data set and runs of this program. `train_split` is the split
/// that the source's preset trains on: it applies where the source names no `split`, and only if a folder has files of it.
///
/// # Errors
/// A path that does not exist, is the folder of a run or has no readable file.
pub(crate) fn files(source: &Source, train_split: Option<&str>) -> Result<Files> {
    let wanted = source.split.as_deref().or(train_split);
    let mut all = Files::default();
    for path in source.path.as_slice() {
        let shown = path.display();
        let before = all.files.len();
        let failed = |error: std::io::Error| invalid!("[data] path {shown}: {error}");
        match std::fs::metadata(path) {
            Ok(about) if about.is_dir() && is_run(path) => return Err(of_run(path)),
            Ok(about) if about.is_dir() => {
                let ignored_before = all.ignored.len();
                walk(path, path, wanted, 0, &mut all)?;
                if all.files.len() == before && source.split.is_none() {
                    all.ignored.truncate(ignored_before);
                    walk(path, path, None, 0, &mut all)?;
                }
                if all.files.len() == before {
                    let of = source.split.as_ref().map(|name| format!(" of split {name:?}")).unwrap_or_default();
                    return Err(invalid!("[data] path {shown}: the folder has no file{of} that ends in {ENDINGS}"));
                }
            }
            Ok(_) if file_type(path).is_none() => {
                return Err(invalid!(
                    "[data] path {shown}: the name must end in {ENDINGS}; convert other tables to JSON lines"
                ));
            }
            Ok(_) => all.files.push(path.clone()),
            Err(error) => match path.to_str() {
                Some(text) if text.contains(['*', '?', '[']) => {
                    let found = glob::glob(text)
                        .map_err(|error| invalid!("[data] path {shown} is not a valid pattern of paths: {error}"))?;
                    for item in found {
                        let item = item.map_err(|error| invalid!("[data] path {shown}: {error}"))?;
                        match item.is_file() && holds_records(&item) && !is_figures(&item) {
                            true => all.files.push(item),
                            false => all.ignored.push(item),
                        }
                    }
                    if all.files.len() == before {
                        return Err(invalid!("[data] path {shown}: no file of that pattern ends in {ENDINGS}"));
                    }
                }
                Some(text) if is_hub_id(text) => {
                    let folder = from_hub(text, source, wanted)?;
                    walk(&folder, &folder, wanted, 0, &mut all)?;
                    if all.files.len() == before {
                        return Err(invalid!("[data] path {shown}: the data set has no file that ends in {ENDINGS}"));
                    }
                }
                _ => return Err(failed(error)),
            },
        }
    }
    Ok(all)
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
        if item.is_dir() {
            if is_run(&item) {
                all.ignored.push(item);
            } else if !is_hidden(&item) {
                walk(root, &item, split, depth + 1, all)?;
            }
        } else if holds_records(&item) && split.is_none_or(|split| belongs_to(&item, root, split)) {
            all.files.push(item);
        } else {
            all.ignored.push(item);
        }
    }
    Ok(())
}

/// The error for the folder of a run, with the files in it that may be meant.
fn of_run(run: &Path) -> anyhow::Error {
    let entries = std::fs::read_dir(run).into_iter().flatten().flatten().map(|entry| entry.path());
    let has_some = |path: &PathBuf| path.is_file() && std::fs::metadata(path).is_ok_and(|about| about.len() > 0);
    let mut found: Vec<PathBuf> =
        entries.filter(|path| has_some(path) && holds_records(path) && !is_figures(path)).collect();
    found.sort();
    let names: Vec<String> = found.iter().map(|path| path.display().to_string()).collect();
    let meant = match &names[..] {
        [] => "give a file of records".to_owned(),
        names => format!("did you mean {}?", names.join(" or ")),
    };
    invalid!(
        "[data] path {}: that is the folder of a run, which holds its figures and no data set; {meant}",
        run.display()
    )
}

/// Whether a file is one that a run writes of itself: anything but its samples, which are prompts with responses.
fn is_figures(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    RUN_FILES.contains(&name) && !name.starts_with("samples") && path.parent().is_some_and(is_run)
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(['.', '_']))
}

/// Whether a file that a folder or a pattern contains is one of records.
fn holds_records(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase());
    file_type(path).is_some() && !is_hidden(path) && name.is_some_and(|name| !SIDE_FILES.contains(&name.as_str()))
}

/// Whether `split` is a word of the path below the folder: `data/train-00000-of-00002.parquet` belongs to `train`.
fn belongs_to(path: &Path, root: &Path, split: &str) -> bool {
    let below = path.strip_prefix(root).unwrap_or(path).to_string_lossy();
    below.split(|c: char| !c.is_alphanumeric()).any(|word| word == split)
}

/// Whether the text can be the id of a hub data set, `owner/name`.
fn is_hub_id(text: &str) -> bool {
    let part = |part: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(plain)
    };
    matches!(text.split_once('/'), Some((owner, name)) if part(owner) && part(name))
        && file_type(Path::new(text)).is_none()
}

/// The local folder of a hub data set's files; missing files are downloaded.
#[cfg(feature = "hub")]
fn from_hub(id: &str, source: &Source, split: Option<&str>) -> Result<PathBuf> {
    use crate::model_files::hub::{Hub, RepoKind};
    let wanted = |name: &str| {
        let path = Path::new(name);
        holds_records(path) && split.is_none_or(|split| belongs_to(path, Path::new(""), split))
    };
    Hub::from_env()?.fetch(RepoKind::Dataset, id, source.revision.as_deref().unwrap_or("main"), &wanted)
}

#[cfg(not(feature = "hub"))]
fn from_hub(id: &str, _: &Source, _: Option<&str>) -> Result<PathBuf> {
    Err(invalid!(
        "[data] path {id}: there is no such file or folder; a data set of the hub needs a build with --features hub"
    ))
}
