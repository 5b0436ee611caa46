//! The losses of DPO and KTO over whole responses, with their derivatives by the response's summed log-probability.
//!
//! Pure functions in f64. They do not depend on a model. Read `pairs.rs` and `kto.rs` next.

use anyhow::{Result, ensure};

use crate::diverged;

/// One response under the policy and under the reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Response {
    /// Sum of its tokens' log-probabilities, nats.
    pub logp: f64,
    /// The same under the reference.
    pub reference: f64,
    /// Its tokens, end token included.
    pub tokens: usize,
}

impl Response {
    /// log of the policy's probability over the reference's.
    pub fn log_ratio(&self) -> f64 {
        self.logp - self.reference
    }
}

/// How a pair is compared; h = log-ratio of the chosen response less that of the rejected.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PairLoss {
    /// `-(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)`. Source: arXiv:2305.18290 eq. 7; s: Mitchell (2023).
    Sigmoid {
        /// s, the share of labels that are wrong.
        label_smoothing: f64,
    },
    /// `(-(1 - s) log sigmoid(beta h) + s log sigmoid(-beta h)) / (1 - 2 s)`. Source: arXiv:2403.00409 eq. 11.
    Robust {
        /// s, below one half.
        label_smoothing: f64,
    },
    /// `(h' - 1 / (2 beta))²`, h' of log-ratios divided by their tokens. Source: arXiv:2310.12036 eq. 17; the division
    /// by tokens is what the paper's authors ran, and TRL.
    Ipo,
    /// `max(0, 1 - beta h)`. Source: arXiv:2305.10425.
    Hinge,
}

/// A loss with its derivatives by the two summed log-probabilities.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PairGradient {
    /// The pair's loss.
    pub loss: f64,
    /// dL / d chosen.logp.
    pub chosen: f64,
    /// dL / d rejected.logp.
    pub rejected: f64,
}

impl PairLoss {
    /// The loss of one pair.
    ///
    /// # Errors
    /// If a response has no token, or the loss is not finite.
    pub fn of(self, beta: f64, chosen: Response, rejected: Response) -> Result<PairGradient> {
        ensure!(chosen.tokens > 0 && rejected.tokens > 0, "a response of a pair has no token");
        let h = chosen.log_ratio() - rejected.log_ratio();
        let (right, wrong) = (sigmoid(beta * h), sigmoid(-beta * h));
        let pair = |loss: f64, by_h: f64| PairGradient { loss, chosen: by_h, rejected: -by_h };
        let found = match self {
            Self::Sigmoid { label_smoothing: s } => {
                pair((1.0 - s) * softplus(-beta * h) + s * softplus(beta * h), beta * (s * right - (1.0 - s) * wrong))
            }
            Self::Robust { label_smoothing: s } => pair(
                ((1.0 - s) * softplus(-beta * h) - s * softplus(beta * h)) / (1.0 - 2.0 * s),
                -beta * ((1.0 - s) * wrong + s * right) / (1.0 - 2.0 * s),
            ),
            Self::Hinge => {
                let slack = 1.0 - beta * h;
                pair(slack.max(0.0), if slack > 0.0 { -beta } else { 0.0 })
            }
            Self::Ipo => {
                let (c, r) = (chosen.tokens as f64, rejected.tokens as f64);
                let off = chosen.log_ratio() / c - rejected.log_ratio() / r - 1.0 / (2.0 * beta);
                PairGradient { loss: off * off, chosen: 2.0 * off / c, rejected: -2.0 * off / r }
            }
        };
        // The hinge of NaN would be 0.
        ensure!(
            found.loss.is_finite() && h.is_finite(),
            diverged!("log-ratios {} and {}: the loss is not finite", chosen.log_ratio(), rejected.log_ratio())
        );
        Ok(found)
    }
}

/// The weights and the strength of KTO.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KtoLoss {
    /// How dear it is to leave the reference.
    pub beta: f64,
    /// Of good responses.
    pub desirable_weight: f64,
    /// Of bad ones.
    pub undesirable_weight: f64,
}

impl KtoLoss {
    /// (loss, dL / d logp) of one response: `w (1 - sigmoid(beta (log_ratio - kl)))` where it is good, and
    /// `w (1 - sigmoid(beta (kl - log_ratio)))` where it is bad. `kl` is a constant: no derivative goes through it.
    /// Source: arXiv:2402.01306 eq. 8.
    ///
    /// # Errors
    /// If the log-ratio is not finite.
    pub fn of(self, log_ratio: f64, good: bool, kl: f64) -> Result<(f64, f64)> {
        ensure!(
            log_ratio.is_finite() && kl.is_finite(),
            diverged!("log-ratio {log_ratio}, KL {kl}: the loss is not finite")
        );
        let (weight, sign) = if good { (self.desirable_weight, 1.0) } else { (self.undesirable_weight, -1.0) };
        let gain = sigmoid(sign * self.beta * (log_ratio - kl));
        Ok((weight * (1.0 - gain), -sign * weight * self.beta * gain * (1.0 - gain)))
    }
}

