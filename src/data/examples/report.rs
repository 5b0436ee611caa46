//! [`Report`]: counts of the records read, the sequences made, and those truncated or dropped, by reason.
//!
//! Nothing is dropped without being counted. This file does not depend on the tokenizer. `data/examples/objectives.rs`
//! and `data/stream/pipeline.rs` fill it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::config::{ColumnsRead, Data, OnBadRecord};
use crate::data::formats::columns::{is_unread, unread};
use crate::data::record::{Place, Skipped};
use crate::error::counted;
use crate::invalid;

/// Counts of what was made of the records.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Number of records read, including those that could not be used.
    pub read: usize,
    /// Number of sequences made. It exceeds `read - dropped` only where long raw texts were cut into blocks.
    pub kept: usize,
    /// Number of kept sequences that lost tokens to `truncation`.
    pub truncated: usize,
    /// Number of records not used, per reason.
    pub dropped: BTreeMap<String, usize>,
    /// Number of used records that something is to be said of, per remark.
    pub remarks: BTreeMap<String, usize>,
    /// Number of records per file.
    pub sources: Vec<(String, usize)>,
    /// The fault of the first record dropped under `on_bad_record = "skip"`.
    pub first_bad: Option<String>,
    /// Of the records dropped by a limit: key of the limit -> tokens that a record needs -> number of records.
    #[serde(default)]
    pub needed: BTreeMap<String, BTreeMap<usize, usize>>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", counted(self.read, "record"), counted(self.kept, "sequence"))?;
        if self.truncated > 0 {
            write!(f, " ({} truncated)", self.truncated)?;
        }
        let dropped: usize = self.dropped.values().sum();
        if dropped > 0 {
            let reasons: Vec<String> = self.dropped.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
            write!(f, "; {dropped} dropped: {}", reasons.join(", "))?;
        }
        if let Some(first) = &self.first_bad {
            write!(f, " (first: {first})")?;
        }
        for (remark, count) in &self.remarks {
            write!(f, "; {count} {remark}")?;
        }
        Ok(())
    }
}

/// The result of one record.
#[derive(Debug)]
pub enum Outcome<T> {
    /// Examples to train on: usually one; several for a preference under KTO or a long raw text that is cut into
    /// blocks.
    Keep {
        /// The examples, in the order of the record.
        examples: Vec<T>,
        /// Whether they lost tokens to `truncation`.
        truncated: bool,
        /// What is to be counted and reported of the record.
        remarks: BTreeSet<&'static str>,
    },
    /// No example, for this reason.
    Drop(String),
    /// No example, because the record needs more tokens than a limit allows.
    TooLong {
        /// Config key of the limit.
        limit: &'static str,
        /// Tokens that the record needs.
        needs: usize,
        /// The reason, as the report has it.
        reason: String,
    },
}

impl<T> Outcome<T> {
    /// One example.
    pub(crate) fn keep(example: T, truncated: bool) -> Self {
        Self::Keep { examples: vec![example], truncated, remarks: BTreeSet::new() }
    }

    /// No example, because the record needs more tokens than the config key `limit` allows, which is `most`.
    pub(crate) fn too_long(limit: &'static str, most: usize, needs: usize) -> Self {
        Self::TooLong { limit, needs, reason: format!("longer than {limit} = {most}") }
    }

    /// No example, because a response, with a prompt token before it, needs more than `max_length = most`.
    pub(crate) fn response_too_long(most: usize, needs: usize) -> Self {
        let reason = format!("with a response longer than max_length = {most}");
        Self::TooLong { limit: "max_length", needs, reason }
    }

    /// No example, because the prompt leaves no room for a response token below `max_length = most`.
    pub(crate) fn prompt_fills(most: usize, needs: usize) -> Self {
        Self::TooLong { limit: "max_length", needs, reason: format!("with a prompt that fills max_length = {most}") }
    }
}

impl Report {
    /// Counts a record and returns its examples.
    ///
    /// # Errors
    /// The record is bad and `on_bad_record = "error"`.
    pub(crate) fn add<T>(
        &mut self,
        place: &Place,
        outcome: Result<Outcome<T>>,
        on_bad_record: OnBadRecord,
    ) -> Result<Vec<T>> {
        self.count(place);
        let reason = match outcome {
            Ok(Outcome::Keep { examples, truncated, remarks }) => {
                for remark in remarks {
                    *self.remarks.entry(remark.to_owned()).or_default() += 1;
                }
                self.truncated += usize::from(truncated);
                self.kept += examples.len();
                return Ok(examples);
            }
            Ok(Outcome::Drop(reason)) => reason,
            Ok(Outcome::TooLong { limit, needs, reason }) => {
                *self.needed.entry(limit.to_owned()).or_default().entry(needs).or_default() += 1;
                reason
            }
            Err(error) if on_bad_record == OnBadRecord::Error => return Err(invalid!("{place}: {error:#}")),
            Err(error) => {
                self.first_bad.get_or_insert_with(|| format!("{place}: {error:#}"));
                "bad".to_owned()
            }
        };
        *self.dropped.entry(reason).or_default() += 1;
        Ok(vec![])
    }

    /// Takes back the remarks that a column of `data` is not read, for those that something else reads.
    pub(crate) fn without_unread(&mut self, read: &ColumnsRead, data: &Data) {
        let ColumnsRead::Named(names) = read else {
            self.remarks.retain(|remark, _| !is_unread(remark));
            return;
        };
        for name in names {
            self.remarks.remove(&unread(name));
            // A remark has the name that the column has here.
            for names in data.all_sources().iter().filter_map(|source| source.columns.as_ref()) {
                let ours = names.pairs().filter(|(_, theirs)| theirs == name).map(|(ours, _)| ours);
                for ours in ours {
                    self.remarks.remove(&unread(ours));
                }
            }
        }
    }

    /// Counts what is to be said of a used record.
    pub(crate) fn remark(&mut self, remarks: impl IntoIterator<Item = String>) {
        for remark in remarks {
            *self.remarks.entry(remark).or_default() += 1;
        }
    }

    /// Counts a record of a file.
    fn count(&mut self, place: &Place) {
        self.read += 1;
        let file = place.file.to_string_lossy();
        match self.sources.iter_mut().rev().find(|(name, _)| *name == file) {
            Some((_, records)) => *records += 1,
            None => self.sources.push((file.into_owned(), 1)),
        }
    }

    /// Counts a record that could not be used.
    pub(crate) fn skip(&mut self, skipped: &Skipped) {
        self.count(&skipped.place);
        self.first_bad.get_or_insert_with(|| skipped.to_string());
        *self.dropped.entry("bad".to_owned()).or_default() += 1;
    }

    /// Checks that there is a sequence.
    ///
    /// # Errors
    /// There were records, but no sequence was made.
    pub(crate) fn check(&self) -> Result<()> {
        match self.kept {
            0 if self.read > 0 => {
                Err(invalid!("[data] leaves no sequence: {self}; raise the limit, set truncation or use other data"))
            }
            _ => Ok(()),
        }
    }
}
