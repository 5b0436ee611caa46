//! Detection of a record's format from the names of its columns, for `[data] format = "auto"`.
//!
//! Only the transcripts of HH-RLHF are recognised by their text. This file does not depend on `files`. Read
//! `data/formats/columns.rs` next.

use serde_json::Value;

use crate::config::Format;
use crate::data::formats::transcript::is_transcript;
use crate::data::record::{Object, Parsed};

/// The format of an object by its columns.
///
/// # Errors
/// The columns are those of no known format.
pub(crate) fn detect(object: &Object) -> Parsed<Format> {
    let has = |key: &str| object.contains_key(key);
    let transcript = |key: &str| object.get(key).and_then(Value::as_str).is_some_and(is_transcript);
    Ok(if has("chosen") && has("rejected") {
        let implicit = !["prompt", "conversations", "messages", "instruction"].into_iter().any(has);
        match transcript("prompt") || (implicit && transcript("chosen") && transcript("rejected")) {
            true => Format::HhRlhf,
            false => Format::Preference,
        }
    } else if has("responses") {
        Format::Ranked
    } else if has("label") {
        Format::Unpaired
    } else if has("instruction") {
        let has_response = ["output", "response", "completion"].into_iter().any(has);
        if has_response { Format::Alpaca } else { Format::PromptOnly }
    } else if has("conversations") {
        Format::Sharegpt
    } else if has("prompt") {
        let has_response = ["completion", "response", "output"].into_iter().any(has);
        if has_response { Format::PromptCompletion } else { Format::PromptOnly }
    } else if has("messages") || has("text") {
        Format::LanguageModeling
    } else {
        let keys: Vec<&str> = object.keys().take(12).map(String::as_str).collect();
        return Err(format!(
            "the columns {keys:?} are of no known format; expected \"messages\", \"conversations\", \"text\", \"prompt\" \
             (with \"completion\", \"chosen\" and \"rejected\", or \"responses\"), or \"instruction\" and \"output\""
        ));
    })
}
