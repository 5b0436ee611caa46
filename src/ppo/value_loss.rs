//! The critic's clipped value loss over flat response tokens, with derivatives and training metrics: pure functions of
//! numbers, as in `loss.rs`, and it does not depend on the model either.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::loss::{Loss, checked_len, sample_variance};
use crate::diverged;

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
/// If lengths differ, the normaliser is not positive and finite, or the loss is NaN or infinite.
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
