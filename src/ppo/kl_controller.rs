//! Controllers that adapt PPO between iterations: the coefficients of the KL penalties, and the running scale of the scores.
//! Pure functions of numbers; it does not depend on the model. Read `state.rs` for where they are applied.

use serde::{Deserialize, Serialize};

/// Adapts the KL coefficient to the last rollout's KL:
/// `coef *= 1 + clamp(kl / target - 1, ±0.2) * responses / horizon`, so that no rollout changes it by more than
/// `0.2 responses / horizon`. Source: arXiv:1909.08593 section 2.2; TRL's `AdaptiveKLController`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptiveKlController {
    /// Target KL, nats per response.
    pub target: f64,
    /// Number of responses over which the coefficient may change by a fifth.
    pub horizon: f64,
}

impl AdaptiveKlController {
    /// The next coefficient after a rollout of `responses` responses with a mean KL of `kl` nats per response.
    pub fn next(&self, coef: f64, kl: f64, responses: usize) -> f64 {
        let error = (kl / self.target - 1.0).clamp(-0.2, 0.2);
        // A horizon shorter than a rollout must not make the coefficient negative.
        coef * (1.0 + error * responses as f64 / self.horizon).max(0.0)
    }
}

/// Adapts the coefficient of the KL to the policy that sampled, after an iteration with a KL of `kl` nats per token: it is
/// doubled above `1.5 target` and halved below `target / 1.5`. It is clamped to [1e-4, 1e4], so that it can recover after
/// many iterations in one direction. Source: arXiv:1707.06347 section 4.
pub fn adapt_kl_penalty(coef: f64, kl: f64, target: f64) -> f64 {
    let next = match kl {
        kl if kl > 1.5 * target => 2.0 * coef,
        kl if kl < target / 1.5 => 0.5 * coef,
        _ => coef,
    };
    next.clamp(1e-4, 1e4)
}

/// Running mean and variance of all scores, by the parallel update of Chan, Golub and LeVeque (1979).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunningMoments {
    count: f64,
    mean: f64,
    squares: f64,
}

impl RunningMoments {
    /// Adds a batch of scores.
    pub fn add(&mut self, values: &[f32]) {
        let n = values.len() as f64;
        if values.is_empty() {
            return;
        }
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let squares: f64 = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum();
        let all = self.count + n;
        let gap = mean - self.mean;
        self.squares += squares + gap * gap * self.count * n / all;
        self.mean += gap * n / all;
        self.count = all;
    }

    /// Mean of all scores.
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// Standard deviation, with n - 1 as divisor; 1 if it is 0 or undefined, so that dividing by it changes nothing.
    pub fn deviation(&self) -> f64 {
        let variance = self.squares / (self.count - 1.0).max(1.0);
        if variance > 0.0 { variance.sqrt() } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_adaptive_coefficient_moves_towards_the_target_by_at_most_a_fifth_per_horizon() {
        let controller = AdaptiveKlController { target: 6.0, horizon: 1000.0 };
        for (kl, direction) in [(60.0, 1.0), (6.6, 1.0), (6.0, 0.0), (5.4, -1.0), (0.0, -1.0), (-3.0, -1.0)] {
            let change = controller.next(0.1, kl, 100) / 0.1 - 1.0;
            assert!(change.abs() <= 0.2 * 100.0 / 1000.0 + 1e-12, "{kl}: {change}");
            assert!(change * direction > 1e-6 || (direction == 0.0 && change == 0.0), "{kl}: {change}");
        }
        // By hand: error 0.1, a tenth of the horizon: 1 % up.
        assert!((controller.next(0.1, 6.6, 100) - 0.101).abs() < 1e-12);
        assert!(AdaptiveKlController { target: 6.0, horizon: 1.0 }.next(0.1, 0.0, 100) >= 0.0);
    }

    #[test]
    fn the_kl_penalty_doubles_above_the_target_halves_below_it_and_is_bounded() {
        assert_eq!(
            [0.1, 0.016, 0.015, 0.01, 0.007, 0.006].map(|kl| adapt_kl_penalty(1.0, kl, 0.01)),
            [2.0, 2.0, 1.0, 1.0, 1.0, 0.5]
        );
        let many = |kl: f64| (0..100).fold(1.0, |coef, _| adapt_kl_penalty(coef, kl, 0.01));
        assert_eq!((many(1.0), many(0.0)), (1e4, 1e-4));
    }

    #[test]
    fn running_moments_equal_the_moments_of_all_values_for_any_batching() {
        let values: Vec<f32> = (0..50).map(|i| 100.0 + ((i * 37) % 23) as f32 * 0.5).collect();
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / 50.0;
        let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / 49.0;
        for cuts in [vec![50], vec![1, 7, 42], vec![25, 0, 25]] {
            let (mut moments, mut at) = (RunningMoments::default(), 0);
            for cut in cuts {
                moments.add(&values[at..at + cut]);
                at += cut;
            }
            assert!((moments.mean() - mean).abs() < 1e-12 && (moments.deviation() - variance.sqrt()).abs() < 1e-12);
        }
        let mut one = RunningMoments::default();
        assert_eq!(one.deviation(), 1.0);
        one.add(&[3.0]);
        assert_eq!((one.mean(), one.deviation()), (3.0, 1.0), "one score has no deviation");
    }
}
