//! Batched sampling with a cache: finished sequences leave the batch, each sequence has its own random numbers, and the
//! log-probability of every sampled token comes with it. Knows no text; read `tokenizer.rs` for that.

use std::collections::HashMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::batch::Batch;
use super::roles::Policy;
use crate::ops::cpu;
use crate::rng::{SplitMix64, derive};
use crate::{diverged, invalid};

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Only the k most likely tokens; 0 is all.
    pub top_k: usize,
    /// Only the most likely tokens whose probabilities reach p together; 1 is all.
    pub top_p: f64,
    /// At most this many tokens.
    pub max_new_tokens: usize,
    /// Tokens that end a response, and belong to it.
    pub stop: Vec<u32>,
}

/// Why a response ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FinishReason {
    /// A stop token was sampled.
    Stop,
    /// `max_new_tokens`, or the model's context, was reached.
    Length,
}

impl FinishReason {
    /// As other tools' JSON calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// One response.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// Sampled tokens, the stop token included.
    pub tokens: Vec<u32>,
    /// Of each, under softmax(logits / temperature) over the whole vocabulary (temperature 1 where greedy), nats. That
    /// is the distribution that PPO trains; top-k and top-p only restrict what is drawn.
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub finish: FinishReason,
}

/// Tokens that the cache is made for at first; it grows where answers are longer.
pub(crate) const MOST_ROOM: usize = 1024;

/// Samples one response to each prompt. `seeds` (S): the draws of sequence s depend on `seeds[s]` alone, not on what
/// else is in the batch. `on_token(s, token)` is told each token as it comes.
///
/// # Errors
/// If a prompt is empty, leaves no room in the context, or the logits are not finite.
pub fn generate(
    policy: Policy<'_>,
    prompts: &[Vec<u32>],
    seeds: &[u64],
    sampling: &SamplingParams,
    mut on_token: impl FnMut(usize, u32),
) -> Result<Vec<Response>> {
    anyhow::ensure!(prompts.len() == seeds.len(), "{} seeds for {} prompts", seeds.len(), prompts.len());
    let context = policy.base().config().max_position_embeddings;
    if let Some(long) = prompts.iter().map(Vec::len).find(|&len| len >= context) {
        return Err(invalid!(
            "a prompt of {long} tokens leaves no room in the model's context of {context}; shorten it"
        ));
    }
    let empty = || Response { tokens: vec![], logprobs: vec![], finish: FinishReason::Length };
    let mut responses: Vec<Response> = prompts.iter().map(|_| empty()).collect();
    if sampling.max_new_tokens == 0 {
        return Ok(responses);
    }
    // 1. The prompts, all at once; one that several answers share is run once.
    let (mut places, mut distinct) = (HashMap::new(), vec![]);
    let mut place = |prompt| {
        *places.entry(prompt).or_insert_with(|| {
            distinct.push(Vec::clone(prompt));
            distinct.len() - 1
        })
    };
    let sources: Vec<usize> = prompts.iter().map(&mut place).collect();
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let room = sampling.max_new_tokens.min(context - longest).min(MOST_ROOM);
    let (mut hidden, mut cache) = policy.base().prefill(&Batch::new(&distinct)?, &sources, policy.adapter(), room)?;
    let mut live: Vec<usize> = (0..prompts.len()).collect();
    let mut chooser = Sampler::default();
    loop {
        // 2. A token for each live sequence.
        let logits = policy.base().logits(&hidden, policy.adapter())?;
        let mut keep = vec![true; live.len()];
        {
            let logits = cpu::view(&logits)?;
            for (row, &s) in logits.chunks_exact(logits.len() / live.len()).zip(&live) {
                let response = &mut responses[s];
                let draw = SplitMix64::new(derive(seeds[s], &[response.tokens.len() as u64])).uniform();
                let (token, logprob) = chooser.choose(row, sampling, draw)?;
                response.tokens.push(token);
                response.logprobs.push(logprob);
                on_token(s, token);
            }
        }
        drop(logits);
        // 3. Finished sequences leave.
        for (keep, &s) in keep.iter_mut().zip(&live) {
            let response = &mut responses[s];
            let stopped = response.tokens.last().is_some_and(|t| sampling.stop.contains(t));
            response.finish = if stopped { FinishReason::Stop } else { FinishReason::Length };
            let full =
                response.tokens.len() == sampling.max_new_tokens || prompts[s].len() + response.tokens.len() >= context;
            *keep = !stopped && !full;
        }
        if keep.contains(&false) {
            cache.retain(&keep);
            let mut flags = keep.iter();
            live.retain(|_| *flags.next().unwrap_or(&true));
        }
        if live.is_empty() {
            return Ok(responses);
        }
        // 4. The next hidden states.
        let tokens: Vec<u32> = live.iter().filter_map(|&s| responses[s].tokens.last().copied()).collect();
        let positions: Vec<u32> =
            live.iter().map(|&s| (prompts[s].len() + responses[s].tokens.len() - 1) as u32).collect();
        hidden = policy.base().decode(&tokens, &positions, policy.adapter(), &mut cache)?;
    }
}

