//! Rollouts that a server samples ahead, from a config to the files of a run: which adapter each request names, a run that is
//! resumed from any of its checkpoints, a server that dies meanwhile, and what is refused. It does not test what an update makes
//! of them: `invariants/ahead.rs` does.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use fourfold::config;
use fourfold::config::Stage;
use fourfold::error::exit_code;
use fourfold::report::clocks;
use fourfold::run::{self, RunOptions};
use serde_json::{Value, json};

use super::vllm::{Deed, Log, fault, server};

const PPO: &str = "adapter = ADAPTER\nreward_adapter = REWARD\nlearning_rate = 1e-3\nbatch_size = 4\ntotal_episodes = 12\n\
                   num_ppo_epochs = 2\nnum_mini_batches = 2\nresponse_length = 12\neval_prompts = 0\n\
                   importance_sampling_correction = \"token_truncate\"\n";
const GRPO: &str = "adapter = ADAPTER\nlearning_rate = 1e-3\nnum_generations = 2\nmax_steps = 12\n\
                    per_device_train_batch_size = 4\nsteps_per_generation = 2\nnum_iterations = 2\n\
                    max_completion_length = 12\neval_prompts = 0\n\
                    dynamic_sampling_rollouts = 2\nimportance_sampling_correction = \"sequence_mask\"\n\
                    [[grpo.reward]]\nkind = \"length\"\nmax_tokens = 9\n";

/// A folder with records and a config.
struct Place {
    dir: tempfile::TempDir,
    stage: Stage,
}

impl Place {
    fn new(stage: Stage, keys: &str) -> Self {
        let here = |path: &str| format!("{:?}", Path::new(env!("CARGO_MANIFEST_DIR")).join(path).display().to_string());
        let dir = tempfile::tempdir().unwrap();
        let lines: Vec<String> =
            (0..12).map(|i| json!({ "prompt": format!("How is dish {i}?") }).to_string()).collect();
        fs::write(dir.path().join("data.jsonl"), lines.join("\n")).unwrap();
        let name = stage.name();
        let text = format!(
            "[base]\npath = {}\n[data]\npath = {:?}\neval_rows = 4\n[checkpoint]\nsave_steps = 1\nsave_total_limit = 100\n[{name}]\n\
             {}\n[{name}.rollout]\nengine = \"vllm\"\nasync_rollouts = 1\nretries = 0\nurls = [\"http://127.0.0.1:9/v1\"]\n",
            here("src/quickstart/assets/base"),
            dir.path().join("data.jsonl").display().to_string(),
            keys.replace("ADAPTER", &here("adapters/quickstart/sft"))
                .replace("REWARD", &here("adapters/quickstart/reward")),
        );
        fs::write(dir.path().join("run.toml"), text).unwrap();
        Self { dir, stage }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, out: &str, resume: Option<&Path>, url: &str, sets: &[&str]) -> Result<Value> {
        let mut all = vec![format!("{}.rollout.urls=[{url:?}]", self.stage.name())];
        all.extend(sets.iter().map(|&set| set.to_owned()));
        let config = config::load(&self.path("run.toml"), &all)?;
        let options = RunOptions { resume: resume.map(Into::into), ..RunOptions::default() };
        run::stage(self.stage, &config, &self.path(out), &options)
    }

