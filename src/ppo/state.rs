//! The state of a PPO run: everything that changes during training, and the three steps that change it (rollout,
//! minibatch, end of an iteration). Between any two steps the state can be saved and restored, and the run continues as if
//! it had never stopped. It does not depend on files. Read `train.rs` for the loop, `update.rs` for a minibatch.

use anyhow::{Context, Result};

use super::ahead::{Ahead, ask};
use super::dynamic::collect_groups;
use super::ema::lerp;
use super::experience::{Experience, Scale};
use super::kl_controller::{AdaptiveKlController, RunningMoments, adapt_kl_penalty};
use super::metrics;
use super::pace::Pace;
use super::rollout::{Readers, collect, kl_to_sampler, logprobs_under, read};
use super::run::PpoRun;
use super::sampler::{self, Served, Started};
use super::update::{Step, Update};
use super::warnings::{FIRST_STEPS, Monitor, WatchedMetrics};
use crate::config::{CriticStart, ImportanceSamplingCorrection, KlEstimator, KlIn, Optimised as _, PolicyLoss};
use crate::data::examples::Examples;
use crate::data::examples::batch_sampler::endless;
use crate::error::Diverged;
use crate::host::give_back_freed;
use crate::host::meter::{Phase, within};
use crate::invalid;
use crate::model::adapter::{Adapter, HeadBias};
use crate::model::roles::Policy;
use crate::report::{Metrics, Report, number};
use crate::rng::{SplitMix64, derive};
use crate::stats::Histogram;
use crate::train::learner::Learner;
use crate::train::session::Session;
use crate::train::settings;
use crate::train::snapshot::Snapshot;

/// Outcome of a minibatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Minibatch {
    /// The minibatch is over.
    Done,
    /// The process was asked to stop; the state is unchanged.
    Stopped,
}

/// The state of a PPO run.
#[derive(Debug)]
pub struct State {
    /// Policy under training.
    pub actor: Learner,
    /// Value function under training, if the advantage estimator has a critic.
    pub critic: Option<Learner>,
    /// Reference policy of the KL: the SFT adapter, unless `ref_model_sync_iterations` updates it. None where no KL is
    /// measured.
    pub reference: Option<Adapter>,
    /// Exponential moving average of the actor, if `ema_decay` is set.
    pub ema: Option<Adapter>,
    /// Completed iterations.
    pub iteration: usize,
    /// Completed epochs (passes over the current rollout).
    pub epoch: usize,
    /// Completed minibatches of the current epoch.
    pub minibatch: usize,
    /// Optimizer steps of the actor so far.
    pub step: usize,
    /// Minibatches so far, including those without an optimizer step. Checkpoints are numbered by it.
    pub turns: usize,
    /// Prompts that dynamic sampling has taken so far beside those of each iteration.
    pub extra_prompts: usize,
    /// Coefficient of the KL to the reference.
    pub kl_coef: f64,
    /// Coefficient of the KL to the policy that sampled the rollout, if `policy_loss = "kl_penalty"`.
    pub kl_penalty: f64,
    /// Running mean and standard deviation of all scores.
    pub scores: RunningMoments,
    /// The current rollout with its rewards and advantages; `None` between two iterations.
    pub experience: Option<Experience>,
    /// The next iteration's rollout, where a server samples it ahead.
    pub ahead: Option<Ahead>,
    /// The previous rollout, under `compat`: it is trained on again if every response of a rollout is dropped.
    pub previous: Option<Experience>,
    /// Running sums over this iteration's minibatches.
    pub update: Update,
    /// Warnings about the course of the metrics.
    pub monitor: Monitor,
    /// Metrics of the last completed iteration.
    pub last: Metrics,
    /// The phases' clocks; no snapshot holds them.
    pub pace: Pace,
}

