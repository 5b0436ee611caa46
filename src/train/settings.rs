//! From optimisation keys to AdamW's settings, a schedule and a batch sampler; and the streams of the seed.
//!
//! It does not depend on a stage, a model or the planner. Read `supervised.rs` next.

use super::adamw::AdamWConfig;
use super::schedule::{Decay, Schedule};
use crate::config::{LrScheduler, Optimisation, SupervisedKeys};
use crate::data::examples::PassSize;
use crate::data::examples::batch_sampler::{BatchSampler, BatchSize};
use crate::error::counted;

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
/// The order of KTO's responses.
pub const KTO_ORDER: u64 = 22;
/// The order of distillation's prompts.
pub const DISTILL_ORDER: u64 = 23;
/// Distillation's sampling, and in which steps the policy samples.
pub const DISTILL_SAMPLES: u64 = 24;

/// AdamW's settings.
pub fn adamw(keys: &Optimisation) -> AdamWConfig {
    AdamWConfig {
        beta1: keys.adam_beta1,
        beta2: keys.adam_beta2,
        eps: keys.adam_epsilon,
        weight_decay: keys.weight_decay,
    }
}

/// The course of a learning rate with the peak `lr`.
pub fn schedule(keys: &Optimisation, lr: f64) -> Schedule {
    let decay = match keys.lr_scheduler_type {
        LrScheduler::Linear => Decay::Linear,
        LrScheduler::Cosine => Decay::Cosine,
        LrScheduler::Constant => Decay::Constant,
    };
    Schedule { lr, warmup_steps: keys.warmup_steps, decay }
}

/// That a run of `steps` optimizer steps ends before its warm-up does, in a sentence.
pub fn unreached(keys: &Optimisation, steps: usize) -> Option<String> {
    (keys.warmup_steps > 0 && keys.warmup_steps >= steps).then(|| {
        format!(
            "warmup_steps = {} and the run has {}: the learning rate never reaches {}; lower warmup_steps",
            keys.warmup_steps,
            counted(steps, "optimizer step"),
            keys.learning_rate
        )
    })
}

/// The size of a micro-batch: by tokens where the section has a budget.
pub fn batch_size(keys: &SupervisedKeys) -> BatchSize {
    keys.max_tokens_per_batch.map_or(BatchSize::Examples(keys.per_device_train_batch_size), BatchSize::Tokens)
}

/// The size of a pass of an evaluation, which is bounded by the tokens that bound a micro-batch, too.
pub fn evaluation_size(keys: &SupervisedKeys) -> PassSize {
    PassSize { examples: keys.examples_evaluated_at_once(), tokens: keys.max_tokens_per_batch }
}

/// The order in which a supervised stage reads its examples.
pub fn sampler(keys: &SupervisedKeys, seed: u64, stream: u64) -> BatchSampler {
    let (batch, accumulate) = (batch_size(keys), keys.gradient_accumulation_steps);
    BatchSampler { seed, stream, batch, accumulate, shard: Default::default() }
}
