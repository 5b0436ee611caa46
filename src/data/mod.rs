//! Files of records -> records -> token sequences. Knows no model; the tokenizer is behind `phases::TextEncoder`.
//!
//! read.rs opens the files; formats.rs, columns.rs, dialogue.rs and transcript.rs turn each JSON object into a [`Record`];
//! render.rs makes text of a dialogue, phases.rs the sequences each stage trains on; split.rs holds some of them out,
//! examples.rs is what a stage sees of them, order.rs says which comes when.
//! Read formats.rs next.

mod columns;
mod dialogue;
mod encoder;
pub mod examples;
mod formats;
pub mod order;
pub mod phases;
mod read;
mod render;
mod split;
mod transcript;

use std::fmt;
use std::path::Path;
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
}

/// Reads every file of `[data] path` up to `max_rows` records.
///
/// # Errors
/// A file that cannot be read, is of an unknown kind or holds no record; a record that cannot be used, unless
/// `on_bad_record = "skip"`. The message names file, record or line, column and what was expected.
pub fn load(config: &Data) -> Result<Dataset> {
    let mut dataset = Dataset { entries: Vec::new(), skipped: 0, first_skipped: None };
    let room = config.max_rows.unwrap_or(usize::MAX);
    for file in read::files(config.path.as_slice())? {
        if dataset.entries.len() >= room {
            break;
        }
        let before = dataset.entries.len() + dataset.skipped;
        let mut parser = formats::Parser::new(config.format);
        read::records(&file, &mut |place, found| {
            match found.and_then(|found| parser.record(found)) {
                Ok(record) => dataset.entries.push(Entry { place, record }),
                Err(fault) if config.on_bad_record == OnBadRecord::Skip => {
                    dataset.skipped += 1;
                    dataset.first_skipped.get_or_insert_with(|| format!("{place}: {fault}"));
                }
                Err(fault) => return Err(invalid!("{place}: {fault}")),
            }
            Ok(dataset.entries.len() < room)
        })?;
        if dataset.entries.len() + dataset.skipped == before {
            return Err(invalid!("{}: holds no record; remove it from [data] path or fill it", file.display()));
        }
    }
    if dataset.entries.is_empty() {
        let first = dataset.first_skipped.unwrap_or_default();
        return Err(invalid!("[data] path: none of {} records can be used; the first: {first}", dataset.skipped));
    }
    Ok(dataset)
}
