//! The PPO loop, in numbered steps: four roles over at most two frozen bases, two learners. Knows no file; `run::ppo`
//! reads them. Read rollout.rs, then rewards.rs, gae.rs and loss.rs.

use anyhow::Result;
use serde_json::json;

use super::gae::gae;
use super::kl;
use super::loss::{PolicyStats, PolicyTokens, ValueStats, ValueTokens, policy_loss, value_loss};
use super::rewards::{Ending, Shaping, scale_to_unit_variance, shape, whiten};
use super::rollout::{Readers, Rollout, collect};
use crate::config::{KlEstimator, Ppo};
use crate::invalid;
use crate::model::adapter::{Adapter, Gradients, HeadBias};
use crate::model::base::Base;
use crate::model::block::Checkpointing;
use crate::model::generate::{Finish, Sampling};
use crate::model::roles::{Policy, Scorer};
use crate::report::{Figures, Report, number};
use crate::rng::{SplitMix64, derive};
use crate::train::learner::Learner;
use crate::train::settings;

/// What PPO starts from. `reward_base` may be the very same base as `base`.
#[derive(Clone, Copy)]
pub struct Start<'w> {
    /// Base of actor and reference.
    pub base: &'w Base,
    /// Base of critic and reward model.
    pub reward_base: &'w Base,
    /// The SFT adapter: the actor starts as it, the reference stays it.
    pub sft: &'w Adapter,
    /// The reward adapter with its head: frozen; the critic starts as it, in a branch of its own.
    pub reward: &'w Adapter,
}

/// The trained branches.
#[derive(Clone, Debug)]
pub struct Trained {
    /// The aligned policy.
    pub actor: Adapter,
    /// The value function.
    pub critic: Adapter,
    /// The last iteration's figures.
    pub last: Figures,
}

/// Everything derived from a rollout that the update reads. Per-token vectors, one a sequence.
struct Experience {
    rollout: Rollout,
    kl: Vec<Vec<f32>>,
    advantages: Vec<Vec<f32>>,
    returns: Vec<Vec<f32>>,
}

