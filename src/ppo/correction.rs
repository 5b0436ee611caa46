//! Truncated importance sampling between the sampler and the trainer: weights of a response's tokens by how much likelier the
//! trainer finds them than the sampler did with the same weights. Pure functions of numbers; it does not depend on the model.
//! The modes and bounds are TRL's (`vllm_importance_sampling_mode`). Read `update.rs` for where they multiply the policy loss.

use crate::config::{ImportanceSamplingCorrection, Ppo};

/// The weights of one response's tokens: the ratio `exp(log p of the trainer - log p of the sampler)` of each token, or the
/// product over the response, within the bounds of the settings or 0 beyond them. `trainer`, `sampler`: (R,) log-probabilities.
/// Returns (R,); `None` without a correction.
pub fn weights(trainer: &[f32], sampler: &[f32], config: &Ppo) -> Option<Vec<f32>> {
    use ImportanceSamplingCorrection as Mode;
    let mode = config.importance_sampling_correction;
    let (low, high) = (config.importance_sampling_clip_min, config.importance_sampling_clip_max);
    let differences = trainer.iter().zip(sampler).map(|(a, b)| f64::from(*a) - f64::from(*b));
    let bounded = |difference: f64| {
        let ratio = difference.exp();
        match mode {
            Mode::TokenMask | Mode::SequenceMask if ratio < low.unwrap_or(0.0) || ratio > high => 0.0,
            // Not f64::clamp, which panics where a bound is NaN.
            _ => ratio.max(low.unwrap_or(0.0)).min(high),
        }
    };
    match mode {
        Mode::None => None,
        Mode::TokenTruncate | Mode::TokenMask => Some(differences.map(|d| bounded(d) as f32).collect()),
        Mode::SequenceTruncate | Mode::SequenceMask => {
            Some(vec![bounded(differences.sum()) as f32; trainer.len().min(sampler.len())])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ppo::golden::floats;

    /// TRL's weights of recorded log-probabilities (tests/golden/group_loss.py), with bounds that some of them exceed.
    #[test]
    fn the_weights_are_trls_golden() {
        use ImportanceSamplingCorrection as Mode;
        let recorded: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/grpo_loss.json")).unwrap();
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/golden/group_loss.json")).unwrap();
        let (trainer, sampler) = (floats(&recorded["old"]), floats(&golden["sampler"]));
        let lengths: Vec<usize> = serde_json::from_value(recorded["lengths"].clone()).unwrap();
        for (name, mode) in [
            ("token_truncate", Mode::TokenTruncate),
            ("token_mask", Mode::TokenMask),
            ("sequence_truncate", Mode::SequenceTruncate),
            ("sequence_mask", Mode::SequenceMask),
        ] {
            let config = Ppo {
                importance_sampling_correction: mode,
                importance_sampling_clip_min: golden["clip"][0].as_f64(),
                importance_sampling_clip_max: golden["clip"][1].as_f64().unwrap(),
                ..Ppo::default()
            };
            let (mut got, mut at) = (vec![], 0);
            for n in &lengths {
                got.extend(weights(&trainer[at..at + n], &sampler[at..at + n], &config).unwrap());
                at += n;
            }
            let want = floats(&golden["correction"][name]);
            assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-6), "{name}: {got:?} and {want:?}");
            assert!(got.windows(2).any(|two| two[0] != two[1]) && got.len() == want.len(), "{name}");
        }
        assert_eq!(weights(&trainer, &sampler, &Ppo::default()), None);
    }
}
