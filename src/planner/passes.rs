//! The largest passes of each stage: the largest micro-batch that its loop will run, found with the loop's own
//! shuffling.
//!
//! It does not compute bytes. Read `simulate/work.rs` for what a pass is, `simulate/stages.rs` for what it takes.

use std::borrow::Cow;
use std::ops::Range;

use anyhow::Result;

use crate::config::{
    AdvantageEstimator, Config, CriticStart, EvalSize, ImportanceSamplingCorrection, KlEstimator, KlIn, RewardKind,
    RewardLoss, Stage, Supervised as _, SupervisedKeys,
};
use crate::data::examples::batch_sampler::{BatchSampler, Shard, endless};
use crate::data::examples::objectives::{PromptExample, RankedExample, SftExample, UnpairedExample};
use crate::data::examples::{Example, Examples, PassSize, passes, pick};
use crate::dpo::kto::with_others;
use crate::model::batch::chunks_by_tokens;
use crate::planner::simulate::work::{Pass, Rollouts, Supervised, Work};
use crate::rng::{SplitMix64, derive};
use crate::train::world::share_of;
use crate::train::{settings, stop};
use crate::{distill, dpo, reward};

/// The number of rows searched for the largest batch; later rows are assumed to be no larger.
const MOST_ROWS: usize = 20_000_000;

/// The same of a run with rollouts: responses, times the passes over them.
const MOST_RESPONSES: usize = 1_000_000;

/// The step of a run, and of one of its ranks, that has the micro-batch with the most tokens, as rows.
///
/// # Errors
/// If the process was asked to stop.
fn largest_step<T: Example>(
    plan: BatchSampler,
    examples: &(impl Examples<T> + ?Sized),
    epochs: usize,
) -> Result<Vec<Vec<usize>>> {
    let (mut most, mut largest) = (0, vec![]);
    for epoch in 0..epochs.min(1 + MOST_ROWS / examples.len().max(1)) {
        let order = plan.epoch(examples, epoch);
        for (position, rank) in steps(&plan, order.steps()) {
            stop::check()?;
            let step = order.step_of(position, rank);
            let tokens = |rows: &&[usize]| rows.iter().map(|&row| examples.tokens(row)).sum::<usize>();
            let here = step.batches.iter().map(tokens).max().unwrap_or(0);
            if here > most {
                (most, largest) = (here, step.batches.iter().map(|rows| rows.to_vec()).collect());
            }
        }
    }
    Ok(largest)
}

/// Each of `count` steps with each rank.
fn steps(plan: &BatchSampler, count: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
    let ranks = plan.shard.world_size;
    (0..count).flat_map(move |position| (0..ranks).map(move |rank| (position, rank)))
}

/// The order in which a supervised stage reads its examples among `ranks` ranks.
fn sampler(keys: &SupervisedKeys, seed: u64, stream: u64, ranks: usize) -> BatchSampler {
    BatchSampler { shard: Shard { rank: 0, world_size: ranks.max(1) }, ..settings::sampler(keys, seed, stream) }
}

/// Of the shares that ranks have in `count` things the one with the largest `size`.
pub(crate) fn largest_share<S: Ord>(ranks: usize, count: usize, size: impl Fn(Range<usize>) -> S) -> Range<usize> {
    let ranks = ranks.max(1);
    let shares = (0..ranks).map(|rank| share_of(count, rank, ranks));
    shares.max_by_key(|share| size(share.clone())).unwrap_or_default()
}

/// The rows of the largest of all passes of `size`.
fn largest_pass<T: Example>(examples: &(impl Examples<T> + ?Sized), size: PassSize) -> Vec<usize> {
    let tokens = |rows: &Range<usize>| rows.clone().map(|row| examples.tokens(row)).sum::<usize>();
    passes(examples, size).max_by_key(tokens).unwrap_or_default().collect()
}

/// The sequences' lengths and the targets that an example adds to a pass, truncated to `most` tokens per sequence.
trait Sequences: Example {
    fn put(&self, most: usize, pass: &mut Pass);
}

