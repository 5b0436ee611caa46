//! A reward model whose tokenizer is not the policy's. It reads each prompt as its own chat template renders the record, and
//! prompt and response as the tokens of one text; a response that ended gets its own end token. It returns one score per
//! response. A critic cannot use it, because values belong to the policy's tokens. Read `verify.rs` next.

use std::collections::HashMap;

use anyhow::{Context, Result};

use super::{RewardInputs, RewardSource, SCORING_TOKENS};
use crate::data::examples::objectives::{PromptExample, TextEncoder};
use crate::model::batch::{Batch, chunks_by_tokens};
use crate::model::generate::FinishReason;
use crate::model::roles::ValueModel;

/// A learned reward over another vocabulary.
pub struct RetokenisedModel<'w> {
    /// The reward model.
    pub scorer: ValueModel<'w>,
    /// Tokenizer of the reward model.
    pub encoder: &'w dyn TextEncoder,
    /// The token with which the reward model's template ends a response.
    pub end: u32,
    /// The policy's prompt ids -> the reward model's text and ids of the same prompt.
    pub prompts: &'w HashMap<Vec<u32>, PromptExample>,
    /// Context of the reward model in tokens; longer sequences are truncated to it.
    pub context: usize,
}

impl RetokenisedModel<'_> {
    /// The reward model's input, one sequence per response.
    ///
    /// # Errors
    /// If a prompt is not in `prompts`, or the tokenizer fails.
    pub fn sequences(&self, inputs: &RewardInputs<'_>) -> Result<Vec<Vec<u32>>> {
        let read = |(prompt, response): (&Vec<u32>, &_)| -> Result<Vec<u32>> {
            let PromptExample { tokens, text, .. } =
                self.prompts.get(prompt).context("a prompt without an encoding by the reward model's tokenizer")?;
            let front = tokens.len().saturating_sub(self.encoder.encode(text)?.len());
            let mut ids = tokens[..front].to_vec();
            ids.extend(self.encoder.encode(&format!("{text}{}", inputs.text(response)))?);
            if response.finish == FinishReason::Stop {
                ids.push(self.end);
            }
            ids.truncate(self.context);
            Ok(ids)
        };
        inputs.prompts.iter().zip(inputs.responses).map(read).collect()
    }
}

impl RewardSource for RetokenisedModel<'_> {
    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        let sequences = self.sequences(inputs)?;
        let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
        let mut scores = Vec::with_capacity(sequences.len());
        for rows in chunks_by_tokens(&lengths, SCORING_TOKENS) {
            let chunk: Vec<&[u32]> = rows.iter().map(|&i| &sequences[i][..]).collect();
            scores.extend(self.scorer.scores(&Batch::new(&chunk)?)?);
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
    use crate::tokenizer::chat_template::Rendered;

    /// One token per letter, 10 for `a`; 0 is the end token.
    struct Letters;

    impl TextEncoder for Letters {
        fn encode(&self, text: &str) -> Result<Vec<u32>> {
            Ok(text.bytes().map(|b| u32::from(b - b'a') + 10).collect())
        }

        fn chat(&self, _: &[Message], _: bool) -> Result<Rendered> {
            anyhow::bail!("not used in this test")
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
    fn responses_are_scored_in_the_reward_models_own_tokens_with_its_own_end_token() {
        let base = tiny_base();
        let rm = adapter(&base, None, 4);
        let scorer = ValueModel::new(&base, &rm).unwrap();
        // The first prompt has a token in front of its text.
        let known = |tokens: &[u32], text: &str| PromptExample {
            tokens: tokens.to_vec(),
            text: text.to_owned(),
            answer: None,
            entry: 0,
        };
        let known = HashMap::from([(vec![900, 901], known(&[40, 14, 15], "ef")), (vec![902], known(&[16], "g"))]);
        let model = RetokenisedModel { scorer, encoder: &Letters, end: 0, prompts: &known, context: 6 };
        // The policy's token 7000 + n is n + 1 times the letter c: other tokens, other lengths.
        let decode = |ids: &[u32]| ids.iter().map(|id| "c".repeat((id - 7000) as usize + 1)).collect::<String>();
        let prompts = vec![vec![900, 901], vec![902], vec![900, 901]];
        let responses = vec![
            response(&[7001, 65_000], FinishReason::Stop),
            response(&[7000, 7001], FinishReason::Length),
            response(&[7002, 7002], FinishReason::Length),
        ];
        let inputs =
            RewardInputs { prompts: &prompts, responses: &responses, entries: &[], decode: &decode, known: &[] };
        // Two letters and the end token; three letters, truncated; six letters, of which three fit the context.
        let want = vec![vec![40, 14, 15, 12, 12, 0], vec![16, 12, 12, 12], vec![40, 14, 15, 12, 12, 12]];
        assert_eq!(model.sequences(&inputs).unwrap(), want);
        assert_eq!(model.scores(&inputs).unwrap(), scorer.scores(&Batch::new(&want).unwrap()).unwrap());
        let unknown =
            RewardInputs { prompts: &[vec![1]], responses: &responses[..1], entries: &[], decode: &decode, known: &[] };
        assert!(model.scores(&unknown).unwrap_err().to_string().contains("without an encoding"));
    }
}
