//! A reward model whose tokenizer is not the policy's. It reads each prompt as its own template and tokenizer make it of
//! the record, and the answer's text in its own tokens; an answer that ended gets its own end token. Only scores cross
//! over, one an answer: values stand on the policy's tokens, so a critic cannot live here.

use std::collections::HashMap;

use anyhow::{Context, Result};

use super::{Answers, RewardSource};
use crate::data::examples::objectives::TextEncoder;
use crate::model::batch::{Batch, chunks_by_tokens};
use crate::model::generate::FinishReason;
use crate::model::roles::ValueModel;

/// Tokens of one scoring pass.
const SCORING_TOKENS: usize = 2048;

/// A learned reward over another vocabulary.
pub struct RetokenisedModel<'w> {
    /// The reward model.
    pub scorer: ValueModel<'w>,
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
            if response.finish == FinishReason::Stop {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Message;
    use crate::model::generate::Response;
    use crate::model::gradcheck::{adapter, tiny_base};

    /// A token a letter, 10 for `a`; 0 ends.
    struct Letters;

    impl TextEncoder for Letters {
        fn encode(&self, text: &str) -> Result<Vec<u32>> {
            Ok(text.bytes().map(|b| u32::from(b - b'a') + 10).collect())
        }

        fn chat(&self, _: &[Message], _: bool) -> Result<String> {
            anyhow::bail!("not asked here")
        }

        fn has_chat_template(&self) -> bool {
            false
        }

        fn eos_id(&self) -> u32 {
            0
        }

        fn eos_text(&self) -> &str {
            ""
        }
    }

    fn response(tokens: &[u32], finish: FinishReason) -> Response {
        Response { tokens: tokens.to_vec(), logprobs: vec![0.0; tokens.len()], finish }
    }

    #[test]
    fn an_answers_text_is_scored_in_the_reward_models_own_tokens_with_its_own_end() {
        let base = tiny_base();
        let rm = adapter(&base, None, 4);
        let scorer = ValueModel::new(&base, &rm).unwrap();
        let known = HashMap::from([(vec![900, 901], vec![40, 41, 42]), (vec![902], vec![43])]);
        let model = RetokenisedModel { scorer, encoder: &Letters, prompts: &known, context: 6 };
        // The policy's token 7000 + n is n + 1 times the letter c: other tokens, other lengths.
        let decode = |ids: &[u32]| ids.iter().map(|id| "c".repeat((id - 7000) as usize + 1)).collect::<String>();
        let prompts = vec![vec![900, 901], vec![902], vec![900, 901]];
        let responses = vec![
            response(&[7001, 65_000], FinishReason::Stop),
            response(&[7000, 7001], FinishReason::Length),
            response(&[7002, 7002], FinishReason::Length),
        ];
        let answers = Answers { prompts: &prompts, responses: &responses, decode: &decode };
        // Two letters and the end; three letters that were cut off; six letters, read as far as the context goes.
        let want = vec![vec![40, 41, 42, 12, 12, 0], vec![43, 12, 12, 12], vec![40, 41, 42, 12, 12, 12]];
        assert_eq!(model.sequences(&answers).unwrap(), want);
        assert_eq!(model.scores(&answers).unwrap(), scorer.scores(&Batch::new(&want).unwrap()).unwrap());
        let strange = Answers { prompts: &[vec![1]], responses: &responses[..1], decode: &decode };
        assert!(model.scores(&strange).unwrap_err().to_string().contains("was not shown"));
    }
}
