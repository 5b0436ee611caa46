//! One minibatch update: gradients accumulated over micro-batches, then an optimizer step of each learner; on a device the
//! actor's is computed while the critic's passes run, and the critic's while what comes next does. It also keeps the sums from
//! which an iteration's metrics are computed. It does not depend on the training loop. Read `loss.rs` for the formulas.

use anyhow::{Context, Error, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::experience::{Experience, estimator};
use super::loss::{Average, Objective, PolicyStats, PolicyTokens, RatioLevel, Surrogate, policy_loss};
use super::rollout::Rollout;
use super::run::PpoRun;
use super::value_loss::{ValueStats, ValueTokens, value_loss};
use super::{correction, ptx};
use crate::config::{ImportanceSamplingLevel, KlIn, LossType, PolicyLoss, Ppo, Ptx};
use crate::data::examples::Examples;
use crate::data::examples::batch_sampler::endless;
use crate::data::examples::objectives::SftExample;
use crate::device::Array;
use crate::host::meter::{Phase, within};
use crate::model::adapter::{Adapter, Gradients};
use crate::model::generate::FinishReason;
use crate::model::roles::{HeadGradients, Policy, ValueModel};
use crate::ops::cpu;
use crate::ops::logprobs::TokenStats;
use crate::train::learner::Learner;
use crate::train::snapshot::Snapshot;
use crate::train::world::World;
use crate::train::{settings, stop};

/// Sums over an iteration's minibatches.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Update {
    /// Minibatches whose policy loss was computed.
    pub minibatches: usize,
    /// Number of them without an optimizer step, because the mean ratio exceeded `ratio_threshold`.
    pub skipped: usize,
    /// Minibatches of which every response was left out of the policy loss.
    #[serde(default)]
    pub left_out: usize,
    /// Minibatches whose value loss was computed.
    pub critic_minibatches: usize,
    /// Sum of policy losses.
    pub policy_loss: f64,
    /// Sum of value losses.
    pub value_loss: f64,
    /// Sum of losses of the pretraining mixture (ptx).
    pub ptx_loss: f64,
    /// Sum of the minibatches' mean entropies, nats per token.
    pub entropy: f64,
    /// Exact KL from actor to reference in the first epoch, nats, summed over tokens.
    pub exact_kl: f64,
    /// Responses over which `exact_kl` was summed.
    #[serde(rename = "exact_answers")]
    pub exact_responses: usize,
    /// Policy statistics of all minibatches.
    pub policy: PolicyStats,
    /// Policy statistics of the last minibatch.
    pub last_policy: PolicyStats,
    /// Value statistics of all minibatches.
    pub value: ValueStats,
    /// Sum of the actor's gradient norms before clipping.
    pub actor_norm: f64,
    /// Sum of the critic's gradient norms before clipping.
    pub critic_norm: f64,
    /// Mean ratio of the first minibatch: 1 if sampling and training compute the same log-probabilities.
    pub first_ratio: Option<f64>,
    /// Sampler against trainer: differences of log-probabilities over the first minibatch, before a step.
    #[serde(default)]
    pub mismatch: Mismatch,
    /// Learning rate of the actor's last step.
    pub actor_lr: f64,
    /// Learning rate of the critic's last step.
    pub critic_lr: f64,
}

/// `|log p(token) of the sampler - log p(token) of the trainer|` with the same weights, nats: what the two compute differently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Mismatch {
    tokens: u64,
    sum: f64,
    /// The largest difference.
    pub max: f64,
}

impl Mismatch {
    fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    fn add(&mut self, sampler: &[f32], trainer: &[f32]) {
        for (a, b) in sampler.iter().zip(trainer) {
            let difference = (f64::from(*a) - f64::from(*b)).abs();
            self.tokens += 1;
            self.sum += difference;
            self.max = self.max.max(difference);
        }
    }

    /// The mean difference; none without tokens.
    pub fn mean(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.sum / self.tokens as f64)
    }
}

/// What one micro-batch adds to the actor's sums.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct ActorSums {
    policy_loss: f64,
    entropy: f64,
    exact_kl: f64,
    exact_responses: usize,
    mismatch: Mismatch,
    stats: PolicyStats,
}

