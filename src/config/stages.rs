//! The sections `[sft]` and `[reward]`, and the enums that `[ppo]` shares (ppo.rs). Names and defaults are TRL's and PEFT's where no other source
//! is given. The optimisation keys stand in each section again, since serde cannot both share them and refuse unknown
//! keys. Knows no rule between keys: read validate.rs next.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Compat;

/// Course of the learning rate after the warm-up, over the optimizer steps of the whole run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LrScheduler {
    /// Straight down to 0.
    #[default]
    Linear,
    /// Half a cosine down to 0.
    Cosine,
    /// Unchanged.
    Constant,
}

/// What a block keeps of its forward pass for the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RecomputeSetting {
    /// `none` where the memory allows it, else `mlp`, else `block`.
    #[default]
    Auto,
    /// No checkpointing: everything the backward needs is kept; fastest, most memory.
    None,
    /// All is kept but the MLP's widened products, gate and up, which are computed again in the backward pass: half of an
    /// update's memory for a quarter more of its arithmetic.
    Mlp,
    /// Each block keeps its input alone and runs forward again in the backward pass; least memory.
    Block,
}

/// `[sft]`: supervised fine-tuning of the policy's adapter.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sft {
    /// `"dschat"`: DeepSpeed-Chat's values for the keys that the file leaves open. Absent = none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compat: Option<Compat>,
    /// Adapter folder (PEFT layout) to continue from; absent = a fresh one shaped by `[lora]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// Peak learning rate. Default 2e-4 (QLoRA's for small models; TRL's 2e-5 is for full fine-tuning).
    pub learning_rate: f64,
    /// Passes over the training records. Default 1 (TRL: 3).
    pub num_train_epochs: usize,
    /// Sequences of one forward and backward pass. Default 8 (transformers).
    pub per_device_train_batch_size: usize,
    /// Most tokens of one forward and backward pass, instead of `per_device_train_batch_size`: sequences of like
    /// length are put together until the next would not fit, and one longer than this goes alone. Absent = by count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens_per_batch: Option<usize>,
    /// Passes summed into one optimizer step. Default 1.
    pub gradient_accumulation_steps: usize,
    /// Optimizer steps over which the learning rate rises from 0. Default 0.
    pub warmup_steps: usize,
    /// Course of the learning rate after the warm-up. Default `linear` (transformers).
    pub lr_scheduler_type: LrScheduler,
    /// AdamW's decoupled weight decay. Default 0.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment. Default 0.9 (transformers).
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment. Default 0.999 (transformers; DeepSpeed-Chat: 0.95).
    pub adam_beta2: f64,
    /// AdamW's term in the denominator. Default 1e-8 (transformers).
    pub adam_epsilon: f64,
    /// Largest norm of an optimizer step's gradient; 0 = no clipping. Default 1.0 (transformers).
    pub max_grad_norm: f64,
    /// Loss on the assistant's tokens only; false = on every token but the first. Default true (DeepSpeed-Chat trains on
    /// the prompt too).
    pub completion_only_loss: bool,
    /// What a block keeps for the backward pass. Default `auto`.
    pub checkpoint: RecomputeSetting,
    /// Optimizer steps between two log lines. Default 1.
    pub logging_steps: usize,
    /// Optimizer steps between two evaluations; 0 = only before and after training. Default 0.
    pub eval_steps: usize,
}

impl Default for Sft {
    fn default() -> Self {
        Self {
            compat: None,
            adapter: None,
            learning_rate: 2e-4,
            num_train_epochs: 1,
            per_device_train_batch_size: 8,
            max_tokens_per_batch: None,
            gradient_accumulation_steps: 1,
            warmup_steps: 0,
            lr_scheduler_type: LrScheduler::Linear,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            completion_only_loss: true,
            checkpoint: RecomputeSetting::Auto,
            logging_steps: 1,
            eval_steps: 0,
        }
    }
}

