//! From a rollout to what the update trains on: per-token KL, shaped rewards, advantages and returns. Knows no model.
//! Read rewards.rs, kl.rs and gae.rs for the formulas.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::gae::gae;
use super::kl;
use super::rewards::{Ending, Shaping, scale_to_unit_variance, shape, whiten};
use super::rollout::Rollout;
use crate::config::{KlEstimator, Ppo};
use crate::model::generate::Finish;

/// Everything derived from a rollout that the update reads. Per-token vectors, one a sequence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Experience {
    /// What the roles said.
    pub rollout: Rollout,
    /// (B, R) estimates of KL(actor || reference), nats.
    pub kl: Vec<Vec<f32>>,
    /// (B, R): the weight of each token's policy gradient.
    pub advantages: Vec<Vec<f32>>,
    /// (B, R): the critic's targets.
    pub returns: Vec<Vec<f32>>,
}

/// What a rollout's scores become rewards by, besides the settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Reward per nat of KL.
    pub kl_coef: f64,
    /// Taken from each score.
    pub shift: f64,
    /// What then divides it.
    pub deviation: f64,
}

impl Experience {
    /// Of a rollout.
    ///
    /// # Errors
    /// If an answer is empty or a number is not finite.
    pub fn of(rollout: Rollout, scale: Scale, config: &Ppo) -> Result<Self> {
        let estimator = match config.kl_estimator {
            KlEstimator::K1 => kl::Estimator::K1,
            KlEstimator::K3 => kl::Estimator::K3,
        };
        let shaping = Shaping {
            kl_coef: scale.kl_coef,
            score_clip: config.score_clip().unwrap_or(f64::INFINITY),
            missing_eos_penalty: config.missing_eos_penalty.unwrap_or(0.0),
        };
        let (mut kls, mut rewards) = (vec![], vec![]);
        for (i, response) in rollout.responses.iter().enumerate() {
            let kl = kl::per_token(estimator, &response.logprobs, &rollout.reference_logprobs[i])?;
            let ending = if response.finish == Finish::Stop { Ending::Eos } else { Ending::CutOff };
            let score = (f64::from(rollout.scores[i]) - scale.shift) / scale.deviation;
            rewards.push(shape(&kl, score, ending, &shaping)?);
            kls.push(kl);
        }
        if config.whiten_rewards {
            over_all(&mut rewards, scale_to_unit_variance);
        }
        let (mut advantages, mut returns) = (vec![], vec![]);
        for (rewards, values) in rewards.iter().zip(&rollout.values) {
            let estimate = gae(rewards, values, config.gamma, config.lam)?;
            advantages.push(estimate.advantages);
            returns.push(estimate.returns);
        }
        if config.whiten_advantages {
            over_all(&mut advantages, whiten);
        }
        Ok(Self { rollout, kl: kls, advantages, returns })
    }

    /// Mean over the answers of their summed KL, nats.
    pub fn mean_kl(&self) -> f64 {
        let sums = self.kl.iter().map(|kl| kl.iter().map(|&k| f64::from(k)).sum::<f64>());
        sums.sum::<f64>() / self.kl.len() as f64
    }

    /// Response tokens of some sequences.
    pub fn tokens_of(&self, rows: &[usize]) -> usize {
        rows.iter().map(|&i| self.rollout.responses[i].tokens.len()).sum()
    }
}

/// Applies `f` to all sequences' tokens as one slice.
fn over_all(rows: &mut [Vec<f32>], f: impl FnOnce(&mut [f32])) {
    let mut flat = rows.concat();
    f(&mut flat);
    let mut at = 0;
    for row in rows {
        let next = at + row.len();
        row.copy_from_slice(&flat[at..next]);
        at = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::generate::Response;

    fn ppo() -> Ppo {
        Ppo { gamma: 1.0, lam: 1.0, kl_coef: 0.5, score_clip: 2.0, whiten_advantages: false, ..Ppo::default() }
    }

    /// Two answers: one that ended, of 2 tokens, and one that was cut off, of 3.
    fn rollout() -> Rollout {
        let response = |logprobs: &[f32], finish| Response {
            tokens: vec![9; logprobs.len()],
            logprobs: logprobs.to_vec(),
            finish,
        };
        Rollout {
            prompts: vec![vec![1], vec![1, 2]],
            responses: vec![response(&[-1.0, -2.0], Finish::Stop), response(&[-0.5, -0.5, -3.0], Finish::Length)],
            reference_logprobs: vec![vec![-1.5, -1.0], vec![-0.5, -1.5, -3.0]],
            values: vec![vec![0.25, 0.5], vec![0.0, 1.0, 2.0]],
            scores: vec![1.0, 5.0],
        }
    }

    fn judged(config: &Ppo) -> Experience {
        let scale = Scale { kl_coef: config.kl_coef, shift: 0.0, deviation: 1.0 };
        Experience::of(rollout(), scale, config).unwrap()
    }

    #[test]
    fn an_answers_return_is_its_clipped_score_less_penalties_still_to_come() {
        let config = Ppo { missing_eos_penalty: Some(0.75), ..ppo() };
        let experience = judged(&config);
        assert_eq!(experience.kl, [vec![0.5, -1.0], vec![0.0, 1.0, 0.0]]);
        // Rewards: [-0.25, 0.5 + 1], and [0, -0.5, 2 - 0.75]: 5 was clipped to 2, the cut-off answer pays 0.75.
        assert_eq!(experience.returns, [vec![1.25, 1.5], vec![0.75, 0.75, 1.25]]);
        assert_eq!(experience.advantages, [vec![1.0, 1.0], vec![0.75, -0.25, -0.75]]);
    }

    #[test]
    fn whitening_is_over_the_whole_rollout_and_leaves_the_critics_targets_alone() {
        let plain = judged(&ppo());
        let whitened = judged(&Ppo { whiten_advantages: true, ..ppo() });
        assert_eq!(whitened.returns, plain.returns);
        let flat = whitened.advantages.concat();
        assert_eq!(whitened.advantages.iter().map(Vec::len).collect::<Vec<_>>(), [2, 3]);
        let mean = flat.iter().map(|&a| f64::from(a)).sum::<f64>() / 5.0;
        let variance = flat.iter().map(|&a| (f64::from(a) - mean).powi(2)).sum::<f64>() / 4.0;
        assert!(mean.abs() < 1e-6 && (variance - 1.0).abs() < 1e-6, "{mean} {variance}");
        let ends = [&whitened.advantages[0], &whitened.advantages[1]].map(|row| row.iter().sum::<f32>());
        assert!(ends[0].abs() > 0.1, "sequence by sequence, each would sum to 0: {ends:?}");
        let scaled = judged(&Ppo { whiten_rewards: true, ..ppo() });
        assert_ne!(scaled.returns, plain.returns, "rewards are scaled before the returns");
    }

    #[test]
    fn k3_is_never_negative_and_open_scores_are_not_clipped() {
        let config = Ppo { kl_estimator: KlEstimator::K3, score_clip: 0.0, kl_coef: 0.0, ..ppo() };
        let experience = judged(&config);
        assert!(experience.kl.concat().iter().all(|&kl| kl >= 0.0) && experience.kl[0][1] > 0.0);
        assert_eq!(experience.returns[1], [5.0, 5.0, 5.0]);
    }
}
