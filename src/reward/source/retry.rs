//! What is done about a reward source outside this process that is late, dead or talks nonsense: try again, later and
//! later, then go on with an agreed score or stop. Counts all of it. Knows no pipe and no socket.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::Value;

use crate::report::Figures;

/// How long and how often to try.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Patience {
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// Tries after the first one.
    pub retries: usize,
    /// Wait before the first of them; doubles each time, up to [`LONGEST_WAIT`].
    pub backoff: Duration,
    /// The score of an answer that got none after all tries; `None` ends the run instead.
    pub fallback: Option<f32>,
}

/// No wait between two tries is longer.
pub const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// What went wrong so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Troubles {
    /// Tries that failed as a whole: late, dead, refused, the wrong number of scores.
    pub failed_tries: u64,
    /// Scores that were none: not a number, not finite, not JSON.
    pub bad_scores: u64,
    /// Answers that were given the agreed score.
    pub fallbacks: u64,
}

impl Troubles {
    /// Under names of their own.
    pub fn figures(&self) -> Figures {
        let counts =
            [("failed_tries", self.failed_tries), ("bad_scores", self.bad_scores), ("fallbacks", self.fallbacks)];
        counts.into_iter().map(|(name, count)| (name.to_owned(), count.into())).collect()
    }

    /// Read back from [`Troubles::figures`]; what is missing is 0.
    pub fn of(figures: &Value) -> Self {
        let count = |name: &str| figures[name].as_u64().unwrap_or(0);
        Self { failed_tries: count("failed_tries"), bad_scores: count("bad_scores"), fallbacks: count("fallbacks") }
    }
}

/// Why a try gave no scores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Another try may do better.
    Passing(String),
    /// No other try will.
    Final(String),
}

impl Patience {
    /// The scores of `count` answers by `attempt`, which gives `None` for a score that is none.
    ///
    /// # Errors
    /// If no try succeeds and no score is agreed for that; the message has the last fault. `name` opens it.
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
            let given = attempt().and_then(|scores| match scores.len() {
                n if n == count => Ok(scores),
                n => Err(Failure::Passing(format!("it gave {n} scores for {count} answers"))),
            });
            match given {
                Ok(scores) => {
                    let bad = scores.iter().filter(|s| s.is_none()).count();
                    if bad == 0 {
                        return Ok(scores.into_iter().flatten().collect());
                    }
                    troubles.bad_scores += bad as u64;
                    fault = format!("{bad} of {count} scores are no finite numbers");
                    best = Some(scores);
                }
                Err(Failure::Passing(text)) => {
                    troubles.failed_tries += 1;
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
            bail!("{name}: {fault}; mend it, raise its timeout or retries, or set fallback_score to go on without it");
        };
        let scores = best.unwrap_or_else(|| vec![None; count]);
        troubles.fallbacks += scores.iter().filter(|s| s.is_none()).count() as u64;
        Ok(scores.into_iter().map(|s| s.unwrap_or(fallback)).collect())
    }
}

/// A finite f32, or none.
pub fn score_of(value: &Value) -> Option<f32> {
    value.as_f64().map(|x| x as f32).filter(|x| x.is_finite())
}

/// The beginning of something for a message.
pub fn excerpt(text: &str) -> String {
    let mut short: String = text.trim_end().chars().take(80).collect();
    if short.len() < text.trim_end().len() {
        short.push('…');
    }
    format!("{short:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patience(retries: usize, fallback: Option<f32>) -> Patience {
        Patience { timeout: Duration::from_secs(1), retries, backoff: Duration::from_millis(1), fallback }
    }

    /// Answers by script, and how many tries it took.
    fn run(patience: Patience, script: Vec<Result<Vec<Option<f32>>, Failure>>) -> (Result<Vec<f32>>, Troubles, usize) {
        let (mut troubles, mut tries) = (Troubles::default(), 0);
        let mut script = script.into_iter();
        let scores = patience.scores("judge", 2, &mut troubles, || {
            tries += 1;
            script.next().unwrap()
        });
        (scores, troubles, tries)
    }

    fn late() -> Result<Vec<Option<f32>>, Failure> {
        Err(Failure::Passing("late".into()))
    }

    #[test]
    fn a_source_that_recovers_costs_tries_and_no_score() {
        let (scores, troubles, tries) = run(patience(3, None), vec![late(), late(), Ok(vec![Some(1.0), Some(2.0)])]);
        assert_eq!(scores.unwrap(), [1.0, 2.0]);
        assert_eq!((troubles, tries), (Troubles { failed_tries: 2, ..Troubles::default() }, 3));
    }

    #[test]
    fn after_the_last_try_the_run_stops_with_the_last_fault_or_takes_the_agreed_score() {
        let (scores, _, tries) = run(patience(1, None), vec![late(), Ok(vec![Some(1.0)])]);
        let message = scores.unwrap_err().to_string();
        assert!(message.contains("judge: it gave 1 scores for 2 answers") && message.contains("fallback_score"));
        assert_eq!(tries, 2);
        let (scores, troubles, _) = run(patience(0, Some(-1.0)), vec![late()]);
        assert_eq!(scores.unwrap(), [-1.0, -1.0]);
        assert_eq!(troubles, Troubles { failed_tries: 1, fallbacks: 2, ..Troubles::default() });
    }

    #[test]
    fn a_good_score_beside_a_bad_one_is_kept() {
        let script = vec![Ok(vec![Some(3.0), None]), late()];
        let (scores, troubles, _) = run(patience(1, Some(0.0)), script);
        assert_eq!(scores.unwrap(), [3.0, 0.0]);
        assert_eq!(troubles, Troubles { failed_tries: 1, bad_scores: 1, fallbacks: 1 });
    }

    #[test]
    fn a_final_failure_is_not_tried_again() {
        let script = vec![Err(Failure::Final("404".into()))];
        let (scores, _, tries) = run(patience(5, None), script);
        assert!(scores.unwrap_err().to_string().contains("404") && tries == 1);
    }

    #[test]
    fn numbers_that_f32_cannot_hold_are_no_scores() {
        let of = |text: &str| score_of(&serde_json::from_str(text).unwrap());
        assert_eq!(of("1.5"), Some(1.5));
        for bad in ["1e300", "null", "\"1\"", "[1]", "true"] {
            assert_eq!(of(bad), None, "{bad}");
        }
    }
}
