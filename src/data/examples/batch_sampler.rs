//! [`BatchSampler`]: the examples of each optimizer step, shuffled by (seed, epoch), cut into batches by number of
//! examples or tokens, and distributed over ranks.
//!
//! A step's batches are a function of its [`Cursor`], so resuming a run needs nothing else. This file does not depend
//! on the record types or on text. Read `data/stream/mod.rs` next; `sft.rs` has a loop over it.

use serde::{Deserialize, Serialize};

use crate::data::examples::example::{Example, Examples};
use crate::rng::{SplitMix64, derive};

/// The position of the next step: the whole state of a run's data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Number of the pass over the examples, from 0.
    pub epoch: usize,
    /// Number of the step within the pass, from 0.
    pub position: usize,
}

/// This process among the processes that train together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Rank of this process, from 0.
    pub rank: usize,
    /// Number of processes.
    pub world_size: usize,
}

impl Default for Shard {
    fn default() -> Self {
        Self { rank: 0, world_size: 1 }
    }
}

/// The size of a batch, which the model processes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSize {
    /// A number of examples.
    Examples(usize),
    /// A maximum number of tokens over the batch's examples, which are of similar length; a longer example is a batch
    /// of its own.
    Tokens(usize),
}

/// The settings that, with the examples, determine every batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchSampler {
    /// The run's seed.
    pub seed: u64,
    /// The stage's random stream under that seed (`train::settings`).
    pub stream: u64,
    /// The size of a batch.
    pub batch: BatchSize,
    /// Number of batches per step and rank over which the gradient is accumulated.
    pub accumulate: usize,
    /// The process whose batches are returned.
    pub shard: Shard,
}

/// Number of neighbours in the shuffled order that are sorted by length together.
const WINDOW: usize = 4096;
/// Separates the random stream of a window's batches from that of an epoch.
const BATCH_ORDER: u64 = 0x0062_6174_6368;

impl BatchSampler {
    /// The sampler of one process that takes in each step what all ranks take together.
    pub fn of_all(&self) -> Self {
        Self { accumulate: self.accumulate.max(1) * self.shard.world_size, shard: Shard::default(), ..*self }
    }

    /// The batches of one pass. Every example is in exactly one batch of exactly one rank. All ranks have the same
    /// number of steps; the last one may be empty on some ranks.
    ///
    /// Memory: 8 bytes per example and 8 per batch.
    pub fn epoch<T: Example>(&self, examples: &(impl Examples<T> + ?Sized), epoch: usize) -> Epoch {
        let path = [self.stream, epoch as u64];
        let mut order = SplitMix64::new(derive(self.seed, &path)).permutation(examples.len());
        let mut starts = vec![];
        match self.batch {
            BatchSize::Examples(size) => starts.extend((0..order.len()).step_by(size.max(1))),
            BatchSize::Tokens(most) => {
                let mut at = 0;
                for (number, window) in order.chunks_mut(WINDOW).enumerate() {
                    let path = [self.stream, epoch as u64, BATCH_ORDER, number as u64];
                    let mut rng = SplitMix64::new(derive(self.seed, &path));
                    group_by_length(
                        window,
                        |row| examples.tokens(row),
                        most,
                        &mut rng,
                        |size| {
                            starts.push(at);
                            at += size;
                        },
                    );
                }
            }
        }
        starts.push(order.len());
        Epoch { order, starts, accumulate: self.accumulate.max(1), shard: self.shard }
    }

    /// Number of steps in `epochs` passes.
    pub fn steps<T: Example>(&self, examples: &(impl Examples<T> + ?Sized), epochs: usize) -> usize {
        match self.batch {
            BatchSize::Examples(size) => {
                let per_step = size.max(1) * self.accumulate.max(1) * self.shard.world_size;
                examples.len().div_ceil(per_step) * epochs
            }
            // The number of batches depends on the shuffle.
            BatchSize::Tokens(_) => (0..epochs).map(|epoch| self.epoch(examples, epoch).steps()).sum(),
        }
    }

    /// The steps from `cursor` to the end of `epochs` passes.
    pub fn from<'e, T: Example, E: Examples<T> + ?Sized>(
        &self,
        examples: &'e E,
        cursor: Cursor,
        epochs: usize,
    ) -> Steps<'e, T, E> {
        Steps { sampler: *self, examples, cursor, epochs, current: None, of: std::marker::PhantomData }
    }
}

