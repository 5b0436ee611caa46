//! The section `[ppo]`. Names and defaults are TRL's where no other source is given. Read `validate.rs` next.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::optimisation::optimised_section;
use super::ptx::Ptx;
use super::rewards::RewardPart;
use super::rollout::RolloutEngine;
use super::{Compat, Paths, Stage};

/// How rewards become the weights of the policy gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AdvantageEstimator {
    /// Generalised advantage estimation over a critic's values, arXiv:1506.02438.
    #[default]
    Gae,
    /// The discounted return; no critic.
    Reinforce,
    /// The discounted return less the critic's value, arXiv:1602.01783.
    A2c,
    /// A response's reward less the mean of the other responses to its prompt; no critic. arXiv:2402.14740.
    Rloo,
    /// A response's reward, standardised among the responses to its prompt; no critic. arXiv:2402.03300. In a config file
    /// it comes with the paper's KL for the keys that the file leaves open: `kl_in = "loss"`, `kl_estimator = "k3"`,
    /// `kl_coef = 0.04`. TRL's GRPOTrainer has the same term with weight 0 (`beta`); it does not clip scores (here
    /// `score_clip`), and both take the mean of the loss over all tokens, where the paper takes each response's mean first
    /// (`loss_type = "grpo"`).
    Grpo,
    /// The discounted return, standardised over the rollout; no critic. arXiv:2501.03262.
    ReinforcePlusPlus,
    /// A response's reward less the mean of its prompt's responses, standardised over the rollout; no critic.
    /// arXiv:2501.03262 section 3 (OpenRLHF: `reinforce_baseline`).
    ReinforcePlusPlusBaseline,
}

impl AdvantageEstimator {
    /// Whether it reads a critic's values.
    pub fn has_critic(self) -> bool {
        matches!(self, Self::Gae | Self::A2c)
    }

    /// Whether it compares the responses to one prompt.
    pub fn has_groups(self) -> bool {
        matches!(self, Self::Rloo | Self::Grpo | Self::ReinforcePlusPlusBaseline)
    }

    /// Whether its advantages are always shifted and scaled over the rollout.
    pub fn is_standardised(self) -> bool {
        matches!(self, Self::ReinforcePlusPlus | Self::ReinforcePlusPlusBaseline)
    }

    /// Its name in a config.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gae => "gae",
            Self::Reinforce => "reinforce",
            Self::A2c => "a2c",
            Self::Rloo => "rloo",
            Self::Grpo => "grpo",
            Self::ReinforcePlusPlus => "reinforce_plus_plus",
            Self::ReinforcePlusPlusBaseline => "reinforce_plus_plus_baseline",
        }
    }
}

/// The objective that keeps the actor near the policy that sampled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyLoss {
    /// The clipped surrogate, arXiv:1707.06347 eq. 7.
    #[default]
    Clip,
    /// The surrogate with a KL penalty whose weight is adapted, arXiv:1707.06347 eq. 8.
    KlPenalty,
    /// The capped ratio as a weight of the plain policy gradient, `cliprange_high` the cap on the ratio itself (TRL's `cispo`,
    /// arXiv:2506.13585: 5).
    Cispo,
    /// A smooth gate on the ratio by two temperatures, `sapo_temperature_pos` and `sapo_temperature_neg` (arXiv:2511.20347).
    Sapo,
    /// Nothing: the plain policy gradient. With one step a rollout the same as the others.
    Gradient,
}

/// How the losses of a minibatch's tokens become one, under TRL's names (`loss_type`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// The mean over all tokens, arXiv:2503.14476. (TRL's `bnpo` is the same over a micro-batch in place of a minibatch.)
    #[default]
    #[serde(alias = "bnpo")]
    Dapo,
    /// The mean over responses of each one's mean, arXiv:2402.03300.
    Grpo,
    /// The sum over all tokens, divided by the responses times `response_length`: no response weighs less for being long,
    /// arXiv:2503.20783.
    DrGrpo,
}

/// What a group's rewards are divided by once their mean is taken off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleRewards {
    /// The group's deviation.
    #[default]
    Group,
    /// The deviation over the rollout.
    Batch,
    /// Nothing, arXiv:2503.20783.
    None,
}

