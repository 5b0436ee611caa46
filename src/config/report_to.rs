//! `report_to`: which files of another program a run writes beside its own.
//!
//! It does not depend on what is logged. Read `validate.rs` next.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `report_to`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ReportTo {
    /// TensorBoard's event file in the run's folder, `tb/`; TensorBoard, trackio and `wandb sync` read it.
    #[default]
    Tensorboard,
    /// No such file; metrics.jsonl, samples.jsonl and report.html are written all the same.
    None,
}
