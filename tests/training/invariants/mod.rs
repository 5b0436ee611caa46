//! Invariants of PPO over shared frozen weights, on the quickstart's embedded base in small numbers: what trains and what
//! stays frozen, that the first ratio is 1 and the first KL 0, and which models score and are compared. It does not compare
//! with other implementations; tests/exports/peft_logits.rs and tests/python/check_interop.py do.

mod ahead;
mod algorithms;
mod options;
mod ptx;
mod reproducible;
mod reward_model;
mod wiring;
mod wiring_values;
mod world;

use std::fs;

use fourfold::config::{Lora, LrScheduler, Ppo, RecomputeSetting, TargetModules};
use fourfold::model::adapter::Adapter;
use fourfold::model::base::Base;
use fourfold::model::batch::{Batch, Targets};
use fourfold::model::block::Recompute;
use fourfold::model::roles::ValueModel;
use fourfold::ppo::run::PpoRun;
use fourfold::ppo::train::{Trained, train};
use fourfold::report::{Report, clocks};
use fourfold::run::Model;
use fourfold::sft;
use fourfold::train::session::Session;
use fourfold::train::supervised::Setup;
use serde::Deserialize;
use serde_json::Value;

use world::*;

#[test]
fn reference_is_unchanged_after_ten_ppo_steps() {
    let model = model();
    let sft = sft_adapter(&model, 1, &mut Session::silent());
    let rm = reward_adapter(&model, &sft, 1, &mut Session::silent());
    let fixed = fixed_sequences(&model);
    let score = |adapter: &Adapter| ValueModel::new(&model.base, adapter).unwrap().scores(&fixed.0).unwrap();
    let frozen_state = || {
        let reference = to_bits(&logprobs(&model.base, Some(&sft), &fixed));
        (bytes_of(&model.base), bits(&sft), bits(&rm), reference, to_bits(&score(&rm)))
    };
    let before = frozen_state();
    let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
    let trained = run_ppo(roles, &model, &ppo_config(), 1, &mut Session::silent());
    let after = frozen_state();
    assert!(before.0 == after.0, "the base's bytes");
    assert!(before.1 == after.1, "the SFT adapter");
    assert!(before.2 == after.2, "the reward adapter");
    assert!(before.3 == after.3, "the reference's log-probabilities");
    assert!(before.4 == after.4, "the reward model's scores");

    // The equality above is meaningful only if every tensor of actor and critic did change.
    let (actor, critic) = (bits(&trained.actor), bits(trained.critic.as_ref().unwrap()));
    assert_eq!(actor.len(), 4 * 7 * 2);
    assert_eq!(critic.len(), 4 * 7 * 2 + 2);
    for (name, values) in &actor {
        assert_ne!(values, &before.1[name], "{name} of the actor did not train");
    }
    for (name, values) in &critic {
        assert_ne!(values, &before.2[name], "{name} of the critic did not train");
    }
    let moved = mean_difference(
        &logprobs(&model.base, Some(&trained.actor), &fixed),
        &logprobs(&model.base, Some(&sft), &fixed),
    );
    assert!(moved > 1e-3, "the actor's log-probabilities moved by {moved} on average");
    assert!(mean_difference(&score(trained.critic.as_ref().unwrap()), &score(&rm)) > 1e-3, "the critic's values moved");
}

