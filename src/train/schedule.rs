//! Learning-rate schedules: transformers' `linear`, `cosine` and `constant_with_warmup`.
//!
//! It does not depend on an optimizer. Read `adamw.rs` next.

use std::f64::consts::PI;

/// The course of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// Linear decay to zero at the last step.
    Linear,
    /// Half a cosine, decaying to zero at the last step.
    Cosine,
    /// No decay.
    Constant,
}

/// A warm-up from zero, then a decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of the warm-up: step s of them uses `lr * s / warmup_steps`, so the very first uses 0.
    pub warmup_steps: usize,
    /// The decay after the warm-up.
    pub decay: Decay,
}

impl Schedule {
    /// The rate of optimizer step `step` (from 0) in a run of `total` steps; past the end it stays at the end's rate.
    /// Source: transformers `optimization.py`, `get_scheduler`.
    pub fn lr_at(&self, step: usize, total: usize) -> f64 {
        if step < self.warmup_steps {
            return self.lr * step as f64 / self.warmup_steps as f64;
        }
        let span = total.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / span).min(1.0);
        let factor = match self.decay {
            Decay::Constant => 1.0,
            // A run that is all warm-up has no steps left to decay over: zero, as transformers has it.
            Decay::Linear if total <= self.warmup_steps => 0.0,
            Decay::Linear => 1.0 - progress,
            Decay::Cosine => 0.5 * (1.0 + (PI * progress).cos()),
        };
        self.lr * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_match_transformers_golden() {
        let golden: serde_json::Value = serde_json::from_str(include_str!("../../tests/golden/adamw.json")).unwrap();
        let mut checked = 0;
        for case in golden["schedules"].as_array().unwrap() {
            let (warmup, total) = (case["warmup"].as_u64().unwrap() as usize, case["total"].as_u64().unwrap() as usize);
            let decay = match case["name"].as_str().unwrap() {
                "linear" => Decay::Linear,
                "cosine" => Decay::Cosine,
                _ => Decay::Constant,
            };
            let schedule = Schedule { lr: case["lr"].as_f64().unwrap(), warmup_steps: warmup, decay };
            for (step, want) in case["rates"].as_array().unwrap().iter().enumerate() {
                // transformers lets the cosine rise again after the last step; here it stays at zero.
                if decay == Decay::Cosine && step > total.max(warmup) {
                    assert!(schedule.lr_at(step, total).abs() < 1e-17);
                    continue;
                }
                let (got, want) = (schedule.lr_at(step, total), want.as_f64().unwrap());
                assert!((got - want).abs() < 1e-17, "{decay:?} {warmup}/{total} step {step}: {got} {want}");
                checked += 1;
            }
        }
        assert!(checked > 100);
    }
}
