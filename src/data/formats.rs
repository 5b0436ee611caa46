//! One JSON object -> a [`Record`], by the columns the field uses: TRL's dataset types, Alpaca, ShareGPT with
//! LLaMA-Factory's ranking, OpenAI messages, HH-RLHF transcripts. Knows no file and no tokenizer; a fault is a sentence
//! about a column, and mod.rs puts the place in front. Read render.rs next.

use serde_json::{Map, Value};

use super::Message;
use super::read::Found;
use super::transcript::{common_text, common_turns, is_transcript, turns};
use crate::config::Format;

/// A text as given, or a dialogue that a template will make a text of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    /// Used as it is, unless `[data] template` asks for turns.
    Verbatim(String),
    /// Turns, never empty.
    Dialogue(Vec<Message>),
}

/// What a record offers to train on.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A text, or a conversation whose assistant turns are all to be learnt.
    LanguageModeling(Text),
    /// A prompt and one answer to learn.
    PromptCompletion {
        /// Ends with the user's turn where it is a dialogue.
        prompt: Text,
        /// A dialogue exactly where `prompt` is one.
        completion: Text,
    },
    /// A prompt and two or more different answers, best first; a preference is two.
    Ranked {
        /// Ends with the user's turn where it is a dialogue.
        prompt: Text,
        /// Dialogues exactly where `prompt` is one.
        answers: Vec<Text>,
    },
    /// A prompt and an answer that was judged good or bad.
    Unpaired {
        /// Ends with the user's turn where it is a dialogue.
        prompt: Text,
        /// A dialogue exactly where `prompt` is one.
        completion: Text,
        /// True = good.
        label: bool,
    },
    /// A prompt alone.
    PromptOnly(Text),
}

impl Record {
    /// What the record is called in messages: TRL's name of the type.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::LanguageModeling(_) => "language_modeling",
            Self::PromptCompletion { .. } => "prompt_completion",
            Self::Ranked { answers, .. } if answers.len() == 2 => "preference",
            Self::Ranked { .. } => "ranked",
            Self::Unpaired { .. } => "unpaired",
            Self::PromptOnly(_) => "prompt_only",
        }
    }
}

type Parsed<T> = Result<T, String>;
type Object = Map<String, Value>;

/// Reads the records of one file; under `auto` the first one decides the format of all.
pub(super) struct Parser {
    format: Format,
}

impl Parser {
    pub(super) fn new(format: Format) -> Self {
        Self { format }
    }

    pub(super) fn record(&mut self, found: Found) -> Parsed<Record> {
        let object = match found {
            Found::Line(text) => return Ok(Record::LanguageModeling(Text::Verbatim(text))),
            Found::Json(Value::Object(object)) => object,
            Found::Json(other) => {
                return Err(format!("expected a JSON object with columns, found {}", kind_of(&other)));
            }
        };
        if self.format == Format::Auto {
            self.format = detect(&object)?;
        }
        Columns(&object).record(self.format)
    }
}

fn detect(object: &Object) -> Parsed<Format> {
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
        if has("output") { Format::Alpaca } else { Format::PromptOnly }
    } else if has("conversations") {
        Format::Sharegpt
    } else if has("prompt") {
        if has("completion") || has("response") { Format::PromptCompletion } else { Format::PromptOnly }
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

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn column_fault(key: &str, fault: impl std::fmt::Display) -> String {
    format!("column {key:?}: {fault}")
}

/// The columns of one record.
struct Columns<'a>(&'a Object);

impl<'a> Columns<'a> {
    fn record(&self, format: Format) -> Parsed<Record> {
        match format {
            Format::Auto => self.record(detect(self.0)?),
            Format::LanguageModeling => match self.get("messages") {
                Some(_) => Ok(Record::LanguageModeling(Text::Dialogue(self.conversation("messages")?))),
                None => self.string("text").and_then(|text| match text.trim().is_empty() {
                    true => Err(column_fault("text", "is empty")),
                    false => Ok(Record::LanguageModeling(Text::Verbatim(text.to_owned()))),
                }),
            },
            Format::Sharegpt if self.get("chosen").is_some() => self.record(Format::Preference),
            Format::Sharegpt => Ok(Record::LanguageModeling(Text::Dialogue(self.conversation("conversations")?))),
            Format::PromptCompletion => {
                self.prompt_completion().map(|(prompt, completion)| Record::PromptCompletion { prompt, completion })
            }
            Format::Alpaca => {
                let prompt = self.instruction()?;
                let (prompt, mut answers) = paired(prompt, vec![("output", self.text("output")?)])?;
                Ok(Record::PromptCompletion { prompt, completion: answers.remove(0) })
            }
            Format::Preference => {
                let answers = vec![("chosen", self.text("chosen")?), ("rejected", self.text("rejected")?)];
                match self.prompt() {
                    Some(prompt) => ranked(prompt?, answers),
                    None => implicit_prompt(answers),
                }
            }
            Format::Ranked => self.ranked(),
            Format::Unpaired => {
                let label = match self.get("label") {
                    Some(Value::Bool(label)) => *label,
                    other => return Err(self.expected("label", "true or false", other)),
                };
                let (prompt, completion) = match ["completion", "response"].iter().any(|key| self.get(key).is_some()) {
                    true => self.prompt_completion()?,
                    false => self.last_answer()?,
                };
                Ok(Record::Unpaired { prompt, completion, label })
            }
            Format::PromptOnly => {
                let prompt = self
                    .prompt()
                    .unwrap_or_else(|| Err(self.expected("prompt", "a string or a list of messages", None)))?;
                check_prompt(&prompt)?;
                Ok(Record::PromptOnly(prompt))
            }
            Format::HhRlhf => self.hh_rlhf(),
        }
    }

