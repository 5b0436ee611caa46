//! Token ids from a JSON file, for the command `logprobs`.
//!
//! The file holds token ids instead of text. This file does not depend on the tokenizer or the model.

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde::Deserialize;

use crate::invalid;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tokens {
    input_ids: Vec<Vec<u32>>,
}

/// The sequences of `{"input_ids": [[1, 2, ...], ...]}`.
///
/// # Errors
/// The file cannot be read or has another form; a sequence has fewer than two tokens.
pub fn read(path: &Path) -> Result<Vec<Vec<u32>>> {
    let file = path.display();
    let text = fs::read_to_string(path).map_err(|e| invalid!("{file}: {e}"))?;
    let Tokens { input_ids } = serde_json::from_str(&text)
        .map_err(|e| invalid!("{file}: {e}; expected {{\"input_ids\": [[1, 2, ...], ...]}}"))?;
    if input_ids.is_empty() || input_ids.iter().any(|ids| ids.len() < 2) {
        return Err(invalid!("{file}: input_ids must hold sequences of at least two tokens"));
    }
    Ok(input_ids)
}

/// Checks the sequences against a model's vocabulary size and context length.
///
/// # Errors
/// A sequence is longer than the context; a token id is not in the vocabulary.
pub fn check(path: &Path, input_ids: &[Vec<u32>], vocab: usize, context: usize) -> Result<()> {
    let file = path.display();
    if let Some((row, ids)) = input_ids.iter().enumerate().find(|(_, ids)| ids.len() > context) {
        let n = ids.len();
        return Err(invalid!(
            "{file}: input_ids[{row}] has {n} tokens, and the model's context is {context}; shorten it"
        ));
    }
    let outside = |ids: &[u32]| ids.iter().copied().find(|&id| id as usize >= vocab);
    match input_ids.iter().enumerate().find_map(|(row, ids)| Some((row, outside(ids)?))) {
        Some((row, id)) => Err(invalid!(
            "{file}: input_ids[{row}] holds {id}, past the vocabulary of {vocab}; encode with this model's tokenizer"
        )),
        None => Ok(()),
    }
}
