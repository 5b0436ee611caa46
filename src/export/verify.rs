//! Verification of exports: logits of an exported model against base + adapter, position by position.
//!
//! A wrong export is otherwise found only by using it. It does not depend on files. Read `merged.rs` next.

use anyhow::Result;

use crate::model::adapter::Adapter;
use crate::model::base::Base;
use crate::model::batch::Batch;
use crate::ops::cpu;
use crate::report::progress::{Progress, Unit};

/// How an exported model compares with base + adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Largest difference of a logit.
    pub max_logit_difference: f32,
    /// Largest absolute logit, for comparison.
    pub max_logit: f32,
    /// Mean over the positions of KL(base + adapter || exported), in nats.
    pub mean_kl: f64,
    /// Proportion of positions with the same greedy token.
    pub greedy_agreement: f64,
    /// Number of positions compared.
    pub positions: usize,
}

/// The largest differences from base + adapter that rounding can explain.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// Bound on the largest logit difference, relative to the largest logit.
    pub logit: f32,
    /// Bound on the mean KL, in nats.
    pub kl: f64,
}

impl Comparison {
    /// Checks that the differences are within `tolerance`.
    ///
    /// # Errors
    /// If one is not.
    pub fn check(&self, tolerance: Tolerance) -> Result<()> {
        let allowed = tolerance.logit * self.max_logit.max(1.0);
        anyhow::ensure!(
            self.max_logit_difference <= allowed,
            "the export differs from base + adapter by {} in a logit, more than {allowed}; nothing was kept",
            self.max_logit_difference
        );
        anyhow::ensure!(
            self.mean_kl <= tolerance.kl,
            "the export differs from base + adapter by a mean KL of {} nats, more than {}; nothing was kept",
            self.mean_kl,
            tolerance.kl
        );
        Ok(())
    }
}

/// Compares the logits of two models at all positions of the prompts.
///
/// # Errors
/// If a model cannot process the prompts, or there are none.
pub fn compare(want: (&Base, &Adapter), got: (&Base, Option<&Adapter>), prompts: &[Vec<u32>]) -> Result<Comparison> {
    compare_through(want, got, got.0, prompts)
}

/// As [`compare`], for an export without an lm_head: its hidden states go through that of `table`.
///
/// # Errors
/// Those of [`compare`].
pub fn compare_through(
    want: (&Base, &Adapter),
    got: (&Base, Option<&Adapter>),
    table: &Base,
    prompts: &[Vec<u32>],
) -> Result<Comparison> {
    let mut c =
        Comparison { max_logit_difference: 0.0, max_logit: 0.0, mean_kl: 0.0, greedy_agreement: 0.0, positions: 0 };
    let mut agreed = 0u32;
    let mut progress = Progress::new("verification", prompts.len(), Unit::Of("prompt"));
    for (done, prompt) in prompts.iter().enumerate() {
        progress.set(done);
        let batch = Batch::new(std::slice::from_ref(prompt))?;
        let ours = want.0.logits(&want.0.hidden(&batch, Some(want.1))?, Some(want.1))?;
        let theirs = table.logits(&got.0.hidden(&batch, got.1)?, got.1)?;
        let vocab = want.0.config().vocab_size;
        for (want, got) in cpu::view(&ours)?.chunks_exact(vocab).zip(cpu::view(&theirs)?.chunks_exact(vocab)) {
            let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i);
            agreed += u32::from(best(want) == best(got));
            c.positions += 1;
            c.mean_kl += kl(want, got);
            for (w, g) in want.iter().zip(got) {
                // `max` ignores NaN, so NaN counts as infinite.
                let difference = if w.is_finite() && g.is_finite() { (w - g).abs() } else { f32::INFINITY };
                c.max_logit_difference = c.max_logit_difference.max(difference);
                c.max_logit = c.max_logit.max(w.abs());
            }
        }
    }
    progress.set(prompts.len());
    progress.finish();
    anyhow::ensure!(c.positions > 0, "no prompt to compare the export on");
    c.greedy_agreement = f64::from(agreed) / c.positions as f64;
    c.mean_kl = (c.mean_kl / c.positions as f64).max(0.0);
    Ok(c)
}

/// KL(softmax(p) || softmax(q)) in nats.
fn kl(p: &[f32], q: &[f32]) -> f64 {
    let log_sum = |row: &[f32]| {
        let top = f64::from(row.iter().fold(f32::NEG_INFINITY, |a, &v| a.max(v)));
        top + row.iter().map(|&v| (f64::from(v) - top).exp()).sum::<f64>().ln()
    };
    let (zp, zq) = (log_sum(p), log_sum(q));
    let term = |(&p, &q): (&f32, &f32)| {
        let (p, q) = (f64::from(p) - zp, f64::from(q) - zq);
        p.exp() * (p - q)
    };
    p.iter().zip(q).map(term).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kl_is_zero_for_shifted_logits_and_exact_for_bernoulli() {
        assert!(kl(&[1.0, 2.0, 3.0], &[11.0, 12.0, 13.0]).abs() < 1e-12);
        let (p, q) = ([0.75f32.ln(), 0.25f32.ln()], [0.5f32.ln(), 0.5f32.ln()]);
        let want = 0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln();
        assert!((kl(&p, &q) - want).abs() < 1e-6);
    }

    #[test]
    fn each_metric_above_its_bound_fails() {
        let fine = Comparison {
            max_logit_difference: 0.1,
            max_logit: 10.0,
            mean_kl: 0.01,
            greedy_agreement: 1.0,
            positions: 1,
        };
        assert!(fine.check(Tolerance { logit: 0.02, kl: 0.02 }).is_ok());
        assert!(fine.check(Tolerance { logit: 0.005, kl: 0.02 }).is_err());
        assert!(fine.check(Tolerance { logit: 0.02, kl: 0.005 }).is_err());
        let nan = Comparison { mean_kl: f64::NAN, ..fine };
        assert!(nan.check(Tolerance { logit: 1.0, kl: 1.0 }).is_err());
    }
}
