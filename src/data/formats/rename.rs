//! The file's names of columns and of turns' parts -> ours. Knows no format. Read formats.rs next.

use serde_json::Value;

use crate::config::{ColumnNames, Tags};
use crate::data::formats::{Object, Parsed};

/// The value at a column's name, or at a path into it: `question.full_text`, `answers.zh_cn.0.text`.
pub(crate) fn at<'v>(object: &'v Object, path: &str) -> Option<&'v Value> {
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

/// Moves each named column to our name for it. A column of ours that the file has beside it gives way.
///
/// # Errors
/// A named column is not there; but `system`, `history` and `query` may be absent from a record.
pub(crate) fn renamed(mut object: Object, names: &ColumnNames) -> Parsed<Object> {
    let mut found = Vec::new();
    for (ours, theirs) in names.pairs() {
        match at(&object, theirs) {
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

/// The keys of a turn's role and text.
pub(crate) fn turn_keys<'t>(turn: &Object, tags: &'t Tags) -> (&'t str, &'t str) {
    let (role, content) = if turn.contains_key("from") { ("from", "value") } else { ("role", "content") };
    (tags.role_tag.as_deref().unwrap_or(role), tags.content_tag.as_deref().unwrap_or(content))
}

/// Our name of a role: by the tags, or by the names the field uses.
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