    /// A column that is there and not null: tables write null for "absent".
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn expected(&self, key: &str, what: &str, found: Option<&Value>) -> String {
        match found.or(self.0.get(key)) {
            Some(value) => column_fault(key, format!("expected {what}, found {}", kind_of(value))),
            None => {
                let keys: Vec<&str> = self.0.keys().take(12).map(String::as_str).collect();
                format!("column {key:?} is missing (expected {what}); there are {keys:?}")
            }
        }
    }

    fn string(&self, key: &str) -> Parsed<&'a str> {
        match self.get(key) {
            Some(Value::String(text)) => Ok(text),
            other => Err(self.expected(key, "a string", other)),
        }
    }

    fn text(&self, key: &str) -> Parsed<Text> {
        match self.get(key) {
            Some(value) => text_of(value).map_err(|fault| column_fault(key, fault)),
            None => Err(self.expected(key, "a string or a list of messages", None)),
        }
    }

    /// A list of turns, with the `system` column in front where there is one.
    fn conversation(&self, key: &str) -> Parsed<Vec<Message>> {
        let mut turns = match self.text(key)? {
            Text::Dialogue(turns) => turns,
            Text::Verbatim(_) => return Err(column_fault(key, "expected a list of messages, found a string")),
        };
        match self.get("system") {
            Some(Value::String(system)) if !system.is_empty() && turns[0].role != "system" => {
                turns.insert(0, Message::new("system", system.as_str()));
            }
            _ => {}
        }
        Ok(turns)
    }

    /// Alpaca's columns before the output.
    fn instruction(&self) -> Parsed<Text> {
        let mut question = self.string("instruction")?.to_owned();
        match self.get("input") {
            Some(Value::String(input)) if !input.is_empty() => question = format!("{question}\n{input}"),
            None | Some(Value::String(_)) => {}
            other => return Err(self.expected("input", "a string", other)),
        }
        let mut dialogue = Vec::new();
        match self.get("system") {
            Some(Value::String(system)) if !system.is_empty() => dialogue.push(Message::new("system", system.as_str())),
            None | Some(Value::String(_)) => {}
            other => return Err(self.expected("system", "a string", other)),
        }
        match self.get("history") {
            None => {}
            Some(Value::Array(rounds)) => {
                for (number, round) in rounds.iter().enumerate() {
                    let pair = round.as_array().map(Vec::as_slice);
                    let Some([Value::String(user), Value::String(assistant)]) = pair else {
                        return Err(column_fault(
                            "history",
                            format!("round {} is no [user, assistant] pair of strings", number + 1),
                        ));
                    };
                    dialogue.push(Message::new("user", user.as_str()));
                    dialogue.push(Message::new("assistant", assistant.as_str()));
                }
            }
            other => return Err(self.expected("history", "a list of [user, assistant] pairs", other)),
        }
        dialogue.push(Message::new("user", question));
        Ok(Text::Dialogue(dialogue))
    }

    /// The prompt from whichever column holds one.
    fn prompt(&self) -> Option<Parsed<Text>> {
        if self.get("prompt").is_some() {
            Some(self.text("prompt"))
        } else if self.get("conversations").is_some() {
            Some(self.conversation("conversations").map(Text::Dialogue))
        } else if self.get("messages").is_some() {
            Some(self.conversation("messages").map(Text::Dialogue))
        } else {
            self.get("instruction").map(|_| self.instruction())
        }
    }

    fn prompt_completion(&self) -> Parsed<(Text, Text)> {
        let prompt =
            self.prompt().unwrap_or_else(|| Err(self.expected("prompt", "a string or a list of messages", None)))?;
        let key =
            if self.get("completion").is_none() && self.get("response").is_some() { "response" } else { "completion" };
        let (prompt, mut answers) = paired(prompt, vec![(key, self.text(key)?)])?;
        Ok((prompt, answers.remove(0)))
    }

    /// A conversation cut before its last turn, which must be the assistant's.
    fn last_answer(&self) -> Parsed<(Text, Text)> {
        let key = if self.get("conversations").is_some() { "conversations" } else { "messages" };
        let mut turns = self.conversation(key)?;
        let last = turns.pop().filter(|turn| turn.role == "assistant" && !turns.is_empty());
        let last = last.ok_or_else(|| column_fault(key, "expected a conversation that ends with an assistant turn"))?;
        let (prompt, mut answers) = paired(Text::Dialogue(turns), vec![(key, Text::Dialogue(vec![last]))])?;
        Ok((prompt, answers.remove(0)))
    }

    fn ranked(&self) -> Parsed<Record> {
        let prompt =
            self.prompt().unwrap_or_else(|| Err(self.expected("prompt", "a string or a list of messages", None)))?;
        let Some(Value::Array(responses)) = self.get("responses") else {
            return Err(self.expected("responses", "a list of answers", None));
        };
        let mut answers = Vec::new();
        for (number, response) in responses.iter().enumerate() {
            let fault = |fault| column_fault("responses", format!("answer {}: {fault}", number + 1));
            answers.push(("responses", text_of(response).map_err(fault)?));
        }
        match self.get("scores") {
            None => {}
            Some(Value::Array(scores)) if scores.len() == answers.len() => {
                let scores: Option<Vec<f64>> = scores.iter().map(Value::as_f64).collect();
                let scores = scores.ok_or_else(|| column_fault("scores", "expected a list of numbers"))?;
                let mut order: Vec<usize> = (0..answers.len()).collect();
                order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
                if let Some(tie) = order.windows(2).find(|pair| scores[pair[0]] == scores[pair[1]]) {
                    let (a, b) = (tie[0] + 1, tie[1] + 1);
                    return Err(column_fault(
                        "scores",
                        format!("answers {a} and {b} have the same score, so neither is better"),
                    ));
                }
                answers = order.into_iter().map(|index| answers[index].clone()).collect();
            }
            Some(Value::Array(scores)) => {
                return Err(column_fault("scores", format!("{} scores for {} responses", scores.len(), answers.len())));
            }
            other => return Err(self.expected("scores", "a list of numbers", other)),
        }
        ranked(prompt, answers)
    }

    fn hh_rlhf(&self) -> Parsed<Record> {
        let transcript = |key: &str| turns(self.string(key)?).map_err(|fault| column_fault(key, fault));
        if self.get("prompt").is_some() {
            let mut prompt = transcript("prompt")?;
            // The prompt ends with the marker under which the answer stands.
            if prompt.last().is_some_and(|turn| turn.role == "assistant" && turn.content.is_empty()) {
                prompt.pop();
            }
            let answer = |key| Ok::<_, String>((key, Text::Verbatim(self.string(key)?.trim().to_owned())));
            return ranked(Text::Dialogue(prompt), vec![answer("chosen")?, answer("rejected")?]);
        }
        let answers = vec![
            ("chosen", Text::Dialogue(transcript("chosen")?)),
            ("rejected", Text::Dialogue(transcript("rejected")?)),
        ];
        implicit_prompt(answers)
    }
}

