//! The PPO training loop in numbered steps: rollout, minibatch updates, metrics. Four roles (actor, critic, reference,
//! reward model) share at most two frozen bases; actor and critic train adapters over them. It does not depend on files;
//! `run/ppo.rs` reads them. Read `state.rs` for the steps, then `rollout.rs`, `experience.rs` and `update.rs`.

use anyhow::Result;

use super::run::PpoRun;
use super::state::{Minibatch, State};
use crate::config::Optimised as _;
use crate::error::{Diverged, Interrupted, is_of_machine};
use crate::model::adapter::Adapter;
use crate::report::{Metrics, Report};
use crate::train::session::Session;
use crate::train::settings;

/// The trained adapters.
#[derive(Clone, Debug)]
pub struct Trained {
    /// The aligned policy.
    pub actor: Adapter,
    /// The value function, if the advantage estimator has a critic.
    pub critic: Option<Adapter>,
    /// Exponential moving average (EMA) of the actor, if `ema_decay` is set.
    pub ema: Option<Adapter>,
    /// Metrics of the last iteration.
    pub last: Metrics,
}

/// Trains actor and critic.
///
/// # Errors
/// Those of [`PpoRun::check`]; if the guard gives up, or the process was asked to stop.
pub fn train(run: &PpoRun<'_>, session: &mut Session) -> Result<Trained> {
    train_then(run, session, |_, _| Ok(())).map(|(trained, ())| trained)
}

/// Trains like [`train`], then calls `finish` with the result. If `finish` fails, the run's state is saved all the same.
///
/// # Errors
/// Those of [`train`] and of `finish`.
pub fn train_then<T>(
    run: &PpoRun<'_>,
    session: &mut Session,
    finish: impl FnOnce(&Trained, &mut Report) -> Result<T>,
) -> Result<(Trained, T)> {
    run.check()?;
    let mut state = State::new(run)?;
    if let Some(snapshot) = session.resumed()? {
        state.load(&snapshot, run)?;
    }
    advance(run, &mut state, session)?;
    for (_, learner) in state.learners() {
        run.world.check_equal(&learner.weights().parameters()?)?;
    }
    let trained = Trained {
        actor: state.actor.weights().snapshot(),
        critic: state.critic.as_ref().map(|critic| critic.weights().snapshot()),
        ema: state.ema.clone(),
        last: state.last.clone(),
    };
    match finish(&trained, &mut session.report) {
        Ok(found) => Ok((trained, found)),
        Err(error) => Err(session.failed(error, state.turns, || state.snapshot(run))),
    }
}

