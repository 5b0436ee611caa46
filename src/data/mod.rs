//! Files of records -> records -> token sequences. Knows no model; the tokenizer is behind `phases::TextEncoder`.
//!
//! sources.rs finds and mixes the files, read.rs (with bounded.rs beneath), delimited.rs and
//! parquet.rs (with parquet_footer.rs beneath) open them; formats.rs, mapping.rs, columns.rs,
//! dialogue.rs, transcript.rs and presets.rs turn each JSON object into a [`Record`];
//! render.rs makes text of a dialogue, phases.rs the sequences each stage trains on, report.rs what became of the records; pipeline.rs runs all that over files
//! of any size, into memory or cache.rs; split.rs holds some out, examples.rs is what a stage sees of the result, order.rs
//! says which comes when.
//! ids.rs reads sequences that are token ids already.
//! Read formats.rs next.

pub mod examples;
mod files;
pub mod formats;
pub mod stream;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;

use crate::config::{Data, OnBadRecord};
use crate::invalid;

pub use crate::tokenizer::chat_template::Message;
pub use examples::encoder::ModelEncoder;
pub use formats::{Record, Text};
pub use stream::pipeline::{Part, Prepared, prepare, ptx_blocks};

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

/// A record that was passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Where it stands.
    pub place: Place,
    /// What is wrong with it.
    pub fault: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.fault)
    }
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

/// Hands every record of `[data]`'s sources on, up to `max_rows`, in constant memory. `take` gets a record, or the place
/// and the fault of one that `on_bad_record = "skip"` passes over, and answers whether to go on.
///
/// # Errors
/// A file that cannot be read, is of an unknown kind or holds no record; a record that cannot be used, unless
/// `on_bad_record = "skip"`. The message names file, record or line, column and what was expected.
pub fn scan(config: &Data, take: &mut dyn FnMut(Result<Entry, Skipped>) -> Result<bool>) -> Result<()> {
    let room = config.max_rows.unwrap_or(usize::MAX);
    let mut used = 0;
    stream::sources::open(config)?.stream(&mut |place, record| match record {
        Ok(record) => {
            used += 1;
            Ok(take(Ok(Entry { place, record }))? && used < room)
        }
        Err(fault) if config.on_bad_record == OnBadRecord::Skip => take(Err(Skipped { place, fault })),
        Err(fault) => Err(invalid!("{place}: {fault}")),
    })
}

/// The files that [`scan`] reads, and those of its folders and patterns that it does not.
///
/// # Errors
/// A path that is not there, or stands for no file that can be read.
pub fn input_files(config: &Data) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let sources = stream::sources::open(config)?;
    Ok((sources.files().cloned().collect(), sources.ignored().cloned().collect()))
}

/// Reads every record of [`scan`] into memory.
///
/// # Errors
/// As for [`scan`], and where no record can be used.
pub fn load(config: &Data) -> Result<Dataset> {
    let ignored = input_files(config)?.1;
    let mut dataset = Dataset { entries: Vec::new(), skipped: 0, first_skipped: None, ignored };
    scan(config, &mut |found| {
        match found {
            Ok(entry) => dataset.entries.push(entry),
            Err(skipped) => {
                dataset.skipped += 1;
                dataset.first_skipped.get_or_insert_with(|| skipped.to_string());
            }
        }
        Ok(true)
    })?;
    if dataset.entries.is_empty() {
        let first = dataset.first_skipped.unwrap_or_default();
        return Err(invalid!("[data] path: none of {} records can be used; the first: {first}", dataset.skipped));
    }
    Ok(dataset)
}