#[test]
fn first_minibatch_ratio_is_one_and_first_kl_is_zero_with_an_unmerged_sft_adapter() {
    let model = model();
    let sft = sft_adapter(&model, 2, &mut Session::silent());
    let rm = reward_adapter(&model, &sft, 2, &mut Session::silent());
    let fixed = fixed_sequences(&model);
    // Were the reference the bare base, the first KL would be far from zero.
    let apart = mean_difference(&logprobs(&model.base, Some(&sft), &fixed), &logprobs(&model.base, None, &fixed));
    assert!(apart > 0.05, "the SFT adapter changes too little for this test: {apart}");
    let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
    for temperature in [1.0, 0.7] {
        let dir = tempfile::tempdir().unwrap();
        let config = Ppo { temperature, ..ppo_config() };
        run_ppo(roles, &model, &config, 2, &mut Session::new(Report::to_dir(dir.path()).unwrap()));
        let lines = metrics(dir.path());
        assert_eq!(lines.len(), 5);
        let (ratios, kls) = (column(&lines, "val/first_ratio"), column(&lines, "objective/kl"));
        eprintln!("temperature {temperature}: first ratios {ratios:?}, KL {kls:?}");
        // Sampling with a KV cache and training without one differ by rounding, about 1e-6 per token.
        for ratio in &ratios {
            assert!((ratio - 1.0).abs() < 1e-4, "{ratios:?}");
        }
        assert!(kls[0].abs() < 1e-4, "{kls:?}");
        assert!(kls[1..].iter().all(|kl| kl.abs() > 1e-3), "the actor leaves the reference: {kls:?}");
    }
}

/// Runs PPO and logs every sequence of every rollout as token ids: (metrics, samples, trained adapters).
fn logged_ppo(roles: Roles<'_>, model: &Model, config: &Ppo, seed: u64) -> (Vec<Value>, Vec<Sample>, Trained) {
    let dir = tempfile::tempdir().unwrap();
    let config = Ppo { save_samples: config.batch_size, ..config.clone() };
    let decode = |ids: &[u32]| serde_json::to_string(ids).unwrap();
    let mut session = Session::new(Report::to_dir(dir.path()).unwrap());
    let stop = model.checkpoint.tokenizer().eos_ids();
    let prompts = questions(model, 24);
    let source = source_of(roles);
    let run = ppo_run(roles, &prompts, stop, &source, &config, seed);
    let trained = train(&PpoRun { decode: &decode, ..run }, &mut session).unwrap();
    let text = fs::read_to_string(dir.path().join("samples.jsonl")).unwrap();
    (
        metrics(dir.path()),
        text.lines().map(|l| serde_json::from_str::<LoggedSample>(l).unwrap().into()).collect(),
        trained,
    )
}

#[derive(Deserialize)]
struct LoggedSample {
    iteration: usize,
    prompt: String,
    response: String,
    score: f64,
    kl: f64,
}

struct Sample {
    iteration: usize,
    prompt: Vec<u32>,
    response: Vec<u32>,
    score: f64,
    kl: f64,
}

impl From<LoggedSample> for Sample {
    fn from(logged: LoggedSample) -> Self {
        let ids = |text: &str| serde_json::from_str(text).unwrap();
        let LoggedSample { iteration, score, kl, .. } = logged;
        Self { iteration, prompt: ids(&logged.prompt), response: ids(&logged.response), score, kl }
    }
}