/// Sorts a window by length, cuts it into batches of at most `most` tokens, and shuffles the batches, so that
/// successive steps have different lengths. `on_batch` receives the sizes of the batches in their final order.
fn group_by_length(
    window: &mut [usize],
    tokens: impl Fn(usize) -> usize,
    most: usize,
    rng: &mut SplitMix64,
    mut on_batch: impl FnMut(usize),
) {
    let mut sorted: Vec<(usize, usize)> = window.iter().map(|&row| (tokens(row), row)).collect();
    sorted.sort_by_key(|(tokens, _)| std::cmp::Reverse(*tokens)); // stable: equal lengths stay shuffled
    let lengths: Vec<usize> = sorted.iter().map(|(tokens, _)| *tokens).collect();
    let batches = crate::model::batch::chunks_by_tokens(&lengths, most);
    let mut at = 0;
    for number in rng.permutation(batches.len()) {
        for &index in &batches[number] {
            window[at] = sorted[index].1;
            at += 1;
        }
        on_batch(batches[number].len());
    }
}

/// The batches of one pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// All rows in their order.
    order: Vec<usize>,
    /// Start of each batch of all ranks in `order`, and the end of the last.
    starts: Vec<usize>,
    accumulate: usize,
    shard: Shard,
}

impl Epoch {
    /// Number of steps, which is the same on every rank.
    pub fn steps(&self) -> usize {
        (self.starts.len() - 1).div_ceil(self.accumulate * self.shard.world_size)
    }

    /// This rank's batches of a step, each a list of rows. The batches go to the ranks in turn.
    pub fn step(&self, position: usize) -> Step<'_> {
        self.step_of(position, self.shard.rank)
    }

    /// The batches of another rank of the same number of them.
    pub fn step_of(&self, position: usize, rank: usize) -> Step<'_> {
        let per_step = self.accumulate * self.shard.world_size;
        let all = self.starts.len() - 1;
        let whole = position * per_step..all.min((position + 1) * per_step);
        let rows = |batch: usize| &self.order[self.starts[batch]..self.starts[batch + 1]];
        let mine = whole.clone().skip(rank).step_by(self.shard.world_size);
        Step { batches: mine.map(rows).collect(), of_all: whole.map(rows).collect() }
    }
}

/// The batches of one optimizer step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step<'o> {
    /// The rows of each batch.
    pub batches: Vec<&'o [usize]>,
    /// The rows of each batch of all ranks, as one rank would have them.
    pub of_all: Vec<&'o [usize]>,
}

impl Step<'_> {
    /// The rows of all batches.
    pub fn rows(&self) -> impl Iterator<Item = usize> + '_ {
        self.batches.iter().flat_map(|batch| batch.iter().copied())
    }

    /// Number of rows of all batches.
    pub fn len(&self) -> usize {
        self.batches.iter().map(|batch| batch.len()).sum()
    }

    /// Whether the step has no row, as for a rank that has no batch left in an epoch's last step.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The steps in order. It is not an `Iterator` because a step borrows from its epoch.
pub struct Steps<'e, T, E: ?Sized> {
    sampler: BatchSampler,
    examples: &'e E,
    cursor: Cursor,
    epochs: usize,
    current: Option<(usize, Epoch)>,
    of: std::marker::PhantomData<T>,
}

impl<T: Example, E: Examples<T> + ?Sized> Steps<'_, T, E> {
    /// The position of the step that [`Steps::next_step`] returns next, to be saved with the weights.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// The next step, or None after the last epoch.
    pub fn next_step(&mut self) -> Option<Step<'_>> {
        loop {
            if self.cursor.epoch >= self.epochs {
                return None;
            }
            if self.current.as_ref().is_none_or(|(epoch, _)| *epoch != self.cursor.epoch) {
                let epoch = self.sampler.epoch(self.examples, self.cursor.epoch);
                self.current = Some((self.cursor.epoch, epoch));
            }
            if self.cursor.position < self.current.as_ref().map_or(0, |(_, epoch)| epoch.steps()) {
                break;
            }
            self.cursor = Cursor { epoch: self.cursor.epoch + 1, position: 0 };
        }
        let position = self.cursor.position;
        self.cursor.position += 1;
        self.current.as_ref().map(|(_, epoch)| epoch.step(position))
    }
}

