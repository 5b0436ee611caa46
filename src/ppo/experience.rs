//! Experience: what the update trains on, computed from a rollout (per-token KL, shaped rewards, advantages, returns). It
//! does not depend on bases or adapters. Read `rewards.rs`, `kl.rs`, `gae.rs` and `advantages.rs` for the formulas.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::advantages::{
    deviation, discounted_returns, group_centred, group_standardised, leave_one_out, normalised_then_summed,
};
use super::gae::gae;
use super::kl;
use super::kl::Estimator;
use super::rewards::{Ending, Overlong, Shaping, scale_to_unit_variance, shape, whiten};
use super::rollout::Rollout;
use crate::config::{AdvantageEstimator, Aggregation, KlEstimator, KlIn, Ppo, ScaleRewards, WhitenRewards};
use crate::model::generate::FinishReason;
use crate::reward::source::PartScores;

/// A rollout with everything that the update reads. Per-token vectors, one per sequence.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Experience {
    /// Responses with the outputs of the roles.
    pub rollout: Rollout,
    /// (B, R) estimates of KL(actor || reference), nats, for every rewarded action; empty where no KL is measured.
    pub kl: Vec<Vec<f32>>,
    /// (B, R) advantages: the weight of each token's policy gradient.
    pub advantages: Vec<Vec<f32>>,
    /// (B, R) returns: the critic's targets; empty without a critic.
    pub returns: Vec<Vec<f32>>,
    /// (B) sum of each response's rewards as the advantages read them: clipped, with penalties, scaled, and with the KL
    /// if it is in the reward.
    #[serde(default)]
    pub rewards: Vec<f64>,
    /// Tokens whose k3 estimate of the KL is clamped.
    #[serde(default)]
    pub kl_clamped: usize,
    /// Number of responses whose score `score_clip` clipped.
    #[serde(default)]
    pub clipped: usize,
}

/// The run's current scaling of KL and scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Reward per nat of KL, subtracted.
    pub kl_coef: f64,
    /// Subtracted from each score.
    pub shift: f64,
    /// Divides each score after the shift.
    pub deviation: f64,
}

impl Experience {
    /// Computes rewards, advantages and returns of a rollout.
    ///
    /// # Errors
    /// If a response is empty, or a value is NaN or infinite.
    pub fn of(rollout: Rollout, scale: Scale, config: &Ppo) -> Result<Self> {
        let shaping = shaping(scale.kl_coef, config);
        let (mut kls, mut rewards, mut last_values) = (vec![], vec![], vec![]);
        let (mut kl_clamped, mut clipped) = (0, 0);
        for (i, response) in rollout.responses.iter().enumerate() {
            let (now, reference) = (&response.logprobs, rollout.ref_logprobs.get(i));
            let kl = match (reference, rollout.exact_kl.get(i), estimator(config.kl_estimator)) {
                (None, ..) => vec![0.0; response.tokens.len()],
                (_, Some(exact), _) => exact.clone(),
                (Some(reference), None, e) => {
                    let e = e.unwrap_or(Estimator::K1);
                    kl_clamped +=
                        now.iter().zip(reference).filter(|&(&p, &q)| e.is_clamped(p.into(), q.into())).count();
                    kl::per_token(e, now, reference)?
                }
            };
            let ending = if response.finish == FinishReason::Stop { Ending::Eos } else { Ending::Truncated };
            // The value of the last state stands in place of the score: it estimates what the finished response would
            // get, and the score of the unfinished one besides would count the end twice.
            let last_value = rollout.last_values.get(i).filter(|_| ending == Ending::Truncated);
            let score = match last_value {
                Some(_) => 0.0,
                None => (f64::from(rollout.scores[i]) - scale.shift) / scale.deviation,
            };
            clipped += usize::from(score.abs() > shaping.score_clip);
            rewards.push(shape(&kl, score, ending, &shaping)?);
            last_values.push(last_value.map_or(0.0, |&v| f64::from(v)));
            kls.extend(reference.map(|_| kl));
        }
        match config.whiten_rewards {
            WhitenRewards::No => {}
            WhitenRewards::KeepMean => over_all(&mut rewards, scale_to_unit_variance),
            WhitenRewards::RemoveMean => over_all(&mut rewards, whiten),
        }
        let totals = rewards.iter().map(|row| row.iter().map(|&r| f64::from(r)).sum()).collect();
        let (mut advantages, mut returns) =
            advantages(&rewards, (&rollout.values, &last_values), &rollout.parts, config)?;
        let mut rollout = rollout;
        drop_untrained(&mut rollout, &mut advantages, &mut returns);
        if config.whiten_advantages() {
            over_all(&mut advantages, whiten);
        }
        Ok(Self { rollout, kl: kls, advantages, returns, rewards: totals, kl_clamped, clipped })
    }

