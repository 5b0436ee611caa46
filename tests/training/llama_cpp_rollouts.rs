//! Rollouts that llama.cpp's server samples, which the run starts as a child process: a run through it equals the run without one,
//! it is started anew for each version of the actor with another file, and a server that dies, never becomes healthy, replies
//! wrongly or has other weights is noticed and the run's state kept. The server is a program of the tests; it does not test
//! llama.cpp.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use fourfold::config;
use fourfold::config::Stage;
use fourfold::error::exit_code;
use fourfold::model_files::ModelFiles;
use fourfold::run::{self, RunOptions};
use fourfold::tokenizer::SpecialTokens;
use serde_json::{Value, json};

use super::llama_cpp::{command, journal};
use super::reward_sources::run_on;
use super::served_rollouts::{KEYS, assert_same, record};

const GREEDY: &str = "temperature = 0.0\n";

fn section(server: &[String]) -> String {
    format!("[ppo.rollout]\nengine = \"llama.cpp\"\nretries = 1\nserver = {server:?}\n")
}

/// What a run through a server by these words left, and the server's journal.
fn served(keys: &str, words: &[&str]) -> ((Value, Vec<Value>, Vec<Value>), Vec<Value>) {
    let dir = tempfile::tempdir().unwrap();
    let ran = run_on(&format!("{keys}{}", section(&command(dir.path(), words))), record).unwrap();
    (ran, journal(dir.path()))
}

fn starts(journal: &[Value]) -> Vec<&Value> {
    journal.iter().filter(|line| line.get("start").is_some()).collect()
}

fn bodies(journal: &[Value]) -> Vec<&Value> {
    journal.iter().filter_map(|line| line.get("body")).collect()
}

/// The word behind a name on the command line of a start.
fn word<'j>(start: &'j Value, name: &str) -> &'j str {
    let words: Vec<&str> = start["start"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
    words[words.iter().position(|word| *word == name).unwrap() + 1]
}

#[test]
fn a_run_through_llama_cpps_server_equals_one_without_and_starts_it_anew_for_each_version() {
    let greedy = format!("{KEYS}{GREEDY}");
    let own = run_on(&greedy, record).unwrap();
    let (through, journal) = served(&greedy, &[]);
    assert_same(&own, &through);
    for metrics in &through.1 {
        let mean = metrics["sampling/sampling_logp_difference/mean"].as_f64().unwrap();
        assert!(mean < 1e-4 && metrics["sampling/unreported_tokens"] == 0.0, "{metrics}");
    }
    let starts = starts(&journal);
    let distinct = |of: &dyn Fn(&Value) -> String| starts.iter().map(|start| of(start)).collect::<BTreeSet<_>>().len();
    assert_eq!(starts.len(), 2, "two iterations");
    assert_eq!(
        (distinct(&|start| start["adapter"].to_string()), distinct(&|start| word(start, "--lora").into())),
        (2, 2)
    );
    for start in &starts {
        assert_eq!((word(start, "-m"), word(start, "--host")), ("base.gguf", "127.0.0.1"));
        assert!(!Path::new(word(start, "--lora")).exists(), "it is removed with its server");
        #[cfg(target_os = "linux")]
        assert!(!super::llama_cpp::lives(&start["pid"]), "it ends with the run");
    }
    let asked = bodies(&journal);
    assert_eq!(asked.len(), 8);
    for body in asked {
        // What llama.cpp would otherwise take from its own defaults or command line.
        for (key, value) in [
            ("temperature", json!(0.0)),
            ("top_p", json!(1.0)),
            ("top_k", json!(0)),
            ("min_p", json!(0.0)),
            ("samplers", json!(["top_k", "top_p", "temperature"])),
            ("repeat_penalty", json!(1.0)),
            ("dry_multiplier", json!(0.0)),
            ("xtc_probability", json!(0.0)),
            ("ignore_eos", json!(false)),
            ("stop", json!([])),
            ("cache_prompt", json!(false)),
            ("n_predict", json!(12)),
            ("n_probs", json!(1)),
            ("post_sampling_probs", json!(false)),
            ("return_tokens", json!(true)),
        ] {
            assert_eq!(body[key], value, "{key}");
        }
    }
}

#[test]
fn a_text_that_the_server_ends_at_a_token_which_is_no_end_here_goes_on() {
    let greedy = format!("{KEYS}{GREEDY}");
    let own = run_on(&greedy, record).unwrap();
    let files = ModelFiles::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/quickstart/assets/base")).unwrap();
    let text = own.2[0]["response"].as_str().unwrap();
    let ids = files.tokenizer().encode(text, SpecialTokens::None).unwrap();
    let (through, journal) = served(&greedy, &["--eog", &ids[1].to_string()]);
    assert_same(&own, &through);
    let asked = bodies(&journal);
    assert!(asked.len() > 8 && asked.iter().any(|body| body["n_predict"].as_u64().unwrap() < 12), "{}", asked.len());
}