/// Continues a run from `state` to its end. The run can be stopped and resumed between any two turns of the loop.
///
/// # Errors
/// If the guard gives up, the report cannot be written, or the process was asked to stop.
pub fn advance(run: &PpoRun<'_>, state: &mut State, session: &mut Session) -> Result<()> {
    let iterations = run.config.iterations();
    session.report.stage(run.config.origin.name(), iterations);
    session.watch(&state.learners())?;
    let steps = iterations * run.config.num_ppo_epochs * run.config.num_mini_batches;
    if let Some(text) = settings::unreached(&run.config.optimisation(), steps) {
        session.report.warn(&format!("{}: warning: {text}", run.config.origin.name()));
    }
    while state.iteration < iterations {
        session.checkpoint(state.turns, || state.snapshot(run))?;
        let number = state.iteration + 1;
        if state.experience.is_none() {
            // 1. Rollout: the actor samples responses; reference, critic and reward source score them; KL, rewards,
            //    advantages and returns follow.
            let rolled_out = state.roll_out(run).and_then(|()| state.check_rollout(session));
            if let Err(error) = rolled_out {
                if error.is::<Interrupted>() {
                    // The state is kept above.
                    continue;
                }
                if !error.is::<Diverged>() {
                    // Most often the reward source is unavailable: a resumed run repeats this rollout.
                    return Err(session.failed(error, state.turns, || state.snapshot(run)));
                }
                let rolled_out: Result<()> = Err(error);
                session.judge(number, rolled_out, &mut state.learners())?;
                state.skip_iteration();
            }
        } else if state.has_minibatch(run) {
            // 2. Update: one minibatch of actor and critic, for num_ppo_epochs passes over the rollout. With async_rollouts a
            //    server samples the next rollout meanwhile.
            if let Err(error) = state.sample_ahead(run) {
                return Err(session.failed(error, state.turns, || state.snapshot(run)));
            }
            let outcome = match state.minibatch(run, session.lr_factor()) {
                // No learner has stepped: a resumed run repeats this minibatch.
                Err(error) if is_of_machine(&error) => {
                    return Err(session.failed(error, state.turns, || state.snapshot(run)));
                }
                outcome => outcome,
            };
            let is_over = match session.judge(number, outcome, &mut state.learners())? {
                Some(Minibatch::Done) | None => true,
                Some(Minibatch::Stopped) => false,
            };
            if is_over {
                state.next_minibatch(run);
            }
        } else {
            // 3. Metrics, then the values that adapt between two iterations.
            if let Err(error) = state.end_iteration(run, &mut session.report) {
                // The state still holds the rollout: a resumed run repeats the evaluation that failed.
                return Err(session.failed(error, state.turns, || state.snapshot(run)));
            }
        }
    }
    state.learners().iter().try_for_each(|(_, learner)| learner.settled())?;
    // `finish` may still evaluate, and so call a reward source that fails.
    session.last_checkpoint(state.turns, || state.snapshot(run))?;
    session.report.done();
    for (warning, count) in state.monitor.counts() {
        let name = warning.name();
        let stage = run.config.origin.name();
        session.report.warn(&format!("{stage}: warning {name} held in {count} of {iterations} iterations"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Ppo;
    use crate::error::exit_code;
    use crate::model::adapter::{LoraConfig, TargetModules};
    use crate::model::block::Recompute;
    use crate::model::roles::ValueModel;
    use crate::model_files::ModelFiles;
    use crate::quickstart::base::BASE;
    use crate::reward::source::RewardModel;
    use crate::train::world::World;

    #[test]
    fn invalid_inputs_are_refused_before_a_token_is_sampled() {
        let open = |config: &str| {
            let parts = (BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
            ModelFiles::from_embedded(config, parts.0, parts.1, parts.2, parts.3).unwrap().base().unwrap()
        };
        let base = open(BASE.config);
        let short = open(&BASE.config.replace("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 16"));
        let lora = LoraConfig {
            r: 1,
            lora_alpha: 1.0,
            use_rslora: false,
            target_modules: TargetModules::AllLinear,
            layers_to_transform: None,
            ..LoraConfig::default()
        };
        let sft = Adapter::init(lora, base.shapes(), 1).unwrap();
        let reward = sft.clone().with_head(1).unwrap();
        let source = RewardModel(ValueModel::new(&base, &reward).unwrap());
        let config = Ppo { total_episodes: 8, batch_size: 8, response_length: 12, ..Ppo::default() };
        let prompts = vec![vec![5; 10]];
        let run = PpoRun {
            world: World::alone(),
            base: &base,
            reward_base: &base,
            sft: &sft,
            reward: Some(&reward),
            prompts: &prompts,
            stop: &[0],
            source: &source,
            decode: &|_| String::new(),
            evaluation: None,
            ptx: None,
            pad: None,
            sampler: None,
            config: &config,
            seed: 1,
            recompute: Recompute::Off,
            sharing: crate::model::readers::Sharing::default(),
        };
        let refusal = |run: PpoRun<'_>| {
            let error = train(&run, &mut Session::silent()).unwrap_err();
            assert_eq!(exit_code(&error), 2, "{error:#}");
            format!("{error:#}")
        };
        assert!(refusal(PpoRun { prompts: &vec![], ..run }).contains("no prompt"));
        let few = Ppo { total_episodes: 7, ..config.clone() };
        assert!(refusal(PpoRun { config: &few, ..run }).contains("total_episodes = 7"));
        assert!(refusal(PpoRun { reward: Some(&sft), ..run }).contains("scalar head"));
        let long = Ppo { response_length: 247, ..config.clone() };
        assert!(refusal(PpoRun { config: &long, ..run }).contains("response_length = 247"));
        assert!(refusal(PpoRun { reward_base: &short, ..run }).contains("context of 16"));
        // The longest response that fits the context is accepted.
        let longest = Ppo { response_length: 246, ..config.clone() };
        PpoRun { config: &longest, ..run }.check().unwrap();
    }
}
