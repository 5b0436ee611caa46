//! The reward of every token: a KL penalty everywhere and the answer's score on its last token. Also whitening, for
//! rewards and advantages. Pure; knows no model. Read kl.rs before and gae.rs after.

use anyhow::{Result, ensure};

/// What is done to a score before it becomes a reward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shaping {
    /// Reward per nat of KL, subtracted.
    pub kl_coef: f64,
    /// Scores are held within ± this; infinity for none.
    pub score_clip: f64,
    /// Subtracted from the clipped score of an answer that was cut off, so that clipping cannot swallow it. So are the
    /// penalties below.
    pub missing_eos_penalty: f64,
    /// Answers of fewer tokens...
    pub min_length: usize,
    /// ...pay this.
    pub short_penalty: f64,
    /// For every token of the answer.
    pub length_penalty: f64,
    /// Of long answers.
    pub overlong: Option<Overlong>,
}

impl Default for Shaping {
    /// Nothing is done.
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

/// A soft limit of the length: past `limit - buffer` tokens, each costs `factor / buffer`. Source: arXiv:2503.14476 eq. 13.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Overlong {
    /// Most tokens of an answer.
    pub limit: usize,
    /// The last so many cost.
    pub buffer: usize,
    /// What an answer of `limit` tokens pays.
    pub factor: f64,
}

impl Shaping {
    /// What an answer of `length` tokens pays besides its KL.
    fn penalty(&self, length: usize, ending: Ending) -> f64 {
        let missing = if ending == Ending::CutOff { self.missing_eos_penalty } else { 0.0 };
        let short = if length < self.min_length { self.short_penalty } else { 0.0 };
        let overlong = self.overlong.map_or(0.0, |o| {
            let over = (length + o.buffer).saturating_sub(o.limit);
            o.factor * over as f64 / o.buffer.max(1) as f64
        });
        missing + short + self.length_penalty * length as f64 + overlong
    }
}

/// How a sampled answer came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The model said so. The end token is an action like others: it carries a KL, and the score.
    Eos,
    /// The length limit.
    CutOff,
}

/// `r_t = -kl_coef * kl_t`, and on the last token `+ clamp(score, ±score_clip) - penalties`.
/// `kl`: (R,) nats. Returns (R,) in score units.
///
/// # Errors
/// If there is no token, or a number is not finite.
pub fn shape(kl: &[f32], score: f64, ending: Ending, shaping: &Shaping) -> Result<Vec<f32>> {
    ensure!(!kl.is_empty(), "an answer without tokens has no place for its score");
    ensure!(score.is_finite(), "an answer's score is {score}");
    // Not f64::clamp, which panics where a configured limit is negative or no number.
    let score = score.min(shaping.score_clip).max(-shaping.score_clip) - shaping.penalty(kl.len(), ending);
    let last = kl.len() - 1;
    let reward = |(t, &kl): (usize, &f32)| {
        ensure!(kl.is_finite(), "the KL of token {t} is {kl}");
        Ok((-shaping.kl_coef * f64::from(kl) + if t == last { score } else { 0.0 }) as f32)
    };
    kl.iter().enumerate().map(reward).collect()
}

/// To mean 0 and variance 1: `(x - mean) / sqrt(var + 1e-8)`. The variance divides by n - 1, as TRL's `masked_whiten`;
/// of a single number it is 0 here. For advantages, over all response tokens of a rollout.
pub fn whiten(values: &mut [f32]) {
    let (mean, inverse) = moments(values);
    values.iter_mut().for_each(|x| *x = ((f64::from(*x) - mean) * inverse) as f32);
}

/// To variance 1 around the mean that they have: [`whiten`] plus the mean. For rewards, whose sign says whether an
/// answer was good.
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
            let ending = if golden["ended"][i].as_bool().unwrap() { Ending::Eos } else { Ending::CutOff };
            let rewards = shape(kl, golden["scores"][i].as_f64().unwrap(), ending, &shaping).unwrap();
            // The KL went through f32 on the way, and a sum near zero keeps its terms' rounding.
            assert_close(&rewards, &golden["shaped"][i], 16.0, "rewards");
        }
    }

    #[test]
    fn the_penalty_is_not_swallowed_by_the_clip() {
        let shaping = Shaping { score_clip: 5.0, missing_eos_penalty: 1.0, ..Shaping::default() };
        assert_eq!(shape(&[0.0, 0.0], -9.0, Ending::CutOff, &shaping).unwrap(), [0.0, -6.0]);
        assert_eq!(shape(&[0.0, 0.0], -9.0, Ending::Eos, &shaping).unwrap(), [0.0, -5.0]);
        let open = Shaping { score_clip: f64::INFINITY, ..shaping };
        assert_eq!(shape(&[0.0], -9.0, Ending::Eos, &open).unwrap(), [-9.0]);
    }

    #[test]
    fn short_long_and_overlong_answers_pay_after_the_clip() {
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
    fn empty_answers_and_numbers_that_are_none_are_errors() {
        let shaping = Shaping { kl_coef: 0.1, score_clip: 5.0, ..Shaping::default() };
        assert!(shape(&[], 1.0, Ending::Eos, &shaping).is_err());
        assert!(shape(&[0.0], f64::NAN, Ending::Eos, &shaping).is_err());
        assert!(shape(&[f32::INFINITY], 1.0, Ending::Eos, &shaping).is_err());
    }

    #[test]
    fn whitening_matches_golden_with_the_mean_and_without() {
        let golden = ppo();
        let mut whitened = floats(&golden["advantages"]);
        let mut scaled = whitened.clone();
        whiten(&mut whitened);
        scale_to_unit_variance(&mut scaled);
        assert_close(&whitened, &golden["whitened"], 1.0, "whitened");
        assert_close(&scaled, &golden["scaled"], 1.0, "scaled");
    }

    #[test]
    fn whitened_numbers_have_mean_0_and_variance_1_even_far_from_zero() {
        let mut x: Vec<f32> = (0..1000).map(|i| 4096.0 + (i * 37 % 101) as f32 / 8.0).collect();
        whiten(&mut x);
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / 1000.0;
        let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 999.0;
        assert!(mean.abs() < 1e-6 && (variance - 1.0).abs() < 1e-6, "{mean} {variance}");
        let mut one = [3.5f32];
        whiten(&mut one);
        assert_eq!(one, [0.0], "a single advantage carries no comparison");
        let mut same = [2.0f32; 4];
        scale_to_unit_variance(&mut same);
        assert_eq!(same, [2.0; 4]);
        whiten(&mut []);
    }
}
