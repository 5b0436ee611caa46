//! Packed batches: sequences of any lengths, concatenated, without padding or attention mask.
//!
//! Padding would cost memory and time. It does not depend on any other file of the program. Read `block/mod.rs` next.

use anyhow::Result;

/// S concatenated sequences: N tokens, cumulative lengths (`offsets`, S + 1), and each token's position in its sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    tokens: Vec<u32>,
    offsets: Vec<usize>,
    positions: Vec<u32>,
    readable: Option<Vec<usize>>,
}

impl Batch {
    /// Packs sequences.
    ///
    /// # Errors
    /// If there are no sequences, or one is empty.
    pub fn new<S: AsRef<[u32]>>(sequences: &[S]) -> Result<Self> {
        let mut batch = Self { tokens: vec![], offsets: vec![0], positions: vec![], readable: None };
        for (i, sequence) in sequences.iter().enumerate() {
            let sequence = sequence.as_ref();
            anyhow::ensure!(!sequence.is_empty(), "sequence {i} of a batch is empty");
            batch.tokens.extend_from_slice(sequence);
            batch.positions.extend(0..sequence.len() as u32);
            batch.offsets.push(batch.tokens.len());
        }
        anyhow::ensure!(!batch.is_empty(), "a batch of no sequences");
        Ok(batch)
    }

    /// Packs rows that end in padding: of row s, only the first `readable[s]` tokens are attended to. A padding token attends
    /// to these, but neither to itself nor to other padding.
    ///
    /// # Errors
    /// As for [`Batch::new`]; if `readable[s]` is 0 or more than the row's length.
    pub fn padded<S: AsRef<[u32]>>(rows: &[S], readable: Vec<usize>) -> Result<Self> {
        let batch = Self::new(rows)?;
        let fits = |(row, n): (&S, &usize)| (1..=row.as_ref().len()).contains(n);
        anyhow::ensure!(rows.len() == readable.len() && rows.iter().zip(&readable).all(fits), "pads beyond their rows");
        Ok(Self { readable: Some(readable), ..batch })
    }

    /// Number of tokens of each sequence that are attended to, (S); `None` is all.
    pub fn readable(&self) -> Option<&[usize]> {
        self.readable.as_deref()
    }

    /// Number of sequences, S.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Never true: `new` refuses empty batches.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Token ids, (N).
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Cumulative lengths (cu_seqlens), (S + 1): sequence s is rows `offsets[s]..offsets[s + 1]`.
    pub fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// Positions, (N), from 0 in each sequence.
    pub fn positions(&self) -> &[u32] {
        &self.positions
    }

    /// Length of the longest sequence, in tokens.
    pub fn longest(&self) -> usize {
        self.offsets.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0)
    }

    /// Row of each sequence's last token, (S).
    pub fn last_rows(&self) -> Vec<usize> {
        self.offsets[1..].iter().map(|end| end - 1).collect()
    }
}

/// The rows whose next token is predicted, and those tokens: where the lm_head is applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    /// Rows of the batch's hidden states, (R).
    pub rows: Vec<usize>,
    /// The token after each row, (R).
    pub tokens: Vec<u32>,
}

impl Targets {
    /// Targets for the last `responses[s]` tokens of each sequence, in order: a token is predicted from the row before it.
    ///
    /// # Errors
    /// If a response leaves no token before it to predict from.
    pub fn responses(batch: &Batch, responses: &[usize]) -> Result<Self> {
        anyhow::ensure!(responses.len() == batch.len(), "{} lengths for {} sequences", responses.len(), batch.len());
        let mut targets = Self::default();
        for (s, (bounds, &response)) in batch.offsets.windows(2).zip(responses).enumerate() {
            let length = bounds[1] - bounds[0];
            anyhow::ensure!(response < length, "sequence {s}: a response of {response} tokens within {length}");
            for at in bounds[1] - response..bounds[1] {
                targets.rows.push(at - 1);
                targets.tokens.push(batch.tokens[at]);
            }
        }
        Ok(targets)
    }

    /// Targets for the tokens that `mask` marks; the first token of a sequence cannot be one.
    ///
    /// # Errors
    /// If the mask has another length or marks a first token.
    pub fn masked(batch: &Batch, mask: &[bool]) -> Result<Self> {
        anyhow::ensure!(mask.len() == batch.tokens.len(), "a mask of {} for {} tokens", mask.len(), batch.tokens.len());
        let mut targets = Self::default();
        for at in (0..mask.len()).filter(|&at| mask[at]) {
            anyhow::ensure!(batch.positions[at] > 0, "token {at} is a target, but it is the first of its sequence");
            targets.rows.push(at - 1);
            targets.tokens.push(batch.tokens[at]);
        }
        Ok(targets)
    }
}

/// Splits 0..n, in order, into chunks of at most `most` tokens; a longer sequence is a chunk of its own.
pub fn chunks_by_tokens(lengths: &[usize], most: usize) -> Vec<Vec<usize>> {
    let mut chunks: Vec<Vec<usize>> = vec![];
    let mut filled = usize::MAX;
    for (i, &length) in lengths.iter().enumerate() {
        if filled.saturating_add(length) > most {
            chunks.push(vec![]);
            filled = 0;
        }
        filled += length;
        if let Some(chunk) = chunks.last_mut() {
            chunk.push(i);
        }
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_predicted_from_the_row_before_within_the_same_sequence() {
        let batch = Batch::new(&[vec![5, 6, 7], vec![8, 9]]).unwrap();
        let targets = Targets::responses(&batch, &[2, 1]).unwrap();
        assert_eq!(targets, Targets { rows: vec![0, 1, 3], tokens: vec![6, 7, 9] });
        assert_eq!(Targets::masked(&batch, &[false, true, true, false, true]).unwrap(), targets);
        assert!(Targets::responses(&batch, &[3, 1]).is_err());
        assert!(Targets::masked(&batch, &[false, false, false, true, false]).is_err());
        assert!(Batch::new(&[vec![1], vec![]]).is_err() && Batch::new::<Vec<u32>>(&[]).is_err());
        assert_eq!(batch.last_rows(), [2, 4]);
    }

    #[test]
    fn chunks_contain_every_sequence_once_in_order_within_the_budget() {
        let lengths = [3, 9, 4, 4, 20, 1];
        assert_eq!(chunks_by_tokens(&lengths, 12), vec![vec![0, 1], vec![2, 3], vec![4], vec![5]]);
        assert!(chunks_by_tokens(&[], 12).is_empty());
    }
}
