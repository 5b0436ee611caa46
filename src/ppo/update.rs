//! One minibatch: the gradients of its micro-batches added up, then a step of each learner. Keeps the running sums that an
//! iteration's figures come from. Knows no loop. Read loss.rs for the formulas.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::experience::{Experience, estimator};
use super::loss::{Objective, PolicyStats, PolicyTokens, Surrogate, ValueStats, ValueTokens, policy_loss, value_loss};
use super::ptx;
use super::train::Run;
use crate::config::{KlIn, PolicyLoss, Ptx};
use crate::data::examples::Examples;
use crate::data::examples::batch_sampler::endless;
use crate::data::examples::objectives::SftExample;
use crate::host::meter::{Phase, within};
use crate::model::adapter::{Adapter, Gradients};
use crate::model::roles::{HeadGradients, Policy, ValueModel};
use crate::ops::cpu;
use crate::ops::logprobs::TokenStats;
use crate::train::learner::Learner;
use crate::train::snapshot::Snapshot;
use crate::train::{settings, stop};

/// Running sums over an iteration's minibatches.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Update {
    /// Minibatches whose policy loss was taken.
    pub minibatches: usize,
    /// Of those, the ones without a step, for their ratio.
    pub skipped: usize,
    /// Minibatches whose value loss was taken.
    pub critic_minibatches: usize,
    /// Sum of policy losses.
    pub policy_loss: f64,
    /// Sum of value losses.
    pub value_loss: f64,
    /// Sum of losses of the mixture with pretraining.
    pub ptx_loss: f64,
    /// Sum of mean entropies, nats a token.
    pub entropy: f64,
    /// Exact KL from actor to reference in the first pass, nats, summed over tokens.
    pub exact_kl: f64,
    /// Answers that it was summed over.
    pub exact_answers: usize,
    /// Over all tokens.
    pub policy: PolicyStats,
    /// Of the last minibatch alone.
    pub last_policy: PolicyStats,
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

/// Who is to learn, and from whom the actor is kept.
pub struct Learners<'s> {
    /// None in the critic's warm-up.
    pub actor: Option<&'s mut Learner>,
    /// None where advantages need no critic.
    pub critic: Option<&'s mut Learner>,
    /// The frozen policy that the rollout's `reference_rows` are of.
    pub reference: &'s Adapter,
}

/// What a minibatch is done with.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Rate of the actor.
    pub actor_lr: f64,
    /// Rate of the critic.
    pub critic_lr: f64,
    /// Weight of the KL to the reference.
    pub kl_coef: f64,
    /// Weight of the KL to the actor that sampled.
    pub kl_penalty: f64,
    /// Is this the first pass over the rollout?
    pub first_pass: bool,
    /// Steps of the actor before: which blocks of text are next.
    pub number: usize,
}

/// The tokens' numbers of some sequences, end to end.
fn pick<'e>(rows: &[usize], of: impl Fn(usize) -> &'e [f32]) -> Vec<f32> {
    rows.iter().flat_map(|&i| of(i).iter().copied()).collect()
}