impl Sequences for SftExample {
    fn put(&self, most: usize, pass: &mut Pass) {
        let length = self.tokens.len().min(most);
        pass.lengths.push(length);
        pass.targets += self.loss_mask[self.loss_mask.len() - length..].iter().filter(|&&m| m).count();
    }
}

impl Sequences for RankedExample {
    fn put(&self, most: usize, pass: &mut Pass) {
        for response in &self.responses {
            pass.lengths.push((self.prompt.len() + response.len()).min(most));
            pass.targets += response.len().min(most - 1);
        }
    }
}

impl Sequences for UnpairedExample {
    fn put(&self, most: usize, pass: &mut Pass) {
        pass.lengths.push((self.prompt.len() + self.response.len()).min(most));
        pass.targets += self.response.len().min(most - 1);
    }
}

fn pass<T: Sequences>(examples: &(impl Examples<T> + ?Sized), rows: &[usize], most: usize) -> Result<Pass> {
    let mut pass = Pass::default();
    for &row in rows {
        examples.get(row)?.put(most.max(2), &mut pass);
    }
    Ok(pass)
}

fn most_tokens(config: &Config) -> usize {
    config.data.as_ref().map_or(usize::MAX, |data| data.max_length)
}

/// `[sft]`'s passes of one of `ranks` ranks, the largest of all.
///
/// # Errors
/// If the examples cannot be read.
pub fn sft(
    config: &Config,
    examples: &(impl Examples<SftExample> + ?Sized),
    held_out: &(impl Examples<SftExample> + ?Sized),
    ranks: usize,
) -> Result<Work> {
    let (c, most) = (config.sft(), most_tokens(config));
    let plan = sampler(&c.supervised(), config.seed, settings::SFT_ORDER, ranks);
    let step = largest_step(plan, examples, c.num_train_epochs)?;
    let held = largest_pass(held_out, settings::evaluation_size(&c.supervised()));
    Ok(Work::Supervised(Supervised {
        step: step.iter().map(|rows| pass(examples, rows, most)).collect::<Result<_>>()?,
        reference: vec![],
        reference_is_adapter: false,
        evaluates_before: true,
        evaluation: (!held.is_empty()).then(|| pass(held_out, &held, most)).transpose()?,
        scorer: false,
        members: 1,
        response: None,
        taught: false,
        ranks,
        steps: plan.steps(examples, c.num_train_epochs),
    }))
}

/// `[reward]`'s passes of one of `ranks` ranks, the largest of all.
///
/// # Errors
/// If the examples cannot be read.
pub fn reward(
    config: &Config,
    examples: &(impl Examples<RankedExample> + ?Sized),
    held_out: &(impl Examples<RankedExample> + ?Sized),
    ranks: usize,
) -> Result<Work> {
    let (c, most) = (config.reward(), most_tokens(config));
    let plan = sampler(&c.supervised(), config.seed, settings::REWARD_ORDER, ranks);
    let targets = |mut pass: Pass| {
        pass.targets = match c.loss {
            RewardLoss::LastToken => pass.lengths.len(),
            RewardLoss::DivergenceToEnd => pass.tokens(),
        };
        pass
    };
    let size = settings::evaluation_size(&c.supervised());
    let held = largest_pass(held_out, size);
    let scored = |mut pass: Pass| {
        pass.targets = pass.lengths.len();
        pass
    };
    let mut evaluation = (!held.is_empty()).then(|| pass(held_out, &held, most)).transpose()?.map(scored);
    if c.center {
        // Training comparisons are scored for their mean, in passes of the same size.
        let some = 0..examples.len().min(reward::train::CENTER_ON);
        let some: Vec<RankedExample> = pick(examples, some)?.into_iter().map(Cow::into_owned).collect();
        for rows in passes(&some, size) {
            let here = scored(pass(&some, &rows.collect::<Vec<_>>(), most)?);
            if evaluation.as_ref().is_none_or(|e| e.tokens() < here.tokens()) {
                evaluation = Some(here);
            }
        }
    }
    let step = largest_step(plan, examples, c.num_train_epochs)?;
    Ok(Work::Supervised(Supervised {
        step: step.iter().map(|rows| pass(examples, rows, most).map(targets)).collect::<Result<_>>()?,
        reference: vec![],
        reference_is_adapter: false,
        evaluates_before: true,
        evaluation,
        scorer: true,
        members: c.ensemble,
        response: None,
        taught: false,
        ranks,
        steps: plan.steps(examples, c.num_train_epochs),
    }))
}

