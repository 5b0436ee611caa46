//! Prompt, response and dialogue -> text by the run's template, in segments that are marked as the assistant's or not.
//!
//! The marks become the loss mask. This file does not depend on `files` or `formats`. Read
//! `data/examples/objectives.rs` next.

use anyhow::{Result, bail, ensure};

use crate::config::{Compat, Data, Template};
use crate::data::examples::encoder::TextEncoder;
use crate::data::record::Text;
use crate::tokenizer::chat_template::{Message, unread};

/// A piece of a sequence's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// The text of the piece.
    pub text: String,
    /// Whether the piece is the assistant's, so that the loss includes it.
    pub target: bool,
    /// Whether the end token follows the piece.
    pub ends: bool,
}

/// Renders texts and dialogues by the run's template.
pub(crate) struct Renderer<'e> {
    encoder: &'e dyn TextEncoder,
    template: Template,
    /// The chat template from the config, used instead of the tokenizer's.
    chat_template: Option<&'e str>,
    /// Whether verbatim texts become turns too: the config names a template.
    turns_from_texts: bool,
}

impl<'e> Renderer<'e> {
    /// The renderer for `[data]`.
    ///
    /// # Errors
    /// `template = "chat"` with a tokenizer that has no chat template.
    pub(crate) fn new(encoder: &'e dyn TextEncoder, data: &'e Data) -> Result<Self> {
        let chat_template = data.chat_template.as_deref();
        let has_chat = chat_template.is_some() || encoder.has_chat_template();
        if data.template == Some(Template::Chat) && !has_chat {
            return Err(crate::invalid!(
                "[data] template = \"chat\": the tokenizer has no chat template; write one in chat_template, or use \
                 \"human_assistant\", \"hh_rlhf\" or \"plain\""
            ));
        }
        let default = match data.compat {
            Some(Compat::Dschat) => Template::HumanAssistant,
            None if has_chat => Template::Chat,
            None => Template::Plain,
        };
        let turns_from_texts =
            matches!(data.template, Some(Template::Chat | Template::HumanAssistant | Template::HhRlhf));
        Ok(Self { encoder, template: data.template.unwrap_or(default), chat_template, turns_from_texts })
    }

    /// The text of all turns of a dialogue.
    pub(crate) fn whole(&self, messages: &[Message]) -> Result<String> {
        self.dialogue(messages, false)
    }

    /// The text of a dialogue; with `open`, up to where the assistant's next turn begins.
    fn dialogue(&self, messages: &[Message], open: bool) -> Result<String> {
        let mut text = String::new();
        if self.template != Template::Chat && messages.iter().any(Message::is_only_calls) {
            bail!("a turn holds tool_calls and no text, which only a chat template can write; use template = \"chat\"");
        }
        match self.template {
            Template::Chat => {
                return match self.chat_template {
                    Some(template) => self.encoder.chat_with(template, messages, open),
                    None => self.encoder.chat(messages, open),
                };
            }
            Template::HumanAssistant | Template::HhRlhf => {
                let before = if self.template == Template::HhRlhf { "\n\n" } else { " " };
                for Message { role, content, .. } in messages {
                    match role.as_str() {
                        "assistant" => text += &format!("{before}Assistant: "),
                        "user" => text += &format!("{before}Human: "),
                        "system" => {}
                        other => bail!("the templates \"human_assistant\" and \"hh_rlhf\" have no {other} turns"),
                    }
                    text.push_str(content);
                }
                if open {
                    text += &format!("{before}Assistant:");
                }
            }
            Template::Plain => {
                let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
                text = contents.join("\n");
                if open {
                    text.push('\n');
                }
            }
        }
        Ok(text)
    }

    /// The beginning-of-sequence token to put in front: a chat template writes its own, other text gets the
    /// tokenizer's, if it has one.
    pub(crate) fn first_token(&self, text: &Text) -> Option<u32> {
        let in_turns = self.turns_from_texts || matches!(text, Text::Dialogue(_));
        let chat = self.template == Template::Chat && in_turns;
        if chat { None } else { self.encoder.bos_id() }
    }

