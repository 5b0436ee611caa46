//! The policy loss of PPO and of the group methods over flat response tokens, with derivatives and training metrics. Pure
//! functions of numbers; it does not depend on the model, whose backward pass starts from the derivatives returned here.
//! Sums are in f64 and divided by a normaliser that the caller passes, so that micro-batches add up exactly to the loss of
//! their minibatch. Read `value_loss.rs` for the critic's and `update.rs` for the caller.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::kl::Estimator;
use crate::diverged;

/// Inputs of the policy loss: each (N,), over all response tokens of a micro-batch, one response after the other.
#[derive(Clone, Copy, Debug)]
pub struct PolicyTokens<'a> {
    /// Number of tokens of each response; they add up to N.
    pub lengths: &'a [usize],
    /// log pi(token) under the current policy.
    pub logprobs: &'a [f32],
    /// log pi_old(token) under the policy that sampled the rollout.
    pub old_logprobs: &'a [f32],
    /// Advantages, whitened or not.
    pub advantages: &'a [f32],
    /// log pi_ref(token) under the reference.
    pub ref_logprobs: &'a [f32],
    /// Weights of the tokens' surrogates, which are constants; the KL counts fully at every token. None = 1 for all.
    pub weights: Option<&'a [f32]>,
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
    /// Whether the KL's estimate is multiplied by the ratio, which makes it unbiased for the current policy although the tokens
    /// were sampled by the old one. Source: arXiv:2512.02556 (DeepSeek-V3.2); TRL's `use_bias_correction_kl`.
    pub kl_times_ratio: bool,
    /// Whose ratio the surrogate reads.
    pub level: RatioLevel,
    /// How tokens are averaged.
    pub average: Average,
}

/// The ratio between the current policy and the one that sampled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RatioLevel {
    /// Each token's own.
    #[default]
    Token,
    /// The geometric mean over a response's tokens, for all of them. Source: GSPO, arXiv:2507.18071 eq. 7.
    Sequence,
    /// The product over a response's tokens, for all of them: the ratio of the probabilities of the whole response. Source:
    /// RLOO, arXiv:2402.14740, as TRL clips it.
    Product,
}

/// How the losses of tokens become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Average {
    /// `sum over all tokens / normaliser`.
    #[default]
    Tokens,
    /// `sum over responses of (the mean over its tokens) / normaliser`. Source: GRPO, arXiv:2402.03300 eq. 3.
    Responses,
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
    /// `-A min(r, cap) logp`, in which the capped ratio is a weight without a derivative of its own: tokens that clipping would
    /// leave out keep a gradient. Source: CISPO, arXiv:2506.13585 eq. 4; the cap is on the ratio itself, as in TRL.
    Cispo {
        /// Largest weight.
        cap: f64,
    },
    /// `-A sigmoid(tau (r - 1)) 4 / tau` with a temperature tau by the advantage's sign: a smooth gate in place of the clip.
    /// Source: SAPO, arXiv:2511.20347.
    Sapo {
        /// Temperature where A > 0.
        positive: f64,
        /// Temperature elsewhere.
        negative: f64,
    },
    /// `-A logp`. Source: Williams (1992).
    Gradient,
}

/// A token's loss and its derivatives.
struct Term {
    loss: f64,
    /// With respect to the log-ratio.
    by_ratio: f64,
    /// With respect to the token's log-probability, beside the way through the ratio.
    by_logprob: f64,
    clipped: bool,
}

impl Objective {
    /// The clipped surrogate without other terms.
    pub fn clip(cliprange: f64) -> Self {
        Self::of(Surrogate::Clip { low: cliprange, high: cliprange, dual: None })
    }

    /// A surrogate by each token's own ratio, averaged over tokens, without other terms.
    pub fn of(surrogate: Surrogate) -> Self {
        Self {
            surrogate,
            log_ratio_clamp: f64::INFINITY,
            kl: None,
            kl_times_ratio: false,
            level: RatioLevel::Token,
            average: Average::Tokens,
        }
    }

