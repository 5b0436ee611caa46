//! JSON values -> turns, and the rules a prompt and its answers obey: a prompt ends where an answer can follow, an answer
//! is not empty, compared answers differ. Knows no format. Read render.rs next.

use serde_json::Value;

use crate::config::Tags;
use crate::data::Message;
use crate::data::formats::rename::{role, turn_keys};
use crate::data::formats::transcript::{common_text, common_turns};
use crate::data::formats::{Object, Parsed, Record, Text};

pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

pub(crate) fn column_fault(key: &str, fault: impl std::fmt::Display) -> String {
    format!("column {key:?}: {fault}")
}

/// A string, a list of turns, or one turn.
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

/// `{role, content}`, ShareGPT's `{from, value}`, or as the tags say.
fn message_of(turn: &Object, tags: &Tags) -> Parsed<Message> {
    let (role_key, content_key) = turn_keys(turn, tags);
    let role = match turn.get(role_key) {
        Some(Value::String(name)) => role(name, tags).ok_or_else(|| {
            format!(
                "{role_key:?} is {name:?}; expected system, user (human), assistant (gpt) or tool, or name it in [data.tags]"
            )
        })?,
        other => {
            return Err(format!("expected {role_key:?} to be a string, found {}", other.map_or("nothing", kind_of)));
        }
    };
    let content = match turn.get(content_key) {
        Some(Value::String(text)) => text.clone(),
        // OpenAI's list of parts, of which a text model can use the texts.
        Some(Value::Array(parts)) => {
            let texts: Option<Vec<&str>> = parts.iter().map(|part| part.get("text").and_then(Value::as_str)).collect();
            texts.ok_or_else(|| format!("{content_key:?} has a part that is no text"))?.concat()
        }
        other => {
            return Err(format!("expected {content_key:?} to be a string, found {}", other.map_or("nothing", kind_of)));
        }
    };
    if role != "system" && content.trim().is_empty() {
        return Err(format!("the {role} turn is empty"));
    }
    Ok(Message::new(role, content))
}

pub(crate) fn check_prompt(prompt: &Text) -> Parsed<()> {
    match prompt {
        Text::Verbatim(text) if text.trim().is_empty() => Err("the prompt is empty".to_owned()),
        Text::Verbatim(_) => Ok(()),
        Text::Dialogue(turns) => match turns.last().map(|turn| turn.role.as_str()) {
            Some("user" | "tool") => Ok(()),
            last => Err(format!(
                "the prompt must end with a user turn, for the answer to follow; it ends with {} turn",
                last.map_or("no".to_owned(), |role| format!("a {role}"))
            )),
        },
    }
}

/// Brings prompt and answers to one form: where either is a dialogue, the other becomes a turn of it.
pub(crate) fn paired(prompt: Text, answers: Vec<(&str, Text)>) -> Parsed<(Text, Vec<Text>)> {
    check_prompt(&prompt)?;
    let as_dialogue =
        matches!(prompt, Text::Dialogue(_)) || answers.iter().any(|(_, a)| matches!(a, Text::Dialogue(_)));
    let prompt = match prompt {
        Text::Verbatim(text) if as_dialogue => Text::Dialogue(vec![Message::new("user", text)]),
        other => other,
    };
    let mut texts = Vec::with_capacity(answers.len());
    for (key, answer) in answers {
        texts.push(match answer {
            Text::Verbatim(text) if text.trim().is_empty() => return Err(column_fault(key, "the answer is empty")),
            Text::Verbatim(text) if as_dialogue => Text::Dialogue(vec![Message::new("assistant", text)]),
            Text::Dialogue(turns)
                if [turns.first(), turns.last()].iter().any(|turn| turn.is_none_or(|t| t.role != "assistant")) =>
            {
                return Err(column_fault(key, "the answer must begin and end with an assistant turn"));
            }
            other => other,
        });
    }
    Ok((prompt, texts))
}

pub(crate) fn ranked(prompt: Text, answers: Vec<(&str, Text)>) -> Parsed<Record> {
    let (prompt, answers) = paired(prompt, answers)?;
    if answers.len() < 2 {
        return Err(column_fault(
            "responses",
            format!("{} answer is no comparison; expected two or more", answers.len()),
        ));
    }
    for (later, answer) in answers.iter().enumerate() {
        if let Some(first) = answers[..later].iter().position(|other| other == answer) {
            return Err(match answers.len() {
                2 => "the chosen and the rejected answer are identical, so neither is better".to_owned(),
                _ => format!("answers {} and {} of the ranking are identical", first + 1, later + 1),
            });
        }
    }
    Ok(Record::Ranked { prompt, answers })
}

/// Finds the prompt in what the answers share.
pub(crate) fn implicit_prompt(answers: Vec<(&'static str, Text)>) -> Parsed<Record> {
    let keys: Vec<&str> = answers.iter().map(|(key, _)| *key).collect();
    let texts: Vec<Text> = answers.into_iter().map(|(_, text)| text).collect();
    if texts[0] == texts[1] {
        return Err("the chosen and the rejected answer are identical, so neither is better".to_owned());
    }
    let missing = "is missing, and \"chosen\" and \"rejected\" share no beginning that could be it";
    match &texts[..] {
        [Text::Verbatim(chosen), Text::Verbatim(rejected)] => {
            let shared = common_text(chosen, rejected);
            if chosen[..shared].trim().is_empty() {
                return Err(format!("column \"prompt\" {missing}"));
            }
            let answer = |text: &str| Text::Verbatim(text[shared..].to_owned());
            let answers = vec![(keys[0], answer(chosen)), (keys[1], answer(rejected))];
            ranked(Text::Verbatim(chosen[..shared].to_owned()), answers)
        }
        [Text::Dialogue(chosen), Text::Dialogue(rejected)] => {
            let (prompt, rest) = common_turns(vec![chosen.clone(), rejected.clone()]);
            if prompt.is_empty() {
                return Err(format!("column \"prompt\" {missing}"));
            }
            for (key, turns) in keys.iter().zip(&rest) {
                if turns.iter().any(|turn| turn.content.is_empty()) || turns.is_empty() {
                    return Err(column_fault(key, "the answer is empty"));
                }
            }
            ranked(Text::Dialogue(prompt), keys.into_iter().zip(rest.into_iter().map(Text::Dialogue)).collect())
        }
        _ => Err("\"chosen\" and \"rejected\" must both be strings or both lists of messages".to_owned()),
    }
}
