//! PPO's clipped policy loss and clipped value loss over flat response tokens, with derivatives and training metrics. Pure
//! functions of numbers; it does not depend on the model, whose backward pass starts from the derivatives returned here.
//! Sums are in f64 and divided by a normaliser that the caller passes, so that micro-batches add up exactly to the loss of
//! their minibatch. Read `update.rs` for the caller.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::kl::Estimator;
use crate::diverged;

/// Inputs of the policy loss: each (N,), over all response tokens of a micro-batch.
#[derive(Clone, Copy, Debug)]
pub struct PolicyTokens<'a> {
    /// log pi(token) under the current policy.
    pub logprobs: &'a [f32],
    /// log pi_old(token) under the policy that sampled the rollout.
    pub old_logprobs: &'a [f32],
    /// Advantages, whitened or not.
    pub advantages: &'a [f32],
    /// log pi_ref(token) under the reference.
    pub ref_logprobs: &'a [f32],
}

/// Terms of the policy loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Objective {
    /// Surrogate loss of the advantages.
    pub surrogate: Surrogate,
    /// log r is clamped to ± this, with zero gradient outside; infinity for no clamping.
    pub log_ratio_clamp: f64,
    /// KL to the reference, estimated from the sampled tokens, and its weight.
    pub kl: Option<(Estimator, f64)>,
}

/// A token's loss by its ratio `r = exp(logp - old_logp)` and advantage A.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Surrogate {
    /// `max(-A r, -A clamp(r, 1 - low, 1 + high))`; with `dual`, no more than `-A dual` where A < 0.
    /// Source: arXiv:1707.06347 eq. 7; arXiv:1912.09729 eq. 5.
    Clip {
        /// Width of the clip range below 1.
        low: f64,
        /// Width of the clip range above 1.
        high: f64,
        /// Bound of the dual clip, greater than 1.
        dual: Option<f64>,
    },
    /// `-A r + coef (r - 1 - log r)`: the bracket is an unbiased, never negative estimate of KL(old || current).
    /// Source: arXiv:1707.06347 eq. 8.
    KlPenalty {
        /// Weight of the penalty.
        coef: f64,
    },
    /// `-A logp`. Source: Williams (1992).
    Gradient,
}

impl Objective {
    /// The clipped surrogate without other terms.
    pub fn clip(cliprange: f64) -> Self {
        let surrogate = Surrogate::Clip { low: cliprange, high: cliprange, dual: None };
        Self { surrogate, log_ratio_clamp: f64::INFINITY, kl: None }
    }

    /// A token's loss, its derivative with respect to logp, and whether clipping is active.
    fn token(&self, logprob: f64, log_ratio: f64, advantage: f64) -> (f64, f64, bool) {
        let ratio = log_ratio.exp();
        let plain = -advantage * ratio;
        match self.surrogate {
            Surrogate::Clip { low, high, dual } => {
                let bounded = -advantage * ratio.max(1.0 - low).min(1.0 + high);
                let bound = dual.filter(|_| advantage < 0.0).map_or(f64::INFINITY, |dual| -advantage * dual);
                // If clipping is active, the loss does not depend on the ratio.
                let clipped = bounded > plain || plain > bound;
                (plain.max(bounded).min(bound), if clipped { 0.0 } else { plain }, clipped)
            }
            Surrogate::KlPenalty { coef } => {
                (plain + coef * (ratio - 1.0 - log_ratio), plain + coef * (ratio - 1.0), false)
            }
            Surrogate::Gradient => (-advantage * logprob, -advantage, false),
        }
    }
}

/// A loss with its derivative and statistics.
#[derive(Clone, Debug)]
pub struct Loss<S> {
    /// This micro-batch's share of the minibatch's loss.
    pub loss: f64,
    /// (N,) derivative with respect to the log-probabilities (actor) or values (critic).
    pub grad: Vec<f32>,
    /// Statistics, which can be merged over micro-batches.
    pub stats: S,
}

