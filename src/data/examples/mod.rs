//! What a stage trains on, wherever it lies: in memory or in a mapped file of tokens. Knows no record and no model.
//! Read order.rs for which example comes when.

pub mod batch_sampler;
mod compat;
pub mod dschat;
pub mod encoder;
pub mod objectives;
mod render;
mod report;

use std::borrow::Cow;

use anyhow::Result;

use crate::data::examples::objectives::{PromptExample, RankedExample, SftExample, UnpairedExample};

/// One example of a stage.
pub trait Example: Clone {
    /// Tokens that go through the network for it, all of its sequences together.
    fn tokens(&self) -> usize;

    /// Hands everything that it is to `to`, as lists of numbers: what a run's data are told apart by.
    fn numbers(&self, to: &mut dyn FnMut(&[u32]));

    /// Tokens of its longest sequence.
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
        self.answers.iter().map(|answer| self.prompt.len() + answer.len()).sum()
    }

    fn numbers(&self, to: &mut dyn FnMut(&[u32])) {
        to(&self.prompt);
        self.answers.iter().for_each(|answer| to(answer));
    }

    fn longest_sequence(&self) -> usize {
        self.prompt.len() + self.answers.iter().map(Vec::len).max().unwrap_or(0)
    }
}

impl Example for UnpairedExample {
    fn tokens(&self) -> usize {
        self.prompt.len() + self.answer.len()
    }

    fn numbers(&self, to: &mut dyn FnMut(&[u32])) {
        to(&self.prompt);
        to(&self.answer);
        to(&[u32::from(self.good)]);
    }
}

impl Example for PromptExample {
    fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// With the record's answer, which verifiers judge by.
    fn numbers(&self, to: &mut dyn FnMut(&[u32])) {
        to(&self.tokens);
        self.answer.iter().for_each(|answer| to(&answer.bytes().map(u32::from).collect::<Vec<_>>()));
    }
}

/// A prompt's bare token ids.
impl Example for Vec<u32> {
    fn tokens(&self) -> usize {
        self.len()
    }

    fn numbers(&self, to: &mut dyn FnMut(&[u32])) {
        to(self);
    }
}

/// Prompts as their bare token ids.
#[derive(Clone, Copy, Debug)]
pub struct Ids<'e, E>(pub &'e E);

impl<E: Examples<PromptExample>> Examples<Vec<u32>> for Ids<'_, E> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn get(&self, index: usize) -> Result<Cow<'_, Vec<u32>>> {
        Ok(Cow::Owned(self.0.get(index)?.into_owned().tokens))
    }

    fn tokens(&self, index: usize) -> usize {
        self.0.tokens(index)
    }

    fn longest_sequence(&self) -> usize {
        self.0.longest_sequence()
    }
}

/// A fixed list of examples. Slices are one; so is a file that is read where it is asked.
pub trait Examples<T: Example> {
    /// How many.
    fn len(&self) -> usize;

    /// None at all?
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The example at `index`, which is below [`Examples::len`].
    ///
    /// # Errors
    /// If the file it lies in is damaged.
    fn get(&self, index: usize) -> Result<Cow<'_, T>>;

    /// [`Example::tokens`] of the example at `index`, without reading it.
    fn tokens(&self, index: usize) -> usize;

    /// [`Example::longest_sequence`] over all; 0 of none. A part of a whole may answer for the whole.
    fn longest_sequence(&self) -> usize;
}

/// The examples at `rows`, in that order.
///
/// # Errors
/// As [`Examples::get`].
pub fn pick<'e, T: Example>(
    examples: &'e (impl Examples<T> + ?Sized),
    rows: impl IntoIterator<Item = usize>,
) -> Result<Vec<Cow<'e, T>>> {
    rows.into_iter().map(|row| examples.get(row)).collect()
}

/// All rows in order, `size` at a time: for passes that only evaluate.
pub fn chunks(len: usize, size: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..len).step_by(size.max(1)).map(move |from| from..len.min(from + size.max(1)))
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
    fn a_ranking_counts_its_prompt_once_an_answer() {
        let example = RankedExample { prompt: vec![1, 2, 3], answers: vec![vec![4], vec![5, 6], vec![7]] };
        assert_eq!((example.tokens(), example.longest_sequence()), (4 + 5 + 4, 5));
        let all = vec![example.clone(), RankedExample { prompt: vec![1], ..example.clone() }];
        assert_eq!((Examples::tokens(&all, 1), all.longest_sequence()), (7, 5));
        assert_eq!(pick(&all, [1, 0]).unwrap()[1].as_ref(), &example);
        assert_eq!(chunks(5, 2).collect::<Vec<_>>(), [0..2, 2..4, 4..5]);
    }
}