/// Trains actor and critic. `decode` renders token ids for samples.jsonl; `stop` are the tokens that end a response.
///
/// # Errors
/// If there is no prompt, the two bases' vocabularies differ, a response runs past the context, or a number stops being
/// finite.
pub fn train(
    start: Start<'_>,
    prompts: &[Vec<u32>],
    stop: &[u32],
    config: &Ppo,
    seed: u64,
    decode: &dyn Fn(&[u32]) -> String,
    report: &mut Report,
) -> Result<Trained> {
    check(start, prompts, config)?;
    let adamw = settings::adamw_of_ppo(config);
    let mut actor = Learner::new(start.sft.to_trainable(), adamw, config.max_grad_norm)?;
    let critic = start.reward.to_trainable().with_head_bias(HeadBias::Trained)?;
    let mut critic = Learner::new(critic, adamw, config.max_grad_norm)?;
    let iterations = config.iterations();
    let steps = iterations * config.num_ppo_epochs * config.num_mini_batches;
    let actor_schedule = settings::schedule(config.learning_rate, config.warmup_steps, config.lr_scheduler_type);
    let critic_schedule =
        settings::schedule(config.critic_learning_rate(), config.warmup_steps, config.lr_scheduler_type);
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0) + config.response_length;
    let checkpoint = settings::checkpoint(config.checkpoint, start.base, longest * config.micro_batch_size);
    let sampling = sampling(config, stop);
    report.stage("ppo", iterations);
    let mut last = Figures::new();
    let mut step = 0;
    for iteration in 0..iterations {
        // 1. The actor answers; reference, critic and reward model read. The views end with the block.
        let rollout = {
            let readers = Readers {
                reference: Policy::new(start.base, Some(start.sft)),
                critic: Scorer::new(start.reward_base, critic.weights().view())?,
                reward: Scorer::new(start.reward_base, start.reward)?,
            };
            let chosen = choose(prompts, iteration * config.batch_size, config.batch_size, seed);
            let seeds: Vec<u64> = (0..config.batch_size as u64)
                .map(|i| derive(seed, &[settings::ROLLOUT, iteration as u64, i]))
                .collect();
            collect(Policy::new(start.base, Some(actor.weights().view())), readers, chosen, &seeds, &sampling)?
        };
        // 2. Per-token KL, shaped rewards, advantages and returns.
        let experience = judge(rollout, config)?;
        // 3. Updates: actor and critic step apart, minibatch by minibatch.
        let mut update = Update::default();
        let (mut actor_lr, mut critic_lr) = (0.0, 0.0);
        for epoch in 0..config.num_ppo_epochs {
            let path = [settings::MINIBATCH_ORDER, iteration as u64, epoch as u64];
            let order = SplitMix64::new(derive(seed, &path)).permutation(config.batch_size);
            for minibatch in order.chunks(config.batch_size.div_ceil(config.num_mini_batches)) {
                (actor_lr, critic_lr) = (actor_schedule.lr_at(step, steps), critic_schedule.lr_at(step, steps));
                update.actor(start.base, &mut actor, &experience, minibatch, config, checkpoint, actor_lr)?;
                update.critic(start.reward_base, &mut critic, &experience, minibatch, config, checkpoint, critic_lr)?;
                step += 1;
            }
        }
        // 4. Figures, under the names that TRL's users know.
        last = figures(&experience, &update, config, (iteration + 1) * config.batch_size);
        last.insert("lr".into(), number(actor_lr));
        last.insert("critic_lr".into(), number(critic_lr));
        let shown = ["objective/scores", "objective/kl", "policy/clipfrac_avg", "loss/value_avg"];
        report.step(iteration + 1, &last, &shown)?;
        for i in 0..config.save_samples.min(config.batch_size) {
            let r = &experience.rollout;
            report.sample(&json!({
                "iteration": iteration + 1,
                "prompt": decode(&r.prompts[i]),
                "response": decode(&r.responses[i].tokens),
                "score": number(f64::from(r.scores[i])),
                "kl": number(sum(&experience.kl[i])),
                "finish_reason": r.responses[i].finish.name(),
            }))?;
        }
    }
    report.done();
    Ok(Trained { actor: actor.weights().snapshot(), critic: critic.weights().snapshot(), last })
}

/// How the actor is sampled, in rollouts and evaluations alike.
pub fn sampling(config: &Ppo, stop: &[u32]) -> Sampling {
    Sampling {
        temperature: config.temperature,
        top_k: config.top_k,
        top_p: config.top_p,
        max_new_tokens: config.response_length,
        stop: stop.to_vec(),
    }
}

/// What [`train`] refuses, without training: for callers that must know before they make anything.
///
/// # Errors
/// If there is no prompt, the two bases' vocabularies differ, or a response would run past the context.
pub fn check(start: Start<'_>, prompts: &[Vec<u32>], config: &Ppo) -> Result<()> {
    if prompts.is_empty() {
        return Err(invalid!("[ppo] there is no prompt to answer"));
    }
    if config.total_episodes < config.batch_size {
        return Err(invalid!(
            "[ppo] total_episodes = {} is less than one rollout of batch_size = {}",
            config.total_episodes,
            config.batch_size
        ));
    }
    let (policy, scorer) = (start.base.config().vocab_size, start.reward_base.config().vocab_size);
    if policy != scorer {
        return Err(invalid!(
            "[reward_base] has a vocabulary of {scorer} and [base] one of {policy}: the reward model must share the \
             policy's tokenizer"
        ));
    }
    Scorer::new(start.reward_base, start.reward)?;
    let context = start.base.config().max_position_embeddings.min(start.reward_base.config().max_position_embeddings);
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    if longest + config.response_length > context {
        return Err(invalid!(
            "[ppo] a prompt of {longest} tokens and response_length = {} do not fit the context of {context}; lower \
             response_length or [data] max_prompt_length",
            config.response_length
        ));
    }
    Ok(())
}