/// `sum_t (surrogate_t + weight * kl_t) / normaliser`; see [`Surrogate`] and [`Objective`]. `normaliser`: the number
/// of response tokens in the whole minibatch.
///
/// # Errors
/// If lengths differ, the normaliser is not positive and finite, or the loss is NaN or infinite.
pub fn policy_loss(tokens: PolicyTokens<'_>, objective: &Objective, normaliser: f64) -> Result<Loss<PolicyStats>> {
    let PolicyTokens { logprobs, old_logprobs, advantages, ref_logprobs } = tokens;
    let n = checked_len([logprobs.len(), old_logprobs.len(), advantages.len(), ref_logprobs.len()], normaliser)?;
    let mut out = Loss { loss: 0.0, grad: Vec::with_capacity(n), stats: PolicyStats::default() };
    let stats = &mut out.stats;
    stats.tokens = n as u64;
    for t in 0..n {
        let advantage = f64::from(advantages[t]);
        let logprob = f64::from(logprobs[t]);
        let unclamped = logprob - f64::from(old_logprobs[t]);
        // Not f64::clamp, which panics if a configured limit is NaN.
        let log_ratio = unclamped.min(objective.log_ratio_clamp).max(-objective.log_ratio_clamp);
        let (mut loss, mut slope, clipped) = objective.token(logprob, log_ratio, advantage);
        if log_ratio != unclamped {
            slope = 0.0;
        }
        if let Some((estimator, weight)) = objective.kl {
            let ref_logprob = f64::from(ref_logprobs[t]);
            loss += weight * estimator.of(logprob, ref_logprob);
            slope += weight * estimator.slope(logprob, ref_logprob);
            stats.kl_clamped += u64::from(estimator.is_clamped(logprob, ref_logprob));
        }
        let ratio = log_ratio.exp();
        out.loss += loss;
        out.grad.push((slope / normaliser) as f32);
        stats.clipped += u64::from(clipped);
        stats.half_squares += 0.5 * log_ratio * log_ratio;
        stats.ratio_minus_one += ratio - 1.0;
        stats.ratio_minus_one_squares += (ratio - 1.0).powi(2);
        // Clamping makes an infinite log-ratio finite, so the unclamped one is checked.
        ensure!(
            loss.is_finite() && ratio.is_finite() && unclamped.is_finite(),
            diverged!("token {t}: log-ratio {unclamped}, advantage {advantage}: the policy loss is NaN or infinite")
        );
    }
    out.loss /= normaliser;
    Ok(out)
}

/// Sums from which the actor's metrics are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PolicyStats {
    tokens: u64,
    clipped: u64,
    #[serde(default)]
    kl_clamped: u64,
    half_squares: f64,
    #[serde(rename = "ratio_off")]
    ratio_minus_one: f64,
    #[serde(rename = "ratio_off_squares")]
    ratio_minus_one_squares: f64,
}

impl PolicyStats {
    /// Adds another micro-batch.
    pub fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.clipped += other.clipped;
        self.half_squares += other.half_squares;
        self.kl_clamped += other.kl_clamped;
        self.ratio_minus_one += other.ratio_minus_one;
        self.ratio_minus_one_squares += other.ratio_minus_one_squares;
    }

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Share of tokens for which clipping is active.
    pub fn clipfrac(&self) -> f64 {
        self.mean(self.clipped as f64)
    }

    /// `mean((logp - old)²) / 2`: the approximate KL between the policy that sampled and the current one, nats per token.
    pub fn approx_kl(&self) -> f64 {
        self.mean(self.half_squares)
    }

    /// Tokens whose KL in the loss was clamped, and so had no gradient.
    pub fn kl_clamped(&self) -> u64 {
        self.kl_clamped
    }

    /// Mean ratio r; 1 before the first step.
    pub fn mean_ratio(&self) -> f64 {
        1.0 + self.mean(self.ratio_minus_one)
    }

    /// Variance of r, with n - 1 as divisor; 0 for fewer than two tokens.
    pub fn ratio_variance(&self) -> f64 {
        sample_variance(self.tokens, self.ratio_minus_one, self.ratio_minus_one_squares)
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.tokens.max(1) as f64
    }
}

/// Inputs of the value loss: each (N,), in the units of rewards.
#[derive(Clone, Copy, Debug)]
pub struct ValueTokens<'a> {
    /// Values of the current critic.
    pub values: &'a [f32],
    /// Values of the critic at the rollout.
    pub old_values: &'a [f32],
    /// Returns: the targets.
    pub returns: &'a [f32],
}

/// `sum_t max((V_t - R_t)², (clamp(V_t, Vold_t ± clip) - R_t)²) / (2 normaliser)`; an infinite `clip` disables clipping.
/// Source: openai/baselines ppo2; DeepSpeed-Chat and TRL have the same.
///
/// # Errors
/// Those of [`policy_loss`].
pub fn value_loss(tokens: ValueTokens<'_>, clip: f64, normaliser: f64) -> Result<Loss<ValueStats>> {
    let ValueTokens { values, old_values, returns } = tokens;
    let n = checked_len([values.len(), old_values.len(), returns.len()], normaliser)?;
    let mut out = Loss { loss: 0.0, grad: Vec::with_capacity(n), stats: ValueStats::default() };
    let stats = &mut out.stats;
    stats.tokens = n as u64;
    for t in 0..n {
        let (value, old, target) = (f64::from(values[t]), f64::from(old_values[t]), f64::from(returns[t]));
        let error = value - target;
        let clipped_error = value.max(old - clip).min(old + clip) - target;
        let clipped = clipped_error * clipped_error > error * error;
        out.loss += 0.5 * error.powi(2).max(clipped_error.powi(2));
        out.grad.push(if clipped { 0.0 } else { (error / normaliser) as f32 });
        stats.clipped += u64::from(clipped);
        stats.value += value;
        stats.target += target;
        stats.target_squares += target * target;
        stats.error += error;
        stats.error_squares += error * error;
        ensure!(
            error.is_finite(),
            diverged!("token {t}: value {value}, return {target}: the value loss is NaN or infinite")
        );
    }
    out.loss /= normaliser;
    Ok(out)
}

