//! The fields of a request's JSON body, taken one by one with their types and ranges. What is left is checked against the
//! fields that would change the result and are not supported; others are ignored, as vLLM ignores them. It does not depend on the
//! engine. Read `request.rs` beside it for the endpoints' fields.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::Mutex;

use serde_json::{Map, Value};

use super::fault::Fault;
use crate::error::printable;
use crate::warning;

/// Arrays and objects within each other, beyond which a body is refused: templates indent what is nested.
const DEEPEST: usize = 32;

/// The value with which an unsupported field changes nothing.
enum Neutral {
    Number(f64),
    Is(bool),
    /// An empty string, list or object.
    Empty,
    /// `{"type": "text"}` or `["text"]`.
    Text,
    /// Null alone.
    Nothing,
}

/// Fields that OpenAI or vLLM have, that would change the result, and that are not supported.
const UNSUPPORTED: &[(&str, Neutral)] = &[
    ("allowed_token_ids", Neutral::Empty),
    ("audio", Neutral::Nothing),
    ("bad_words", Neutral::Empty),
    ("chat_template", Neutral::Nothing),
    ("continue_final_message", Neutral::Is(false)),
    ("echo", Neutral::Is(false)),
    ("frequency_penalty", Neutral::Number(0.0)),
    ("function_call", Neutral::Nothing),
    ("functions", Neutral::Empty),
    ("guided_choice", Neutral::Empty),
    ("guided_grammar", Neutral::Nothing),
    ("guided_json", Neutral::Nothing),
    ("guided_regex", Neutral::Nothing),
    ("length_penalty", Neutral::Number(1.0)),
    ("logit_bias", Neutral::Empty),
    ("logits_processors", Neutral::Empty),
    ("min_p", Neutral::Number(0.0)),
    ("min_tokens", Neutral::Number(0.0)),
    ("modalities", Neutral::Text),
    ("prediction", Neutral::Nothing),
    ("presence_penalty", Neutral::Number(0.0)),
    ("prompt_embeds", Neutral::Nothing),
    ("prompt_logprobs", Neutral::Nothing),
    ("reasoning_effort", Neutral::Nothing),
    ("repetition_penalty", Neutral::Number(1.0)),
    ("response_format", Neutral::Text),
    ("spaces_between_special_tokens", Neutral::Is(true)),
    ("structured_outputs", Neutral::Empty),
    ("suffix", Neutral::Empty),
    ("truncate_prompt_tokens", Neutral::Nothing),
    ("typical_p", Neutral::Number(1.0)),
    ("use_beam_search", Neutral::Is(false)),
    ("verbosity", Neutral::Nothing),
    ("web_search_options", Neutral::Nothing),
];

/// Fields that say nothing about the result.
const INDIFFERENT: &[&str] = &[
    "cache_salt",
    "metadata",
    "parallel_tool_calls",
    "priority",
    "prompt_cache_key",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
];

impl Neutral {
    fn is(&self, value: &Value) -> bool {
        match self {
            Self::Number(neutral) => value.as_f64() == Some(*neutral),
            Self::Is(neutral) => value.as_bool() == Some(*neutral),
            Self::Empty => match value {
                Value::String(text) => text.is_empty(),
                Value::Array(list) => list.is_empty(),
                Value::Object(map) => map.is_empty(),
                _ => false,
            },
            Self::Text => {
                value["type"] == "text" || value.as_array().is_some_and(|list| list.len() == 1 && list[0] == "text")
            }
            Self::Nothing => false,
        }
    }

    fn remedy(&self) -> String {
        match self {
            Self::Number(neutral) => format!("leave it out or set it to {neutral}"),
            Self::Is(neutral) => format!("leave it out or set it to {neutral}"),
            Self::Text => "leave it out or ask for text".into(),
            Self::Empty | Self::Nothing => "leave it out".into(),
        }
    }
}

