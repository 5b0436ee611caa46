//! A reward model whose tokenizer is not the policy's. It reads each prompt as its own template and tokenizer make it of
//! the record, and the answer's text in its own tokens; an answer that ended gets its own end token. Only scores cross
//! over, one an answer: values stand on the policy's tokens, so a critic cannot live here.

use std::collections::HashMap;

use anyhow::{Context, Result};

use super::{Answers, RewardSource};
use crate::data::phases::TextEncoder;
use crate::model::batch::{Batch, chunks_by_tokens};
use crate::model::generate::Finish;
use crate::model::roles::Scorer;

/// Tokens of one scoring pass.
const SCORING_TOKENS: usize = 2048;

/// A learned reward over another vocabulary.
pub struct RetokenisedModel<'w> {
    /// The reward model.
    pub scorer: Scorer<'w>,
    /// Its tokenizer.
    pub encoder: &'w dyn TextEncoder,
    /// The policy's prompt ids -> the reward model's ids of the same prompt.
    pub prompts: &'w HashMap<Vec<u32>, Vec<u32>>,
    /// Longest sequence that the reward model takes; an answer that runs past it is read up to there.
    pub context: usize,
}

impl RetokenisedModel<'_> {
    /// What the reward model reads, one sequence an answer.
    ///
    /// # Errors
    /// If a prompt is not among those known, or the tokenizer fails.
    pub fn sequences(&self, answers: &Answers<'_>) -> Result<Vec<Vec<u32>>> {
        let read = |(prompt, response): (&Vec<u32>, &_)| -> Result<Vec<u32>> {
            let known = self.prompts.get(prompt).context("a prompt that the reward model's tokenizer was not shown")?;
            let mut ids = known.clone();
            ids.extend(self.encoder.encode(&answers.text(response))?);
            if response.finish == Finish::Stop {
                ids.push(self.encoder.eos_id());
            }
            ids.truncate(self.context);
            Ok(ids)
        };
        answers.prompts.iter().zip(answers.responses).map(read).collect()
    }
}

impl RewardSource for RetokenisedModel<'_> {
    fn scores(&self, answers: &Answers<'_>) -> Result<Vec<f32>> {
        let sequences = self.sequences(answers)?;
        let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
        let mut scores = Vec::with_capacity(sequences.len());
        for rows in chunks_by_tokens(&lengths, SCORING_TOKENS) {
            let some: Vec<&[u32]> = rows.iter().map(|&i| &sequences[i][..]).collect();
            scores.extend(self.scorer.scores(&Batch::new(&some)?)?);
        }
        Ok(scores)
    }
}
