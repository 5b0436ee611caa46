//! A small PPO run with checkpoints: devices that fail at any moment, and runs that move from the host to a device.

use std::fs;
use std::path::Path;

use anyhow::Result;
use fourfold::config::{CheckpointConfig, Ppo};
use fourfold::device::OutOfMemory;
use fourfold::device::emulated::Emulated;
use fourfold::model::adapter::Adapter;
use fourfold::ops::weight::ComputeDtype;
use fourfold::ppo::train::train;
use fourfold::report::Report;
use fourfold::report::clocks::without;
use fourfold::rng::SplitMix64;
use fourfold::run::Model;
use fourfold::train::checkpoint_manager::CheckpointManager;
use fourfold::train::fingerprint::RunFingerprint;
use fourfold::train::lock::lock;
use fourfold::train::session::Session;
use fourfold::train::store::Store;

use crate::ppo_world::*;
use crate::stages::{adapters, assert_same_figures, model_on, short_ppo};
use crate::world::{emulated, machine, say, timed};

/// Starts the run in `out`, or goes on from its newest checkpoint; the trained adapters.
fn run(out: &Path, model: &Model, (sft, rm): (&Adapter, &Adapter)) -> Result<(Adapter, Adapter)> {
    let store = Store::at(out.join("checkpoints"));
    let (found, passed) = store.newest()?;
    assert!(passed.is_empty(), "damaged checkpoints: {passed:?}");
    let report = match &found {
        Some(found) => Report::go_on(out, found.manifest.positions)?,
        None => Report::to_dir(out)?,
    };
    let keeper = CheckpointManager {
        store,
        saving: CheckpointConfig { save_steps: 1, save_total_limit: 100 },
        origin: RunFingerprint::default(),
        bases: vec![],
        command: "fourfold ppo --resume".into(),
        last: found.as_ref().map(|found| (found.manifest.step, found.path.clone())),
        former: None,
        lock: lock(out)?,
    };
    let mut session = Session::new(report).kept(keeper, found.map(|found| found.snapshot));
    let roles = Roles { base: &model.base, reward_base: &model.base, sft, reward: Some(rm) };
    let config = Ppo { total_episodes: 4, batch_size: 2, response_length: 4, ..short_ppo() };
    let (prompts, source) = (questions(model, 8), source_of(roles));
    let stop = model.checkpoint.tokenizer().eos_ids();
    let run = ppo_run(roles, &prompts, stop, &source, &config, 6);
    let trained = train(&run, &mut session)?;
    Ok((trained.actor, trained.critic.unwrap()))
}

type Results = (Vec<u8>, [std::collections::BTreeMap<String, Vec<u32>>; 2]);

fn results(out: &Path, (actor, critic): &(Adapter, Adapter)) -> Results {
    let metrics = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    (without(&metrics).into_bytes(), [bits(actor), bits(critic)])
}

#[test]
fn a_device_that_fails_ends_with_one_error_and_the_resumed_run_has_the_same_bytes() {
    let Some((machine, device)) = machine() else { return };
    let _time = timed("faults");
    let moments: usize = std::env::var("FOURFOLD_GPU_FAULTS").map_or(20, |n| n.parse().unwrap());
    let model = model_on(1, ComputeDtype::F32, Some(&device));
    let (sft, rm) = adapters(&model);
    let adapters = (&sft, &rm);
    let idle = machine.live();
    let before = device.usage().allocations;
    let whole = tempfile::tempdir().unwrap();
    let want = results(whole.path(), &run(whole.path(), &model, adapters).unwrap());
    // A run's launches and copies are fewer or more than its allocations; a moment past its end is drawn again, earlier.
    let allocations = (device.usage().allocations - before) as u64;
    let mut latest = [allocations, 2 * allocations, allocations];
    let set: [fn(&Emulated, Option<u64>); 3] =
        [Emulated::fail_allocation_after, Emulated::fail_launch_after, Emulated::fail_copy_after];
    let mut rng = SplitMix64::new(12);
    let mut done = [0; 3];
    while done.iter().sum::<usize>() < moments {
        // Half of them are refused allocations.
        let kind = [0, 1, 0, 2][done.iter().sum::<usize>() % 4];
        let moment = (rng.uniform() * latest[kind] as f64) as u64;
        let out = tempfile::tempdir().unwrap();
        set[kind](&machine, Some(moment));
        let broken = run(out.path(), &model, adapters);
        set[kind](&machine, None);
        let Err(error) = broken else {
            latest[kind] = moment.max(1);
            continue;
        };
        let text = format!("{error:#}");
        let wanted = ["out of memory", "as a test asked for", "as a test asked for"][kind];
        assert!(text.contains(wanted), "fault {kind} at {moment}: {text}");
        if kind == 0 {
            assert!(error.chain().any(|cause| cause.is::<OutOfMemory>()), "{text}");
        }
        drop(error);
        let again =
            run(out.path(), &model, adapters).unwrap_or_else(|e| panic!("after fault {kind} at {moment}: {e:#}"));
        assert!(results(out.path(), &again) == want, "after fault {kind} at {moment}: other bytes");
        done[kind] += 1;
    }
    drop((sft, rm));
    say(&format!(
        "faults: {} allocations, {} launches, {} copies failed; resumed to the same bytes",
        done[0], done[1], done[2]
    ));
    assert!(machine.live() >= idle, "the base is still there");
    drop(model);
    assert_eq!((machine.live(), device.usage().live), (0, 0), "all memory came back");
}

#[test]
fn a_run_begun_on_the_host_goes_on_on_a_device() {
    let Some(device) = emulated() else { return };
    let _time = timed("a run that moves");
    let models = [None, Some(&device)].map(|device| model_on(1, ComputeDtype::F32, device));
    let (sft, rm) = adapters(&models[0]);
    let (stayed, moved) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let want = run(stayed.path(), &models[0], (&sft, &rm)).unwrap();
    let begun = run(moved.path(), &models[0], (&sft, &rm)).unwrap();
    assert!(results(moved.path(), &begun) == results(stayed.path(), &want));
    // The run was killed after its first iteration: all later checkpoints are gone.
    let mut names: Vec<_> =
        fs::read_dir(moved.path().join("checkpoints")).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort();
    assert!(names.len() > 3, "{names:?}");
    names.split_off(names.len() / 2).iter().for_each(|name| fs::remove_dir_all(name).unwrap());
    let got = run(moved.path(), &models[1], (&sft, &rm)).unwrap();
    let worst = assert_same_figures("moved", &metrics(moved.path()), &metrics(stayed.path()), 1e-4);
    let fixed = fixed_sequences(&models[0]);
    let apart = mean_difference(
        &logprobs(&models[0].base, Some(&got.0), &fixed),
        &logprobs(&models[0].base, Some(&want.0), &fixed),
    );
    say(&format!("a run that moves: figures within {worst:.1e}, the actor's log-probabilities {apart:.1e} apart"));
    assert!(apart < 1e-4, "{apart}");
}