/// KTO's estimate of KL(policy || reference): the mean log-ratio of responses that were given to other prompts, held at
/// 0 or above. NaN of none.
pub fn mismatched_kl(log_ratios: &[f64]) -> f64 {
    let mean = log_ratios.iter().sum::<f64>() / log_ratios.len() as f64;
    if mean < 0.0 { 0.0 } else { mean } // f64::max would turn a NaN into 0
}

/// 1 / (1 + e^-x); never overflows.
fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// log(1 + e^x) = -log sigmoid(-x).
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn golden() -> Value {
        serde_json::from_str(include_str!("../../tests/golden/dpo.json")).unwrap()
    }

    fn response(v: &Value) -> Response {
        let x = |key: &str| v[key].as_f64().unwrap();
        Response { logp: x("logp"), reference: x("reference"), tokens: v["tokens"].as_u64().unwrap() as usize }
    }

    /// Both sides are f64; a derivative may be the difference of two numbers near 1.
    fn near(got: f64, want: &Value, what: &str) {
        let want = want.as_f64().unwrap();
        assert!((got - want).abs() <= 1e-12 * want.abs().max(1.0), "{what}: {got} {want}");
    }

    #[test]
    fn every_pair_loss_and_its_derivatives_match_the_papers_formulas() {
        let golden = golden();
        let cases = golden["pairs"].as_array().unwrap();
        for case in cases {
            let label_smoothing = case["label_smoothing"].as_f64().unwrap();
            let name = case["loss_type"].as_str().unwrap();
            let loss = match name {
                "sigmoid" => PairLoss::Sigmoid { label_smoothing },
                "robust" => PairLoss::Robust { label_smoothing },
                "ipo" => PairLoss::Ipo,
                "hinge" => PairLoss::Hinge,
                other => panic!("{other}"),
            };
            let beta = case["beta"].as_f64().unwrap();
            let got = loss.of(beta, response(&case["chosen"]), response(&case["rejected"])).unwrap();
            near(got.loss, &case["loss"], name);
            near(got.chosen, &case["chosen_grad"], name);
            near(got.rejected, &case["rejected_grad"], name);
        }
        assert_eq!(cases.len(), 6 * 5, "six settings of the loss, five pairs");
    }

    #[test]
    fn ktos_losses_and_derivatives_match_the_papers_formulas() {
        for case in golden()["kto"].as_array().unwrap() {
            let x = |key: &str| case[key].as_f64().unwrap();
            let loss = KtoLoss {
                beta: x("beta"),
                desirable_weight: x("desirable_weight"),
                undesirable_weight: x("undesirable_weight"),
            };
            let off: Vec<f64> = case["mismatched"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
            let kl = mismatched_kl(&off);
            near(kl, &case["kl"], "kl");
            let rows = case["answers"].as_array().unwrap();
            let mut mean = 0.0;
            for row in rows {
                let got = loss.of(response(row).log_ratio(), row["label"].as_bool().unwrap(), kl).unwrap();
                mean += got.0 / rows.len() as f64;
                near(got.1 / rows.len() as f64, &row["grad"], "grad");
            }
            near(mean, &case["loss"], "loss");
        }
    }

    #[test]
    fn losses_are_log_2_at_the_reference_and_far_ratios_stay_finite() {
        let at = |logp: f64| Response { logp, reference: -30.0, tokens: 7 };
        let plain = PairLoss::Sigmoid { label_smoothing: 0.0 };
        assert_eq!(plain.of(0.1, at(-30.0), at(-30.0)).unwrap().loss, 2f64.ln());
        for far in [-1e5, 1e5] {
            let got = plain.of(1.0, at(far), at(-far)).unwrap();
            assert!(got.loss.is_finite() && got.chosen <= 0.0 && got.rejected >= 0.0, "{got:?}");
        }
        let ratios = [plain, PairLoss::Robust { label_smoothing: 0.1 }, PairLoss::Hinge, PairLoss::Ipo];
        for (loss, bad) in ratios.into_iter().flat_map(|l| [f64::NAN, f64::NEG_INFINITY].map(|bad| (l, bad))) {
            assert!(loss.of(0.1, at(bad), at(-30.0)).is_err() && loss.of(0.1, at(-30.0), at(bad)).is_err(), "{loss:?}");
        }
        assert!(plain.of(0.1, Response { tokens: 0, ..at(-30.0) }, at(-30.0)).is_err());
    }

    #[test]
    fn a_negative_kl_estimate_is_held_at_0_and_nan_is_not_hidden() {
        assert_eq!(mismatched_kl(&[-3.0, 1.0]), 0.0);
        assert_eq!(mismatched_kl(&[3.0, 1.0]), 2.0);
        assert!(mismatched_kl(&[f64::NAN, 1.0]).is_nan());
        let loss = KtoLoss { beta: 0.1, desirable_weight: 1.0, undesirable_weight: 1.0 };
        assert!(loss.of(f64::NAN, true, 0.0).is_err());
        // A good response is pushed up, a bad one down.
        assert!(loss.of(0.3, true, 0.0).unwrap().1 < 0.0 && loss.of(0.3, false, 0.0).unwrap().1 > 0.0);
    }
}
