//! Stages on the emulated machine: PPO's invariants in f32, bf16 and f16, and a shortened quickstart beside the host's.

use fourfold::config::{Ppo, Reward, Sft};
use fourfold::device::Device;
use fourfold::model::adapter::Adapter;
use fourfold::model::block::Recompute;
use fourfold::model::roles::ValueModel;
use fourfold::ops::weight::ComputeDtype;
use fourfold::report::Metrics;
use fourfold::report::Report;
use fourfold::report::clocks::is_clock;
use fourfold::run::Model;
use fourfold::train::session::Session;
use fourfold::train::supervised::Setup;
use fourfold::{reward, sft};
use serde_json::Value;

use crate::ppo_world::*;
use crate::world::{adapter, emulated, on, say, timed};

/// The quickstart's base with its first `layers` blocks.
pub fn model_on(layers: usize, compute: ComputeDtype, device: Option<&Device>) -> Model {
    let model = model_of(layers).computing_in(compute);
    match device {
        Some(device) => Model { base: on(model.base, device), ..model },
        None => model,
    }
}

/// Two iterations of four prompts in two minibatches of two micro-batches.
pub fn short_ppo() -> Ppo {
    Ppo {
        learning_rate: 2e-3,
        total_episodes: 8,
        batch_size: 4,
        num_mini_batches: 2,
        num_ppo_epochs: 1,
        micro_batch_size: 1,
        response_length: 6,
        reward_adapter: "unused".into(),
        ..Ppo::default()
    }
}

/// Adapters over a base, drawn, as SFT and reward training would have left them.
pub fn adapters(model: &Model) -> (Adapter, Adapter) {
    let of = |r, seed| adapter(&model.base, fourfold::model::adapter::TargetModules::AllLinear, r, seed);
    (of(4, 3), of(3, 4).with_head(5).unwrap())
}

#[test]
fn ppo_leaves_what_is_frozen_and_begins_at_ratio_one_and_kl_zero() {
    let Some(device) = emulated() else { return };
    let _time = timed("PPO's invariants");
    // Distance of the first ratio from 1, and of the first KL from 0 in nats per response, whose tokens decoding and scoring
    // round apart; about three times what was measured.
    for (compute, ratio_bound, kl_bound) in
        [(ComputeDtype::F32, 1e-4, 1e-4), (ComputeDtype::F16, 2e-3, 1e-2), (ComputeDtype::Bf16, 1e-2, 5e-2)]
    {
        let model = model_on(2, compute, Some(&device));
        let (sft, rm) = adapters(&model);
        let fixed = fixed_sequences(&model);
        let scores = |adapter: &Adapter| ValueModel::new(&model.base, adapter).unwrap().scores(&fixed.0).unwrap();
        let frozen = || {
            let reference = to_bits(&logprobs(&model.base, Some(&sft), &fixed));
            (bytes_of(&model.base), bits(&sft), bits(&rm), reference, to_bits(&scores(&rm)))
        };
        let before = frozen();
        let dir = tempfile::tempdir().unwrap();
        let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft, reward: Some(&rm) };
        let mut session = Session::new(Report::to_dir(dir.path()).unwrap());
        // The second iteration begins at ratio one as well.
        let iterations = if compute == ComputeDtype::F32 { 2 } else { 1 };
        let config = Ppo { total_episodes: 4 * iterations, ..short_ppo() };
        let trained = run_ppo(roles, &model, &config, 2, &mut session);
        assert!(before == frozen(), "{compute:?}: base, adapters, reference and reward model stay as they are");
        let moved = mean_difference(
            &logprobs(&model.base, Some(&trained.actor), &fixed),
            &logprobs(&model.base, Some(&sft), &fixed),
        );
        assert!(moved > 1e-3, "{compute:?}: the actor moved by {moved}");
        let lines = metrics(dir.path());
        let (ratios, kls) = (column(&lines, "val/first_ratio"), column(&lines, "objective/kl"));
        say(&format!("PPO in {}: first ratios {ratios:.6?}, KL {kls:.6?}", compute.name()));
        assert!(ratios.iter().all(|r| (r - 1.0).abs() < ratio_bound), "{compute:?}: {ratios:?}");
        assert!(kls[0].abs() < kl_bound, "{compute:?}: {kls:?}");
    }
}