impl State {
    /// The state before the first rollout.
    ///
    /// # Errors
    /// If a tensor cannot be allocated, or the critic has nothing to be initialised from.
    pub fn new(run: &PpoRun<'_>) -> Result<Self> {
        let config = run.config;
        let adamw = settings::adamw(&config.optimisation());
        let critic = match config.advantage_estimator.has_critic() {
            true => {
                // DeepSpeed-Chat's head has no bias.
                let bias = if config.compat.is_some() { HeadBias::Fixed } else { HeadBias::Trained };
                let weights = initial_critic(run)?.to_trainable().with_head_bias(bias)?;
                Some(Learner::new(weights, adamw, config.max_grad_norm)?)
            }
            false => None,
        };
        Ok(Self {
            actor: Learner::new(run.sft.to_trainable(), adamw, config.max_grad_norm)?,
            critic,
            reference: config.measure_kl.then(|| run.sft.clone()),
            ema: config.ema_decay.map(|_| run.sft.clone()),
            iteration: 0,
            epoch: 0,
            minibatch: 0,
            step: 0,
            turns: 0,
            extra_prompts: 0,
            kl_coef: config.kl_coef,
            kl_penalty: config.kl_penalty_coef,
            scores: RunningMoments::default(),
            experience: None,
            ahead: None,
            previous: None,
            update: Update::default(),
            monitor: Monitor::default(),
            last: Metrics::new(),
            pace: Pace::default(),
        })
    }

    /// Samples responses to the iteration's prompts, scores them by reference, critic and reward source, and computes KL,
    /// rewards, advantages and returns.
    ///
    /// # Errors
    /// Those of generation, of the forward passes and of the reward source; if a value is NaN or infinite; if the process is
    /// asked to stop while it waits for a sampler, and the state is then unchanged.
    pub fn roll_out(&mut self, run: &PpoRun<'_>) -> Result<()> {
        let config = run.config;
        let count = config.batch_size / config.num_generations;
        let readers = Readers {
            reference: self.reference.as_ref().map(|reference| Policy::new(run.base, Some(reference))),
            critic: self.critic.as_ref().map(|critic| (run.critic_base(), critic)),
            exact_kl: config.kl_estimator == KlEstimator::Exact && config.kl_in == KlIn::Reward,
            last_values: config.bootstrap_truncated && self.critic.is_some(),
            source: run.source,
            entries: &[],
            decode: run.decode,
            recomputes: run.sampler.is_some()
                || config.importance_sampling_correction != ImportanceSamplingCorrection::None,
            pad: run.pad,
            sharing: run.sharing,
            world: run.world,
        };
        run.source.set_progress(self.iteration as f64 / config.iterations().saturating_sub(1).max(1) as f64);
        let actor = Policy::new(run.base, Some(self.actor.weights().view()));
        let rollout = collect_groups(config, |before, wanted| {
            let asked = ask(run, self.iteration, self.extra_prompts, (before, wanted))?;
            let readers = Readers { entries: &asked.entries, ..readers };
            let Some(sampler) = run.sampler else {
                return collect(actor, readers, asked.prompts, &asked.seeds, &asked.sampling, config.at_once());
            };
            let generating = within(Phase::Rollout);
            // Rank 0 asks for all.
            let responses = run.world.first_waiting(|| {
                let (sampled, sampled_from) = match &mut self.ahead {
                    Some(ahead) => (ahead.responses(sampler, &asked), Policy::new(run.base, Some(&ahead.adapter))),
                    None => {
                        let weights = self.actor.weights().view();
                        let started = sampler.start(weights, self.iteration, asked.clone(), true);
                        (started.and_then(Started::wait), actor)
                    }
                };
                sampled.map_err(|error| sampler::cause(error, sampled_from, &asked.prompts))
            })?;
            drop(generating);
            let mut rollout = read(actor, readers, asked.prompts, responses, run.temperature())?;
            let version = match &self.ahead {
                Some(Ahead { adapter, .. }) => {
                    let older = Policy::new(run.base, Some(adapter));
                    Some(logprobs_under(older, &rollout, run.temperature(), run.world)?)
                }
                None => None,
            };
            let unreported = sampler::fill(&mut rollout, version.as_deref())?;
            let mismatch = sampler::check(&rollout, version.as_deref(), (sampler.max_mismatch(), sampler.to_check()))?;
            let lag = self.ahead.as_ref().map_or(0, |ahead| self.iteration - ahead.version);
            rollout.served = Served { lag, mismatch, unreported };
            Ok(rollout)
        })?;
        self.ahead = None;
        self.extra_prompts += rollout.sampled.groups.saturating_sub(count);
        // The updates allocate other sizes than KV cache and scoring passes did.
        give_back_freed();
        if rollout.prompts.is_empty() {
            let previous = self.previous.clone().ok_or_else(|| {
                invalid!(
                    "[ppo] compat = \"dschat\" drops responses of at most one token, and those are all of the first rollout's; \
                     start from an SFT adapter that writes longer ones, or sample at temperature = 1"
                )
            })?;
            self.experience = Some(previous);
            (self.epoch, self.minibatch, self.update) = (0, 0, Update::default());
            return Ok(());
        }
        if config.use_score_scaling {
            self.scores.add(&rollout.scores);
        }
        let shift = if config.use_score_norm { self.scores.mean() } else { 0.0 };
        let scale = Scale { kl_coef: self.kl_coef, shift, deviation: self.scores.deviation() };
        self.experience = Some(Experience::of(rollout, scale, config)?);
        (self.epoch, self.minibatch, self.update) = (0, 0, Update::default());
        Ok(())
    }