/// The largest scoring pass over responses, as `dpo::responses` cuts them by tokens.
fn scored(pass: &Pass) -> Pass {
    let chunks = chunks_by_tokens(&pass.lengths, dpo::SCORING_TOKENS);
    let tokens = |rows: &Vec<usize>| rows.iter().map(|&i| pass.lengths[i]).sum::<usize>();
    let rows = chunks.into_iter().max_by_key(tokens).unwrap_or_default();
    let lengths: Vec<usize> = rows.iter().map(|&i| pass.lengths[i]).collect();
    // Targets are divided evenly among the sequences; a pass of one example has them all.
    let targets = (pass.targets * rows.len()).div_ceil(pass.lengths.len().max(1));
    Pass { lengths, targets }
}

/// `[dpo]`'s passes of one of `ranks` ranks, the largest of all.
///
/// # Errors
/// If the examples cannot be read.
pub fn dpo(config: &Config, examples: &[RankedExample], held_out: &[RankedExample], ranks: usize) -> Result<Work> {
    let (c, most) = (config.dpo(), most_tokens(config));
    let plan = sampler(&c.supervised(), config.seed, settings::DPO_ORDER, ranks);
    let step = largest_step(plan, examples, c.num_train_epochs)?;
    let longest = largest_pass(examples, PassSize::of(1));
    let held = largest_pass(held_out, settings::evaluation_size(&c.supervised()));
    let reference = scored(&pass(examples, &longest, most)?);
    let mut evaluation = (!held.is_empty()).then(|| pass(held_out, &held, most)).transpose()?.map(|p| scored(&p));
    if c.precompute_ref_log_probs && evaluation.as_ref().is_none_or(|e| e.tokens() < reference.tokens()) {
        evaluation = Some(reference.clone());
    }
    Ok(Work::Supervised(Supervised {
        step: step.iter().map(|rows| pass(examples, rows, most)).collect::<Result<_>>()?,
        reference: if c.precompute_ref_log_probs { vec![] } else { vec![reference] },
        reference_is_adapter: c.adapter.is_some(),
        evaluates_before: c.eval_steps > 0 || c.precompute_ref_log_probs,
        evaluation,
        scorer: false,
        members: 1,
        response: None,
        taught: false,
        ranks,
        steps: plan.steps(examples, c.num_train_epochs),
    }))
}

/// The longest sequence of `[kto]`, and the longest prompt with another's response, cut at `[data] max_length`.
pub fn kto_lengths(config: &Config, examples: &[UnpairedExample]) -> (usize, usize) {
    let longest = |of: fn(&UnpairedExample) -> usize| examples.iter().map(of).max().unwrap_or(0);
    let mismatched = longest(|e| e.prompt.len()) + longest(|e| e.response.len());
    (longest(Example::tokens), mismatched.min(most_tokens(config)))
}

/// The KL term's pass over pairs of rows: the prompt of the first with the response of the other.
fn mismatched(examples: &[UnpairedExample], pairs: &[(usize, usize)], most: usize) -> Pass {
    let mut pass = Pass::default();
    for &(row, other) in pairs {
        let prompt = examples[row].prompt.len();
        let response = examples[other].response.len().min(most.saturating_sub(prompt).max(1));
        pass.lengths.push(prompt + response);
        pass.targets += response;
    }
    pass
}

