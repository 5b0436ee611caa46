//! Batched generation with a KV cache: finished sequences leave the batch, each sequence has its own random numbers,
//! and the log-probability of every sampled token is returned. It does not depend on text: read `tokenizer/mod.rs` for
//! that. Read `decoding.rs` for a step, and `ops/sample/mod.rs` for the choice of a token.

use std::collections::HashMap;
use std::ops::ControlFlow;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::batch::Batch;
use super::decoding::Decoding;
use super::roles::Policy;
use crate::invalid;
use crate::ops::sample::Distribution;
use crate::rng::{SplitMix64, derive};

/// Sampling parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 is greedy.
    pub temperature: f64,
    /// Only the k most likely tokens are drawn; 0: all.
    pub top_k: usize,
    /// Only the most likely tokens whose probabilities sum to p are drawn; 1: all.
    pub top_p: f64,
    /// Maximum number of tokens of a response.
    pub max_new_tokens: usize,
    /// Tokens that end a response; the response includes them.
    pub stop: Vec<u32>,
}

/// Why a response ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FinishReason {
    /// A stop token was sampled.
    Stop,
    /// `max_new_tokens` or the end of the model's context was reached, or the caller ended it.
    Length,
}

impl FinishReason {
    /// Its name in JSON output, as in other tools.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// A sampled response.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// Sampled tokens, including the stop token.
    pub tokens: Vec<u32>,
    /// Log-probability of each token under softmax(logits / temperature) over the whole vocabulary (temperature 1 if
    /// greedy), nats. That is the distribution that PPO trains; top-k and top-p only restrict which tokens are drawn.
    pub logprobs: Vec<f32>,
    /// Why the response ended.
    pub finish: FinishReason,
}

/// What a caller's function of a token returns: nothing, or whether to go on.
pub trait Continuation {
    /// Whether generation ends with this token.
    fn is_end(&self) -> bool;
}

impl Continuation for () {
    fn is_end(&self) -> bool {
        false
    }
}

impl Continuation for ControlFlow<()> {
    fn is_end(&self) -> bool {
        self.is_break()
    }
}

/// Maximum initial capacity of the KV cache in tokens per response; it grows for longer responses.
pub(crate) const MAX_INITIAL_CAPACITY: usize = 1024;

/// Samples one response per prompt. `seeds` (S): the draws of sequence s depend on `seeds[s]` only, not on the rest of
/// the batch. `on_token(s, token)` is called for each token, and may end all responses where they are.
///
/// # Errors
/// If a prompt is empty, fills the context, or the logits are NaN or infinite.
pub fn generate<C: Continuation>(
    policy: Policy<'_>,
    prompts: &[Vec<u32>],
    seeds: &[u64],
    sampling: &SamplingParams,
    mut on_token: impl FnMut(usize, u32) -> C,
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
    // 1. The prompts, in one batch; a prompt that several responses share is run once.
    let (mut indices, mut distinct) = (HashMap::new(), vec![]);
    let mut index_of = |prompt| {
        *indices.entry(prompt).or_insert_with(|| {
            distinct.push(Vec::clone(prompt));
            distinct.len() - 1
        })
    };
    let sources: Vec<usize> = prompts.iter().map(&mut index_of).collect();
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let capacity = sampling.max_new_tokens.min(context - longest).min(MAX_INITIAL_CAPACITY);
    let SamplingParams { temperature, top_k, top_p, .. } = *sampling;
    let by = Distribution { temperature, top_k, top_p };
    let mut decoding = Decoding::start(policy, &Batch::new(&distinct)?, &sources, capacity, by)?;
    let mut live: Vec<usize> = (0..prompts.len()).collect();
    // Of the token that follows `ahead` further ones.
    let draws_of = |live: &[usize], responses: &[Response], ahead: usize| -> Vec<f64> {
        let index = |s: usize| (responses[s].tokens.len() + ahead) as u64;
        let draw = |&s: &usize| SplitMix64::new(derive(seeds[s], &[index(s)])).uniform();
        live.iter().map(draw).collect()
    };
    let left = |s: usize, response: &Response| {
        let (prompt, tokens) = (prompts[s].len(), response.tokens.len());
        (sampling.max_new_tokens - tokens).min(context - (prompt + tokens))
    };
    // 2. One token per live sequence, of one step or of several in a row.
    let mut steps = vec![decoding.first(&draws_of(&live, &responses, 0))?];
    loop {
        let mut keep = vec![true; live.len()];
        for sampled in steps {
            let mut is_ended = false;
            for ((&(token, logprob), &s), keep) in sampled.iter().zip(&live).zip(&mut keep) {
                // What was sampled after a response's end is none of it.
                if !*keep {
                    continue;
                }
                let response = &mut responses[s];
                response.tokens.push(token);
                response.logprobs.push(logprob);
                is_ended |= on_token(s, token).is_end();
                let stopped = sampling.stop.contains(&token);
                response.finish = if stopped { FinishReason::Stop } else { FinishReason::Length };
                *keep = !stopped && left(s, response) > 0;
            }
            if is_ended {
                return Ok(responses);
            }
        }
        // 3. Finished sequences leave the batch.
        if keep.contains(&false) {
            decoding.retain(&keep);
            let mut flags = keep.iter();
            live.retain(|_| *flags.next().unwrap_or(&true));
        }
        if live.is_empty() {
            return Ok(responses);
        }
        // 4. The next tokens of each.
        let tokens: Vec<u32> = live.iter().filter_map(|&s| responses[s].tokens.last().copied()).collect();
        let positions: Vec<u32> =
            live.iter().map(|&s| (prompts[s].len() + responses[s].tokens.len() - 1) as u32).collect();
        let most = live.iter().map(|&s| left(s, &responses[s])).min().unwrap_or(1);
        steps = decoding.steps(&tokens, &positions, most, |ahead| draws_of(&live, &responses, ahead))?;
    }
}
