//! All that changes in the course of a PPO run, in one place, and the three ways in which it changes: a rollout, a
//! minibatch, the end of an iteration. Between any two of them the state is whole: saved and read back, the run goes on
//! as if it had never stopped. Knows no file. Read train.rs for the loop, update.rs for a minibatch.

use anyhow::{Context, Result};

use super::experience::{Experience, Scale};
use super::rollout::{Readers, collect};
use super::train::{Run, choose, sampling};
use super::update::{Learners, Step, Update};
use super::warnings::{Vitals, Watch};
use crate::config::{CriticStart, KlEstimator, KlIn, Optimised as _, PolicyLoss};
use crate::error::Diverged;
use crate::host::give_back_freed;
use crate::invalid;
use crate::model::adapter::{Adapter, HeadBias};
use crate::model::roles::{Policy, ValueModel};
use crate::ppo::ema::towards;
use crate::ppo::kl_controller::{AdaptiveKl, RunningMoments, lagrange};
use crate::ppo::metrics;
use crate::report::{Figures, Report};
use crate::rng::{SplitMix64, derive};
use crate::train::learner::Learner;
use crate::train::session::Session;
use crate::train::settings;
use crate::train::snapshot::Snapshot;

/// How a minibatch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Minibatch {
    /// Both learners stepped.
    Done,
    /// The process was asked to stop; nothing has changed.
    Stopped,
}

/// Where a run stands.
#[derive(Debug)]
pub struct State {
    /// The policy under training.
    pub actor: Learner,
    /// The value function under training, where advantages need one.
    pub critic: Option<Learner>,
    /// What the KL is measured against: the SFT adapter, until it is refreshed.
    pub reference: Adapter,
    /// The actor's moving average, where one is kept.
    pub ema: Option<Adapter>,
    /// Iterations that are over.
    pub iteration: usize,
    /// Passes over the rollout in hand that are over.
    pub epoch: usize,
    /// Minibatches of this pass that are over.
    pub minibatch: usize,
    /// Optimizer steps of the actor so far.
    pub step: usize,
    /// Minibatches so far, also those without a step: what checkpoints are numbered by.
    pub turns: usize,
    /// The weight of the KL to the reference.
    pub kl_coef: f64,
    /// The weight of the KL to the actor that sampled, where the policy loss has one.
    pub kl_penalty: f64,
    /// Mean and deviation of all scores so far.
    pub scores: RunningMoments,
    /// The rollout in hand with what was made of it; none between two iterations.
    pub experience: Option<Experience>,
    /// The one before, under `compat`: what is learnt from where every answer of a rollout is dropped.
    pub previous: Option<Experience>,
    /// Running sums over this iteration's minibatches.
    pub update: Update,
    /// What the figures are watched for.
    pub watch: Watch,
    /// The figures of the last iteration that is over.
    pub last: Figures,
}

impl State {
    /// Before the first rollout.
    ///
    /// # Errors
    /// If a tensor cannot be made, or there is nothing that a critic could start as.
    pub fn new(run: &Run<'_>) -> Result<Self> {
        let (start, config) = (run.task.start, run.config);
        let adamw = settings::adamw(&config.optimisation());
        let critic = match config.advantage_estimator.has_critic() {
            true => {
                // DeepSpeed-Chat's head has no bias.
                let bias = if config.compat.is_some() { HeadBias::Fixed } else { HeadBias::Trained };
                let weights = critic_start(run)?.to_trainable().with_head_bias(bias)?;
                Some(Learner::new(weights, adamw, config.max_grad_norm)?)
            }
            false => None,
        };
        Ok(Self {
            actor: Learner::new(start.sft.to_trainable(), adamw, config.max_grad_norm)?,
            critic,
            reference: start.sft.clone(),
            ema: config.ema_decay.map(|_| start.sft.clone()),
            iteration: 0,
            epoch: 0,
            minibatch: 0,
            step: 0,
            turns: 0,
            kl_coef: config.kl_coef,
            kl_penalty: config.kl_penalty_coef,
            scores: RunningMoments::default(),
            experience: None,
            previous: None,
            update: Update::default(),
            watch: Watch::default(),
            last: Figures::new(),
        })
    }