/// The largest scoring pass of the KL terms of all steps.
fn largest_mismatched(plan: BatchSampler, examples: &[UnpairedExample], epochs: usize, most: usize) -> Pass {
    let mut largest = Pass::default();
    for epoch in 0..epochs.min(1 + MOST_ROWS / examples.len().max(1)) {
        let order = plan.epoch(examples, epoch);
        let mut before = None;
        for (position, rank) in steps(&plan, order.steps()) {
            let step = order.step_of(position, rank);
            let rows = step.of_all.concat();
            let last = rows.last().copied();
            // A step of one record takes the last response of the step before.
            let first = if rows.len() == 1 { before.or(last) } else { last };
            let pairs = with_others(&rows, &step.batches.concat(), first.unwrap_or(0));
            let here = scored(&mismatched(examples, &pairs, most));
            if here.tokens() > largest.tokens() {
                largest = here;
            }
            before = if rank + 1 == plan.shard.world_size { last } else { before };
        }
    }
    largest
}

/// `[kto]`'s passes of one of `ranks` ranks, the largest of all.
///
/// # Errors
/// If the examples cannot be read.
pub fn kto(config: &Config, examples: &[UnpairedExample], held_out: &[UnpairedExample], ranks: usize) -> Result<Work> {
    let (c, most) = (config.kto(), most_tokens(config));
    let plan = sampler(&c.supervised(), config.seed, settings::KTO_ORDER, ranks);
    let step = largest_step(plan, examples, c.num_train_epochs)?;
    let larger = |a: Pass, b: Pass| if b.tokens() > a.tokens() { b } else { a };
    // The KL term scores a step's prompts with each other's responses; the reference scores responses one by one.
    let own = pass(examples, &largest_pass(examples, PassSize::of(1)), most)?;
    let reference = larger(largest_mismatched(plan, examples, c.num_train_epochs, most), own);
    // Evaluation scores all held-out responses, after their own prompts and after each other's.
    let held: Vec<usize> = (0..held_out.len()).collect();
    let mut evaluation = None;
    if let Some(&last) = held.last().filter(|_| held.len() > 1) {
        let size = c.supervised().examples_evaluated_at_once();
        for (rows, pairs) in held.chunks(size).zip(with_others(&held, &held, last).chunks(size)) {
            let here = larger(scored(&pass(held_out, rows, most)?), scored(&mismatched(held_out, pairs, most)));
            evaluation = Some(match evaluation {
                Some(before) => larger(before, here),
                None => here,
            });
        }
    }
    Ok(Work::Supervised(Supervised {
        step: step.iter().map(|rows| pass(examples, rows, most)).collect::<Result<_>>()?,
        reference: vec![reference],
        reference_is_adapter: c.adapter.is_some(),
        evaluates_before: c.eval_steps > 0,
        evaluation,
        scorer: false,
        members: 1,
        response: None,
        taught: false,
        ranks,
        steps: plan.steps(examples, c.num_train_epochs),
    }))
}

/// An example that a response is sampled to.
pub trait Sampled: distill::Prompted {
    /// Adds its sequence to a pass: the longer one of the prompt with a response of `response` tokens and of the record's.
    fn put_sampled(&self, response: usize, pass: &mut Pass) {
        let whole = self.whole().map_or((0, 0), |(tokens, mask)| (tokens.len(), mask.iter().filter(|&&m| m).count()));
        pass.lengths.push((self.prompt().len() + response).max(whole.0));
        pass.targets += response.max(whole.1);
    }
}

impl Sampled for PromptExample {}

impl Sampled for SftExample {}

