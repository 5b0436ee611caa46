//! A reward source that asks a language model behind an OpenAI-compatible endpoint (`/v1/chat/completions`: OpenAI, vLLM,
//! llama.cpp's server, Ollama): one request per response, several at once. A template makes the question, a pattern finds the
//! score in the reply, and requests, tokens and cost are counted. It does not depend on the policy's model. Read `template.rs`
//! for the question and `retry.rs` for how failures are handled.

use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::endpoint::Endpoint;
use super::template::{self, check_template};
use super::{RewardInputs, RewardSource};
use crate::data::stream::columns::Columns;
use crate::report::{Metrics, number};
use crate::reward::source::retry::{Failure, RetryPolicy, Troubles, excerpt};

/// The question that is asked without a template.
pub const TEMPLATE: &str = "You grade the response of an assistant to a prompt.\n\n[Prompt]\n{{ prompt }}\n\n[Response]\n\
    {{ response }}\n\n[End of the response]\nHow helpful, correct and well written is the response? Give one sentence of \
    reasons, then on a line of its own\nScore: N\nwith N from 1 (worst) to 10 (best).";
/// Where a score is looked for without a pattern.
pub const PATTERN: &str = r"(?i)score\W*?(-?\d+(?:\.\d+)?)";

/// What a judge is asked and how its reply is read.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Name of the judging model.
    pub model: String,
    /// Jinja template of the question over `prompt`, `response` and `columns`; see [`check_template`].
    pub template: String,
    /// Finds the score: the first group of the last match, or the whole match.
    pub pattern: Regex,
    /// Smallest and largest valid score.
    pub range: (f64, f64),
    /// More keys of the request, in place of ours where they have the same name.
    pub request: Map<String, Value>,
    /// Requests at once.
    pub concurrency: NonZeroUsize,
    /// Cost of a million tokens of question and of reply.
    pub prices: (f64, f64),
}

/// What a judge has cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spent {
    /// Requests sent.
    pub requests: u64,
    /// Tokens of the questions, as the service counts them.
    pub prompt_tokens: u64,
    /// Tokens of the replies, as the service counts them.
    pub completion_tokens: u64,
    /// Replies without a count of tokens, which no cost is known of.
    pub uncounted: u64,
}

impl Spent {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.prompt_tokens += other.prompt_tokens;
        self.completion_tokens += other.completion_tokens;
        self.uncounted += other.uncounted;
    }

    /// Cost at these prices per million tokens.
    pub fn cost(&self, (input, output): (f64, f64)) -> f64 {
        (self.prompt_tokens as f64 * input + self.completion_tokens as f64 * output) / 1e6
    }
}

/// A judging model.
pub struct Judge<'w> {
    endpoint: Endpoint,
    rules: Rules,
    columns: Option<&'w Columns>,
    retry: RetryPolicy,
    counts: Mutex<(Spent, Troubles)>,
}

/// The address of chat completions: `url` itself, or below it where it is the base address of an API.
fn completions(url: &str) -> String {
    let base = url.trim_end_matches('/');
    if base.ends_with("/chat/completions") { base.into() } else { format!("{base}/chat/completions") }
}

/// The score in a reply: a finite number in the range, in the last match of the pattern.
fn score(reply: &str, pattern: &Regex, (low, high): (f64, f64)) -> Option<f32> {
    let found = pattern.captures_iter(reply).last()?;
    let text = found.get(1).or_else(|| found.get(0))?.as_str();
    text.trim().parse::<f64>().ok().filter(|x| x.is_finite() && (low..=high).contains(x)).map(|x| x as f32)
}

impl<'w> Judge<'w> {
    /// Creates the client; the first request is sent with the first rollout. `key`: the bearer token of the
    /// `Authorization` header.
    ///
    /// # Errors
    /// Those of [`check_template`].
    pub fn new(
        url: &str,
        key: Option<String>,
        rules: Rules,
        columns: Option<&'w Columns>,
        retry: RetryPolicy,
    ) -> Result<Self> {
        check_template(&rules.template)?;
        let endpoint = Endpoint::new(completions(url), key, retry.timeout);
        Ok(Self { endpoint, rules, columns, retry, counts: Mutex::default() })
    }

