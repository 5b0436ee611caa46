//! The PPO loop, in numbered steps: four roles over at most two frozen bases, two learners. Knows no file; `run::ppo`
//! reads them. Read state.rs for what a step does, then rollout.rs, experience.rs and update.rs.

use std::borrow::Cow;

use anyhow::Result;

use super::evaluate::Evaluation;
use super::state::{Minibatch, State};
use crate::config::{CriticStart, Optimised as _, Ppo, Ptx};
use crate::data::examples::Examples;
use crate::data::examples::batch_sampler::endless;
use crate::data::examples::objectives::SftExample;
use crate::error::Diverged;
use crate::invalid;
use crate::model::adapter::Adapter;
use crate::model::base::Base;
use crate::model::block::Recompute;
use crate::model::generate::SamplingParams;
use crate::model::roles::ValueModel;
use crate::report::{Figures, Report};
use crate::reward::source::RewardSource;
use crate::train::schedule::Schedule;
use crate::train::session::Session;
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
    /// The reward adapter with its head, where there is one: frozen; the critic starts as it, in a branch of its own.
    pub reward: Option<&'w Adapter>,
}

/// What a run is about, besides its settings.
#[derive(Clone, Copy)]
pub struct Task<'w> {
    /// Bases and adapters.
    pub start: Start<'w>,
    /// Prompts to be answered, as token ids.
    pub prompts: &'w dyn Examples<Vec<u32>>,
    /// Tokens that end a response.
    pub stop: &'w [u32],
    /// Gives the answers their scores.
    pub source: &'w dyn RewardSource,
    /// Renders token ids for samples.jsonl and for sources that read text.
    pub decode: &'w dyn Fn(&[u32]) -> String,
    /// Asked every `eval_every` iterations, where there is one.
    pub evaluation: Option<&'w Evaluation<'w>>,
    /// Blocks of text for the mixture with pretraining, where the settings have one.
    pub ptx: Option<&'w dyn Examples<SftExample>>,
    /// The pad token, where `compat` asks for DeepSpeed-Chat's rows. It is one of `stop`.
    pub pad: Option<u32>,
    /// Activations that each block recomputes in the backward pass; [`crate::planner::plan::resolve`] finds it where a
    /// config says `auto`.
    pub recompute: Recompute,
}

/// The trained branches.
#[derive(Clone, Debug)]
pub struct Trained {
    /// The aligned policy.
    pub actor: Adapter,
    /// The value function, where advantages needed one.
    pub critic: Option<Adapter>,
    /// The actor's moving average, where `ema_decay` is set.
    pub ema: Option<Adapter>,
    /// The last iteration's figures.
    pub last: Figures,
}

/// All of a run that stays as it is; [`State`] is all that changes.
#[derive(Clone, Copy)]
pub struct Run<'w> {
    /// Models and data.
    pub task: Task<'w>,
    /// Settings.
    pub config: &'w Ppo,
    /// Of every random choice.
    pub seed: u64,
    /// What blocks keep for the backward pass.
    pub checkpoint: Recompute,
}

impl<'w> Run<'w> {
    /// The mixture with pretraining and its blocks, where there is one.
    pub(super) fn mixture(&self) -> Option<(&'w Ptx, &'w dyn Examples<SftExample>)> {
        self.config.ptx.as_ref().filter(|ptx| ptx.coef > 0.0).zip(self.task.ptx)
    }

    /// # Errors
    /// Those of [`check`].
    pub fn new(task: Task<'w>, config: &'w Ppo, seed: u64) -> Result<Self> {
        check(task.start, task.prompts, config)?;
        anyhow::ensure!(
            task.pad.is_some() == config.compat.is_some(),
            "a task has a pad token where [ppo] has compat, and only there"
        );
        Ok(Self { task, config, seed, checkpoint: task.recompute })
    }

    /// The base that the critic is over.
    pub fn critic_base(&self) -> &'w Base {
        match self.config.critic {
            CriticStart::Actor => self.task.start.base,
            CriticStart::Reward | CriticStart::Own => self.task.start.reward_base,
        }
    }

    /// What logits are divided by before log-probabilities are taken; greedy decoding scores under 1, like `generate`, and
    /// DeepSpeed-Chat always does.
    pub fn temperature(&self) -> f64 {
        if self.config.temperature > 0.0 && self.task.pad.is_none() { self.config.temperature } else { 1.0 }
    }

    /// Sequences of one optimizer step.
    pub fn minibatch_size(&self) -> usize {
        self.config.batch_size.div_ceil(self.config.num_mini_batches)
    }

    /// The rates (actor, critic) of the state's next minibatch, by its place in the whole run.
    pub fn learning_rates(&self, state: &State) -> (f64, f64) {
        let c = self.config;
        let steps = c.iterations() * c.num_ppo_epochs * c.num_mini_batches;
        let at = (state.iteration * c.num_ppo_epochs + state.epoch) * c.num_mini_batches + state.minibatch;
        let rate = |lr| -> f64 {
            let schedule: Schedule = settings::schedule(&c.optimisation(), lr);
            schedule.lr_at(at, steps)
        };
        (rate(c.learning_rate), rate(c.critic_learning_rate()))
    }
}