#[test]
fn the_frozen_reward_model_scores_every_rollout_and_the_kl_is_from_the_current_actor_to_the_reference() {
    let model = model();
    let sft = sft_adapter(&model, 11, &mut Session::silent());
    let rm = reward_adapter(&model, &sft, 11, &mut Session::silent());
    let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
    // Two iterations at a constant learning rate; a run of the first alone gives the actor that samples in the second.
    let config = Ppo { lr_scheduler_type: LrScheduler::Constant, total_episodes: 16, ..ppo_config() };
    let (lines, samples, _) = logged_ppo(roles, &model, &config, 11);
    let (_, first, after_first) = logged_ppo(roles, &model, &Ppo { total_episodes: 8, ..config }, 11);
    assert_eq!((lines.len(), samples.len(), first.len()), (2, 16, 8));
    let (mut score, mut kl, mut kls) = (0f64, 0f64, vec![]);
    for sample in &samples {
        let whole: Vec<u32> = sample.prompt.iter().chain(&sample.response).copied().collect();
        let batch = Batch::new(&[whole]).unwrap();
        let targets = Targets::responses(&batch, &[sample.response.len()]).unwrap();
        let frozen = ValueModel::new(&model.base, &rm).unwrap().scores(&batch).unwrap()[0];
        score = score.max((f64::from(frozen) - sample.score).abs());
        let actor = if sample.iteration == 1 { &sft } else { &after_first.actor };
        let alone = (batch, targets);
        let pairs =
            logprobs(&model.base, Some(actor), &alone).into_iter().zip(logprobs(&model.base, Some(&sft), &alone));
        let by_hand: f64 = pairs.map(|(a, r)| f64::from(a) - f64::from(r)).sum();
        kl = kl.max((by_hand - sample.kl).abs());
        kls.push(sample.kl.abs());
    }
    eprintln!("scores within {score:.1e}, KL within {kl:.1e} of what was recomputed");
    // The tolerance is rounding of another packing; a stale actor or a changed reference would differ by the KL itself.
    assert!(score < 1e-5 && kl < 1e-4, "{score} {kl}");
    assert!(
        kls[8..].iter().copied().fold(0.0, f64::max) > 0.05,
        "the second rollout is away from the reference: {kls:?}"
    );
}

#[test]
fn with_one_step_per_iteration_old_values_and_logprobs_are_current_and_nothing_is_clipped() {
    let model = model();
    let sft = sft_adapter(&model, 12, &mut Session::silent());
    let rm = reward_adapter(&model, &sft, 12, &mut Session::silent());
    let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
    // The clip range is far above rounding and far below a step.
    let tight = Ppo { num_mini_batches: 1, cliprange: 1e-4, cliprange_value: 1e-4, ..ppo_config() };
    let (lines, _, _) = logged_ppo(roles, &model, &tight, 12);
    for key in ["policy/clipfrac_avg", "val/clipfrac_avg"] {
        assert_eq!(column(&lines, key), [0.0; 5], "{key}");
    }
    let (lines, _, _) = logged_ppo(roles, &model, &Ppo { num_mini_batches: 2, ..tight }, 12);
    for key in ["policy/clipfrac_avg", "val/clipfrac_avg"] {
        assert!(column(&lines, key).iter().all(|&share| share > 0.02), "{key} after a step: {lines:?}");
    }
}

#[test]
fn recomputation_changes_no_bit_and_micro_batches_change_only_rounding() {
    let model = model();
    let sft = sft_adapter(&model, 13, &mut Session::silent());
    let rm = reward_adapter(&model, &sft, 13, &mut Session::silent());
    let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
    let run = |config: Ppo| logged_ppo(roles, &model, &config, 13);
    let (lines, _, trained) = run(Ppo { checkpoint: RecomputeSetting::None, ..ppo_config() });
    for checkpoint in [RecomputeSetting::Mlp, RecomputeSetting::Block] {
        let (other_lines, _, other) = run(Ppo { checkpoint, ..ppo_config() });
        assert_eq!(lines, other_lines, "{checkpoint:?}");
        assert!(
            bits(&trained.actor) == bits(&other.actor)
                && bits(trained.critic.as_ref().unwrap()) == bits(other.critic.as_ref().unwrap()),
            "{checkpoint:?}"
        );
    }
    let (one, _, _) = run(Ppo { micro_batch_size: 1, ..ppo_config() });
    let (all, _, _) = run(Ppo { micro_batch_size: 8, ..ppo_config() });
    for key in ["loss/policy_avg", "loss/value_avg", "policy/entropy_avg", "grad_norm/actor", "grad_norm/critic"] {
        // Only the first iteration: later, Adam has amplified the rounding of its smallest gradients.
        let (a, b) = (one[0][key].as_f64().unwrap(), all[0][key].as_f64().unwrap());
        assert!((a - b).abs() < 1e-3 * a.abs().max(1e-2), "{key}: {a} by ones, {b} all at once");
    }
}