    fn metrics(&self, out: &str) -> Vec<Value> {
        let text = clocks::without(&fs::read_to_string(self.path(out).join("metrics.jsonl")).unwrap());
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// What training leaves, by bytes.
    fn left(&self, out: &str) -> (Vec<u8>, Vec<u8>, Vec<Value>) {
        let read = |name: &str| fs::read(self.path(out).join(name)).unwrap();
        (read("actor/adapter_model.safetensors"), read("samples.jsonl"), self.metrics(out))
    }
}

/// The requests for responses, as (number of the adapter in the order in which they were loaded, prompt, seed).
fn asked(log: &Log) -> Vec<(usize, String, String)> {
    let log = log.lock().unwrap();
    let mut names = BTreeMap::new();
    for (_, body) in log.iter().filter(|(path, _)| path.ends_with("/load_lora_adapter")) {
        let number = names.len();
        names.entry(body["lora_name"].to_string()).or_insert(number);
    }
    let of = |body: &Value| (names[&body["model"].to_string()], body["prompt"].to_string(), body["seed"].to_string());
    log.iter().filter(|(path, _)| path.ends_with("/completions")).map(|(_, body)| of(body)).collect()
}

#[test]
fn each_rollout_but_the_first_is_of_the_adapter_before_and_prompts_and_seeds_are_those_of_a_run_without() {
    let place = Place::new(Stage::Ppo, PPO);
    let [ahead, apart] = [1, 0].map(|rollouts| {
        let (url, log) = server(|_, _, _| Deed::Answer);
        let out = rollouts.to_string();
        place.run(&out, None, &url, &[&format!("ppo.rollout.async_rollouts={rollouts}")]).unwrap();
        (asked(&log), place.metrics(&out))
    });
    let mut versions: Vec<usize> = ahead.0.iter().map(|(version, ..)| *version).collect();
    versions.sort_unstable();
    assert_eq!(versions, [[0; 8].as_slice(), &[1; 4]].concat(), "twelve responses, none that nobody uses");
    let questions = |all: &[(usize, String, String)]| {
        let mut all: Vec<_> = all.iter().map(|(_, prompt, seed)| (prompt.clone(), seed.clone())).collect();
        all.sort();
        all
    };
    assert_eq!(questions(&ahead.0), questions(&apart.0));
    let lags: Vec<&Value> = ahead.1.iter().map(|line| &line["sampling/policy_lag"]).collect();
    assert_eq!(lags, [0.0, 1.0, 1.0].map(Value::from).iter().collect::<Vec<_>>());
    assert!(ahead.1.iter().all(|line| line["sampling/server_mismatch"].as_f64().unwrap() < 1e-4));
    assert!(ahead.1[1]["sampling/sampler_kl_k3"].as_f64() > apart.1[1]["sampling/sampler_kl_k3"].as_f64());
}

#[test]
fn a_run_that_is_resumed_from_any_turn_samples_the_same_rollouts_and_leaves_the_same_bytes() {
    for (stage, keys) in [(Stage::Ppo, PPO), (Stage::Grpo, GRPO)] {
        let place = Place::new(stage, keys);
        let (url, _) = server(|_, _, _| Deed::Answer);
        place.run("out", None, &url, &[]).unwrap();
        let whole = place.left("out");
        if stage == Stage::Grpo {
            let refills = whole.2.iter().map(|line| line["sampling/refills"].as_f64().unwrap()).sum::<f64>();
            assert!(refills > 0.0, "groups are refilled here: {:?}", whole.2);
        }
        let checkpoints = fs::read_dir(place.path("out/checkpoints")).unwrap();
        let mut from: Vec<PathBuf> = checkpoints.map(|entry| entry.unwrap().path()).collect();
        from.sort();
        assert!(from.len() >= 12, "{from:?}");
        for from in from {
            fs::remove_file(place.path("out/summary.json")).unwrap();
            place.run("out", Some(&from), &url, &[]).unwrap();
            assert!(place.left("out") == whole, "{} resumed from {}", stage.name(), from.display());
        }
    }
}

#[test]
fn a_server_that_fails_meanwhile_ends_the_run_after_its_update_and_the_resumed_run_is_the_same() {
    let place = Place::new(Stage::Ppo, PPO);
    let (good, _) = server(|_, _, _| Deed::Answer);
    place.run("whole", None, &good, &[]).unwrap();
    // One load and four responses of the first rollout; the second is asked for during the first update.
    let (bad, _) = server(|number, path, _| match path.ends_with("/completions") && number > 4 {
        true => Deed::Reply(fault("400 Bad Request", "no more")),
        false => Deed::Answer,
    });
    let error = format!("{:#}", place.run("broken", None, &bad, &[]).unwrap_err());
    assert!(error.contains("no more") && error.contains("kept in"), "{error}");
    assert_eq!(place.metrics("broken"), place.metrics("whole")[..1], "the update that ran meanwhile is whole");
    place.run("broken", Some(Path::new("latest")), &good, &[]).unwrap();
    assert!(place.left("broken") == place.left("whole"));
}

#[test]
fn what_cannot_be_sampled_ahead_is_said_before_anything_runs() {
    let place = Place::new(Stage::Ppo, PPO);
    let rloo = PPO.split("num_ppo_epochs").next().unwrap().replace("batch_size = 4\ntotal_episodes = 12\n", "");
    let rloo = Place::new(Stage::Rloo, &rloo);
    let refusal = |place: &Place, set: &str| {
        let error = place.run("out", None, "http://127.0.0.1:9/v1", &[set]).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        assert!(!place.path("out").exists());
        format!("{error:#}")
    };
    for (place, set, said) in [
        (&place, "ppo.rollout.engine=\"self\"", "engine = \"self\" has none"),
        (&place, "ppo.importance_sampling_correction=\"none\"", "set it to \"token_truncate\""),
        (&place, "ppo.rollout.async_rollouts=2", "0 or 1"),
        (&rloo, "rloo.num_generations=2", "use `fourfold grpo`"),
    ] {
        let found = refusal(place, set);
        assert!(found.contains("async_rollouts") && found.contains(said), "{set}: {found}");
    }
}