#[test]
fn responses_have_seeds_of_their_own_and_tokens_without_a_log_probability_are_counted_and_left_as_they_are() {
    let (whole, journal) = served(KEYS, &[]);
    let seeds: BTreeSet<String> = bodies(&journal).iter().map(|body| body["seed"].to_string()).collect();
    assert_eq!(seeds.len(), 8);
    let (silent, _) = served(KEYS, &["--deed", "silent"]);
    assert_same(&whole, &silent);
    for (whole, silent) in whole.1.iter().zip(&silent.1) {
        let get = |metrics: &Value, key: &str| metrics[key].as_f64().unwrap();
        assert_eq!(get(whole, "sampling/unreported_tokens"), 0.0);
        assert!(get(silent, "sampling/unreported_tokens") >= 8.0, "{silent}");
        for key in ["sampling/server_mismatch", "sampling/sampler_kl_k3", "sampling/sampling_logp_difference/max"] {
            assert!(get(whole, key).abs() < 1e-4 && get(silent, key).abs() < 1e-4, "{key}");
        }
    }
}

#[test]
fn a_server_whose_adapter_has_not_changed_is_kept() {
    let (_, journal) = served(&format!("{KEYS}critic_warmup = 1\n"), &[]);
    assert_eq!((starts(&journal).len(), bodies(&journal).len()), (1, 8), "the critic alone was trained in between");
}

#[test]
fn a_server_that_cannot_sample_from_the_actor_is_refused_with_what_to_do() {
    for (words, more, said) in [
        (["--deed", "exit"], "", &["exit status: 1); its log ends:", "failed to load model 'base.gguf'"][..]),
        (
            ["--deed", "never"],
            "timeout_seconds = 1.5\n",
            &["not healthy within timeout_seconds = 1.5", "503", "Loading model"],
        ),
        (["--deed", "bare"], "", &["nats per token", "max_mismatch", "server, is that of [base]", "llama-server.log"]),
        (["--deed", "textual"], "", &["no tokens", "return_tokens"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let text = section(&command(dir.path(), &words));
        let error = run_on(&format!("{KEYS}{text}{more}"), record).unwrap_err();
        let is_of_the_start = ["exit", "never"].contains(&words[1]);
        assert_eq!(exit_code(&error), if is_of_the_start { 2 } else { 1 }, "{error:#}");
        let error = format!("{error:#}");
        assert!(!error.contains("logprobs_mode"), "it is no key of llama.cpp's: {error}");
        assert!(said.iter().all(|said| error.contains(said)), "{said:?}: {error}");
    }
}

/// A config of three iterations whose rollouts are sampled by what `ppo.rollout.server` names.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let here = |path: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join(path).display().to_string();
        let place = Self(tempfile::tempdir().unwrap());
        let lines: Vec<String> = (0..12).map(|i| record(i).to_string()).collect();
        fs::write(place.path("data.jsonl"), lines.join("\n")).unwrap();
        let text = format!(
            "[base]\npath = {:?}\n[data]\npath = {:?}\neval_rows = 4\n[ppo]\nadapter = {:?}\nbatch_size = 4\n\
             total_episodes = 12\nresponse_length = 12\n{}{}",
            here("src/quickstart/assets/base"),
            place.path("data.jsonl").display().to_string(),
            here("adapters/quickstart/sft"),
            KEYS.replace("REWARD", &format!("{:?}", here("adapters/quickstart/reward"))),
            section(&["no-such-llama-server".to_owned()]),
        );
        fs::write(place.path("run.toml"), text).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, out: &str, resume: bool, words: Option<&[&str]>, sets: &[&str]) -> anyhow::Result<Value> {
        let folder = self.path(&format!("{out}-server-{resume}"));
        fs::create_dir_all(&folder)?;
        let server = words.map(|words| format!("ppo.rollout.server={:?}", command(&folder, words)));
        let sets: Vec<String> = server.into_iter().chain(sets.iter().map(|&set| set.to_owned())).collect();
        let config = config::load(&self.path("run.toml"), &sets)?;
        let options = RunOptions { resume: resume.then(|| "latest".into()), ..RunOptions::default() };
        run::stage(Stage::Ppo, &config, &self.path(out), &options)
    }
}

#[test]
fn rollouts_are_sampled_ahead_by_the_version_before() {
    let place = Place::new();
    place.run("out", false, Some(&[]), &["ppo.rollout.async_rollouts=1"]).unwrap();
    let text = fs::read_to_string(place.path("out/metrics.jsonl")).unwrap();
    let metrics: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let rollouts: Vec<&Value> = metrics.iter().filter(|line| line.get("sampling/policy_lag").is_some()).collect();
    let lags: Vec<f64> = rollouts.iter().map(|line| line["sampling/policy_lag"].as_f64().unwrap()).collect();
    assert_eq!(lags, [0.0, 1.0, 1.0]);
    assert!(rollouts.iter().all(|line| line["sampling/server_mismatch"].as_f64().unwrap() < 1e-4));
    let journal = journal(&place.path("out-server-false"));
    // The first version samples two rollouts, and the second the third.
    let kinds: Vec<bool> = journal.iter().map(|line| line.get("start").is_some()).collect();
    assert_eq!(kinds, [&[true][..], &[false; 8], &[true], &[false; 4]].concat());
}

