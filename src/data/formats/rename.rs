//! Renames a file's columns, turn keys and roles to the names that fourfold uses (`[data.columns]`, `[data.tags]`).
//!
//! This file does not depend on the columns of any one format. Read `data/formats/columns.rs` next.

use serde_json::Value;

use crate::config::{ColumnNames, Tags};
use crate::data::record::{Object, Parsed};

/// The value of a column, or at a path into it: `question.full_text`, `answers.zh_cn.0.text`.
pub(crate) fn value_at<'v>(object: &'v Object, path: &str) -> Option<&'v Value> {
    if let Some(value) = object.get(path) {
        return Some(value);
    }
    let (column, rest) = path.split_once('.')?;
    let mut value = object.get(column)?;
    for step in rest.split('.') {
        value = match value {
            Value::Object(object) => object.get(step)?,
            Value::Array(list) => list.get(step.parse::<usize>().ok()?)?,
            _ => return None,
        };
    }
    Some(value)
}

/// Renames each column that `names` lists to fourfold's name. It replaces a column that already has that name.
///
/// # Errors
/// A listed column is missing; `system`, `history` and `query` may be missing from a record.
pub(crate) fn apply(mut object: Object, names: &ColumnNames) -> Parsed<Object> {
    let mut found = Vec::new();
    for (ours, theirs) in names.pairs() {
        match value_at(&object, theirs) {
            Some(value) => found.push((ours, theirs, value.clone())),
            None if matches!(ours, "system" | "history" | "input") => {}
            None => {
                let keys: Vec<&str> = object.keys().take(12).map(String::as_str).collect();
                return Err(format!("column {theirs:?} ([data.columns] {ours}) is missing; there are {keys:?}"));
            }
        }
    }
    for (_, theirs, _) in &found {
        object.shift_remove(*theirs);
    }
    for (ours, _, value) in found {
        object.insert(ours.to_owned(), value);
    }
    Ok(object)
}

/// The keys under which a turn holds its role and its text.
pub(crate) fn turn_keys<'t>(turn: &Object, tags: &'t Tags) -> (&'t str, &'t str) {
    let (role, content) = if turn.contains_key("from") { ("from", "value") } else { ("role", "content") };
    (tags.role_tag.as_deref().unwrap_or(role), tags.content_tag.as_deref().unwrap_or(content))
}

/// The role that a name stands for: by the tags, or by the usual names. None for an unknown name.
pub(crate) fn role(name: &str, tags: &Tags) -> Option<&'static str> {
    if let Some((_, ours)) = tags.roles().find(|(theirs, _)| *theirs == name) {
        return Some(ours);
    }
    Some(match name {
        "user" | "human" | "prompter" => "user",
        "assistant" | "gpt" | "bot" | "model" | "function_call" => "assistant",
        "system" | "developer" => "system",
        "tool" | "observation" | "function" | "ipython" => "tool",
        _ => return None,
    })
}
