//! Sampling from logits: temperature, top-k, top-p; the token and its log-probability. Formula, checks, dispatch.
//!
//! p = softmax(l / T). top_k keeps the k most likely tokens, top_p then the most likely of those whose probabilities
//! sum to top_p; a uniform draw selects a token in proportion to p. T = 0 is greedy: the most likely token. It does not
//! depend on models or on random number generators. Read `cpu.rs` beside it, then `model/generate.rs` for the use.

mod cpu;

use anyhow::Result;
use candle_core::Tensor;

use crate::ops::cpu::view;

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

/// Draws tokens from logits; keeps its buffers between calls.
#[derive(Default)]
pub struct Sampler {
    buffers: cpu::Buffers,
}

impl Sampler {
    /// One token per row of `logits` (S, vocab), and its log-probability under softmax(l / T) over the whole vocabulary
    /// (T = 1 if greedy), nats. `draws` (S): uniform numbers in [0, 1).
    ///
    /// # Errors
    /// If shapes do not fit, or logits are NaN or infinite.
    pub fn sample(&mut self, logits: &Tensor, distribution: Distribution, draws: &[f64]) -> Result<Vec<(u32, f32)>> {
        let (s, vocab) = logits.dims2()?;
        anyhow::ensure!(s == draws.len() && vocab > 0, "{} draws for logits {:?}", draws.len(), logits.dims());
        let rows = view(logits)?;
        let rows = rows.chunks_exact(vocab).zip(draws);
        rows.map(|(row, &draw)| self.buffers.sample_row(row, distribution, draw)).collect()
    }
}
