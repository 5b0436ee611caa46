//! Retry policy for reward sources outside this process that are late, dead or return invalid scores: retry with exponential
//! back-off, then continue with a fallback score or stop. All failures are counted. It does not depend on how a source is
//! reached. Read `command.rs` and `http.rs` for its users.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::Value;

use crate::error::counted;
use crate::report::Metrics;

/// Time-out, number of retries, and fallback.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryPolicy {
    /// Maximum wait for a reply.
    pub timeout: Duration,
    /// Number of tries after the first one.
    pub retries: usize,
    /// Wait before the first retry; it doubles each time, up to [`LONGEST_WAIT`].
    pub backoff: Duration,
    /// Score of a response that has none after all tries; `None` stops the run instead.
    pub fallback: Option<f32>,
}

/// Maximum wait between two tries.
pub const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// Failure counts of a source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Troubles {
    /// Tries that failed as a whole: timed out, ended, refused, wrong number of scores.
    pub failed_tries: u64,
    /// Invalid scores: not JSON, not a number, NaN or infinite.
    pub bad_scores: u64,
    /// Responses that got the fallback score.
    pub fallbacks: u64,
}

impl Troubles {
    /// The counts as metrics.
    pub fn metrics(&self) -> Metrics {
        let counts =
            [("failed_tries", self.failed_tries), ("bad_scores", self.bad_scores), ("fallbacks", self.fallbacks)];
        counts.into_iter().map(|(name, count)| (name.to_owned(), count.into())).collect()
    }

    /// Adds the counts of another source, or of another request of this one.
    pub fn add(&mut self, other: Self) {
        self.failed_tries += other.failed_tries;
        self.bad_scores += other.bad_scores;
        self.fallbacks += other.fallbacks;
    }

    /// Reads the counts from [`Troubles::metrics`]; a missing one is 0.
    pub fn of(metrics: &Value) -> Self {
        let count = |name: &str| metrics[name].as_u64().unwrap_or(0);
        Self { failed_tries: count("failed_tries"), bad_scores: count("bad_scores"), fallbacks: count("fallbacks") }
    }
}

/// Why a try returned no scores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Another try may succeed.
    Passing(String),
    /// No other try can succeed.
    Final(String),
    /// There was a reply and no response has a score by it; another try may have one.
    Unscored(String),
}

impl Failure {
    /// A reply of `found` scores for `asked` responses.
    pub(super) fn another_count(found: usize, asked: usize) -> Self {
        Self::Passing(format!("it returned {} for {}", counted(found, "score"), counted(asked, "response")))
    }
}

impl RetryPolicy {
    /// Returns the scores of `count` responses by `attempt`, which returns `None` for an invalid score.
    ///
    /// # Errors
    /// If no try succeeds and there is no fallback score; the message starts with `name` and contains the last fault.
    pub fn scores(
        &self,
        name: &str,
        count: usize,
        troubles: &mut Troubles,
        mut attempt: impl FnMut() -> Result<Vec<Option<f32>>, Failure>,
    ) -> Result<Vec<f32>> {
        let mut wait = self.backoff;
        let mut best: Option<Vec<Option<f32>>> = None;
        let mut fault = String::new();
        for tried in 0..=self.retries {
            if tried > 0 {
                sleep(wait);
                wait = (wait * 2).min(LONGEST_WAIT);
            }
            let result = attempt().and_then(|scores| match scores.len() {
                n if n == count => Ok(scores),
                n => Err(Failure::another_count(n, count)),
            });
            match result {
                Ok(scores) => {
                    let bad = scores.iter().filter(|s| s.is_none()).count();
                    if bad == 0 {
                        return Ok(scores.into_iter().flatten().collect());
                    }
                    troubles.bad_scores += bad as u64;
                    fault = format!("{bad} of {count} scores are not finite numbers");
                    best = Some(scores);
                }
                Err(Failure::Passing(text)) => {
                    troubles.failed_tries += 1;
                    fault = text;
                }
                Err(Failure::Unscored(text)) => {
                    troubles.bad_scores += count as u64;
                    fault = text;
                }
                Err(Failure::Final(text)) => {
                    troubles.failed_tries += 1;
                    fault = text;
                    break;
                }
            }
        }
        let Some(fallback) = self.fallback else {
            bail!(
                "{name}: {fault}; fix it, raise its timeout_seconds or retries, or set fallback_score to go on without it (--resume \
                 takes these and another url; another question, or another reading of the reply, needs --force beside it)"
            );
        };
        let scores = best.unwrap_or_else(|| vec![None; count]);
        troubles.fallbacks += scores.iter().filter(|s| s.is_none()).count() as u64;
        Ok(scores.into_iter().map(|s| s.unwrap_or(fallback)).collect())
    }
}