/// Draws from one row of logits; keeps its buffers for the next.
#[derive(Default)]
struct Sampler {
    weights: Vec<f32>,
    order: Vec<u32>,
}

cpu::vectorised! {
    /// weights = e^((l - top) / T); returns their sum.
    fn exponentials(logits: &[f32], top: f32, inverse_temperature: f32, weights: &mut [f32]) -> f32 {
        let mut lanes = [0f32; 16];
        let (l16, l_rest) = logits.as_chunks::<16>();
        let (w16, w_rest) = weights.as_chunks_mut::<16>();
        for (l, w) in l16.iter().zip(w16) {
            for i in 0..16 {
                w[i] = cpu::exp((l[i] - top) * inverse_temperature);
                lanes[i] += w[i];
            }
        }
        for (i, (l, w)) in l_rest.iter().zip(w_rest).enumerate() {
            *w = cpu::exp((l - top) * inverse_temperature);
            lanes[i] += *w;
        }
        cpu::lane_sum(&lanes)
    }
}

impl Sampler {
    /// The token for a uniform `draw` in [0, 1), and its log-probability.
    fn choose(&mut self, logits: &[f32], sampling: &SamplingParams, draw: f64) -> Result<(u32, f32)> {
        let (best, top) = logits.iter().enumerate().fold(
            (0, f32::NEG_INFINITY),
            |(b, t), (i, &l)| {
                if l > t { (i, l) } else { (b, t) }
            },
        );
        let inverse = if sampling.temperature > 0.0 { (1.0 / sampling.temperature) as f32 } else { 1.0 };
        self.weights.resize(logits.len(), 0.0);
        let sum = exponentials(logits, top, inverse, &mut self.weights);
        if !(sum.is_finite() && top.is_finite()) {
            return Err(diverged!(
                "the logits are not finite: the weights of the base or the adapter have grown past what f32 holds; train \
                 the adapter again with a lower learning_rate"
            ));
        }
        let logprob = |token: usize| (logits[token] - top) * inverse - sum.ln();
        if sampling.temperature <= 0.0 {
            return Ok((best as u32, logprob(best)));
        }
        let token = if sampling.top_k == 0 && sampling.top_p >= 1.0 {
            walk((0..logits.len()).map(|i| (i, self.weights[i])), f64::from(sum), draw)
        } else {
            self.order.clear();
            self.order.extend(0..logits.len() as u32);
            let weights = &self.weights;
            // Most likely first; equals by id, so that the order is total.
            let by_weight = |a: &u32, b: &u32| weights[*b as usize].total_cmp(&weights[*a as usize]).then(a.cmp(b));
            let k = if sampling.top_k == 0 { logits.len() } else { sampling.top_k.min(logits.len()) };
            if k < logits.len() {
                self.order.select_nth_unstable_by(k - 1, by_weight);
                self.order.truncate(k);
            }
            self.order.sort_unstable_by(by_weight);
            let total: f64 = self.order.iter().map(|&i| f64::from(weights[i as usize])).sum();
            let (mut mass, mut kept) = (0f64, 0);
            for &i in &self.order {
                mass += f64::from(weights[i as usize]);
                kept += 1;
                if mass >= sampling.top_p * total {
                    break;
                }
            }
            walk(self.order[..kept].iter().map(|&i| (i as usize, weights[i as usize])), mass, draw)
        };
        Ok((token as u32, logprob(token)))
    }
}

/// The item at which the running sum passes draw * total; the last of non-zero weight where rounding leaves it short.
fn walk(items: impl Iterator<Item = (usize, f32)>, total: f64, draw: f64) -> usize {
    let (mut left, mut last) = (draw * total, 0);
    for (i, w) in items {
        if w > 0.0 {
            last = i;
        }
        left -= f64::from(w);
        if left < 0.0 {
            return i;
        }
    }
    last
}