/// Which loss a reward model learns a comparison by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardLoss {
    /// Bradley-Terry on the scores at the end tokens: `-log sigmoid(r_chosen - r_rejected)`. TRL's and InstructGPT's.
    #[default]
    LastToken,
    /// The same at every position from the first different token to the longer end, averaged. DeepSpeed-Chat's.
    DivergenceToEnd,
}

/// `[reward]`: the reward model's adapter and scalar head.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reward {
    /// Whose behaviour to keep. `"dschat"`: rows are padded, and the pads of the shorter answer count in the loss and are
    /// read from, never attended to; and DeepSpeed-Chat's values for the keys that the file leaves open. Absent = none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compat: Option<Compat>,
    /// Under `compat`: how many pad tokens stand in a row before the one that ends its answer. Absent = 1 where every row
    /// begins with the pad token (OPT), else 0 (DeepSpeed-Chat: always 1 unless it is told).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_padding_at_beginning: Option<usize>,
    /// Adapter folder (PEFT layout) to start from, for example the SFT one; absent = a fresh one shaped by `[lora]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// Loss of a comparison. Default `last_token`.
    pub loss: RewardLoss,
    /// Shift and scale the head after training so that the annotated answers' scores have mean 0 and deviation 1, which
    /// leaves every comparison as it was and gives PPO a reward in known units. Default true (InstructGPT shifts to 0).
    pub center: bool,
    /// Peak learning rate. Default 2e-4, as for SFT (DeepSpeed-Chat's for LoRA: 5e-4).
    pub learning_rate: f64,
    /// Passes over the training comparisons. Default 1: reward models overfit in the second (InstructGPT, appendix C.2).
    pub num_train_epochs: usize,
    /// Comparisons of one forward and backward pass, each with all its answers. Default 8 (transformers).
    pub per_device_train_batch_size: usize,
    /// Most tokens of one forward and backward pass, instead of `per_device_train_batch_size`: comparisons of like
    /// length are put together until the next would not fit, and one longer than this goes alone. Absent = by count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens_per_batch: Option<usize>,
    /// Passes summed into one optimizer step. Default 1.
    pub gradient_accumulation_steps: usize,
    /// Optimizer steps over which the learning rate rises from 0. Default 0.
    pub warmup_steps: usize,
    /// Course of the learning rate after the warm-up. Default `linear` (transformers).
    pub lr_scheduler_type: LrScheduler,
    /// AdamW's decoupled weight decay. Default 0 (DeepSpeed-Chat's scripts: 0.1).
    pub weight_decay: f64,
    /// AdamW's decay of the first moment. Default 0.9 (transformers).
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment. Default 0.999 (transformers; DeepSpeed-Chat: 0.95).
    pub adam_beta2: f64,
    /// AdamW's term in the denominator. Default 1e-8 (transformers).
    pub adam_epsilon: f64,
    /// Largest norm of an optimizer step's gradient; 0 = no clipping. Default 1.0 (transformers).
    pub max_grad_norm: f64,
    /// What a block keeps for the backward pass. Default `auto`.
    pub checkpoint: RecomputeSetting,
    /// Optimizer steps between two log lines. Default 1.
    pub logging_steps: usize,
    /// Optimizer steps between two evaluations; 0 = only before and after training. Default 0.
    pub eval_steps: usize,
}

impl Default for Reward {
    fn default() -> Self {
        Self {
            compat: None,
            num_padding_at_beginning: None,
            adapter: None,
            loss: RewardLoss::LastToken,
            center: true,
            learning_rate: 2e-4,
            num_train_epochs: 1,
            per_device_train_batch_size: 8,
            max_tokens_per_batch: None,
            gradient_accumulation_steps: 1,
            warmup_steps: 0,
            lr_scheduler_type: LrScheduler::Linear,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            checkpoint: RecomputeSetting::Auto,
            logging_steps: 1,
            eval_steps: 0,
        }
    }
}
