//! What PPO adapts from iteration to iteration: the weight of the KL penalty, and the scale of the scores. Pure; knows no
//! model. Read rewards.rs for where both are used.

use serde::{Deserialize, Serialize};

/// Changes the KL penalty's weight by what the last rollout's KL was:
/// `coef *= 1 + clamp(kl / target - 1, ±0.2) * answers / horizon`, so that no rollout changes it by more than
/// `0.2 answers / horizon`. Source: arXiv:1909.08593 section 2.2; TRL's `AdaptiveKLController`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdaptiveKl {
    /// Wanted KL, nats an answer.
    pub target: f64,
    /// Answers over which the weight may change by a fifth.
    pub horizon: f64,
}

impl AdaptiveKl {
    /// The next weight, after a rollout of `answers` answers with a mean KL of `kl` nats an answer.
    pub fn next(&self, coef: f64, kl: f64, answers: usize) -> f64 {
        let error = (kl / self.target - 1.0).clamp(-0.2, 0.2);
        // A horizon shorter than a rollout must not turn the penalty's sign.
        coef * (1.0 + error * answers as f64 / self.horizon).max(0.0)
    }
}

/// The weight of the KL to the actor that sampled, after an iteration that ended at a distance of `kl` nats a token:
/// doubled beyond `1.5 target`, halved below `target / 1.5`, and kept within [1e-4, 1e4]: a run that stays near for long
/// must find back. Source: arXiv:1707.06347 section 4.
pub fn lagrange(coef: f64, kl: f64, target: f64) -> f64 {
    let next = match kl {
        kl if kl > 1.5 * target => 2.0 * coef,
        kl if kl < target / 1.5 => 0.5 * coef,
        _ => coef,
    };
    next.clamp(1e-4, 1e4)
}

/// Mean and variance of all scores so far, by the parallel update of Chan, Golub and LeVeque (1979).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunningMoments {
    count: f64,
    mean: f64,
    squares: f64,
}

impl RunningMoments {
    /// Takes in another batch.
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

    /// Of everything taken in.
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// Standard deviation, dividing by n - 1; 1 where there is none yet, so that dividing by it changes nothing.
    pub fn deviation(&self) -> f64 {
        let variance = self.squares / (self.count - 1.0).max(1.0);
        if variance > 0.0 { variance.sqrt() } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_adaptive_weight_moves_towards_the_target_and_never_by_more_than_a_fifth_of_its_share() {
        let control = AdaptiveKl { target: 6.0, horizon: 1000.0 };
        for (kl, direction) in [(60.0, 1.0), (6.6, 1.0), (6.0, 0.0), (5.4, -1.0), (0.0, -1.0), (-3.0, -1.0)] {
            let change = control.next(0.1, kl, 100) / 0.1 - 1.0;
            assert!(change.abs() <= 0.2 * 100.0 / 1000.0 + 1e-12, "{kl}: {change}");
            assert!(change * direction > 1e-6 || (direction == 0.0 && change == 0.0), "{kl}: {change}");
        }
        // By hand: error 0.1, a tenth of the horizon: 1 % up.
        assert!((control.next(0.1, 6.6, 100) - 0.101).abs() < 1e-12);
        assert!(AdaptiveKl { target: 6.0, horizon: 1.0 }.next(0.1, 0.0, 100) >= 0.0);
    }

    #[test]
    fn the_lagrange_weight_doubles_when_far_halves_when_near_and_is_bounded() {
        assert_eq!(
            [0.1, 0.016, 0.015, 0.01, 0.007, 0.006].map(|kl| lagrange(1.0, kl, 0.01)),
            [2.0, 2.0, 1.0, 1.0, 1.0, 0.5]
        );
        let many = |kl: f64| (0..100).fold(1.0, |coef, _| lagrange(coef, kl, 0.01));
        assert_eq!((many(1.0), many(0.0)), (1e4, 1e-4));
    }

    #[test]
    fn running_moments_are_those_of_all_values_at_once_however_they_came() {
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
