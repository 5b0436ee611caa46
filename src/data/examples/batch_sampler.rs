//! Which examples a step trains on: shuffled by (seed, epoch), cut into batches by count or by tokens, dealt to ranks.
//! A batch is a function of its [`Cursor`] alone, so a run that is resumed needs nothing else. Knows no example's content.
//! Read sft.rs for a loop over it.

use serde::{Deserialize, Serialize};

use crate::data::examples::{Example, Examples};
use crate::rng::{SplitMix64, derive};

/// The next step of a run: the whole state of its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Pass over the examples, from 0.
    pub epoch: usize,
    /// Step within the pass, from 0.
    pub position: usize,
}

/// One of several processes that train together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// From 0.
    pub rank: usize,
    /// How many processes there are.
    pub world_size: usize,
}

impl Default for Shard {
    fn default() -> Self {
        Self { rank: 0, world_size: 1 }
    }
}

/// How large a batch is: what goes through the network at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSize {
    /// So many examples.
    Examples(usize),
    /// As many examples of like length as have no more tokens than this together; a longer one stands alone.
    Tokens(usize),
}

/// Everything an order depends on besides the examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchSampler {
    /// The run's.
    pub seed: u64,
    /// The stage's stream of the seed (`train::settings`).
    pub stream: u64,
    /// Cut of a batch.
    pub batch: BatchSize,
    /// Batches a step sums its gradient over, on each rank.
    pub accumulate: usize,
    /// Whose batches.
    pub shard: Shard,
}

/// Examples of like length are looked for among so many neighbours of the shuffled order.
const WINDOW: usize = 4096;
/// The path of a window's own stream: apart from every epoch's.
const BATCH_ORDER: u64 = 0x0062_6174_6368;

impl BatchSampler {
    /// The batches of one pass. Every example stands in exactly one, on exactly one rank; all ranks have as many steps, and
    /// a rank's share of the last may be empty.
    ///
    /// Takes 8 bytes an example and 8 a batch.
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

    /// Steps of `epochs` passes.
    pub fn steps<T: Example>(&self, examples: &(impl Examples<T> + ?Sized), epochs: usize) -> usize {
        match self.batch {
            BatchSize::Examples(size) => {
                let a_step = size.max(1) * self.accumulate.max(1) * self.shard.world_size;
                examples.len().div_ceil(a_step) * epochs
            }
            // How well lengths fill a budget depends on the shuffle.
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
        Steps { plan: *self, examples, cursor, epochs, current: None, of: std::marker::PhantomData }
    }
}

/// Sorts a window by length, cuts it by tokens, and shuffles the cuts, so that the lengths of a run stay mixed. `cut` gets
/// the batches' sizes in their final order.
fn group_by_length(
    window: &mut [usize],
    tokens: impl Fn(usize) -> usize,
    most: usize,
    rng: &mut SplitMix64,
    mut cut: impl FnMut(usize),
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
        cut(batches[number].len());
    }
}

/// The batches of one pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epoch {
    order: Vec<usize>,
    /// Where each batch of all ranks begins in `order`, and the end.
    starts: Vec<usize>,
    accumulate: usize,
    shard: Shard,
}

impl Epoch {
    /// The same on every rank.
    pub fn steps(&self) -> usize {
        (self.starts.len() - 1).div_ceil(self.accumulate * self.shard.world_size)
    }

    /// This rank's batches of a step, each a list of rows. Batches are dealt to the ranks in turn.
    pub fn step(&self, position: usize) -> Step<'_> {
        let a_step = self.accumulate * self.shard.world_size;
        let all = self.starts.len() - 1;
        let mine = (position * a_step..all.min((position + 1) * a_step)).skip(self.shard.rank);
        let rows = |batch: usize| &self.order[self.starts[batch]..self.starts[batch + 1]];
        Step { batches: mine.step_by(self.shard.world_size).map(rows).collect() }
    }
}

/// What one optimizer step goes over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step<'o> {
    /// Rows of each batch.
    pub batches: Vec<&'o [usize]>,
}

impl Step<'_> {
    /// All rows.
    pub fn rows(&self) -> impl Iterator<Item = usize> + '_ {
        self.batches.iter().flat_map(|batch| batch.iter().copied())
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.batches.iter().map(|batch| batch.len()).sum()
    }

    /// No row: a rank that has run out before the others.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Steps in their order. Not an `Iterator`: a step borrows the pass it belongs to.
pub struct Steps<'e, T, E: ?Sized> {
    plan: BatchSampler,
    examples: &'e E,
    cursor: Cursor,
    epochs: usize,
    current: Option<(usize, Epoch)>,
    of: std::marker::PhantomData<T>,
}