#[test]
fn critic_and_reward_model_over_a_second_copy_of_the_base_give_the_same_bits_as_over_the_shared_one() {
    let (shared, second) = (model(), model());
    let sft = sft_adapter(&shared, 7, &mut Session::silent());
    let rm = reward_adapter(&second, &sft, 7, &mut Session::silent());
    let run = |reward_base: &Base| {
        let dir = tempfile::tempdir().unwrap();
        let roles = Roles { base: &shared.base, reward_base, sft: &sft, reward: Some(&rm) };
        let trained = run_ppo(roles, &shared, &ppo_config(), 7, &mut Session::new(Report::to_dir(dir.path()).unwrap()));
        (
            bits(&trained.actor),
            bits(trained.critic.as_ref().unwrap()),
            clocks::without(&fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap()),
        )
    };
    assert!(run(&shared.base) == run(&second.base));
}

#[test]
fn critic_and_reward_model_train_over_a_second_base_of_another_depth() {
    let (policy, other) = (model(), model_of(3));
    let sft = sft_adapter(&policy, 8, &mut Session::silent());
    let rm = reward_adapter(&other, &other.fresh_adapter(&lora(), 8).unwrap(), 8, &mut Session::silent());
    let shared_rm = reward_adapter(&policy, &sft, 8, &mut Session::silent());
    let before = (bytes_of(&policy.base), bytes_of(&other.base), bits(&rm));
    let run = |reward_base: &Base, reward: &Adapter| {
        let dir = tempfile::tempdir().unwrap();
        let roles = Roles { base: &policy.base, reward_base, sft: &sft, reward: Some(reward) };
        let trained = run_ppo(roles, &policy, &ppo_config(), 8, &mut Session::new(Report::to_dir(dir.path()).unwrap()));
        (trained, metrics(dir.path()))
    };
    let (trained, lines) = run(&other.base, &rm);
    assert!(before == (bytes_of(&policy.base), bytes_of(&other.base), bits(&rm)));
    let critic = bits(trained.critic.as_ref().unwrap());
    assert_eq!((trained.actor.layers().len(), critic.len()), (4, 3 * 7 * 2 + 2));
    for (name, values) in &critic {
        assert_ne!(values, &before.2[name], "{name} of the critic did not train");
    }
    // The first responses depend on the actor alone; their scores do not.
    let (_, shared) = run(&policy.base, &shared_rm);
    for key in ["objective/entropy", "response_length", "objective/kl"] {
        assert_eq!(lines[0][key], shared[0][key], "{key}");
    }
    assert_ne!(lines[0]["objective/scores"], shared[0]["objective/scores"]);
}

#[test]
fn an_adapter_on_some_modules_of_some_blocks_trains_in_all_stages_and_only_there() {
    let model = model();
    let some = Lora {
        target_modules: TargetModules::List(vec!["q_proj".into(), "down_proj".into()]),
        layers_to_transform: Some(vec![1, 3]),
        use_rslora: true,
        ..lora()
    };
    let start = model.fresh_adapter(&some, 10).unwrap();
    let examples = sft_examples(&model, 16);
    let setup = Setup { base: &model.base, start: &start, recompute: Recompute::Off, seed: 10 };
    let (sft, _) = sft::train(setup, &examples, &[], &sft_config(), &mut Session::silent()).unwrap();
    let rm = reward_adapter(&model, &sft, 10, &mut Session::silent());
    let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
    let trained = run_ppo(roles, &model, &ppo_config(), 10, &mut Session::silent());
    let (before, actor) = (bits(&sft), bits(&trained.actor));
    assert_eq!(actor.len(), 2 * 2 * 2);
    for (name, values) in &actor {
        assert!(name.contains("layers.1.") || name.contains("layers.3."), "{name}");
        assert_ne!(values, &before[name], "{name} did not train");
    }
}
