//! A model's tokenizer as the phases want it. Knows no record.

use std::cell::RefCell;

use anyhow::Result;

use crate::data::Message;
use crate::data::examples::objectives::TextEncoder;
use crate::invalid;
use crate::tokenizer::chat_template::GenerationPrompt;
use crate::tokenizer::{Bulk, SpecialTokens, Tokenizer};

/// A tokenizer with an end-of-text token. Each thread makes its own.
pub struct ModelEncoder<'t> {
    tokenizer: &'t Tokenizer,
    bulk: RefCell<Bulk<'t>>,
    eos_id: u32,
    eos_text: String,
    bos_text: Option<String>,
}

impl<'t> ModelEncoder<'t> {
    /// # Errors
    /// If the tokenizer names no end-of-text token: no answer could ever end.
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

    fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let prompt = if add_generation_prompt { GenerationPrompt::Add } else { GenerationPrompt::None };
        self.tokenizer.apply_chat_template(messages, prompt)
    }

    fn has_chat_template(&self) -> bool {
        self.tokenizer.chat_template().is_some()
    }

    fn eos_id(&self) -> u32 {
        self.eos_id
    }

    fn eos_text(&self) -> &str {
        &self.eos_text
    }

    fn bos_text(&self) -> Option<&str> {
        self.bos_text.as_deref()
    }

    fn bos_id(&self) -> Option<u32> {
        // Only where the tokenizer itself puts one in front of a text.
        let framed = self.tokenizer.encode("", SpecialTokens::Add).ok()?;
        self.tokenizer.bos_id().filter(|bos| framed.first() == Some(bos))
    }
}
