//! A run that is killed anywhere resumes to the same bytes.
//!
//! The long run of `killed_at_random_moments_...`: `FOURFOLD_KILLS=200 FOURFOLD_KILL_SEED=1 cargo test --release --test
//! faults killed_at_random -- --nocapture`.

use std::fs;
use std::time::{Duration, Instant};

use fourfold::rng::SplitMix64;

use crate::support::Place;
use crate::world::{assert_same, finish, line, place, run_all, signal, start};

const ALL: [&str; 5] = ["sft", "reward", "dpo", "kto", "ppo"];

/// In the middle of an epoch, and of a PPO iteration between its minibatches.
#[test]
fn resumed_from_any_step_every_stage_ends_with_the_same_bytes() {
    let whole = place();
    run_all(&whole, &ALL);
    let other = place();
    run_all(&other, &ALL[..2]);
    for stage in ALL {
        let every = format!("{} --set checkpoint.save_total_limit=1000", line(stage));
        let ran = other.run(&format!("{every} --overwrite"));
        assert_eq!(ran.code, 0, "{stage}: {}", ran.stderr);
        assert_same(&whole, &other, stage, "checkpoints at every step change nothing");
        let steps = fs::read_dir(other.path(&format!("out/{stage}/checkpoints"))).unwrap().count();
        assert!(steps >= 5, "{stage} took {steps} steps");
        for step in (1..=steps).rev() {
            let ran = other.run(&format!("{every} --resume out/{stage}/checkpoints/checkpoint-{step}"));
            assert_eq!(ran.code, 0, "{stage} from {step}: {}", ran.stderr);
            assert!(ran.stderr.contains(&format!("after {step} step")), "{}", ran.stderr);
            assert_same(&whole, &other, stage, &format!("resumed after step {step}"));
        }
    }
}

#[test]
fn killed_at_random_moments_sft_reward_and_ppo_end_with_the_same_bytes() {
    let from_env = |name: &str, or: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(or);
    let (kills, seed) = (from_env("FOURFOLD_KILLS", 20), from_env("FOURFOLD_KILL_SEED", 1));
    const PIPELINE: [&str; 3] = ["sft", "reward", "ppo"];
    let whole = place();
    // How long a stage takes here decides which moments there are.
    let took = PIPELINE.map(|stage| {
        let begun = Instant::now();
        run_all(&whole, &[stage]);
        begun.elapsed()
    });
    let mut rng = SplitMix64::new(seed);
    let (mut killed, mut passes) = (0, 0);
    while killed < kills {
        let broken: Place = place();
        for (stage, took) in PIPELINE.iter().zip(took) {
            loop {
                let mut child = start(&broken, &format!("{} --resume --from-start", line(stage)));
                let moment = Duration::from_secs_f64(took.as_secs_f64() * 1.1 * rng.uniform());
                let begun = Instant::now();
                let mut ended = None;
                while killed < kills && ended.is_none() && begun.elapsed() < moment {
                    std::thread::sleep(Duration::from_millis(1));
                    ended = child.try_wait().unwrap();
                }
                if killed < kills && ended.is_none() {
                    signal(&child, libc::SIGKILL);
                }
                let ran = finish(child);
                match ran.code {
                    0 => break,
                    -1 => killed += 1,
                    code => panic!("seed {seed}, after {killed} kills, {stage} ended with {code}: {}", ran.stderr),
                }
            }
            assert_same(&whole, &broken, stage, &format!("seed {seed}, {killed} kills"));
        }
        passes += 1;
    }
    println!("{killed} kills over {passes} passes of sft, reward and ppo, seed {seed}: the same bytes every time");
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_previous_one_is_used() {
    let (whole, broken) = (place(), place());
    run_all(&whole, &["sft"]);
    run_all(&broken, &["sft"]);
    fs::remove_file(broken.path("out/sft/summary.json")).unwrap();
    let checkpoints = broken.path("out/sft/checkpoints");
    let mut names: Vec<_> = fs::read_dir(&checkpoints).unwrap().map(|e| e.unwrap().path()).collect();
    names.sort();
    assert_eq!(names.len(), 2, "save_total_limit");
    let arrays = names[1].join("state.safetensors");
    let mut bytes = fs::read(&arrays).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&arrays, bytes).unwrap();
    let ran = broken.run(&format!("{} --resume", line("sft")));
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let name = names[1].file_name().unwrap().to_str().unwrap();
    assert!(ran.stderr.contains("passed over") && ran.stderr.contains(name), "{}", ran.stderr);
    assert_same(&whole, &broken, "sft", "from the checkpoint before");
}