/// Sums from which the critic's metrics are computed.
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

    /// Number of tokens.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Share of tokens for which clipping is active.
    pub fn clipfrac(&self) -> f64 {
        self.mean(self.clipped as f64)
    }

    /// Mean value.
    pub fn mean_value(&self) -> f64 {
        self.mean(self.value)
    }

    /// Mean return.
    pub fn mean_return(&self) -> f64 {
        self.mean(self.target)
    }

    /// `1 - Var(R - V) / Var(R)`: 1 for a perfect critic, 0 for a constant one. `None` if all returns are equal.
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

fn checked_len<const N: usize>(lengths: [usize; N], normaliser: f64) -> Result<usize> {
    let n = lengths.first().copied().unwrap_or(0);
    ensure!(lengths.iter().all(|&l| l == n), "the per-token inputs have lengths {lengths:?}");
    ensure!(normaliser.is_finite() && normaliser > 0.0, "normaliser must be positive and finite, got {normaliser}");
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
            PolicyTokens { logprobs, old_logprobs, advantages, ref_logprobs: old_logprobs }
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
            let out = policy_loss(lists.policy(0..18), &Objective::clip(clip), normaliser).unwrap();
            assert_number(out.loss, &case["loss"], "loss");
            assert_close(&out.grad, &case["grad"], 1.0, "grad");
            assert_number(out.stats.clipfrac(), &case["clipfrac"], "clipfrac");
            assert_number(out.stats.approx_kl(), &case["approx_kl"], "approx_kl");
            assert_number(out.stats.mean_ratio(), &case["mean_ratio"], "mean_ratio");
            assert_number(out.stats.ratio_variance(), &case["ratio_variance"], "ratio_variance");
            assert!(out.stats.clipfrac() > 0.1 && out.stats.clipfrac() < 0.9, "the golden reaches both branches");
        }
    }

    /// Loss and derivative of one token with ratio e^log_ratio.
    fn token(objective: Objective, log_ratio: f32, advantage: f32) -> (f64, f32) {
        let one = PolicyTokens {
            logprobs: &[log_ratio - 1.0],
            old_logprobs: &[-1.0],
            advantages: &[advantage],
            ref_logprobs: &[-1.5],
        };
        let out = policy_loss(one, &objective, 1.0).unwrap();
        (out.loss, out.grad[0])
    }

    #[test]
    fn clips_and_clamps_bound_the_loss_and_remove_the_gradient() {
        let clip =
            |low, high, dual| Objective { surrogate: Surrogate::Clip { low, high, dual }, ..Objective::clip(0.2) };
        let (up, down) = (0.5f32, -0.5f32); // ratios 1.65 and 0.61
        assert_eq!(token(clip(0.2, 0.3, None), up, 1.0), (-1.3, 0.0), "the upper clip range is its own");
        assert_eq!(token(clip(0.3, 0.2, None), down, -1.0), (0.7, 0.0), "and so is the lower");
        assert!(token(clip(0.2, 0.7, None), up, 1.0).1 < 0.0, "within the range there is a gradient");
        let (loss, grad) = token(clip(0.2, 0.2, Some(1.5)), up, -2.0);
        assert_eq!((loss, grad), (3.0, 0.0), "the loss of a negative advantage is bounded at r = 1.5");
        for at in [up, down, 0.125] {
            let (with, without) = (clip(0.2, 0.2, Some(1.5)), clip(0.2, 0.2, None));
            assert_eq!(token(with, at, 2.0), token(without, at, 2.0), "a positive advantage is not affected at {at}");
        }
        let clamped = Objective { log_ratio_clamp: 0.25, surrogate: Surrogate::KlPenalty { coef: 0.0 }, kl: None };
        for bad in [f32::NAN, f32::NEG_INFINITY] {
            let tokens =
                PolicyTokens { logprobs: &[bad], old_logprobs: &[-1.0], advantages: &[1.0], ref_logprobs: &[-1.0] };
            assert!(policy_loss(tokens, &clamped, 1.0).is_err(), "a clamp must not hide {bad}");
        }
        let (loss, grad) = token(clamped, up, 1.0);
        assert!((loss + 0.25f64.exp()).abs() < 1e-7 && grad == 0.0, "{loss} {grad}");
    }

    #[test]
    fn every_surrogates_derivative_is_the_central_difference_of_its_loss() {
        let surrogates = [
            Surrogate::Clip { low: 0.3, high: 0.4, dual: Some(3.0) },
            Surrogate::KlPenalty { coef: 0.75 },
            Surrogate::Gradient,
        ];
        for surrogate in surrogates {
            for kl in [None, Some((Estimator::K2, 0.5)), Some((Estimator::K3, 0.5))] {
                let objective = Objective { surrogate, log_ratio_clamp: f64::INFINITY, kl };
                for (at, advantage) in [(0.125f32, 1.5f32), (-0.25, -1.5), (0.25, -0.5)] {
                    let step = 1.0 / 1024.0;
                    let rise = token(objective, at + step, advantage).0 - token(objective, at - step, advantage).0;
                    let (want, got) = (rise / f64::from(2.0 * step), token(objective, at, advantage).1);
                    // Third derivatives of magnitude 1 times step²/6.
                    assert!((f64::from(got) - want).abs() < 2e-6, "{objective:?} {at} {advantage}: {got} {want}");
                }
            }
        }
        let penalty = Objective { surrogate: Surrogate::KlPenalty { coef: 2.0 }, ..Objective::clip(0.2) };
        let (loss, _) = token(penalty, 0.5, 0.0);
        assert!((loss - 2.0 * (0.5f64.exp() - 1.5)).abs() < 1e-7, "an estimate of KL(old || current)");
    }

    #[test]
    fn tokens_whose_k3_is_clamped_are_counted_and_only_with_the_kl_in_the_loss() {
        let far = PolicyTokens {
            logprobs: &[-1.0, -30.0, -1.0],
            old_logprobs: &[-1.0, -30.0, -1.0],
            advantages: &[0.0; 3],
            ref_logprobs: &[-1.5, -1.0, -25.0],
        };
        let with = |kl| policy_loss(far, &Objective { kl, ..Objective::clip(0.2) }, 3.0).unwrap();
        let k3 = with(Some((Estimator::K3, 0.5)));
        assert_eq!(k3.stats.kl_clamped(), 2);
        assert_eq!((k3.grad[1], k3.grad[2]), (0.0, 0.0), "29 and 24 nats apart");
        let mut twice = k3.stats;
        twice.merge(&k3.stats);
        assert_eq!(twice.kl_clamped(), 4);
        assert_eq!([with(None), with(Some((Estimator::K2, 0.5)))].map(|l| l.stats.kl_clamped()), [0, 0]);
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
        let whole = policy_loss(policy.policy(0..18), &Objective::clip(0.2), 18.0).unwrap();
        let mut parts = policy_loss(policy.policy(0..6), &Objective::clip(0.2), 18.0).unwrap();
        let rest = policy_loss(policy.policy(6..18), &Objective::clip(0.2), 18.0).unwrap();
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
        let out = policy_loss(lists.policy(0..18), &Objective::clip(0.2), 1.0).unwrap();
        for (gradient, advantage) in out.grad.iter().zip(&lists.0[2]) {
            assert_eq!(*gradient, -advantage);
        }
        let stats = (out.stats.clipfrac(), out.stats.mean_ratio(), out.stats.ratio_variance(), out.stats.approx_kl());
        assert_eq!(stats, (0.0, 1.0, 0.0, 0.0));
    }

    #[test]
    fn unequal_lists_empty_normalisers_and_infinite_losses_are_errors() {
        let one = PolicyTokens { logprobs: &[0.0], old_logprobs: &[0.0], advantages: &[1.0], ref_logprobs: &[0.0] };
        assert!(policy_loss(PolicyTokens { advantages: &[], ..one }, &Objective::clip(0.2), 1.0).is_err());
        assert!(policy_loss(one, &Objective::clip(0.2), 0.0).is_err());
        assert!(policy_loss(PolicyTokens { advantages: &[f32::NAN], ..one }, &Objective::clip(0.2), 1.0).is_err());
        assert!(policy_loss(PolicyTokens { logprobs: &[1e4], ..one }, &Objective::clip(0.2), 1.0).is_err());
        let one = ValueTokens { values: &[f32::INFINITY], old_values: &[0.0], returns: &[1.0] };
        assert!(value_loss(one, 0.2, 1.0).is_err());
    }
}