/// Prompts `from..from + count` of an endless sequence of shuffled passes.
fn choose(prompts: &[Vec<u32>], from: usize, count: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut chosen = Vec::with_capacity(count);
    let mut pass = usize::MAX;
    let mut order = vec![];
    for at in from..from + count {
        if at / prompts.len() != pass {
            pass = at / prompts.len();
            order = SplitMix64::new(derive(seed, &[settings::PROMPT_ORDER, pass as u64])).permutation(prompts.len());
        }
        chosen.push(prompts[order[at % prompts.len()]].clone());
    }
    chosen
}

fn judge(rollout: Rollout, config: &Ppo) -> Result<Experience> {
    let estimator = match config.kl_estimator {
        KlEstimator::K1 => kl::Estimator::K1,
        KlEstimator::K3 => kl::Estimator::K3,
    };
    let shaping = Shaping {
        kl_coef: config.kl_coef,
        score_clip: config.score_clip().unwrap_or(f64::INFINITY),
        missing_eos_penalty: config.missing_eos_penalty.unwrap_or(0.0),
    };
    let (mut kls, mut rewards) = (vec![], vec![]);
    for (i, response) in rollout.responses.iter().enumerate() {
        let kl = kl::per_token(estimator, &response.logprobs, &rollout.reference_logprobs[i])?;
        let ending = if response.finish == Finish::Stop { Ending::Eos } else { Ending::CutOff };
        rewards.push(shape(&kl, f64::from(rollout.scores[i]), ending, &shaping)?);
        kls.push(kl);
    }
    if config.whiten_rewards {
        over_all(&mut rewards, scale_to_unit_variance);
    }
    let (mut advantages, mut returns) = (vec![], vec![]);
    for (rewards, values) in rewards.iter().zip(&rollout.values) {
        let estimate = gae(rewards, values, config.gamma, config.lam)?;
        advantages.push(estimate.advantages);
        returns.push(estimate.returns);
    }
    if config.whiten_advantages {
        over_all(&mut advantages, whiten);
    }
    Ok(Experience { rollout, kl: kls, advantages, returns })
}

/// Applies `f` to all sequences' tokens as one slice.
fn over_all(rows: &mut [Vec<f32>], f: impl FnOnce(&mut [f32])) {
    let mut flat = rows.concat();
    f(&mut flat);
    let mut at = 0;
    for row in rows {
        let next = at + row.len();
        row.copy_from_slice(&flat[at..next]);
        at = next;
    }
}

/// Running sums of an iteration's updates.
#[derive(Default)]
struct Update {
    minibatches: usize,
    policy_loss: f64,
    value_loss: f64,
    entropy: f64,
    policy: PolicyStats,
    value: ValueStats,
    actor_norm: f64,
    critic_norm: f64,
    /// Of the very first minibatch: 1 where rollout and training agree.
    first_ratio: Option<f64>,
}

/// The tokens' numbers of some sequences, end to end.
fn pick<'e>(rows: &[usize], of: impl Fn(usize) -> &'e [f32]) -> Vec<f32> {
    rows.iter().flat_map(|&i| of(i).iter().copied()).collect()
}

