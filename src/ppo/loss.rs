//! The two clipped losses of PPO over flat response tokens, with their derivatives and the numbers one watches. Pure;
//! knows no model: the backward pass of the network starts from the derivatives given here. Sums are in f64 and
//! divided by a normaliser that the caller names, so that micro-batches add up to their minibatch's loss exactly.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// What the actor's loss reads: each (N,), over all response tokens of a micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct PolicyTokens<'a> {
    /// Of the sampled tokens, now.
    pub logprobs: &'a [f32],
    /// Of the same tokens when they were sampled.
    pub old_logprobs: &'a [f32],
    /// From GAE, whitened or not.
    pub advantages: &'a [f32],
}

/// A loss, its derivative and what happened on the way.
#[derive(Clone, Debug)]
pub struct Loss<S> {
    /// This micro-batch's share.
    pub loss: f64,
    /// (N,): the derivative by log-probability (actor) or value (critic).
    pub grad: Vec<f32>,
    /// Mergeable over micro-batches.
    pub stats: S,
}

/// `sum_t max(-A_t r_t, -A_t clamp(r_t, 1 - clip, 1 + clip)) / normaliser`, `r_t = exp(logp_t - old_t)`.
/// `normaliser`: the response tokens of the whole minibatch. Source: arXiv:1707.06347 eq. 7.
///
/// # Errors
/// If lengths differ, the normaliser is not positive, or the loss is not finite.
pub fn policy_loss(tokens: PolicyTokens<'_>, clip: f64, normaliser: f64) -> Result<Loss<PolicyStats>> {
    let PolicyTokens { logprobs, old_logprobs, advantages } = tokens;
    let n = checked_len([logprobs.len(), old_logprobs.len(), advantages.len()], normaliser)?;
    let mut out = Loss { loss: 0.0, grad: Vec::with_capacity(n), stats: PolicyStats::default() };
    let stats = &mut out.stats;
    stats.tokens = n as u64;
    for t in 0..n {
        let advantage = f64::from(advantages[t]);
        let log_ratio = f64::from(logprobs[t]) - f64::from(old_logprobs[t]);
        let ratio = log_ratio.exp();
        let plain = -advantage * ratio;
        let clipped = -advantage * ratio.max(1.0 - clip).min(1.0 + clip);
        let held = clipped > plain; // then the ratio is outside and the loss does not depend on it
        out.loss += plain.max(clipped);
        out.grad.push(if held { 0.0 } else { (plain / normaliser) as f32 });
        stats.clipped += u64::from(held);
        stats.half_squares += 0.5 * log_ratio * log_ratio;
        stats.ratio_off += ratio - 1.0;
        stats.ratio_off_squares += (ratio - 1.0).powi(2);
        ensure!(plain.is_finite(), "token {t}: ratio {ratio}, advantage {advantage}: the policy loss is not finite");
    }
    out.loss /= normaliser;
    Ok(out)
}

/// Sums behind the actor's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PolicyStats {
    tokens: u64,
    clipped: u64,
    half_squares: f64,
    ratio_off: f64,
    ratio_off_squares: f64,
}

impl PolicyStats {
    /// Adds another micro-batch.
    pub fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.clipped += other.clipped;
        self.half_squares += other.half_squares;
        self.ratio_off += other.ratio_off;
        self.ratio_off_squares += other.ratio_off_squares;
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Share of tokens whose gradient the clip removed.
    pub fn clipfrac(&self) -> f64 {
        self.mean(self.clipped as f64)
    }

    /// `mean((logp - old)²) / 2`: the distance of the actor from the one that sampled, nats per token.
    pub fn approx_kl(&self) -> f64 {
        self.mean(self.half_squares)
    }

    /// Mean of r; 1 before the first step.
    pub fn mean_ratio(&self) -> f64 {
        1.0 + self.mean(self.ratio_off)
    }

    /// Variance of r, dividing by n - 1; 0 for less than two tokens.
    pub fn ratio_variance(&self) -> f64 {
        sample_variance(self.tokens, self.ratio_off, self.ratio_off_squares)
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.tokens.max(1) as f64
    }
}

/// What the critic's loss reads: each (N,), in the units of rewards.
#[derive(Clone, Copy, Debug)]
pub struct ValueTokens<'a> {
    /// Now.
    pub values: &'a [f32],
    /// When the answers were sampled.
    pub old_values: &'a [f32],
    /// Targets, from GAE.
    pub returns: &'a [f32],
}

