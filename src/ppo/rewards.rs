//! Per-token rewards: a KL penalty on every token, and the response's score on its last token. Also whitening, for rewards
//! and advantages. Pure functions of numbers; it does not depend on the model. Read `kl.rs` before it, `gae.rs` after it.

use anyhow::{Result, ensure};

use crate::diverged;

/// Reward shaping: clipping and penalties of a score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shaping {
    /// Reward per nat of KL, subtracted.
    pub kl_coef: f64,
    /// Scores are clipped to ± this; infinity for no clipping.
    pub score_clip: f64,
    /// Subtracted from the score of a truncated response. This and the penalties below are subtracted after clipping, so
    /// that clipping cannot remove them.
    pub missing_eos_penalty: f64,
    /// Responses of fewer tokens pay `short_penalty`.
    pub min_length: usize,
    /// Penalty of a response shorter than `min_length`.
    pub short_penalty: f64,
    /// Penalty per token of the response.
    pub length_penalty: f64,
    /// Penalty of overlong responses.
    pub overlong: Option<Overlong>,
}

impl Default for Shaping {
    /// No shaping.
    fn default() -> Self {
        Self {
            kl_coef: 0.0,
            score_clip: f64::INFINITY,
            missing_eos_penalty: 0.0,
            min_length: 0,
            short_penalty: 0.0,
            length_penalty: 0.0,
            overlong: None,
        }
    }
}

/// Soft length limit: each token past `limit - buffer` costs `factor / buffer`. Source: arXiv:2503.14476 eq. 13.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overlong {
    /// Maximum number of tokens per response.
    pub limit: usize,
    /// Number of tokens before the limit that are penalised.
    pub buffer: usize,
    /// Penalty of a response of `limit` tokens.
    pub factor: f64,
}

impl Shaping {
    /// Sum of the penalties of a response of `length` tokens.
    fn penalty(&self, length: usize, ending: Ending) -> f64 {
        let missing = if ending == Ending::Truncated { self.missing_eos_penalty } else { 0.0 };
        let short = if length < self.min_length { self.short_penalty } else { 0.0 };
        let overlong = self.overlong.map_or(0.0, |o| {
            let over = (length + o.buffer).saturating_sub(o.limit);
            o.factor * over as f64 / o.buffer.max(1) as f64
        });
        missing + short + self.length_penalty * length as f64 + overlong
    }
}

/// How a sampled response ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By the end token (EOS). It is an action like the others: it has a KL penalty, and the score.
    Eos,
    /// By the length limit.
    Truncated,
}

/// `r_t = -kl_coef * kl_t`, and on the last token `+ clamp(score, ±score_clip) - penalties`.
/// `kl`: (R,) nats. Returns (R,) rewards in score units.
///
/// # Errors
/// If there is no token, or a value is NaN or infinite.
pub fn shape(kl: &[f32], score: f64, ending: Ending, shaping: &Shaping) -> Result<Vec<f32>> {
    ensure!(!kl.is_empty(), "a response without tokens cannot carry its score");
    ensure!(score.is_finite(), diverged!("the score of a response is {score}"));
    // Not f64::clamp, which panics if a configured limit is negative or NaN.
    let score = score.min(shaping.score_clip).max(-shaping.score_clip) - shaping.penalty(kl.len(), ending);
    let last = kl.len() - 1;
    let reward = |(t, &kl): (usize, &f32)| {
        ensure!(kl.is_finite(), diverged!("the KL of token {t} is {kl}"));
        Ok((-shaping.kl_coef * f64::from(kl) + if t == last { score } else { 0.0 }) as f32)
    };
    kl.iter().enumerate().map(reward).collect()
}

/// Whitens to mean 0 and variance 1: `(x - mean) / sqrt(var + 1e-8)`. The variance has n - 1 as divisor, as in TRL's
/// `masked_whiten`; that of a single value is 0 here. For advantages, over all response tokens of a rollout.
pub fn whiten(values: &mut [f32]) {
    let (mean, inverse) = moments(values);
    values.iter_mut().for_each(|x| *x = ((f64::from(*x) - mean) * inverse) as f32);
}

/// Scales to variance 1 and keeps the mean: [`whiten`] plus the mean. For rewards, whose sign carries information.
pub fn scale_to_unit_variance(values: &mut [f32]) {
    let (mean, inverse) = moments(values);
    values.iter_mut().for_each(|x| *x = ((f64::from(*x) - mean) * inverse + mean) as f32);
}

