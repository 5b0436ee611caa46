//! The training examples of each objective as token ids ([`SftExample`], [`RankedExample`], [`UnpairedExample`],
//! [`PromptExample`]), and [`Examples`], a list of them in memory or in a file.
//!
//! This file does not depend on text or the model. Read `data/examples/encoder.rs` next.

use std::borrow::Cow;

use anyhow::Result;

use crate::data::record::PairLabel;

/// A sequence for supervised fine-tuning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SftExample {
    /// (N,) token ids of the sequence, N >= 2.
    pub tokens: Vec<u32>,
    /// (N,) loss mask: true = the loss includes the prediction of this token. False at 0, true at one token or more.
    pub loss_mask: Vec<bool>,
}

/// A prompt and its ranked responses, for reward modelling and DPO; a preference has two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankedExample {
    /// Token ids of the prompt, after which a response can follow; not empty.
    pub prompt: Vec<u32>,
    /// (K,) lists of token ids of the responses, K >= 2, best first, all different. Each has its end token unless
    /// `truncation = "right"` cut it off.
    pub responses: Vec<Vec<u32>>,
    /// What is known of a pair beside its order; of a longer ranking, nothing. Only the reward stage reads it.
    pub label: PairLabel,
}

impl RankedExample {
    /// The first position, counted from the prompt's start, at which responses `a` and `b` differ.
    pub fn divergence(&self, a: usize, b: usize) -> usize {
        let pairs = self.responses[a].iter().zip(&self.responses[b]);
        self.prompt.len() + pairs.take_while(|(x, y)| x == y).count()
    }
}

/// A prompt and one response that was labelled desirable or undesirable, for KTO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnpairedExample {
    /// Token ids of the prompt, after which a response can follow; not empty.
    pub prompt: Vec<u32>,
    /// Token ids of the response; not empty. It has its end token unless `truncation = "right"` cut it off.
    pub response: Vec<u32>,
    /// The label: true = desirable.
    pub desirable: bool,
}

/// A prompt for PPO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptExample {
    /// Token ids of the prompt, not empty.
    pub tokens: Vec<u32>,
    /// The prompt's text.
    pub text: String,
    /// The reference answer, for verifiers: the record's completion, if it gives exactly one.
    pub answer: Option<String>,
    /// Number of the prompt's record, from 0, among all usable records.
    pub entry: usize,
}

/// One training example.
pub trait Example: Clone {
    /// Number of tokens that the model processes for the example, over all its sequences.
    fn tokens(&self) -> usize;

    /// Passes the example's whole content to `to` as lists of numbers, for the fingerprint of a run's data.
    fn numbers(&self, to: &mut dyn FnMut(&[u32]));

    /// Number of tokens of the example's longest sequence.
    fn longest_sequence(&self) -> usize {
        self.tokens()
    }
}

impl Example for SftExample {
    fn tokens(&self) -> usize {
        self.tokens.len()
    }

    fn numbers(&self, to: &mut dyn FnMut(&[u32])) {
        to(&self.tokens);
        to(&self.loss_mask.iter().map(|&m| u32::from(m)).collect::<Vec<_>>());
    }
}

impl Example for RankedExample {
    fn tokens(&self) -> usize {
        self.responses.iter().map(|response| self.prompt.len() + response.len()).sum()
    }

    fn numbers(&self, to: &mut dyn FnMut(&[u32])) {
        to(&self.prompt);
        self.responses.iter().for_each(|response| to(response));
        if self.label != PairLabel::default() {
            to(&self.label.to_words());
        }
    }

    fn longest_sequence(&self) -> usize {
        self.prompt.len() + self.responses.iter().map(Vec::len).max().unwrap_or(0)
    }
}

impl Example for UnpairedExample {
    fn tokens(&self) -> usize {
        self.prompt.len() + self.response.len()
    }

    fn numbers(&self, to: &mut dyn FnMut(&[u32])) {
        to(&self.prompt);
        to(&self.response);
        to(&[u32::from(self.desirable)]);
    }
}

impl Example for PromptExample {
    fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens and the reference answer, on which a verifier's reward depends.
    fn numbers(&self, to: &mut dyn FnMut(&[u32])) {
        to(&self.tokens);
        self.answer.iter().for_each(|answer| to(&answer.bytes().map(u32::from).collect::<Vec<_>>()));
    }
}

/// A prompt as its token ids alone.
impl Example for Vec<u32> {
    fn tokens(&self) -> usize {
        self.len()
    }

    fn numbers(&self, to: &mut dyn FnMut(&[u32])) {
        to(self);
    }
}

/// A view of prompts as their token ids alone.
#[derive(Clone, Copy, Debug)]
pub struct Ids<'e, E>(pub &'e E);

impl<E: Examples<PromptExample>> Examples<Vec<u32>> for Ids<'_, E> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn get(&self, index: usize) -> Result<Cow<'_, Vec<u32>>> {
        Ok(Cow::Owned(self.0.get(index)?.into_owned().tokens))
    }

    fn entry(&self, index: usize) -> Result<usize> {
        Ok(self.0.get(index)?.entry)
    }

    fn tokens(&self, index: usize) -> usize {
        self.0.tokens(index)
    }

    fn longest_sequence(&self) -> usize {
        self.0.longest_sequence()
    }
}