impl Update {
    #[allow(clippy::too_many_arguments)]
    fn actor(
        &mut self,
        base: &Base,
        actor: &mut Learner,
        experience: &Experience,
        minibatch: &[usize],
        config: &Ppo,
        checkpoint: Checkpointing,
        lr: f64,
    ) -> Result<()> {
        let tokens = tokens_of(experience, minibatch);
        let mut grads = Gradients::none(base.shapes().layers);
        let mut first = PolicyStats::default();
        for rows in minibatch.chunks(config.micro_batch_size) {
            let (batch, targets) = experience.rollout.batch(rows)?;
            let old = pick(rows, |i| &experience.rollout.responses[i].logprobs);
            let advantages = pick(rows, |i| &experience.advantages[i]);
            let policy = Policy::new(base, Some(actor.weights().view()));
            let temperature = if config.temperature > 0.0 { config.temperature } else { 1.0 };
            let (_, g) = policy.gradients(&batch, &targets, temperature, checkpoint, |stats| {
                let tokens_of_loss =
                    PolicyTokens { logprobs: &stats.logprobs, old_logprobs: &old, advantages: &advantages };
                let loss = policy_loss(tokens_of_loss, config.cliprange, tokens as f64)?;
                self.policy_loss += loss.loss;
                self.entropy += stats.entropy.iter().map(|&e| f64::from(e)).sum::<f64>() / tokens as f64;
                self.policy.merge(&loss.stats);
                first.merge(&loss.stats);
                let none = vec![0.0; loss.grad.len()];
                Ok((loss.grad, none))
            })?;
            grads.add(g)?;
        }
        self.first_ratio.get_or_insert(first.mean_ratio());
        self.actor_norm += actor.step(grads, lr)?;
        self.minibatches += 1;
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn critic(
        &mut self,
        base: &Base,
        critic: &mut Learner,
        experience: &Experience,
        minibatch: &[usize],
        config: &Ppo,
        checkpoint: Checkpointing,
        lr: f64,
    ) -> Result<()> {
        let tokens = tokens_of(experience, minibatch);
        let mut grads = Gradients::none(base.shapes().layers);
        for rows in minibatch.chunks(config.micro_batch_size) {
            let (batch, targets) = experience.rollout.batch(rows)?;
            let old = pick(rows, |i| &experience.rollout.values[i]);
            let returns = pick(rows, |i| &experience.returns[i]);
            let scorer = Scorer::new(base, critic.weights().view())?;
            let (_, g) = scorer.gradients(&batch, &targets.rows, checkpoint, |values| {
                let tokens_of_loss = ValueTokens { values, old_values: &old, returns: &returns };
                let loss = value_loss(tokens_of_loss, config.cliprange_value, tokens as f64)?;
                self.value_loss += loss.loss;
                self.value.merge(&loss.stats);
                Ok(loss.grad.into_iter().map(|g| g * config.vf_coef as f32).collect())
            })?;
            grads.add(g)?;
        }
        self.critic_norm += critic.step(grads, lr)?;
        Ok(())
    }
}

fn tokens_of(experience: &Experience, rows: &[usize]) -> usize {
    rows.iter().map(|&i| experience.rollout.responses[i].tokens.len()).sum()
}

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v)).sum()
}

fn figures(experience: &Experience, update: &Update, config: &Ppo, episode: usize) -> Figures {
    let rollout = &experience.rollout;
    let n = rollout.prompts.len() as f64;
    let mean = |x: f64| x / n;
    let kl = mean(experience.kl.iter().map(|k| sum(k)).sum());
    let scores = mean(sum(&rollout.scores));
    let minibatches = update.minibatches.max(1) as f64;
    let mut f = Figures::new();
    let mut put = |name: &str, x: f64| f.insert(name.into(), number(x));
    put("objective/kl", kl);
    put("objective/entropy", mean(rollout.responses.iter().map(|r| -sum(&r.logprobs)).sum()));
    put("objective/non_score_reward", -config.kl_coef * kl);
    put("objective/rlhf_reward", scores - config.kl_coef * kl);
    put("objective/scores", scores);
    put("policy/approxkl_avg", update.policy.approx_kl());
    put("policy/clipfrac_avg", update.policy.clipfrac());
    put("policy/entropy_avg", update.entropy / minibatches);
    put("loss/policy_avg", update.policy_loss / minibatches);
    put("loss/value_avg", update.value_loss / minibatches);
    put("val/clipfrac_avg", update.value.clipfrac());
    put("val/ratio", update.policy.mean_ratio());
    put("val/ratio_var", update.policy.ratio_variance());
    put("val/first_ratio", update.first_ratio.unwrap_or(f64::NAN));
    put("val/explained_variance", update.value.explained_variance().unwrap_or(f64::NAN));
    put("grad_norm/actor", update.actor_norm / minibatches);
    put("grad_norm/critic", update.critic_norm / minibatches);
    put("response_length", mean(rollout.response_tokens() as f64));
    f.insert("val/num_eos_tokens".into(), rollout.stopped().into());
    f.insert("episode".into(), episode.into());
    f
}

#[cfg(test)]
mod tests;
