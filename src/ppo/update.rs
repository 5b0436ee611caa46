//! One minibatch: the gradients of its micro-batches added up, and a step of each learner. Keeps the running sums that an
//! iteration's figures come from. Knows no loop. Read loss.rs for the formulas.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::experience::Experience;
use super::loss::{PolicyStats, PolicyTokens, ValueStats, ValueTokens, policy_loss, value_loss};
use super::train::Run;
use crate::model::adapter::Gradients;
use crate::model::base::Base;
use crate::model::roles::{Policy, Scorer};
use crate::train::learner::Learner;

/// Running sums over an iteration's minibatches.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Update {
    /// Minibatches that the actor stepped on.
    pub minibatches: usize,
    /// Sum of their losses.
    pub policy_loss: f64,
    /// Sum of the critic's.
    pub value_loss: f64,
    /// Sum of their mean entropies, nats a token.
    pub entropy: f64,
    /// Over all tokens.
    pub policy: PolicyStats,
    /// Over all tokens.
    pub value: ValueStats,
    /// Sum of gradient norms before clipping.
    pub actor_norm: f64,
    /// The critic's.
    pub critic_norm: f64,
    /// Mean ratio of the very first minibatch: 1 where rollout and training agree.
    pub first_ratio: Option<f64>,
    /// Rate of the last step.
    pub actor_lr: f64,
    /// The critic's.
    pub critic_lr: f64,
}

/// The tokens' numbers of some sequences, end to end.
fn pick<'e>(rows: &[usize], of: impl Fn(usize) -> &'e [f32]) -> Vec<f32> {
    rows.iter().flat_map(|&i| of(i).iter().copied()).collect()
}

impl Update {
    /// Steps the actor on the sequences `minibatch`.
    ///
    /// # Errors
    /// If a number is not finite.
    pub fn actor(
        &mut self,
        base: &Base,
        actor: &mut Learner,
        experience: &Experience,
        minibatch: &[usize],
        run: &Run<'_>,
        lr: f64,
    ) -> Result<()> {
        let tokens = experience.tokens_of(minibatch);
        let mut grads = Gradients::none(base.shapes().layers);
        let mut first = PolicyStats::default();
        for rows in minibatch.chunks(run.config.micro_batch_size) {
            let (batch, targets) = experience.rollout.batch(rows)?;
            let old = pick(rows, |i| &experience.rollout.responses[i].logprobs);
            let advantages = pick(rows, |i| &experience.advantages[i]);
            let policy = Policy::new(base, Some(actor.weights().view()));
            let (_, g) = policy.gradients(&batch, &targets, run.temperature(), run.checkpoint, |stats| {
                let tokens_of_loss =
                    PolicyTokens { logprobs: &stats.logprobs, old_logprobs: &old, advantages: &advantages };
                let loss = policy_loss(tokens_of_loss, run.config.cliprange, tokens as f64)?;
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
        self.actor_lr = lr;
        self.minibatches += 1;
        Ok(())
    }

    /// Steps the critic on the sequences `minibatch`.
    ///
    /// # Errors
    /// If a number is not finite.
    pub fn critic(
        &mut self,
        base: &Base,
        critic: &mut Learner,
        experience: &Experience,
        minibatch: &[usize],
        run: &Run<'_>,
        lr: f64,
    ) -> Result<()> {
        let tokens = experience.tokens_of(minibatch);
        let mut grads = Gradients::none(base.shapes().layers);
        for rows in minibatch.chunks(run.config.micro_batch_size) {
            let (batch, targets) = experience.rollout.batch(rows)?;
            let old = pick(rows, |i| &experience.rollout.values[i]);
            let returns = pick(rows, |i| &experience.returns[i]);
            let scorer = Scorer::new(base, critic.weights().view())?;
            let (_, g) = scorer.gradients(&batch, &targets.rows, run.checkpoint, |values| {
                let tokens_of_loss = ValueTokens { values, old_values: &old, returns: &returns };
                let loss = value_loss(tokens_of_loss, run.config.cliprange_value, tokens as f64)?;
                self.value_loss += loss.loss;
                self.value.merge(&loss.stats);
                Ok(loss.grad.into_iter().map(|g| g * run.config.vf_coef as f32).collect())
            })?;
            grads.add(g)?;
        }
        self.critic_norm += critic.step(grads, lr)?;
        self.critic_lr = lr;
        Ok(())
    }
}