impl<T: Example, E: Examples<T> + ?Sized> Steps<'_, T, E> {
    /// The step that [`Steps::next_step`] gives next: to be saved together with the weights.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// The next step; none after the last epoch.
    pub fn next_step(&mut self) -> Option<Step<'_>> {
        loop {
            if self.cursor.epoch >= self.epochs {
                return None;
            }
            if self.current.as_ref().is_none_or(|(epoch, _)| *epoch != self.cursor.epoch) {
                let epoch = self.plan.epoch(self.examples, self.cursor.epoch);
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

/// Rows `from..from + count` of an endless sequence of shuffled passes over `n` rows: PPO's prompts. Every rank draws
/// its own by asking for its own range.
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

    fn plans() -> impl Iterator<Item = BatchSampler> {
        let batches = [BatchSize::Examples(1), BatchSize::Examples(3), BatchSize::Tokens(50), BatchSize::Tokens(9)];
        batches.into_iter().flat_map(|batch| {
            [1, 2, 5].map(|accumulate| BatchSampler { seed: 4, stream: 1, batch, accumulate, shard: Shard::default() })
        })
    }

    fn all_steps(
        plan: &BatchSampler,
        examples: &[Vec<u32>],
        cursor: Cursor,
        epochs: usize,
    ) -> Vec<(Cursor, Vec<Vec<usize>>)> {
        let mut steps = plan.from(examples, cursor, epochs);
        let mut all = vec![];
        loop {
            let cursor = steps.cursor();
            let Some(step) = steps.next_step() else { return all };
            all.push((cursor, step.batches.iter().map(|batch| batch.to_vec()).collect()));
        }
    }

    #[test]
    fn a_cursor_restored_anywhere_continues_identically() {
        for n in [1, 17, 40] {
            let examples = examples(n);
            for plan in plans() {
                let whole = all_steps(&plan, &examples, Cursor::default(), 3);
                assert_eq!(whole.len(), plan.steps(&examples, 3), "{plan:?}");
                for (at, (cursor, _)) in whole.iter().enumerate() {
                    let text = serde_json::to_string(cursor).unwrap();
                    let cursor: Cursor = serde_json::from_str(&text).unwrap();
                    let rest: Vec<_> = all_steps(&plan, &examples, cursor, 3).into_iter().map(|(_, b)| b).collect();
                    let expected: Vec<_> = whole[at..].iter().map(|(_, b)| b.clone()).collect();
                    assert_eq!(rest, expected, "{plan:?} from {cursor:?}");
                }
            }
        }
    }

    #[test]
    fn every_rank_has_as_many_steps_and_together_they_see_every_example_once_an_epoch() {
        let examples = examples(101);
        for plan in plans() {
            for world_size in [1, 2, 4, 7] {
                let mut seen = vec![];
                let mut steps = std::collections::BTreeSet::new();
                for rank in 0..world_size {
                    let plan = BatchSampler { shard: Shard { rank, world_size }, ..plan };
                    let epoch = plan.epoch(&examples, 2);
                    steps.insert(epoch.steps());
                    assert_eq!(plan.steps(&examples, 1), plan.epoch(&examples, 0).steps());
                    for position in 0..epoch.steps() {
                        let step = epoch.step(position);
                        assert!(step.batches.len() <= plan.accumulate);
                        seen.extend(step.rows());
                    }
                }
                seen.sort_unstable();
                assert_eq!((seen, steps.len()), ((0..101).collect(), 1), "{plan:?} {world_size}");
            }
        }
    }

    #[test]
    fn a_token_budget_is_kept_and_filled_with_like_lengths() {
        let examples = examples(5000);
        let plan =
            BatchSampler { seed: 1, stream: 2, batch: BatchSize::Tokens(200), accumulate: 1, shard: Shard::default() };
        let epoch = plan.epoch(&examples, 0);
        let total: usize = examples.iter().map(Vec::len).sum();
        let mut spread = 0;
        let mut first_lengths = vec![];
        for position in 0..epoch.steps() {
            let lengths: Vec<usize> = epoch.step(position).rows().map(|row| examples[row].len()).collect();
            assert!(lengths.iter().sum::<usize>() <= 200);
            spread = spread.max(lengths.iter().max().unwrap() - lengths.iter().min().unwrap());
            first_lengths.push(lengths[0]);
        }
        // Of 1 to 40 tokens each: near-full batches whose members differ little, in no order of length.
        assert!(epoch.steps() <= total.div_ceil(200) * 11 / 10, "{} batches for {total} tokens", epoch.steps());
        assert!(spread <= 12, "{spread}");
        assert!(!first_lengths.is_sorted() && !first_lengths.iter().rev().is_sorted());
        assert_ne!(epoch, plan.epoch(&examples, 1));
        // One longer than the budget stands alone instead of being lost.
        let tight = BatchSampler { batch: BatchSize::Tokens(5), ..plan }.epoch(&examples, 0);
        let alone = |row: &[usize]| row.len() == 1 || row.iter().map(|&r| examples[r].len()).sum::<usize>() <= 5;
        assert!((0..tight.steps()).all(|position| tight.step(position).batches.iter().all(|batch| alone(batch))));
    }

    #[test]
    fn endless_rows_are_passes_each_in_its_own_order_from_any_place() {
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
