//! The section `[ppo]`. Names and defaults are TRL's where no other source is given. Knows no rule between keys: read
//! validate.rs next.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Compat;
use super::ptx::Ptx;
use super::rewards::RewardPart;
use super::stages::{LrScheduler, RecomputeSetting};

/// How rewards become the weights of the policy gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AdvantageEstimator {
    /// Generalised advantage estimation over a critic's values, arXiv:1506.02438.
    #[default]
    Gae,
    /// The discounted return; no critic.
    Reinforce,
    /// The discounted return less the critic's value, arXiv:1602.01783.
    A2c,
    /// An answer's reward less the mean of the other answers to its prompt; no critic. arXiv:2402.14740.
    Rloo,
    /// An answer's reward, standardised among the answers to its prompt; no critic. arXiv:2402.03300.
    Grpo,
    /// The discounted return, standardised over the rollout; no critic. arXiv:2501.03262.
    ReinforcePlusPlus,
}

impl AdvantageEstimator {
    /// Does it read a critic's values?
    pub fn has_critic(self) -> bool {
        matches!(self, Self::Gae | Self::A2c)
    }

    /// Does it compare the answers to one prompt?
    pub fn has_groups(self) -> bool {
        matches!(self, Self::Rloo | Self::Grpo)
    }
}

/// What keeps the actor near the one that sampled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyLoss {
    /// The clipped surrogate, arXiv:1707.06347 eq. 7.
    #[default]
    Clip,
    /// The surrogate with a KL penalty whose weight is adapted, arXiv:1707.06347 eq. 8.
    KlPenalty,
    /// Nothing: the plain policy gradient. With one step a rollout the same as the others.
    Gradient,
}

/// How the KL divergence from actor to reference is measured at a token, http://joschu.net/blog/kl-approx.html.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KlEstimator {
    /// From the sampled token, `log p - log p_ref`: unbiased, may be negative. DeepSpeed-Chat's and TRL's default.
    #[default]
    K1,
    /// `(log p - log p_ref)² / 2`: biased, low variance; its gradient is the divergence's.
    K2,
    /// `exp(d) - d - 1` with `d = log p_ref - log p`: never negative, lower variance.
    K3,
    /// No estimate: the sum over the whole vocabulary. In the reward it costs a further forward pass of the actor.
    Exact,
}

/// Where the KL penalty acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KlIn {
    /// Subtracted from every token's reward.
    #[default]
    Reward,
    /// Added to the policy loss, as GRPO has it.
    Loss,
}

/// Scaling of the per-token rewards over a rollout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WhitenRewards {
    /// As they are.
    #[default]
    No,
    /// To variance 1 around the mean that they have. TRL's `whiten_rewards = True`.
    KeepMean,
    /// To mean 0 and variance 1.
    RemoveMean,
}

/// What the critic starts as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CriticStart {
    /// A copy of the reward model, over its base.
    #[default]
    Reward,
    /// A copy of the policy's adapter with a fresh scalar head, over the policy's base.
    Actor,
    /// A fresh adapter of the policy's adapter's shape with a fresh scalar head, over the reward model's base.
    Own,
}

