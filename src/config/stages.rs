//! The sections `[sft]` and `[reward]`, and the enums of the keys that all stages share.
//!
//! Names and defaults are TRL's and PEFT's where no other source is given. Read `optimisation.rs` for the shared keys
//! and `validate.rs` for the rules between keys.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Compat;
use super::optimisation::{optimised_section, supervised_section};

/// Course of the learning rate after the warm-up, over the optimizer steps of the whole run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LrScheduler {
    /// Linear decay to 0.
    #[default]
    Linear,
    /// Half a cosine, decaying to 0.
    Cosine,
    /// No decay.
    Constant,
}

/// The activations that a block saves for the backward pass; the others are recomputed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RecomputeSetting {
    /// `none` where the memory allows it, else `mlp`, else `block`.
    #[default]
    Auto,
    /// No recomputation: everything that the backward pass needs is saved; fastest, most memory.
    None,
    /// Everything is saved except the MLP's gate and up activations, which are recomputed in the backward pass: half of
    /// an update's memory for a quarter more arithmetic.
    Mlp,
    /// Each block saves only its input and runs forward again in the backward pass; least memory.
    Block,
    /// As `block`, and on a card the blocks' inputs wait in pinned memory of the host, from which they are copied back beside the
    /// backward pass; for long sequences. `auto` never chooses it. On the CPU it is `block`.
    Offload,
}

supervised_section! {
    /// `[sft]`: supervised fine-tuning of the policy's adapter.
    pub struct Sft;
    first {
        /// `"dschat"`: DeepSpeed-Chat's values for the keys that the file leaves open. Absent = none.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub compat: Option<Compat> = None,
        /// Adapter folder (PEFT layout) to continue from; absent = a fresh one shaped by `[lora]`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub adapter: Option<PathBuf> = None,
    }
    /// Peak learning rate. Default 2e-4 (QLoRA's for small models; TRL's 2e-5 is for full fine-tuning).
    learning_rate = 2e-4;
    batch {
        /// Most tokens per forward and backward pass, instead of `per_device_train_batch_size`: sequences of similar
        /// length are batched until the next would exceed it, and a longer sequence goes alone. Absent = by count.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub max_tokens_per_batch: Option<usize> = None,
    }
    after_norm {
        /// Loss on the assistant's tokens only; false = on every token but the first. Default true (DeepSpeed-Chat
        /// trains on the prompt too).
        pub completion_only_loss: bool = true,
    }
}

/// Most reward models of one run.
pub const MOST_MEMBERS: usize = 16;

/// The loss of a reward model on a comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardLoss {
    /// Bradley-Terry on the scores at the end tokens: `-log sigmoid(r_chosen - r_rejected)`. TRL's and InstructGPT's.
    #[default]
    LastToken,
    /// The same at every position from the first different token to the longer end, averaged. DeepSpeed-Chat's.
    DivergenceToEnd,
}

supervised_section! {
    /// `[reward]`: the reward model's adapter and scalar head.
    pub struct Reward;
    first {
        /// `"dschat"`: DeepSpeed-Chat's behaviour. Rows are padded, and the pads of the shorter response count in the
        /// loss and are read from, never attended to; and its values apply to the keys that the file leaves open.
        /// Absent = none.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub compat: Option<Compat> = None,
        /// Under `compat`: the number of pad tokens in a row before the one that ends its response. Absent = 1 where
        /// every row begins with the pad token (OPT), else 0 (DeepSpeed-Chat: 1 unless set).
        #[serde(skip_serializing_if = "Option::is_none")]
        pub num_padding_at_beginning: Option<usize> = None,
        /// Adapter folder (PEFT layout) to start from, for example the SFT one; absent = a fresh one shaped by
        /// `[lora]`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub adapter: Option<PathBuf> = None,
        /// Loss of a comparison. Default `last_token`.
        pub loss: RewardLoss = RewardLoss::LastToken,
        /// Shift and scale the head after training so that the scores of the annotated responses have mean 0 and
        /// standard deviation 1, which changes no comparison and gives PPO a reward in known units. Default true
        /// (InstructGPT shifts to 0).
        pub center: bool = true,
        /// Reward models trained one after another over the one base, each from a head and an order of the records of its
        /// own: member m as a run with `seed + m` on the same split. They are saved as `adapter`, `adapter_1`, ..., for
        /// `[[ppo.reward]] adapters` (arXiv:2310.02743 has five). Default 1.
        pub ensemble: usize = 1,
    }
    /// Peak learning rate. Default 2e-4, as for SFT (DeepSpeed-Chat's for LoRA: 5e-4).
    learning_rate = 2e-4;
    batch {
        /// Most tokens per forward and backward pass, instead of `per_device_train_batch_size`: comparisons of similar
        /// length are batched until the next would exceed it, and a longer comparison goes alone. Absent = by count.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub max_tokens_per_batch: Option<usize> = None,
    }
    after_norm {}
}
