//! The section `[ppo]`. Names and defaults are TRL's where no other source is given. Knows no rule between keys: read
//! validate.rs next.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::stages::{Checkpoint, LrScheduler};

/// Estimator of the KL divergence between actor and reference from one sampled token, http://joschu.net/blog/kl-approx.html.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KlEstimator {
    /// `log p - log p_ref`: unbiased, may be negative. DeepSpeed-Chat's and TRL's default.
    #[default]
    K1,
    /// `exp(d) - d - 1` with `d = log p_ref - log p`: never negative, lower variance.
    K3,
}

/// `[ppo]`: proximal policy optimisation of the actor's adapter against a reward model.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ppo {
    /// The SFT adapter (folder, PEFT layout): the actor starts from it and the reference stays it. Absent = the bare base
    /// is the reference and the actor starts from a fresh adapter shaped by `[lora]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// The reward adapter with its scalar head (folder, PEFT layout): the reward model, and where the critic starts.
    /// Required.
    pub reward_adapter: PathBuf,
    /// Peak learning rate of the actor. Default 3e-5: ten times TRL's 3e-6, since only low-rank factors move.
    pub learning_rate: f64,
    /// Peak learning rate of the critic; absent = `learning_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub critic_learning_rate: Option<f64>,
    /// Prompts answered in all, `total_episodes / batch_size` iterations. Default 256.
    pub total_episodes: usize,
    /// Prompts of one rollout. Default 8.
    pub batch_size: usize,
    /// Optimizer steps a pass over a rollout is cut into. Default 1 (TRL and DeepSpeed-Chat).
    pub num_mini_batches: usize,
    /// Passes over a rollout. Default 1 (DeepSpeed-Chat, which finds more unstable; TRL: 4).
    pub num_ppo_epochs: usize,
    /// Sequences of one forward and backward pass: bounds the memory, changes no result. Default 4.
    pub micro_batch_size: usize,
    /// Most tokens of a sampled response. Default 64 (TRL: 53, DeepSpeed-Chat: 256).
    pub response_length: usize,
    /// Divides the logits before sampling; the logprobs of training use it too. Default 1.0 (TRL: 0.7).
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
    /// Estimator of that KL. Default `k1`.
    pub kl_estimator: KlEstimator,
    /// The probability ratio is clipped to `1 ± cliprange`. Default 0.2 (arXiv:1707.06347).
    pub cliprange: f64,
    /// A value moves no further than this from the rollout's value before it is clipped, reward units. Default 0.2.
    pub cliprange_value: f64,
    /// Weight of the value loss. Default 1.0: actor and critic have optimizers of their own (TRL, one optimizer: 0.1).
    pub vf_coef: f64,
    /// Discount. Default 1.0.
    pub gamma: f64,
    /// GAE's lambda. Default 0.95.
    pub lam: f64,
    /// Divide the per-token rewards by their deviation over the rollout, the mean kept. Default false.
    pub whiten_rewards: bool,
    /// Shift and scale the advantages to mean 0, variance 1 over the rollout. Default true (TRL; DeepSpeed-Chat: not).
    pub whiten_advantages: bool,
    /// Divide scores by the deviation of all scores so far. Default false (TRL's first PPO trainer).
    pub use_score_scaling: bool,
    /// With `use_score_scaling`: subtract their mean, too. Default false (TRL's first PPO trainer).
    pub use_score_norm: bool,
    /// Scores are clipped to `±score_clip` before the KL penalty joins; 0 = not. Default 5.0 (DeepSpeed-Chat).
    pub score_clip: f64,
    /// Taken from the score of a response without end token, reward units; absent = nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing_eos_penalty: Option<f64>,
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
    pub checkpoint: Checkpoint,
    /// Held-out prompts answered and scored before and after training; 0 = none. Default 0.
    pub eval_prompts: usize,
    /// Sample texts logged an iteration. Default 2.
    pub save_samples: usize,
}

impl Default for Ppo {
    fn default() -> Self {
        Self {
            adapter: None,
            reward_adapter: PathBuf::new(),
            learning_rate: 3e-5,
            critic_learning_rate: None,
            total_episodes: 256,
            batch_size: 8,
            num_mini_batches: 1,
            num_ppo_epochs: 1,
            micro_batch_size: 4,
            response_length: 64,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            kl_coef: 0.05,
            adap_kl_ctrl: false,
            target: 6.0,
            horizon: 10_000.0,
            kl_estimator: KlEstimator::K1,
            cliprange: 0.2,
            cliprange_value: 0.2,
            vf_coef: 1.0,
            gamma: 1.0,
            lam: 0.95,
            whiten_rewards: false,
            whiten_advantages: true,
            use_score_scaling: false,
            use_score_norm: false,
            score_clip: 5.0,
            missing_eos_penalty: None,
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
            checkpoint: Checkpoint::Auto,
            eval_prompts: 0,
            save_samples: 2,
        }
    }
}

impl Ppo {
    /// The critic's peak learning rate: its own, or the actor's.
    pub fn critic_learning_rate(&self) -> f64 {
        self.critic_learning_rate.unwrap_or(self.learning_rate)
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
