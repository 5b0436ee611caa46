//! The bodies of vLLM's `/tokenize` and `/detokenize` and their replies. It does not depend on adapters or the engine. Read
//! `prompt.rs` for texts and dialogues -> token ids.

use anyhow::Result;
use serde_json::{Value, json};

use super::fault::Fault;
use super::fields::Fields;
use super::prompt::{self, Prompt};
use super::request::token_ids;
use crate::run::Model;

/// The model's name in the request, and the reply to it.
pub(super) type Reply = (Option<String>, Value);

/// The body of `/tokenize`: `prompt`, or `messages` that go through the chat template.
///
/// # Errors
/// 400 for a field of another type, or a dialogue that the template refuses.
pub(super) fn tokenize(body: &[u8], model: &Model) -> Result<Reply, Fault> {
    let mut fields = Fields::parse(body)?;
    let (prompt, front) = match (fields.take("prompt"), fields.take("messages")) {
        (Some(Value::String(text)), None) => (Prompt::Text(text), true),
        (Some(_), None) => return Err(Fault::field("prompt", "expected a string")),
        (None, Some(messages)) => {
            let variables = fields.object("chat_template_kwargs")?.unwrap_or_default();
            let open = fields.flag("add_generation_prompt", true)?;
            // A template writes them itself.
            (prompt::dialogue(&messages, variables, open)?, false)
        }
        _ => return Err(Fault::field("prompt", "expected either prompt or messages")),
    };
    let front = fields.flag("add_special_tokens", front)?;
    let (name, named) = (fields.text("model")?, fields.flag("return_token_strs", false)?);
    fields.end()?;
    let ids = prompt.encode(model, front).map_err(|error| Fault::of(&error))?;
    let tokenizer = model.checkpoint.tokenizer();
    let strings = named.then(|| ids.iter().map(|&id| tokenizer.token(id)).collect::<Vec<_>>());
    let context = model.base.config().max_position_embeddings;
    Ok((name, json!({ "count": ids.len(), "max_model_len": context, "tokens": ids, "token_strs": strings })))
}

/// The body of `/detokenize`: `tokens`, of which special ones have their text, too.
///
/// # Errors
/// 400 for a field of another type, or a token that the model has not.
pub(super) fn detokenize(body: &[u8], model: &Model) -> Result<Reply, Fault> {
    let mut fields = Fields::parse(body)?;
    let vocab = model.base.config().vocab_size;
    let ids = fields.take("tokens").and_then(|value| token_ids(&value));
    let ids = ids.filter(|ids| ids.iter().all(|&id| (id as usize) < vocab));
    let ids = ids.ok_or_else(|| Fault::field("tokens", format!("expected a list of token ids below {vocab}")))?;
    let name = fields.text("model")?;
    fields.end()?;
    let text = model.checkpoint.tokenizer().decode_with_special_tokens(&ids).map_err(|error| Fault::of(&error))?;
    Ok((name, json!({ "prompt": text })))
}