/// `sum_t max((V_t - R_t)², (clamp(V_t, Vold_t ± clip) - R_t)²) / (2 normaliser)`; `clip` infinite is no clip.
/// Source: openai/baselines ppo2; DeepSpeed-Chat and TRL have the same.
///
/// # Errors
/// As [`policy_loss`].
pub fn value_loss(tokens: ValueTokens<'_>, clip: f64, normaliser: f64) -> Result<Loss<ValueStats>> {
    let ValueTokens { values, old_values, returns } = tokens;
    let n = checked_len([values.len(), old_values.len(), returns.len()], normaliser)?;
    let mut out = Loss { loss: 0.0, grad: Vec::with_capacity(n), stats: ValueStats::default() };
    let stats = &mut out.stats;
    stats.tokens = n as u64;
    for t in 0..n {
        let (value, old, target) = (f64::from(values[t]), f64::from(old_values[t]), f64::from(returns[t]));
        let error = value - target;
        let held_error = value.max(old - clip).min(old + clip) - target;
        let held = held_error * held_error > error * error;
        out.loss += 0.5 * error.powi(2).max(held_error.powi(2));
        out.grad.push(if held { 0.0 } else { (error / normaliser) as f32 });
        stats.clipped += u64::from(held);
        stats.value += value;
        stats.target += target;
        stats.target_squares += target * target;
        stats.error += error;
        stats.error_squares += error * error;
        ensure!(error.is_finite(), "token {t}: value {value}, return {target}: the value loss is not finite");
    }
    out.loss /= normaliser;
    Ok(out)
}

/// Sums behind the critic's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ValueStats {
    tokens: u64,
    clipped: u64,
    value: f64,
    target: f64,
    target_squares: f64,
    error: f64,
    error_squares: f64,
}

impl ValueStats {
    /// Adds another micro-batch.
    pub fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.clipped += other.clipped;
        self.value += other.value;
        self.target += other.target;
        self.target_squares += other.target_squares;
        self.error += other.error;
        self.error_squares += other.error_squares;
    }

    /// Tokens seen.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Share of tokens whose gradient the clip removed.
    pub fn clipfrac(&self) -> f64 {
        self.mean(self.clipped as f64)
    }

    /// Mean of V.
    pub fn mean_value(&self) -> f64 {
        self.mean(self.value)
    }

    /// Mean of R.
    pub fn mean_return(&self) -> f64 {
        self.mean(self.target)
    }

    /// `1 - Var(R - V) / Var(R)`: 1 for a perfect critic, 0 for a constant one. `None` where all returns are equal.
    pub fn explained_variance(&self) -> Option<f64> {
        let total = sample_variance(self.tokens, self.target, self.target_squares);
        (total > 0.0).then(|| 1.0 - sample_variance(self.tokens, self.error, self.error_squares) / total)
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.tokens.max(1) as f64
    }
}

fn sample_variance(n: u64, sum: f64, squares: f64) -> f64 {
    if n < 2 { 0.0 } else { ((squares - sum * sum / n as f64) / (n - 1) as f64).max(0.0) }
}