impl Update {
    /// Learns from the sequences `minibatch`. Returns whether anything was stepped; `None` where the process was asked to
    /// stop, and no learner has changed.
    ///
    /// # Errors
    /// If a number is not finite.
    pub fn minibatch<'l>(
        &mut self,
        learners: Learners<'l>,
        experience: &Experience,
        minibatch: &[usize],
        run: &Run<'_>,
        step: &Step,
    ) -> Result<Option<bool>> {
        let Learners { actor, critic, reference } = learners;
        let update = within(Phase::Update);
        // 1. The actor's gradient, and whether it can be trusted.
        let actor = match actor {
            Some(learner) => match self.actor(learner, reference, experience, minibatch, run, step)? {
                Some(gradients) => Some((gradients, learner)),
                None => return Ok(None),
            },
            None => None,
        };
        let limit = run.config.ratio_threshold.unwrap_or(f64::INFINITY);
        if actor.is_some() && self.last_policy.mean_ratio() > limit {
            self.skipped += 1;
            return Ok(Some(false));
        }
        // 2. The critic's.
        let critic = match critic {
            Some(learner) => match self.critic(learner, experience, minibatch, run)? {
                Some(gradients) => Some((gradients, learner)),
                None => return Ok(None),
            },
            None => None,
        };
        // 3. The steps, apart or together.
        drop(update);
        let _step = within(Phase::Step);
        (self.actor_lr, self.critic_lr) = (step.actor_lr, step.critic_lr);
        match (actor, critic) {
            (Some((a, actor)), Some((c, critic))) if run.config.shared_optimizer => {
                self.critic_lr = step.actor_lr;
                let [actor_norm, critic_norm] = Learner::step_both([actor, critic], [a, c], step.actor_lr)?;
                self.actor_norm += actor_norm;
                self.critic_norm += critic_norm;
            }
            (actor, critic) => {
                // Both gradients are looked at before either is stepped by.
                let checked = |both: Option<(Gradients, &'l mut Learner)>| -> Result<Option<_>> {
                    both.map(|(gradients, learner)| Ok((learner.checked(gradients)?, learner))).transpose()
                };
                let (actor, critic) = (checked(actor)?, checked(critic)?);
                if let Some((gradients, learner)) = actor {
                    let mixture = run.mixture().filter(|(config, _)| config.separate_step);
                    let before = mixture.map(|_| snapshot(learner)).transpose()?;
                    self.actor_norm += learner.step_by(gradients, step.actor_lr)?;
                    if let Some(((config, blocks), before)) = mixture.zip(before) {
                        let gradients = self.ptx(learner, config, blocks, minibatch.len(), run, step);
                        if let Err(error) = gradients.and_then(|g| learner.step(g, step.actor_lr)) {
                            before.restore_learner(ACTOR, learner)?;
                            return Err(error);
                        }
                    }
                }
                if let Some((gradients, learner)) = critic {
                    self.critic_norm += learner.step_by(gradients, step.critic_lr)?;
                }
            }
        }
        Ok(Some(true))
    }

    fn actor(
        &mut self,
        actor: &Learner,
        frozen: &Adapter,
        experience: &Experience,
        minibatch: &[usize],
        run: &Run<'_>,
        step: &Step,
    ) -> Result<Option<Gradients>> {
        let (base, config, rollout) = (run.task.start.base, run.config, &experience.rollout);
        let tokens = experience.tokens_of(minibatch) as f64;
        let objective = objective(run, step);
        // The exact KL is taken where it is trained on, and in the first pass for the figures.
        let exact_weight =
            (config.kl_in == KlIn::Loss && estimator(config.kl_estimator).is_none()).then_some(step.kl_coef);
        let wants_exact = step.first_pass || exact_weight.is_some();
        let mut grads = Gradients::none(base.shapes().layers);
        let mut seen = PolicyStats::default();
        for rows in minibatch.chunks(config.micro_batch_size) {
            if stop::requested() {
                return Ok(None);
            }
            let (batch, targets) = rollout.batch(rows)?;
            let old = pick(rows, |i| &rollout.responses[i].logprobs);
            let advantages = pick(rows, |i| &experience.advantages[i]);
            let reference = pick(rows, |i| &rollout.reference_logprobs[i]);
            let other = match wants_exact {
                true => {
                    let hidden = pick(rows, |i| &rollout.reference_rows[i]);
                    let n = targets.rows.len();
                    let d = hidden.len().checked_div(n).context("answers without tokens")?;
                    Some(cpu::tensor(hidden, (n, d))?)
                }
                false => None,
            };
            let policy = Policy::new(base, Some(actor.weights().view()));
            let loss = |stats: &TokenStats, exact: &[f32]| {
                let given = PolicyTokens {
                    logprobs: &stats.logprobs,
                    old_logprobs: &old,
                    advantages: &advantages,
                    reference: &reference,
                };
                let loss = policy_loss(given, &objective, tokens)?;
                let entropy = sum(&stats.entropy) / tokens;
                let exact_loss = exact_weight.map_or(0.0, |weight| weight * sum(exact) / tokens);
                self.policy_loss += loss.loss + exact_loss - config.entropy_coef * entropy;
                self.entropy += entropy;
                if step.first_pass {
                    self.exact_kl += sum(exact);
                    self.exact_answers += rows.len();
                }
                seen.merge(&loss.stats);
                let each = |weight: f64| vec![(weight / tokens) as f32; loss.grad.len()];
                let (entropy, kl) = (each(-config.entropy_coef), exact_weight.map(each));
                Ok(HeadGradients { logprobs: loss.grad, entropy, kl })
            };
            let other = other.as_ref().map(|rows| (Policy::new(base, Some(frozen)), rows));
            let (_, g) = policy.gradients_against(&batch, &targets, other, run.temperature(), run.checkpoint, loss)?;
            grads.add(g)?;
        }
        if let Some((config, blocks)) = run.mixture().filter(|(config, _)| !config.separate_step) {
            grads.add(self.ptx(actor, config, blocks, minibatch.len(), run, step)?)?;
        }
        self.first_ratio.get_or_insert(seen.mean_ratio());
        self.policy.merge(&seen);
        self.last_policy = seen;
        self.minibatches += 1;
        Ok(Some(grads))
    }

    /// The gradient of the next `count` blocks of text.
    fn ptx(
        &mut self,
        actor: &Learner,
        config: &Ptx,
        blocks: &dyn Examples<SftExample>,
        count: usize,
        run: &Run<'_>,
        step: &Step,
    ) -> Result<Gradients> {
        let rows = endless(run.seed, settings::PTX_ORDER, blocks.len(), step.number * count, count);
        let policy = Policy::new(run.task.start.base, Some(actor.weights().view()));
        let layers = run.task.start.base.shapes().layers;
        let micro = run.config.micro_batch_size;
        let (loss, gradients) = ptx::gradients(policy, layers, blocks, &rows, config, micro, run.checkpoint)?;
        self.ptx_loss += loss;
        Ok(gradients)
    }

    fn critic(
        &mut self,
        critic: &Learner,
        experience: &Experience,
        minibatch: &[usize],
        run: &Run<'_>,
    ) -> Result<Option<Gradients>> {
        let (base, config) = (run.critic_base(), run.config);
        let tokens = experience.tokens_of(minibatch) as f64;
        let mut grads = Gradients::none(base.shapes().layers);
        for rows in minibatch.chunks(config.micro_batch_size) {
            if stop::requested() {
                return Ok(None);
            }
            let (batch, targets) = experience.rollout.batch(rows)?;
            let old = pick(rows, |i| &experience.rollout.values[i]);
            let returns = pick(rows, |i| &experience.returns[i]);
            let scorer = ValueModel::new(base, critic.weights().view())?;
            let (_, g) = scorer.gradients(&batch, &targets.rows, run.checkpoint, |values| {
                let tokens_of_loss = ValueTokens { values, old_values: &old, returns: &returns };
                let loss = value_loss(tokens_of_loss, config.cliprange_value, tokens)?;
                self.value_loss += loss.loss;
                self.value.merge(&loss.stats);
                Ok(loss.grad.into_iter().map(|g| g * config.vf_coef as f32).collect())
            })?;
            grads.add(g)?;
        }
        self.critic_minibatches += 1;
        Ok(Some(grads))
    }
}

const ACTOR: &str = "actor";

/// What a step that needs two is undone by.
fn snapshot(learner: &Learner) -> Result<Snapshot> {
    let mut snapshot = Snapshot::default();
    snapshot.put_learner(ACTOR, learner)?;
    Ok(snapshot)
}

/// The policy loss by the settings.
fn objective(run: &Run<'_>, step: &Step) -> Objective {
    let c = run.config;
    let surrogate = match c.policy_loss {
        PolicyLoss::Clip => {
            Surrogate::Clip { low: c.cliprange, high: c.cliprange_high.unwrap_or(c.cliprange), dual: c.dual_clip }
        }
        PolicyLoss::KlPenalty => Surrogate::KlPenalty { coef: step.kl_penalty },
        PolicyLoss::Gradient => Surrogate::Gradient,
    };
    let kl = estimator(c.kl_estimator).filter(|_| c.kl_in == KlIn::Loss).map(|e| (e, step.kl_coef));
    Objective { surrogate, log_ratio_clamp: c.log_ratio_clamp.unwrap_or(f64::INFINITY), kl }
}

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v)).sum()
}
