//! From a config's optimisation keys to an optimizer's settings, a schedule and a batch size, and the streams of the seed.
//! It does not depend on a stage, a model or the planner. Read `supervised.rs` next.

use super::adamw::AdamWConfig;
use super::schedule::{Decay, Schedule};
use crate::config;
use crate::config::LrScheduler;
use crate::data::examples::batch_sampler::BatchSize;

/// Streams of the seed: every random choice of a run has its own.
pub const INIT: u64 = 1;
/// The order of SFT's records.
pub const SFT_ORDER: u64 = 2;
/// The order of the reward model's comparisons.
pub const REWARD_ORDER: u64 = 3;
/// The order of PPO's prompts.
pub const PROMPT_ORDER: u64 = 4;
/// PPO's sampling.
pub const ROLLOUT: u64 = 5;
/// The order of PPO's minibatches.
pub const MINIBATCH_ORDER: u64 = 6;
/// Sampling for evaluation.
pub const EVALUATION: u64 = 7;
/// The fresh score head.
pub const HEAD: u64 = 8;
/// A critic's fresh adapter.
pub const CRITIC_INIT: u64 = 9;
/// The order of PPO's ptx blocks.
pub const PTX_ORDER: u64 = 10;
/// The order of DPO's comparisons.
pub const DPO_ORDER: u64 = 21;
/// The order of KTO's answers.
pub const KTO_ORDER: u64 = 22;

macro_rules! adamw {
    ($config:expr) => {
        AdamWConfig {
            beta1: $config.adam_beta1,
            beta2: $config.adam_beta2,
            eps: $config.adam_epsilon,
            weight_decay: $config.weight_decay,
        }
    };
}

/// `[sft]`'s optimizer keys.
pub fn adamw_of_sft(config: &config::Sft) -> AdamWConfig {
    adamw!(config)
}

/// `[reward]`'s.
pub fn adamw_of_reward(config: &config::Reward) -> AdamWConfig {
    adamw!(config)
}

/// `[dpo]`'s.
pub fn adamw_of_dpo(config: &config::Dpo) -> AdamWConfig {
    adamw!(config)
}

/// `[kto]`'s.
pub fn adamw_of_kto(config: &config::Kto) -> AdamWConfig {
    adamw!(config)
}

/// `[ppo]`'s, for actor and critic alike.
pub fn adamw_of_ppo(config: &config::Ppo) -> AdamWConfig {
    adamw!(config)
}

/// The course of a learning rate.
pub fn schedule(lr: f64, warmup_steps: usize, kind: LrScheduler) -> Schedule {
    let decay = match kind {
        LrScheduler::Linear => Decay::Linear,
        LrScheduler::Cosine => Decay::Cosine,
        LrScheduler::Constant => Decay::Constant,
    };
    Schedule { lr, warmup_steps, decay }
}

/// The cut of a batch: by tokens where a budget is given.
pub fn batch_size(examples: usize, max_tokens: Option<usize>) -> BatchSize {
    max_tokens.map_or(BatchSize::Examples(examples), BatchSize::Tokens)
}
