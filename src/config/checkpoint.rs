//! The sections `[checkpoint]` and `[guard]`: how a run is saved, and what happens to steps that diverge.
//!
//! Read `validate.rs` next.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[checkpoint]`: when a run's state is saved for `--resume`. A signal always saves it.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointConfig {
    /// Optimizer steps between two checkpoints; 0 = only on a signal. Default 500 (transformers).
    pub save_steps: usize,
    /// The number of checkpoints kept, the newest. Default 2, so that one stands while the next is written
    /// (transformers: all).
    pub save_total_limit: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { save_steps: 500, save_total_limit: 2 }
    }
}

/// `[guard]`: what happens to a step whose loss, gradient or reward is NaN or infinite, and to a rollout out of bounds.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Guard {
    /// Bad steps in a row that are only skipped; one more rolls back to the last good weights. Default 3.
    pub max_skips: usize,
    /// Rollbacks to the last good weights; then the run ends with a diagnosis. Default 3.
    pub max_rollbacks: usize,
    /// Factor of the learning rate: for the steps after a skipped one until one is good, and for good after each
    /// rollback. Default 0.5.
    pub lr_backoff: f64,
    /// Good steps between two copies of the weights to go back to. Default 20.
    pub snapshot_steps: usize,
    /// A rollout with a higher mean KL, nats per response, is skipped like a bad step. Absent = no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_kl: Option<f64>,
    /// A rollout whose mean response is longer than that of the first rollout by this factor is skipped like a bad
    /// step. Absent = no limit.
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
