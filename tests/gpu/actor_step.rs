//! The actor's optimizer step, which is computed while the critic's passes run, and the critic's, which is made while what comes
//! next does: the bytes of one learner after the other, and no learner has changed where the critic's pass fails or a gradient is
//! NaN; what the plan counts for it. tests/optimizer_thread.rs shows that it runs meanwhile.

use std::fs;

use fourfold::config;
use fourfold::config::Ppo;
use fourfold::error::{Diverged, is_of_machine};
use fourfold::model::adapter::Adapter;
use fourfold::ops::weight::ComputeDtype;
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::state::{Minibatch, State};
use fourfold::ppo::update::Step;
use fourfold::report::Report;
use fourfold::rng::{SplitMix64, derive};
use fourfold::run::Model;
use fourfold::train::guard::{Guard, Verdict};
use fourfold::train::learner::{Learner, Parameters};
use fourfold::train::session::Session;
use fourfold::train::settings;
use fourfold::train::snapshot::Snapshot;
use serde_json::Value;

use crate::fault_world::{place, run_all};
use crate::ppo_world::*;
use crate::stages::{adapters, model_on, short_ppo};
use crate::world::{emulated, machine, timed};

/// Two iterations of two epochs of two minibatches, whose gradients are clipped.
fn config() -> Ppo {
    Ppo { num_ppo_epochs: 2, max_grad_norm: 0.1, weight_decay: 0.01, response_length: 4, ..short_ppo() }
}

