//! A rendered text -> the tokens of the whole, and which of them are learnt ([`Sequence`]).
//!
//! The text is encoded in one piece, as transformers encodes a rendered dialogue and TRL a prompt with its completion; the
//! parts are found by where their borders fall among the tokens. This file does not depend on `files` or `formats`. Read
//! `data/examples/objectives.rs` next.

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Result, bail, ensure};

use crate::data::examples::encoder::TextEncoder;
use crate::data::examples::render::Layout;
use crate::tokenizer::Cut;

/// The tokens of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sequence {
    /// (N,) token ids. The last ends the response.
    pub tokens: Vec<u32>,
    /// Ranges of the tokens that are learnt, in order; the last ends with the end token, unless a template's blocks leave it out.
    pub learnt: Vec<Range<usize>>,
    /// Ranges of the tokens of the assistant's turns that are never learnt.
    pub skipped: Vec<Range<usize>>,
    /// What is to be counted and reported of it.
    pub remarks: BTreeSet<&'static str>,
}

/// The remark on a text with a token that belongs to a learnt part and to the text before it.
const SHARED_TOKEN: &str =
    "with a token that holds text of the prompt and of the response (it counts as the response's)";
/// The remark on a prompt that has other tokens where no response follows it, as in generation.
const OTHER_ALONE: &str = "whose prompt alone has other tokens than before its response";

/// The tokens of `layout`; `ends` are the tokens that end a response, with their texts. A token that holds any text of a learnt
/// part is learnt.
///
/// # Errors
/// The end token is inside a learnt part; those of the tokenizer.
pub(crate) fn encode(layout: Layout, ends: &[(u32, String)], encoder: &dyn TextEncoder) -> Result<Sequence> {
    let Layout { front, text, learnt, skipped, several, prompted, mut remarks } = layout;
    let borders: Vec<usize> = learnt.iter().flat_map(|range| [range.start, range.end]).collect();
    let (ids, cuts) = encoder.encode_cut(&text, &borders)?;
    if cuts.iter().any(|cut| cut.inside) {
        remarks.insert(SHARED_TOKEN);
    }
    if let (true, Some(range), Some(cut)) = (prompted, learnt.first(), cuts.first()) {
        let prompt = &text[..range.start];
        // Where no token is shared, only white space has other tokens by the text that follows it.
        if !cut.inside && prompt.ends_with(char::is_whitespace) && encoder.encode(prompt)? != ids[..cut.token] {
            remarks.insert(OTHER_ALONE);
        }
    }
    let ranges = |cuts: &[Cut]| -> Vec<Range<usize>> {
        let ends = cuts.chunks(2).map(|cut| cut[0].token..cut[1].token + usize::from(cut[1].inside));
        ends.map(|range| front.len() + range.start..front.len() + range.end).collect()
    };
    let mut learnt = ranges(&cuts);
    let skipped = match skipped.is_empty() {
        true => vec![],
        false => {
            let borders: Vec<usize> = skipped.iter().flat_map(|range| [range.start, range.end]).collect();
            ranges(&encoder.encode_cut(&text, &borders)?.1)
        }
    };
    let mut tokens = [&front[..], &ids].concat();
    let is_end = |token: &u32| ends.iter().any(|(end, _)| end == token);
    if !tokens.last().is_some_and(is_end) {
        match learnt.last_mut() {
            Some(last) if last.end == tokens.len() => last.end += 1,
            _ => learnt.push(tokens.len()..tokens.len() + 1),
        }
        tokens.push(encoder.eos_id());
    }
    for range in learnt.iter().filter(|_| !several) {
        // For the reward model and for PPO the response would end there.
        let inside = &tokens[range.start..range.end.saturating_sub(1).max(range.start)];
        if let Some((_, end)) = ends.iter().find(|(end, _)| inside.contains(end)) {
            bail!("a response has the end token {end:?} inside it");
        }
    }
    Ok(Sequence { tokens, learnt, skipped, remarks })
}

impl Sequence {
    /// (N,) whether each token is learnt; without `completion_only`, all but those that never are.
    pub(crate) fn mask(&self, completion_only: bool) -> Vec<bool> {
        let mut mask = vec![!completion_only; self.tokens.len()];
        self.skipped.iter().for_each(|range| mask[range.clone()].fill(false));
        self.learnt.iter().for_each(|range| mask[range.clone()].fill(true));
        mask
    }
}

/// The tokens that several sequences of one prompt begin with, and the rest of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Continued {
    /// Token ids of the prompt; not empty.
    pub prompt: Vec<u32>,
    /// Token ids of each response.
    pub responses: Vec<Vec<u32>>,
    /// What is to be counted and reported of them.
    pub remarks: BTreeSet<&'static str>,
}

/// Encodes `layouts`, each the same prompt with a response, of which the response alone is learnt. A token that a prompt
/// shares with one response belongs to all responses, so that the prompt is the same before each.
///
/// # Errors
/// The prompt has no token of its own; those of [`encode`].
pub(crate) fn continued(layouts: Vec<Layout>, ends: &[(u32, String)], encoder: &dyn TextEncoder) -> Result<Continued> {
    let (mut sequences, mut remarks) = (vec![], BTreeSet::new());
    for layout in layouts {
        let sequence = encode(layout, ends, encoder)?;
        let before = sequence.learnt.first().map_or(0, |range| range.start);
        remarks.extend(&sequence.remarks);
        sequences.push((before, sequence.tokens));
    }
    let Some((_, first)) = sequences.first() else {
        return Ok(Continued { prompt: vec![], responses: vec![], remarks });
    };
    let shared = |tokens: &[u32]| first.iter().zip(tokens).take_while(|(a, b)| a == b).count();
    let before = sequences.iter().map(|(before, tokens)| shared(tokens).min(*before)).min().unwrap_or(0);
    ensure!(before > 0, "the prompt has no token of its own before the response");
    let prompt = first[..before].to_vec();
    let responses = sequences.into_iter().map(|(_, mut tokens)| tokens.split_off(before)).collect();
    Ok(Continued { prompt, responses, remarks })
}
