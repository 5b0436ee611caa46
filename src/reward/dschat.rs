//! Comparisons as right-padded rows, for `compat = "dschat"`: where a response ends in a padded row, and how comparisons are
//! packed into a batch. The loss is `divergence_to_end_padded` in `loss.rs`. It does not depend on bases or adapters. Source:
//! microsoft/DeepSpeedExamples 83757d9, `dschat/utils/model/reward_model.py`.
//!
//! DeepSpeed-Chat pads every row to the maximum length. Only pads up to the later of the two ends are in the loss, so no more
//! are added here. Scores are read at pads, no token attends to a pad, and pads advance the positions.

use std::borrow::Cow;

use anyhow::Result;

use super::loss::{Scored, WindowLoss, divergence_to_end_padded};
use crate::data::examples::Examples;
use crate::data::examples::objectives::RankedExample;
use crate::invalid;
use crate::model::batch::Batch;

/// How rows are padded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Padding {
    /// The pad token.
    pub pad: u32,
    /// Number of pad tokens in a row before the one that ends its response.
    pub num_padding_at_beginning: usize,
    /// Length of a row in tokens.
    pub max_length: usize,
}

/// Comparisons of two responses as one batch: chosen, rejected, chosen, rejected.
pub struct Rows {
    /// Packed rows; both rows of a comparison have the same length.
    pub batch: Batch,
    /// (S) one past the end of each response.
    pub ends: Vec<usize>,
}

impl Padding {
    /// Counts the leading pads that every row has: 1 if all begin with the pad token, else 0.
    ///
    /// # Errors
    /// If the examples cannot be read.
    pub fn of(pad: u32, max_length: usize, examples: &(impl Examples<RankedExample> + ?Sized)) -> Result<Self> {
        let begins = |row: usize| Ok(examples.get(row)?.prompt.first() == Some(&pad));
        let all = (0..examples.len()).map(begins).collect::<Result<Vec<bool>>>()?;
        let num_padding_at_beginning = usize::from(!all.is_empty() && all.iter().all(|&begins| begins));
        Ok(Self { pad, num_padding_at_beginning, max_length })
    }

    /// One past the response: the position of the pad that ends it in the padded row, or the row's length.
    fn end(&self, tokens: &[u32]) -> usize {
        let pads = tokens.iter().enumerate().filter(|&(_, &token)| token == self.pad).map(|(t, _)| t);
        let end = pads.chain(tokens.len()..).nth(self.num_padding_at_beginning);
        end.unwrap_or(self.max_length).min(self.max_length)
    }

    /// Packs comparisons of two responses.
    ///
    /// # Errors
    /// If one has another number of responses.
    pub fn rows(&self, examples: &[Cow<'_, RankedExample>]) -> Result<Rows> {
        let (mut rows, mut readable, mut ends) = (vec![], vec![], vec![]);
        for example in examples {
            let [chosen, rejected] = &example.responses[..] else {
                return Err(invalid!(
                    "[reward] compat = \"dschat\" compares two responses, and a record has {}; add [data] compat = \"dschat\", \
                     which takes the best and the worst",
                    example.responses.len()
                ));
            };
            let pair = [chosen, rejected].map(|response| [&example.prompt[..], response].concat());
            let of = [self.end(&pair[0]), self.end(&pair[1])];
            let longest = pair.iter().map(Vec::len).chain(of).max().unwrap_or(0);
            for (mut row, end) in pair.into_iter().zip(of) {
                readable.push(row.len());
                row.resize(longest, self.pad);
                rows.push(row);
                ends.push(end);
            }
        }
        Ok(Rows { batch: Batch::padded(&rows, readable)?, ends })
    }
}

impl Rows {
    /// Rows of the batch's hidden states at which scores are read: every response's last token. A row whose end is at 0 is
    /// read at its last position, like index -1.
    pub fn last_rows(&self) -> Vec<usize> {
        let bounds = self.batch.offsets().windows(2);
        bounds.zip(&self.ends).map(|(b, &end)| end.checked_sub(1).map_or(b[1] - 1, |at| b[0] + at)).collect()
    }

    /// Loss and derivatives of comparison `pair`. `scores`: (N,) of all tokens of the batch.
    ///
    /// # Errors
    /// Those of [`divergence_to_end_padded`].
    pub fn loss(&self, pair: usize, scores: &[f32], padding: &Padding) -> Result<WindowLoss> {
        let [chosen, rejected] = [2 * pair, 2 * pair + 1].map(|s| {
            let rows = self.batch.offsets()[s]..self.batch.offsets()[s + 1];
            Scored { tokens: &self.batch.tokens()[rows.clone()], scores: &scores[rows] }
        });
        divergence_to_end_padded(chosen, rejected, padding.pad, padding.num_padding_at_beginning)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(prompt: &[u32], responses: &[&[u32]]) -> Cow<'static, RankedExample> {
        let responses = responses.iter().map(|response| response.to_vec()).collect();
        Cow::Owned(RankedExample { prompt: prompt.to_vec(), responses, label: Default::default() })
    }

    #[test]
    fn rows_are_padded_to_the_longer_of_the_two_and_end_at_pad_number_num_padding_at_beginning() {
        let own = Padding { pad: 1, num_padding_at_beginning: 0, max_length: 9 };
        let rows = own.rows(&[example(&[5], &[&[6, 7, 2], &[8, 2]])]).unwrap();
        assert_eq!(rows.batch.tokens(), [5, 6, 7, 2, 5, 8, 2, 1]);
        assert_eq!((rows.ends.clone(), rows.last_rows()), (vec![4, 3], vec![3, 6]));
        assert_eq!(rows.batch.readable().unwrap(), [4, 3]);
        // OPT: the first token is a pad, and the end token is one.
        let opt = Padding { pad: 2, num_padding_at_beginning: 1, max_length: 9 };
        let rows = opt.rows(&[example(&[2, 5], &[&[6, 7, 2], &[8, 2]])]).unwrap();
        assert_eq!((rows.ends.clone(), rows.last_rows()), (vec![4, 3], vec![3, 7]));
        // With one pad too many as leading, each response's end moves into its pads, up to the row's length.
        let wrong = Padding { num_padding_at_beginning: 1, max_length: 4, ..own };
        let rows = wrong.rows(&[example(&[5], &[&[6, 7, 2], &[8, 2]])]).unwrap();
        assert_eq!(rows.ends, [4, 4]);
        assert!(own.rows(&[example(&[5], &[&[6], &[7], &[8]])]).is_err());
    }

    #[test]
    fn leading_pads_are_counted_only_if_every_row_has_one() {
        let examples = [example(&[2, 5], &[&[6], &[7]]).into_owned(), example(&[2, 8], &[&[6], &[7]]).into_owned()];
        let leading = |examples: &[RankedExample], pad| Padding::of(pad, 9, examples).unwrap().num_padding_at_beginning;
        assert_eq!([leading(&examples, 2), leading(&examples, 1), leading(&[], 2)], [1, 0, 0]);
        let mixed = [examples[0].clone(), example(&[5], &[&[6], &[7]]).into_owned()];
        assert_eq!(leading(&mixed, 2), 0);
    }
}
