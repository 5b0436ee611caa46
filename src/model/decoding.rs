//! Decoding steps of a batch: from one token per sequence to the next, drawn. On a device the launches of a step are recorded
//! and issued again as one piece, as long as the sequences stay the same and their arguments can. What changes at every step
//! (tokens, positions, lengths, draws) lies in one input on the device, which is written before each step. It does not depend
//! on prompts or stop tokens. Read `generate.rs` for the use, and `device/graph.rs` for recordings.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::base::KvCache;
use super::batch::Batch;
use super::roles::Policy;
use crate::device::{Array, Device, Element, Inputs, Matrix, Recording};
use crate::ops::logprobs::Logits;
use crate::ops::rope::gpu::DeviceRopeTable;
use crate::ops::sample::{Distribution, Pending, Sampler};

/// A batch under generation.
pub struct Decoding<'p> {
    policy: Policy<'p>,
    cache: KvCache,
    sampler: Sampler,
    by: Distribution,
    /// The hidden states (S, D) that the newest tokens were drawn from.
    hidden: Option<Array>,
    recorded: Option<Recorded>,
    /// The shape of the step before, if it could have been recorded.
    last: Option<Shape>,
    /// How many more steps are tried after one that could not be recorded.
    tries: usize,
}

/// A step that can be issued again, and what it leaves on the device.
struct Recorded {
    shape: Shape,
    recording: Recording,
    input: Matrix,
    logits: Logits,
    pending: Pending,
}

/// What the launches of a step depend on, beside the input.
#[derive(Clone)]
struct Shape {
    sequences: usize,
    /// Chunks of the cache, as `attention::NextStep` has them.
    chunks: usize,
    rope_tables: Vec<Arc<DeviceRopeTable>>,
}

impl PartialEq for Shape {
    fn eq(&self, other: &Self) -> bool {
        let tables = || self.rope_tables.iter().zip(&other.rope_tables);
        (self.sequences, self.chunks, self.rope_tables.len())
            == (other.sequences, other.chunks, other.rope_tables.len())
            && tables().all(|(ours, theirs)| Arc::ptr_eq(ours, theirs))
    }
}

/// The arrays of a step's input, under the names by which operations ask for them. The draws are the first: they are f64.
struct Parts(Vec<(&'static str, Vec<u32>)>);

impl Parts {
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
        let (hidden, cache) = policy.base().prefill(prompts, sources, policy.adapter(), capacity)?;
        let sampler = Sampler::default();
        // Copies of layers that the device does not keep are no launches.
        let tries = if policy.base().streams() { 0 } else { 2 };
        Ok(Self { policy, cache, sampler, by, hidden: Some(hidden), recorded: None, last: None, tries })
    }

    /// The cache.
    pub fn cache(&mut self) -> &mut KvCache {
        &mut self.cache
    }

    /// Keeps the sequences s for which `keep[s]` is true.
    pub fn retain(&mut self, keep: &[bool]) {
        self.cache.retain(keep);
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
        let hidden = self.hidden.as_ref().context("tokens after the prompts are drawn before the first step")?;
        let logits = self.policy.base().logits_in_place(hidden, self.policy.adapter())?;
        self.sampler.sample(&logits, self.by, draws)
    }

    /// The tokens after `tokens` (S), which are the newest of their sequences and stand at `positions` (S).
    ///
    /// # Errors
    /// If a sequence would be longer than the context, the logits are NaN or infinite, or a device fails.
    pub fn step(&mut self, tokens: &[u32], positions: &[u32], draws: &[f64]) -> Result<Vec<(u32, f32)>> {
        let base = self.policy.base();
        let next = if self.tries > 0 { self.cache.next_step()? } else { None };
        let (Some(device), Some(next)) = (base.place(), next) else {
            (self.recorded, self.last) = (None, None);
            return self.eager(tokens, positions, draws);
        };
        let longest = positions.iter().max().map_or(0, |&p| p as usize + 1);
        base.check(self.policy.adapter(), longest)?;
        let vocab = base.config().vocab_size;
        ensure!(tokens.iter().all(|&t| (t as usize) < vocab), "a token is past the vocabulary of {vocab}");
        let rope_tables = base.rope_tables_on(device, longest.saturating_sub(1))?;
        let shape = Shape { sequences: tokens.len(), chunks: next.chunks, rope_tables };
        let mut parts = Parts(vec![
            ("draws", Sampler::draws_as_input(draws)),
            ("embedding", tokens.to_vec()),
            ("positions", positions.to_vec()),
            ("cache", next.numbers),
        ]);
        if let Some(first) = base.config().learned_positions {
            parts.0.push(("embedding", positions.iter().map(|p| p + first as u32).collect()));
        }
        match &self.recorded {
            Some(recorded) if recorded.shape == shape => match self.again(recorded, &parts) {
                Ok(()) => {
                    self.cache.advance()?;
                    let Some(Recorded { logits, pending, .. }) = &self.recorded else { unreachable!("matched above") };
                    return self.sampler.finish(logits, pending, self.by, draws);
                }
                // The launches one by one do it, or report what is wrong.
                Err(error) => {
                    device.stop_recording(&error);
                    (self.recorded, self.tries) = (None, 0);
                    return self.eager(tokens, positions, draws);
                }
            },
            _ => self.recorded = None,
        }
        // A recording pays from the second replay on, so only the second step of a shape is recorded.
        if self.last.as_ref() != Some(&shape) || !parts.are_distinct() {
            self.last = Some(shape);
            return self.eager(tokens, positions, draws);
        }
        self.hidden = None;
        let input = device.matrix(Element::U32, parts.numbers().len(), 1)?;
        input.write_u32(&parts.numbers())?;
        let inputs = parts.provide(device, &input)?;
        let ((logits, pending), recording) = device.record(|| {
            let (policy, cache) = (self.policy, &mut self.cache);
            let hidden = policy.base().decode(tokens, positions, policy.adapter(), cache)?;
            let logits = policy.base().logits_in_place(&hidden, policy.adapter())?;
            let pending = self.sampler.begin(&logits, self.by, draws)?;
            Ok((logits, pending))
        })?;
        drop(inputs);
        let sampled = self.sampler.finish(&logits, &pending, self.by, draws);
        match recording {
            Some(recording) => self.recorded = Some(Recorded { shape, recording, input, logits, pending }),
            None => self.tries -= 1,
        }
        sampled
    }

    /// Issues the recorded step with other numbers in its input.
    fn again(&self, recorded: &Recorded, parts: &Parts) -> Result<()> {
        recorded.input.write_u32(&parts.numbers())?;
        // SAFETY: the policy's weights and adapter are borrowed, and their copies on the device stay with them; `self` has the
        // cache, which has not grown (it would have no `next_step`), and `recorded` the input, the tables and the results.
        unsafe { recorded.recording.replay() }
    }

    fn eager(&mut self, tokens: &[u32], positions: &[u32], draws: &[f64]) -> Result<Vec<(u32, f32)>> {
        let (base, adapter) = (self.policy.base(), self.policy.adapter());
        self.hidden = Some(base.decode(tokens, positions, adapter, &mut self.cache)?);
        let Some(hidden) = &self.hidden else { unreachable!("just computed") };
        let logits = base.logits_in_place(hidden, adapter)?;
        self.sampler.sample(&logits, self.by, draws)
    }
}