    /// A remark for each thing that a dialogue gives beside roles and texts, and the template does not read.
    pub(crate) fn unread(&self, text: &Text) -> Vec<String> {
        let Text::Dialogue(turns) = text else { return vec![] };
        let source = match self.template {
            Template::Chat => self.chat_template.or(self.encoder.chat_template()),
            Template::HumanAssistant | Template::HhRlhf | Template::Plain => None,
        };
        let remark = |what| format!("with {what} that the template does not read");
        unread(source, turns).into_iter().map(remark).collect()
    }

    /// The text of a prompt, up to where the response follows.
    pub(crate) fn prompt(&self, prompt: &Text) -> Result<String> {
        match prompt {
            Text::Dialogue(turns) => self.dialogue(turns, true),
            Text::Verbatim(text) if self.turns_from_texts => {
                self.dialogue(&[Message::new("user", text.as_str())], true)
            }
            Text::Verbatim(text) => Ok(text.clone()),
        }
    }

    /// The prompt's text and the response's segments. The last segment ends with the end token.
    ///
    /// # Errors
    /// A text beside a dialogue; those of [`Self::conversation`].
    pub(crate) fn response(&self, prompt: &Text, response: &Text) -> Result<(String, Vec<Segment>)> {
        let (mut turns, more) = match (prompt, response) {
            (Text::Dialogue(turns), Text::Dialogue(more)) => (turns.clone(), more.clone()),
            (Text::Verbatim(prompt), Text::Verbatim(response)) if self.turns_from_texts => {
                (vec![Message::new("user", prompt.as_str())], vec![Message::new("assistant", response.as_str())])
            }
            (Text::Verbatim(prompt), Text::Verbatim(response)) => {
                return Ok((prompt.clone(), vec![Segment { text: response.clone(), target: true, ends: true }]));
            }
            _ => bail!("prompt and response must both be texts or both be dialogues"),
        };
        let start = turns.len();
        turns.extend(more);
        let mut segments = self.conversation(&turns, start)?;
        let prompt = segments.remove(0).text;
        Ok((prompt, segments))
    }

    /// The segments of a conversation up to its last assistant turn: every assistant turn from index `from` on is a
    /// target, the rest is not.
    ///
    /// Each target is the difference between two renderings, so a template that rewrites earlier turns gives an error
    /// instead of a wrong mask.
    ///
    /// # Errors
    /// There is no assistant turn; the template rejects the turns or renders earlier turns differently once more follow.
    pub(crate) fn conversation(&self, turns: &[Message], from: usize) -> Result<Vec<Segment>> {
        let mut segments: Vec<Segment> = Vec::new();
        let mut rendered = String::new();
        let is_assistant = |index: &usize| turns[*index].role == "assistant";
        let last = (from..turns.len()).rfind(is_assistant);
        for index in (from..turns.len()).filter(is_assistant) {
            let open = self.dialogue(&turns[..index], true)?;
            let closed = self.dialogue(&turns[..=index], false)?;
            let (Some(before), Some(response)) = (open.strip_prefix(&rendered), closed.strip_prefix(&open)) else {
                bail!(
                    "the chat template renders turn {} differently once more turns follow, so the responses cannot be told \
                     from the prompt; use template = \"human_assistant\" or \"plain\", or data of one round",
                    index + 1
                );
            };
            segments.push(Segment { text: before.to_owned(), target: false, ends: false });
            // Text that a template writes after its end token (SmolLM2: a line break) does not belong to the response.
            let eos = self.encoder.eos_text();
            let content = response.trim_end().strip_suffix(eos).filter(|_| !eos.is_empty());
            let has_ended = content.is_some();
            let (text, ends) = match content {
                Some(content) => (content, true),
                None if self.template == Template::Chat && Some(index) == last => (response.trim_end(), true),
                None => (response, Some(index) == last),
            };
            segments.push(Segment { text: text.to_owned(), target: turns[index].is_learnt(), ends });
            rendered = closed;
            if has_ended {
                // The end token is in this segment; the text after it begins the next segment.
                rendered.truncate(rendered.trim_end().len());
            }
        }
        ensure!(!segments.is_empty(), "the conversation has no assistant turn to train on");
        Ok(segments)
    }
}
