//! Rewards by rule: 1 where an answer is as it should be, 0 where it is not. Each looks at the answer's text alone, the
//! end token left off. Knows no model.

use std::collections::{BTreeSet, HashMap};

use anyhow::Result;
use regex::Regex;
use serde::de::IgnoredAny;

use super::{Answers, RewardSource};
use crate::model::generate::{FinishReason, Response};

/// The right answers of each prompt, by its token ids.
pub type Solutions = HashMap<Vec<u32>, BTreeSet<String>>;

/// A rule.
#[derive(Clone, Debug)]
pub enum Verifier {
    /// The pattern is found somewhere in the answer.
    Regex(Regex),
    /// The answer, blanks around it apart, is one JSON value.
    JsonValid,
    /// The answer has this many tokens, the end token apart.
    Length {
        /// No fewer.
        min: usize,
        /// No more.
        max: usize,
    },
    /// The answer is a right one, blanks around it apart.
    Exact {
        /// Where in the answer to look: the first group of the last match, or the whole match. `None` = all of it.
        within: Option<Regex>,
        /// What is right.
        solutions: Solutions,
    },
}

impl Verifier {
    /// Does the answer pass?
    pub fn passes(&self, prompt: &[u32], response: &Response, text: &str) -> bool {
        match self {
            Self::Regex(pattern) => pattern.is_match(text),
            Self::JsonValid => serde_json::from_str::<IgnoredAny>(text).is_ok(),
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
                let right = solutions.get(prompt);
                found.is_some_and(|found| right.is_some_and(|right| right.contains(found.trim())))
            }
        }
    }
}

impl RewardSource for Verifier {
    fn scores(&self, answers: &Answers<'_>) -> Result<Vec<f32>> {
        let both = answers.prompts.iter().zip(answers.responses);
        Ok(both.map(|(p, r)| f32::from(u8::from(self.passes(p, r, &answers.text(r))))).collect())
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
    fn a_pattern_is_found_anywhere_unless_it_is_anchored() {
        let verifier = Verifier::Regex(Regex::new(r"<answer>\d+</answer>").unwrap());
        assert!(passes(&verifier, "so <answer>42</answer>.") && !passes(&verifier, "<answer>x</answer>"));
        assert!(!passes(&Verifier::Regex(Regex::new("^b").unwrap()), "ab"));
    }

    #[test]
    fn json_is_one_whole_value() {
        assert!(passes(&Verifier::JsonValid, " {\"a\": [1, null]}\n") && passes(&Verifier::JsonValid, "3"));
        for text in ["{\"a\": 1,}", "{} {}", "", "Here it is: {}"] {
            assert!(!passes(&Verifier::JsonValid, text), "{text}");
        }
        // Nesting without end must not eat the stack.
        assert!(!passes(&Verifier::JsonValid, &"[".repeat(100_000)));
    }

    #[test]
    fn length_does_not_count_the_end_token() {
        let three = Verifier::Length { min: 3, max: 3 };
        assert!(passes(&three, "x") && !passes(&Verifier::Length { min: 4, max: 9 }, "x"));
        let cut = Response { tokens: vec![5, 6, 7], logprobs: vec![0.0; 3], finish: FinishReason::Length };
        assert!(three.passes(&[], &cut, "x"));
        assert!(!Verifier::Length { min: 0, max: 2 }.passes(&[], &cut, "x"));
    }

    #[test]
    fn an_exact_answer_is_that_prompts_own_and_the_last_one_that_the_pattern_finds() {
        let right = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect();
        let solutions = Solutions::from([(vec![1, 2], right(&["42", "forty-two"])), (vec![3], right(&["7"]))]);
        let whole = Verifier::Exact { within: None, solutions: solutions.clone() };
        assert!(passes(&whole, " 42\n") && passes(&whole, "forty-two"));
        assert!(!passes(&whole, "7") && !passes(&whole, "it is 42"));
        let marked = Verifier::Exact { within: Some(Regex::new(r"#### *(\S+)").unwrap()), solutions };
        assert!(passes(&marked, "#### 41\nno, #### 42"));
        assert!(!passes(&marked, "#### 42, no, #### 41") && !passes(&marked, "42"));
        let response = Response { tokens: vec![5], logprobs: vec![0.0], finish: FinishReason::Length };
        assert!(!whole.passes(&[9], &response, "42"), "a prompt that nothing is known of");
    }
}
