//! A dialogue -> text, in segments of which each is or is not the assistant's. Knows templates, no record and no length.
//! Read phases.rs next.

use anyhow::{Result, bail, ensure};

use crate::config::{Compat, Data, Template};
use crate::data::examples::objectives::TextEncoder;
use crate::data::{Message, Text};

/// A piece of text; `target` = the assistant said it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub text: String,
    pub target: bool,
    /// The end token follows.
    pub ends: bool,
}

/// How a run makes text of dialogues.
pub(crate) struct Renderer<'e> {
    encoder: &'e dyn TextEncoder,
    template: Template,
    /// The template to use instead of the tokenizer's.
    chat_template: Option<&'e str>,
    /// Was the template asked for, so that texts become turns too?
    turns_from_texts: bool,
}

impl<'e> Renderer<'e> {
    /// # Errors
    /// `template = "chat"` with a tokenizer that has none.
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

    /// All turns of a dialogue as they stand.
    pub(crate) fn whole(&self, messages: &[Message]) -> Result<String> {
        self.dialogue(messages, false)
    }

    /// The text of a dialogue; `open` = up to where the assistant's next turn begins.
    fn dialogue(&self, messages: &[Message], open: bool) -> Result<String> {
        let mut text = String::new();
        match self.template {
            Template::Chat => {
                return match self.chat_template {
                    Some(template) => self.encoder.chat_with(template, messages, open),
                    None => self.encoder.chat(messages, open),
                };
            }
            Template::HumanAssistant | Template::HhRlhf => {
                let before = if self.template == Template::HhRlhf { "\n\n" } else { " " };
                for Message { role, content } in messages {
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

    /// The token a sequence opens with: a chat template writes its own, other text gets the tokenizer's, if it has one.
    pub(crate) fn first_token(&self, text: &Text) -> Option<u32> {
        let in_turns = self.turns_from_texts || matches!(text, Text::Dialogue(_));
        let chat = self.template == Template::Chat && in_turns;
        if chat { None } else { self.encoder.bos_id() }
    }

    /// The text of a prompt, ready for the answer to follow.
    pub(crate) fn prompt(&self, prompt: &Text) -> Result<String> {
        match prompt {
            Text::Dialogue(turns) => self.dialogue(turns, true),
            Text::Verbatim(text) if self.turns_from_texts => {
                self.dialogue(&[Message::new("user", text.as_str())], true)
            }
            Text::Verbatim(text) => Ok(text.clone()),
        }
    }

    /// Prompt and answer as (prompt text, the answer's segments). The last segment ends with the end token.
    pub(crate) fn answer(&self, prompt: &Text, answer: &Text) -> Result<(String, Vec<Segment>)> {
        let (mut turns, more) = match (prompt, answer) {
            (Text::Dialogue(turns), Text::Dialogue(more)) => (turns.clone(), more.clone()),
            (Text::Verbatim(prompt), Text::Verbatim(answer)) if self.turns_from_texts => {
                (vec![Message::new("user", prompt.as_str())], vec![Message::new("assistant", answer.as_str())])
            }
            (Text::Verbatim(prompt), Text::Verbatim(answer)) => {
                return Ok((prompt.clone(), vec![Segment { text: answer.clone(), target: true, ends: true }]));
            }
            _ => bail!("prompt and answer must both be texts or both be dialogues"),
        };
        let start = turns.len();
        turns.extend(more);
        let mut segments = self.conversation(&turns, start)?;
        let prompt = segments.remove(0).text;
        Ok((prompt, segments))
    }

    /// A conversation up to its last assistant turn: every assistant turn from number `from` on is a target, the rest is not.
    ///
    /// Each target is the difference between two renderings, so a template that rewrites earlier turns is an error, never
    /// a wrong mask.
    pub(crate) fn conversation(&self, turns: &[Message], from: usize) -> Result<Vec<Segment>> {
        let mut segments: Vec<Segment> = Vec::new();
        let mut done = String::new();
        let spoken = |index: &usize| turns[*index].role == "assistant";
        let last = (from..turns.len()).rfind(spoken);
        for index in (from..turns.len()).filter(spoken) {
            let open = self.dialogue(&turns[..index], true)?;
            let closed = self.dialogue(&turns[..=index], false)?;
            let (Some(before), Some(answer)) = (open.strip_prefix(&done), closed.strip_prefix(&open)) else {
                bail!(
                    "the chat template renders turn {} differently once more turns follow, so the answers cannot be told \
                     from the prompt; use template = \"human_assistant\" or \"plain\", or data of one round",
                    index + 1
                );
            };
            segments.push(Segment { text: before.to_owned(), target: false, ends: false });
            // What a template writes after its end token (SmolLM2: a line break) is no part of the answer.
            let eos = self.encoder.eos_text();
            let content = answer.trim_end().strip_suffix(eos).filter(|_| !eos.is_empty());
            let has_ended = content.is_some();
            let (text, ends) = match content {
                Some(content) => (content, true),
                None if self.template == Template::Chat && Some(index) == last => (answer.trim_end(), true),
                None => (answer, Some(index) == last),
            };
            segments.push(Segment { text: text.to_owned(), target: true, ends });
            done = closed;
            if has_ended {
                // The end token itself has been said; what followed it opens the next segment.
                done.truncate(done.trim_end().len());
            }
        }
        ensure!(!segments.is_empty(), "the conversation has no assistant turn to learn from");
        Ok(segments)
    }
}