    /// Has a server begin the next iteration's rollout, if `async_rollouts` asks for it, there is a next iteration and it has not
    /// begun. Called before each minibatch.
    ///
    /// # Errors
    /// Those of the sampler.
    pub fn sample_ahead(&mut self, run: &PpoRun<'_>) -> Result<()> {
        let (config, next) = (run.config, self.iteration + 1);
        let Some(sampler) = run.sampler.filter(|_| config.samples_ahead() && next < config.iterations()) else {
            return Ok(());
        };
        let ahead = self.ahead.get_or_insert_with(|| Ahead::new(self.actor.weights().snapshot(), self.iteration));
        let groups = config.batch_size / config.num_generations;
        if ahead.begun {
            return Ok(());
        }
        ahead.begun = true;
        // Rank 0 asks for all.
        run.world.first(|| ahead.start(sampler, ask(run, next, self.extra_prompts, (0, groups))?))
    }

    /// Whether the current rollout has another minibatch to train on.
    pub fn has_minibatch(&self, run: &PpoRun<'_>) -> bool {
        self.experience.is_some() && self.epoch < run.config.num_ppo_epochs
    }

    /// Trains on one minibatch: gradients of actor and critic, then an optimizer step of each. `lr_factor` multiplies the
    /// learning rates.
    ///
    /// # Errors
    /// If there is no current rollout, or a value is NaN or infinite.
    pub fn minibatch(&mut self, run: &PpoRun<'_>, lr_factor: f64) -> Result<Minibatch> {
        let config = run.config;
        let experience = self.experience.as_ref().context("a minibatch needs a rollout, and there is none")?;
        let path = [settings::MINIBATCH_ORDER, self.iteration as u64, self.epoch as u64];
        let order = SplitMix64::new(derive(run.seed, &path)).permutation(experience.rollout.prompts.len());
        // If responses were dropped, the last minibatches may be empty.
        let Some(rows) = order.chunks(run.minibatch_size()).nth(self.minibatch) else { return Ok(Minibatch::Done) };
        let (actor_lr, critic_lr) = self.learning_rates(run);
        let step = Step {
            run,
            experience,
            rows,
            reference: self.reference.as_ref(),
            actor_lr: actor_lr * lr_factor,
            critic_lr: critic_lr * lr_factor,
            kl_coef: self.kl_coef,
            kl_penalty: self.kl_penalty,
            first_epoch: self.epoch == 0,
            actor_steps: self.step,
        };
        let trains_actor = self.iteration >= config.critic_warmup;
        let mut update = self.update.clone();
        let stepped = update.minibatch(trains_actor.then_some(&mut self.actor), self.critic.as_mut(), &step)?;
        self.update = match stepped {
            Some(_) => update,
            None => return Ok(Minibatch::Stopped),
        };
        self.step += usize::from(stepped == Some(true) && trains_actor);
        if let (Some(decay), Some(ema)) = (config.ema_decay, &mut self.ema) {
            *ema = lerp(ema, self.actor.weights().view(), 1.0 - decay)?;
        }
        Ok(Minibatch::Done)
    }

    /// Learning rates (actor, critic) of the next minibatch, by its position in the whole run.
    fn learning_rates(&self, run: &PpoRun<'_>) -> (f64, f64) {
        let c = run.config;
        let steps = c.iterations() * c.num_ppo_epochs * c.num_mini_batches;
        let at = (self.iteration * c.num_ppo_epochs + self.epoch) * c.num_mini_batches + self.minibatch;
        let rate = |lr| settings::schedule(&c.optimisation(), lr).lr_at(at, steps);
        (rate(c.learning_rate), rate(c.critic_learning_rate()))
    }