/// `[distill]`'s passes, every response at its full length.
///
/// # Errors
/// If the examples cannot be read.
pub fn distill<T: Sampled>(
    config: &Config,
    examples: &(impl Examples<T> + ?Sized),
    held_out: &(impl Examples<T> + ?Sized),
) -> Result<Work> {
    let c = config.distill();
    let plan = settings::sampler(&c.supervised(), config.seed, settings::DISTILL_ORDER);
    let pass = |rows: &[usize], of: &dyn Fn(usize, &mut Pass) -> Result<()>| -> Result<Pass> {
        let mut pass = Pass::default();
        rows.iter().try_for_each(|&row| of(row, &mut pass))?;
        Ok(pass)
    };
    let put = |row: usize, pass: &mut Pass| {
        examples.get(row)?.put_sampled(c.max_new_tokens, pass);
        Ok(())
    };
    let put_held = |row: usize, pass: &mut Pass| {
        held_out.get(row)?.put_sampled(c.max_new_tokens, pass);
        Ok(())
    };
    let step = largest_step(plan, examples, c.num_train_epochs)?;
    let held = largest_pass(held_out, settings::evaluation_size(&c.supervised()));
    Ok(Work::Supervised(Supervised {
        step: step.iter().map(|rows| pass(rows, &put)).collect::<Result<_>>()?,
        reference: vec![],
        reference_is_adapter: false,
        evaluates_before: true,
        evaluation: (!held.is_empty()).then(|| pass(&held, &put_held)).transpose()?,
        scorer: false,
        members: 1,
        response: Some(c.max_new_tokens),
        taught: c.teacher_adapter.is_some(),
        ranks: 1,
        steps: plan.steps(examples, c.num_train_epochs),
    }))
}

/// Most passes of an optimizer step that a plan goes through.
const MOST_PASSES: usize = 64;

/// Of many passes the first and the largest, in their order: the others take no more, and what is held between two passes, the
/// sum of the gradients, does not grow.
fn fewer(passes: Vec<Vec<usize>>, tokens: impl Fn(&[usize]) -> usize) -> Vec<Vec<usize>> {
    if passes.len() <= MOST_PASSES {
        return passes;
    }
    let mut rows: Vec<usize> = (1..passes.len()).collect();
    rows.sort_by_key(|&row| std::cmp::Reverse(tokens(&passes[row])));
    rows.truncate(MOST_PASSES - 1);
    rows.push(0);
    rows.sort_unstable();
    rows.into_iter().map(|row| passes[row].clone()).collect()
}

/// Facts about a PPO run besides its config.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// Tokens of the held-out prompts that are evaluated on.
    pub held_out: &'a [usize],
    /// The longest sequence that both bases can take.
    pub context: usize,
    /// Critic and reward model read other tokens than the policy: the critic is then over the policy's base.
    pub other_tokens: bool,
    /// Ranks that share the sequences. The config is that of all.
    pub ranks: usize,
}

