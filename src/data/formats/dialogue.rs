//! JSON values -> turns, and the rules for a prompt and its responses.
//!
//! A prompt ends where a response can follow, a response is not empty, and compared responses differ. This file does
//! not depend on the columns of any one format. Read `data/formats/transcript.rs` next.

use serde_json::{Value, json};

use crate::config::Tags;
use crate::data::formats::fault::{column_fault, kind_of};
use crate::data::formats::rename::{role, turn_keys};
use crate::data::formats::transcript::{common_text, common_turns};
use crate::data::record::{Object, PairLabel, Parsed, Record, Text};
use crate::tokenizer::chat_template::{Content, Message, More};

/// A text from a string, or a dialogue from a list of turns or from one turn.
///
/// # Errors
/// Any other value; a turn that is empty or not of a known form, or has a weight other than 0 and 1; a system turn that is not the
/// first.
pub(crate) fn text_of(value: &Value, tags: &Tags) -> Parsed<Text> {
    match value {
        Value::String(text) => Ok(Text::Verbatim(text.clone())),
        Value::Object(turn) => Ok(Text::Dialogue(vec![message_of(turn, tags)?])),
        Value::Array(list) if list.is_empty() => Err("the list of messages is empty".to_owned()),
        Value::Array(list) => {
            let mut dialogue = Vec::with_capacity(list.len());
            for (number, turn) in list.iter().enumerate() {
                let parsed = match turn {
                    Value::Object(turn) => message_of(turn, tags),
                    other => Err(format!("expected an object with \"role\" and \"content\", found {}", kind_of(other))),
                };
                let parsed: Message = parsed.map_err(|fault| format!("turn {}: {fault}", number + 1))?;
                if parsed.role == "system" && number > 0 {
                    return Err(format!("turn {}: a system turn must be the first", number + 1));
                }
                dialogue.push(parsed);
            }
            Ok(Text::Dialogue(dialogue))
        }
        other => Err(format!("expected a string or a list of messages, found {}", kind_of(other))),
    }
}

/// A turn from `{role, content}`, ShareGPT's `{from, value}`, or the keys that the tags name. Its other keys stay with it, for
/// the chat template; as in transformers, a key that is null is no key.
fn message_of(turn: &Object, tags: &Tags) -> Parsed<Message> {
    let (role_key, content_key) = turn_keys(turn, tags);
    let name = match turn.get(role_key) {
        Some(Value::String(name)) => name,
        other => {
            return Err(format!("expected {role_key:?} to be a string, found {}", other.map_or("nothing", kind_of)));
        }
    };
    let role = role(name, tags).ok_or_else(|| {
        format!(
            "{role_key:?} is {name:?}; expected system, user (human), assistant (gpt) or tool, or name it in [data.tags]"
        )
    })?;
    let others = turn.iter().filter(|(key, value)| *key != role_key && *key != content_key && !value.is_null());
    let mut more = More { keys: others.map(|(key, value)| (key.clone(), value.clone())).collect(), ..More::default() };
    more.learnt = match more.keys.get("weight") {
        None => true,
        Some(weight) => match weight.as_f64().or(weight.as_bool().map(f64::from)) {
            Some(weight) if weight == 0.0 || weight == 1.0 => weight == 1.0,
            _ => return Err(format!("\"weight\" is {weight}; expected 0 (the turn is not learnt) or 1")),
        },
    };
    let speaks = role == "assistant" && ["tool_calls", "function_call"].iter().any(|key| more.keys.contains_key(*key));
    let content = match turn.get(content_key) {
        None | Some(Value::Null) if speaks => {
            more.content = Content::Missing;
            String::new()
        }
        Some(Value::String(text)) => text.clone(),
        // OpenAI's list of content parts; all of them must be texts.
        Some(Value::Array(parts)) => {
            let texts: Option<Vec<&str>> = parts.iter().map(|part| part.get("text").and_then(Value::as_str)).collect();
            texts.ok_or_else(|| format!("{content_key:?} has a part that is not text"))?.concat()
        }
        other => {
            return Err(format!("expected {content_key:?} to be a string, found {}", other.map_or("nothing", kind_of)));
        }
    };
    if content.trim().is_empty() && !speaks && !matches!(role, "system" | "tool") {
        return Err(format!("the {role} turn is empty"));
    }
    if let Some(calls) = (name == "function_call").then(|| tool_calls_of(&content)).flatten() {
        more.keys.insert("tool_calls".to_owned(), calls);
        more.content = Content::CallAsText;
    }
    let mut message = Message::new(role, content);
    if more != More::default() {
        message.more = Some(Box::new(more));
    }
    Ok(message)
}

/// The tool calls that a `function_call` turn of ShareGPT holds as JSON: `{"name": ..., "arguments": ...}`, or a list of them.
fn tool_calls_of(text: &str) -> Option<Value> {
    let calls = match serde_json::from_str(text).ok()? {
        Value::Array(calls) => calls,
        call => vec![call],
    };
    let is_call = |call: &Value| call["name"].is_string() && call.get("arguments").is_some();
    let wrapped = |call: Value| json!({"type": "function", "function": call});
    (!calls.is_empty() && calls.iter().all(is_call)).then(|| calls.into_iter().map(wrapped).collect())
}