    /// Counts a minibatch as completed, whether it stepped or was skipped. Ends the epochs early beyond `target_kl`.
    pub fn next_minibatch(&mut self, run: &PpoRun<'_>) {
        self.turns += 1;
        self.minibatch += 1;
        if self.minibatch == run.config.num_mini_batches {
            (self.epoch, self.minibatch) = (self.epoch + 1, 0);
        }
        let target = run.config.target_kl.unwrap_or(f64::INFINITY);
        if self.update.last_policy.approx_kl() > 1.5 * target {
            (self.epoch, self.minibatch) = (run.config.num_ppo_epochs, 0);
        }
    }

    /// Checks the current rollout against the limits of `[guard]`.
    ///
    /// # Errors
    /// A divergence that names the limit that is exceeded.
    pub fn check_rollout(&self, session: &mut Session) -> Result<()> {
        let experience = self.experience.as_ref().context("there is no current rollout")?;
        let responses = experience.rollout.responses.len() as f64;
        session
            .check_rollout(experience.mean_kl().unwrap_or(0.0), experience.rollout.response_tokens() as f64 / responses)
    }

    /// Drops the current rollout and counts the iteration as completed.
    pub fn skip_iteration(&mut self) {
        (self.experience, self.ahead) = (None, None);
        self.iteration += 1;
    }

    /// The learners, under their names in a snapshot.
    pub fn learners(&mut self) -> Vec<(&'static str, &mut Learner)> {
        let critic = self.critic.as_mut().map(|critic| ("critic", critic));
        [("actor", &mut self.actor)].into_iter().chain(critic).collect()
    }

    /// Copies the whole state.
    ///
    /// # Errors
    /// If a tensor cannot be allocated.
    pub fn snapshot(&self, run: &PpoRun<'_>) -> Result<Snapshot> {
        let mut into = Snapshot::default();
        into.put_learner("actor", &self.actor)?;
        self.critic.as_ref().map_or(Ok(()), |critic| into.put_learner("critic", critic))?;
        if let Some(reference) = self.reference.as_ref().filter(|_| run.config.ref_model_sync_iterations > 0) {
            into.put_adapter("reference", reference)?;
        }
        self.ema.as_ref().map_or(Ok(()), |ema| into.put_adapter("ema", ema))?;
        into.put("place", &(self.iteration, self.epoch, self.minibatch, self.step, self.turns))?;
        if run.config.dynamic_sampling_rollouts > 0 {
            into.put("extra_prompts", &self.extra_prompts)?;
        }
        self.ahead.as_ref().map_or(Ok(()), |ahead| ahead.save(&mut into))?;
        into.put("kl", &(self.kl_coef, self.kl_penalty))?;
        into.put("scores", &self.scores)?;
        for (name, rows, experience) in
            [("experience", "reference_rows", &self.experience), ("previous", "previous_rows", &self.previous)]
        {
            into.put(name, experience)?;
            if let Some(experience) = experience {
                into.put_rows(rows, &experience.rollout.ref_hidden)?;
            }
        }
        into.put("update", &self.update)?;
        into.put("watch", &self.monitor)?;
        into.put("last", &self.last)?;
        into.put("source", &run.source.state())?;
        Ok(into)
    }

    /// Restores a snapshot of the same run.
    ///
    /// # Errors
    /// If an entry is missing or has another shape.
    pub fn load(&mut self, from: &Snapshot, run: &PpoRun<'_>) -> Result<()> {
        self.learners().into_iter().try_for_each(|(name, learner)| from.restore_learner(name, learner))?;
        if let Some(reference) = self.reference.as_mut().filter(|_| run.config.ref_model_sync_iterations > 0) {
            *reference = from.adapter("reference", reference)?;
        }
        if let Some(ema) = &mut self.ema {
            *ema = from.adapter("ema", ema)?;
        }
        (self.iteration, self.epoch, self.minibatch, self.step, self.turns) = from.get("place")?;
        if run.config.dynamic_sampling_rollouts > 0 {
            self.extra_prompts = from.get("extra_prompts")?;
        }
        self.ahead = Ahead::load(from, run.sft)?;
        (self.kl_coef, self.kl_penalty) = from.get("kl")?;
        self.scores = from.get("scores")?;
        for (name, rows, experience) in
            [("experience", "reference_rows", &mut self.experience), ("previous", "previous_rows", &mut self.previous)]
        {
            *experience = from.get(name)?;
            if let Some(experience) = experience {
                experience.rollout.ref_hidden = from.rows(rows)?;
            }
        }
        self.update = from.get("update")?;
        self.monitor = from.get("watch")?;
        self.last = from.get("last")?;
        run.source.restore(&from.get("source")?);
        Ok(())
    }

