//! Sampling from logits: temperature, top-k, top-p; the token and its log-probability. Formula, checks, dispatch.
//!
//! p = softmax(l / T). top_k keeps the k most likely tokens, top_p then the most likely of those whose probabilities
//! sum to top_p; a uniform draw selects a token in proportion to p. T = 0 is greedy: the most likely token. It does not
//! depend on models or on random number generators. Read `cpu.rs` and `gpu.rs` beside it, then `model/generate.rs` for the
//! use.

mod cpu;
mod gpu;

use anyhow::{Context, Result};

use crate::device::Matrix;
use crate::ops::cpu::view;
use crate::ops::logprobs::Logits;

/// The distribution that tokens are drawn from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distribution {
    /// T divides the logits; 0 is greedy.
    pub temperature: f64,
    /// Only the k most likely tokens are drawn; 0: all.
    pub top_k: usize,
    /// Only the most likely tokens whose probabilities sum to p are drawn; 1: all.
    pub top_p: f64,
}

impl Distribution {
    /// 1 / T, and 1 if greedy.
    fn inverse(self) -> f32 {
        if self.temperature > 0.0 { (1.0 / self.temperature) as f32 } else { 1.0 }
    }
}

/// A token, and what its log-probability is made of.
#[derive(Clone, Copy, Debug)]
struct Drawn {
    token: u32,
    /// (l - max l) / T of the token.
    shifted: f32,
    /// The sum of e^((l - max l) / T) over the vocabulary.
    sum: f32,
}

impl Drawn {
    /// The token and its log-probability, nats.
    fn with_logprob(self) -> (u32, f32) {
        (self.token, self.shifted - self.sum.ln())
    }
}

/// Log-probabilities of one row of logits (vocab), nats, under softmax(l / T): of `token`, and of the `count` most likely tokens,
/// the most likely first and of equals the lower id.
///
/// # Errors
/// If logits are NaN or infinite, or the token is past the vocabulary.
pub fn ranked(row: &[f32], temperature: f64, token: u32, count: usize) -> Result<(f32, Vec<(u32, f32)>)> {
    let inverse = Distribution { temperature, top_k: 0, top_p: 1.0 }.inverse();
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|l| f64::from((l - top) * inverse).exp()).sum();
    anyhow::ensure!(sum.is_finite() && (token as usize) < row.len(), "no log-probability of token {token}");
    let logprob = |token: u32| (f64::from((row[token as usize] - top) * inverse) - sum.ln()) as f32;
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    let by_logit = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count, by_logit);
        order.truncate(count);
    }
    order.sort_unstable_by(by_logit);
    Ok((logprob(token), order.into_iter().map(|token| (token, logprob(token))).collect()))
}

/// Draws that a device makes; none for the host.
pub struct Pending(Option<Matrix>);

impl Pending {
    /// Whether a device draws, so that the next step can begin before the host has read the tokens.
    pub fn is_on_device(&self) -> bool {
        self.0.is_some()
    }

    /// Keeps the results in `kept` (S, 4) u32 on the device and writes the input of the next step: `next` (N) over `input` (N),
    /// both u32, with the drawn tokens in place of its numbers from `tokens` on. Without a next step it only keeps.
    ///
    /// # Errors
    /// If shapes do not fit, the host draws, or the launch fails.
    pub fn turn(&self, kept: &Matrix, next: Option<(&Matrix, &Matrix)>, tokens: usize) -> Result<()> {
        let drawn = self.0.as_ref().context("the host draws these tokens")?;
        gpu::turn(drawn, kept, next, tokens)
    }
}

/// Waits for the tokens of steps, kept one after the other by [`Pending::turn`], and their log-probabilities, nats; `None` in place
/// of those that the host has to draw.
///
/// # Errors
/// If the download fails.
pub fn read_kept(kept: &Matrix) -> Result<Vec<Option<(u32, f32)>>> {
    Ok(gpu::finish(kept)?.into_iter().map(|drawn| drawn.map(Drawn::with_logprob)).collect())
}

/// Draws tokens from logits; keeps its buffers between calls.
#[derive(Default)]
pub struct Sampler {
    buffers: cpu::Buffers,
}

