//! The columns of one JSON object -> a [`Record`], format by format.
//!
//! This file decides which column holds what; `dialogue.rs` parses the turns inside a column. It does not depend on
//! `files`. Read `data/formats/dialogue.rs` next.

use std::cell::RefCell;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::config::{Format, Tags};
use crate::data::formats::detect::detect;
use crate::data::formats::dialogue::{check_prompt, implicit_prompt, paired, ranked, starts_with_assistant, text_of};
use crate::data::formats::fault::{column_fault, kind_of};
use crate::data::formats::transcript::turns;
use crate::data::record::{Object, PairLabel, Parsed, Record, Remarked, Text};
use crate::error::counted;
use crate::tokenizer::chat_template::Message;

/// The columns of one record, under fourfold's names for them.
pub(crate) struct Columns<'a> {
    /// The columns and their values.
    object: &'a Object,
    /// The names of roles and of the keys of a turn.
    tags: &'a Tags,
    /// Whether transcripts stay verbatim instead of being split into turns.
    verbatim: bool,
    /// The names of the columns that were read.
    read: RefCell<Vec<&'a str>>,
}

const UNREAD: [&str; 2] = ["with a column ", " that is not read"];

/// The remark on a column that is not read.
pub(crate) fn unread(column: &str) -> String {
    format!("{}{column:?}{}", UNREAD[0], UNREAD[1])
}

/// Whether a remark is that of [`unread`] for any column.
pub(crate) fn is_unread(remark: &str) -> bool {
    remark.starts_with(UNREAD[0]) && remark.ends_with(UNREAD[1])
}

const MISSING: &str = " is missing (expected ";

/// Whether a fault is that of a column that is not there.
pub(crate) fn is_missing(fault: &str) -> bool {
    fault.contains(MISSING)
}

impl<'a> Columns<'a> {
    /// The columns of `object`.
    pub(crate) fn new(object: &'a Object, tags: &'a Tags, verbatim: bool) -> Self {
        Self { object, tags, verbatim, read: RefCell::default() }
    }

    /// The record, read as `format`, with what its dialogue's template gets from other columns, and a remark for each column
    /// that holds something and is not read.
    ///
    /// # Errors
    /// A column is missing or wrong.
    pub(crate) fn remarked(&self, format: Format) -> Parsed<Remarked> {
        let mut record = self.record(format)?;
        if let Record::Ranked { responses, label, .. } = &mut record
            && responses.len() == 2
        {
            *label = self.label()?;
        }
        if let Some(first) = record.first_turn_mut() {
            let variables = self.variables()?;
            if !variables.is_empty() {
                first.more_mut().variables = Arc::new(variables);
            }
        }
        let read = self.read.borrow();
        let is_unread = |(key, value): &(&String, &Value)| !value.is_null() && !read.contains(&key.as_str());
        let unread = self.object.iter().filter(is_unread).map(|(key, _)| unread(key));
        Ok((record, unread.collect()))
    }

    /// What a pair's columns `chosen_probability` and `margin` hold. Columns of these names that hold no number mean something
    /// else, and are reported as not read.
    ///
    /// # Errors
    /// A probability is not from 0 to 1, or a margin no f32.
    fn label(&self) -> Parsed<PairLabel> {
        let number = |key, default: f64| match self.object.get(key).and_then(Value::as_f64) {
            Some(value) => {
                self.get(key);
                value
            }
            None => default,
        };
        let (probability, margin) = (number("chosen_probability", 1.0), number("margin", 0.0));
        if !(0.0..=1.0).contains(&probability) {
            return Err(column_fault(
                "chosen_probability",
                format!("expected a number from 0 to 1, found {probability}"),
            ));
        }
        if !(margin as f32).is_finite() {
            return Err(column_fault("margin", format!("{margin} is too large")));
        }
        Ok(PairLabel::new(probability as f32, margin as f32))
    }

    /// The variables of the chat template that a record gives: `tools` and `documents`, and the entries of
    /// `chat_template_kwargs`, as in TRL. A text in `tools` is JSON, as in TRL and LLaMA-Factory.
    ///
    /// # Errors
    /// A column holds something else.
    fn variables(&self) -> Parsed<Map<String, Value>> {
        let mut variables = Map::new();
        let are_objects = |list: &[Value]| list.iter().all(Value::is_object);
        match self.get("tools") {
            None => {}
            Some(Value::Array(tools)) if are_objects(tools) => {
                variables.insert("tools".to_owned(), tools.clone().into());
            }
            Some(Value::String(text)) if text.trim().is_empty() => {}
            Some(Value::String(text)) => match serde_json::from_str(text) {
                Ok(Value::Array(tools)) if are_objects(&tools) => {
                    variables.insert("tools".to_owned(), tools.into());
                }
                _ => return Err(column_fault("tools", "expected JSON of a list of tools in the string")),
            },
            other => return Err(self.expected("tools", "a list of tools, each an object", other)),
        }
        // Columns of this name often hold something else, which is then reported as not read.
        if let Some(Value::Array(documents)) = self.object.get("documents")
            && are_objects(documents)
        {
            self.get("documents");
            variables.insert("documents".to_owned(), documents.clone().into());
        }
        match self.get("chat_template_kwargs") {
            None => {}
            Some(Value::Object(entries)) => {
                let taken = ["messages", "add_generation_prompt", "tools", "documents"];
                if let Some(key) = taken.into_iter().find(|key| entries.contains_key(*key)) {
                    return Err(column_fault("chat_template_kwargs", format!("has a key {key:?}, which the run sets")));
                }
                variables.extend(entries.iter().map(|(key, value)| (key.clone(), value.clone())));
            }
            other => return Err(self.expected("chat_template_kwargs", "an object", other)),
        }
        Ok(variables)
    }

