//! The sections `[grpo]` and `[rloo]`: the methods that compare the responses to one prompt and have no critic.
//!
//! Names and defaults are those of TRL's GRPOConfig and RLOOConfig (1.16) where no other source is given. Both sections are
//! translated into the settings of PPO's loop, which trains by them: there is no loop of their own. It does not depend on a
//! stage. Read `ppo.rs` for those settings and `trl.rs` for the keys of TRL that mean nothing here.

use std::path::PathBuf;

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::optimisation::optimised_section;
use super::rewards::RewardPart;
use super::rollout::RolloutEngine;
use super::{
    AdvantageEstimator, Aggregation, Config, ImportanceSamplingCorrection, ImportanceSamplingLevel, KlEstimator, KlIn,
    LossType, Origin, Paths, PolicyLoss, Ppo, RecomputeSetting, ScaleRewards,
};
use crate::invalid;

/// The loss of `[grpo]`, under TRL's names: how a token's ratio becomes its loss, and how tokens are averaged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupLoss {
    /// The clipped ratio, averaged over all tokens of an optimizer step, arXiv:2503.14476.
    #[default]
    Dapo,
    /// The same here. (TRL averages over a micro-batch, so that its size changes the result.)
    Bnpo,
    /// The clipped ratio, averaged over each response's tokens and then over responses, arXiv:2402.03300.
    Grpo,
    /// The clipped ratio, summed and divided by the responses times `max_completion_length`, arXiv:2503.20783.
    DrGrpo,
    /// The capped ratio as a weight of the plain policy gradient, averaged over all tokens, arXiv:2506.13585.
    Cispo,
    /// A smooth gate on the ratio, averaged over each response's tokens and then over responses, arXiv:2511.20347.
    Sapo,
}

impl GroupLoss {
    fn of_engine(self) -> (PolicyLoss, LossType) {
        match self {
            Self::Dapo | Self::Bnpo => (PolicyLoss::Clip, LossType::Dapo),
            Self::Grpo => (PolicyLoss::Clip, LossType::Grpo),
            Self::DrGrpo => (PolicyLoss::Clip, LossType::DrGrpo),
            Self::Cispo => (PolicyLoss::Cispo, LossType::Dapo),
            Self::Sapo => (PolicyLoss::Sapo, LossType::Grpo),
        }
    }
}