    /// Logs metrics (under TRL's names) and samples of the iteration, then adapts KL coefficients and reference.
    ///
    /// # Errors
    /// If there is no current rollout, the evaluation's reward source fails, or the report cannot be written. The state is
    /// then unchanged, and the iteration can be ended again.
    pub fn end_iteration(&mut self, run: &PpoRun<'_>, report: &mut Report) -> Result<()> {
        let config = run.config;
        let kl_to_old = self.kl_to_old(run)?;
        let experience = self.experience.take().context("an iteration needs a rollout to end, and there is none")?;
        let (last, monitor) = (self.last.clone(), self.monitor.clone());
        if let Err(error) = self.log(&experience, kl_to_old, run, report) {
            (self.experience, self.last, self.monitor) = (Some(experience), last, monitor);
            return Err(error);
        }
        self.previous = config.compat.map(|_| experience.clone());
        self.iteration += 1;
        if config.adap_kl_ctrl {
            let controller = AdaptiveKlController { target: config.target, horizon: config.horizon };
            self.kl_coef = controller.next(self.kl_coef, experience.mean_kl().unwrap_or(0.0), config.batch_size);
        }
        if let Some(kl) = kl_to_old {
            self.kl_penalty = adapt_kl_penalty(self.kl_penalty, kl, config.kl_penalty_target);
        }
        let every = config.ref_model_sync_iterations;
        if let Some(reference) = self.reference.as_mut().filter(|_| every > 0 && self.iteration.is_multiple_of(every)) {
            *reference = lerp(reference, self.actor.weights().view(), config.ref_model_mixup_alpha)?;
        }
        Ok(())
    }

    /// The KL by which the penalty's weight is adapted: from the policy that sampled the current rollout to the actor after
    /// the last of its updates (arXiv:1707.06347 section 4), over the whole rollout. `None` if no penalty is adapted or the
    /// actor made no update.
    fn kl_to_old(&self, run: &PpoRun<'_>) -> Result<Option<f64>> {
        let adapts = run.config.policy_loss == PolicyLoss::KlPenalty && self.update.minibatches > 0;
        let Some(experience) = self.experience.as_ref().filter(|_| adapts) else { return Ok(None) };
        let actor = Policy::new(run.base, Some(self.actor.weights().view()));
        kl_to_sampler(actor, &experience.rollout, run.temperature(), run.world).map(Some)
    }