/// `[ppo]`: proximal policy optimisation of the actor's adapter against a reward model.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ppo {
    /// Whose behaviour to keep. `"dschat"`: DeepSpeed-Chat's padded rows: answers of one token or none are dropped, the
    /// score is read at the last token that is no pad and rewarded one action later, and no loss sees that action; and
    /// its values for the keys that the file leaves open, which the run's config.toml then shows. Absent = none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compat: Option<Compat>,
    /// The SFT adapter (folder, PEFT layout): the actor starts from it and the reference stays it. Absent = the bare base
    /// is the reference and the actor starts from a fresh adapter shaped by `[lora]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// The reward adapter with its scalar head (folder, PEFT layout): the reward model, and where the critic starts.
    /// Required unless there is a `[[ppo.reward]]`; beside those it is one more, of weight 1.
    #[serde(skip_serializing_if = "is_empty")]
    pub reward_adapter: PathBuf,
    /// `[[ppo.reward]]`: more sources of the reward, or others than an adapter. Default none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reward: Vec<RewardPart>,
    /// `[ppo.gold]`: what the held-out answers are judged by besides, and the policy never trained on. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gold: Option<RewardPart>,
    /// `[ppo.ptx]`: texts that the actor goes on learning from beside the reward. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ptx: Option<Ptx>,
    /// Peak learning rate of the actor. Default 3e-5: ten times TRL's 3e-6, since only low-rank factors move.
    pub learning_rate: f64,
    /// Peak learning rate of the critic; absent = `learning_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub critic_learning_rate: Option<f64>,
    /// Advantages. Default `gae`.
    pub advantage_estimator: AdvantageEstimator,
    /// What the critic starts as, where the estimator has one. Default `reward`.
    pub critic: CriticStart,
    /// First iterations in which only the critic trains. Default 0 (verl: `critic_warmup`).
    pub critic_warmup: usize,
    /// Answers sampled in all, `total_episodes / batch_size` iterations. Default 256.
    pub total_episodes: usize,
    /// Answers of one rollout. Default 8.
    pub batch_size: usize,
    /// Answers to each prompt: a rollout asks `batch_size / num_generations` prompts. `rloo` and `grpo` need two or more.
    /// Default 1 (TRL's GRPO: 8, its `rloo_k`: 2).
    pub num_generations: usize,
    /// Optimizer steps a pass over a rollout is cut into. Default 1 (TRL and DeepSpeed-Chat).
    pub num_mini_batches: usize,
    /// Passes over a rollout. Default 1 (DeepSpeed-Chat, which finds more unstable; TRL: 4).
    pub num_ppo_epochs: usize,
    /// Sequences of one forward and backward pass: bounds the memory, changes no result. Default 4.
    pub micro_batch_size: usize,
    /// Prompts that are answered at once: the cache of keys and values is of so many. Each answer is the same, whatever
    /// else is sampled beside it. Absent = all of `batch_size` (TRL: 64).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local_rollout_forward_batch_size: Option<usize>,
    /// Most tokens of a sampled response. Default 64 (TRL: 53, DeepSpeed-Chat: 256).
    pub response_length: usize,
    /// Divides the logits before sampling; the logprobs of training use it too. 0 = the likeliest token, whose logprobs are
    /// those of 1. Default 1.0 (TRL: 0.7; DeepSpeed-Chat: 0, and logprobs of 1 at any).
    pub temperature: f64,
    /// Samples from the k likeliest tokens only; 0 = from all. Default 0: a truncated sampling distribution is not the one
    /// the loss assumes and makes the measured KL negative.
    pub top_k: usize,
    /// Samples from the smallest set of tokens with this much probability. Default 1.0 = all, as for `top_k`.
    pub top_p: f64,
    /// Weight of the KL penalty in the reward. Default 0.05 (TRL; DeepSpeed-Chat: 0.1).
    pub kl_coef: f64,
    /// Adapt that weight to the KL that the rollouts have; `kl_coef` is then where it starts. Default false (TRL's first PPO
    /// trainer: true).
    pub adap_kl_ctrl: bool,
    /// The KL that the adaptive weight steers to, nats an answer. Default 6 (TRL; arXiv:1909.08593).
    pub target: f64,
    /// Answers over which the adaptive weight changes by a fifth at most. Default 10000 (TRL; arXiv:1909.08593).
    pub horizon: f64,
    /// Measure of that KL. Default `k1`.
    pub kl_estimator: KlEstimator,
    /// Where that KL acts. Default `reward`.
    pub kl_in: KlIn,
    /// What keeps the actor near the one that sampled. Default `clip`.
    pub policy_loss: PolicyLoss,
    /// The probability ratio is clipped to `1 ± cliprange`. Default 0.2 (arXiv:1707.06347).
    pub cliprange: f64,
    /// Its upper side, `1 + cliprange_high`; absent = `cliprange`. (TRL: `epsilon_high`; DAPO, arXiv:2503.14476: 0.28.)
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cliprange_high: Option<f64>,
    /// A token with a negative advantage counts no more than at this ratio, arXiv:1912.09729; absent = without bound.
    /// (TRL's GRPO: `delta`.)
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dual_clip: Option<f64>,
    /// A minibatch whose mean ratio exceeds this is skipped and counted; absent = none is. (TRL's first PPO trainer: 10.)
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio_threshold: Option<f64>,
    /// The logarithm of the ratio is held within ± this, nats, with no gradient beyond; absent = not. (A guard against
    /// overflow: verl holds it within 20.)
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_ratio_clamp: Option<f64>,
    /// With `policy_loss = "kl_penalty"`: the penalty's first weight. Default 1.0 (openai/baselines ppo1).
    pub kl_penalty_coef: f64,
    /// The KL between two policies of one rollout that the penalty's weight steers to, nats a token: after an iteration
    /// with more than 1.5 times this it is doubled, with less than this / 1.5 halved. Default 0.01 (arXiv:1707.06347).
    pub kl_penalty_target: f64,
    /// Stops the passes over a rollout at a minibatch whose `approxkl` exceeds 1.5 times this, nats a token; absent = never.
    /// (OpenAI's Spinning Up: 0.01.)
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_kl: Option<f64>,
    /// Weight of the entropy bonus, reward units a nat. Default 0 (arXiv:1707.06347 eq. 9 has 0.01 for games; TRL and
    /// DeepSpeed-Chat have none).
    pub entropy_coef: f64,
    /// A value moves no further than this from the rollout's value before it is clipped, reward units. Default 0.2 (TRL and
    /// DeepSpeed-Chat, from openai/baselines ppo2).
    pub cliprange_value: f64,
    /// Weight of the value loss. Default 1.0: actor and critic have optimizers of their own (TRL, one optimizer: 0.1).
    pub vf_coef: f64,
    /// One optimizer for actor and critic: the gradient's norm is clipped over both, and `critic_learning_rate` is not
    /// used. Default false (TRL: true).
    pub shared_optimizer: bool,
    /// Discount of a later token's reward. Default 1.0 (TRL and DeepSpeed-Chat).
    pub gamma: f64,
    /// GAE's lambda, arXiv:1506.02438. Default 0.95 (TRL and DeepSpeed-Chat).
    pub lam: f64,
    /// Scaling of the per-token rewards over the rollout. Default `no`.
    pub whiten_rewards: WhitenRewards,
    /// Shift and scale the advantages to mean 0, variance 1 over the rollout. Default true (TRL; DeepSpeed-Chat: not), false
    /// for `rloo` and `grpo` (TRL). `reinforce_plus_plus` always does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub whiten_advantages: Option<bool>,
    /// Divide scores by the deviation of all scores so far. Default false (TRL's first PPO trainer).
    pub use_score_scaling: bool,
    /// With `use_score_scaling`: subtract their mean, too. Default false (TRL's first PPO trainer).
    pub use_score_norm: bool,
    /// Scores are clipped to `±score_clip` before the KL penalty joins; 0 = not. Default 5.0 (DeepSpeed-Chat).
    pub score_clip: f64,
    /// Taken from the score of a response without end token, reward units; absent = nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing_eos_penalty: Option<f64>,
    /// Answers of fewer tokens, end token included, pay `short_response_penalty`. Default 0 = none is too short.
    pub min_response_length: usize,
    /// What they pay, reward units. Default 1.0.
    pub short_response_penalty: f64,
    /// Taken from the score for every response token, reward units. Default 0.
    pub length_penalty: f64,
    /// The last so many of `response_length` tokens cost more and more, up to `overlong_penalty_factor`. Default 0 = none
    /// does. (DAPO, arXiv:2503.14476 eq. 13: a fifth of the length.)
    pub overlong_buffer_len: usize,
    /// What an answer of the full `response_length` then pays, reward units. Default 1.0 (DAPO).
    pub overlong_penalty_factor: f64,
    /// Optimizer steps over which the learning rates rise from 0. Default 0.
    pub warmup_steps: usize,
    /// Course of the learning rates after the warm-up. Default `linear` (transformers).
    pub lr_scheduler_type: LrScheduler,
    /// AdamW's decoupled weight decay. Default 0.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment. Default 0.9 (transformers).
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment. Default 0.999 (transformers; DeepSpeed-Chat: 0.95).
    pub adam_beta2: f64,
    /// AdamW's term in the denominator. Default 1e-8 (transformers; TRL's PPO: 1e-5).
    pub adam_epsilon: f64,
    /// Largest norm of an optimizer step's gradient, actor and critic apart; 0 = no clipping. Default 1.0.
    pub max_grad_norm: f64,
    /// Keep a moving average of the actor, `average = ema_decay * average + (1 - ema_decay) * actor` after each step,
    /// saved beside it; absent = none. DeepSpeed-Chat's is 0.992.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema_decay: Option<f64>,
    /// Iterations after which the reference follows the actor, again and again; 0 = never. Default 0. (TRL:
    /// `ref_model_sync_steps`, in optimizer steps; arXiv:2404.09656.)
    pub ref_model_sync_iterations: usize,
    /// How far it then goes: 1 copies the actor, less mixes the factors. Default 1.0 (TRL: 0.6).
    pub ref_model_mixup_alpha: f64,
    /// What a block keeps for the backward pass. Default `auto`.
    pub checkpoint: RecomputeSetting,
    /// Held-out prompts answered and scored before and after training; 0 = none. Default 0.
    pub eval_prompts: usize,
    /// Iterations between two evaluations on those prompts during training; 0 = none. Default 0.
    pub eval_every: usize,
    /// Sample texts logged an iteration. Default 2.
    pub save_samples: usize,
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