/// A fixed list of examples: a slice, or a file from which each example is read on request.
pub trait Examples<T: Example> {
    /// Number of examples.
    fn len(&self) -> usize;

    /// Whether there are no examples.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The example at `index`, which is below [`Examples::len`].
    ///
    /// # Errors
    /// The cache file is damaged.
    fn get(&self, index: usize) -> Result<Cow<'_, T>>;

    /// Number of the record that the example at `index` was made from, from 0, among all usable records; `index` itself
    /// for examples that do not know it.
    ///
    /// # Errors
    /// Those of [`Examples::get`].
    fn entry(&self, index: usize) -> Result<usize> {
        Ok(index)
    }

    /// [`Example::tokens`] of the example at `index`, without reading the example.
    fn tokens(&self, index: usize) -> usize;

    /// The maximum of [`Example::longest_sequence`]; 0 without examples. A subset may return the maximum of the whole
    /// list.
    fn longest_sequence(&self) -> usize;
}

/// The examples at `rows`, in that order.
///
/// # Errors
/// Those of [`Examples::get`].
pub fn pick<'e, T: Example>(
    examples: &'e (impl Examples<T> + ?Sized),
    rows: impl IntoIterator<Item = usize>,
) -> Result<Vec<Cow<'e, T>>> {
    rows.into_iter().map(|row| examples.get(row)).collect()
}

/// The most that a pass of an evaluation has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassSize {
    /// Number of examples, 1 or more.
    pub examples: usize,
    /// Tokens of all examples together; an example with more is a pass of its own. `None` = any number.
    pub tokens: Option<usize>,
}

impl PassSize {
    /// So many examples, whatever their lengths.
    pub const fn of(examples: usize) -> Self {
        Self { examples, tokens: None }
    }
}

/// The ranges of all rows in order, each of as many rows as `size` allows: for evaluation.
pub fn passes<T: Example>(
    examples: &(impl Examples<T> + ?Sized),
    size: PassSize,
) -> impl Iterator<Item = std::ops::Range<usize>> {
    let (most, mut from) = (size.tokens.unwrap_or(usize::MAX), 0);
    std::iter::from_fn(move || {
        let first = from;
        let mut tokens = 0usize;
        while from < examples.len() && from - first < size.examples.max(1) {
            tokens = tokens.saturating_add(examples.tokens(from));
            if from > first && tokens > most {
                break;
            }
            from += 1;
        }
        (from > first).then_some(first..from)
    })
}

impl<T: Example> Examples<T> for [T] {
    fn len(&self) -> usize {
        self.len()
    }

    fn get(&self, index: usize) -> Result<Cow<'_, T>> {
        Ok(Cow::Borrowed(&self[index]))
    }

    fn tokens(&self, index: usize) -> usize {
        self[index].tokens()
    }

    fn longest_sequence(&self) -> usize {
        self.iter().map(Example::longest_sequence).max().unwrap_or(0)
    }
}

macro_rules! as_slice {
    ($($generics:ident)? , $of:ty) => {
        impl<T: Example $(, const $generics: usize)?> Examples<T> for $of {
            fn len(&self) -> usize {
                self[..].len()
            }

            fn get(&self, index: usize) -> Result<Cow<'_, T>> {
                Examples::get(&self[..], index)
            }

            fn tokens(&self, index: usize) -> usize {
                self[index].tokens()
            }

            fn longest_sequence(&self) -> usize {
                self[..].longest_sequence()
            }
        }
    };
}

as_slice!(, Vec<T>);
as_slice!(N, [T; N]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ranking_counts_its_prompt_once_per_response() {
        let example = RankedExample {
            prompt: vec![1, 2, 3],
            responses: vec![vec![4], vec![5, 6], vec![7]],
            label: Default::default(),
        };
        assert_eq!((example.tokens(), example.longest_sequence()), (4 + 5 + 4, 5));
        let all = vec![example.clone(), RankedExample { prompt: vec![1], ..example.clone() }];
        assert_eq!((Examples::tokens(&all, 1), all.longest_sequence()), (7, 5));
        assert_eq!(pick(&all, [1, 0]).unwrap()[1].as_ref(), &example);
    }

    #[test]
    fn passes_have_every_row_once_in_order_within_both_bounds() {
        let of = |length: usize| SftExample { tokens: vec![0; length], loss_mask: vec![true; length] };
        let examples = [3, 9, 4, 4, 20, 1].map(of);
        let cut = |examples_at_once, tokens| {
            passes(&examples[..], PassSize { examples: examples_at_once, tokens }).collect::<Vec<_>>()
        };
        assert_eq!(cut(4, None), [0..4, 4..6]);
        assert_eq!(cut(4, Some(12)), [0..2, 2..4, 4..5, 5..6]);
        assert_eq!(cut(2, Some(16)), [0..2, 2..4, 4..5, 5..6]);
        assert_eq!(cut(1, Some(1)).len(), 6);
        assert!(passes(&examples[..0], PassSize::of(4)).next().is_none());
    }
}