impl Sampler {
    /// One token per row of `logits` (S, vocab), and its log-probability under softmax(l / T) over the whole vocabulary
    /// (T = 1 if greedy), nats. `draws` (S): uniform numbers in [0, 1).
    ///
    /// Logits on a device stay there, and tokens and log-probabilities are those of the host in every bit. The host draws
    /// from downloaded logits where that cannot be: all rows for a top-k of more than 1,024 (but less than the vocabulary)
    /// and vocabularies above 524,288 tokens; single rows where top-p leaves more than 1,024 tokens, or the draw is so near
    /// to the boundary of two tokens that the order of sums decides.
    ///
    /// # Errors
    /// If shapes do not fit, or logits are NaN or infinite.
    pub fn sample(&mut self, logits: &Logits, distribution: Distribution, draws: &[f64]) -> Result<Vec<(u32, f32)>> {
        let pending = self.begin(logits, distribution, draws)?;
        self.finish(logits, &pending, distribution, draws)
    }

    /// As [`Sampler::sample`], each row from a distribution of its own, `by` (S).
    ///
    /// # Errors
    /// As for [`Sampler::sample`].
    pub fn sample_each(&mut self, logits: &Logits, by: &[Distribution], draws: &[f64]) -> Result<Vec<(u32, f32)>> {
        let (s, vocab) = logits.dims2()?;
        anyhow::ensure!(by.len() == s && draws.len() == s, "{} distributions for logits ({s}, {vocab})", by.len());
        if let [first, others @ ..] = by
            && others.iter().all(|other| other == first)
        {
            return self.sample(logits, *first, draws);
        }
        if logits.on_device().is_none() {
            let all = logits.to_host()?;
            let rows = view(&all)?;
            let rows = rows.chunks_exact(vocab).zip(by).zip(draws);
            return rows.map(|((row, &by), &draw)| Ok(self.on_host(row, by, draw)?.with_logprob())).collect();
        }
        // Neighbours of one distribution are drawn at once, and all draws are under way before the first is waited for.
        let (mut begun, mut at) = (vec![], 0);
        for run in by.chunk_by(|a, b| a == b) {
            let rows = at..at + run.len();
            at = rows.end;
            let part = logits.rows(rows.clone())?;
            let pending = self.begin(&part, run[0], &draws[rows.clone()])?;
            begun.push((part, pending, run[0], rows));
        }
        let mut sampled = Vec::with_capacity(s);
        for (part, pending, by, rows) in begun {
            sampled.extend(self.finish(&part, &pending, by, &draws[rows])?);
        }
        Ok(sampled)
    }

    /// The first half of [`Sampler::sample`]: what a device does, without waiting for it.
    ///
    /// # Errors
    /// If shapes do not fit, or device memory is out.
    pub fn begin(&self, logits: &Logits, distribution: Distribution, draws: &[f64]) -> Result<Pending> {
        let (s, vocab) = logits.dims2()?;
        anyhow::ensure!(s == draws.len() && vocab > 0, "{} draws for logits ({s}, {vocab})", draws.len());
        Ok(Pending(gpu::begin(logits, distribution, draws)?))
    }

    /// The second half of [`Sampler::sample`].
    ///
    /// # Errors
    /// If logits are NaN or infinite, or a download fails.
    pub fn finish(
        &mut self,
        logits: &Logits,
        pending: &Pending,
        distribution: Distribution,
        draws: &[f64],
    ) -> Result<Vec<(u32, f32)>> {
        let Some(drawn) = &pending.0 else {
            let (all, (_, vocab)) = (logits.to_host()?, logits.dims2()?);
            let rows = view(&all)?;
            let rows = rows.chunks_exact(vocab).zip(draws);
            return rows.map(|(row, &draw)| Ok(self.on_host(row, distribution, draw)?.with_logprob())).collect();
        };
        let row = |(i, (drawn, &draw)): (usize, (Option<Drawn>, &f64))| match drawn {
            Some(drawn) => Ok(drawn.with_logprob()),
            None => Ok(self.on_host(&view(&logits.row(i)?.to_host()?)?, distribution, draw)?.with_logprob()),
        };
        gpu::finish(drawn)?.into_iter().zip(draws).enumerate().map(row).collect()
    }

    /// The words of the input "draws" that the kernels read.
    pub fn draws_as_input(draws: &[f64]) -> Vec<u32> {
        gpu::words(draws)
    }

    fn on_host(&mut self, row: &[f32], distribution: Distribution, draw: f64) -> Result<Drawn> {
        self.buffers.sample_row(row, distribution, draw)
    }
}
