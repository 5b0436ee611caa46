//! Prompts of requests -> token ids: texts, ids, and dialogues through the model's chat template. It does not depend on the
//! engine. Read `tokenizer/chat_template.rs` for templates.

use std::sync::Arc;

use anyhow::Result;
use serde_json::{Map, Value};

use super::fault::Fault;
use super::request::token_ids;
use crate::config::Tags;
use crate::data;
use crate::data::formats::dialogue::text_of;
use crate::host::allocator::without_limits;
use crate::invalid;
use crate::run::Model;
use crate::tokenizer::SpecialTokens;
use crate::tokenizer::chat_template::{GenerationPrompt, Message};

/// A prompt as a request has it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Prompt {
    Text(String),
    Ids(Vec<u32>),
    Dialogue { messages: Vec<Message>, open: GenerationPrompt },
}

/// The prompts of a completion: a string, a list of strings, of token ids, or of lists of token ids.
///
/// # Errors
/// 400 for anything else.
pub(super) fn prompts(value: &Value) -> Result<Vec<Prompt>, Fault> {
    let fault = || {
        Fault::field(
            "prompt",
            "expected a string, a list of strings, a list of token ids or a list of such lists, not empty",
        )
    };
    match value {
        Value::String(text) => Ok(vec![Prompt::Text(text.clone())]),
        Value::Array(list) => match list.first() {
            Some(Value::Number(_)) => Ok(vec![Prompt::Ids(token_ids(value).ok_or_else(fault)?)]),
            Some(_) => list
                .iter()
                .map(|item| match item {
                    Value::String(text) => Ok(Prompt::Text(text.clone())),
                    ids => token_ids(ids).map(Prompt::Ids).ok_or_else(fault),
                })
                .collect(),
            None => Err(fault()),
        },
        _ => Err(fault()),
    }
}

/// The prompt of a chat: its messages, and the variables that its template gets beside them.
///
/// # Errors
/// 400 for what is no dialogue.
pub(super) fn dialogue(messages: &Value, variables: Map<String, Value>, open: bool) -> Result<Prompt, Fault> {
    let fault = |said: String| Fault::field("messages", said);
    if !messages.is_array() {
        return Err(fault("expected a list of {\"role\", \"content\"}".into()));
    }
    let mut messages = match text_of(messages, &Tags::default()).map_err(fault)? {
        data::Text::Dialogue(messages) => messages,
        data::Text::Verbatim(_) => return Err(fault("expected a list of {\"role\", \"content\"}".into())),
    };
    // OpenAI's arguments are JSON in a string; templates write objects.
    for more in messages.iter_mut().filter_map(|message| message.more.as_mut()) {
        let calls = more.keys.get_mut("tool_calls").and_then(Value::as_array_mut);
        for call in calls.into_iter().flatten() {
            let arguments = call.get_mut("function").and_then(|function| function.get_mut("arguments"));
            if let Some(arguments) = arguments
                && let Some(parsed) = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok())
            {
                *arguments = parsed;
            }
        }
    }
    if let Some(first) = messages.first_mut().filter(|_| !variables.is_empty()) {
        first.more_mut().variables = Arc::new(variables);
    }
    let open = if open { GenerationPrompt::Add } else { GenerationPrompt::None };
    Ok(Prompt::Dialogue { messages, open })
}

impl Prompt {
    /// Its token ids, as many as there are.
    ///
    /// # Errors
    /// If the template refuses the dialogue.
    pub fn encode(&self, model: &Model, add_special_tokens: bool) -> Result<Vec<u32>> {
        let tokenizer = model.checkpoint.tokenizer();
        let plain = |text: &str| -> Result<Vec<u32>> {
            let front = if add_special_tokens { tokenizer.front() } else { &[] };
            Ok([front, &tokenizer.encode(text, SpecialTokens::None)?].concat())
        };
        Ok(match self {
            Self::Text(text) => plain(text)?,
            Self::Ids(ids) => ids.clone(),
            Self::Dialogue { messages, open } if tokenizer.chat_template().is_some() => {
                // The limit would end the process; the sizes of bodies bound what a template can make of them.
                let text = without_limits(|| tokenizer.apply_chat_template(messages, *open))?;
                let front = if add_special_tokens { tokenizer.front() } else { &[] };
                [front, &tokenizer.encode(&text, SpecialTokens::None)?].concat()
            }
            Self::Dialogue { messages, .. } => {
                let texts: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
                [tokenizer.front(), &tokenizer.encode(&texts.join("\n"), SpecialTokens::None)?].concat()
            }
        })
    }

    /// Its token ids: at least one, all of the vocabulary, and fewer than the context.
    ///
    /// # Errors
    /// If there is none, one has no embedding, they fill the context, or the template refuses the dialogue.
    pub fn ids(&self, model: &Model, add_special_tokens: bool) -> Result<Vec<u32>> {
        let ids = self.encode(model, add_special_tokens)?;
        let (vocab, context) = (model.base.config().vocab_size, model.base.config().max_position_embeddings);
        if ids.is_empty() {
            return Err(invalid!("the prompt is empty; give at least one token"));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(invalid!("the prompt has token {id}, and the model has {vocab}"));
        }
        if ids.len() >= context {
            let long = ids.len();
            return Err(invalid!(
                "a prompt of {long} tokens leaves no room in the model's context of {context}; shorten it"
            ));
        }
        Ok(ids)
    }
}