    /// Mean KL per response, summed over its tokens, nats; none where no KL is measured.
    pub fn mean_kl(&self) -> Option<f64> {
        let sums = self.kl.iter().map(|kl| kl.iter().map(|&k| f64::from(k)).sum::<f64>());
        (!self.kl.is_empty()).then(|| sums.sum::<f64>() / self.kl.len() as f64)
    }

    /// Number of response tokens of some sequences.
    pub fn tokens_of(&self, rows: &[usize]) -> usize {
        rows.iter().map(|&i| self.rollout.responses[i].tokens.len()).sum()
    }
}

/// Removes the actions that are rewarded but not trained on, so that every list has one entry per trained token.
fn drop_untrained(rollout: &mut Rollout, advantages: &mut [Vec<f32>], returns: &mut [Vec<f32>]) {
    for (i, &trained) in std::mem::take(&mut rollout.trained).iter().enumerate() {
        let response = &mut rollout.responses[i];
        let d = rollout.ref_hidden[i].len() / response.tokens.len().max(1);
        response.tokens.truncate(trained);
        rollout.ref_hidden[i].truncate(trained * d);
        let lists = [&mut response.logprobs, &mut rollout.ref_logprobs[i], &mut advantages[i]];
        let more = rollout.values.get_mut(i).into_iter().chain(returns.get_mut(i));
        lists.into_iter().chain(more).for_each(|list| list.truncate(trained));
    }
}

/// The reward shaping that the settings choose.
fn shaping(kl_coef: f64, config: &Ppo) -> Shaping {
    let (limit, buffer) = (config.response_length, config.overlong_buffer_len);
    let overlong = Overlong { limit, buffer, factor: config.overlong_penalty_factor };
    Shaping {
        kl_coef: if config.kl_in == KlIn::Reward { kl_coef } else { 0.0 },
        score_clip: config.score_clip().unwrap_or(f64::INFINITY),
        missing_eos_penalty: config.missing_eos_penalty.unwrap_or(0.0),
        min_length: config.min_response_length,
        short_penalty: config.short_response_penalty,
        length_penalty: config.length_penalty,
        overlong: (buffer > 0).then_some(overlong),
    }
}

/// The estimator from sampled tokens; `None` for the exact KL.
pub fn estimator(kl: KlEstimator) -> Option<Estimator> {
    match kl {
        KlEstimator::K1 => Some(Estimator::K1),
        KlEstimator::K2 => Some(Estimator::K2),
        KlEstimator::K3 => Some(Estimator::K3),
        KlEstimator::Exact => None,
    }
}

/// (B, R) values of response tokens.
type PerToken = Vec<Vec<f32>>;