fn with_run<T>(model: &Model, config: &Ppo, of: impl FnOnce(&PpoRun<'_>) -> T) -> T {
    let (sft, rm): (Adapter, Adapter) = adapters(model);
    let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
    let (prompts, source) = (questions(model, 8), source_of(roles));
    of(&ppo_run(roles, &prompts, model.checkpoint.tokenizer().eos_ids(), &source, config, 6))
}

/// What a checkpoint of this state holds.
fn kept(state: &State, run: &PpoRun<'_>) -> (Vec<u8>, Vec<u8>) {
    state.snapshot(run).unwrap().to_bytes().unwrap()
}

/// Weights, moments and steps of both learners.
fn learners(state: &State) -> (Vec<u8>, Vec<u8>) {
    let mut all = Snapshot::default();
    all.put_learner("actor", &state.actor).unwrap();
    all.put_learner("critic", state.critic.as_ref().unwrap()).unwrap();
    all.to_bytes().unwrap()
}

/// The minibatch that is next, trained on by the actor alone and then by the critic alone, at these learning rates.
fn one_after_the_other(state: &mut State, run: &PpoRun<'_>, (actor_lr, critic_lr): (f64, f64)) {
    let experience = state.experience.as_ref().unwrap();
    let path = [settings::MINIBATCH_ORDER, state.iteration as u64, state.epoch as u64];
    let order = SplitMix64::new(derive(run.seed, &path)).permutation(experience.rollout.prompts.len());
    let step = Step {
        run,
        experience,
        rows: order.chunks(run.minibatch_size()).nth(state.minibatch).unwrap(),
        reference: state.reference.as_ref(),
        actor_lr,
        critic_lr,
        kl_coef: state.kl_coef,
        kl_penalty: state.kl_penalty,
        first_epoch: state.epoch == 0,
        actor_steps: state.step,
    };
    assert_eq!(state.update.minibatch(Some(&mut state.actor), None, &step).unwrap(), Some(true));
    assert_eq!(state.update.minibatch(None, state.critic.as_mut(), &step).unwrap(), Some(true));
    state.step += 1;
}

#[test]
fn a_run_leaves_the_bytes_of_one_learner_after_the_other() {
    let Some(device) = emulated() else { return };
    let _time = timed("the actor's step meanwhile");
    let (model, config) = (model_on(1, ComputeDtype::F32, Some(&device)), config());
    with_run(&model, &config, |run| {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let mut reports = folders.each_ref().map(|dir| Report::to_dir(dir.path()).unwrap());
        let mut states = [State::new(run).unwrap(), State::new(run).unwrap()];
        let mut steps = 0;
        while states[0].iteration < config.iterations() {
            states.iter_mut().for_each(|state| state.roll_out(run).unwrap());
            while states[0].has_minibatch(run) {
                let [meanwhile, in_turn] = &mut states;
                let before = learners(meanwhile);
                assert_eq!(meanwhile.minibatch(run, 1.0).unwrap(), Minibatch::Done);
                one_after_the_other(in_turn, run, (meanwhile.update.actor_lr, meanwhile.update.critic_lr));
                assert!(learners(meanwhile) != before && kept(meanwhile, run) == kept(in_turn, run), "step {steps}");
                states.iter_mut().for_each(|state| state.next_minibatch(run));
                steps += 1;
            }
            for (state, report) in states.iter_mut().zip(&mut reports) {
                state.end_iteration(run, report).unwrap();
            }
        }
        assert_eq!(steps, 8);
        let [meanwhile, in_turn] = folders.each_ref().map(|dir| metrics(dir.path()));
        assert!(meanwhile.len() == 2 && meanwhile == in_turn);
        assert!(column(&meanwhile, "grad_norm/actor").iter().all(|&norm| norm > config.max_grad_norm));
    });
}

fn weights(learner: &Learner) -> Vec<Vec<f32>> {
    let parameters = learner.weights().parameters().unwrap();
    parameters.iter().map(|t| t.flatten_all().unwrap().to_vec1().unwrap()).collect()
}

/// Whether a thread makes the critic's step, which nobody has waited for.
fn is_under_way(state: &State) -> bool {
    matches!(state.critic.as_ref().unwrap().parameters_later().unwrap(), Parameters::Later(_))
}

#[test]
fn the_critics_step_is_made_while_what_comes_next_runs() {
    let Some(device) = emulated() else { return };
    let config = config();
    let critics = |state: &State| weights(state.critic.as_ref().unwrap());
    for device in [Some(&device), None] {
        let model = model_on(1, ComputeDtype::F32, device);
        // 1. Read after each step.
        let (begun, end) = with_run(&model, &config, |run| {
            let (mut state, mut begun) = (State::new(run).unwrap(), vec![]);
            state.roll_out(run).unwrap();
            for _ in 0..4 {
                begun.push(critics(&state));
                state.minibatch(run, 1.0).unwrap();
                state.next_minibatch(run);
            }
            (begun, learners(&state))
        });
        // 2. Under a guard, which keeps a copy of the learners after the first good step and after three more.
        with_run(&model, &config, |run| {
            let mut state = State::new(run).unwrap();
            let mut guard = Guard::new(config::Guard { snapshot_steps: 3, ..config::Guard::default() });
            guard.watch(&state.learners()).unwrap();
            state.roll_out(run).unwrap();
            for step in 0..4 {
                let done = state.minibatch(run, 1.0);
                assert_eq!(is_under_way(&state), device.is_some(), "step {step}");
                assert!(matches!(guard.judge(done, &mut state.learners()).unwrap(), Verdict::Good(_)));
                assert_eq!(is_under_way(&state), device.is_some() && ![0, 3].contains(&step), "step {step}");
                state.next_minibatch(run);
            }
            assert!(learners(&state) == end);
            let mut kept = Snapshot::default();
            guard.save(&mut kept).unwrap();
            let good = kept.all("last_good").unwrap();
            good.restore_learner("critic", state.critic.as_mut().unwrap()).unwrap();
            assert!(critics(&state) == begun[3] && begun[3] != begun[2], "the weights at the start of the last step");
        });
        // 3. In a session, with a rollout behind it.
        with_run(&model, &config, |run| {
            let (mut state, mut session) = (State::new(run).unwrap(), Session::silent());
            session.watch(&state.learners()).unwrap();
            state.roll_out(run).unwrap();
            for step in 0..4 {
                let done = state.minibatch(run, 1.0);
                assert_eq!(session.judge(1, done, &mut state.learners()).unwrap(), Some(Minibatch::Done));
                assert_eq!(is_under_way(&state), device.is_some() && step > 0, "step {step}");
                state.next_minibatch(run);
            }
            let folder = tempfile::tempdir().unwrap();
            state.end_iteration(run, &mut Report::to_dir(folder.path()).unwrap()).unwrap();
            assert_eq!(is_under_way(&state), device.is_some());
            state.roll_out(run).unwrap();
            assert!(!is_under_way(&state), "its values were read");
            assert!(learners(&state) == end);
        });
    }
}

#[test]
fn a_gradient_that_is_nan_leaves_both_learners_as_they_are() {
    let Some(device) = emulated() else { return };
    let model = model_on(1, ComputeDtype::F32, Some(&device));
    // The losses are finite, their derivatives infinite.
    for (of_critic, of_actor) in [(true, false), (false, true), (true, true)] {
        let huge = |is: bool, usual: f64| if is { 1e39 } else { usual };
        let usual = config();
        let config =
            Ppo { vf_coef: huge(of_critic, usual.vf_coef), entropy_coef: huge(of_actor, usual.entropy_coef), ..usual };
        with_run(&model, &config, |run| {
            let mut state = State::new(run).unwrap();
            state.roll_out(run).unwrap();
            let before = kept(&state, run);
            let error = state.minibatch(run, 1.0).unwrap_err();
            assert!(error.is::<Diverged>() && error.to_string().contains("gradient norm"), "{error:#}");
            assert!(kept(&state, run) == before, "critic {of_critic}, actor {of_actor}");
        });
    }
}

#[test]
fn a_device_that_fails_in_the_critics_pass_leaves_both_learners_as_they_are() {
    let Some((machine, device)) = machine() else { return };
    let (model, config) = (model_on(1, ComputeDtype::F32, Some(&device)), config());
    with_run(&model, &config, |run| {
        let begun = || {
            let mut state = State::new(run).unwrap();
            state.roll_out(run).unwrap();
            state
        };
        let mut whole = begun();
        whole.minibatch(run, 1.0).unwrap();
        // Allocations of the actor's passes, of both learners' passes.
        let (mut alone, mut both) = (begun(), begun());
        let counted = |state: &mut State| {
            let before = device.usage().allocations;
            state.minibatch(run, 1.0).unwrap();
            (device.usage().allocations - before) as u64
        };
        alone.critic = None;
        let (all, of_actor) = (counted(&mut both), counted(&mut alone));
        assert!(all > of_actor + 20, "{all} {of_actor}");
        for moment in [of_actor, of_actor + 10, all - 1] {
            let mut state = begun();
            let before = kept(&state, run);
            machine.fail_allocation_after(Some(moment));
            let failed = state.minibatch(run, 1.0);
            machine.fail_allocation_after(None);
            let error = failed.unwrap_err();
            assert!(is_of_machine(&error) && format!("{error:#}").contains("out of memory"), "{moment}: {error:#}");
            drop(error);
            assert!(kept(&state, run) == before, "allocation {moment}");
            state.minibatch(run, 1.0).unwrap();
            assert!(kept(&state, run) == kept(&whole, run), "allocation {moment}");
        }
    });
}

#[test]
fn a_plan_counts_the_step_that_is_computed_meanwhile() {
    if emulated().is_none() {
        return;
    }
    let place = place();
    run_all(&place, &["sft", "reward"]);
    let update = |more: &str| -> Value {
        let ran = place.run(&format!("plan run.toml --phase ppo --set data.path=prompts.jsonl --json {more}"));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        serde_json::from_str::<Value>(&ran.stdout).unwrap()["phases"]["update"].clone()
    };
    let shared = "--set ppo.shared_optimizer=true";
    let of = |phase: &Value, part: &str| phase[part].as_u64().unwrap();
    // One optimizer of both steps after both passes.
    let (in_turn, meanwhile) = (update(&format!("--device emulated {shared}")), update("--device emulated"));
    let more = ["adapters", "optimizer"].map(|part| of(&meanwhile, part) - of(&in_turn, part));
    let file = fs::read(place.path("out/sft/adapter/adapter_model.safetensors")).unwrap();
    let weights = safetensors::SafeTensors::deserialize(&file).unwrap();
    let actor = weights.tensors().iter().map(|(_, tensor)| tensor.data().len() as u64).sum::<u64>();
    // Each tensor takes some bytes beside its numbers.
    assert_eq!(more, [actor + 320 * weights.len() as u64, 2 * actor], "{in_turn} {meanwhile}");
    assert_eq!(of(&meanwhile, "gradients"), of(&in_turn, "gradients"));
    let on_cpu = [update("--device cpu"), update(&format!("--device cpu {shared}"))];
    for part in ["adapters", "optimizer", "gradients"] {
        assert_eq!(of(&on_cpu[0], part), of(&on_cpu[1], part), "{part}");
    }
}
