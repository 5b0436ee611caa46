//! A world: the processes (ranks) that train one adapter together, and their arithmetic.
//!
//! Everything is added up by rank 0 in the order of the ranks and returned by it, so that one seed and one number of ranks give
//! one set of bytes. A world of one does nothing. Its ranks are processes under MPI (feature `mpi`) or, in tests, threads. It
//! does not depend on a stage. Read `launch.rs` for how a process learns of the others, and `../supervised.rs` for the loop over
//! it.

mod failure;
mod lap;
pub mod launch;
#[cfg(feature = "mpi")]
mod processes;
pub mod threads;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::model::adapter::Gradients;
use crate::ops::cpu;
use failure::Failure;
use lap::{Clocks, Lap};

/// How a rank reaches the others. Messages between two ranks arrive in the order in which they were sent.
pub trait Ranks: Send + Sync {
    /// Number of this rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn size(&self) -> usize;

    /// Sends a message to a rank.
    ///
    /// # Errors
    /// If the rank is gone.
    fn send(&self, to: usize, message: &[u8]) -> Result<()>;

    /// Waits for the next message of a rank.
    ///
    /// # Errors
    /// If the rank is gone.
    fn receive(&self, from: usize) -> Result<Vec<u8>>;
}

/// The ranks that train together, seen from one of them. The default is a world of one.
///
/// Every method but [`World::rank`], [`World::size`], [`World::is_first`] and [`World::is_alone`] is a meeting: all ranks call it,
/// in the same order.
#[derive(Clone, Default)]
pub struct World(Option<Arc<Others>>);

/// How this rank reaches the others, and its clocks.
struct Others {
    ranks: Box<dyn Ranks>,
    clocks: Clocks,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.size())
    }
}

static ALONE: World = World(None);

/// The share of rank `rank` of `size` in `count` things, one rank's behind the other's: no rank has two more than another.
pub fn share_of(count: usize, rank: usize, size: usize) -> Range<usize> {
    rank * count / size..(rank + 1) * count / size
}

