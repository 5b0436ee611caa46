//! All records of `[data]`, one at a time ([`scan`]) or in memory ([`load`]), with bad records skipped or reported.
//!
//! `max_rows` and `on_bad_record` take effect here. This file does not depend on the tokenizer. Read
//! `data/stream/pipeline.rs` next.

use std::path::PathBuf;

use anyhow::Result;

use crate::config::{Data, OnBadRecord};
use crate::data::record::{Entry, Skipped};
use crate::data::stream::sources;
use crate::invalid;

/// All records of `[data] path`.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// The usable records, in the order of the files.
    pub entries: Vec<Entry>,
    /// Number of records skipped under `on_bad_record = "skip"`.
    pub skipped: usize,
    /// The fault of the first skipped record.
    pub first_skipped: Option<String>,
    /// Files in the folders and patterns that are of no known type, or not of the requested split.
    pub ignored: Vec<PathBuf>,
}

/// Passes every record of `[data]`'s sources to `sink`, up to `max_rows`, in constant memory. `sink` gets a record, or
/// the place and the fault of one that `on_bad_record = "skip"` skips, and returns whether to read on.
///
/// # Errors
/// A file that cannot be read, is of an unknown type or has no records; a record that cannot be used, unless
/// `on_bad_record = "skip"`. The message names file, record or line, column and what was expected.
pub fn scan(config: &Data, sink: &mut dyn FnMut(Result<Entry, Skipped>) -> Result<bool>) -> Result<()> {
    let max_rows = config.max_rows.unwrap_or(usize::MAX);
    let mut used = 0;
    sources::open(config)?.stream(&mut |place, record| match record {
        Ok((record, remarks)) => {
            used += 1;
            Ok(sink(Ok(Entry { place, record, remarks }))? && used < max_rows)
        }
        Err(fault) if config.on_bad_record == OnBadRecord::Skip => sink(Err(Skipped { place, fault })),
        Err(fault) => Err(invalid!("{place}: {fault}")),
    })
}

/// The files that [`scan`] reads, and those in its folders and patterns that it does not.
///
/// # Errors
/// A path that does not exist, or has no file that can be read.
pub fn input_files(config: &Data) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let sources = sources::open(config)?;
    Ok((sources.files().cloned().collect(), sources.ignored().cloned().collect()))
}

/// Reads every record of [`scan`] into memory.
///
/// # Errors
/// Those of [`scan`]; no record can be used.
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
        return Err(match dataset.skipped {
            1 => invalid!("[data] path: its one record cannot be used: {first}"),
            skipped => invalid!("[data] path: none of {skipped} records can be used; the first: {first}"),
        });
    }
    Ok(dataset)
}
