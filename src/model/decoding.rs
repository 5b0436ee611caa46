//! Decoding steps of a batch: from one token per sequence to the next, drawn. On a device the launches of a step are recorded
//! and issued again as one piece, as long as the sequences stay the same and their arguments can. What changes at every step
//! (tokens, positions, lengths, draws) lies in one input on the device, which is written before each step; of several steps in a
//! row a kernel writes it from the tokens of the step before, so that the host waits once for all of them. It does not depend on
//! prompts or stop tokens. Read `generate.rs` for the use, and `device/graph.rs` for recordings.

use std::ops::Deref;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::adapter::Adapter;
use super::base::Base;
use super::batch::Batch;
use super::kv_cache::KvCache;
use super::roles::Policy;
use crate::device::{Array, Device, Element, Inputs, Matrix, Recording};
use crate::ops::logprobs::Logits;
use crate::ops::rope::gpu::DeviceRopeTable;
use crate::ops::sample::{Distribution, Pending, Sampler, read_kept};

/// An adapter that a batch is generated with.
enum Held<'p> {
    Borrowed(&'p Adapter),
    /// One that others may let go of before the batch ends.
    Shared(Arc<Adapter>),
}

impl Deref for Held<'_> {
    type Target = Adapter;

    fn deref(&self) -> &Adapter {
        match self {
            Self::Borrowed(adapter) => adapter,
            Self::Shared(adapter) => adapter,
        }
    }
}

/// What reads the logits (S, vocab) of a step and the tokens that were drawn from them, with their log-probabilities.
pub type Read<'r> = dyn FnMut(&Logits, &mut [(u32, f32)]) -> Result<()> + 'r;

/// A batch under generation.
pub struct Decoding<'p> {
    base: &'p Base,
    adapter: Option<Held<'p>>,
    cache: KvCache,
    sampler: Sampler,
    /// What each sequence's tokens are drawn from, (S).
    by: Vec<Distribution>,
    /// The hidden states (S, D) that the newest tokens were drawn from.
    hidden: Option<Array>,
    recorded: Option<Recorded>,
    /// The shape of the step before, if it could have been recorded.
    last: Option<Shape>,
    /// How many more steps are tried after one that could not be recorded.
    tries: usize,
    /// How many of the next steps run by themselves, since the host had to draw a token within several in a row: the next time for
    /// twice as many, `caution`.
    alone: usize,
    caution: usize,
}

/// A step that can be issued again, and what it leaves on the device.
struct Recorded {
    shape: Shape,
    recording: Recording,
    input: Matrix,
    logits: Logits,
    pending: Pending,
    /// Inputs of the steps after the next one, (AHEAD - 1) rows, and the results (S, 4) of each, AHEAD rows.
    ahead: Option<(Matrix, Matrix)>,
}

/// The most steps that are issued before the host reads their tokens. A sequence that ends within them has been computed further
/// for nothing, so more would cost what waiting less saves.
pub const AHEAD: usize = 4;

/// The most steps that run by themselves after several in a row of which the host had to draw a token: distributions that the
/// device cannot draw from come often or never.
const MOST_ALONE: usize = 64;

/// What the launches of a step depend on, beside the input.
#[derive(Clone)]
struct Shape {
    sequences: usize,
    /// Chunks of the cache, as `attention::NextStep` has them.
    chunks: usize,
    by: Distribution,
    rope_tables: Vec<Arc<DeviceRopeTable>>,
}

impl PartialEq for Shape {
    fn eq(&self, other: &Self) -> bool {
        let tables = || self.rope_tables.iter().zip(&other.rope_tables);
        (self.sequences, self.chunks, self.by, self.rope_tables.len())
            == (other.sequences, other.chunks, other.by, other.rope_tables.len())
            && tables().all(|(ours, theirs)| Arc::ptr_eq(ours, theirs))
    }
}

