//! What became of the records: how many, how many sequences, what was cut or dropped and why. Knows no tokenizer. Read
//! phases.rs for who fills it.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::config::OnBadRecord;
use crate::data::examples::compat;
use crate::data::{Place, Skipped};
use crate::invalid;

/// What became of the records.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Records given, those that could not be read among them.
    pub read: usize,
    /// Sequences made. More than `read - dropped` only where a long raw text was cut into blocks.
    pub kept: usize,
    /// Kept sequences that lost tokens.
    pub truncated: usize,
    /// Records not used, by reason.
    pub dropped: BTreeMap<String, usize>,
    /// Records of each file.
    pub sources: Vec<(String, usize)>,
    /// What was wrong with the first record dropped under `on_bad_record = "skip"`.
    pub first_bad: Option<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} records, {} sequences", self.read, self.kept)?;
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
        Ok(())
    }
}

/// What one record gives.
#[derive(Debug)]
pub enum Outcome<T> {
    /// Examples to train on; one, but for a long text that is cut to blocks.
    Keep {
        /// In the order of the text.
        examples: Vec<T>,
        /// Did they lose tokens to `truncation`?
        truncated: bool,
    },
    /// None, and why.
    Drop(String),
}

impl<T> Outcome<T> {
    pub(crate) fn keep(example: T, truncated: bool) -> Self {
        Self::Keep { examples: vec![example], truncated }
    }

    pub(crate) fn too_long(limit: &str, tokens: usize) -> Self {
        Self::Drop(format!("longer than {limit} = {tokens}"))
    }
}

impl<T> From<compat::Made<T>> for Outcome<T> {
    fn from(made: compat::Made<T>) -> Self {
        match made {
            Ok((example, truncated)) => Self::keep(example, truncated),
            Err(reason) => Self::Drop(reason),
        }
    }
}

impl Report {
    /// Counts a record and hands its examples on.
    ///
    /// # Errors
    /// The record is bad and `on_bad_record = "error"`.
    pub(crate) fn take<T>(
        &mut self,
        place: &Place,
        made: Result<Outcome<T>>,
        on_bad_record: OnBadRecord,
    ) -> Result<Vec<T>> {
        self.count(place);
        let reason = match made {
            Ok(Outcome::Keep { examples, truncated }) => {
                self.truncated += usize::from(truncated);
                self.kept += examples.len();
                return Ok(examples);
            }
            Ok(Outcome::Drop(reason)) => reason,
            Err(error) if on_bad_record == OnBadRecord::Error => return Err(invalid!("{place}: {error:#}")),
            Err(error) => {
                self.first_bad.get_or_insert_with(|| format!("{place}: {error:#}"));
                "bad".to_owned()
            }
        };
        *self.dropped.entry(reason).or_default() += 1;
        Ok(vec![])
    }

    fn count(&mut self, place: &Place) {
        self.read += 1;
        let file = place.file.to_string_lossy();
        match self.sources.iter_mut().rev().find(|(name, _)| *name == file) {
            Some((_, records)) => *records += 1,
            None => self.sources.push((file.into_owned(), 1)),
        }
    }

    /// Counts a record that could not be read.
    pub(crate) fn skip(&mut self, skipped: &Skipped) {
        self.count(&skipped.place);
        self.first_bad.get_or_insert_with(|| skipped.to_string());
        *self.dropped.entry("bad".to_owned()).or_default() += 1;
    }

    /// Refuses to go on with nothing.
    pub(crate) fn check(&self) -> Result<()> {
        match self.kept {
            0 if self.read > 0 => {
                Err(invalid!("[data] leaves no sequence: {self}; raise the limit, set truncation or use other data"))
            }
            _ => Ok(()),
        }
    }
}
