//! The section `[ppo.ptx]`: raw text that the actor keeps learning from (the pretraining mixture) beside the reward.
//!
//! Read `ppo/ptx.rs` for the loss.

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Paths;
use crate::invalid;

/// The mixture with pretraining of arXiv:2203.02155.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ptx {
    /// Files of texts (`text` records, or .txt): joined in their order and cut into blocks.
    pub path: Paths,
    /// Weight of the mean negative log-probability of a block's tokens. Default 27.8 (arXiv:2203.02155;
    /// DeepSpeed-Chat's `unsup_coef`). 0 = no mixture.
    pub coef: f64,
    /// Tokens of a block; absent = `max_prompt_length` + `response_length` (DeepSpeed-Chat). A minibatch learns from as
    /// many blocks as it has responses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_size: Option<usize>,
    /// An optimizer step of its own, behind the policy's (DeepSpeed-Chat), instead of one step on the sum of both
    /// losses. Default false. (DeepSpeed-Chat's script doubles the actor's gradient accumulation with it, so that
    /// DeepSpeed itself, where that was 1, steps once by the mean of both gradients: that is false with twice the
    /// `max_grad_norm`.)
    pub separate_step: bool,
}

impl Default for Ptx {
    fn default() -> Self {
        Self { path: Paths::default(), coef: 27.8, block_size: None, separate_step: false }
    }
}

impl Ptx {
    /// # Errors
    /// There is no text.
    pub(super) fn check(&self) -> Result<()> {
        if self.path.as_slice().is_empty() {
            return Err(invalid!("[ppo.ptx] needs path = \"texts.jsonl\", a file of texts; or remove the section"));
        }
        Ok(())
    }
}