fn checked_len(lengths: [usize; 3], normaliser: f64) -> Result<usize> {
    let [n, ..] = lengths;
    ensure!(lengths.iter().all(|&l| l == n), "three lists of the same tokens have lengths {lengths:?}");
    ensure!(normaliser.is_finite() && normaliser > 0.0, "the loss is to be divided by {normaliser}");
    Ok(n)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::ppo::golden::{assert_close, assert_number, floats, ppo};

    struct Lists([Vec<f32>; 3]);

    impl Lists {
        fn of(golden: &Value, keys: [&str; 3]) -> Self {
            Self(keys.map(|k| floats(&golden[k])))
        }

        fn policy(&self, range: std::ops::Range<usize>) -> PolicyTokens<'_> {
            let [logprobs, old_logprobs, advantages] = self.0.each_ref().map(|l| &l[range.clone()]);
            PolicyTokens { logprobs, old_logprobs, advantages }
        }

        fn value(&self, range: std::ops::Range<usize>) -> ValueTokens<'_> {
            let [values, old_values, returns] = self.0.each_ref().map(|l| &l[range.clone()]);
            ValueTokens { values, old_values, returns }
        }
    }

    const POLICY: [&str; 3] = ["logprobs", "old", "advantages"];
    const VALUE: [&str; 3] = ["values", "old_values", "returns"];

    #[test]
    fn policy_loss_and_gradient_match_autograd_golden() {
        let golden = ppo();
        let lists = Lists::of(&golden, POLICY);
        for case in golden["policy"].as_array().unwrap() {
            let (clip, normaliser) = (case["clip"].as_f64().unwrap(), case["normaliser"].as_f64().unwrap());
            let out = policy_loss(lists.policy(0..18), clip, normaliser).unwrap();
            assert_number(out.loss, &case["loss"], "loss");
            assert_close(&out.grad, &case["grad"], 1.0, "grad");
            assert_number(out.stats.clipfrac(), &case["clipfrac"], "clipfrac");
            assert_number(out.stats.approx_kl(), &case["approx_kl"], "approx_kl");
            assert_number(out.stats.mean_ratio(), &case["mean_ratio"], "mean_ratio");
            assert_number(out.stats.ratio_variance(), &case["ratio_variance"], "ratio_variance");
            assert!(out.stats.clipfrac() > 0.1 && out.stats.clipfrac() < 0.9, "the golden reaches both branches");
        }
    }

    #[test]
    fn value_loss_and_gradient_match_autograd_golden() {
        let golden = ppo();
        let lists = Lists::of(&golden, VALUE);
        for case in golden["value"].as_array().unwrap() {
            let (clip, normaliser) = (case["clip"].as_f64().unwrap(), case["normaliser"].as_f64().unwrap());
            let out = value_loss(lists.value(0..18), clip, normaliser).unwrap();
            assert_number(out.loss, &case["loss"], "loss");
            assert_close(&out.grad, &case["grad"], 1.0, "grad");
            assert_number(out.stats.clipfrac(), &case["clipfrac"], "clipfrac");
            assert_number(out.stats.mean_value(), &case["mean_value"], "mean_value");
            assert_number(out.stats.mean_return(), &case["mean_return"], "mean_return");
            assert_number(out.stats.explained_variance().unwrap(), &case["explained_variance"], "explained_variance");
        }
        let clipped = value_loss(lists.value(0..18), 0.2, 18.0).unwrap();
        assert!(clipped.stats.clipfrac() > 0.0 && clipped.stats.clipfrac() < 1.0);
        let open = value_loss(lists.value(0..18), f64::INFINITY, 18.0).unwrap();
        assert_eq!(open.stats.clipfrac(), 0.0);
    }

    #[test]
    fn micro_batches_add_up_to_the_minibatch() {
        let golden = ppo();
        let (policy, value) = (Lists::of(&golden, POLICY), Lists::of(&golden, VALUE));
        let whole = policy_loss(policy.policy(0..18), 0.2, 18.0).unwrap();
        let mut parts = policy_loss(policy.policy(0..6), 0.2, 18.0).unwrap();
        let rest = policy_loss(policy.policy(6..18), 0.2, 18.0).unwrap();
        assert_eq!([&parts.grad[..], &rest.grad[..]].concat(), whole.grad);
        assert!((parts.loss + rest.loss - whole.loss).abs() < 1e-15);
        parts.stats.merge(&rest.stats);
        assert!((parts.stats.ratio_variance() - whole.stats.ratio_variance()).abs() < 1e-12);
        assert_eq!(parts.stats.clipfrac(), whole.stats.clipfrac());
        assert_eq!(parts.stats.tokens(), 18);

        let whole = value_loss(value.value(0..18), 0.2, 18.0).unwrap();
        let mut parts = value_loss(value.value(0..1), 0.2, 18.0).unwrap();
        let rest = value_loss(value.value(1..18), 0.2, 18.0).unwrap();
        assert_eq!([&parts.grad[..], &rest.grad[..]].concat(), whole.grad);
        assert_eq!(parts.stats.explained_variance(), None, "one token");
        parts.stats.merge(&rest.stats);
        let (a, b) = (parts.stats.explained_variance().unwrap(), whole.stats.explained_variance().unwrap());
        assert!((a - b).abs() < 1e-12);
    }

    #[test]
    fn before_the_first_step_the_gradient_is_the_advantage_and_nothing_is_clipped() {
        let golden = ppo();
        let lists = Lists::of(&golden, ["old", "old", "advantages"]);
        let out = policy_loss(lists.policy(0..18), 0.2, 1.0).unwrap();
        for (gradient, advantage) in out.grad.iter().zip(&lists.0[2]) {
            assert_eq!(*gradient, -advantage);
        }
        let stats = (out.stats.clipfrac(), out.stats.mean_ratio(), out.stats.ratio_variance(), out.stats.approx_kl());
        assert_eq!(stats, (0.0, 1.0, 0.0, 0.0));
    }

    #[test]
    fn unequal_lists_empty_normalisers_and_infinite_losses_are_errors() {
        let one = PolicyTokens { logprobs: &[0.0], old_logprobs: &[0.0], advantages: &[1.0] };
        assert!(policy_loss(PolicyTokens { advantages: &[], ..one }, 0.2, 1.0).is_err());
        assert!(policy_loss(one, 0.2, 0.0).is_err());
        assert!(policy_loss(PolicyTokens { advantages: &[f32::NAN], ..one }, 0.2, 1.0).is_err());
        assert!(policy_loss(PolicyTokens { logprobs: &[1e4], ..one }, 0.2, 1.0).is_err());
        let one = ValueTokens { values: &[f32::INFINITY], old_values: &[0.0], returns: &[1.0] };
        assert!(value_loss(one, 0.2, 1.0).is_err());
    }
}