/// `[ppo]`'s passes, every response at its full length.
///
/// # Errors
/// If `[ppo]` is missing.
pub fn ppo(config: &Config, prompts: &(impl Examples<Vec<u32>> + ?Sized), asked: Asked<'_>) -> Result<Work> {
    let c = &config.ppo()?.over(prompts.len());
    let most = config.data.as_ref().map_or(usize::MAX, |data| data.max_prompt_length);
    let length = |row: usize| prompts.tokens(row).min(most);
    let asked_a_time = (c.batch_size / c.num_generations.max(1)).max(1);
    let response = c.response_length.min(asked.context.saturating_sub(1)).max(1);
    let full = |prompt: usize| response.min(asked.context.saturating_sub(prompt)).max(1);
    let (mut rollout, mut micro): (Vec<usize>, Vec<Vec<usize>>) = (vec![], vec![]);
    let tokens = |lengths: &[usize]| lengths.iter().sum::<usize>();
    let mut longest: Vec<usize> = (0..if c.dynamic_sampling_rollouts > 0 { prompts.len() } else { 0 }).collect();
    longest.sort_by_key(|&row| std::cmp::Reverse(length(row)));
    let passes = MOST_RESPONSES / (c.batch_size * c.num_ppo_epochs).max(1);
    let iterations = c.iterations().min(1 + passes.min(MOST_ROWS / prompts.len().max(1)));
    for iteration in 0..if prompts.is_empty() { 0 } else { iterations } {
        stop::check()?;
        let from = iteration * asked_a_time;
        let rows = match c.dynamic_sampling_rollouts {
            0 => endless(config.seed, settings::PROMPT_ORDER, prompts.len(), from, asked_a_time),
            // Which prompts meet in a rollout is not known before: the longest are assumed to.
            _ => (0..asked_a_time).map(|i| longest[i % longest.len()]).collect(),
        };
        let lengths: Vec<usize> =
            rows.into_iter().flat_map(|row| std::iter::repeat_n(length(row), c.num_generations)).collect();
        for epoch in 0..c.num_ppo_epochs {
            let path = [settings::MINIBATCH_ORDER, iteration as u64, epoch as u64];
            let order = SplitMix64::new(derive(config.seed, &path)).permutation(lengths.len());
            for minibatch in order.chunks(c.batch_size.div_ceil(c.num_mini_batches)) {
                let here: Vec<Vec<usize>> = minibatch
                    .chunks(c.micro_batch_size)
                    .map(|rows| rows.iter().map(|&i| lengths[i]).collect())
                    .collect();
                let largest =
                    |all: &[Vec<usize>]| all.iter().map(|m| tokens(m) + m.len() * response).max().unwrap_or(0);
                if largest(&here) > largest(&micro) {
                    micro = here;
                }
            }
        }
        if tokens(&lengths) > tokens(&rollout) {
            rollout = lengths;
        }
    }
    // A rank's passes: of the micro-batches the share with the largest one.
    let of_micro = |rows: &Vec<usize>| tokens(rows) + rows.len() * response;
    let own = largest_share(asked.ranks, micro.len(), |share| micro[share].iter().map(of_micro).max());
    micro.truncate(own.end);
    micro.drain(..own.start);
    let is_adapter = |kind: RewardKind| kind == RewardKind::Adapter;
    let parts = c.reward.iter().chain(&c.gold).filter(|part| is_adapter(part.kind));
    let more_rewards = parts.map(|part| part.adapters.len()).sum();
    let scoring = c.reward.iter().filter(|part| is_adapter(part.kind)).map(|part| part.adapters.len()).sum::<usize>();
    let text = c.ptx.as_ref().filter(|ptx| ptx.coef > 0.0).map(|ptx| {
        let tokens = ptx.block_size.unwrap_or(most.saturating_add(c.response_length)).min(asked.context);
        let (blocks, a_pass) = (c.batch_size.div_ceil(c.num_mini_batches), c.micro_batch_size.max(1));
        let own = largest_share(asked.ranks, blocks.div_ceil(a_pass), |share| share.len());
        (blocks.min(own.len() * a_pass), tokens, c.micro_batch_size)
    });
    let mut evaluation = asked.held_out.to_vec();
    evaluation.truncate(c.eval_prompts);
    let largest = evaluation.chunks(c.at_once()).max_by_key(|chunk| tokens(chunk));
    let own = |chunk: &[usize]| {
        chunk[largest_share(asked.ranks, chunk.len(), |share| tokens(&chunk[share]))]
            .iter()
            .map(|&t| t.min(most))
            .collect()
    };
    let evaluation = largest.map(own).unwrap_or_default();
    let is_served = c.servers().is_some();
    Ok(Work::Rollouts(Rollouts {
        prompts: rollout,
        ranks: asked.ranks,
        served: is_served,
        response,
        generations: c.num_generations,
        at_once: c.at_once(),
        steps: c.iterations() * c.num_ppo_epochs * c.num_mini_batches,
        micro: fewer(micro, tokens).iter().map(|rows| rows.iter().map(|&p| (p, full(p))).collect()).collect(),
        text,
        evaluation,
        evaluates_within: c.eval_every > 0,
        reference: c.measure_kl,
        recomputes: is_served || c.importance_sampling_correction != ImportanceSamplingCorrection::None,
        refills: c.dynamic_sampling_rollouts > 0,
        critic: matches!(c.advantage_estimator, AdvantageEstimator::Gae | AdvantageEstimator::A2c),
        critic_on_policy: c.critic == CriticStart::Actor || asked.other_tokens,
        steps_actor_by_its_gradients: c.steps_actor_by_its_gradients(),
        exact: (
            c.kl_estimator == KlEstimator::Exact && c.kl_in == KlIn::Reward,
            c.kl_estimator == KlEstimator::Exact && c.kl_in == KlIn::Loss,
        ),
        main_reward: !c.reward_adapter.is_blank(),
        more_rewards,
        critic_is_reward: c.critic == CriticStart::Reward,
        reward_model: !c.reward_adapter.is_blank() || more_rewards > 0,
        scoring_models: scoring + usize::from(!c.reward_adapter.is_blank()),
        copies: [c.ema_decay.is_some(), c.ref_model_sync_iterations > 0, c.samples_ahead()]
            .map(usize::from)
            .iter()
            .sum(),
    }))
}