/// A section with the keys that `[grpo]` and `[rloo]` share: the struct, its defaults and [`GroupKeys`].
macro_rules! group_section {
    (
        $(#[$about:meta])*
        pub struct $name:ident;
        $(#[$mg:meta])* num_generations = $generations:expr;
        $(#[$mb:meta])* beta = $beta:expr;
        own { $($own:tt)* }
    ) => {
        optimised_section! {
            $(#[$about])*
            pub struct $name;
            first {
                /// The SFT adapter (folder, PEFT layout): the actor starts from it and the reference stays it. Absent =
                /// the bare base is the reference and the actor starts from a fresh adapter shaped by `[lora]`.
                #[serde(skip_serializing_if = "Option::is_none")]
                pub adapter: Option<PathBuf> = None,
                /// The reward adapter with its scalar head (folder, PEFT layout). The folder of a run of `[reward] ensemble`,
                /// or a list, is the ensemble of all its members: the mean of their scores less their deviation. Required
                /// unless there is a `reward` of another source; beside those it is one more, of weight 1.
                #[serde(skip_serializing_if = "Paths::is_blank")]
                pub reward_adapter: Paths = Paths::default(),
                /// Sources of the reward, each a table of its own: rules, programs, endpoints, more adapters. Default
                /// none. (TRL: `reward_funcs` and `reward_weights`.)
                #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "super::reward_rules::write_all")]
                pub reward: Vec<RewardPart> = Vec::new(),
                /// What the held-out responses are judged by besides, and the policy never trained on. Default none.
                #[serde(skip_serializing_if = "Option::is_none", serialize_with = "super::reward_rules::write_one")]
                pub gold: Option<RewardPart> = None,
                /// What samples the responses: this process, or servers that load the adapter. Default this process. (TRL:
                /// `use_vllm` and `vllm_server_base_url`.)
                #[serde(skip_serializing_if = "Option::is_none")]
                pub rollout: Option<RolloutEngine> = None,
            }
            /// Peak learning rate. Default 1e-5: ten times TRL's 1e-6, since only low-rank factors are trained.
            learning_rate = 1e-5;
            after_rate {
                $(#[$mg])*
                pub num_generations: usize = $generations,
                /// Passes over the prompts, each answered `num_generations` times. Default 3 (transformers).
                pub num_train_epochs: usize = 3,
                /// Optimizer steps in all, instead of `num_train_epochs`, rounded up to whole rollouts; absent = by
                /// passes. (TRL: -1.)
                #[serde(skip_serializing_if = "Option::is_none")]
                pub max_steps: Option<usize> = None,
                /// Responses of one forward and backward pass. Default 8 (transformers).
                pub per_device_train_batch_size: usize = 8,
                /// Passes summed into one optimizer step. Default 1.
                pub gradient_accumulation_steps: usize = 1,
                /// Passes that one rollout is cut into: a rollout has this times `per_device_train_batch_size`
                /// responses. Absent = `gradient_accumulation_steps`, one optimizer step per rollout.
                #[serde(skip_serializing_if = "Option::is_none")]
                pub steps_per_generation: Option<usize> = None,
                /// Responses of one rollout, instead of `steps_per_generation`. Absent = by that key.
                #[serde(skip_serializing_if = "Option::is_none")]
                pub generation_batch_size: Option<usize> = None,
                /// Passes over a rollout. Default 1.
                pub num_iterations: usize = 1,
                /// Prompts whose responses are sampled at once, which bounds the KV cache and changes no response.
                /// Absent = all of a rollout.
                #[serde(skip_serializing_if = "Option::is_none")]
                pub local_rollout_forward_batch_size: Option<usize> = None,
                /// Most tokens of a sampled response. Default 512.
                pub max_completion_length: usize = 512,
                /// Divides the logits before sampling; the logprobs of training use it too. Default 1.0.
                pub temperature: f64 = 1.0,
                /// Samples from the k likeliest tokens only; 0 = from all. Default 0.
                pub top_k: usize = 0,
                /// Samples from the smallest set of tokens with this much probability. Default 1.0 = all.
                pub top_p: f64 = 1.0,
                $(#[$mb])*
                pub beta: f64 = $beta,
                /// The probability ratio is clipped to `1 ± epsilon`. Default 0.2.
                pub epsilon: f64 = 0.2,
                /// Its upper side, `1 + epsilon_high`; absent = `epsilon`. (DAPO, arXiv:2503.14476: 0.28.) With
                /// `loss_type = "cispo"` the cap on the ratio itself; absent = 5.
                #[serde(skip_serializing_if = "Option::is_none")]
                pub epsilon_high: Option<f64> = None,
                $($own)*
                /// Leave responses that `max_completion_length` cut off out of the loss; their rewards still count in
                /// their group. Default false. (DAPO's overlong filtering.)
                pub mask_truncated_completions: bool = false,
                /// Dynamic sampling: groups whose rewards are all equal teach nothing; they are left out and other prompts are
                /// answered in their place, in at most this many more rollouts per iteration, each as large as what is
                /// missing. What is still missing then is filled with the first that were left out. Default 0 = none.
                /// (DAPO, arXiv:2503.14476; verl: `filter_groups`.)
                pub dynamic_sampling_rollouts: usize = 0,
                /// The reference follows the actor every `ref_model_sync_steps`. Default false.
                pub sync_ref_model: bool = false,
                /// The share of the actor in the new reference. Default 0.6.
                pub ref_model_mixup_alpha: f64 = 0.6,
                /// Optimizer steps between two of its updates: whole rollouts. Default 512.
                pub ref_model_sync_steps: usize = 512,
            }
            after_norm {}
            last {
                /// Held-out prompts answered and scored before and after training; 0 = none. Default 0.
                pub eval_prompts: usize = 0,
                /// Iterations between two evaluations on those prompts during training; 0 = none. Default 0.
                pub eval_every: usize = 0,
                /// Sample texts logged an iteration. Default 2.
                pub save_samples: usize = 2,
            }
        }

        impl $name {
            /// The settings of PPO's loop that the shared keys make.
            fn shared(&self, origin: Origin) -> Ppo {
                let accumulation = self.gradient_accumulation_steps.max(1);
                let micro = self.per_device_train_batch_size.max(1);
                let (batch, steps) = (self.rollout_size(), self.steps_of_rollout());
                let turns = (steps / accumulation).max(1);
                // The check comes after this, and refuses what does not fit.
                let optimizer_steps = turns.saturating_mul(self.num_iterations.max(1));
                let episodes =
                    self.max_steps.map_or(batch, |most| most.div_ceil(optimizer_steps).saturating_mul(batch));
                let sync = (self.ref_model_sync_steps / optimizer_steps).max(1);
                Ppo {
                    origin,
                    num_train_epochs: self.max_steps.is_none().then_some(self.num_train_epochs),
                    adapter: self.adapter.clone(),
                    reward_adapter: self.reward_adapter.clone(),
                    reward: self.reward.clone(),
                    gold: self.gold.clone(),
                    rollout: self.rollout.clone(),
                    learning_rate: self.learning_rate,
                    total_episodes: episodes,
                    batch_size: batch,
                    num_generations: self.num_generations,
                    num_mini_batches: turns,
                    num_ppo_epochs: self.num_iterations,
                    micro_batch_size: micro,
                    local_rollout_forward_batch_size: self.local_rollout_forward_batch_size,
                    response_length: self.max_completion_length,
                    temperature: self.temperature,
                    top_k: self.top_k,
                    top_p: self.top_p,
                    kl_coef: self.beta,
                    measure_kl: self.beta > 0.0,
                    cliprange: self.epsilon,
                    cliprange_high: self.epsilon_high,
                    score_clip: 0.0,
                    mask_truncated_completions: self.mask_truncated_completions,
                    dynamic_sampling_rollouts: self.dynamic_sampling_rollouts,
                    warmup_steps: self.warmup_steps,
                    lr_scheduler_type: self.lr_scheduler_type,
                    weight_decay: self.weight_decay,
                    adam_beta1: self.adam_beta1,
                    adam_beta2: self.adam_beta2,
                    adam_epsilon: self.adam_epsilon,
                    max_grad_norm: self.max_grad_norm,
                    ref_model_sync_iterations: if self.sync_ref_model { sync } else { 0 },
                    ref_model_mixup_alpha: self.ref_model_mixup_alpha,
                    checkpoint: self.checkpoint,
                    eval_prompts: self.eval_prompts,
                    eval_every: self.eval_every,
                    save_samples: self.save_samples,
                    ..Ppo::default()
                }
            }

            /// Forward and backward passes over one rollout.
            fn steps_of_rollout(&self) -> usize {
                let by_size = self.generation_batch_size.map(|size| size / self.per_device_train_batch_size.max(1));
                self.steps_per_generation.or(by_size).unwrap_or(self.gradient_accumulation_steps).max(1)
            }

            /// Responses of one rollout.
            fn rollout_size(&self) -> usize {
                self.per_device_train_batch_size.max(1).saturating_mul(self.steps_of_rollout())
            }

            /// The shared keys that are set and change nothing: (key, whether it is so, reason).
            fn idle_shared(&self) -> [(&'static str, bool, &'static str); 3] {
                let (usual, sync) = (Self::default(), "without sync_ref_model = true");
                let is_moved = self.ref_model_mixup_alpha != usual.ref_model_mixup_alpha;
                let is_timed = self.ref_model_sync_steps != usual.ref_model_sync_steps;
                let has_passes = self.num_train_epochs != usual.num_train_epochs;
                [
                    ("ref_model_mixup_alpha", is_moved && !self.sync_ref_model, sync),
                    ("ref_model_sync_steps", is_timed && !self.sync_ref_model, sync),
                    ("num_train_epochs", has_passes && self.max_steps.is_some(), "beside max_steps"),
                ]
            }

            /// The rules between the shared keys.
            fn check_shared(&self, section: &str) -> Result<()> {
                let unit = self.per_device_train_batch_size;
                let (generations, size) = (self.num_generations, self.rollout_size());
                check_rollout(section, "per_device_train_batch_size times steps_per_generation", size)?;
                if let (Some(size), Some(steps)) = (self.generation_batch_size, self.steps_per_generation) {
                    return Err(invalid!(
                        "[{section}] has both generation_batch_size = {size} and steps_per_generation = {steps}; keep one of \
                         them"
                    ));
                }
                if let Some(size) = self.generation_batch_size.filter(|size| !size.is_multiple_of(unit)) {
                    return Err(invalid!(
                        "[{section}] generation_batch_size = {size} is not a multiple of per_device_train_batch_size = {unit}; \
                         try {}",
                        size.next_multiple_of(unit)
                    ));
                }
                let (steps, accumulation) = (self.steps_of_rollout(), self.gradient_accumulation_steps);
                if !steps.is_multiple_of(accumulation) {
                    return Err(invalid!(
                        "[{section}] a rollout of {steps} pass{} is not a multiple of gradient_accumulation_steps = \
                         {accumulation}; try steps_per_generation = {}",
                        if steps == 1 { "" } else { "es" },
                        steps.next_multiple_of(accumulation)
                    ));
                }
                if !size.is_multiple_of(generations) {
                    let fits = |n: &usize| (n * unit * accumulation).is_multiple_of(generations);
                    let most = MOST_RESPONSES / (unit * accumulation);
                    let remedy = match (1..=generations.min(most)).find(fits) {
                        Some(steps) => format!("try steps_per_generation = {}", steps * accumulation),
                        None => "lower num_generations".into(),
                    };
                    return Err(invalid!(
                        "[{section}] a rollout of {size} responses (per_device_train_batch_size = {unit} times {}) is not a \
                         multiple of num_generations = {generations}; {remedy}",
                        self.steps_of_rollout(),
                    ));
                }
                if self.temperature == 0.0 {
                    return Err(invalid!(
                        "[{section}] temperature = 0 gives a prompt the same response num_generations = {generations} times; \
                         use 0.7 to 1.0"
                    ));
                }
                if self.reward_adapter.is_blank() && self.reward.is_empty() {
                    return Err(invalid!(
                        "[{section}] needs reward_adapter = \"runs/reward/…\", the folder the reward stage wrote, or a \
                         [[{section}.reward]]"
                    ));
                }
                if self.eval_every > 0 && self.eval_prompts == 0 {
                    return Err(invalid!(
                        "[{section}] eval_every = {} evaluates nothing; set eval_prompts",
                        self.eval_every
                    ));
                }
                if self.sync_ref_model && self.beta == 0.0 {
                    return Err(invalid!(
                        "[{section}] sync_ref_model = true moves a reference, and beta = 0 has none; set beta, or remove the key"
                    ));
                }
                let per_rollout = self.steps_of_rollout() / accumulation.max(1) * self.num_iterations;
                if self.sync_ref_model && !self.ref_model_sync_steps.is_multiple_of(per_rollout.max(1)) {
                    return Err(invalid!(
                        "[{section}] ref_model_sync_steps = {} is not a multiple of the {per_rollout} optimizer steps of a \
                         rollout; try {}",
                        self.ref_model_sync_steps,
                        self.ref_model_sync_steps.next_multiple_of(per_rollout)
                    ));
                }
                Ok(())
            }
        }

        impl GroupKeys for $name {
            fn set_micro_batch(&mut self, size: usize) -> Vec<(&'static str, usize)> {
                let size = size.max(1);
                let of = |passes: usize, unit: usize| (passes * unit).div_ceil(size);
                let unit = self.per_device_train_batch_size;
                let accumulation = of(self.gradient_accumulation_steps, unit);
                self.gradient_accumulation_steps = accumulation;
                self.per_device_train_batch_size = size;
                let mut set =
                    vec![("per_device_train_batch_size", size), ("gradient_accumulation_steps", accumulation)];
                if let Some(steps) = &mut self.steps_per_generation {
                    *steps = of(*steps, unit);
                    set.push(("steps_per_generation", *steps));
                }
                set
            }

            fn set_ranks(&mut self, ranks: usize) {
                self.gradient_accumulation_steps = self.gradient_accumulation_steps.saturating_mul(ranks);
                let sizes = [&mut self.steps_per_generation, &mut self.generation_batch_size];
                sizes.into_iter().flatten().for_each(|size| *size = size.saturating_mul(ranks));
            }

            fn set_at_once(&mut self, prompts: usize) {
                self.local_rollout_forward_batch_size = Some(prompts);
            }

            fn set_response_length(&mut self, tokens: usize) {
                self.max_completion_length = tokens;
            }

            fn set_recompute(&mut self, checkpoint: RecomputeSetting) {
                self.checkpoint = checkpoint;
            }

            fn paths(&mut self) -> Vec<(&'static str, &mut PathBuf)> {
                let parts = self.reward.iter_mut().chain(&mut self.gold);
                let adapters = parts.flat_map(|part| &mut part.adapters).map(|path| ("reward adapters", path));
                let own = self.adapter.as_mut().map(|path| ("adapter", path));
                let main = self.reward_adapter.as_mut_slice().iter_mut().map(|path| ("reward_adapter", path));
                let folder = self.rollout.as_mut().and_then(|rollout| rollout.adapter_dir.as_mut());
                let folder = folder.map(|path| ("rollout adapter_dir", path));
                own.into_iter().chain(main).chain(adapters).chain(folder).collect()
            }
        }
    };
}

/// Most responses of one rollout, four times those of DAPO (arXiv:2503.14476): all of them are held at once, and the plan
/// goes through each.
pub(super) const MOST_RESPONSES: usize = 32_768;

/// Refuses a rollout that is too large.
pub(super) fn check_rollout(section: &str, key: &str, size: usize) -> Result<()> {
    match size > MOST_RESPONSES {
        true => {
            Err(invalid!("[{section}] a rollout of {size} responses ({key}) is more than {MOST_RESPONSES}; use fewer"))
        }
        false => Ok(()),
    }
}

/// What a plan of the memory changes in a section of a group method.
pub(crate) trait GroupKeys {
    /// Sets the responses of one pass and keeps those of an optimizer step and of a rollout; the keys that changed.
    fn set_micro_batch(&mut self, size: usize) -> Vec<(&'static str, usize)>;

    /// Gives an optimizer step and a rollout as many passes more as there are ranks, which share them.
    fn set_ranks(&mut self, ranks: usize);

    /// Sets `local_rollout_forward_batch_size`.
    fn set_at_once(&mut self, prompts: usize);

    /// Sets `max_completion_length`.
    fn set_response_length(&mut self, tokens: usize);

    /// Sets `checkpoint`.
    fn set_recompute(&mut self, checkpoint: RecomputeSetting);

    /// Every path of the section with its key.
    fn paths(&mut self) -> Vec<(&'static str, &mut PathBuf)>;
}

group_section! {
    /// `[grpo]`: group relative policy optimisation of the actor's adapter, arXiv:2402.03300, without a critic.
    pub struct Grpo;
    /// Responses per prompt, which are compared with each other. Default 8.
    num_generations = 8;
    /// Weight of the KL to the reference, in the loss. Default 0: no reference is held and no KL is measured.
    /// (arXiv:2402.03300: 0.04.)
    beta = 0.0;
    own {
        /// A token with a negative advantage counts no more than at this ratio; absent = without bound.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub delta: Option<f64> = None,
        /// How ratios become a loss and tokens one number. Default `dapo`.
        pub loss_type: GroupLoss = GroupLoss::Dapo,
        /// With `loss_type = "sapo"`: the gate's temperature for a positive advantage. Default 1.0.
        pub sapo_temperature_pos: f64 = 1.0,
        /// With `loss_type = "sapo"`: the gate's temperature for any other advantage. Default 1.05.
        pub sapo_temperature_neg: f64 = 1.05,
        /// Whose probability ratio is clipped. Default `token`; `sequence` is GSPO.
        pub importance_sampling_level: ImportanceSamplingLevel = ImportanceSamplingLevel::Token,
        /// What a group's rewards are divided by. Default `group`.
        pub scale_rewards: ScaleRewards = ScaleRewards::Group,
        /// Several rewards: normalised in each group before their weighted sum, or after it. Default `sum_then_normalize`.
        pub multi_objective_aggregation: Aggregation = Aggregation::SumThenNormalize,
        /// The policy gradient is taken at this share of an optimizer step's tokens, those with the highest entropy. Default
        /// 1.0 = all. (arXiv:2506.01939: 0.2.)
        pub top_entropy_quantile: f64 = 1.0,
        /// What is done where the sampler's log-probabilities are not the trainer's. Default `none`: the sampler is this
        /// program (TRL with vLLM: `sequence_mask`).
        pub importance_sampling_correction: ImportanceSamplingCorrection = ImportanceSamplingCorrection::None,
        /// Its upper bound. Default 3.0.
        pub importance_sampling_clip_max: f64 = 3.0,
        /// Its lower bound; absent = none.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub importance_sampling_clip_min: Option<f64> = None,
        /// Weight of the entropy bonus, reward units per nat. Default 0.
        pub entropy_coef: f64 = 0.0,
        /// With `beta`: the KL's estimate is multiplied by the probability ratio, which makes it unbiased for the actor
        /// although the tokens were sampled by an older one. Default true.
        pub use_bias_correction_kl: bool = true,
    }
}

impl Grpo {
    /// The settings of PPO's loop.
    pub fn to_ppo(&self) -> Ppo {
        let (policy_loss, loss_type) = self.loss_type.of_engine();
        let is = |of: PolicyLoss| policy_loss == of;
        Ppo {
            advantage_estimator: AdvantageEstimator::Grpo,
            kl_in: KlIn::Loss,
            kl_estimator: KlEstimator::K3,
            policy_loss,
            loss_type,
            importance_sampling_level: self.importance_sampling_level,
            scale_rewards: self.scale_rewards,
            dual_clip: self.delta,
            sapo_temperature_pos: is(PolicyLoss::Sapo).then_some(self.sapo_temperature_pos),
            sapo_temperature_neg: is(PolicyLoss::Sapo).then_some(self.sapo_temperature_neg),
            aggregation: self.multi_objective_aggregation,
            top_entropy_quantile: self.top_entropy_quantile,
            importance_sampling_correction: self.importance_sampling_correction,
            importance_sampling_clip_max: self.importance_sampling_clip_max,
            importance_sampling_clip_min: self.importance_sampling_clip_min,
            entropy_coef: self.entropy_coef,
            use_bias_correction_kl: self.use_bias_correction_kl,
            ..self.shared(Origin::Grpo)
        }
    }

    /// Rules between keys.
    pub(super) fn check(&self) -> Result<()> {
        if self.importance_sampling_level == ImportanceSamplingLevel::Product {
            return Err(invalid!(
                "[grpo] importance_sampling_level = \"product\" is RLOO's; use token or sequence, or `fourfold rloo`"
            ));
        }
        if self.multi_objective_aggregation == Aggregation::NormalizeThenSum
            && self.scale_rewards != ScaleRewards::Group
        {
            return Err(invalid!(
                "[grpo] multi_objective_aggregation = \"normalize_then_sum\" scales each reward by its group and the sum by the \
                 rollout; remove scale_rewards"
            ));
        }
        self.check_shared("grpo")
    }

    /// The keys that differ from their defaults and change nothing beside the other keys, each as a sentence with the
    /// reason.
    pub fn idle_keys(&self) -> Vec<String> {
        let (usual, policy_loss) = (Self::default(), self.loss_type.of_engine().0);
        let (is_clip, is_sapo) = (policy_loss == PolicyLoss::Clip, policy_loss == PolicyLoss::Sapo);
        let clip = "with a loss_type that does not clip";
        let gate = "without loss_type = \"sapo\"";
        let uncorrected = "without importance_sampling_correction";
        let is_corrected = self.importance_sampling_correction != ImportanceSamplingCorrection::None;
        let own = [
            ("epsilon", self.epsilon != usual.epsilon && !is_clip, clip),
            ("epsilon_high", self.epsilon_high.is_some() && is_sapo, clip),
            ("delta", self.delta.is_some() && !is_clip, clip),
            ("sapo_temperature_pos", self.sapo_temperature_pos != usual.sapo_temperature_pos && !is_sapo, gate),
            ("sapo_temperature_neg", self.sapo_temperature_neg != usual.sapo_temperature_neg && !is_sapo, gate),
            (
                "importance_sampling_clip_max",
                self.importance_sampling_clip_max != usual.importance_sampling_clip_max && !is_corrected,
                uncorrected,
            ),
            ("importance_sampling_clip_min", self.importance_sampling_clip_min.is_some() && !is_corrected, uncorrected),
            ("use_bias_correction_kl", !self.use_bias_correction_kl && self.beta == 0.0, "without beta"),
        ];
        idle("grpo", own.into_iter().chain(self.idle_shared()))
    }
}

/// The sentences on keys that are idle: (key, whether it is, reason).
fn idle<'k>(section: &str, keys: impl Iterator<Item = (&'k str, bool, &'k str)>) -> Vec<String> {
    keys.filter(|(_, is_idle, _)| *is_idle)
        .map(|(key, _, reason)| format!("[{section}] {key} has no effect {reason}"))
        .collect()
}

group_section! {
    /// `[rloo]`: REINFORCE with the other responses to a prompt as the baseline, arXiv:2402.14740, without a critic.
    pub struct Rloo;
    /// Responses per prompt, each compared with the others. Default 2.
    num_generations = 2;
    /// Weight of the KL to the reference, taken from the rewards. Default 0.05. 0: no reference is held and no KL is
    /// measured.
    beta = 0.05;
    own {
        /// Divide the advantages by their deviation over the rollout. Default false.
        pub normalize_advantages: bool = false,
        /// Rewards are clipped to this range before the KL joins, two numbers `[-c, c]`; absent = not.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub reward_clip_range: Option<[f64; 2]> = None,
    }
}

impl Rloo {
    /// The settings of PPO's loop: the ratio of a whole response is clipped, as TRL has it.
    pub fn to_ppo(&self) -> Ppo {
        Ppo {
            advantage_estimator: AdvantageEstimator::Rloo,
            kl_in: KlIn::Reward,
            kl_estimator: KlEstimator::K1,
            loss_type: LossType::Grpo,
            importance_sampling_level: ImportanceSamplingLevel::Product,
            normalize_advantages: self.normalize_advantages,
            score_clip: self.reward_clip_range.map_or(0.0, |[_, high]| high),
            ..self.shared(Origin::Rloo)
        }
    }

    /// Rules between keys.
    pub(super) fn check(&self) -> Result<()> {
        if let Some([low, high]) = self.reward_clip_range
            && (low != -high || !(high.is_finite() && high > 0.0))
        {
            let most = if low.abs().max(high.abs()) > 0.0 { low.abs().max(high.abs()) } else { 5.0 };
            return Err(invalid!(
                "[rloo] reward_clip_range = [{low}, {high}] does not lie evenly around 0; rewards are clipped to ± one bound here, \
                 so use [-{most}, {most}], or min and max in the reward's own source"
            ));
        }
        self.check_shared("rloo")
    }

    /// The keys that are set and change nothing, each as a sentence with the reason.
    pub fn idle_keys(&self) -> Vec<String> {
        idle("rloo", self.idle_shared().into_iter())
    }
}

/// Makes the settings of PPO's loop from `[grpo]` or `[rloo]`.
pub(super) fn translate(config: &mut Config) {
    let made = config.grpo.as_ref().map(Grpo::to_ppo).or_else(|| config.rloo.as_ref().map(Rloo::to_ppo));
    if made.is_some() {
        config.ppo = made;
    }
}
