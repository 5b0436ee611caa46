//! Where the parts of a text fall among the text's tokens: [`Cut`].
//!
//! A tokenizer may treat the beginning of a text, and the beginning of a part after a special token, in its own way (Llama 2's
//! puts "▁" there), so parts that are encoded one by one are not the tokens of the whole text. The whole is encoded instead,
//! and its parts are found by the tokens' offsets. This file does not depend on files or chat templates. Read `byte_bpe.rs`
//! next, which finds them without offsets.

use ahash::AHashSet;
use tokenizers::{Encoding, Tokenizer};

/// The place of a border between two parts of a text among the text's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Number of tokens before the border; the token of this index is the first of the later part.
    pub token: usize,
    /// Whether that token begins before the border, so that it holds text of both parts.
    pub inside: bool,
}

/// Ids of the tokens that are matched in a text before the model splits it. They may take the white space beside them
/// (`lstrip`, `rstrip`), which is no text of theirs.
pub(super) fn added_tokens(tokenizer: &Tokenizer) -> AHashSet<u32> {
    tokenizer.get_added_tokens_decoder().into_keys().collect()
}

/// The cuts of `text` at `borders`, which are byte positions in ascending order. `encoding` has byte offsets that no
/// post-processor has changed: a trimmed offset of white space is empty.
///
/// A token without text (a "▁" that the normaliser put in) belongs to the text after it.
pub(super) fn find(text: &str, encoding: &Encoding, added: &AHashSet<u32>, borders: &[usize]) -> Vec<Cut> {
    let spans: Vec<(usize, usize)> = encoding
        .get_ids()
        .iter()
        .zip(encoding.get_offsets())
        .map(|(id, &(from, to))| match text.get(from..to) {
            Some(own) if added.contains(id) && !own.trim().is_empty() => {
                (to - own.trim_start().len(), from + own.trim_end().len())
            }
            _ => (from, to),
        })
        .collect();
    let mut token = 0;
    borders
        .iter()
        .map(|&border| {
            while spans.get(token).is_some_and(|&(from, to)| from < border && to <= border) {
                token += 1;
            }
            Cut { token, inside: spans.get(token).is_some_and(|&(from, _)| from < border) }
        })
        .collect()
}