/// A string, a list of turns, or one turn.
fn text_of(value: &Value) -> Parsed<Text> {
    match value {
        Value::String(text) => Ok(Text::Verbatim(text.clone())),
        Value::Object(turn) => Ok(Text::Dialogue(vec![message_of(turn)?])),
        Value::Array(list) if list.is_empty() => Err("the list of messages is empty".to_owned()),
        Value::Array(list) => {
            let mut dialogue = Vec::with_capacity(list.len());
            for (number, turn) in list.iter().enumerate() {
                let parsed = match turn {
                    Value::Object(turn) => message_of(turn),
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

/// `{role, content}`, or ShareGPT's `{from, value}` with its names of the roles.
fn message_of(turn: &Object) -> Parsed<Message> {
    let (role_key, content_key) = if turn.contains_key("from") { ("from", "value") } else { ("role", "content") };
    let role = match turn.get(role_key) {
        Some(Value::String(role)) => match role.as_str() {
            "user" | "human" => "user",
            "assistant" | "gpt" => "assistant",
            "system" => "system",
            "tool" | "observation" => "tool",
            other => {
                return Err(format!(
                    "{role_key:?} is {other:?}; expected system, user (human), assistant (gpt) or tool"
                ));
            }
        },
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

fn check_prompt(prompt: &Text) -> Parsed<()> {
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
fn paired(prompt: Text, answers: Vec<(&str, Text)>) -> Parsed<(Text, Vec<Text>)> {
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

fn ranked(prompt: Text, answers: Vec<(&str, Text)>) -> Parsed<Record> {
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
fn implicit_prompt(answers: Vec<(&'static str, Text)>) -> Parsed<Record> {
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
