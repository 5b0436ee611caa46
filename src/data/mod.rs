//! Files of records -> records -> token sequences. Knows no model; the tokenizer is behind `phases::TextEncoder`.
//!
//! sources.rs finds and mixes the files, read.rs, delimited.rs and parquet.rs open them; formats.rs, mapping.rs, columns.rs,
//! dialogue.rs, transcript.rs and presets.rs turn each JSON object into a [`Record`];
//! render.rs makes text of a dialogue, phases.rs the sequences each stage trains on; split.rs holds some of them out,
//! examples.rs is what a stage sees of them, order.rs says which comes when.
//! Read formats.rs next.

mod columns;
mod compat;
mod delimited;
mod dialogue;
pub mod dschat;
mod encoder;
pub mod examples;
mod files;
mod formats;
mod mapping;
pub mod order;
mod parquet;
pub mod phases;
pub mod presets;
mod read;
mod render;
mod sources;
mod split;
mod transcript;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;

use crate::config::{Data, OnBadRecord};
use crate::invalid;

pub use crate::model::chat_template::Message;
pub use encoder::ModelEncoder;
pub use formats::{Record, Text};
pub use split::split;

/// Where a record stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file as named or found.
    pub file: Arc<Path>,
    /// Record number in the file, from 1.
    pub record: usize,
    /// Line number, from 1, where a record is a line.
    pub line: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}, line {line}", self.file.display()),
            None => write!(f, "{}, record {}", self.file.display(), self.record),
        }
    }
}

/// A record and where it came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// For messages about it.
    pub place: Place,
    /// What it says.
    pub record: Record,
}

/// All records of `[data] path`.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// In the order of the files.
    pub entries: Vec<Entry>,
    /// Records dropped under `on_bad_record = "skip"`.
    pub skipped: usize,
    /// What was wrong with the first of them.
    pub first_skipped: Option<String>,
    /// Files of the folders and patterns that are of no known kind, or not of the split asked for.
    pub ignored: Vec<PathBuf>,
}

/// Reads every source of `[data]` up to `max_rows` records.
///
/// # Errors
/// A file that cannot be read, is of an unknown kind or holds no record; a record that cannot be used, unless
/// `on_bad_record = "skip"`. The message names file, record or line, column and what was expected.
pub fn load(config: &Data) -> Result<Dataset> {
    let sources = sources::open(config)?;
    let ignored = sources.ignored().cloned().collect();
    let mut dataset = Dataset { entries: Vec::new(), skipped: 0, first_skipped: None, ignored };
    let room = config.max_rows.unwrap_or(usize::MAX);
    sources.stream(&mut |place, record| {
        match record {
            Ok(record) => dataset.entries.push(Entry { place, record }),
            Err(fault) if config.on_bad_record == OnBadRecord::Skip => {
                dataset.skipped += 1;
                dataset.first_skipped.get_or_insert_with(|| format!("{place}: {fault}"));
            }
            Err(fault) => return Err(invalid!("{place}: {fault}")),
        }
        Ok(dataset.entries.len() < room)
    })?;
    if dataset.entries.is_empty() {
        let first = dataset.first_skipped.unwrap_or_default();
        return Err(invalid!("[data] path: none of {} records can be used; the first: {first}", dataset.skipped));
    }
    Ok(dataset)
}