    /// The fault of a record that has the columns of another format, which `format` would read all the same.
    pub(crate) fn foreign(&self, format: Format) -> Option<String> {
        let has = |key: &str| self.object.get(key).is_some_and(|value| !value.is_null());
        let lacks = |key, what| Some(self.expected(key, what, None)).filter(|_| !has(key));
        match format {
            // The instruction may be called `prompt` beside other columns of Alpaca's.
            Format::Alpaca if !["input", "output", "system", "history"].into_iter().any(has) => {
                lacks("instruction", "a string")
            }
            Format::PromptCompletion if has("instruction") => lacks("prompt", "a string or a list of messages"),
            Format::Sharegpt => lacks("conversations", "a list of messages"),
            _ => None,
        }
    }

    /// The record, read as `format`.
    fn record(&self, format: Format) -> Parsed<Record> {
        match format {
            Format::Auto => self.record(detect(self.object)?),
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
                // LLaMA-Factory's old ranking format: the better and the worse response in one list.
                if let Some(Value::Array(outputs)) = self.get("output") {
                    let text = |output| text_of(output, self.tags).map_err(|fault| column_fault("output", fault));
                    let outputs = outputs.iter().map(|output| Ok(("output", text(output)?)));
                    return ranked(prompt, outputs.collect::<Parsed<_>>()?);
                }
                let keys = ["output", "response", "completion"];
                let key = keys.into_iter().find(|key| self.get(key).is_some()).unwrap_or("output");
                let (prompt, mut responses) = paired(prompt, vec![(key, self.text(key)?)])?;
                Ok(Record::PromptCompletion { prompt, completion: responses.remove(0) })
            }
            Format::Preference => {
                let responses = vec![("chosen", self.text("chosen")?), ("rejected", self.text("rejected")?)];
                let whole = |text: &Text| matches!(text, Text::Dialogue(turns) if turns[0].role != "assistant");
                match self.prompt() {
                    // Conversations that include their prompt, beside a column that repeats it.
                    _ if responses.iter().all(|(_, response)| whole(response)) => implicit_prompt(responses),
                    Some(prompt) => ranked(prompt?, responses),
                    None => implicit_prompt(responses),
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
                    false => self.last_response()?,
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

    /// The value of a column, or None if the column is missing or null: tables write null for "absent".
    fn get(&self, key: &str) -> Option<&'a Value> {
        let (key, value) = self.object.get_key_value(key)?;
        self.read.borrow_mut().push(key);
        Some(value).filter(|value| !value.is_null())
    }

    /// The fault of a column that should hold `what`.
    fn expected(&self, key: &str, what: &str, found: Option<&Value>) -> String {
        match found.or(self.object.get(key)) {
            Some(value) => column_fault(key, format!("expected {what}, found {}", kind_of(value))),
            None => {
                let keys: Vec<&str> = self.object.keys().take(12).map(String::as_str).collect();
                format!("column {key:?}{MISSING}{what}); there are {keys:?}")
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
            Some(value) => text_of(value, self.tags).map_err(|fault| column_fault(key, fault)),
            None => Err(self.expected(key, "a string or a list of messages", None)),
        }
    }

    /// The turns of a conversation, with the `system` column in front if it is given.
    fn conversation(&self, key: &str) -> Parsed<Vec<Message>> {
        let mut turns = match self.text(key)? {
            Text::Dialogue(turns) => turns,
            Text::Verbatim(_) => return Err(column_fault(key, "expected a list of messages, found a string")),
        };
        match self.get("system") {
            Some(Value::String(system)) if system.is_empty() || turns[0].content == *system => {}
            Some(Value::String(_)) if turns[0].role == "system" => {
                return Err(column_fault("system", format!("{key:?} has a system turn of its own; keep one of them")));
            }
            Some(Value::String(system)) => turns.insert(0, Message::new("system", system.as_str())),
            None => {}
            other => return Err(self.expected("system", "a string", other)),
        }
        Ok(turns)
    }

    /// The prompt of an Alpaca record: system, history, instruction and input. The instruction may be called `prompt`.
    fn instruction(&self) -> Parsed<Text> {
        let named_prompt = self.get("instruction").is_none() && self.get("prompt").is_some();
        let mut question = self.string(if named_prompt { "prompt" } else { "instruction" })?.to_owned();
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
                            format!("round {} is not a [user, assistant] pair of strings", number + 1),
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

    /// The prompt, from the first column that holds one.
    fn prompt(&self) -> Option<Parsed<Text>> {
        let is_question = matches!(self.get("prompt"), Some(Value::String(_)));
        if is_question && ["input", "system", "history"].iter().any(|key| self.get(key).is_some()) {
            Some(self.instruction())
        } else if self.get("prompt").is_some() {
            Some(self.text("prompt"))
        } else if self.get("conversations").is_some() {
            Some(self.conversation("conversations").map(Text::Dialogue))
        } else if self.get("messages").is_some() {
            Some(self.conversation("messages").map(Text::Dialogue))
        } else {
            self.get("instruction").map(|_| self.instruction())
        }
    }

    /// A prompt and its response, each from the first column that holds one.
    fn prompt_completion(&self) -> Parsed<(Text, Text)> {
        let prompt =
            self.prompt().unwrap_or_else(|| Err(self.expected("prompt", "a string or a list of messages", None)))?;
        let keys = ["completion", "response", "output"];
        let key = keys.into_iter().find(|key| self.get(key).is_some()).unwrap_or("completion");
        let (prompt, mut responses) = paired(prompt, vec![(key, self.text(key)?)])?;
        Ok((prompt, responses.remove(0)))
    }

    /// A conversation split before its last turn, which must be the assistant's.
    fn last_response(&self) -> Parsed<(Text, Text)> {
        let key = if self.get("conversations").is_some() { "conversations" } else { "messages" };
        let mut turns = self.conversation(key)?;
        if let (Some(fault), 1) = (starts_with_assistant(&turns), turns.iter().filter(|t| t.role != "system").count()) {
            return Err(column_fault(key, fault));
        }
        let last = turns.pop().filter(|turn| turn.role == "assistant" && !turns.is_empty());
        let last = last.ok_or_else(|| column_fault(key, "expected a conversation that ends with an assistant turn"))?;
        let (prompt, mut responses) = paired(Text::Dialogue(turns), vec![(key, Text::Dialogue(vec![last]))])?;
        Ok((prompt, responses.remove(0)))
    }

    /// The ranking in `responses`, sorted by `scores` if they are given.
    fn ranked(&self) -> Parsed<Record> {
        let prompt =
            self.prompt().unwrap_or_else(|| Err(self.expected("prompt", "a string or a list of messages", None)))?;
        let Some(Value::Array(listed)) = self.get("responses") else {
            return Err(self.expected("responses", "a list of responses", None));
        };
        let mut responses = Vec::new();
        for (number, response) in listed.iter().enumerate() {
            let fault = |fault| column_fault("responses", format!("response {}: {fault}", number + 1));
            responses.push(("responses", text_of(response, self.tags).map_err(fault)?));
        }
        match self.get("scores") {
            None => {}
            Some(Value::Array(scores)) if scores.len() == responses.len() => {
                let scores: Option<Vec<f64>> = scores.iter().map(Value::as_f64).collect();
                let scores = scores.ok_or_else(|| column_fault("scores", "expected a list of numbers"))?;
                let mut order: Vec<usize> = (0..responses.len()).collect();
                order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
                if let Some(tie) = order.windows(2).find(|pair| scores[pair[0]] == scores[pair[1]]) {
                    let (a, b) = (tie[0] + 1, tie[1] + 1);
                    return Err(column_fault(
                        "scores",
                        format!("responses {a} and {b} have the same score, so neither is better"),
                    ));
                }
                responses = order.into_iter().map(|index| responses[index].clone()).collect();
            }
            Some(Value::Array(scores)) => {
                return Err(column_fault(
                    "scores",
                    format!("{} for {}", counted(scores.len(), "score"), counted(responses.len(), "response")),
                ));
            }
            other => return Err(self.expected("scores", "a list of numbers", other)),
        }
        ranked(prompt, responses)
    }

    /// A comparison of HH-RLHF transcripts, with or without a column for the prompt.
    fn hh_rlhf(&self) -> Parsed<Record> {
        let transcript = |key: &str| turns(self.string(key)?).map_err(|fault| column_fault(key, fault));
        if self.get("prompt").is_some() && self.verbatim {
            return ranked(
                self.text("prompt")?,
                vec![("chosen", self.text("chosen")?), ("rejected", self.text("rejected")?)],
            );
        }
        if self.get("prompt").is_some() {
            let mut prompt = transcript("prompt")?;
            // The prompt ends with the marker after which the response follows.
            if prompt.last().is_some_and(|turn| turn.role == "assistant" && turn.content.is_empty()) {
                prompt.pop();
            }
            let response = |key| Ok::<_, String>((key, Text::Verbatim(self.string(key)?.trim().to_owned())));
            return ranked(Text::Dialogue(prompt), vec![response("chosen")?, response("rejected")?]);
        }
        let responses = vec![
            ("chosen", Text::Dialogue(transcript("chosen")?)),
            ("rejected", Text::Dialogue(transcript("rejected")?)),
        ];
        implicit_prompt(responses)
    }
}
