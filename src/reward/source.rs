//! Where an answer's score comes from. PPO knows a source by what it does, token ids and texts in and scores out, and not
//! by what is behind it. Knows no shaping of rewards: read ppo/rewards.rs for that.

pub mod combine;
pub mod command;
pub mod http;
pub mod retokenised;
pub mod retry;
pub mod verify;

use anyhow::Result;
use serde_json::Value;

use crate::model::batch::{Batch, chunks_by_tokens};
use crate::model::generate::{FinishReason, Response};
use crate::model::roles::ValueModel;
use crate::report::Figures;

/// Answers to be scored, B of them.
#[derive(Clone, Copy)]
pub struct Answers<'a> {
    /// (B) prompt ids, in the policy's vocabulary.
    pub prompts: &'a [Vec<u32>],
    /// (B) what was sampled, the end token included where there is one.
    pub responses: &'a [Response],
    /// The text of token ids.
    pub decode: &'a dyn Fn(&[u32]) -> String,
}

impl Answers<'_> {
    /// What a response says, its end token left off.
    pub fn text(&self, response: &Response) -> String {
        let end = response.tokens.len() - usize::from(response.finish == FinishReason::Stop);
        (self.decode)(&response.tokens[..end])
    }
}

/// Gives answers their scores.
pub trait RewardSource {
    /// (B): one score an answer, in reward units.
    ///
    /// # Errors
    /// If no score can be had, and the source has no way to go on without.
    fn scores(&self, answers: &Answers<'_>) -> Result<Vec<f32>>;

    /// What there is to tell besides: troubles so far, or the parts of the last scores.
    fn figures(&self) -> Figures {
        Figures::new()
    }

    /// What a run that goes on must find again: counts that [`RewardSource::figures`] tells. Null where there is nothing.
    fn state(&self) -> Value {
        Value::Null
    }

    /// Takes up what [`RewardSource::state`] gave; anything else is passed over.
    fn restore(&self, _state: &Value) {}
}

/// A prompt without the pads in front of it; of nothing but pads, the last one stays.
pub fn without_leading(prompt: &[u32], pad: u32) -> &[u32] {
    let pads = prompt.iter().take_while(|&&token| token == pad).count();
    &prompt[pads.min(prompt.len().saturating_sub(1))..]
}

/// Tokens of one scoring pass: enough to fill the cores, few enough to hold little.
const SCORING_TOKENS: usize = 2048;

/// A learned reward: the value at an answer's last token.
#[derive(Clone, Copy)]
pub struct RewardModel<'w>(pub ValueModel<'w>);

impl RewardSource for RewardModel<'_> {
    fn scores(&self, answers: &Answers<'_>) -> Result<Vec<f32>> {
        let both = answers.prompts.iter().zip(answers.responses);
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

/// A learned reward that reads prompts without the pads in front of them, as DeepSpeed-Chat's mask hides them.
#[derive(Clone, Copy)]
pub struct Unpadded<'w> {
    /// Reads what is left.
    pub model: RewardModel<'w>,
    /// The pad token.
    pub pad: u32,
}

impl RewardSource for Unpadded<'_> {
    fn scores(&self, answers: &Answers<'_>) -> Result<Vec<f32>> {
        let prompts: Vec<Vec<u32>> = answers.prompts.iter().map(|p| without_leading(p, self.pad).to_vec()).collect();
        self.model.scores(&Answers { prompts: &prompts, ..*answers })
    }
}