/// What a value is, for messages.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// The fields that nobody has taken yet; one that is null is absent.
#[derive(Debug)]
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// The fields of a body.
    ///
    /// # Errors
    /// 400 if it is no JSON object, or too deep.
    pub fn parse(body: &[u8]) -> Result<Self, Fault> {
        let value: Value = serde_json::from_slice(body).map_err(|error| {
            Fault::bad(format!("the body is not JSON: {error}; send an object with Content-Type: application/json"))
        })?;
        if depth(&value) > DEEPEST {
            return Err(Fault::bad(format!("the body is nested more than {DEEPEST} deep")));
        }
        match value {
            Value::Object(map) => Ok(Self::of(map)),
            other => Err(Fault::bad(format!("the body is {}; send an object", kind(&other)))),
        }
    }

    pub fn of(mut map: Map<String, Value>) -> Self {
        map.retain(|_, value| !value.is_null());
        Self(map)
    }

    /// A field of any type.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    /// Whether it is there and not taken.
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub fn text(&mut self, name: &str) -> Result<Option<String>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(Fault::field(name, format!("expected a string, found {}", kind(&other)))),
        }
    }

    pub fn flag(&mut self, name: &str, default: bool) -> Result<bool, Fault> {
        match self.take(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(other) => Err(Fault::field(name, format!("expected true or false, found {}", kind(&other)))),
        }
    }

    pub fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, Fault> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(Fault::field(name, format!("expected an object, found {}", kind(&other)))),
        }
    }

    /// A finite number within a range.
    pub fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, Fault> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(Fault::field(
                name,
                format!("expected a number from {} to {}, found {}", range.start(), range.end(), shown(&value)),
            )),
        }
    }

    /// A whole number within a range.
    pub fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, Fault> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_i64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(Fault::field(
                name,
                format!("expected a whole number from {} to {}, found {}", range.start(), range.end(), shown(&value)),
            )),
        }
    }

    /// Checks what nobody has taken.
    ///
    /// # Errors
    /// 400 for a field that would change the result and is not supported.
    pub fn end(self) -> Result<(), Fault> {
        static IGNORED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        for (name, value) in self.0 {
            if let Some((_, neutral)) = UNSUPPORTED.iter().find(|(unsupported, _)| *unsupported == name) {
                if !neutral.is(&value) {
                    return Err(Fault::field(&name, format!("is not supported by this server; {}", neutral.remedy())));
                }
                continue;
            }
            let mut ignored = IGNORED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            // A client that makes names up fills neither memory nor the terminal.
            if !INDIFFERENT.contains(&name.as_str()) && ignored.len() < 100 && ignored.insert(name.clone()) {
                warning!(
                    "serve: warning: the field {} of a request is not known and ignored",
                    printable(&format!("{name:?}"))
                );
            }
        }
        Ok(())
    }
}

/// A value in a message, shortened.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(body: &str) -> Result<(), String> {
        Fields::parse(body.as_bytes()).and_then(Fields::end).map_err(|fault| fault.message)
    }

    #[test]
    fn unsupported_fields_are_refused_unless_they_change_nothing() {
        for neutral in [
            r#"{"presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}, "modalities": ["text"]}"#,
            r#"{"min_p": 0.0, "min_tokens": 0, "repetition_penalty": 1.0, "echo": false, "suffix": "", "echo": null}"#,
            r#"{"user": "me", "something_new": 3}"#,
        ] {
            assert_eq!(end(neutral), Ok(()), "{neutral}");
        }
        for (body, said) in [
            (
                r#"{"presence_penalty": 0.5}"#,
                "presence_penalty: is not supported by this server; leave it out or set it to 0",
            ),
            (r#"{"logit_bias": {"5": 1}}"#, "logit_bias: is not supported by this server; leave it out"),
            (r#"{"response_format": {"type": "json_object"}}"#, "response_format: is not supported"),
            (r#"{"echo": true}"#, "set it to false"),
            ("[1]", "the body is a list; send an object"),
            ("{\"a\": ", "the body is not JSON"),
        ] {
            let found = end(body).unwrap_err();
            assert!(found.contains(said), "{body}: {found}");
        }
        let deep = format!("{{\"tools\": {}{}}}", "[".repeat(40), "]".repeat(40));
        assert!(end(&deep).unwrap_err().contains("nested more than 32 deep"));
        let deeper = format!("{{\"tools\": {}", "[".repeat(100_000));
        assert!(end(&deeper).unwrap_err().contains("not JSON"));
    }

    #[test]
    fn numbers_have_ranges_and_types() {
        let mut fields = Fields::parse(br#"{"a": 1.5, "b": "1", "c": -1, "d": 3, "e": true}"#).unwrap();
        assert_eq!(fields.number("a", 0.0..=2.0), Ok(Some(1.5)));
        let found = fields.number("b", 0.0..=2.0).unwrap_err();
        assert_eq!(
            (found.message.as_str(), found.param.as_deref()),
            ("b: expected a number from 0 to 2, found \"1\"", Some("b"))
        );
        assert!(fields.integer("c", 0..=5).unwrap_err().message.contains("from 0 to 5, found -1"));
        assert_eq!((fields.integer("d", 0..=5), fields.integer("d", 0..=5)), (Ok(Some(3)), Ok(None)));
        assert!(fields.text("e").unwrap_err().message.contains("expected a string, found a boolean"));
    }
}