#[test]
fn a_server_that_dies_amid_the_run_leaves_the_state_and_the_resumed_run_ends_with_the_same_weights() {
    let place = Place::new();
    place.run("whole", false, Some(&[]), &[]).unwrap();
    let error = format!("{:#}", place.run("died", false, Some(&["--deed", "dies"]), &[]).unwrap_err());
    assert!(error.contains("exit status: 9") && error.contains("\n  out of memory"), "{error}");
    assert!(error.contains("kept in") && !error.contains("raise timeout_seconds"), "{error}");
    assert!(fs::read_to_string(place.path("died/llama-server.log")).unwrap().contains("out of memory"));
    assert!(!place.path("died/rollout").exists(), "no adapter is left");
    place.run("died", true, Some(&[]), &[]).unwrap();
    let of = |out: &str| {
        let read = |name: &str| fs::read(place.path(out).join(name)).unwrap();
        (read("actor/adapter_model.safetensors"), read("critic/adapter_model.safetensors"), read("samples.jsonl"))
    };
    assert!(of("whole") == of("died"));
    let asked = journal(&place.path("died-server-true"));
    assert_eq!(bodies(&asked).len(), 8, "two of three rollouts");
}

#[test]
fn a_server_that_ends_before_the_first_step_leaves_no_folder_and_one_of_a_resumed_run_leaves_it() {
    let place = Place::new();
    let refused = |out: &str, resume: bool| {
        let error = place.run(out, resume, Some(&["--deed", "exit"]), &[]).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        format!("{error:#}")
    };
    let says =
        |error: &str, said: &str| assert!(error.contains(said) && error.contains("failed to load model"), "{error}");
    says(&refused("out", false), "its log ends:");
    assert!(!place.path("out").exists());
    // What was there stays, and the folder is free for any run.
    fs::create_dir(place.path("empty")).unwrap();
    says(&refused("empty", false), "its log ends:");
    let left: Vec<_> = fs::read_dir(place.path("empty")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["run.lock"]);
    place.run("empty", false, Some(&[]), &["ppo.total_episodes=4"]).unwrap();
    // A run that has a checkpoint keeps all of it.
    place.run("died", false, Some(&["--deed", "dies"]), &[]).unwrap_err();
    says(&refused("died", true), &format!("see its log {}", place.path("died/llama-server.log").display()));
    assert!(place.path("died/checkpoints").exists() && place.path("died/config.toml").exists());
}

#[test]
fn what_the_engine_lacks_is_said_before_anything_is_trained() {
    let place = Place::new();
    let of_file = fs::read_to_string(place.path("run.toml")).unwrap();
    let fresh: String =
        of_file.lines().filter(|line| !line.starts_with("adapter = ")).flat_map(|line| [line, "\n"]).collect();
    for (n, (file, sets, said)) in [
        (&of_file, &[][..], "server = [\"no-such-llama-server\", …] cannot be started: it is in no folder of PATH"),
        (&of_file, &["ppo.rollout.server=[]"], "needs its command: server = [\"llama-server\""),
        (&of_file, &["ppo.rollout.urls=[\"http://127.0.0.1:9\"]"], "no use for urls"),
        (&of_file, &["ppo.rollout.api_key_env=\"PATH\""], "no use for api_key_env"),
        (&of_file, &["ppo.rollout.logprobs_mode=\"processed_logprobs\""], "no use for logprobs_mode"),
        (&of_file, &["ppo.rollout.server=[\"llama-server\", \"--port\", \"8080\"]"], "remove --port from server"),
        (&of_file, &["ppo.rollout.server=[\"llama-server\", \"--lora\", \"a.gguf\"]"], "remove --lora from server"),
        (&of_file, &["ppo.rollout.server=[\"llama-server\", \"--grammar\", \"root\"]"], "remove --grammar from server"),
        (&of_file, &["ppo.rollout.adapter_dir=\"a,b\""], "takes no comma"),
        (&of_file, &["ppo.temperature=0.7"], "set it to 1 or 0"),
        (&fresh, &["lora.use_dora=true"], "DoRA adapter's magnitudes; train LoRA"),
        (&fresh, &["lora.target_modules=[\"q_proj\", \"lm_head\"]"], "embedding or lm_head"),
    ]
    .into_iter()
    .enumerate()
    {
        fs::write(place.path("run.toml"), file).unwrap();
        let error = place.run(&format!("out-{n}"), false, None, sets).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        assert!(format!("{error:#}").contains(said), "{said}: {error:#}");
        assert!(!place.path(&format!("out-{n}")).exists(), "{said}: nothing is written");
    }
}
