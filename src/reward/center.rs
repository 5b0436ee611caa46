//! `center`: the head shifted and scaled so that scores of the training responses have mean 0 and deviation 1, and what
//! makes that wrong: a model that separates nothing. It does not depend on the training loop. Read `shown.rs` next.

use anyhow::Result;

use crate::model::adapter::{Adapter, ScoreHead};

/// The least deviation of raw scores that is scaled to 1, in nats of log-odds. Two responses that are twice this apart are
/// told apart with a probability of 0.505: division by less would multiply noise by more than 100.
pub const LEAST_DEVIATION: f64 = 0.01;

/// Moments of the raw scores by which a head was shifted and scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Centering {
    /// Mean of the raw scores, which is subtracted.
    pub mean: f64,
    /// Their deviation, by which scores are divided if `is_scaled`.
    pub deviation: f64,
    /// Whether the deviation is at least [`LEAST_DEVIATION`].
    pub is_scaled: bool,
}

impl Centering {
    /// The moments of `scores`, the raw scores of the training responses.
    pub fn of(scores: &[f64]) -> Self {
        let n = scores.len() as f64;
        let mean = scores.iter().sum::<f64>() / n;
        let deviation = (scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / n).sqrt();
        Self { mean, deviation, is_scaled: deviation >= LEAST_DEVIATION }
    }

    /// The same comparisons with other scores: w / deviation, (b - mean) / deviation; or b - mean alone.
    ///
    /// # Errors
    /// If a tensor cannot be made.
    pub(super) fn apply(&self, adapter: Adapter) -> Result<Adapter> {
        let Some(head) = adapter.head() else { return Ok(adapter) };
        let by = if self.is_scaled { self.deviation } else { 1.0 };
        let head = ScoreHead { weight: (&head.weight / by)?, bias: ((f64::from(head.bias) - self.mean) / by) as f32 };
        adapter.with_score_head(Some(head))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deviation_of_almost_nothing_is_not_divided_by() {
        let usual = Centering::of(&[1.0, 3.0]);
        assert_eq!(usual, Centering { mean: 2.0, deviation: 1.0, is_scaled: true });
        // Scores of a model that learned nothing: a truncated response of 0.47 would get -26 by division.
        let nothing = Centering::of(&[0.501, 0.499]);
        assert!(!nothing.is_scaled && (nothing.deviation - 1e-3).abs() < 1e-12, "{nothing:?}");
        assert!(!Centering::of(&[0.5, 0.5]).is_scaled);
    }
}
