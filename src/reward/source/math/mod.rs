//! Rewards for mathematics: 1 if the response's final answer equals the one in a column of its record, else 0. Exact rules
//! decide, without a computer algebra system: numbers are compared as rationals, lists item by item, all else as text. It does
//! not depend on bases or adapters. Read `extract.rs` for which part of a response is its answer, `value.rs` for what is equal.

mod extract;
mod number;
mod value;

use std::collections::HashMap;

use anyhow::{Result, ensure};
use serde_json::Value as Json;

use self::extract::final_answer;
use self::value::Value;
use super::{RewardInputs, RewardSource};
use crate::data::stream::columns::{Columns, RecordColumns};
use crate::invalid;

/// The column that is compared with, unless the config names another.
pub const COLUMN: &str = crate::config::ANSWER;

/// Whether the final answer of `response` equals that of `reference`. A reference without a mark (`\boxed`, `####`) is the
/// answer as a whole.
pub fn is_right(response: &str, reference: &str) -> bool {
    answered(response, &Value::of(extract::reference(reference)))
}

fn answered(response: &str, reference: &Value) -> bool {
    final_answer(response).is_some_and(|answer| Value::of(answer).equals(reference))
}

/// Compares final answers with those of the records.
#[derive(Clone, Debug)]
pub struct MathReward {
    /// The right answer of each record, by its number among all usable records.
    answers: HashMap<usize, Value>,
}

impl MathReward {
    /// Reads `column` of every record.
    ///
    /// # Errors
    /// If a record has no such column, or something else than a text or a number in it.
    pub fn new(columns: &Columns, column: &str) -> Result<Self> {
        let mut entries: Vec<_> = columns.iter().collect();
        entries.sort_by_key(|(entry, _)| **entry);
        let answer = |(entry, record): (&usize, &RecordColumns)| {
            let found = match record.columns.get(column) {
                Some(Json::String(text)) if !text.trim().is_empty() => text.clone(),
                Some(Json::Number(number)) => number.to_string(),
                other => {
                    let names: Vec<String> = record.columns.keys().map(|name| format!("{name:?}")).collect();
                    let holds = match other {
                        None => "has no such column".to_owned(),
                        Some(value) => format!("holds {value} there"),
                    };
                    return Err(invalid!(
                        "a reward of kind = \"math\" compares with the text or number in a record's column {column:?}, and record \
                         {} {holds}; its columns are {}: set column = \"…\" to the one with the right answer",
                        record.id,
                        names.join(", ")
                    ));
                }
            };
            Ok((*entry, Value::of(extract::reference(&found))))
        };
        Ok(Self { answers: entries.into_iter().map(answer).collect::<Result<_>>()? })
    }
}

impl RewardSource for MathReward {
    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        let score = |(i, response)| {
            let reference = inputs.entries.get(i).and_then(|entry| self.answers.get(entry));
            ensure!(
                reference.is_some(),
                invalid!(
                    "a reward of kind = \"math\" has no right answer for a prompt: its record is unknown; records must be JSON, CSV \
                     or Parquet"
                )
            );
            let text = inputs.text(response);
            Ok(f32::from(u8::from(reference.is_some_and(|reference| answered(&text, reference)))))
        };
        inputs.responses.iter().enumerate().map(score).collect()
    }
}

#[cfg(test)]
mod tests;
