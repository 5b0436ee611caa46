//! Generalised advantage estimation (GAE): per-token rewards and values -> advantages and returns, one sequence at a time.
//! A pure function of numbers; it does not depend on the model. Read `rewards.rs` before it and `loss.rs` after it.

use anyhow::{Result, ensure};

use crate::diverged;

/// Inputs of the two losses.
#[derive(Clone, Debug, PartialEq)]
pub struct Gae {
    /// (R,) advantages, for the actor.
    pub advantages: Vec<f32>,
    /// (R,) returns = advantages + values: the critic's targets.
    pub returns: Vec<f32>,
}

/// `A_t = d_t + gamma*lambda*A_{t+1}`, `d_t = r_t + gamma*V_{t+1} - V_t`, with A zero after the last token and V there
/// `last_value`: 0 for a response that is over, the critic's value of the last state for one that was cut off and is to be
/// bootstrapped. `rewards`, `values`: (R,) of one sequence, V_t is the value before token t is sampled. Accumulates in
/// f64. Source: arXiv:1506.02438 eq. 16.
///
/// # Errors
/// If the lengths differ, or a value is NaN or infinite.
pub fn gae(rewards: &[f32], values: &[f32], last_value: f64, gamma: f64, lambda: f64) -> Result<Gae> {
    let (n, m) = (rewards.len(), values.len());
    ensure!(n == m, "a response has {n} rewards and {m} values");
    let (mut advantages, mut returns) = (vec![0.0; n], vec![0.0; n]);
    let (mut next_advantage, mut next_value) = (0.0f64, last_value);
    for t in (0..n).rev() {
        let value = f64::from(values[t]);
        let delta = f64::from(rewards[t]) + gamma * next_value - value;
        next_advantage = delta + gamma * lambda * next_advantage;
        next_value = value;
        ensure!(next_advantage.is_finite(), diverged!("the advantage of token {t} is {next_advantage}"));
        advantages[t] = next_advantage as f32;
        returns[t] = (next_advantage + value) as f32;
    }
    Ok(Gae { advantages, returns })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ppo::golden::{assert_close, floats, ppo, split};

    #[test]
    fn gae_matches_the_sum_of_its_definition_on_ragged_responses() {
        let golden = ppo();
        let values = floats(&golden["values"]);
        for case in golden["gae"].as_array().unwrap() {
            let (gamma, lambda) = (case["gamma"].as_f64().unwrap(), case["lam"].as_f64().unwrap());
            for (i, values) in split(&values, &golden["lengths"]).into_iter().enumerate() {
                let out = gae(&floats(&case["rewards"][i]), values, 0.0, gamma, lambda).unwrap();
                assert_close(&out.advantages, &case["advantages"][i], 1.0, "advantages");
                assert_close(&out.returns, &case["returns"][i], 1.0, "returns");
            }
        }
    }

    #[test]
    fn with_lambda_1_returns_are_the_discounted_sum_of_rewards_and_do_not_depend_on_values() {
        let (rewards, gamma) = ([1.0f32, -2.0, 0.5, 4.0], 0.9f64);
        let mut want = [0.0f64; 4];
        for (t, slot) in want.iter_mut().enumerate() {
            *slot = rewards[t..].iter().enumerate().map(|(k, &r)| gamma.powi(k as i32) * f64::from(r)).sum();
        }
        for values in [[0.0f32; 4], [3.0, -1.0, 0.25, 7.0]] {
            let out = gae(&rewards, &values, 0.0, gamma, 1.0).unwrap();
            for t in 0..4 {
                assert!((f64::from(out.returns[t]) - want[t]).abs() < 1e-6);
                assert!((f64::from(out.advantages[t]) - (want[t] - f64::from(values[t]))).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn a_bootstrapped_response_has_the_advantages_of_its_first_tokens_in_a_longer_one() {
        // Cut after two of four tokens, with the value of the state in which the third would have been sampled: with
        // lambda = 0 each advantage reads one state ahead, so the cut changes none; with lambda = 1 the return is
        // r_0 + gamma r_1 + gamma² V_2.
        let (rewards, values, gamma) = ([0.5f32, -1.0, 0.25, 2.0], [0.75f32, -0.5, 1.5, 3.0], 0.9);
        let whole = gae(&rewards, &values, 0.0, gamma, 0.0).unwrap();
        let cut = gae(&rewards[..2], &values[..2], 1.5, gamma, 0.0).unwrap();
        assert_eq!((&cut.advantages[..], &cut.returns[..]), (&whole.advantages[..2], &whole.returns[..2]));
        let returns = gae(&rewards[..2], &values[..2], 1.5, gamma, 1.0).unwrap().returns;
        assert!((f64::from(returns[0]) - (0.5 - gamma + gamma * gamma * 1.5)).abs() < 1e-6, "{returns:?}");
        assert!((f64::from(returns[1]) - (-1.0 + gamma * 1.5)).abs() < 1e-6, "{returns:?}");
    }

    #[test]
    fn unequal_lengths_and_nan_are_errors() {
        assert!(gae(&[1.0], &[1.0, 2.0], 0.0, 1.0, 0.95).is_err());
        assert!(gae(&[1.0, f32::NAN], &[1.0, 2.0], 0.0, 1.0, 0.95).is_err());
        assert!(gae(&[], &[], 0.0, 1.0, 0.95).unwrap().advantages.is_empty());
    }
}