/// The order in which several rewards become a response's advantage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregation {
    /// The weighted sum of the rewards, normalised in its group.
    #[default]
    SumThenNormalize,
    /// Each reward normalised in its group, then their weighted sum, standardised over the rollout: a reward with a small spread
    /// counts as much as one with a large one. GDPO, arXiv:2601.05242.
    NormalizeThenSum,
}

/// Whose probability ratio the policy loss reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ImportanceSamplingLevel {
    /// Each token's.
    #[default]
    Token,
    /// The geometric mean over a response's tokens: GSPO, arXiv:2507.18071.
    Sequence,
    /// The product over a response's tokens, the probability ratio of the whole response: TRL's RLOO.
    Product,
}

/// What is done about a sampler whose log-probabilities are not the trainer's with the same weights, as in f16 on a card. But
/// for `none` the trainer's are computed after each rollout, which costs a forward pass; ratios are then to those, and a
/// token's policy loss is multiplied by the ratio of the two within bounds. The names are TRL's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceSamplingCorrection {
    /// Nothing: ratios are to the sampler's own log-probabilities.
    #[default]
    None,
    /// Each token's ratio, held within the bounds.
    TokenTruncate,
    /// Each token's ratio, and 0 beyond the bounds.
    TokenMask,
    /// The product over a response's tokens, held within the bounds.
    SequenceTruncate,
    /// The product over a response's tokens, and 0 beyond the bounds.
    SequenceMask,
}

/// The section that holds the settings of a run with rollouts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Origin {
    /// `[ppo]`, which has the keys of [`Ppo`] themselves.
    #[default]
    Ppo,
    /// `[grpo]`.
    Grpo,
    /// `[rloo]`.
    Rloo,
}

impl Origin {
    /// The stage that reads the section.
    pub fn stage(self) -> Stage {
        match self {
            Self::Ppo => Stage::Ppo,
            Self::Grpo => Stage::Grpo,
            Self::Rloo => Stage::Rloo,
        }
    }

    /// The section of this name; `[ppo]` for any other.
    pub fn of(name: &str) -> Self {
        [Self::Grpo, Self::Rloo].into_iter().find(|origin| origin.name() == name).unwrap_or_default()
    }

    /// The section's name.
    pub fn name(self) -> &'static str {
        self.stage().name()
    }

    /// A key of `[ppo]` as the section calls it, with the section: `[grpo] max_completion_length`.
    pub fn key(self, key: &str) -> String {
        format!("[{}] {}", self.name(), self.own(key))
    }

    /// The same as `--set` takes it: `grpo.max_completion_length`.
    pub fn path(self, key: &str) -> String {
        format!("{}.{}", self.name(), self.own(key))
    }

    fn own(self, key: &str) -> &str {
        match (self, key) {
            (Self::Ppo, _) => key,
            (_, "response_length") => "max_completion_length",
            (_, "kl_coef") => "beta",
            (_, "total_episodes") => "num_train_epochs or max_steps",
            (_, "cliprange") => "epsilon",
            (_, "cliprange_high") => "epsilon_high",
            (_, "dual_clip") => "delta",
            _ => key,
        }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn is_true(value: &bool) -> bool {
    *value
}

fn is_three(value: &f64) -> bool {
    *value == 3.0
}

fn is_one(value: &f64) -> bool {
    *value == 1.0
}

/// How the KL divergence from actor to reference is measured at a token, http://joschu.net/blog/kl-approx.html.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
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

/// The place where the KL penalty enters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KlIn {
    /// Subtracted from every token's reward.
    #[default]
    Reward,
    /// Added to the policy loss, as GRPO has it.
    Loss,
}

/// Scaling of the per-token rewards over a rollout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WhitenRewards {
    /// Unscaled.
    #[default]
    No,
    /// To variance 1 around the mean that they have. TRL's `whiten_rewards = True`.
    KeepMean,
    /// To mean 0 and variance 1.
    RemoveMean,
}

/// The critic's initial weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
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