/// (mean, 1 / sqrt(var + 1e-8)).
fn moments(values: &[f32]) -> (f64, f64) {
    let n = values.len().max(1) as f64;
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let squares: f64 = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0).max(1.0) + 1e-8).sqrt().recip())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ppo::golden::{assert_close, floats, ppo, split};
    use crate::ppo::kl::{Estimator, per_token};

    #[test]
    fn shaped_rewards_match_golden_and_the_score_lands_on_the_last_token() {
        let golden = ppo();
        let number = |key: &str| golden[key].as_f64().unwrap();
        let shaping = Shaping {
            kl_coef: number("kl_coef"),
            score_clip: number("score_clip"),
            missing_eos_penalty: number("missing_eos_penalty"),
            ..Shaping::default()
        };
        let kl = per_token(Estimator::K1, &floats(&golden["logprobs"]), &floats(&golden["reference"])).unwrap();
        for (i, kl) in split(&kl, &golden["lengths"]).into_iter().enumerate() {
            let ending = if golden["ended"][i].as_bool().unwrap() { Ending::Eos } else { Ending::Truncated };
            let rewards = shape(kl, golden["scores"][i].as_f64().unwrap(), ending, &shaping).unwrap();
            // The KL is rounded to f32 in between, and a sum near zero keeps the rounding of its terms.
            assert_close(&rewards, &golden["shaped"][i], 16.0, "rewards");
        }
    }

    #[test]
    fn penalties_are_subtracted_after_clipping() {
        let shaping = Shaping { score_clip: 5.0, missing_eos_penalty: 1.0, ..Shaping::default() };
        assert_eq!(shape(&[0.0, 0.0], -9.0, Ending::Truncated, &shaping).unwrap(), [0.0, -6.0]);
        assert_eq!(shape(&[0.0, 0.0], -9.0, Ending::Eos, &shaping).unwrap(), [0.0, -5.0]);
        let open = Shaping { score_clip: f64::INFINITY, ..shaping };
        assert_eq!(shape(&[0.0], -9.0, Ending::Eos, &open).unwrap(), [-9.0]);
    }

    #[test]
    fn short_long_and_overlong_responses_pay_after_clipping() {
        let score = |shaping: Shaping, length: usize| {
            let rewards = shape(&vec![0.0; length], 1.0, Ending::Eos, &shaping).unwrap();
            assert!(rewards[..length - 1].iter().all(|&r| r == 0.0));
            rewards[length - 1]
        };
        let short = Shaping { min_length: 3, short_penalty: 0.75, ..Shaping::default() };
        assert_eq!([2, 3, 4].map(|n| score(short, n)), [0.25, 1.0, 1.0]);
        let long = Shaping { length_penalty: 0.125, ..Shaping::default() };
        assert_eq!([1, 8].map(|n| score(long, n)), [0.875, 0.0]);
        let overlong = Overlong { limit: 10, buffer: 4, factor: 2.0 };
        let over = Shaping { overlong: Some(overlong), score_clip: 0.5, ..Shaping::default() };
        assert_eq!([6, 7, 9, 10].map(|n| score(over, n)), [0.5, 0.0, -1.0, -1.5]);
    }

    #[test]
    fn empty_responses_and_nan_or_infinite_values_are_errors() {
        let shaping = Shaping { kl_coef: 0.1, score_clip: 5.0, ..Shaping::default() };
        assert!(shape(&[], 1.0, Ending::Eos, &shaping).is_err());
        assert!(shape(&[0.0], f64::NAN, Ending::Eos, &shaping).is_err());
        assert!(shape(&[f32::INFINITY], 1.0, Ending::Eos, &shaping).is_err());
    }

    #[test]
    fn whitening_matches_golden_with_and_without_the_mean() {
        let golden = ppo();
        let mut whitened = floats(&golden["advantages"]);
        let mut scaled = whitened.clone();
        whiten(&mut whitened);
        scale_to_unit_variance(&mut scaled);
        assert_close(&whitened, &golden["whitened"], 1.0, "whitened");
        assert_close(&scaled, &golden["scaled"], 1.0, "scaled");
    }

    #[test]
    fn whitened_values_have_mean_0_and_variance_1_even_far_from_zero() {
        let mut x: Vec<f32> = (0..1000).map(|i| 4096.0 + (i * 37 % 101) as f32 / 8.0).collect();
        whiten(&mut x);
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / 1000.0;
        let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 999.0;
        assert!(mean.abs() < 1e-6 && (variance - 1.0).abs() < 1e-6, "{mean} {variance}");
        let mut one = [3.5f32];
        whiten(&mut one);
        assert_eq!(one, [0.0], "a single advantage is whitened to 0");
        let mut same = [2.0f32; 4];
        scale_to_unit_variance(&mut same);
        assert_eq!(same, [2.0; 4]);
        whiten(&mut []);
    }
}