/// (advantages, returns), (B, R) each. `values`: (B, R), with (B) values of the state after the last token. `parts`: the terms
/// of the scores, if they are a sum. Returns are the critic's targets, and empty without one.
fn advantages(
    rewards: &[Vec<f32>],
    (values, last_values): (&[Vec<f32>], &[f64]),
    parts: &[PartScores],
    config: &Ppo,
) -> Result<(PerToken, PerToken)> {
    let with_critic = |lam: f64| {
        let states = values.iter().zip(last_values);
        let both = rewards.iter().zip(states).map(|(rewards, (v, &last))| gae(rewards, v, last, config.gamma, lam));
        let both = both.map(|both| both.map(|gae| (gae.advantages, gae.returns)));
        both.collect::<Result<Vec<_>>>().map(|both| both.into_iter().unzip())
    };
    let totals = || rewards.iter().map(|r| r.iter().map(|&r| f64::from(r)).sum()).collect::<Vec<f64>>();
    let by_group = |of: &dyn Fn(&[f64]) -> Vec<f64>| {
        let totals = totals();
        let each = totals.chunks(config.num_generations).flat_map(of);
        each.zip(rewards).map(|(a, rewards)| vec![a as f32; rewards.len()]).collect::<Vec<_>>()
    };
    match config.advantage_estimator {
        AdvantageEstimator::Gae => with_critic(config.lam),
        AdvantageEstimator::A2c => with_critic(1.0),
        AdvantageEstimator::Reinforce | AdvantageEstimator::ReinforcePlusPlus => {
            Ok((rewards.iter().map(|rewards| discounted_returns(rewards, config.gamma)).collect(), vec![]))
        }
        AdvantageEstimator::Rloo => match config.normalize_advantages {
            false => Ok((by_group(&leave_one_out), vec![])),
            true => {
                // Their mean is 0: those of a group add up to it.
                let plain: Vec<f64> = totals().chunks(config.num_generations).flat_map(leave_one_out).collect();
                let scale = deviation(&plain) + 1e-4;
                let of = |rewards: &[f64]| leave_one_out(rewards).into_iter().map(|a| a / scale).collect();
                Ok((by_group(&of), vec![]))
            }
        },
        AdvantageEstimator::ReinforcePlusPlusBaseline => Ok((by_group(&group_centred), vec![])),
        AdvantageEstimator::Grpo if config.aggregation == Aggregation::NormalizeThenSum => {
            let doubles = |part: &PartScores| part.scores.iter().map(|&s| f64::from(s)).collect();
            let mut terms: Vec<(f64, Vec<f64>)> = parts.iter().map(|part| (part.weight, doubles(part))).collect();
            if terms.is_empty() {
                terms.push((1.0, totals()));
            }
            let each = normalised_then_summed(&terms, config.num_generations);
            Ok((each.into_iter().zip(rewards).map(|(a, rewards)| vec![a as f32; rewards.len()]).collect(), vec![]))
        }
        AdvantageEstimator::Grpo => match config.scale_rewards {
            ScaleRewards::Group => Ok((by_group(&group_standardised), vec![])),
            ScaleRewards::None => Ok((by_group(&group_centred), vec![])),
            ScaleRewards::Batch => {
                let scale = deviation(&totals()) + 1e-4;
                let of = |rewards: &[f64]| group_centred(rewards).into_iter().map(|r| r / scale).collect();
                Ok((by_group(&of), vec![]))
            }
        },
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
        Ppo { gamma: 1.0, lam: 1.0, kl_coef: 0.5, score_clip: 2.0, whiten_advantages: Some(false), ..Ppo::default() }
    }

    /// Two responses: one of 2 tokens that ended, and one of 3 tokens that was truncated.
    fn rollout() -> Rollout {
        let response = |logprobs: &[f32], finish| Response {
            tokens: vec![9; logprobs.len()],
            logprobs: logprobs.to_vec(),
            finish,
        };
        Rollout {
            prompts: vec![vec![1], vec![1, 2]],
            responses: vec![
                response(&[-1.0, -2.0], FinishReason::Stop),
                response(&[-0.5, -0.5, -3.0], FinishReason::Length),
            ],
            ref_logprobs: vec![vec![-1.5, -1.0], vec![-0.5, -1.5, -3.0]],
            values: vec![vec![0.25, 0.5], vec![0.0, 1.0, 2.0]],
            scores: vec![1.0, 5.0],
            ..Rollout::default()
        }
    }

    fn experience_of(config: &Ppo) -> Experience {
        let scale = Scale { kl_coef: config.kl_coef, shift: 0.0, deviation: 1.0 };
        Experience::of(rollout(), scale, config).unwrap()
    }

    #[test]
    fn returns_are_the_clipped_score_less_the_kl_and_truncation_penalties() {
        let config = Ppo { missing_eos_penalty: Some(0.75), ..ppo() };
        let found = experience_of(&config);
        assert_eq!(found.kl, [vec![0.5, -1.0], vec![0.0, 1.0, 0.0]]);
        // Rewards: [-0.25, 0.5 + 1], and [0, -0.5, 2 - 0.75]: 5 was clipped to 2, the truncated response pays 0.75.
        assert_eq!(found.returns, [vec![1.25, 1.5], vec![0.75, 0.75, 1.25]]);
        assert_eq!(found.advantages, [vec![1.0, 1.0], vec![0.75, -0.25, -0.75]]);
        assert_eq!(found.clipped, 1, "5 is beyond the clip of 2, and 1 is not");
    }

    #[test]
    fn advantages_are_whitened_over_the_whole_rollout_and_returns_are_not() {
        let plain = experience_of(&ppo());
        let whitened = experience_of(&Ppo { whiten_advantages: Some(true), ..ppo() });
        assert_eq!(whitened.returns, plain.returns);
        let flat = whitened.advantages.concat();
        assert_eq!(whitened.advantages.iter().map(Vec::len).collect::<Vec<_>>(), [2, 3]);
        let mean = flat.iter().map(|&a| f64::from(a)).sum::<f64>() / 5.0;
        let variance = flat.iter().map(|&a| (f64::from(a) - mean).powi(2)).sum::<f64>() / 4.0;
        assert!(mean.abs() < 1e-6 && (variance - 1.0).abs() < 1e-6, "{mean} {variance}");
        let ends = [&whitened.advantages[0], &whitened.advantages[1]].map(|row| row.iter().sum::<f32>());
        assert!(ends[0].abs() > 0.1, "sequence by sequence, each would sum to 0: {ends:?}");
        let scaled = experience_of(&Ppo { whiten_rewards: WhitenRewards::KeepMean, ..ppo() });
        assert_ne!(scaled.returns, plain.returns, "rewards are scaled before the returns");
    }

    #[test]
    fn every_penalty_of_the_settings_changes_the_last_reward() {
        let last = |config: Ppo| {
            let returns = experience_of(&Ppo { kl_coef: 0.0, ..config }).returns;
            [returns[0][1], returns[1][2]]
        };
        assert_eq!(last(ppo()), [1.0, 2.0]);
        assert_eq!(last(Ppo { missing_eos_penalty: Some(0.5), ..ppo() }), [1.0, 1.5]);
        assert_eq!(last(Ppo { min_response_length: 3, short_response_penalty: 0.25, ..ppo() }), [0.75, 2.0]);
        assert_eq!(last(Ppo { length_penalty: 0.25, ..ppo() }), [0.5, 1.25]);
        let overlong = Ppo { response_length: 3, overlong_buffer_len: 2, overlong_penalty_factor: 4.0, ..ppo() };
        assert_eq!(last(overlong), [-1.0, -2.0]);
    }

    #[test]
    fn group_advantages_compare_the_total_rewards_of_a_groups_responses() {
        let of = |advantage_estimator, config: Ppo| {
            experience_of(&Ppo { advantage_estimator, num_generations: 2, ..config }).advantages
        };
        // Total rewards: 1 - 0.5 (0.5 - 1) = 1.25 and 2 - 0.5 = 1.5.
        let unwhitened = Ppo { whiten_advantages: None, ..ppo() };
        assert_eq!(of(AdvantageEstimator::Rloo, unwhitened.clone()), [vec![-0.25; 2], vec![0.25; 3]]);
        let grpo = of(AdvantageEstimator::Grpo, unwhitened);
        assert!((grpo[1][0] - 0.125 / (0.03125f32.sqrt() + 1e-4)).abs() < 1e-6, "{grpo:?}");
        assert_eq!(of(AdvantageEstimator::Reinforce, ppo()), [vec![1.25, 1.5], vec![1.5, 1.5, 2.0]]);
        let flat = of(AdvantageEstimator::ReinforcePlusPlus, ppo()).concat();
        assert!(flat.iter().sum::<f32>().abs() < 1e-6, "standardised even where whitening is off: {flat:?}");
        assert!(experience_of(&Ppo { advantage_estimator: AdvantageEstimator::Rloo, ..ppo() }).returns.is_empty());
        assert_eq!(of(AdvantageEstimator::A2c, ppo())[0], [1.0, 1.0]);
    }

    #[test]
    fn the_exact_kl_replaces_the_estimate_and_a_kl_in_the_loss_is_not_in_the_reward() {
        let exact = Rollout { exact_kl: vec![vec![0.25, 0.5], vec![1.0, 0.0, 2.0]], ..rollout() };
        let scale = Scale { kl_coef: 0.5, shift: 0.0, deviation: 1.0 };
        let experience = Experience::of(exact, scale, &ppo()).unwrap();
        assert_eq!(experience.kl[1], [1.0, 0.0, 2.0]);
        assert_eq!(experience.returns[0], [1.0 - 0.375, 1.0 - 0.25]);
        assert!((experience.mean_kl().unwrap() - 3.75 / 2.0).abs() < 1e-12);
        let in_loss = experience_of(&Ppo { kl_in: KlIn::Loss, kl_estimator: KlEstimator::K2, ..ppo() });
        assert_eq!(in_loss.returns, [vec![1.0; 2], vec![2.0; 3]]);
    }

    #[test]
    fn the_total_reward_is_what_was_trained_on_and_clamped_tokens_are_counted() {
        let config = Ppo { missing_eos_penalty: Some(0.75), ..ppo() };
        // 1 - 0.5 (0.5 - 1) = 1.25; 5 is clipped to 2, less 0.75 and 0.5 of KL.
        assert_eq!(experience_of(&config).rewards, [1.25, 0.75]);
        let in_loss = Ppo { kl_in: KlIn::Loss, kl_estimator: KlEstimator::K3, ..config };
        assert_eq!(experience_of(&in_loss).rewards, [1.0, 1.25], "no KL in the reward");
        let scale = Scale { kl_coef: 0.5, shift: 1.0, deviation: 8.0 };
        assert_eq!(Experience::of(rollout(), scale, &ppo()).unwrap().rewards, [0.25, 0.0], "scaled scores");
        let mut far = rollout();
        far.ref_logprobs = vec![vec![-1.5, -23.0], vec![-21.0, -1.5, -3.0]];
        let scale = Scale { kl_coef: 0.0, shift: 0.0, deviation: 1.0 };
        let clamped = |config: &Ppo| Experience::of(far.clone(), scale, config).unwrap().kl_clamped;
        assert_eq!((clamped(&in_loss), clamped(&ppo())), (2, 0), "21 and 20.5 nats");
    }

    #[test]
    fn a_truncated_response_is_bootstrapped_by_the_last_states_value_in_place_of_its_score() {
        let cut = Rollout { last_values: vec![7.0, -1.5], ..rollout() };
        let scale = Scale { kl_coef: 0.5, shift: 0.0, deviation: 1.0 };
        let config = Ppo { gamma: 0.5, missing_eos_penalty: Some(0.25), ..ppo() };
        let found = Experience::of(cut, scale, &config).unwrap();
        // The ended response keeps its score. The other: rewards [0, -0.5, -0.25], then V = -1.5 discounted.
        let plain = experience_of(&config);
        assert_eq!((&found.returns[0], found.rewards[0]), (&plain.returns[0], plain.rewards[0]));
        assert_eq!(found.returns[1], [-0.5, -1.0, -1.0]);
        assert_eq!(found.advantages[1], [-0.5, -2.0, -3.0]);
        assert_eq!(found.rewards[1], -0.75, "without the score of 5, clipped to 2");
    }

    #[test]
    fn whitening_counts_the_trained_actions_only() {
        // The first response's second action is rewarded and not trained on, as under compat = "dschat".
        let padded = Rollout { trained: vec![1, 3], ref_hidden: vec![vec![0.0; 2], vec![0.0; 3]], ..rollout() };
        let scale = Scale { kl_coef: 0.5, shift: 0.0, deviation: 1.0 };
        let of = |whiten: bool| {
            Experience::of(padded.clone(), scale, &Ppo { whiten_advantages: Some(whiten), ..ppo() }).unwrap().advantages
        };
        let (plain, whitened) = (of(false), of(true));
        assert_eq!(plain.iter().map(Vec::len).collect::<Vec<_>>(), [1, 3]);
        let mut want = plain.concat();
        whiten(&mut want);
        assert_eq!(whitened.concat(), want);
    }

    #[test]
    fn running_moments_shift_and_scale_scores_before_the_clip() {
        let scale = Scale { kl_coef: 0.0, shift: 1.0, deviation: 8.0 };
        let experience = Experience::of(rollout(), scale, &ppo()).unwrap();
        assert_eq!((experience.returns[0][1], experience.returns[1][2]), (0.0, 0.5));
    }

    #[test]
    fn k3_is_never_negative_and_a_score_clip_of_0_clips_nothing() {
        let config = Ppo { kl_estimator: KlEstimator::K3, score_clip: 0.0, kl_coef: 0.0, ..ppo() };
        let found = experience_of(&config);
        assert!(found.kl.concat().iter().all(|&kl| kl >= 0.0) && found.kl[0][1] > 0.0);
        assert_eq!((&found.returns[1][..], found.clipped), (&[5.0, 5.0, 5.0][..], 0));
    }

    /// Rewards of two groups of three, and TRL's advantages of them (tests/golden/grpo_loss.py).
    #[test]
    fn groups_are_scaled_as_trl_scales_them_golden() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/grpo_loss.json")).unwrap();
        let list = |value: &serde_json::Value| serde_json::from_value::<Vec<f32>>(value.clone()).unwrap();
        let scores = list(&golden["rewards"]);
        let of = |estimator: AdvantageEstimator, scale_rewards: ScaleRewards| {
            let one = Response { tokens: vec![9], logprobs: vec![-1.0], finish: FinishReason::Stop };
            let rollout = Rollout {
                prompts: vec![vec![1]; 6],
                responses: vec![one; 6],
                ref_logprobs: vec![vec![-1.0]; 6],
                values: vec![],
                scores: scores.clone(),
                ..Rollout::default()
            };
            let config = Ppo { advantage_estimator: estimator, scale_rewards, num_generations: 3, ..Ppo::default() };
            let scale = Scale { kl_coef: 0.0, shift: 0.0, deviation: 1.0 };
            Experience::of(rollout, scale, &config).unwrap().advantages.concat()
        };
        for (key, scale) in
            [("group", ScaleRewards::Group), ("batch", ScaleRewards::Batch), ("none", ScaleRewards::None)]
        {
            let (got, want) = (of(AdvantageEstimator::Grpo, scale), list(&golden["advantages"][key]));
            assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-6), "{key}: {got:?} and {want:?}");
        }
        // REINFORCE++ with a baseline: centred by group, then mean 0 and variance 1 over all tokens.
        let got = of(AdvantageEstimator::ReinforcePlusPlusBaseline, ScaleRewards::Group);
        let mut want = list(&golden["advantages"]["none"]);
        whiten(&mut want);
        assert_eq!(got, want);
        assert!((got.iter().map(|a| a * a).sum::<f32>() / 6.0 - 1.0).abs() < 0.2 && got[2] > 1.0);
    }

    /// Two rewards of two groups of three, and TRL's advantages of them (tests/golden/group_loss.py).
    #[test]
    fn several_rewards_are_normalised_as_trl_normalises_them_golden() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/group_loss.json")).unwrap();
        let rewards: Vec<[f32; 2]> = serde_json::from_value(golden["rewards"].clone()).unwrap();
        let weights: Vec<f64> = serde_json::from_value(golden["weights"].clone()).unwrap();
        let parts: Vec<PartScores> = weights
            .iter()
            .enumerate()
            .map(|(i, &weight)| PartScores {
                weight,
                scores: rewards.iter().map(|both| both[i]).collect(),
                ..PartScores::default()
            })
            .collect();
        let sums = rewards.iter().map(|both| (0..2).map(|i| weights[i] * f64::from(both[i])).sum::<f64>() as f32);
        let of = |scores: Vec<f32>, parts: &[PartScores], config: Ppo| {
            let one = Response { tokens: vec![9], logprobs: vec![-1.0], finish: FinishReason::Stop };
            let rollout = Rollout {
                prompts: vec![vec![1]; 6],
                responses: vec![one; 6],
                scores,
                parts: parts.to_vec(),
                ..Rollout::default()
            };
            let config = Ppo { num_generations: 3, score_clip: 0.0, kl_coef: 0.0, measure_kl: false, ..config };
            let found = Experience::of(rollout, Scale { kl_coef: 0.0, shift: 0.0, deviation: 1.0 }, &config).unwrap();
            assert!(found.kl.is_empty() && found.mean_kl().is_none(), "there is no reference");
            found.advantages.concat()
        };
        let close = |got: Vec<f32>, want: &serde_json::Value| {
            let want: Vec<f32> = serde_json::from_value(want.clone()).unwrap();
            assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-6), "{got:?} and {want:?}");
        };
        let cases = golden["advantages"].as_array().unwrap();
        for case in cases {
            let config = Ppo {
                advantage_estimator: AdvantageEstimator::Grpo,
                scale_rewards: serde_json::from_value(case["scale_rewards"].clone()).unwrap(),
                aggregation: serde_json::from_value(case["aggregation"].clone()).unwrap(),
                ..Ppo::default()
            };
            close(of(sums.clone().collect(), &parts, config), &case["advantages"]);
        }
        assert_eq!(cases.len(), 4);
        for (key, normalize_advantages) in [("plain", false), ("normalized", true)] {
            let first = rewards.iter().map(|both| both[0]).collect();
            let rloo = Ppo { advantage_estimator: AdvantageEstimator::Rloo, normalize_advantages, ..Ppo::default() };
            close(of(first, &[], rloo), &golden["rloo_advantages"][key]);
        }
    }
}