    /// Requests, tokens and failures so far.
    pub fn counts(&self) -> (Spent, Troubles) {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks one question once.
    fn ask(&self, question: &str, spent: &mut Spent) -> Result<Vec<Option<f32>>, Failure> {
        let mut body = json!({
            "model": self.rules.model,
            "messages": [{ "role": "user", "content": question }],
            "temperature": 0,
        });
        self.rules.request.iter().for_each(|(key, value)| body[key] = value.clone());
        spent.requests += 1;
        let reply = self.endpoint.post(&body)?;
        let tokens = |key: &str| reply["usage"][key].as_u64();
        match (tokens("prompt_tokens"), tokens("completion_tokens")) {
            (Some(prompt), Some(completion)) => {
                spent.prompt_tokens += prompt;
                spent.completion_tokens += completion;
            }
            _ => spent.uncounted += 1,
        }
        let Some(text) = reply["choices"][0]["message"]["content"].as_str() else {
            let found = excerpt(&reply.to_string());
            return Err(Failure::Passing(format!("its reply has no choices[0].message.content: {found}")));
        };
        match score(text, &self.rules.pattern, self.rules.range) {
            Some(score) => Ok(vec![Some(score)]),
            None => {
                let (low, high) = self.rules.range;
                Err(Failure::Unscored(format!("no score from {low} to {high} in its reply {}", excerpt(text))))
            }
        }
    }
}

impl RewardSource for Judge<'_> {
    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        let questions = template::texts(&self.rules.template, "judge", inputs, self.columns)?;
        let name = format!("judge {} at {}", self.rules.model, self.endpoint.url);
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let scores: Vec<Mutex<Option<Result<f32>>>> = questions.iter().map(|_| Mutex::default()).collect();
        // Each thread takes the next question; after a failure none is asked any more.
        let work = || {
            while !failed.load(Ordering::Relaxed) {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(question) = questions.get(i) else { return };
                let (mut spent, mut troubles) = (Spent::default(), Troubles::default());
                let score = self.retry.scores(&name, 1, &mut troubles, || self.ask(question, &mut spent));
                failed.fetch_or(score.is_err(), Ordering::Relaxed);
                let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
                counts.0.add(spent);
                counts.1.add(troubles);
                *scores[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(score.map(|score| score[0]));
            }
        };
        let more = self.rules.concurrency.get().min(questions.len()).saturating_sub(1);
        thread::scope(|scope| {
            for _ in 0..more {
                // Where no further thread can be started, those that there are do the work.
                if thread::Builder::new().spawn_scoped(scope, work).is_err() {
                    break;
                }
            }
            work();
        });
        let found = scores.into_iter().map(|score| score.into_inner().unwrap_or_else(PoisonError::into_inner));
        let found: Vec<Option<Result<f32>>> = found.collect();
        let asked = found.into_iter().flatten().collect::<Result<Vec<f32>>>()?;
        (asked.len() == questions.len()).then_some(asked).context("a question was not asked")
    }

    fn metrics(&self) -> Metrics {
        let (spent, troubles) = self.counts();
        let mut metrics = troubles.metrics();
        for (name, count) in [
            ("requests", spent.requests),
            ("prompt_tokens", spent.prompt_tokens),
            ("completion_tokens", spent.completion_tokens),
            ("uncounted", spent.uncounted),
        ] {
            metrics.insert(name.into(), count.into());
        }
        metrics.insert("cost".into(), number(spent.cost(self.rules.prices)));
        metrics
    }

    fn state(&self) -> Value {
        let (spent, troubles) = self.counts();
        json!({ "spent": spent, "troubles": troubles.metrics() })
    }

    fn restore(&self, state: &Value) {
        let spent = Spent::deserialize(&state["spent"]).unwrap_or_default();
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner) = (spent, Troubles::of(&state["troubles"]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_is_the_first_group_of_the_last_match_and_within_the_range() {
        let usual = Regex::new(PATTERN).unwrap();
        let found = |reply: &str| score(reply, &usual, (1.0, 10.0));
        assert_eq!(found("It is short.\nScore: 7"), Some(7.0));
        assert_eq!(found("A score of 3? No.\n**Score:** 8.5/10"), Some(8.5));
        for bad in ["", "Very good.", "Score: 11", "Score: -1", "Score: many"] {
            assert_eq!(found(bad), None, "{bad}");
        }
        let bare = Regex::new(r"\d+$").unwrap();
        assert_eq!(score("2 or 4", &bare, (f64::NEG_INFINITY, f64::INFINITY)), Some(4.0), "the whole match");
        let yes = Regex::new("(?i)yes").unwrap();
        assert_eq!(score("yes", &yes, (0.0, 1.0)), None, "no number");
    }

    #[test]
    fn the_address_of_an_api_leads_to_its_chat_completions() {
        for url in ["http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/chat/completions"] {
            assert_eq!(completions(url), "http://h:1/v1/chat/completions");
        }
    }

    #[test]
    fn cost_is_tokens_times_prices_per_million() {
        let spent = Spent { prompt_tokens: 2_000_000, completion_tokens: 500_000, ..Spent::default() };
        assert_eq!(spent.cost((0.15, 0.6)), 0.3 + 0.3);
    }
}