/// Rows `from..from + count` of an endless sequence of shuffled passes over `n` rows, for PPO's prompts. Each rank
/// draws its own range.
pub fn endless(seed: u64, stream: u64, n: usize, from: usize, count: usize) -> Vec<usize> {
    let mut rows = Vec::with_capacity(count);
    let mut pass = usize::MAX;
    let mut order = vec![];
    for at in from..from + count {
        if at / n != pass {
            pass = at / n;
            order = SplitMix64::new(derive(seed, &[stream, pass as u64])).permutation(n);
        }
        rows.push(order[at % n]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Examples of 1 to 40 tokens.
    fn examples(n: usize) -> Vec<Vec<u32>> {
        let mut rng = SplitMix64::new(9);
        (0..n).map(|_| vec![7; 1 + rng.below(40)]).collect()
    }

    fn samplers() -> impl Iterator<Item = BatchSampler> {
        let batches = [BatchSize::Examples(1), BatchSize::Examples(3), BatchSize::Tokens(50), BatchSize::Tokens(9)];
        batches.into_iter().flat_map(|batch| {
            [1, 2, 5].map(|accumulate| BatchSampler { seed: 4, stream: 1, batch, accumulate, shard: Shard::default() })
        })
    }

    fn all_steps(
        sampler: &BatchSampler,
        examples: &[Vec<u32>],
        cursor: Cursor,
        epochs: usize,
    ) -> Vec<(Cursor, Vec<Vec<usize>>)> {
        let mut steps = sampler.from(examples, cursor, epochs);
        let mut all = vec![];
        loop {
            let cursor = steps.cursor();
            let Some(step) = steps.next_step() else { return all };
            all.push((cursor, step.batches.iter().map(|batch| batch.to_vec()).collect()));
        }
    }

    #[test]
    fn a_restored_cursor_continues_with_identical_batches() {
        for n in [1, 17, 40] {
            let examples = examples(n);
            for sampler in samplers() {
                let whole = all_steps(&sampler, &examples, Cursor::default(), 3);
                assert_eq!(whole.len(), sampler.steps(&examples, 3), "{sampler:?}");
                for (at, (cursor, _)) in whole.iter().enumerate() {
                    let text = serde_json::to_string(cursor).unwrap();
                    let cursor: Cursor = serde_json::from_str(&text).unwrap();
                    let rest: Vec<_> = all_steps(&sampler, &examples, cursor, 3).into_iter().map(|(_, b)| b).collect();
                    let expected: Vec<_> = whole[at..].iter().map(|(_, b)| b.clone()).collect();
                    assert_eq!(rest, expected, "{sampler:?} from {cursor:?}");
                }
            }
        }
    }

    #[test]
    fn ranks_have_equal_steps_and_together_see_every_example_once_per_epoch() {
        let examples = examples(101);
        for sampler in samplers() {
            for world_size in [1, 2, 4, 7] {
                let mut seen = vec![];
                let mut steps = std::collections::BTreeSet::new();
                for rank in 0..world_size {
                    let sampler = BatchSampler { shard: Shard { rank, world_size }, ..sampler };
                    let epoch = sampler.epoch(&examples, 2);
                    let whole = sampler.of_all().epoch(&examples, 2);
                    steps.insert(epoch.steps());
                    assert_eq!(sampler.steps(&examples, 1), sampler.epoch(&examples, 0).steps());
                    for position in 0..epoch.steps() {
                        let step = epoch.step(position);
                        assert!(step.batches.len() <= sampler.accumulate);
                        assert_eq!(step.of_all, whole.step(position).batches);
                        seen.extend(step.rows());
                    }
                }
                seen.sort_unstable();
                assert_eq!((seen, steps.len()), ((0..101).collect(), 1), "{sampler:?} {world_size}");
            }
        }
    }

    #[test]
    fn token_batches_stay_within_the_budget_and_have_similar_lengths() {
        let examples = examples(5000);
        let sampler =
            BatchSampler { seed: 1, stream: 2, batch: BatchSize::Tokens(200), accumulate: 1, shard: Shard::default() };
        let epoch = sampler.epoch(&examples, 0);
        let total: usize = examples.iter().map(Vec::len).sum();
        let mut spread = 0;
        let mut first_lengths = vec![];
        for position in 0..epoch.steps() {
            let lengths: Vec<usize> = epoch.step(position).rows().map(|row| examples[row].len()).collect();
            assert!(lengths.iter().sum::<usize>() <= 200);
            spread = spread.max(lengths.iter().max().unwrap() - lengths.iter().min().unwrap());
            first_lengths.push(lengths[0]);
        }
        // The examples have 1 to 40 tokens: batches are nearly full, their lengths differ little, and batches are
        // shuffled.
        assert!(epoch.steps() <= total.div_ceil(200) * 11 / 10, "{} batches for {total} tokens", epoch.steps());
        assert!(spread <= 12, "{spread}");
        assert!(!first_lengths.is_sorted() && !first_lengths.iter().rev().is_sorted());
        assert_ne!(epoch, sampler.epoch(&examples, 1));
        // An example longer than the budget is a batch of its own.
        let tight = BatchSampler { batch: BatchSize::Tokens(5), ..sampler }.epoch(&examples, 0);
        let alone = |row: &[usize]| row.len() == 1 || row.iter().map(|&r| examples[r].len()).sum::<usize>() <= 5;
        assert!((0..tight.steps()).all(|position| tight.step(position).batches.iter().all(|batch| alone(batch))));
    }

    #[test]
    fn endless_rows_are_shuffled_passes_and_can_start_anywhere() {
        let all = endless(3, 4, 10, 0, 35);
        for pass in all.chunks(10).take(3) {
            let mut sorted = pass.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(all[..10], all[10..20]);
        for from in 0..30 {
            assert_eq!(endless(3, 4, 10, from, 5), all[from..from + 5]);
        }
    }
}