/// What `of` finds for the micro-batches, each of one rank; it is given a micro-batch's number. `None` if the process was asked to
/// stop. Several ranks stop between two steps alone, since they have to do so together.
fn by_micro_batches<T: Serialize + DeserializeOwned>(
    world: &World,
    count: usize,
    mut of: impl FnMut(usize) -> Result<T>,
) -> Result<Option<Vec<T>>> {
    let mut unless_stopped = |number| match world.is_alone() && stop::requested() {
        true => Ok(None),
        false => of(number).map(Some),
    };
    let found = world.share(count, |mine| mine.map(&mut unless_stopped).collect())?;
    Ok(found.into_iter().collect())
}

/// The inputs of one minibatch update besides the learners.
#[derive(Clone, Copy)]
pub struct Step<'s> {
    /// Models, data and settings.
    pub run: &'s PpoRun<'s>,
    /// Rollout with advantages and returns.
    pub experience: &'s Experience,
    /// Sequences of the minibatch.
    pub rows: &'s [usize],
    /// Reference policy: the one that computed the rollout's `ref_hidden`. None where no KL is measured.
    pub reference: Option<&'s Adapter>,
    /// Learning rate of the actor.
    pub actor_lr: f64,
    /// Learning rate of the critic.
    pub critic_lr: f64,
    /// Coefficient of the KL to the reference.
    pub kl_coef: f64,
    /// Coefficient of the KL to the policy that sampled.
    pub kl_penalty: f64,
    /// Whether this is the first epoch over the rollout.
    pub first_epoch: bool,
    /// Optimizer steps of the actor so far: the position in the sequence of text blocks.
    pub actor_steps: usize,
}

impl Step<'_> {
    /// Response tokens of the minibatch: the normaliser of the value loss.
    fn tokens(&self) -> f64 {
        self.experience.tokens_of(self.rows) as f64
    }

    /// The sequences whose tokens are in the policy loss.
    fn actor_rows(&self) -> Vec<usize> {
        let is_whole = |&row: &usize| self.experience.rollout.responses[row].finish == FinishReason::Stop;
        let masks = self.run.config.mask_truncated_completions;
        self.rows.iter().copied().filter(|row| !masks || is_whole(row)).collect()
    }

    /// What the policy loss over `tokens` tokens is divided by. A response that is left out counts as one of no loss where
    /// responses are counted, as TRL has it.
    fn normaliser(&self, tokens: f64) -> f64 {
        let responses = self.rows.len() as f64;
        match self.run.config.loss_type {
            LossType::Dapo => tokens,
            LossType::Grpo => responses,
            LossType::DrGrpo => responses * self.run.config.response_length as f64,
        }
    }
}

/// Concatenates the per-token values of some sequences.
fn concat<'e>(rows: &[usize], of: impl Fn(usize) -> &'e [f32]) -> Vec<f32> {
    rows.iter().flat_map(|&i| of(i).iter().copied()).collect()
}

