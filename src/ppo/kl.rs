//! Estimators of KL(actor || reference) from the log-probabilities of sampled tokens. Pure functions of numbers; it does
//! not depend on the model. Read `rewards.rs` next.

use anyhow::{Result, ensure};

use crate::diverged;

/// Largest |d| of [`Estimator::K3`], nats: exp is already 4.9e8 there. Tokens beyond it are counted in the metrics, because
/// the estimate is constant there and its slope 0.
pub const K3_LIMIT: f64 = 20.0;

/// An estimator of a token's KL from one sample, with d = log p - log p_ref.
/// Source: J. Schulman, "Approximating KL divergence" (2020).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Estimator {
    /// d: unbiased, can be negative.
    K1,
    /// d² / 2: biased, small variance.
    K2,
    /// exp(-d) + d - 1: unbiased and never negative. d is clamped to ±[`K3_LIMIT`].
    K3,
}

impl Estimator {
    /// The estimate of one token, in nats.
    pub fn of(self, logprob: f64, ref_logprob: f64) -> f64 {
        let d = logprob - ref_logprob;
        match self {
            Self::K1 => d,
            Self::K2 => 0.5 * d * d,
            Self::K3 => {
                let gap = (-d).clamp(-K3_LIMIT, K3_LIMIT);
                gap.exp_m1() - gap // exp_m1: exp(gap) - 1 would lose all digits near 0
            }
        }
    }

    /// Derivative of the estimate with respect to `logprob`.
    pub fn slope(self, logprob: f64, ref_logprob: f64) -> f64 {
        let d = logprob - ref_logprob;
        match self {
            Self::K1 => 1.0,
            Self::K2 => d,
            Self::K3 if self.is_clamped(logprob, ref_logprob) => 0.0,
            Self::K3 => -(-d).exp_m1(),
        }
    }

    /// Whether the estimate is clamped, so that its slope is 0.
    pub fn is_clamped(self, logprob: f64, ref_logprob: f64) -> bool {
        self == Self::K3 && (logprob - ref_logprob).abs() > K3_LIMIT
    }
}

/// Per-token estimates. `logprobs`, `ref_logprobs`: (R,) log-probabilities of the sampled tokens under actor and reference.
///
/// # Errors
/// If the lengths differ, or a log-probability is NaN or infinite.
pub fn per_token(estimator: Estimator, logprobs: &[f32], ref_logprobs: &[f32]) -> Result<Vec<f32>> {
    let (n, m) = (logprobs.len(), ref_logprobs.len());
    ensure!(n == m, "{n} log-probabilities of the actor and {m} of the reference");
    logprobs
        .iter()
        .zip(ref_logprobs)
        .map(|(&p, &q)| {
            ensure!(
                p.is_finite() && q.is_finite(),
                diverged!("a sampled token has log-probability {p}, under the reference {q}")
            );
            Ok(estimator.of(p.into(), q.into()) as f32)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ppo::golden::{assert_close, floats, ppo};

    #[test]
    fn all_three_estimators_match_golden() {
        let golden = ppo();
        let (p, q) = (floats(&golden["logprobs"]), floats(&golden["reference"]));
        for (estimator, key) in [(Estimator::K1, "k1"), (Estimator::K2, "k2"), (Estimator::K3, "k3")] {
            assert_close(&per_token(estimator, &p, &q).unwrap(), &golden["kl"][key], 2.0, key);
        }
    }

    #[test]
    fn k3_is_never_negative_precise_near_zero_and_finite() {
        for d in [-300.0f64, -1.0, -1e-9, 0.0, 1e-9, 0.3, 300.0] {
            let k3 = Estimator::K3.of(d, 0.0);
            assert!((0.0..5e8).contains(&k3), "{d}: {k3}");
        }
        let tiny = Estimator::K3.of(1e-5, 0.0);
        assert!((tiny / 5e-11 - 1.0).abs() < 1e-4, "d²/2 to first order: {tiny}");
    }

    #[test]
    fn only_k3_is_clamped_beyond_20_nats_on_either_side_where_its_slope_is_0() {
        for (d, beyond) in [(-20.5, true), (-19.5, false), (0.0, false), (19.5, false), (20.5, true)] {
            assert_eq!(Estimator::K3.is_clamped(d, 0.0), beyond, "{d}");
            assert_eq!(Estimator::K3.slope(d, 0.0) == 0.0, beyond || d == 0.0, "{d}");
            assert!(!Estimator::K1.is_clamped(d, 0.0) && !Estimator::K2.is_clamped(d, 0.0));
        }
    }

    #[test]
    fn slopes_are_the_central_differences_of_the_estimates() {
        for estimator in [Estimator::K1, Estimator::K2, Estimator::K3] {
            for d in [-3.0f64, -0.5, 0.0, 1e-3, 2.0] {
                let step = 1e-5;
                let want = (estimator.of(d + step, 0.25) - estimator.of(d - step, 0.25)) / (2.0 * step);
                let got = estimator.slope(d, 0.25);
                assert!((got - want).abs() < 1e-7 * want.abs().max(1.0), "{estimator:?} {d}: {got} {want}");
            }
        }
    }

    #[test]
    fn unequal_lengths_and_infinite_logprobs_are_errors() {
        assert!(per_token(Estimator::K1, &[0.0], &[0.0, 1.0]).is_err());
        assert!(per_token(Estimator::K1, &[f32::NEG_INFINITY], &[-1.0]).is_err());
    }
}
