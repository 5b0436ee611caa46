//! Rule-based rewards: 1 if a response passes, 0 if not. Each rule reads the response's text without the end token. It does
//! not depend on bases or adapters. Read `math/mod.rs` for answers of mathematics, `retry.rs` next.

use std::collections::{BTreeSet, HashMap};

use anyhow::Result;
use regex::Regex;
use serde::de::IgnoredAny;
use serde_json::Value;

use super::{RewardInputs, RewardSource};
use crate::config::json_schema::JsonSchema;
use crate::model::generate::{FinishReason, Response};

/// Correct answers of each prompt, by the prompt's token ids.
pub type Solutions = HashMap<Vec<u32>, BTreeSet<String>>;

/// A rule that a response passes or fails.
#[derive(Clone, Debug)]
pub enum Verifier {
    /// The pattern matches somewhere in the response.
    Regex(Regex),
    /// The response is one JSON value, apart from surrounding whitespace.
    JsonValid,
    /// The response, or the last fenced block in it, is JSON that satisfies a schema.
    JsonSchema(JsonSchema),
    /// The response has this many tokens, without the end token.
    Length {
        /// Minimum number of tokens.
        min: usize,
        /// Maximum number of tokens.
        max: usize,
    },
    /// The response is a correct answer, apart from surrounding whitespace.
    Exact {
        /// Pattern that extracts the answer: the first group of the last match, or the whole match. `None` = the whole response.
        within: Option<Regex>,
        /// Correct answers of each prompt.
        solutions: Solutions,
    },
}

impl Verifier {
    /// Whether the response passes.
    pub fn passes(&self, prompt: &[u32], response: &Response, text: &str) -> bool {
        match self {
            Self::Regex(pattern) => pattern.is_match(text),
            Self::JsonValid => serde_json::from_str::<IgnoredAny>(text).is_ok(),
            Self::JsonSchema(schema) => json_of(text).is_some_and(|value| schema.allows(&value)),
            Self::Length { min, max } => {
                let tokens = response.tokens.len() - usize::from(response.finish == FinishReason::Stop);
                (*min..=*max).contains(&tokens)
            }
            Self::Exact { within, solutions } => {
                let found = match within {
                    None => Some(text),
                    Some(pattern) => pattern
                        .captures_iter(text)
                        .last()
                        .and_then(|c| c.get(1).or_else(|| c.get(0)))
                        .map(|group| group.as_str()),
                };
                let correct = solutions.get(prompt);
                found.is_some_and(|found| correct.is_some_and(|correct| correct.contains(found.trim())))
            }
        }
    }
}

/// The JSON of a response: all of it, or else what its last complete block between ```` ```json ```` and ```` ``` ```` holds.
fn json_of(text: &str) -> Option<Value> {
    let whole = serde_json::from_str(text).ok();
    whole.or_else(|| {
        let after = text.rmatch_indices("```json").find_map(|(at, fence)| {
            let rest = &text[at + fence.len()..];
            rest.find("```").map(|end| &rest[..end])
        })?;
        serde_json::from_str(after).ok()
    })
}

impl RewardSource for Verifier {
    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        let both = inputs.prompts.iter().zip(inputs.responses);
        Ok(both.map(|(p, r)| f32::from(u8::from(self.passes(p, r, &inputs.text(r))))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passes(verifier: &Verifier, text: &str) -> bool {
        let response = Response { tokens: vec![5, 6, 7, 0], logprobs: vec![0.0; 4], finish: FinishReason::Stop };
        verifier.passes(&[1, 2], &response, text)
    }

    #[test]
    fn a_pattern_matches_anywhere_unless_it_is_anchored() {
        let verifier = Verifier::Regex(Regex::new(r"<answer>\d+</answer>").unwrap());
        assert!(passes(&verifier, "so <answer>42</answer>.") && !passes(&verifier, "<answer>x</answer>"));
        assert!(!passes(&Verifier::Regex(Regex::new("^b").unwrap()), "ab"));
    }

    #[test]
    fn json_valid_takes_exactly_one_value() {
        assert!(passes(&Verifier::JsonValid, " {\"a\": [1, null]}\n") && passes(&Verifier::JsonValid, "3"));
        for text in ["{\"a\": 1,}", "{} {}", "", "Here it is: {}"] {
            assert!(!passes(&Verifier::JsonValid, text), "{text}");
        }
        // Deep nesting must not overflow the stack.
        assert!(!passes(&Verifier::JsonValid, &"[".repeat(100_000)));
    }

    #[test]
    fn json_that_satisfies_the_schema_passes_by_itself_or_in_the_last_fenced_block() {
        let schema = serde_json::json!({"type": "object", "required": ["answer"], "properties": {"answer": {"type": "integer"}}});
        let verifier = Verifier::JsonSchema(JsonSchema::new(schema).unwrap());
        for text in [
            "{\"answer\": 4}",
            " {\"answer\": 4, \"why\": \"2 + 2\"}\n",
            "So:\n```json\n{\"answer\": 4}\n```\nDone.",
            "```json\n{\"answer\": \"x\"}\n```\nNo:\n```json\n{\"answer\": 5}\n```",
            "```json\n{\"answer\": 4}\n```\n```json\n{\"ans",
        ] {
            assert!(passes(&verifier, text), "{text}");
        }
        for text in [
            "",
            "4",
            "{}",
            "{\"answer\": \"4\"}",
            "{\"answer\": 4",
            "The answer is {\"answer\": 4}",
            "```json\n{\"answer\": 4}",
            "```json\n{\"answer\": 4}\n```\n```json\n{\"answer\": null}\n```",
            "```\n{\"answer\": 4}\n```",
        ] {
            assert!(!passes(&verifier, text), "{text}");
        }
        assert!(!passes(&verifier, &"[".repeat(100_000)));
    }

    #[test]
    fn length_does_not_count_the_end_token() {
        let three = Verifier::Length { min: 3, max: 3 };
        assert!(passes(&three, "x") && !passes(&Verifier::Length { min: 4, max: 9 }, "x"));
        let truncated = Response { tokens: vec![5, 6, 7], logprobs: vec![0.0; 3], finish: FinishReason::Length };
        assert!(three.passes(&[], &truncated, "x"));
        assert!(!Verifier::Length { min: 0, max: 2 }.passes(&[], &truncated, "x"));
    }

    #[test]
    fn exact_compares_the_last_match_with_the_prompts_own_answers() {
        let right = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect();
        let solutions = Solutions::from([(vec![1, 2], right(&["42", "forty-two"])), (vec![3], right(&["7"]))]);
        let whole = Verifier::Exact { within: None, solutions: solutions.clone() };
        assert!(passes(&whole, " 42\n") && passes(&whole, "forty-two"));
        assert!(!passes(&whole, "7") && !passes(&whole, "it is 42"));
        let marked = Verifier::Exact { within: Some(Regex::new(r"#### *(\S+)").unwrap()), solutions };
        assert!(passes(&marked, "#### 41\nno, #### 42"));
        assert!(!passes(&marked, "#### 42, no, #### 41") && !passes(&marked, "42"));
        let response = Response { tokens: vec![5], logprobs: vec![0.0], finish: FinishReason::Length };
        assert!(!whole.passes(&[9], &response, "42"), "a prompt without a solution");
    }
}