/// Checks that a prompt is not empty and that a response can follow it.
///
/// # Errors
/// An empty text; a dialogue that does not end with a user or tool turn.
pub(crate) fn check_prompt(prompt: &Text) -> Parsed<()> {
    match prompt {
        Text::Verbatim(text) if text.trim().is_empty() => Err("the prompt is empty".to_owned()),
        Text::Verbatim(_) => Ok(()),
        Text::Dialogue(turns) => match turns.last().map(|turn| turn.role.as_str()) {
            Some("user" | "tool") => Ok(()),
            last => Err(format!(
                "the prompt must end with a user turn, for the response to follow; it ends with {} turn",
                last.map_or("no".to_owned(), |role| format!("a {role}"))
            )),
        },
    }
}

/// Brings prompt and responses to one form: where either is a dialogue, the other becomes a turn of it.
///
/// # Errors
/// A prompt that [`check_prompt`] rejects; an empty response; a response that does not begin and end with the assistant.
pub(crate) fn paired(prompt: Text, responses: Vec<(&str, Text)>) -> Parsed<(Text, Vec<Text>)> {
    check_prompt(&prompt)?;
    let as_dialogue =
        matches!(prompt, Text::Dialogue(_)) || responses.iter().any(|(_, r)| matches!(r, Text::Dialogue(_)));
    let prompt = match prompt {
        Text::Verbatim(text) if as_dialogue => Text::Dialogue(vec![Message::new("user", text)]),
        other => other,
    };
    let mut texts = Vec::with_capacity(responses.len());
    for (key, response) in responses {
        texts.push(match response {
            Text::Verbatim(text) if text.trim().is_empty() => return Err(column_fault(key, "the response is empty")),
            Text::Verbatim(text) if as_dialogue => Text::Dialogue(vec![Message::new("assistant", text)]),
            Text::Dialogue(turns)
                if [turns.first(), turns.last()].iter().any(|turn| turn.is_none_or(|t| t.role != "assistant")) =>
            {
                return Err(column_fault(key, "the response must begin and end with an assistant turn"));
            }
            other => other,
        });
    }
    Ok((prompt, texts))
}

/// A ranking of a prompt's responses, best first; each comes with the column that it is from.
///
/// # Errors
/// Those of [`paired`]; fewer than two responses, or two that are equal.
pub(crate) fn ranked(prompt: Text, responses: Vec<(&str, Text)>) -> Parsed<Record> {
    let (prompt, responses) = paired(prompt, responses)?;
    if responses.len() < 2 {
        return Err(column_fault(
            "responses",
            format!("{} response cannot be compared; expected two or more", responses.len()),
        ));
    }
    for (later, response) in responses.iter().enumerate() {
        if let Some(first) = responses[..later].iter().position(|other| other == response) {
            return Err(match responses.len() {
                2 => "the chosen and the rejected response are identical, so neither is better".to_owned(),
                _ => format!("responses {} and {} of the ranking are identical", first + 1, later + 1),
            });
        }
    }
    Ok(Record::Ranked { prompt, responses, label: PairLabel::default() })
}

/// The fault of a dialogue that lacks a prompt because the assistant speaks first; `None` if it does not.
pub(crate) fn starts_with_assistant(turns: &[Message]) -> Option<String> {
    let first = turns.iter().find(|turn| turn.role != "system")?;
    (first.role == "assistant").then(|| {
        "the dialogue starts with an assistant turn, so there is no prompt that it responds to; put a user turn before it, or \
         leave that turn out"
            .to_owned()
    })
}

/// A ranking of two responses whose prompt is their common beginning.
///
/// # Errors
/// The two have no common beginning; those of [`ranked`].
pub(crate) fn implicit_prompt(responses: Vec<(&'static str, Text)>) -> Parsed<Record> {
    let keys: Vec<&str> = responses.iter().map(|(key, _)| *key).collect();
    let texts: Vec<Text> = responses.into_iter().map(|(_, text)| text).collect();
    if texts[0] == texts[1] {
        return Err("the chosen and the rejected response are identical, so neither is better".to_owned());
    }
    let missing = "is missing, and \"chosen\" and \"rejected\" have no common beginning to use as the prompt";
    match &texts[..] {
        [Text::Verbatim(chosen), Text::Verbatim(rejected)] => {
            let shared = common_text(chosen, rejected);
            if chosen[..shared].trim().is_empty() {
                return Err(format!("column \"prompt\" {missing}"));
            }
            let response = |text: &str| Text::Verbatim(text[shared..].to_owned());
            let responses = vec![(keys[0], response(chosen)), (keys[1], response(rejected))];
            ranked(Text::Verbatim(chosen[..shared].to_owned()), responses)
        }
        [Text::Dialogue(chosen), Text::Dialogue(rejected)] => {
            let (prompt, rest) = common_turns(vec![chosen.clone(), rejected.clone()]);
            if prompt.is_empty() {
                return Err(starts_with_assistant(chosen).unwrap_or_else(|| format!("column \"prompt\" {missing}")));
            }
            for (key, turns) in keys.iter().zip(&rest) {
                let is_empty = |turn: &Message| turn.content.is_empty() && turn.more.is_none();
                if turns.iter().any(is_empty) || turns.is_empty() {
                    return Err(column_fault(key, "the response is empty"));
                }
            }
            ranked(Text::Dialogue(prompt), keys.into_iter().zip(rest.into_iter().map(Text::Dialogue)).collect())
        }
        _ => Err("\"chosen\" and \"rejected\" must both be strings or both lists of messages".to_owned()),
    }
}