    /// The actor answers the iteration's prompts; reference, critic and reward source read. The views end here. Then KL,
    /// shaped rewards, advantages and returns.
    ///
    /// # Errors
    /// Those of generation, of the views and of the reward source; if a number is not finite.
    pub fn roll_out(&mut self, run: &Run<'_>) -> Result<()> {
        let (start, config) = (run.task.start, run.config);
        let iteration = self.iteration as u64;
        let asked = config.batch_size / config.num_generations;
        let prompts = choose(run.task.prompts, self.iteration * asked, asked, run.seed)?;
        let prompts: Vec<Vec<u32>> =
            prompts.into_iter().flat_map(|prompt| std::iter::repeat_n(prompt, config.num_generations)).collect();
        let seeds: Vec<u64> =
            (0..prompts.len() as u64).map(|i| derive(run.seed, &[settings::ROLLOUT, iteration, i])).collect();
        let readers = Readers {
            reference: Policy::new(start.base, Some(&self.reference)),
            critic: self.critic.as_ref().map(|c| ValueModel::new(run.critic_base(), c.weights().view())).transpose()?,
            exact_kl: config.kl_estimator == KlEstimator::Exact && config.kl_in == KlIn::Reward,
            source: run.task.source,
        };
        let actor = Policy::new(start.base, Some(self.actor.weights().view()));
        let sampling = sampling(config, run.task.stop);
        let rollout = collect(actor, readers, &run.task, prompts, &seeds, &sampling, config.at_once())?;
        // Caches and passes of other sizes than those that the updates take.
        give_back_freed();
        if rollout.prompts.is_empty() {
            let previous = self.previous.clone().ok_or_else(|| {
                invalid!(
                    "[ppo] compat = \"dschat\" drops answers of one token or none, and so all of the first rollout's; start \
                     from an SFT adapter that answers, or sample at temperature = 1"
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

    /// Is there a minibatch left of the rollout in hand?
    pub fn has_minibatch(&self, run: &Run<'_>) -> bool {
        self.experience.is_some() && self.epoch < run.config.num_ppo_epochs
    }

    /// One minibatch: gradients of actor and critic, then a step of each. Nothing has changed where it was stopped.
    /// `factor` multiplies the learning rates.
    ///
    /// # Errors
    /// If there is no rollout in hand, or a number is not finite.
    pub fn minibatch(&mut self, run: &Run<'_>, factor: f64) -> Result<Minibatch> {
        let config = run.config;
        let experience = self.experience.as_ref().context("a minibatch is of a rollout, and there is none in hand")?;
        let path = [settings::MINIBATCH_ORDER, self.iteration as u64, self.epoch as u64];
        let order = SplitMix64::new(derive(run.seed, &path)).permutation(experience.rollout.prompts.len());
        // Where answers were dropped, the last minibatches may have none.
        let Some(rows) = order.chunks(run.minibatch_size()).nth(self.minibatch) else { return Ok(Minibatch::Done) };
        let (actor_lr, critic_lr) = run.learning_rates(self);
        let step = Step {
            actor_lr: actor_lr * factor,
            critic_lr: critic_lr * factor,
            kl_coef: self.kl_coef,
            kl_penalty: self.kl_penalty,
            first_pass: self.epoch == 0,
            number: self.step,
        };
        let learns = self.iteration >= config.critic_warmup;
        let learners = Learners {
            actor: learns.then_some(&mut self.actor),
            critic: self.critic.as_mut(),
            reference: &self.reference,
        };
        let mut update = self.update.clone();
        let stepped = update.minibatch(learners, experience, rows, run, &step)?;
        self.update = match stepped {
            Some(_) => update,
            None => return Ok(Minibatch::Stopped),
        };
        self.step += usize::from(stepped == Some(true) && learns);
        if let (Some(decay), Some(ema)) = (config.ema_decay, &mut self.ema) {
            *ema = towards(ema, self.actor.weights().view(), 1.0 - decay)?;
        }
        Ok(Minibatch::Done)
    }

    /// Counts a minibatch as over, done or skipped.
    pub fn next_minibatch(&mut self, run: &Run<'_>) {
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

    /// Is the rollout in hand within the guard's limits?
    ///
    /// # Errors
    /// A divergence that says which it passes.
    pub fn check_rollout(&self, session: &mut Session) -> Result<()> {
        let experience = self.experience.as_ref().context("there is no rollout in hand")?;
        let answers = experience.rollout.responses.len() as f64;
        session.check_rollout(experience.mean_kl(), experience.rollout.response_tokens() as f64 / answers)
    }

    /// Drops the rollout of this iteration and counts it as over.
    pub fn skip_iteration(&mut self) {
        self.experience = None;
        self.iteration += 1;
    }

    /// Who learns, under the names by which a snapshot holds them.
    pub fn learners(&mut self) -> Vec<(&'static str, &mut Learner)> {
        let critic = self.critic.as_mut().map(|critic| ("critic", critic));
        [("actor", &mut self.actor)].into_iter().chain(critic).collect()
    }

    /// A copy of everything.
    ///
    /// # Errors
    /// Only if a tensor cannot be made.
    pub fn snapshot(&self, run: &Run<'_>) -> Result<Snapshot> {
        let mut into = Snapshot::default();
        into.put_learner("actor", &self.actor)?;
        self.critic.as_ref().map_or(Ok(()), |critic| into.put_learner("critic", critic))?;
        if run.config.ref_model_sync_iterations > 0 {
            into.put_adapter("reference", &self.reference)?;
        }
        self.ema.as_ref().map_or(Ok(()), |ema| into.put_adapter("ema", ema))?;
        into.put("place", &(self.iteration, self.epoch, self.minibatch, self.step, self.turns))?;
        into.put("kl", &(self.kl_coef, self.kl_penalty))?;
        into.put("scores", &self.scores)?;
        for (name, rows, experience) in
            [("experience", "reference_rows", &self.experience), ("previous", "previous_rows", &self.previous)]
        {
            into.put(name, experience)?;
            if let Some(experience) = experience {
                into.put_rows(rows, &experience.rollout.reference_rows)?;
            }
        }
        into.put("update", &self.update)?;
        into.put("watch", &self.watch)?;
        into.put("last", &self.last)?;
        into.put("source", &run.task.source.state())?;
        Ok(into)
    }

    /// Goes back to one that was taken in the same run.
    ///
    /// # Errors
    /// If something is missing or of another shape.
    pub fn load(&mut self, from: &Snapshot, run: &Run<'_>) -> Result<()> {
        self.learners().into_iter().try_for_each(|(name, learner)| from.restore_learner(name, learner))?;
        if run.config.ref_model_sync_iterations > 0 {
            self.reference = from.adapter("reference", &self.reference)?;
        }
        if let Some(ema) = &mut self.ema {
            *ema = from.adapter("ema", ema)?;
        }
        (self.iteration, self.epoch, self.minibatch, self.step, self.turns) = from.get("place")?;
        (self.kl_coef, self.kl_penalty) = from.get("kl")?;
        self.scores = from.get("scores")?;
        for (name, rows, experience) in
            [("experience", "reference_rows", &mut self.experience), ("previous", "previous_rows", &mut self.previous)]
        {
            *experience = from.get(name)?;
            if let Some(experience) = experience {
                experience.rollout.reference_rows = from.rows(rows)?;
            }
        }
        self.update = from.get("update")?;
        self.watch = from.get("watch")?;
        self.last = from.get("last")?;
        run.task.source.restore(&from.get("source")?);
        Ok(())
    }

    /// Figures and samples of the iteration, under the names that TRL's users know; then what is adapted between two
    /// iterations.
    ///
    /// # Errors
    /// If there is no rollout in hand, a source of the evaluation is dead, or the report cannot be written; the state is
    /// then as it was, and the iteration can be ended again.
    pub fn end_iteration(&mut self, run: &Run<'_>, report: &mut Report) -> Result<()> {
        let config = run.config;
        let experience = self.experience.take().context("an iteration ends with its rollout, and there is none")?;
        let (last, watch) = (self.last.clone(), self.watch.clone());
        if let Err(error) = self.tell(&experience, run, report) {
            (self.experience, self.last, self.watch) = (Some(experience), last, watch);
            return Err(error);
        }
        self.previous = config.compat.map(|_| experience.clone());
        self.iteration += 1;
        if config.adap_kl_ctrl {
            let control = AdaptiveKl { target: config.target, horizon: config.horizon };
            self.kl_coef = control.next(self.kl_coef, experience.mean_kl(), config.batch_size);
        }
        if config.policy_loss == PolicyLoss::KlPenalty && self.update.minibatches > 0 {
            let kl = self.update.last_policy.kl_to_old();
            self.kl_penalty = lagrange(self.kl_penalty, kl, config.kl_penalty_target);
        }
        if config.ref_model_sync_iterations > 0 && self.iteration.is_multiple_of(config.ref_model_sync_iterations) {
            self.reference = towards(&self.reference, self.actor.weights().view(), config.ref_model_mixup_alpha)?;
        }
        Ok(())
    }

    /// The iteration's figures and samples, its evaluation and its warnings.
    fn tell(&mut self, experience: &Experience, run: &Run<'_>, report: &mut Report) -> Result<()> {
        let config = run.config;
        self.last = metrics::of(experience, self, run);
        self.last.extend(experience.rollout.told.clone());
        let now = self.iteration + 1;
        let due = config.eval_every > 0 && now.is_multiple_of(config.eval_every);
        if let Some(evaluation) = run.task.evaluation.filter(|_| due) {
            match evaluation.run(&now.into(), self.actor.weights().view(), report) {
                Ok(judged) => self.last.extend(evaluation.figures(&judged)),
                // The next rollout is by the same weights, and the guard judges that.
                Err(error) if error.is::<Diverged>() => report.note(&format!("ppo: no evaluation {now}: {error}")),
                Err(error) => return Err(error),
            }
        }
        let flat = experience.advantages.iter().flatten().all(|&a| a == 0.0);
        let (holding, new) = self.watch.see(Vitals::of(&self.last, experience.rollout.prompts.len(), flat));
        if !holding.is_empty() {
            self.last.insert("warnings".into(), holding.iter().map(|w| w.name()).collect::<Vec<_>>().into());
        }
        for warning in new {
            report.note(&format!("ppo: warning at iteration {now}: {}", warning.text()));
        }
        let shown = ["objective/scores", "objective/kl", "policy/clipfrac_avg", "loss/value_avg"];
        report.step(now, &self.last, &shown)?;
        metrics::samples(experience, now, run, report)
    }
}

/// What the critic starts as.
fn critic_start(run: &Run<'_>) -> Result<Adapter> {
    let start = run.task.start;
    let head = derive(run.seed, &[settings::HEAD]);
    match run.config.critic {
        CriticStart::Reward => Ok(start.reward.context("checked before the run")?.clone()),
        CriticStart::Actor => start.sft.clone().with_head(head),
        CriticStart::Own => {
            let fresh = derive(run.seed, &[settings::CRITIC_INIT]);
            Adapter::init(start.sft.config().clone(), start.reward_base.shapes(), fresh)?.with_head(head)
        }
    }
}
