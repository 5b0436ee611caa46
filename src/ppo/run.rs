//! The inputs of a PPO run and their checks: models, data, settings and seed, none of which changes during training.
//! Everything that changes is in [`State`](super::state::State). It does not depend on the training loop, on files or on
//! the planner. Read `train.rs` next.

use anyhow::Result;

use super::evaluate::Evaluation;
use super::sampler::Sampler;
use crate::config::{CriticStart, Ppo, Ptx};
use crate::data::examples::Examples;
use crate::data::examples::objectives::SftExample;
use crate::invalid;
use crate::model::adapter::Adapter;
use crate::model::base::Base;
use crate::model::block::Recompute;
use crate::model::readers::Sharing;
use crate::model::roles::ValueModel;
use crate::reward::source::RewardSource;
use crate::train::world::World;

/// The inputs of a PPO run. `reward_base` may be the same object as `base`: the four roles then share one frozen base.
#[derive(Clone, Copy)]
pub struct PpoRun<'w> {
    /// Base of actor and reference.
    pub base: &'w Base,
    /// Base of critic and reward model.
    pub reward_base: &'w Base,
    /// SFT adapter: the actor is initialised from it, and it is the reference.
    pub sft: &'w Adapter,
    /// Reward adapter with its head, if there is one. It stays frozen; the critic is initialised from a copy of it.
    pub reward: Option<&'w Adapter>,
    /// Prompts as token ids.
    pub prompts: &'w dyn Examples<Vec<u32>>,
    /// Tokens that end a response.
    pub stop: &'w [u32],
    /// Reward source that scores the responses.
    pub source: &'w dyn RewardSource,
    /// Decodes token ids, for samples.jsonl and for reward sources that read text.
    pub decode: &'w dyn Fn(&[u32]) -> String,
    /// Evaluation that runs every `eval_every` iterations, if there is one.
    pub evaluation: Option<&'w Evaluation<'w>>,
    /// Text blocks of the pretraining mixture, if `[ppo.ptx]` is set.
    pub ptx: Option<&'w dyn Examples<SftExample>>,
    /// Pad token, if `compat` asks for DeepSpeed-Chat's rows. It must be one of `stop`.
    pub pad: Option<u32>,
    /// What samples the responses, if this process does not.
    pub sampler: Option<&'w dyn Sampler>,
    /// Settings of `[ppo]`.
    pub config: &'w Ppo,
    /// Seed of every random choice.
    pub seed: u64,
    /// Activations that blocks recompute in the backward pass. The caller has resolved `checkpoint = "auto"`.
    pub recompute: Recompute,
    /// What the roles that score a rollout have in common where they read one base on a device. The caller knows by a plan what
    /// memory allows.
    pub sharing: Sharing,
    /// The ranks that share the work. All hold the same state: each samples, scores and computes gradients of its share of the
    /// sequences, and what it finds goes to all.
    pub world: &'w World,
}

impl<'w> PpoRun<'w> {
    /// Checks the inputs before anything is allocated or trained.
    ///
    /// # Errors
    /// Those of [`check`]; if there is a pad token without `compat`, or the other way round.
    pub fn check(&self) -> Result<()> {
        check(self.base, self.reward_base, self.reward, self.prompts, self.config)?;
        anyhow::ensure!(
            self.pad.is_some() == self.config.compat.is_some(),
            "a PPO run has a pad token if and only if [ppo] has compat"
        );
        Ok(())
    }

    /// Settings and text blocks of the pretraining mixture, if it has a positive weight.
    pub(super) fn ptx_mixture(&self) -> Option<(&'w Ptx, &'w dyn Examples<SftExample>)> {
        self.config.ptx.as_ref().filter(|ptx| ptx.coef > 0.0).zip(self.ptx)
    }

    /// Base of the critic.
    pub fn critic_base(&self) -> &'w Base {
        match self.config.critic {
            CriticStart::Actor => self.base,
            CriticStart::Reward | CriticStart::Own => self.reward_base,
        }
    }

    /// Divisor of the logits before log-probabilities are taken. It is 1 for greedy decoding, as in `generate`, and always
    /// 1 under DeepSpeed-Chat's rules.
    pub fn temperature(&self) -> f64 {
        if self.config.temperature > 0.0 && self.pad.is_none() { self.config.temperature } else { 1.0 }
    }

    /// Sequences per optimizer step.
    pub fn minibatch_size(&self) -> usize {
        self.config.batch_size.div_ceil(self.config.num_mini_batches)
    }
}

/// Largest number of tokens in one micro-batch: the size by which `checkpoint = "auto"` is resolved.
pub fn micro_batch_tokens(prompts: &dyn Examples<Vec<u32>>, config: &Ppo) -> usize {
    (prompts.longest_sequence() + config.response_length) * config.micro_batch_size
}

/// Checks models, prompts and settings without training, for callers that have no reward source yet.
///
/// # Errors
/// If there is no prompt, the rollout is larger than the run, the bases' vocabularies differ, the critic has nothing to
/// be initialised from, or a response would exceed the context.
pub fn check(
    base: &Base,
    reward_base: &Base,
    reward: Option<&Adapter>,
    prompts: &dyn Examples<Vec<u32>>,
    config: &Ppo,
) -> Result<()> {
    if prompts.is_empty() {
        return Err(invalid!("[{}] there is no prompt to answer", config.origin.name()));
    }
    if config.total_episodes < config.batch_size {
        return Err(invalid!(
            "{} = {} is less than one rollout of batch_size = {}",
            config.origin.key("total_episodes"),
            config.total_episodes,
            config.batch_size
        ));
    }
    let (policy, scorer) = (base.config().vocab_size, reward_base.config().vocab_size);
    if policy != scorer {
        return Err(invalid!(
            "[reward_base] has a vocabulary of {scorer} and [base] one of {policy}: the reward model must share the \
             policy's tokenizer"
        ));
    }
    config.check_critic(reward.is_some())?;
    reward.map_or(Ok(()), |reward| ValueModel::new(reward_base, reward).map(drop))?;
    let context = base.config().max_position_embeddings.min(reward_base.config().max_position_embeddings);
    let longest = prompts.longest_sequence();
    if longest + config.response_length > context {
        return Err(invalid!(
            "{response} = {} and a prompt of {longest} tokens do not fit the context of {context}; lower {response} or [data] \
             max_prompt_length",
            config.response_length,
            response = config.origin.key("response_length"),
        ));
    }
    Ok(())
}
