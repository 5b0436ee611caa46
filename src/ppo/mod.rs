//! Proximal policy optimisation (PPO). `train.rs` is the loop over the inputs of `run.rs`; everything that changes is in
//! `state.rs`. A rollout (`rollout.rs`, scored by `scoring.rs`) becomes experience (`experience.rs`), and experience becomes
//! updates (`update.rs`). The mathematics is in `rewards.rs`, `kl.rs`, `gae.rs`, `advantages.rs`, `kl_controller.rs` and
//! `loss.rs`: functions of numbers that do not depend on the model. Read `train.rs` next.

pub mod advantages;
pub mod ahead;
pub mod correction;
pub mod dschat;
pub mod dynamic;
pub mod ema;
pub mod evaluate;
pub mod experience;
pub mod gae;
pub mod kl;
pub mod kl_controller;
pub mod loss;
pub mod metrics;
pub mod pace;
pub mod ptx;
pub mod rewards;
pub mod rollout;
pub mod run;
pub mod sampler;
pub mod scoring;
pub mod state;
pub mod token_detail;
pub mod train;
pub mod update;
pub mod value_loss;
pub mod warnings;

#[cfg(test)]
mod golden {
    //! Golden values: tests/golden/ppo.json, which tests/golden/ppo.py printed in float64.

    use serde_json::Value;

    pub fn ppo() -> Value {
        serde_json::from_str(include_str!("../../tests/golden/ppo.json")).unwrap()
    }

    pub fn floats(value: &Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
    }

    /// Splits a flat list into sequences of these lengths.
    pub fn split<'a>(flat: &'a [f32], lengths: &Value) -> Vec<&'a [f32]> {
        let mut rest = flat;
        let lengths = lengths.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize);
        lengths
            .map(|n| {
                let (part, tail) = rest.split_at(n);
                rest = tail;
                part
            })
            .collect()
    }

    /// f32 results of f64 arithmetic over exact inputs: one rounding, so a relative 2^-24; `slack` for more.
    pub fn assert_close(got: &[f32], want: &Value, slack: f64, what: &str) {
        let want = want.as_array().unwrap();
        assert_eq!(got.len(), want.len(), "{what}");
        for (i, (&g, w)) in got.iter().zip(want).enumerate() {
            let w = w.as_f64().unwrap();
            assert!((f64::from(g) - w).abs() <= slack * 6e-8 * w.abs().max(1e-6), "{what}[{i}]: {g} {w}");
        }
    }

    pub fn assert_number(got: f64, want: &Value, what: &str) {
        let want = want.as_f64().unwrap();
        assert!((got - want).abs() <= 1e-12 * want.abs().max(1.0), "{what}: {got} {want}, both f64");
    }
}