/// A score as a finite f32; `None` if it is anything else.
pub fn score_of(value: &Value) -> Option<f32> {
    value.as_f64().map(|x| x as f32).filter(|x| x.is_finite())
}

/// The beginning of a text, for a message.
pub fn excerpt(text: &str) -> String {
    beginning(text, 80)
}

/// The first `most` characters of a text, in quotes.
pub fn beginning(text: &str, most: usize) -> String {
    let mut short: String = text.trim_end().chars().take(most).collect();
    if short.len() < text.trim_end().len() {
        short.push('…');
    }
    format!("{short:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(retries: usize, fallback: Option<f32>) -> RetryPolicy {
        RetryPolicy { timeout: Duration::from_secs(1), retries, backoff: Duration::from_millis(1), fallback }
    }

    /// Scores by a scripted source, its failures and the number of tries.
    fn run(policy: RetryPolicy, script: Vec<Result<Vec<Option<f32>>, Failure>>) -> (Result<Vec<f32>>, Troubles, usize) {
        let (mut troubles, mut tries) = (Troubles::default(), 0);
        let mut script = script.into_iter();
        let scores = policy.scores("judge", 2, &mut troubles, || {
            tries += 1;
            script.next().unwrap()
        });
        (scores, troubles, tries)
    }

    fn late() -> Result<Vec<Option<f32>>, Failure> {
        Err(Failure::Passing("late".into()))
    }

    #[test]
    fn a_source_that_recovers_returns_its_scores_and_counts_the_failed_tries() {
        let (scores, troubles, tries) = run(policy(3, None), vec![late(), late(), Ok(vec![Some(1.0), Some(2.0)])]);
        assert_eq!(scores.unwrap(), [1.0, 2.0]);
        assert_eq!((troubles, tries), (Troubles { failed_tries: 2, ..Troubles::default() }, 3));
    }

    #[test]
    fn after_the_last_try_the_run_stops_with_the_last_fault_or_uses_the_fallback_score() {
        let (scores, _, tries) = run(policy(1, None), vec![late(), Ok(vec![Some(1.0)])]);
        let message = scores.unwrap_err().to_string();
        assert!(message.contains("judge: it returned 1 score for 2 responses") && message.contains("fallback_score"));
        assert_eq!(tries, 2);
        let (scores, troubles, _) = run(policy(0, Some(-1.0)), vec![late()]);
        assert_eq!(scores.unwrap(), [-1.0, -1.0]);
        assert_eq!(troubles, Troubles { failed_tries: 1, fallbacks: 2, ..Troubles::default() });
    }

    #[test]
    fn valid_scores_are_kept_beside_invalid_ones() {
        let script = vec![Ok(vec![Some(3.0), None]), late()];
        let (scores, troubles, _) = run(policy(1, Some(0.0)), script);
        assert_eq!(scores.unwrap(), [3.0, 0.0]);
        assert_eq!(troubles, Troubles { failed_tries: 1, bad_scores: 1, fallbacks: 1 });
    }

    #[test]
    fn a_final_failure_is_not_retried() {
        let script = vec![Err(Failure::Final("404".into()))];
        let (scores, _, tries) = run(policy(5, None), script);
        assert!(scores.unwrap_err().to_string().contains("404") && tries == 1);
    }

    #[test]
    fn values_that_are_not_finite_f32_numbers_are_invalid_scores() {
        let of = |text: &str| score_of(&serde_json::from_str(text).unwrap());
        assert_eq!(of("1.5"), Some(1.5));
        for bad in ["1e300", "null", "\"1\"", "[1]", "true"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}
