//! The sections about losing nothing: `[checkpoint]` and `[guard]`. Knows no rule between keys: read validate.rs next.

use serde::{Deserialize, Serialize};

/// `[checkpoint]`: when a run's state is saved, to be gone on from with `--resume`. A signal always saves it.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Optimizer steps between two checkpoints; 0 = none but on a signal. Default 500 (transformers).
    pub save_steps: usize,
    /// So many checkpoints are kept, the newest. Default 2, so that one stands while the next is written (transformers: all).
    pub save_total_limit: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { save_steps: 500, save_total_limit: 2 }
    }
}

/// `[guard]`: what is done about a step whose loss, gradient or reward is no number, and about a rollout out of bounds.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Guard {
    /// Bad steps in a row that are only skipped; one more brings the last good weights back. Default 3.
    pub max_skips: usize,
    /// Times that the last good weights are brought back; then the run ends with a diagnosis. Default 3.
    pub max_rollbacks: usize,
    /// Factor of the learning rate: for the steps after a skipped one until one is good, and for good after each
    /// rollback. Default 0.5.
    pub lr_backoff: f64,
    /// Good steps between two copies of the weights to go back to. Default 20.
    pub snapshot_steps: usize,
    /// A rollout with a higher mean KL, nats an answer, is skipped like a bad step. Absent = no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_kl: Option<f64>,
    /// A rollout whose mean answer is longer than that of the first rollout by this factor is skipped like a bad step.
    /// Absent = no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_length_ratio: Option<f64>,
}

impl Default for Guard {
    fn default() -> Self {
        Self {
            max_skips: 3,
            max_rollbacks: 3,
            lr_backoff: 0.5,
            snapshot_steps: 20,
            max_kl: None,
            max_length_ratio: None,
        }
    }
}