    /// A token's loss without the KL.
    fn token(&self, logprob: f64, log_ratio: f64, advantage: f64) -> Term {
        let ratio = log_ratio.exp();
        let plain = -advantage * ratio;
        let term = |loss, by_ratio| Term { loss, by_ratio, by_logprob: 0.0, clipped: false };
        match self.surrogate {
            Surrogate::Clip { low, high, dual } => {
                let bounded = -advantage * ratio.max(1.0 - low).min(1.0 + high);
                let bound = dual.filter(|_| advantage < 0.0).map_or(f64::INFINITY, |dual| -advantage * dual);
                // If clipping is active, the loss does not depend on the ratio.
                let clipped = bounded > plain || plain > bound;
                Term { clipped, ..term(plain.max(bounded).min(bound), if clipped { 0.0 } else { plain }) }
            }
            Surrogate::KlPenalty { coef } => {
                term(plain + coef * (ratio - 1.0 - log_ratio), plain + coef * (ratio - 1.0))
            }
            Surrogate::Cispo { cap } => {
                let slope = -advantage * ratio.min(cap);
                Term { loss: slope * logprob, by_ratio: 0.0, by_logprob: slope, clipped: ratio > cap }
            }
            Surrogate::Sapo { positive, negative } => {
                let tau = if advantage > 0.0 { positive } else { negative };
                let gate = 1.0 / (1.0 + (-tau * (ratio - 1.0)).exp());
                term(-advantage * gate * 4.0 / tau, plain * 4.0 * gate * (1.0 - gate))
            }
            Surrogate::Gradient => {
                Term { loss: -advantage * logprob, by_ratio: 0.0, by_logprob: -advantage, clipped: false }
            }
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

/// `sum_t (surrogate_t + weight * kl_t) / normaliser`, or with [`Average::Responses`] each response's mean in place of its sum;
/// see [`Surrogate`] and [`Objective`]. `normaliser`: of the whole minibatch, the number of response tokens, or of responses.
///
/// # Errors
/// If lengths differ, the normaliser is not positive and finite, or the loss is NaN or infinite.
pub fn policy_loss(tokens: PolicyTokens<'_>, objective: &Objective, normaliser: f64) -> Result<Loss<PolicyStats>> {
    let PolicyTokens { lengths, logprobs, old_logprobs, advantages, ref_logprobs, weights } = tokens;
    let of_weights = weights.map_or(logprobs.len(), <[f32]>::len);
    let whole =
        [logprobs.len(), old_logprobs.len(), advantages.len(), ref_logprobs.len(), lengths.iter().sum(), of_weights];
    let n = checked_len(whole, normaliser)?;
    let mut out = Loss { loss: 0.0, grad: Vec::with_capacity(n), stats: PolicyStats::default() };
    out.stats.tokens = n as u64;
    let mut from = 0;
    for &length in lengths {
        let range = from..from + length;
        from = range.end;
        let part = |all: &'_ [f32]| -> Vec<f64> { all[range.clone()].iter().map(|&x| f64::from(x)).collect() };
        let response = Response {
            first: range.start,
            logprobs: part(logprobs),
            old_logprobs: part(old_logprobs),
            advantages: part(advantages),
            ref_logprobs: part(ref_logprobs),
            weights: weights.map(|weights| &weights[range.clone()]),
        };
        response.add_to(&mut out, objective, normaliser)?;
    }
    out.loss /= normaliser;
    Ok(out)
}

/// One response's part of [`PolicyTokens`].
struct Response<'a> {
    /// Number of the tokens before it.
    first: usize,
    logprobs: Vec<f64>,
    old_logprobs: Vec<f64>,
    advantages: Vec<f64>,
    ref_logprobs: Vec<f64>,
    weights: Option<&'a [f32]>,
}

impl Response<'_> {
    /// Adds its statistics, its derivatives, and its loss before the division by the normaliser.
    fn add_to(&self, out: &mut Loss<PolicyStats>, objective: &Objective, normaliser: f64) -> Result<()> {
        let length = self.logprobs.len();
        let share = if objective.average == Average::Responses { length as f64 } else { 1.0 };
        let own: Vec<f64> = self.logprobs.iter().zip(&self.old_logprobs).map(|(now, old)| now - old).collect();
        let total = own.iter().sum::<f64>();
        let mean = total / length.max(1) as f64;
        // What all tokens of the response do to their common ratio.
        let mut shared = 0.0;
        for (t, &own) in own.iter().enumerate() {
            let (logprob, advantage) = (self.logprobs[t], self.advantages[t]);
            let unclamped = match objective.level {
                RatioLevel::Token => own,
                RatioLevel::Sequence => mean,
                RatioLevel::Product => total,
            };
            // Not f64::clamp, which panics if a configured limit is NaN.
            let log_ratio = unclamped.min(objective.log_ratio_clamp).max(-objective.log_ratio_clamp);
            let ratio = log_ratio.exp();
            let Term { mut loss, mut by_ratio, mut by_logprob, clipped } =
                objective.token(logprob, log_ratio, advantage);
            if log_ratio != unclamped {
                by_ratio = 0.0;
                // `-A logp` has no ratio to clamp: its gradient ends there, too.
                by_logprob = if objective.surrogate == Surrogate::Gradient { 0.0 } else { by_logprob };
            }
            if let Some(weights) = self.weights {
                let weight = f64::from(weights[t]);
                (loss, by_ratio, by_logprob) = (weight * loss, weight * by_ratio, weight * by_logprob);
            }
            if let Some((estimator, weight)) = objective.kl {
                let reference = self.ref_logprobs[t];
                let (kl, slope) = (estimator.of(logprob, reference), estimator.slope(logprob, reference));
                let times = if objective.kl_times_ratio { ratio } else { 1.0 };
                loss += weight * times * kl;
                by_logprob += weight * times * slope;
                // Past the clamp the ratio is a constant.
                let moves = objective.kl_times_ratio && log_ratio == unclamped;
                by_ratio += if moves { weight * times * kl } else { 0.0 };
                out.stats.kl_clamped += u64::from(estimator.is_clamped(logprob, reference));
            }
            let own_slope = match objective.level {
                RatioLevel::Token => by_ratio + by_logprob,
                RatioLevel::Sequence => {
                    shared += by_ratio / length as f64;
                    by_logprob
                }
                RatioLevel::Product => {
                    shared += by_ratio;
                    by_logprob
                }
            };
            out.loss += loss / share;
            out.grad.push((own_slope / (normaliser * share)) as f32);
            let stats = &mut out.stats;
            stats.clipped += u64::from(clipped);
            stats.half_squares += 0.5 * log_ratio * log_ratio;
            stats.ratio_minus_one += ratio - 1.0;
            stats.ratio_minus_one_squares += (ratio - 1.0).powi(2);
            // Clamping makes an infinite log-ratio finite, so the unclamped one is checked.
            ensure!(
                loss.is_finite() && ratio.is_finite() && unclamped.is_finite(),
                diverged!(
                    "token {}: log-ratio {unclamped}, advantage {advantage}: the policy loss is NaN or infinite",
                    self.first + t
                )
            );
        }
        if objective.level != RatioLevel::Token {
            let first = out.grad.len() - length;
            for slope in &mut out.grad[first..] {
                *slope += (shared / (normaliser * share)) as f32;
            }
        }
        Ok(())
    }
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

/// The variance of `n` numbers by their sum and the sum of their squares, with n - 1 as the divisor.
pub(super) fn sample_variance(n: u64, sum: f64, squares: f64) -> f64 {
    if n < 2 { 0.0 } else { ((squares - sum * sum / n as f64) / (n - 1) as f64).max(0.0) }
}

/// The common length of per-token inputs.
pub(super) fn checked_len<const N: usize>(lengths: [usize; N], normaliser: f64) -> Result<usize> {
    let n = lengths.first().copied().unwrap_or(0);
    ensure!(lengths.iter().all(|&l| l == n), "the per-token inputs have lengths {lengths:?}");
    ensure!(normaliser.is_finite() && normaliser > 0.0, "normaliser must be positive and finite, got {normaliser}");
    Ok(n)
}

#[cfg(test)]
mod tests;