impl Default for Ppo {
    fn default() -> Self {
        Self {
            compat: None,
            adapter: None,
            reward_adapter: PathBuf::new(),
            reward: Vec::new(),
            gold: None,
            ptx: None,
            learning_rate: 3e-5,
            critic_learning_rate: None,
            advantage_estimator: AdvantageEstimator::Gae,
            critic: CriticStart::Reward,
            critic_warmup: 0,
            total_episodes: 256,
            batch_size: 8,
            num_generations: 1,
            num_mini_batches: 1,
            num_ppo_epochs: 1,
            micro_batch_size: 4,
            local_rollout_forward_batch_size: None,
            response_length: 64,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            kl_coef: 0.05,
            adap_kl_ctrl: false,
            target: 6.0,
            horizon: 10_000.0,
            kl_estimator: KlEstimator::K1,
            kl_in: KlIn::Reward,
            policy_loss: PolicyLoss::Clip,
            cliprange: 0.2,
            cliprange_high: None,
            dual_clip: None,
            ratio_threshold: None,
            log_ratio_clamp: None,
            kl_penalty_coef: 1.0,
            kl_penalty_target: 0.01,
            target_kl: None,
            entropy_coef: 0.0,
            cliprange_value: 0.2,
            vf_coef: 1.0,
            shared_optimizer: false,
            gamma: 1.0,
            lam: 0.95,
            whiten_rewards: WhitenRewards::No,
            whiten_advantages: None,
            use_score_scaling: false,
            use_score_norm: false,
            score_clip: 5.0,
            missing_eos_penalty: None,
            min_response_length: 0,
            short_response_penalty: 1.0,
            length_penalty: 0.0,
            overlong_buffer_len: 0,
            overlong_penalty_factor: 1.0,
            warmup_steps: 0,
            lr_scheduler_type: LrScheduler::Linear,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            ema_decay: None,
            ref_model_sync_iterations: 0,
            ref_model_mixup_alpha: 1.0,
            checkpoint: RecomputeSetting::Auto,
            eval_prompts: 0,
            eval_every: 0,
            save_samples: 2,
        }
    }
}

impl Ppo {
    /// Prompts that are answered at once.
    pub fn at_once(&self) -> usize {
        self.local_rollout_forward_batch_size.unwrap_or(self.batch_size).clamp(1, self.batch_size.max(1))
    }

    /// The critic's peak learning rate: its own, or the actor's.
    pub fn critic_learning_rate(&self) -> f64 {
        self.critic_learning_rate.unwrap_or(self.learning_rate)
    }

    /// Are advantages shifted and scaled over the rollout?
    pub fn whiten_advantages(&self) -> bool {
        let plus_plus = self.advantage_estimator == AdvantageEstimator::ReinforcePlusPlus;
        plus_plus || self.whiten_advantages.unwrap_or(!self.advantage_estimator.has_groups())
    }

    /// The bound of a score, where there is one.
    pub fn score_clip(&self) -> Option<f64> {
        (self.score_clip > 0.0).then_some(self.score_clip)
    }

    /// Rollouts of the whole run.
    pub fn iterations(&self) -> usize {
        self.total_episodes / self.batch_size.max(1)
    }
}
