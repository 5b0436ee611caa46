//! [`TextEncoder`], the tokenizer functions that the examples need, and [`ModelEncoder`], which is one over a model's
//! tokenizer.
//!
//! Tests use a small encoder of their own. This file does not depend on the record types. Read
//! `data/examples/render.rs` next.

use std::cell::RefCell;

use anyhow::Result;

use crate::invalid;
use crate::tokenizer::chat_template::{GenerationPrompt, Message, Rendered, TemplateTokens, render_marked};
use crate::tokenizer::{Bulk, Cut, Tokenizer};

/// The tokenizer functions that the examples need.
pub trait TextEncoder {
    /// Token ids of a whole text, without special tokens in front or behind. The text of a special token (markup of a chat
    /// template) becomes that token.
    ///
    /// # Errors
    /// Those of the tokenizer.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;

    /// Token ids of a whole text as [`TextEncoder::encode`] returns them, and where `borders` fall among them: byte
    /// positions in the text, in ascending order. The default is for encoders without a token of several characters.
    ///
    /// # Errors
    /// Those of the tokenizer.
    fn encode_cut(&self, text: &str, borders: &[usize]) -> Result<(Vec<u32>, Vec<Cut>)> {
        let before = |&border: &usize| Ok(Cut { token: self.encode(&text[..border])?.len(), inside: false });
        Ok((self.encode(text)?, borders.iter().map(before).collect::<Result<_>>()?))
    }

    /// A dialogue rendered with the tokenizer's chat template; with `add_generation_prompt`, up to where the next
    /// assistant turn begins.
    ///
    /// # Errors
    /// Those of the template, such as two user turns in a row.
    fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Rendered>;

    /// A dialogue rendered with a chat template from the config.
    ///
    /// # Errors
    /// Those of the template.
    fn chat_with(&self, template: &str, messages: &[Message], add_generation_prompt: bool) -> Result<Rendered> {
        let prompt = if add_generation_prompt { GenerationPrompt::Add } else { GenerationPrompt::None };
        let eos = Some(self.eos_text()).filter(|text| !text.is_empty());
        render_marked(template, messages, prompt, TemplateTokens { bos: self.bos_text(), eos })
    }

    /// The text of the beginning-of-sequence token, for templates.
    fn bos_text(&self) -> Option<&str> {
        None
    }

    /// Whether the tokenizer has a chat template.
    fn has_chat_template(&self) -> bool;

    /// The source of the tokenizer's chat template for a dialogue.
    fn chat_template_for(&self, _messages: &[Message]) -> Option<&str> {
        None
    }

    /// The id of the end-of-sequence token, which ends a response.
    fn eos_id(&self) -> u32;

    /// The text of the end-of-sequence token, for templates; empty if it has none.
    fn eos_text(&self) -> &str;

    /// The tokens that end a response, each with its text, as [`Tokenizer::ends`] has them: generation stops at them, and the
    /// score of a response stands at the first of them. The end-of-sequence token comes first.
    fn ends(&self, _template: Option<&str>) -> Vec<(u32, String)> {
        vec![(self.eos_id(), self.eos_text().to_owned())]
    }

    /// The ids that the tokenizer puts before a text: none, or a beginning-of-sequence token. A chat template writes its
    /// own.
    fn front(&self) -> &[u32] {
        &[]
    }
}

/// A [`TextEncoder`] over a model's tokenizer, which must have an end-of-text token. Each thread needs one of its own.
pub struct ModelEncoder<'t> {
    tokenizer: &'t Tokenizer,
    bulk: RefCell<Bulk<'t>>,
    eos_id: u32,
    eos_text: String,
    bos_text: Option<String>,
}

impl<'t> ModelEncoder<'t> {
    /// An encoder over `tokenizer`.
    ///
    /// # Errors
    /// The tokenizer names no end-of-text token, so no response could end.
    pub fn new(tokenizer: &'t Tokenizer) -> Result<Self> {
        let eos_id = tokenizer.eos_id().ok_or_else(|| {
            invalid!("the base's tokenizer names no end-of-text token; set eos_token in its tokenizer_config.json")
        })?;
        let eos_text = tokenizer.token(eos_id).unwrap_or_default();
        let bos_text = tokenizer.bos_id().and_then(|bos| tokenizer.token(bos));
        Ok(Self { tokenizer, bulk: RefCell::new(tokenizer.bulk()), eos_id, eos_text, bos_text })
    }
}

impl TextEncoder for ModelEncoder<'_> {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.bulk.borrow_mut().encode(text)
    }

    fn encode_cut(&self, text: &str, borders: &[usize]) -> Result<(Vec<u32>, Vec<Cut>)> {
        self.bulk.borrow_mut().encode_cut(text, borders)
    }

    fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Rendered> {
        let prompt = if add_generation_prompt { GenerationPrompt::Add } else { GenerationPrompt::None };
        self.tokenizer.render_chat(messages, prompt)
    }

    fn has_chat_template(&self) -> bool {
        self.tokenizer.chat_template().is_some()
    }

    fn chat_template_for(&self, messages: &[Message]) -> Option<&str> {
        self.tokenizer.chat_template_for(messages)
    }

    fn eos_id(&self) -> u32 {
        self.eos_id
    }

    fn eos_text(&self) -> &str {
        &self.eos_text
    }

    fn ends(&self, template: Option<&str>) -> Vec<(u32, String)> {
        let mut ids = self.tokenizer.ends(template);
        ids.retain(|&id| id != self.eos_id);
        ids.insert(0, self.eos_id);
        ids.into_iter().map(|id| (id, self.tokenizer.token(id).unwrap_or_default())).collect()
    }

    fn bos_text(&self) -> Option<&str> {
        self.bos_text.as_deref()
    }

    fn front(&self) -> &[u32] {
        self.tokenizer.front()
    }
}