/// The arrays of a step's input, under the names by which operations ask for them. The draws are the first: they are f64.
struct Parts(Vec<(&'static str, Vec<u32>)>);

impl Parts {
    /// Where the tokens of S sequences begin: after the draws, two words each.
    const fn tokens_at(sequences: usize) -> usize {
        2 * sequences
    }

    /// Two arrays of one name with the same numbers cannot be told apart while a step is recorded.
    fn are_distinct(&self) -> bool {
        self.0.iter().enumerate().all(|(i, part)| !self.0[..i].contains(part))
    }

    fn numbers(&self) -> Vec<u32> {
        self.0.iter().flat_map(|(_, numbers)| numbers).copied().collect()
    }

    /// Operations of this thread find the parts in `input`, which has them one after the other.
    fn provide(self, device: &Device, input: &Matrix) -> Result<Inputs> {
        let (mut at, mut provided) = (0, vec![]);
        for (name, numbers) in self.0 {
            let end = at + numbers.len();
            let part = input.row_range(at..end)?.reshape(1, numbers.len())?;
            provided.push((name, numbers, part));
            at = end;
        }
        Ok(device.provide(provided))
    }
}

impl<'p> Decoding<'p> {
    /// Runs the prompts: `sources` (S) are each response's prompt in the batch, `capacity` is the number of tokens per response
    /// that the cache begins with room for.
    ///
    /// # Errors
    /// As for `Base::prefill`.
    pub fn start(
        policy: Policy<'p>,
        prompts: &Batch,
        sources: &[usize],
        capacity: usize,
        by: Distribution,
    ) -> Result<Self> {
        let adapter = policy.adapter().map(Held::Borrowed);
        Self::of(policy.base(), adapter, prompts, sources, capacity, vec![by; sources.len()])
    }

    /// As [`Decoding::start`], with an adapter that the batch keeps for as long as it needs it, and a distribution of its own for
    /// each response, `by` (S).
    ///
    /// # Errors
    /// As for `Base::prefill`.
    pub fn start_shared(
        base: &'p Base,
        adapter: Option<Arc<Adapter>>,
        prompts: &Batch,
        sources: &[usize],
        capacity: usize,
        by: Vec<Distribution>,
    ) -> Result<Self> {
        ensure!(by.len() == sources.len(), "{} distributions for {} responses", by.len(), sources.len());
        Self::of(base, adapter.map(Held::Shared), prompts, sources, capacity, by)
    }

    fn of(
        base: &'p Base,
        adapter: Option<Held<'p>>,
        prompts: &Batch,
        sources: &[usize],
        capacity: usize,
        by: Vec<Distribution>,
    ) -> Result<Self> {
        let (hidden, cache) = base.prefill(prompts, sources, adapter.as_deref(), capacity)?;
        let sampler = Sampler::default();
        // Copies of layers that the device does not keep are no launches.
        let tries = if base.streams() { 0 } else { 2 };
        Ok(Self {
            base,
            adapter,
            cache,
            sampler,
            by,
            hidden: Some(hidden),
            recorded: None,
            last: None,
            tries,
            alone: 0,
            caution: 0,
        })
    }

    /// The cache.
    pub fn cache(&mut self) -> &mut KvCache {
        &mut self.cache
    }

    /// Keeps the sequences s for which `keep[s]` is true.
    pub fn retain(&mut self, keep: &[bool]) {
        self.cache.retain(keep);
        let mut flags = keep.iter();
        self.by.retain(|_| *flags.next().unwrap_or(&true));
    }

    /// Takes over the sequences of another batch of this base and adapter, whose first tokens are drawn; they come after its own.
    /// After an error the batch is not usable.
    ///
    /// # Errors
    /// If base or adapter is another, or device memory is out.
    pub fn join(&mut self, other: Self) -> Result<()> {
        let same = match (self.adapter.as_deref(), other.adapter.as_deref()) {
            (Some(ours), Some(theirs)) => std::ptr::eq(ours, theirs),
            (None, None) => true,
            _ => false,
        };
        ensure!(same && std::ptr::eq(self.base, other.base), "batches of different policies cannot be joined");
        // The cache may move, and a recorded step reads it where it was.
        (self.recorded, self.last, self.hidden) = (None, None, None);
        self.by.extend(other.by);
        self.cache.join(other.cache)
    }

    /// Whether the next step like the one before is issued as one piece, or will never be.
    pub fn is_settled(&self) -> bool {
        self.recorded.is_some() || self.tries == 0
    }

    /// A token for each prompt and its log-probability, as [`Sampler::sample`] of `draws` (S).
    ///
    /// # Errors
    /// If the logits are NaN or infinite, or a device fails.
    pub fn first(&mut self, draws: &[f64]) -> Result<Vec<(u32, f32)>> {
        self.first_reading(draws, &mut |_, _| Ok(()))
    }

    /// As [`Decoding::first`]; `read` gets the logits (S, vocab) and what was drawn, which it may change.
    ///
    /// # Errors
    /// As for [`Decoding::first`]; the error of `read`.
    pub fn first_reading(&mut self, draws: &[f64], read: &mut Read<'_>) -> Result<Vec<(u32, f32)>> {
        let hidden = self.hidden.as_ref().context("tokens after the prompts are drawn before the first step")?;
        let logits = self.base.logits_in_place(hidden, self.adapter.as_deref())?;
        let mut sampled = self.sampler.sample_each(&logits, &self.by, draws)?;
        read(&logits, &mut sampled)?;
        Ok(sampled)
    }

    /// The tokens after `tokens` (S), which are the newest of their sequences and stand at `positions` (S).
    ///
    /// # Errors
    /// If a sequence would be longer than the context, the logits are NaN or infinite, or a device fails.
    pub fn step(&mut self, tokens: &[u32], positions: &[u32], draws: &[f64]) -> Result<Vec<(u32, f32)>> {
        self.step_reading(tokens, positions, draws, &mut |_, _| Ok(()))
    }

    /// As [`Decoding::step`]; `read` gets the logits (S, vocab) and what was drawn, which it may change.
    ///
    /// # Errors
    /// As for [`Decoding::step`]; the error of `read`.
    pub fn step_reading(
        &mut self,
        tokens: &[u32],
        positions: &[u32],
        draws: &[f64],
        read: &mut Read<'_>,
    ) -> Result<Vec<(u32, f32)>> {
        let base = self.base;
        let (Some(device), Some((shape, parts))) = (base.place(), self.next(tokens, positions, draws, 0)?) else {
            (self.recorded, self.last) = (None, None);
            return self.eager(tokens, positions, draws, read);
        };
        let by = shape.by;
        match &self.recorded {
            Some(recorded) if recorded.shape == shape => match self.again(recorded, &parts) {
                Ok(()) => {
                    self.cache.advance()?;
                    let Some(Recorded { logits, pending, .. }) = &self.recorded else { unreachable!("matched above") };
                    let mut sampled = self.sampler.finish(logits, pending, by, draws)?;
                    read(logits, &mut sampled)?;
                    return Ok(sampled);
                }
                // The launches one by one do it, or report what is wrong.
                Err(error) => {
                    device.stop_recording(&error);
                    (self.recorded, self.tries) = (None, 0);
                    return self.eager(tokens, positions, draws, read);
                }
            },
            _ => self.recorded = None,
        }
        // A recording pays from the second replay on, so only the second step of a shape is recorded.
        if self.last.as_ref() != Some(&shape) || !parts.are_distinct() {
            self.last = Some(shape);
            return self.eager(tokens, positions, draws, read);
        }
        self.hidden = None;
        let input = device.matrix(Element::U32, parts.numbers().len(), 1)?;
        input.write_u32(&parts.numbers())?;
        let inputs = parts.provide(device, &input)?;
        let ((logits, pending), recording) = device.record(|| {
            let (adapter, cache) = (self.adapter.as_deref(), &mut self.cache);
            let hidden = base.decode(tokens, positions, adapter, cache)?;
            let logits = base.logits_in_place(&hidden, adapter)?;
            let pending = self.sampler.begin(&logits, by, draws)?;
            Ok((logits, pending))
        })?;
        drop(inputs);
        let mut sampled = self.sampler.finish(&logits, &pending, by, draws)?;
        read(&logits, &mut sampled)?;
        match recording {
            Some(recording) => {
                let numbers = |rows: usize, cols: usize| device.matrix(Element::U32, rows, cols);
                let ahead = match pending.is_on_device() {
                    true => Some((numbers(AHEAD - 1, input.len())?, numbers(AHEAD, 4 * shape.sequences)?)),
                    false => None,
                };
                self.recorded = Some(Recorded { shape, recording, input, logits, pending, ahead });
            }
            None => self.tries -= 1,
        }
        Ok(sampled)
    }

    /// As [`Decoding::step`], and up to `most` steps in a row, at most [`AHEAD`], if a device can begin each before the host has
    /// read the tokens of the one before. `draws(i)` (S) are those of the i-th step. One result or more, in order: the same
    /// tokens and log-probabilities as of steps one by one.
    ///
    /// # Errors
    /// As for [`Decoding::step`].
    pub fn steps(
        &mut self,
        tokens: &[u32],
        positions: &[u32],
        most: usize,
        draws: impl Fn(usize) -> Vec<f64>,
    ) -> Result<Vec<Vec<(u32, f32)>>> {
        let longest = positions.iter().max().map_or(0, |&p| p as usize);
        let room = self.base.config().max_position_embeddings.saturating_sub(longest);
        let most = if self.alone > 0 { 1 } else { most.min(AHEAD).min(room) };
        self.alone = self.alone.saturating_sub(1);
        let inputs = self.repeatable(tokens, positions, most, &draws)?;
        if inputs.len() > 1
            && let (Some(device), Some(recorded)) = (self.base.place(), &self.recorded)
        {
            match self.run(recorded, &inputs) {
                Ok(kept) => {
                    let steps = kept.chunks(tokens.len()).map(|step| step.iter().copied().collect::<Option<Vec<_>>>());
                    let drawn: Vec<Vec<(u32, f32)>> = steps.map_while(|step| step).collect();
                    (0..drawn.len()).try_for_each(|_| self.cache.advance())?;
                    let is_whole = drawn.len() == inputs.len();
                    self.caution = if is_whole { self.caution / 2 } else { (2 * self.caution).clamp(1, MOST_ALONE) };
                    self.alone = if is_whole { 0 } else { self.caution };
                    if !drawn.is_empty() {
                        return Ok(drawn);
                    }
                }
                Err(error) => {
                    device.stop_recording(&error);
                    (self.recorded, self.tries) = (None, 0);
                }
            }
        }
        Ok(vec![self.step(tokens, positions, &draws(0))?])
    }

    /// The inputs of as many of the next `most` steps as the recorded one can be issued for, in order. Tokens after the first
    /// step's are 0 here.
    fn repeatable(
        &self,
        tokens: &[u32],
        positions: &[u32],
        most: usize,
        draws: &impl Fn(usize) -> Vec<f64>,
    ) -> Result<Vec<Vec<u32>>> {
        let mut inputs = vec![];
        let Some(recorded) = self.recorded.as_ref().filter(|recorded| recorded.ahead.is_some() && most > 1) else {
            return Ok(inputs);
        };
        let unknown = vec![0; tokens.len()];
        while inputs.len() < most {
            let ahead = inputs.len();
            let tokens = if ahead == 0 { tokens } else { &unknown };
            let positions: Vec<u32> = positions.iter().map(|position| position + ahead as u32).collect();
            match self.next(tokens, &positions, &draws(ahead), ahead)? {
                Some((shape, parts)) if shape == recorded.shape => inputs.push(parts.numbers()),
                _ => break,
            }
        }
        Ok(inputs)
    }

    /// Issues the recorded step once for each input, and waits for the tokens and log-probabilities of all, (steps * S). `None`
    /// is a token that the host has to draw; what follows in its sequence means nothing.
    fn run(&self, recorded: &Recorded, inputs: &[Vec<u32>]) -> Result<Vec<Option<(u32, f32)>>> {
        let (later, kept) = recorded.ahead.as_ref().context("steps ahead of tokens that the host draws")?;
        let (Some((first, others)), steps) = (inputs.split_first(), inputs.len()) else { return Ok(vec![]) };
        recorded.input.write_u32(first)?;
        later.row_range(0..steps - 1)?.write_u32(&others.concat())?;
        for step in 0..steps {
            // SAFETY: as in `again`.
            unsafe { recorded.recording.replay()? };
            let next = if step + 1 < steps { Some(later.row_range(step..step + 1)?) } else { None };
            let next = next.as_ref().map(|next| (next, &recorded.input));
            recorded.pending.turn(
                &kept.row_range(step..step + 1)?,
                next,
                Parts::tokens_at(recorded.shape.sequences),
            )?;
        }
        read_kept(&kept.row_range(0..steps)?)
    }

    /// What the launches of the next step, or of the `ahead`-th after it, depend on, and its input; `None` if it cannot be
    /// recorded.
    ///
    /// # Errors
    /// If a sequence would be longer than the context, or a token is past the vocabulary.
    fn next(&self, tokens: &[u32], positions: &[u32], draws: &[f64], ahead: usize) -> Result<Option<(Shape, Parts)>> {
        let base = self.base;
        // Launches that draw from several distributions are not recorded.
        let Some((&by, others)) = self.by.split_first() else { return Ok(None) };
        if self.tries == 0 || others.iter().any(|other| *other != by) {
            return Ok(None);
        }
        let (Some(device), Some(next)) = (base.place(), self.cache.next_step(ahead)?) else { return Ok(None) };
        let longest = positions.iter().max().map_or(0, |&p| p as usize + 1);
        base.check(self.adapter.as_deref(), longest)?;
        let vocab = base.config().vocab_size;
        ensure!(tokens.iter().all(|&t| (t as usize) < vocab), "a token is past the vocabulary of {vocab}");
        let rope_tables = base.rope_tables_on(device, longest.saturating_sub(1))?;
        let shape = Shape { sequences: tokens.len(), chunks: next.chunks, by, rope_tables };
        let mut parts = Parts(vec![
            ("draws", Sampler::draws_as_input(draws)),
            ("embedding", tokens.to_vec()),
            ("positions", positions.to_vec()),
            ("cache", next.numbers),
        ]);
        if let Some(first) = base.config().learned_positions {
            parts.0.push(("embedding", positions.iter().map(|p| p + first as u32).collect()));
        }
        Ok(Some((shape, parts)))
    }

    /// Issues the recorded step with other numbers in its input.
    fn again(&self, recorded: &Recorded, parts: &Parts) -> Result<()> {
        recorded.input.write_u32(&parts.numbers())?;
        // SAFETY: the base's weights and the adapter are borrowed or shared, and their copies on the device stay with them; `self`
        // has the cache, which has not grown (it would have no `next_step`, and `join` forgets what was recorded), and `recorded`
        // the input, the tables and the results.
        unsafe { recorded.recording.replay() }
    }

    fn eager(
        &mut self,
        tokens: &[u32],
        positions: &[u32],
        draws: &[f64],
        read: &mut Read<'_>,
    ) -> Result<Vec<(u32, f32)>> {
        self.hidden = Some(self.base.decode(tokens, positions, self.adapter.as_deref(), &mut self.cache)?);
        self.first_reading(draws, read)
    }
}
