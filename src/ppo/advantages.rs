//! Advantages without a critic: from the rewards of one response, or of all responses to one prompt. Pure functions of
//! numbers; it does not depend on the model. Read `gae.rs` for the estimator that has a critic.

/// `G_t = sum over k >= t of gamma^(k - t) r_k`: the discounted return of each token of one response. (R,) -> (R,).
pub fn discounted_returns(rewards: &[f32], gamma: f64) -> Vec<f32> {
    let mut returns = vec![0.0; rewards.len()];
    let mut next = 0.0f64;
    for (slot, &reward) in returns.iter_mut().zip(rewards).rev() {
        next = f64::from(reward) + gamma * next;
        *slot = next as f32;
    }
    returns
}

/// `A_i = r_i - mean over j != i of r_j`: each response compared with the others of its group (RLOO). They sum to 0.
/// (G,) -> (G,); the advantage of a group of one is 0. Source: arXiv:2402.14740 eq. 8.
pub fn leave_one_out(rewards: &[f64]) -> Vec<f64> {
    let (n, sum) = (rewards.len() as f64, rewards.iter().sum::<f64>());
    rewards.iter().map(|r| if n < 2.0 { 0.0 } else { r - (sum - r) / (n - 1.0) }).collect()
}

/// `A_i = r_i - mean` over a group. (G,) -> (G,). Source: Dr. GRPO, arXiv:2503.20783 eq. 5.
pub fn group_centred(rewards: &[f64]) -> Vec<f64> {
    let mean = rewards.iter().sum::<f64>() / rewards.len().max(1) as f64;
    rewards.iter().map(|r| r - mean).collect()
}

/// `A_i = (r_i - mean) / (deviation + 1e-4)` over a group (GRPO), with n - 1 as the variance's divisor. (G,) -> (G,).
/// Source: arXiv:2402.03300 section 4.1.2; the 1e-4 is TRL's.
pub fn group_standardised(rewards: &[f64]) -> Vec<f64> {
    let scale = deviation(rewards) + 1e-4;
    group_centred(rewards).into_iter().map(|r| r / scale).collect()
}

/// Several rewards, each standardised in its group before their weighted sum, which is standardised over all groups: a reward
/// counts by its weight and not by its spread (GDPO). `parts`: weight and (B,) rewards of each; groups are `group` neighbours.
/// Returns (B,). Source: arXiv:2601.05242; the 1e-4 are TRL's (`normalize_then_sum`).
pub fn normalised_then_summed(parts: &[(f64, Vec<f64>)], group: usize) -> Vec<f64> {
    let mut sums = vec![0.0; parts.first().map_or(0, |(_, rewards)| rewards.len())];
    for (weight, rewards) in parts {
        let standardised = rewards.chunks(group.max(1)).flat_map(group_standardised);
        sums.iter_mut().zip(standardised).for_each(|(sum, a)| *sum += weight * a);
    }
    group_standardised(&sums)
}

/// The standard deviation, with n - 1 as the variance's divisor.
pub fn deviation(values: &[f64]) -> f64 {
    let squares: f64 = group_centred(values).iter().map(|r| r.powi(2)).sum();
    (squares / (values.len() as f64 - 1.0).max(1.0)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leave_one_out_sums_to_zero_and_is_the_scaled_distance_from_the_mean() {
        let rewards = [1.0, -2.0, 0.5, 4.0];
        let advantages = leave_one_out(&rewards);
        assert!(advantages.iter().sum::<f64>().abs() < 1e-12);
        assert!((advantages[3] - (4.0 - (1.0 - 2.0 + 0.5) / 3.0)).abs() < 1e-12);
        // n / (n - 1) times the distance from the group's mean.
        let mean = rewards.iter().sum::<f64>() / 4.0;
        for (a, r) in advantages.iter().zip(rewards) {
            assert!((a - (r - mean) * 4.0 / 3.0).abs() < 1e-12);
        }
        assert_eq!(leave_one_out(&[3.0]), [0.0]);
    }

    #[test]
    fn a_standardised_group_has_mean_0_and_deviation_1_and_equal_rewards_give_0() {
        let advantages = group_standardised(&[1.0, -2.0, 0.5, 4.0]);
        let variance = advantages.iter().map(|a| a * a).sum::<f64>() / 3.0;
        assert!(advantages.iter().sum::<f64>().abs() < 1e-12 && (variance - 1.0).abs() < 1e-3, "{advantages:?}");
        assert_eq!(group_standardised(&[2.0; 3]), [0.0; 3]);
    }

    #[test]
    fn discounted_returns_are_the_sums_of_their_definition() {
        let returns = discounted_returns(&[1.0, -2.0, 4.0], 0.5);
        assert_eq!(returns, [1.0 - 1.0 + 1.0, -2.0 + 2.0, 4.0]);
        assert!(discounted_returns(&[], 1.0).is_empty());
    }
}