    /// Logs the iteration's metrics, samples, evaluation and warnings.
    fn log(
        &mut self,
        experience: &Experience,
        kl_to_old: Option<f64>,
        run: &PpoRun<'_>,
        report: &mut Report,
    ) -> Result<()> {
        let config = run.config;
        let (coefficients, name) = ((self.kl_coef, self.kl_penalty), config.origin.name());
        self.last = metrics::iteration(experience, &self.update, self.iteration, coefficients, kl_to_old, run);
        self.last.extend(experience.rollout.source_metrics.clone());
        // A source knows the last responses that it scored, which are not all where groups were refilled.
        for part in experience.rollout.parts.iter().filter(|_| experience.rollout.sampled.refills > 0) {
            let mean = part.scores.iter().map(|&s| f64::from(s)).sum::<f64>() / part.scores.len() as f64;
            self.last.insert(format!("rewards/{}/mean", part.name), number(mean));
        }
        let now = self.iteration + 1;
        let due = config.eval_every > 0 && now.is_multiple_of(config.eval_every);
        let scores = experience.rollout.scores.iter().map(|&score| f64::from(score));
        let scores = Histogram::of(scores).map(|found| ("histogram/objective/scores".to_owned(), found.to_json()));
        let mut distributions: Metrics = scores.into_iter().collect();
        if let Some(evaluation) = run.evaluation.filter(|_| due) {
            match evaluation.run(&now.into(), self.actor.weights().view(), report) {
                Ok(evaluated) => {
                    self.last.extend(evaluation.metrics(&evaluated));
                    distributions.extend(evaluated.distributions());
                }
                // The next rollout uses the same weights, and the guard checks it.
                Err(error) if error.is::<Diverged>() => report.warn(&format!("{name}: no evaluation {now}: {error}")),
                Err(error) => return Err(error),
            }
        }
        let flat = experience.advantages.iter().flatten().all(|&a| a == 0.0);
        let zero_b = self.step >= FIRST_STEPS && self.actor.weights().view().is_unmoved()?;
        let watched = WatchedMetrics::of(&self.last, experience.rollout.prompts.len(), flat);
        let (active, new) = self.monitor.add(WatchedMetrics { zero_b, ..watched });
        if !active.is_empty() {
            self.last.insert("warnings".into(), active.iter().map(|w| w.name()).collect::<Vec<_>>().into());
        }
        for warning in new {
            report.warn(&format!("{name}: warning at iteration {now}: {}", warning.text(config.origin)));
        }
        let shown = ["objective/scores", "objective/kl", "policy/clipfrac_avg", "loss/value_avg"];
        let mut line = self.last.clone();
        line.extend(self.pace.lap(experience, config, report));
        line.extend(distributions);
        if let Some(lap) = run.world.lap()? {
            lap.warning.iter().for_each(|text| report.warn(&format!("{name}: warning: {text}")));
            line.extend(lap.metrics());
        }
        report.step(now, &line, &shown)?;
        metrics::samples(experience, now, run, report)
    }
}

/// Initial adapter of the critic.
fn initial_critic(run: &PpoRun<'_>) -> Result<Adapter> {
    let head = derive(run.seed, &[settings::HEAD]);
    match run.config.critic {
        CriticStart::Reward => Ok(run.reward.context("critic = \"reward\" needs a reward adapter")?.clone()),
        CriticStart::Actor => run.sft.clone().with_head(head),
        CriticStart::Own => {
            let fresh = derive(run.seed, &[settings::CRITIC_INIT]);
            Adapter::init(run.sft.config().clone(), run.reward_base.shapes(), fresh)?.with_head(head)
        }
    }
}

/// Selects prompts `from..from + count` of an endless sequence of shuffled passes over all prompts, each with the number of
/// its record.
///
/// # Errors
/// If the file that holds them is damaged.
pub(super) fn select_prompts(
    prompts: &dyn Examples<Vec<u32>>,
    from: usize,
    count: usize,
    seed: u64,
) -> Result<Vec<(usize, Vec<u32>)>> {
    let rows = endless(seed, settings::PROMPT_ORDER, prompts.len(), from, count);
    rows.into_iter().map(|row| Ok((prompts.entry(row)?, prompts.get(row)?.into_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_prompt_is_selected_once_per_pass_and_each_pass_has_its_own_order() {
        let prompts: Vec<Vec<u32>> = (0..7).map(|i| vec![i]).collect();
        // 21 prompts are three passes; rollouts of 4 cross their borders.
        let select = |from: usize, count: usize, seed: u64| -> Vec<Vec<u32>> {
            let (entries, selected): (Vec<usize>, Vec<_>) =
                select_prompts(&prompts, from, count, seed).unwrap().into_iter().unzip();
            assert!(entries.iter().zip(&selected).all(|(&entry, prompt)| prompts[entry] == *prompt));
            selected
        };
        let selected: Vec<Vec<u32>> = (0..6).flat_map(|i| select(i * 4, 4, 5)).take(21).collect();
        let passes: Vec<&[Vec<u32>]> = selected.chunks(7).collect();
        for pass in &passes {
            let mut sorted = pass.to_vec();
            sorted.sort();
            assert_eq!(sorted, prompts);
        }
        assert!(passes[0] != passes[1] && passes[1] != passes[2]);
        assert_ne!(select(0, 7, 6), passes[0], "another seed");
        assert_eq!(select(0, 21, 5), selected, "one rollout longer than the list");
    }
}