/// Trains actor and critic.
///
/// # Errors
/// If there is no prompt, the two bases' vocabularies differ, a response runs past the context, the guard gives up, or the
/// process was asked to stop.
pub fn train(task: Task<'_>, config: &Ppo, seed: u64, session: &mut Session) -> Result<Trained> {
    train_then(task, config, seed, session, |_, _| Ok(())).map(|(trained, ())| trained)
}

/// As [`train`], and then `last` with what was trained: where it fails, the run's state is kept all the same.
///
/// # Errors
/// Those of [`train`] and of `last`.
pub fn train_then<T>(
    task: Task<'_>,
    config: &Ppo,
    seed: u64,
    session: &mut Session,
    last: impl FnOnce(&Trained, &mut Report) -> Result<T>,
) -> Result<(Trained, T)> {
    let run = Run::new(task, config, seed)?;
    let mut state = State::new(&run)?;
    if let Some(snapshot) = session.resumed()? {
        state.load(&snapshot, &run)?;
    }
    advance(&run, &mut state, session)?;
    let trained = Trained {
        actor: state.actor.weights().snapshot(),
        critic: state.critic.as_ref().map(|critic| critic.weights().snapshot()),
        ema: state.ema.clone(),
        last: state.last.clone(),
    };
    match last(&trained, &mut session.report) {
        Ok(found) => Ok((trained, found)),
        Err(error) => Err(session.failed(error, state.turns, || state.snapshot(&run))),
    }
}

/// Brings a run from where it stands to its end. Between any two turns of the loop it can be stopped and gone on with.
///
/// # Errors
/// If the guard gives up, the report cannot be written, or the process was asked to stop.
pub fn advance(run: &Run<'_>, state: &mut State, session: &mut Session) -> Result<()> {
    let iterations = run.config.iterations();
    session.report.stage("ppo", iterations);
    session.watch(&state.learners())?;
    while state.iteration < iterations {
        session.checkpoint(state.turns, || state.snapshot(run))?;
        let number = state.iteration + 1;
        if state.experience.is_none() {
            // 1. The actor answers; reference, critic and reward source read; rewards, advantages and returns follow.
            let rolled_out = state.roll_out(run).and_then(|()| state.check_rollout(session));
            if let Err(error) = rolled_out {
                if !error.is::<Diverged>() {
                    // A reward source that is dead, most of all: this rollout can be asked for again.
                    return Err(session.failed(error, state.turns, || state.snapshot(run)));
                }
                let rolled_out: Result<()> = Err(error);
                session.judge(number, rolled_out, &mut state.learners())?;
                state.skip_iteration();
            }
        } else if state.has_minibatch(run) {
            // 2. Updates: actor and critic, minibatch by minibatch, some passes over the rollout.
            let outcome = state.minibatch(run, session.lr_factor());
            let is_over = match session.judge(number, outcome, &mut state.learners())? {
                Some(Minibatch::Done) | None => true,
                Some(Minibatch::Stopped) => false,
            };
            if is_over {
                state.next_minibatch(run);
            }
        } else {
            // 3. Figures, and what is adapted between two iterations.
            if let Err(error) = state.end_iteration(run, &mut session.report) {
                // The rollout is still in hand: an evaluation whose source was dead is asked for again.
                return Err(session.failed(error, state.turns, || state.snapshot(run)));
            }
        }
    }
    // What is left, an evaluation, may ask sources that are dead.
    session.last_checkpoint(state.turns, || state.snapshot(run))?;
    session.report.done();
    Ok(())
}

/// How the actor is sampled, in rollouts and evaluations alike.
pub fn sampling(config: &Ppo, stop: &[u32]) -> SamplingParams {
    SamplingParams {
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
pub fn check(start: Start<'_>, prompts: &dyn Examples<Vec<u32>>, config: &Ppo) -> Result<()> {
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
    if start.reward.is_none() && config.advantage_estimator.has_critic() && config.critic == CriticStart::Reward {
        return Err(invalid!(
            "[ppo] critic = \"reward\" starts as the reward adapter, and there is none over the policy's tokens; use critic = \
             \"actor\" or \"own\", or an advantage_estimator without a critic"
        ));
    }
    start.reward.map_or(Ok(()), |reward| ValueModel::new(start.reward_base, reward).map(drop))?;
    let context = start.base.config().max_position_embeddings.min(start.reward_base.config().max_position_embeddings);
    let longest = prompts.longest_sequence();
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
///
/// # Errors
/// If the file they lie in is damaged.
pub fn choose(prompts: &dyn Examples<Vec<u32>>, from: usize, count: usize, seed: u64) -> Result<Vec<Vec<u32>>> {
    let rows = endless(seed, settings::PROMPT_ORDER, prompts.len(), from, count);
    rows.into_iter().map(|row| prompts.get(row).map(Cow::into_owned)).collect()
}

#[cfg(test)]
mod tests;