/// Every figure of two runs' metrics; times are not among them.
pub fn assert_same_figures(what: &str, got: &[Value], want: &[Value], bound: f64) -> f64 {
    assert_eq!(got.len(), want.len(), "{what}");
    let mut worst = 0f64;
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let (got, want) = (got.as_object().unwrap(), want.as_object().unwrap());
        let names = |of: &Metrics| of.keys().filter(|key| !is_clock(key)).cloned().collect::<Vec<_>>();
        assert_eq!(names(got), names(want), "{what}, line {i}");
        for (key, want) in want.iter().filter(|(key, _)| !is_clock(key)) {
            // A value on the border of two bins may fall into either; the sums of a distribution are compared as figures.
            if key.starts_with("histogram/") {
                for of in ["num", "min", "max", "sum", "sum_squares"] {
                    let (g, w) = (got[key][of].as_f64().unwrap(), want[of].as_f64().unwrap());
                    assert!(
                        (g - w).abs() <= bound * w.abs().max(1.0),
                        "{what}, line {i}: {key}/{of} is {g} and not {w}"
                    );
                }
                continue;
            }
            match (got[key].as_f64(), want.as_f64()) {
                (Some(g), Some(w)) => {
                    let e = (g - w).abs() / w.abs().max(1.0);
                    assert!(e <= bound, "{what}, line {i}: {key} is {g} and not {w}");
                    worst = worst.max(e);
                }
                _ => assert_eq!(&got[key], want, "{what}, line {i}: {key}"),
            }
        }
    }
    worst
}

/// SFT, reward model and PPO in a few steps each, and the metrics of each.
fn short_quickstart(device: Option<&Device>) -> Vec<(&'static str, Vec<Value>)> {
    let model = model_on(2, ComputeDtype::F32, device);
    let mut all = vec![];
    let mut stage = |name: &'static str, run: &mut dyn FnMut(&mut Session)| {
        let dir = tempfile::tempdir().unwrap();
        run(&mut Session::new(Report::to_dir(dir.path()).unwrap()));
        all.push((name, metrics(dir.path())));
    };
    let start = model.fresh_adapter(&lora(), 3).unwrap();
    let (examples, pairs) = (sft_examples(&model, 12), comparisons(&model, 8));
    let (mut sft_adapter, mut rm) = (None, None);
    stage("sft", &mut |session| {
        let config = Sft { per_device_train_batch_size: 4, gradient_accumulation_steps: 1, ..sft_config() };
        let setup = Setup { base: &model.base, start: &start, recompute: Recompute::Mlp, seed: 3 };
        sft_adapter = Some(sft::train(setup, &examples, &[], &config, session).unwrap().0);
    });
    let sft_adapter = sft_adapter.unwrap();
    stage("reward", &mut |session| {
        let config = Reward { per_device_train_batch_size: 4, gradient_accumulation_steps: 1, ..reward_config() };
        let setup = Setup { base: &model.base, start: &sft_adapter, recompute: Recompute::Off, seed: 3 };
        rm = Some(reward::train::train(setup, &pairs, &[], &config, session).unwrap().0);
    });
    let rm = rm.unwrap();
    let roles = Roles { base: &model.base, reward_base: &model.base, sft: &sft_adapter, reward: Some(&rm) };
    stage("ppo", &mut |session| drop(run_ppo(roles, &model, &short_ppo(), 4, session)));
    all
}

#[test]
fn a_shortened_quickstart_follows_the_hosts_figures() {
    let Some(device) = emulated() else { return };
    let _time = timed("the shortened quickstart");
    let (want, got) = (short_quickstart(None), short_quickstart(Some(&device)));
    for ((stage, want), (_, got)) in want.iter().zip(&got) {
        assert!(!want.is_empty(), "{stage}");
        let worst = assert_same_figures(stage, got, want, 1e-3);
        say(&format!("shortened quickstart, {stage}: figures of {} steps within {worst:.1e}", want.len()));
    }
}
