//! PPO. The loop is in train, all that changes in state; a rollout becomes experience, experience becomes updates. The
//! mathematics is in rewards, kl, gae, advantages, control and loss: functions of numbers that know no model.

pub mod advantages;
pub mod dschat;
pub mod ema;
pub mod evaluate;
pub mod experience;
pub mod gae;
pub mod kl;
pub mod kl_controller;
pub mod loss;
pub mod metrics;
pub mod ptx;
pub mod rewards;
pub mod rollout;
pub mod state;
pub mod train;
pub mod update;
pub mod warnings;

#[cfg(test)]
mod golden {
    //! Reads tests/golden/ppo.json, which tests/golden/ppo.py printed in float64.

    use serde_json::Value;

    pub fn ppo() -> Value {
        serde_json::from_str(include_str!("../../tests/golden/ppo.json")).unwrap()
    }

    pub fn floats(value: &Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
    }

    /// A flat list cut at the sequences' ends.
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