impl Update {
    /// Trains on one minibatch. `actor` is `None` during the critic's warm-up, `critic` if there is none. Returns whether an
    /// optimizer step was made; `None` if the process was asked to stop, and then no learner has changed. Nor has one after an
    /// error of a pass or of a gradient.
    ///
    /// # Errors
    /// If a value is NaN or infinite.
    pub fn minibatch<'l>(
        &mut self,
        actor: Option<&'l mut Learner>,
        critic: Option<&'l mut Learner>,
        step: &Step<'_>,
    ) -> Result<Option<bool>> {
        let run = step.run;
        let update = within(Phase::Update);
        // 1. The actor's gradient, and whether the mean ratio is small enough to step by it. Where every response is left out
        //    of the loss there is none, and no step.
        let (rows, had_actor) = (step.actor_rows(), actor.is_some());
        let mut actor = match actor.filter(|_| !rows.is_empty()) {
            Some(learner) => match self.actor(learner, step, &rows)? {
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
        let is_left_out = had_actor && actor.is_none();
        // 2. The critic's gradient. On a device the actor's step is computed meanwhile, beside the actor.
        let mut prepared = None;
        let critic = match critic {
            Some(learner) => {
                let gradients = match actor.take_if(|_| computes_step_meanwhile(run)) {
                    Some((gradients, actor)) => {
                        let passes = || self.critic(learner, step);
                        let (of_actor, found) = actor.prepared_while(gradients, step.actor_lr, passes)?;
                        prepared = Some((of_actor, actor));
                        found
                    }
                    None => self.critic(learner, step)?,
                };
                match gradients {
                    Some(gradients) => Some((gradients, learner)),
                    None => return Ok(None),
                }
            }
            None => None,
        };
        // 3. Two optimizer steps, or one over both learners.
        drop(update);
        let _phase = within(Phase::Step);
        (self.actor_lr, self.critic_lr) = (step.actor_lr, step.critic_lr);
        self.left_out += usize::from(is_left_out);
        match (actor, critic) {
            (Some((a, actor)), Some((c, critic))) if run.config.shared_optimizer => {
                self.critic_lr = step.actor_lr;
                let [actor_norm, critic_norm] = Learner::step_both([actor, critic], [a, c], step.actor_lr)?;
                self.actor_norm += actor_norm;
                self.critic_norm += critic_norm;
            }
            (actor, critic) => {
                // Both gradients are checked before either learner steps.
                let checked = |both: Option<(Gradients, &'l mut Learner)>| -> Result<Option<_>> {
                    both.map(|(gradients, learner)| Ok((learner.checked(gradients)?, learner))).transpose()
                };
                let prepared = prepared.map(|(step, learner)| Ok::<_, Error>((step?, learner))).transpose()?;
                let (actor, critic) = (checked(actor)?, checked(critic)?);
                if let Some((step, learner)) = prepared {
                    self.actor_norm += learner.commit(step)?;
                }
                if let Some((gradients, learner)) = actor {
                    let mixture = run.ptx_mixture().filter(|(config, _)| config.separate_step);
                    let before = mixture.map(|_| snapshot(learner)).transpose()?;
                    self.actor_norm += learner.step_by(gradients, step.actor_lr)?;
                    if let Some(((config, blocks), before)) = mixture.zip(before) {
                        let gradients = self.ptx(learner, config, blocks, step);
                        let gradients = gradients.and_then(|own| run.world.sum_gradients(own));
                        if let Err(error) = gradients.and_then(|g| learner.step(g, step.actor_lr)) {
                            before.restore_learner(ACTOR, learner)?;
                            return Err(error);
                        }
                    }
                }
                if let Some((gradients, learner)) = critic {
                    // Nothing reads the critic before its next passes.
                    self.critic_norm += match computes_step_meanwhile(run) {
                        true => learner.step_later(gradients, step.critic_lr)?,
                        false => learner.step_by(gradients, step.critic_lr)?,
                    };
                }
            }
        }
        Ok(Some(!is_left_out))
    }

    /// Gradient of the policy loss over the sequences `rows` of the minibatch; `None` if the process was asked to stop.
    fn actor(&mut self, actor: &Learner, step: &Step<'_>, rows: &[usize]) -> Result<Option<Gradients>> {
        let (run, rollout) = (step.run, &step.experience.rollout);
        let tokens = step.experience.tokens_of(rows) as f64;
        let (base, config, normaliser) = (run.base, run.config, step.normaliser(tokens));
        let chosen = match config.top_entropy_quantile < 1.0 {
            true => match uncertain(Policy::new(base, Some(actor.weights().view())), step, rows)? {
                Some(chosen) => Some(chosen),
                None => return Ok(None),
            },
            false => None,
        };
        // Tokens that the entropy bonus acts on.
        let bonus_tokens = chosen.as_ref().map_or(tokens, |chosen| chosen.iter().filter(|&&c| c).count().max(1) as f64);
        let is_first = self.first_ratio.is_none();
        let objective = objective(step);
        // The exact KL is computed if it is part of the loss, and in the first epoch for the metrics.
        let exact_weight =
            (config.kl_in == KlIn::Loss && estimator(config.kl_estimator).is_none()).then_some(step.kl_coef);
        let needs_exact = step.reference.is_some() && (step.first_epoch || exact_weight.is_some());
        let chunks: Vec<&[usize]> = rows.chunks(config.micro_batch_size).collect();
        let mut grads = Gradients::none(base.shapes().layers);
        let sums = by_micro_batches(run.world, chunks.len(), |number| {
            let rows = chunks[number];
            let (batch, targets) = rollout.batch(rows)?;
            let before: usize = chunks[..number].iter().map(|rows| step.experience.tokens_of(rows)).sum();
            let chosen = chosen.as_ref().map(|chosen| &chosen[before..before + targets.rows.len()]);
            let lengths: Vec<usize> = rows.iter().map(|&i| rollout.responses[i].tokens.len()).collect();
            let old_logprobs = concat(rows, |i| &rollout.responses[i].logprobs);
            let advantages = concat(rows, |i| &step.experience.advantages[i]);
            // The sampler's own, where the ratio is to the trainer's.
            let sampled = concat(rows, |i| rollout.sampler_logprobs(i));
            let weights = token_weights(rollout, rows, chosen, config);
            // Without a reference the loss has no KL and reads none of these.
            let ref_logprobs = match step.reference {
                Some(_) => concat(rows, |i| &rollout.ref_logprobs[i]),
                None => old_logprobs.clone(),
            };
            let ref_hidden = match needs_exact {
                true => {
                    let hidden = concat(rows, |i| &rollout.ref_hidden[i]);
                    let n = targets.rows.len();
                    let d = hidden.len().checked_div(n).context("responses without tokens")?;
                    Some(Array::on(cpu::tensor(hidden, (n, d))?, base.place())?)
                }
                false => None,
            };
            let policy = Policy::new(base, Some(actor.weights().view()));
            let mut sums = ActorSums::default();
            let loss = |token_stats: &TokenStats, exact: &[f32]| {
                let inputs = PolicyTokens {
                    lengths: &lengths,
                    logprobs: &token_stats.logprobs,
                    old_logprobs: &old_logprobs,
                    advantages: &advantages,
                    ref_logprobs: &ref_logprobs,
                    weights: weights.as_deref(),
                };
                let loss = policy_loss(inputs, &objective, normaliser)?;
                if is_first {
                    sums.mismatch.add(&sampled, &token_stats.logprobs);
                }
                sums.entropy = sum(&token_stats.entropy) / tokens;
                let counts = |t: usize| chosen.is_none_or(|chosen| chosen[t]);
                let bonus = match chosen {
                    None => sums.entropy,
                    Some(_) => {
                        let of_chosen = token_stats.entropy.iter().enumerate().filter(|&(t, _)| counts(t));
                        of_chosen.map(|(_, &e)| f64::from(e)).sum::<f64>() / bonus_tokens
                    }
                };
                let exact_loss = exact_weight.map_or(0.0, |weight| weight * sum(exact) / tokens);
                sums.policy_loss = loss.loss + exact_loss - config.entropy_coef * bonus;
                if step.first_epoch && needs_exact {
                    sums.exact_kl = sum(exact);
                    sums.exact_responses = rows.len();
                }
                sums.stats = loss.stats;
                let each = |weight: f64| vec![(weight / tokens) as f32; loss.grad.len()];
                let of_bonus = (-config.entropy_coef / bonus_tokens) as f32;
                let entropy = (0..loss.grad.len()).map(|t| if counts(t) { of_bonus } else { 0.0 }).collect();
                let kl = exact_weight.map(each);
                Ok(HeadGradients { logprobs: loss.grad, entropy, kl })
            };
            let reference = ref_hidden.as_ref().map(|hidden| (Policy::new(base, step.reference), hidden));
            let (_, g) =
                policy.gradients_against(&batch, &targets, reference, run.temperature(), run.recompute, loss)?;
            grads.add(g)?;
            Ok(sums)
        })?;
        let Some(sums) = sums else { return Ok(None) };
        let mut stats = PolicyStats::default();
        for part in &sums {
            self.policy_loss += part.policy_loss;
            self.entropy += part.entropy;
            self.exact_kl += part.exact_kl;
            self.exact_responses += part.exact_responses;
            self.mismatch.merge(&part.mismatch);
            stats.merge(&part.stats);
        }
        if let Some((config, blocks)) = run.ptx_mixture().filter(|(config, _)| !config.separate_step) {
            grads.add(self.ptx(actor, config, blocks, step)?)?;
        }
        self.first_ratio.get_or_insert(stats.mean_ratio());
        self.policy.merge(&stats);
        self.last_policy = stats;
        self.minibatches += 1;
        // The critic's passes find the device's memory free of them.
        run.world.sum_gradients(grads.to_host()?).map(Some)
    }

    /// This rank's share of the gradient of the pretraining loss over the next text blocks, one per sequence of the minibatch.
    fn ptx(
        &mut self,
        actor: &Learner,
        config: &Ptx,
        blocks: &dyn Examples<SftExample>,
        step: &Step<'_>,
    ) -> Result<Gradients> {
        let (run, count) = (step.run, step.rows.len());
        let rows = endless(run.seed, settings::PTX_ORDER, blocks.len(), step.actor_steps * count, count);
        let policy = Policy::new(run.base, Some(actor.weights().view()));
        let layers = run.base.shapes().layers;
        let micro = run.config.micro_batch_size;
        let (loss, gradients) = ptx::gradients(policy, layers, blocks, &rows, config, micro, run.recompute, run.world)?;
        self.ptx_loss += loss;
        Ok(gradients)
    }

    /// Gradient of the value loss over the minibatch; `None` if the process was asked to stop.
    fn critic(&mut self, critic: &Learner, step: &Step<'_>) -> Result<Option<Gradients>> {
        let (run, experience) = (step.run, step.experience);
        let (base, config, tokens) = (run.critic_base(), run.config, step.tokens());
        let chunks: Vec<&[usize]> = step.rows.chunks(config.micro_batch_size).collect();
        let mut grads = Gradients::none(base.shapes().layers);
        let sums = by_micro_batches(run.world, chunks.len(), |number| {
            let rows = chunks[number];
            let (batch, targets) = experience.rollout.batch(rows)?;
            let old_values = concat(rows, |i| &experience.rollout.values[i]);
            let returns = concat(rows, |i| &experience.returns[i]);
            let value_model = ValueModel::new(base, critic.weights().view())?;
            let mut sums = (0.0, ValueStats::default());
            let (_, g) = value_model.gradients(&batch, &targets.rows, run.recompute, |values| {
                let inputs = ValueTokens { values, old_values: &old_values, returns: &returns };
                let loss = value_loss(inputs, config.cliprange_value, tokens)?;
                sums = (loss.loss, loss.stats);
                Ok(loss.grad.into_iter().map(|g| g * config.vf_coef as f32).collect())
            })?;
            grads.add(g)?;
            Ok(sums)
        })?;
        let Some(sums) = sums else { return Ok(None) };
        for (loss, stats) in &sums {
            self.value_loss += loss;
            self.value.merge(stats);
        }
        self.critic_minibatches += 1;
        run.world.sum_gradients(grads).map(Some)
    }
}

/// Whether the actor's step is computed by a thread while the critic's passes run, and the critic's while the next passes or the
/// next rollout do: where they run on a device, the host is otherwise idle. They are not where the actor's step depends on the
/// critic's gradients or is one of two, nor among ranks.
fn computes_step_meanwhile(run: &PpoRun<'_>) -> bool {
    let on_device = run.critic_base().place().is_some();
    on_device && run.world.is_alone() && run.config.steps_actor_by_its_gradients()
}

const ACTOR: &str = "actor";

/// Copies a learner, to undo the first of two steps if the second one fails.
fn snapshot(learner: &Learner) -> Result<Snapshot> {
    let mut snapshot = Snapshot::default();
    snapshot.put_learner(ACTOR, learner)?;
    Ok(snapshot)
}

/// Weights of the surrogates of the tokens of `rows`: of those that are not chosen 0, of the others what corrects for the
/// sampler. `None` if all are 1.
fn token_weights(rollout: &Rollout, rows: &[usize], chosen: Option<&[bool]>, config: &Ppo) -> Option<Vec<f32>> {
    let of = |&i: &usize| correction::weights(&rollout.responses[i].logprobs, rollout.sampler_logprobs(i), config);
    let corrected: Option<Vec<Vec<f32>>> = rows.iter().map(of).collect();
    let chosen = chosen.map(|chosen| chosen.iter().map(|&chosen| if chosen { 1.0 } else { 0.0 }).collect::<Vec<f32>>());
    match (corrected.map(|weights| weights.concat()), chosen) {
        (Some(weights), Some(chosen)) => Some(weights.iter().zip(&chosen).map(|(a, b)| a * b).collect()),
        (weights, chosen) => weights.or(chosen),
    }
}

/// Which tokens of the sequences `rows` are among the minibatch's share `top_entropy_quantile` with the highest entropy under
/// the actor; `None` if the process was asked to stop. The bound is of the whole minibatch, so that a micro-batch's size
/// changes nothing.
fn uncertain(actor: Policy<'_>, step: &Step<'_>, rows: &[usize]) -> Result<Option<Vec<bool>>> {
    let config = step.run.config;
    let chunks: Vec<&[usize]> = rows.chunks(config.micro_batch_size).collect();
    let entropies = by_micro_batches(step.run.world, chunks.len(), |number| {
        let (batch, targets) = step.experience.rollout.batch(chunks[number])?;
        Ok(actor.logprobs(&batch, &targets, step.run.temperature())?.entropy)
    })?;
    let Some(entropies) = entropies.map(|entropies| entropies.concat()) else { return Ok(None) };
    let bound = quantile(&entropies, 1.0 - config.top_entropy_quantile);
    Ok(Some(entropies.iter().map(|&entropy| f64::from(entropy) >= bound).collect()))
}

/// The value below which a share `q` of the values lies, between two of them by a straight line (`torch.quantile`).
pub(super) fn quantile(values: &[f32], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    let place = q * sorted.len().saturating_sub(1) as f64;
    let at = |i: usize| sorted.get(i).copied().map_or(f64::INFINITY, f64::from);
    let (low, part) = (place.floor() as usize, place.fract());
    if part == 0.0 { at(low) } else { at(low) + part * (at(low + 1) - at(low)) }
}

/// The policy loss that the settings choose.
fn objective(step: &Step<'_>) -> Objective {
    let c = step.run.config;
    let surrogate = match c.policy_loss {
        PolicyLoss::Clip => {
            Surrogate::Clip { low: c.cliprange, high: c.cliprange_high.unwrap_or(c.cliprange), dual: c.dual_clip }
        }
        PolicyLoss::KlPenalty => Surrogate::KlPenalty { coef: step.kl_penalty },
        PolicyLoss::Cispo => Surrogate::Cispo { cap: c.cliprange_high.unwrap_or(CISPO_CAP) },
        PolicyLoss::Sapo => Surrogate::Sapo {
            positive: c.sapo_temperature_pos.unwrap_or(1.0),
            negative: c.sapo_temperature_neg.unwrap_or(1.05),
        },
        PolicyLoss::Gradient => Surrogate::Gradient,
    };
    let kl = estimator(c.kl_estimator).filter(|_| c.kl_in == KlIn::Loss).map(|e| (e, step.kl_coef));
    let level = match c.importance_sampling_level {
        ImportanceSamplingLevel::Token => RatioLevel::Token,
        ImportanceSamplingLevel::Sequence => RatioLevel::Sequence,
        ImportanceSamplingLevel::Product => RatioLevel::Product,
    };
    Objective {
        log_ratio_clamp: c.log_ratio_clamp.unwrap_or(f64::INFINITY),
        kl,
        kl_times_ratio: c.use_bias_correction_kl,
        level,
        average: if c.loss_type == LossType::Grpo { Average::Responses } else { Average::Tokens },
        ..Objective::of(surrogate)
    }
}

/// CISPO's cap on the ratio: arXiv:2506.13585 as TRL's documentation gives it.
const CISPO_CAP: f64 = 5.0;

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_lies_between_two_values_as_torch_has_it() {
        // torch.quantile(torch.tensor([3., 1., 2., 10.]), q)
        for (q, want) in [(0.0, 1.0), (0.5, 2.5), (1.0, 10.0), (0.8, 5.8), (1.0 / 3.0, 2.0)] {
            assert!((quantile(&[3.0, 1.0, 2.0, 10.0], q) - want).abs() < 1e-12, "{q}");
        }
        assert_eq!(quantile(&[4.0], 0.3), 4.0);
    }

    #[test]
    fn the_mismatch_is_the_mean_and_the_largest_difference() {
        let mut found = Mismatch::default();
        assert_eq!(found.mean(), None);
        found.add(&[-1.0, -2.0], &[-1.5, -2.0]);
        found.add(&[-1.0], &[-0.75]);
        assert_eq!((found.mean(), found.max), (Some(0.25), 0.5));
    }
}