impl World {
    /// The world of one.
    pub fn alone() -> &'static Self {
        &ALONE
    }

    /// The world of these ranks; one rank is a world of one.
    pub fn of(ranks: impl Ranks + 'static) -> Self {
        Self((ranks.size() > 1).then(|| Arc::new(Others { ranks: Box::new(ranks), clocks: Clocks::default() })))
    }

    /// Number of this rank, from 0.
    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |others| others.ranks.rank())
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.0.as_ref().map_or(1, |others| others.ranks.size())
    }

    /// Whether this is rank 0, which alone reports and writes files.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Whether there is no other rank.
    pub fn is_alone(&self) -> bool {
        self.0.is_none()
    }

    /// Messages of all ranks put together by rank 0, in the order of the ranks.
    fn fold(&self, mine: Vec<u8>, mut add: impl FnMut(&mut Vec<u8>, &[u8]) -> Result<()>) -> Result<Vec<u8>> {
        let Some(Others { ranks, clocks }) = self.0.as_deref() else { return Ok(mine) };
        let _waiting = clocks.waiting();
        if ranks.rank() > 0 {
            ranks.send(0, &mine)?;
            return ranks.receive(0);
        }
        let mut all = mine;
        for from in 1..ranks.size() {
            add(&mut all, &ranks.receive(from)?)?;
        }
        (1..ranks.size()).try_for_each(|to| ranks.send(to, &all))?;
        Ok(all)
    }

    /// Waits for all ranks.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn barrier(&self) -> Result<()> {
        self.fold(vec![], |_, _| Ok(())).map(drop)
    }

    /// Rank 0's message on every rank.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn broadcast(&self, message: Vec<u8>) -> Result<Vec<u8>> {
        self.fold(message, |_, _| Ok(()))
    }

    /// Replaces each number by its sum over the ranks.
    ///
    /// # Errors
    /// If a rank is gone, or has another number of them.
    pub fn sum(&self, values: &mut [f64]) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        let all = self.fold(bytes_of(values), |all, more| {
            ensure!(all.len() == more.len(), "ranks sum {} and {} bytes", all.len(), more.len());
            let sums: Vec<f64> = doubles(all).zip(doubles(more)).map(|(a, b)| a + b).collect();
            *all = bytes_of(&sums);
            Ok(())
        })?;
        values.iter_mut().zip(doubles(&all)).for_each(|(value, sum)| *value = sum);
        Ok(())
    }

    /// The numbers of all ranks, one rank's behind the other's.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn concat(&self, values: Vec<f64>) -> Result<Vec<f64>> {
        if self.is_alone() {
            return Ok(values);
        }
        let all = self.fold(bytes_of(&values), |all, more| {
            all.extend_from_slice(more);
            Ok(())
        })?;
        Ok(doubles(&all).collect())
    }

    /// The time that each rank worked since the last call, seconds, and a warning the first time that one of them takes much longer
    /// than the others. `None` for a world of one.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn lap(&self) -> Result<Option<Lap>> {
        let Some(Others { clocks, .. }) = self.0.as_deref() else { return Ok(None) };
        let seconds = self.concat(vec![clocks.lap()])?;
        Ok(Some(Lap { warning: clocks.slow(&seconds), seconds }))
    }

    /// Whether it is so on any rank.
    ///
    /// # Errors
    /// If a rank is gone.
    pub fn any(&self, here: bool) -> Result<bool> {
        let mut count = [f64::from(u8::from(here))];
        self.sum(&mut count)?;
        Ok(count[0] > 0.0)
    }

    /// The messages of all ranks, in their order. Rank 0 passes them on one by one, so that no rank has them twice.
    fn gather(&self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let Some(Others { ranks, clocks }) = self.0.as_deref() else { return Ok(vec![mine]) };
        let _waiting = clocks.waiting();
        if ranks.rank() > 0 {
            ranks.send(0, &mine)?;
            drop(mine);
            return (0..ranks.size()).map(|_| ranks.receive(0)).collect();
        }
        let mut all = vec![mine];
        for from in 1..ranks.size() {
            all.push(ranks.receive(from)?);
        }
        for to in 1..ranks.size() {
            all.iter().try_for_each(|message| ranks.send(to, message))?;
        }
        Ok(all)
    }

    /// What `of` finds for each of `count` things, in their order, where each rank finds its share of them: `of` is called once,
    /// with the numbers of the things that this rank has. A world of one has all, and sends nothing.
    ///
    /// # Errors
    /// Those of `of` on the first rank that failed, on every rank; if a rank is gone.
    pub fn share<T: Serialize + DeserializeOwned>(
        &self,
        count: usize,
        of: impl FnOnce(Range<usize>) -> Result<Vec<T>>,
    ) -> Result<Vec<T>> {
        let mine = share_of(count, self.rank(), self.size());
        let expected = mine.len();
        let found = of(mine).and_then(|found| {
            ensure!(found.len() == expected, "{} results for {expected} things", found.len());
            Ok(found)
        });
        if self.is_alone() {
            return found;
        }
        let found = self.agree(found)?;
        // A text that grows by doubling would take twice its bytes.
        let mine = postcard::to_extend(&found, Vec::with_capacity(postcard::experimental::serialized_size(&found)?))?;
        drop(found);
        let mut all = Vec::with_capacity(count);
        for message in self.gather(mine)? {
            all.extend(postcard::from_bytes::<Vec<T>>(&message)?);
        }
        ensure!(all.len() == count, "all ranks together found {} of {count} results", all.len());
        Ok(all)
    }

    /// The gradients of all ranks, added up; a missing one counts as zero. The sum lies on the host.
    ///
    /// # Errors
    /// If a rank is gone, or shapes differ.
    pub fn sum_gradients(&self, gradients: Gradients) -> Result<Gradients> {
        let Some(Others { ranks, clocks }) = self.0.as_deref() else { return Ok(gradients) };
        let layers = gradients.layers.len();
        let mut sum = gradients.into_slots()?;
        let _waiting = clocks.waiting();
        if ranks.rank() > 0 {
            let mine = encode(&sum)?;
            drop(sum);
            ranks.send(0, &mine)?;
            drop(mine);
            return Gradients::from_slots(layers, decode(&ranks.receive(0)?)?);
        }
        for from in 1..ranks.size() {
            // One message at a time is held.
            let more = decode(&ranks.receive(from)?)?;
            ensure!(sum.len() == more.len(), "ranks sum {} and {} gradients", sum.len(), more.len());
            for (one, other) in sum.iter_mut().zip(more) {
                *one = match (one.take(), other) {
                    (Some(one), Some(other)) => Some((one + other)?),
                    (one, other) => one.or(other),
                };
            }
        }
        let all = encode(&sum)?;
        (1..ranks.size()).try_for_each(|to| ranks.send(to, &all))?;
        Gradients::from_slots(layers, sum)
    }

    /// What rank 0 found by `find`, on every rank.
    ///
    /// # Errors
    /// Those of `find`, on every rank; if rank 0 is gone.
    pub fn first<T: Serialize + DeserializeOwned>(&self, find: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(Others { ranks, clocks }) = self.0.as_deref() else { return find() };
        if ranks.rank() > 0 {
            let _waiting = clocks.waiting();
            let found: std::result::Result<T, Failure> = serde_json::from_slice(&ranks.receive(0)?)?;
            return found.map_err(|failure| failure.error(0));
        }
        let found = find();
        let said = serde_json::to_vec(&found.as_ref().map_err(Failure::of)).context("what rank 0 found")?;
        (1..ranks.size()).try_for_each(|to| ranks.send(to, &said))?;
        found
    }

    /// As [`World::first`] of something outside this process, for which rank 0 waits, too: its time is no work.
    ///
    /// # Errors
    /// As for [`World::first`].
    pub fn first_waiting<T: Serialize + DeserializeOwned>(&self, find: impl FnOnce() -> Result<T>) -> Result<T> {
        let _waiting = self.0.as_deref().filter(|_| self.is_first()).map(|others| others.clocks.waiting());
        self.first(find)
    }

    /// A rank's own outcome where all ranks succeeded; else the failure of the first rank that failed, on every rank.
    ///
    /// # Errors
    /// That failure; if a rank is gone.
    pub fn agree<T>(&self, outcome: Result<T>) -> Result<T> {
        if self.is_alone() {
            return outcome;
        }
        let mine = match &outcome {
            Ok(_) => vec![],
            Err(error) => serde_json::to_vec(&(self.rank(), Failure::of(error)))?,
        };
        let said = self.fold(mine, |all, more| {
            if all.is_empty() {
                *all = more.to_vec();
            }
            Ok(())
        })?;
        if said.is_empty() {
            return outcome;
        }
        let (rank, failure): (usize, Failure) = serde_json::from_slice(&said)?;
        match outcome {
            Err(error) if rank == self.rank() => Err(error),
            _ => Err(failure.error(rank)),
        }
    }

    /// Calls `make` on rank 0 before it is called on the others, which may then read what rank 0 wrote.
    ///
    /// # Errors
    /// Those of `make`; if a rank is gone.
    pub fn first_then_others<T>(&self, make: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.is_first() {
            let made = make()?;
            self.barrier()?;
            return Ok(made);
        }
        self.barrier()?;
        make()
    }

    /// Checks that the weights of all ranks are equal, as they are after the same steps on the same kind of processor.
    ///
    /// # Errors
    /// If they are not; if a rank is gone.
    pub fn check_equal(&self, weights: &[Tensor]) -> Result<()> {
        if self.is_alone() {
            return Ok(());
        }
        let mut digest = 0;
        for weight in weights {
            let weight = weight.contiguous()?;
            for value in cpu::view(&weight)?.iter() {
                digest = crc32c::crc32c_append(digest, &value.to_le_bytes());
            }
        }
        let all = self.concat(vec![f64::from(digest)])?;
        let other = all.iter().position(|&one| one != all[0]);
        ensure!(
            other.is_none(),
            "rank {} holds other weights than rank 0 after the same steps: start all ranks on machines of one kind",
            other.unwrap_or(0)
        );
        Ok(())
    }
}