/// The passes of a stage whose examples are not available: each as long as `[data]` allows, enough of them for a step and for
/// the largest pass of an evaluation; a comparison has `responses`, two or more.
///
/// # Errors
/// If `[ppo]` is missing and asked for.
pub fn full_length(stage: Stage, config: &Config, context: usize, responses: usize, ranks: usize) -> Result<Work> {
    let data = config.data.clone().unwrap_or_default();
    let length = data.max_length.min(context).max(2);
    let response = vec![0u32; length - 1];
    let (some, mut held) = (64, 16);
    let ranked = || RankedExample {
        prompt: vec![0],
        responses: vec![response.clone(); responses.max(2)],
        label: Default::default(),
    };
    let judged = || UnpairedExample { prompt: vec![0], response: response.clone(), desirable: true };
    let tokens = || SftExample { tokens: vec![0; length], loss_mask: (0..length).map(|i| i > 0).collect() };
    if stage == Stage::Kto {
        held = held.max(dpo::SCORING_TOKENS.div_ceil(length));
    }
    let keys = config.supervised(stage);
    held = held.max(keys.map_or(0, |keys| keys.examples_evaluated_at_once()));
    if let EvalSize::Rows(rows) = data.eval_size() {
        held = held.min(rows);
    }
    let n = keys.map_or(some, |keys| {
        some.max(keys.per_device_train_batch_size * keys.gradient_accumulation_steps.min(MOST_PASSES) * ranks)
    });
    match stage {
        Stage::Sft => sft(config, &vec![tokens(); n], &vec![tokens(); held], ranks),
        Stage::Reward => reward(config, &vec![ranked(); n], &vec![ranked(); held], ranks),
        Stage::Dpo => dpo(config, &vec![ranked(); n], &vec![ranked(); held], ranks),
        Stage::Kto => kto(config, &vec![judged(); n], &vec![judged(); held], ranks),
        Stage::Distill => {
            let prompt = data.max_prompt_length.min(context.saturating_sub(config.distill().max_new_tokens)).max(1);
            let asked = PromptExample { tokens: vec![0; prompt], text: String::new(), answer: None, entry: 0 };
            match config.distill().samples_all() {
                true => distill(config, &vec![asked.clone(); n], &vec![asked; held]),
                false => distill(config, &vec![tokens(); n], &vec![tokens(); held]),
            }
        }
        Stage::Ppo | Stage::Grpo | Stage::Rloo => {
            let prompt = data.max_prompt_length.min(context.saturating_sub(1)).max(1);
            let held_out = vec![prompt; config.ppo()?.eval_prompts];
            let mut once = config.clone();
            if let Some(ppo) = &mut once.ppo {
                (ppo.total_episodes, ppo.num_train_epochs) = (ppo.batch_size, None);
            }
            ppo(&once, &vec![vec![0u32; prompt]; 1], Asked { held_out: &held_out, context, other_tokens: false, ranks })
        }
    }
}
