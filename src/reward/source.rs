//! Reward sources: where a response's score comes from. PPO depends on the [`RewardSource`] trait only: token ids and texts
//! in, scores out. It does not depend on reward shaping: read `ppo/rewards.rs` for that, `source/combine.rs` next.

pub mod among;
pub mod combine;
pub mod command;
pub mod endpoint;
pub mod http;
pub mod judge;
pub mod math;
mod reply;
pub mod retokenised;
pub mod retry;
pub mod served;
pub mod template;
pub mod verify;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::data::stream::columns::{Columns, RecordColumns};
use crate::model::batch::{Batch, chunks_by_tokens};
use crate::model::generate::{FinishReason, Response};
use crate::model::roles::ValueModel;
use crate::report::Metrics;

/// B responses to be scored.
#[derive(Clone, Copy)]
pub struct RewardInputs<'a> {
    /// (B) prompt ids, in the policy's vocabulary.
    pub prompts: &'a [Vec<u32>],
    /// (B) sampled responses, including the end token if there is one.
    pub responses: &'a [Response],
    /// (B) number of each prompt's record among all usable records; empty if they are not known.
    pub entries: &'a [usize],
    /// Decodes token ids.
    pub decode: &'a dyn Fn(&[u32]) -> String,
    /// Scores of these responses that are known already, of models that [`RewardSource::models`] returned.
    pub known: &'a [KnownScores<'a>],
}

/// Scores that a model gave in a pass which other roles shared.
#[derive(Clone)]
pub struct KnownScores<'a> {
    /// The model.
    pub model: ValueModel<'a>,
    /// (B) values at the last token of each response.
    pub scores: Vec<f32>,
}

impl RewardInputs<'_> {
    /// Text of a response without its end token.
    pub fn text(&self, response: &Response) -> String {
        let end = response.tokens.len() - usize::from(response.finish == FinishReason::Stop);
        (self.decode)(&response.tokens[..end])
    }

    /// Columns and id of the record that response `i` answers, if they are known.
    pub fn record<'c>(&self, columns: &'c Columns, i: usize) -> Option<&'c RecordColumns> {
        self.entries.get(i).and_then(|entry| columns.get(entry))
    }
}

/// One term of a weighted sum of rewards.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PartScores {
    /// Its name in the metrics.
    pub name: String,
    /// Its weight.
    pub weight: f64,
    /// (B) scores before the weight.
    pub scores: Vec<f32>,
}

/// Scores responses.
pub trait RewardSource {
    /// (B) scores, one per response, in reward units.
    ///
    /// # Errors
    /// If the scores cannot be obtained, and the source has no fallback score.
    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>>;

    /// The models whose values at the last tokens of prompt and response the scores are made of, if they can be read in a pass
    /// with other roles: those that [`RewardInputs::known`] has are not read again.
    fn models(&self) -> Vec<ValueModel<'_>> {
        vec![]
    }

    /// Where the run is, 0 in its first iteration and 1 in its last: what a weight that moves depends on. Called before scores
    /// are asked for.
    fn set_progress(&self, _share: f64) {}

    /// The terms of which the last scores are the weighted sum; empty for a source that is no sum.
    fn parts(&self) -> Vec<PartScores> {
        vec![]
    }

    /// Extra metrics: failure counts, or the parts of the last scores.
    fn metrics(&self) -> Metrics {
        Metrics::new()
    }

    /// State that a checkpoint must store: the counts behind [`RewardSource::metrics`]. Null if there is none.
    fn state(&self) -> Value {
        Value::Null
    }

    /// Restores what [`RewardSource::state`] returned; anything else is ignored.
    fn restore(&self, _state: &Value) {}
}

/// A prompt without its leading pads; if all tokens are pads, the last one is kept.
pub fn without_leading(prompt: &[u32], pad: u32) -> &[u32] {
    let pads = prompt.iter().take_while(|&&token| token == pad).count();
    &prompt[pads.min(prompt.len().saturating_sub(1))..]
}

/// Tokens per scoring pass: enough to use all cores, few enough to need little memory.
pub(crate) const SCORING_TOKENS: usize = 2048;

/// A learned reward: the value at the last token of the response.
#[derive(Clone, Copy)]
pub struct RewardModel<'w>(pub ValueModel<'w>);

impl RewardSource for RewardModel<'_> {
    fn models(&self) -> Vec<ValueModel<'_>> {
        vec![self.0]
    }

    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        if let Some(known) = inputs.known.iter().find(|known| known.model.is_same(&self.0)) {
            return Ok(known.scores.clone());
        }
        let both = inputs.prompts.iter().zip(inputs.responses);
        let sequences: Vec<Vec<u32>> = both.map(|(p, r)| p.iter().chain(&r.tokens).copied().collect()).collect();
        let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
        let mut scores = Vec::with_capacity(sequences.len());
        for rows in chunks_by_tokens(&lengths, SCORING_TOKENS) {
            let chunk: Vec<&[u32]> = rows.iter().map(|&i| &sequences[i][..]).collect();
            scores.extend(self.0.scores(&Batch::new(&chunk)?)?);
        }
        Ok(scores)
    }
}

/// A learned reward that reads prompts without their leading pads, which DeepSpeed-Chat's mask hides.
#[derive(Clone, Copy)]
pub struct Unpadded<'w> {
    /// Reward model that reads the remaining tokens.
    pub model: RewardModel<'w>,
    /// The pad token.
    pub pad: u32,
}

impl RewardSource for Unpadded<'_> {
    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        let prompts: Vec<Vec<u32>> = inputs.prompts.iter().map(|p| without_leading(p, self.pad).to_vec()).collect();
        self.model.scores(&RewardInputs { prompts: &prompts, ..*inputs })
    }
}