fn bytes_of(values: &[f64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn doubles(bytes: &[u8]) -> impl Iterator<Item = f64> {
    bytes.as_chunks().0.iter().map(|&eight| f64::from_le_bytes(eight))
}

/// Tensors as their shapes in JSON behind that text's length, and their values.
fn encode(tensors: &[Option<Tensor>]) -> Result<Vec<u8>> {
    let shapes: Vec<Option<&[usize]>> = tensors.iter().map(|tensor| tensor.as_ref().map(Tensor::dims)).collect();
    let head = serde_json::to_vec(&shapes)?;
    let numbers: usize = tensors.iter().flatten().map(Tensor::elem_count).sum();
    let mut bytes = Vec::with_capacity(size_of::<u64>() + head.len() + numbers * size_of::<f32>());
    bytes.extend((head.len() as u64).to_le_bytes());
    bytes.extend(head);
    for tensor in tensors.iter().flatten() {
        let tensor = tensor.contiguous()?;
        bytes.extend(cpu::view(&tensor)?.iter().flat_map(|value| value.to_le_bytes()));
    }
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Result<Vec<Option<Tensor>>> {
    let (length, rest) = bytes.split_first_chunk().context("a message without a head")?;
    let (head, values) = rest.split_at_checked(u64::from_le_bytes(*length) as usize).context("a cut message")?;
    let shapes: Vec<Option<Vec<usize>>> = serde_json::from_slice(head)?;
    let mut values = values.as_chunks().0.iter().map(|&four| f32::from_le_bytes(four));
    let one = |shape: Option<Vec<usize>>| {
        shape
            .map(|shape| {
                let data: Vec<f32> = values.by_ref().take(shape.iter().product()).collect();
                Ok(Tensor::from_vec(data, shape, &Device::Cpu)?)
            })
            .transpose()
    };
    shapes.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests;