optimised_section! {
    /// `[ppo]`: proximal policy optimisation of the actor's adapter against a reward model.
    pub struct Ppo;
    first {
        /// The section that these settings were made from.
        #[serde(skip)]
        pub origin: Origin = Origin::Ppo,
        /// Passes over the prompts that `total_episodes` stands for, once they are counted.
        #[serde(skip)]
        pub num_train_epochs: Option<usize> = None,
        /// The order in which several rewards are normalised and added; `[grpo]` alone has the key.
        #[serde(skip)]
        pub aggregation: Aggregation = Aggregation::SumThenNormalize,
        /// Whose behaviour to keep. `"dschat"`: DeepSpeed-Chat's padded rows: responses of one token or none are
        /// dropped, the score is read at the last token that is no pad and rewarded one action later, and no loss sees
        /// that action; and its values for the keys that the file leaves open, which the run's config.toml then shows.
        /// Absent = none.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub compat: Option<Compat> = None,
        /// The SFT adapter (folder, PEFT layout): the actor starts from it and the reference stays it. Absent = the
        /// bare base is the reference and the actor starts from a fresh adapter shaped by `[lora]`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub adapter: Option<PathBuf> = None,
        /// The reward adapter with its scalar head (folder, PEFT layout): the reward model, and where the critic
        /// starts. The folder of a run of `[reward] ensemble`, or a list, is the ensemble of all its members: the mean of
        /// their scores less their deviation, beside which `critic` has to be another. Required unless there is a
        /// `[[ppo.reward]]`; beside those it is one more, of weight 1.
        #[serde(skip_serializing_if = "Paths::is_blank")]
        pub reward_adapter: Paths = Paths::default(),
        /// `[[ppo.reward]]`: more sources of the reward, or others than an adapter. Default none.
        #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "super::reward_rules::write_all")]
        pub reward: Vec<RewardPart> = Vec::new(),
        /// `[ppo.gold]`: what the held-out responses are judged by besides, and the policy never trained on. Default
        /// none.
        #[serde(skip_serializing_if = "Option::is_none", serialize_with = "super::reward_rules::write_one")]
        pub gold: Option<RewardPart> = None,
        /// `[ppo.ptx]`: texts that the actor goes on learning from beside the reward. Default none.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub ptx: Option<Ptx> = None,
        /// `[ppo.rollout]`: what samples the responses. Default this process.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub rollout: Option<RolloutEngine> = None,
    }
    /// Peak learning rate of the actor. Default 3e-5: ten times TRL's 3e-6, since only low-rank factors are trained.
    learning_rate = 3e-5;
    after_rate {
        /// Peak learning rate of the critic; absent = `learning_rate`.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub critic_learning_rate: Option<f64> = None,
        /// Advantages. Default `gae`.
        pub advantage_estimator: AdvantageEstimator = AdvantageEstimator::Gae,
        /// What the critic starts as, where the estimator has one. Default `reward`.
        pub critic: CriticStart = CriticStart::Reward,
        /// First iterations in which only the critic trains. Default 0 (verl: `critic_warmup`).
        pub critic_warmup: usize = 0,
        /// Responses sampled in all, `total_episodes / batch_size` iterations. Default 256.
        pub total_episodes: usize = 256,
        /// Responses of one rollout. Default 8.
        pub batch_size: usize = 8,
        /// Responses per prompt: a rollout has `batch_size / num_generations` prompts. `rloo`, `grpo` and
        /// `reinforce_plus_plus_baseline` need two or more. Default 1 (TRL's GRPO: 8, its `rloo_k`: 2).
        pub num_generations: usize = 1,
        /// Optimizer steps a pass over a rollout is cut into. Default 1 (TRL and DeepSpeed-Chat).
        pub num_mini_batches: usize = 1,
        /// Passes over a rollout. Default 1 (DeepSpeed-Chat, which finds more unstable; TRL: 4).
        pub num_ppo_epochs: usize = 1,
        /// Sequences of one forward and backward pass: bounds the memory, changes no result. Default 4.
        pub micro_batch_size: usize = 4,
        /// Prompts whose responses are sampled at once, which bounds the KV cache. Each response is the same whatever
        /// else is sampled beside it. Absent = all of `batch_size` (TRL: 64).
        #[serde(skip_serializing_if = "Option::is_none")]
        pub local_rollout_forward_batch_size: Option<usize> = None,
        /// Most tokens of a sampled response. Default 64 (TRL: 53, DeepSpeed-Chat: 256).
        pub response_length: usize = 64,
        /// Divides the logits before sampling; the logprobs of training use it too. 0 = the likeliest token, whose
        /// logprobs are those of 1. Default 1.0 (TRL: 0.7; DeepSpeed-Chat: 0, and logprobs of 1 at any).
        pub temperature: f64 = 1.0,
        /// Samples from the k likeliest tokens only; 0 = from all. Default 0: a truncated sampling distribution is not
        /// the one the loss assumes and makes the measured KL negative.
        pub top_k: usize = 0,
        /// Samples from the smallest set of tokens with this much probability. Default 1.0 = all, as for `top_k`.
        pub top_p: f64 = 1.0,
        /// Weight of the KL penalty. Default 0.05 (TRL; DeepSpeed-Chat: 0.1), with `advantage_estimator = "grpo"` 0.04
        /// (arXiv:2402.03300; TRL's GRPO: 0).
        pub kl_coef: f64 = 0.05,
        /// Measure the KL to the reference even where nothing uses it. false, which needs `kl_coef = 0`: no reference is held,
        /// its log-probabilities are not computed, and the metrics have no KL. Default true (TRL's GRPO with `beta = 0`: false).
        #[serde(skip_serializing_if = "is_true")]
        pub measure_kl: bool = true,
        /// Adapt that weight to the KL that the rollouts have; `kl_coef` is then where it starts. Default false (TRL's
        /// first PPO trainer: true).
        pub adap_kl_ctrl: bool = false,
        /// The KL that the adaptive weight steers to, nats per response. Default 6 (TRL; arXiv:1909.08593).
        pub target: f64 = 6.0,
        /// Responses over which the adaptive weight changes by a fifth at most. Default 10000 (TRL; arXiv:1909.08593).
        pub horizon: f64 = 10_000.0,
        /// Measure of that KL. Default `k1`; with `advantage_estimator = "grpo"` and `kl_in = "loss"` `k3`.
        pub kl_estimator: KlEstimator = KlEstimator::K1,
        /// Where that KL acts. Default `reward`; with `advantage_estimator = "grpo"` `loss`.
        pub kl_in: KlIn = KlIn::Reward,
        /// What keeps the actor near the one that sampled. Default `clip`.
        pub policy_loss: PolicyLoss = PolicyLoss::Clip,
        /// How the losses of a minibatch's tokens become one. Default `dapo`, the mean over all tokens (TRL's GRPO, too).
        #[serde(skip_serializing_if = "is_default")]
        pub loss_type: LossType = LossType::Dapo,
        /// Whose probability ratio is clipped. Default `token`.
        #[serde(skip_serializing_if = "is_default")]
        pub importance_sampling_level: ImportanceSamplingLevel = ImportanceSamplingLevel::Token,
        /// With `advantage_estimator = "grpo"`: what a group's rewards are divided by. Default `group` (TRL).
        #[serde(skip_serializing_if = "is_default")]
        pub scale_rewards: ScaleRewards = ScaleRewards::Group,
        /// With `advantage_estimator = "rloo"`: divide the advantages by their deviation over the rollout's responses. Default
        /// false (TRL's RLOO).
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        pub normalize_advantages: bool = false,
        /// With `policy_loss = "sapo"`: the gate's temperature for a positive advantage. Default 1.0 (TRL, arXiv:2511.20347).
        #[serde(skip_serializing_if = "Option::is_none")]
        pub sapo_temperature_pos: Option<f64> = None,
        /// With `policy_loss = "sapo"`: the gate's temperature for any other advantage. Default 1.05 (TRL).
        #[serde(skip_serializing_if = "Option::is_none")]
        pub sapo_temperature_neg: Option<f64> = None,
        /// Leave responses that `response_length` cut off out of the policy loss; their rewards still count in the
        /// advantages. Default false. (TRL's GRPO; DAPO's overlong filtering.)
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        pub mask_truncated_completions: bool = false,
        /// The policy gradient is taken at this share of a minibatch's tokens, those with the highest entropy under the
        /// actor, which costs a forward pass more. Default 1.0 = all. (TRL's GRPO; arXiv:2506.01939: 0.2.)
        #[serde(skip_serializing_if = "is_one")]
        pub top_entropy_quantile: f64 = 1.0,
        /// Dynamic sampling, for estimators that compare a prompt's responses: groups whose scores are all equal are left
        /// out and other prompts are answered in their place, in at most this many more rollouts per iteration, each as
        /// large as what is missing. What is still missing then is filled with the first that were left out. Default 0 =
        /// none. (DAPO, arXiv:2503.14476; verl: `filter_groups`.)
        #[serde(skip_serializing_if = "is_default")]
        pub dynamic_sampling_rollouts: usize = 0,
        /// What is done where the sampler's log-probabilities are not the trainer's. Default `none` (TRL with vLLM:
        /// `sequence_mask`).
        #[serde(skip_serializing_if = "is_default")]
        pub importance_sampling_correction: ImportanceSamplingCorrection = ImportanceSamplingCorrection::None,
        /// Its upper bound. Default 3.0 (TRL).
        #[serde(skip_serializing_if = "is_three")]
        pub importance_sampling_clip_max: f64 = 3.0,
        /// Its lower bound; absent = none (TRL).
        #[serde(skip_serializing_if = "Option::is_none")]
        pub importance_sampling_clip_min: Option<f64> = None,
        /// With `kl_in = "loss"`: the KL's estimate is multiplied by the probability ratio, which makes it unbiased for the
        /// actor although the tokens were sampled by an older one. Default false (TRL; DeepSeek-V3.2, arXiv:2512.02556: true).
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        pub use_bias_correction_kl: bool = false,
        /// The probability ratio is clipped to `1 ± cliprange`. Default 0.2 (arXiv:1707.06347).
        pub cliprange: f64 = 0.2,
        /// Its upper side, `1 + cliprange_high`; absent = `cliprange`. With `policy_loss = "cispo"` the cap on the ratio itself;
        /// absent = 5. (TRL: `epsilon_high`; DAPO, arXiv:2503.14476:
        /// 0.28.)
        #[serde(skip_serializing_if = "Option::is_none")]
        pub cliprange_high: Option<f64> = None,
        /// A token with a negative advantage counts no more than at this ratio, arXiv:1912.09729; absent = without
        /// bound. (TRL's GRPO: `delta`.)
        #[serde(skip_serializing_if = "Option::is_none")]
        pub dual_clip: Option<f64> = None,
        /// A minibatch whose mean ratio exceeds this is skipped and counted; absent = none is. (TRL's first PPO
        /// trainer: 10.)
        #[serde(skip_serializing_if = "Option::is_none")]
        pub ratio_threshold: Option<f64> = None,
        /// The logarithm of the ratio is held within ± this, nats, with no gradient beyond; absent = not. (A guard
        /// against overflow: verl holds it within 20.)
        #[serde(skip_serializing_if = "Option::is_none")]
        pub log_ratio_clamp: Option<f64> = None,
        /// With `policy_loss = "kl_penalty"`: the penalty's first weight. Default 1.0 (openai/baselines ppo1).
        pub kl_penalty_coef: f64 = 1.0,
        /// The KL from the policy that sampled a rollout to the actor after its last update on it, to which the penalty's
        /// weight steers, nats per token: above 1.5 times this it is doubled, below this / 1.5 halved. Default 0.01
        /// (arXiv:1707.06347).
        pub kl_penalty_target: f64 = 0.01,
        /// Stops the passes over a rollout at a minibatch whose `approxkl` exceeds 1.5 times this, nats per token;
        /// absent = never. (OpenAI's Spinning Up: 0.01.)
        #[serde(skip_serializing_if = "Option::is_none")]
        pub target_kl: Option<f64> = None,
        /// Weight of the entropy bonus, reward units per nat. Default 0 (arXiv:1707.06347 eq. 9 has 0.01 for games; TRL
        /// and DeepSpeed-Chat have none).
        pub entropy_coef: f64 = 0.0,
        /// A value moves no further than this from the rollout's value before it is clipped, reward units. Default 0.2
        /// (TRL and DeepSpeed-Chat, from openai/baselines ppo2).
        pub cliprange_value: f64 = 0.2,
        /// Weight of the value loss. Default 1.0: actor and critic have optimizers of their own (TRL, one optimizer:
        /// 0.1).
        pub vf_coef: f64 = 1.0,
        /// One optimizer for actor and critic: the gradient's norm is clipped over both, and `critic_learning_rate` is
        /// not used. Default false (TRL: true).
        pub shared_optimizer: bool = false,
        /// Discount of a later token's reward; without effect for estimators that compare a prompt's responses. Default 1.0 (TRL
        /// and DeepSpeed-Chat).
        pub gamma: f64 = 1.0,
        /// GAE's lambda, arXiv:1506.02438. Default 0.95 (TRL and DeepSpeed-Chat).
        pub lam: f64 = 0.95,
        /// A response that `response_length` or the context cut off is not over: the critic's value of its last state takes
        /// the place of its score, which judges an unfinished text. (Both would count the end twice, and the critic would
        /// learn to add them up without end.) Penalties remain. Default false: the response counts as over, and its score
        /// is its end's reward (TRL and DeepSpeed-Chat).
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        pub bootstrap_truncated: bool = false,
        /// Scaling of the per-token rewards over the rollout. Default `no`.
        pub whiten_rewards: WhitenRewards = WhitenRewards::No,
        /// Shift and scale the advantages to mean 0, variance 1 over the rollout. Default true (TRL; DeepSpeed-Chat:
        /// not), false for `rloo` and `grpo` (TRL). `reinforce_plus_plus` always does.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub whiten_advantages: Option<bool> = None,
        /// Divide scores by the deviation of all scores so far. Default false (TRL's first PPO trainer).
        pub use_score_scaling: bool = false,
        /// With `use_score_scaling`: subtract their mean, too. Default false (TRL's first PPO trainer).
        pub use_score_norm: bool = false,
        /// Scores are clipped to `±score_clip` before the KL penalty joins; 0 = not. Default 5.0 (DeepSpeed-Chat).
        pub score_clip: f64 = 5.0,
        /// Taken from the score of a response without end token, reward units; absent = nothing.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub missing_eos_penalty: Option<f64> = None,
        /// Responses with fewer tokens, end token included, are penalised by `short_response_penalty`. Default 0 =
        /// none.
        pub min_response_length: usize = 0,
        /// The penalty of such a response, reward units. Default 1.0.
        pub short_response_penalty: f64 = 1.0,
        /// Taken from the score for every response token, reward units. Default 0.
        pub length_penalty: f64 = 0.0,
        /// The last tokens of `response_length`, this many of them, cost linearly more, up to
        /// `overlong_penalty_factor`. Default 0 = none. (DAPO, arXiv:2503.14476 eq. 13: a fifth of the length.)
        pub overlong_buffer_len: usize = 0,
        /// The penalty of a response of the full `response_length`, reward units. Default 1.0 (DAPO).
        pub overlong_penalty_factor: f64 = 1.0,
    }
    after_norm {
        /// Keep a moving average of the actor, `average = ema_decay * average + (1 - ema_decay) * actor` after each
        /// step, saved beside it; absent = none. DeepSpeed-Chat's is 0.992.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub ema_decay: Option<f64> = None,
        /// Iterations after which the reference follows the actor, again and again; 0 = never. Default 0. (TRL:
        /// `ref_model_sync_steps`, in optimizer steps; arXiv:2404.09656.)
        pub ref_model_sync_iterations: usize = 0,
        /// The share of the actor in the new reference: 1 copies the actor, less mixes the factors. Default 1.0 (TRL:
        /// 0.6).
        pub ref_model_mixup_alpha: f64 = 1.0,
    }
    last {
        /// Held-out prompts answered and scored before and after training; 0 = none. Default 0.
        pub eval_prompts: usize = 0,
        /// Iterations between two evaluations on those prompts during training; 0 = none. Default 0.
        pub eval_every: usize = 0,
        /// Sample texts logged an iteration. Default 2.
        pub save_samples: usize = 2,
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

    /// Whether the actor makes one optimizer step per minibatch, which depends on its own gradients alone.
    pub fn steps_actor_by_its_gradients(&self) -> bool {
        let again = self.ptx.as_ref().is_some_and(|ptx| ptx.coef > 0.0 && ptx.separate_step);
        !self.shared_optimizer && !again
    }

    /// Whether advantages are shifted and scaled over the rollout.
    pub fn whiten_advantages(&self) -> bool {
        self.advantage_estimator.is_standardised()
            || self.whiten_advantages.unwrap_or(!self.advantage_estimator.has_groups())
    }

    /// The bound of a score, where there is one.
    pub fn score_clip(&self) -> Option<f64> {
        (self.score_clip > 0.0).then_some(self.score_clip)
    }

    /// These settings over `prompts` prompts: passes over them become `total_episodes`, in whole rollouts.
    pub fn over(&self, prompts: usize) -> Self {
        let mut settings = self.clone();
        if let Some(epochs) = settings.num_train_epochs.take() {
            let per_rollout = (self.batch_size / self.num_generations.max(1)).max(1);
            settings.total_episodes = (epochs * prompts / per_rollout).max(1) * self.batch_size;
        }
        settings
    }

    /// Rollouts of the whole run.
    pub fn iterations(&self) -> usize {
        self.total_episodes / self.batch_size.max(1)
    }
}
