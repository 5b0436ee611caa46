//! Rollouts that a server samples: a run through a server that samples as this program does equals the run without one; each
//! version of the actor is loaded under a name of its own; servers that die, reply wrongly or serve other weights are noticed and
//! the run's state kept. The server is a thread that speaks as vLLM does; it does not test vLLM.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use fourfold::config;
use fourfold::config::Stage;
use fourfold::error::exit_code;
use fourfold::run;
use fourfold::run::RunOptions;
use serde_json::{Value, json};

use super::reward_sources::run_on;
use super::vllm::{Deed, fault, reply, server};

/// Both have the trainer's log-probabilities in place of the sampler's.
pub(super) const KEYS: &str = "reward_adapter = REWARD\nlearning_rate = 1e-3\nnum_ppo_epochs = 2\nnum_mini_batches = 2\n\
                    importance_sampling_correction = \"token_truncate\"\n";

pub(super) fn record(i: usize) -> Value {
    json!({ "prompt": format!("How is dish {i}?") })
}

fn section(urls: &[&String]) -> String {
    format!("[ppo.rollout]\nengine = \"vllm\"\nretries = 1\nurls = {urls:?}\n")
}

/// Texts and scores of the rollouts, and two metrics, of a run and of one that ought to be the same.
pub(super) fn assert_same(of: &(Value, Vec<Value>, Vec<Value>), other: &(Value, Vec<Value>, Vec<Value>)) {
    assert_eq!(of.2.len(), other.2.len());
    for (a, b) in of.2.iter().zip(&other.2) {
        assert_eq!((&a["response"], &a["finish_reason"]), (&b["response"], &b["finish_reason"]));
    }
    for (a, b) in of.1.iter().zip(&other.1) {
        for key in ["objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "policy/entropy_avg"] {
            let (a, b) = (a[key].as_f64().unwrap(), b[key].as_f64().unwrap());
            assert!((a - b).abs() < 1e-4, "{key}: {a} and {b}");
        }
    }
}

#[test]
fn a_run_through_a_server_equals_one_without_and_loads_each_version_under_a_name_of_its_own() {
    let own = run_on(KEYS, record).unwrap();
    let (url, log) = server(|_, _, _| Deed::Answer);
    let served = run_on(&format!("{KEYS}{}", section(&[&url])), record).unwrap();
    assert_same(&own, &served);
    for metrics in &served.1 {
        let mean = metrics["sampling/sampling_logp_difference/mean"].as_f64().unwrap();
        let k3 = metrics["sampling/sampler_kl_k3"].as_f64().unwrap();
        assert!(mean < 1e-4 && k3.abs() < 1e-4, "{metrics}");
    }
    let log = log.lock().unwrap();
    let all = |path: &str| log.iter().filter(|(of, _)| of == path).map(|(_, body)| body.clone()).collect::<Vec<_>>();
    let (loads, unloads) = (all("/v1/load_lora_adapter"), all("/v1/unload_lora_adapter"));
    let distinct = |key: &str| loads.iter().map(|load| load[key].to_string()).collect::<BTreeSet<_>>().len();
    assert_eq!((loads.len(), distinct("lora_name"), distinct("lora_path")), (2, 2, 2), "two iterations");
    let names = |all: &[Value]| all.iter().map(|one| one["lora_name"].clone()).collect::<Vec<_>>();
    assert_eq!(names(&loads), names(&unloads), "in their order, the last at the end");
    assert!(loads.iter().all(|load| !Path::new(load["lora_path"].as_str().unwrap()).exists()));
    let asked = all("/v1/completions");
    assert_eq!(asked.len(), 8);
    for body in &asked {
        // What vLLM would otherwise take from generation_config.json or its own defaults.
        for (key, value) in [
            ("temperature", json!(1.0)),
            ("top_p", json!(1.0)),
            ("top_k", json!(-1)),
            ("min_p", json!(0.0)),
            ("repetition_penalty", json!(1.0)),
            ("presence_penalty", json!(0.0)),
            ("frequency_penalty", json!(0.0)),
            ("ignore_eos", json!(true)),
            ("max_tokens", json!(12)),
            ("return_token_ids", json!(true)),
        ] {
            assert_eq!(body[key], value, "{key}");
        }
    }
}

#[test]
fn servers_take_turns_and_one_that_dies_is_passed_over() {
    let own = run_on(KEYS, record).unwrap();
    let (good, of_good) = server(|_, _, _| Deed::Answer);
    let (bad, of_bad) = server(|n, path, _| match path {
        "/v1/completions" if n % 2 == 0 => Deed::Reply(fault("500 Internal Server Error", "EngineCore is dead")),
        "/v1/completions" => Deed::Reply("HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{\"cho".into()),
        _ => Deed::Answer,
    });
    let served = run_on(&format!("{KEYS}{}", section(&[&good, &bad])), record).unwrap();
    assert_same(&own, &served);
    let count =
        |log: &super::vllm::Log| log.lock().unwrap().iter().filter(|(path, _)| path.ends_with("completions")).count();
    assert_eq!((count(&of_good), count(&of_bad)), (8, 4), "half of them first went to the other");
}

#[test]
fn a_server_that_is_dead_is_left_out_where_another_lives() {
    let own = run_on(KEYS, record).unwrap();
    let (good, of_good) = server(|_, _, _| Deed::Answer);
    // It takes connections and closes them.
    let (dead, of_dead) = server(|_, _, _| Deed::Reply(String::new()));
    let served = run_on(&format!("{KEYS}{}", section(&[&dead, &good])), record).unwrap();
    assert_same(&own, &served);
    let paths = |log: &super::vllm::Log| log.lock().unwrap().iter().map(|(path, _)| path.clone()).collect::<Vec<_>>();
    assert_eq!(paths(&of_good).iter().filter(|path| path.ends_with("completions")).count(), 8);
    assert_eq!(paths(&of_dead), ["/v1/load_lora_adapter"; 4], "tried twice for each version, and never asked");
    let error = format!("{:#}", run_on(&format!("{KEYS}{}", section(&[&dead])), record).unwrap_err());
    assert!(error.contains(&dead) && error.contains("raise timeout_seconds or retries"), "{error}");
}

#[test]
fn a_server_that_is_started_again_amid_a_rollout_is_given_the_adapter_anew() {
    let own = run_on(KEYS, record).unwrap();
    // The process that takes its place knows no adapter until it has loaded one.
    let (restarted, knows) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let (url, log) = server(move |n, path, body| match path {
        "/v1/load_lora_adapter"
            if restarted.load(Ordering::SeqCst) > 0 && knows.fetch_add(1, Ordering::SeqCst) == 0 =>
        {
            Deed::Reply(reply("200 OK", "Success: LoRA adapter added successfully."))
        }
        "/v1/completions" if n >= 3 && knows.load(Ordering::SeqCst) == 0 => {
            restarted.store(1, Ordering::SeqCst);
            let message =
                format!("The model `{}` does not exist. Valid aliases: base.", body["model"].as_str().unwrap());
            Deed::Reply(fault("404 Not Found", &message))
        }
        _ => Deed::Answer,
    });
    let served = run_on(&format!("{KEYS}{}", section(&[&url])), record).unwrap();
    assert_same(&own, &served);
    let log = log.lock().unwrap();
    let loads: Vec<&Value> =
        log.iter().filter(|(path, _)| path == "/v1/load_lora_adapter").map(|(_, body)| body).collect();
    assert!(loads.len() > 2 && loads[0] == loads[1], "the same name and path: {loads:?}");
}

#[test]
fn what_a_server_computes_otherwise_is_measured_and_corrected_within_the_bound() {
    let keys = KEYS.replace("num_ppo_epochs = 2\nnum_mini_batches = 2", "num_ppo_epochs = 1\nnum_mini_batches = 1");
    let of = |shift: f64, high: f64| {
        let (url, _) = server(move |_, _, _| Deed::Shifted(shift));
        let keys = format!("{keys}importance_sampling_clip_max = {high}\n{}", section(&[&url]));
        run_on(&keys, record).unwrap().1.remove(0)
    };
    let (plain, corrected, bounded) = (of(0.0, 3.0), of(-0.1, 3.0), of(-0.1, 1.05));
    let get = |metrics: &Value, key: &str| metrics[key].as_f64().unwrap();
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-3 * b.abs().max(0.01), "{a} and {b}");
    for found in [&corrected, &bounded] {
        near(get(found, "sampling/sampling_logp_difference/mean"), 0.1);
        near(get(found, "sampling/sampling_logp_difference/max"), 0.1);
        // exp(d) - 1 - d with d = 0.1, the trainer's log-probability less the sampler's.
        near(get(found, "sampling/sampler_kl_k3"), 0.005_170_9);
        assert_eq!(get(found, "val/first_ratio"), 1.0, "the ratio is to the trainer's own");
    }
    for (found, weight) in [(&corrected, 0.1_f64.exp()), (&bounded, 1.05)] {
        for side in ["min", "mean", "max"] {
            near(get(found, &format!("sampling/importance_sampling_ratio/{side}")), weight);
        }
        near(get(found, "grad_norm/actor"), weight * get(&plain, "grad_norm/actor"));
    }
}

/// Metrics and samples of a run by a config's section.
fn run_section(stage: Stage, section: &str) -> (Vec<Value>, Vec<Value>) {
    let here = |path: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join(path).display().to_string();
    let dir = tempfile::tempdir().unwrap();
    let lines: Vec<String> = (0..12).map(|i| record(i).to_string()).collect();
    fs::write(dir.path().join("data.jsonl"), lines.join("\n")).unwrap();
    let text = format!(
        "[base]\npath = {:?}\n[data]\npath = {:?}\neval_rows = 4\n{}",
        here("src/quickstart/assets/base"),
        dir.path().join("data.jsonl").display().to_string(),
        section
            .replace("ADAPTER", &format!("{:?}", here("adapters/quickstart/sft")))
            .replace("REWARD", &format!("{:?}", here("adapters/quickstart/reward"))),
    );
    let file = dir.path().join("run.toml");
    fs::write(&file, text).unwrap();
    let out = dir.path().join("out");
    run::stage(stage, &config::load(&file, &[]).unwrap(), &out, &RunOptions::default()).unwrap();
    let lines = |name: &str| -> Vec<Value> {
        let text = fs::read_to_string(out.join(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    (lines("metrics.jsonl"), lines("samples.jsonl"))
}

#[test]
fn groups_of_grpo_and_rloo_are_sampled_by_a_server_each_response_with_a_seed_of_its_own() {
    for (stage, more) in
        [(Stage::Grpo, "beta = 0.05\nimportance_sampling_correction = \"sequence_mask\"\n"), (Stage::Rloo, "")]
    {
        let name = stage.name();
        let keys = format!(
            "[{name}]\nadapter = ADAPTER\nreward_adapter = REWARD\nlearning_rate = 1e-3\nnum_generations = 4\nmax_steps = 2\n\
             per_device_train_batch_size = 8\nmax_completion_length = 12\nsave_samples = 8\neval_prompts = 0\n{more}"
        );
        let (url, log) = server(|_, _, _| Deed::Answer);
        let (own, own_samples) = run_section(stage, &keys);
        let (served, samples) =
            run_section(stage, &format!("{keys}[{name}.rollout]\nengine = \"vllm\"\nurls = [{url:?}]\n"));
        assert_eq!((own.len(), served.len(), samples.len()), (2, 2, 16), "{name}");
        assert!(own_samples.iter().zip(&samples).all(|(a, b)| a["response"] == b["response"]), "{name}");
        for (a, b) in own.iter().zip(&served) {
            for key in ["objective/scores", "loss/policy_avg", "grad_norm/actor"] {
                let (a, b) = (a[key].as_f64().unwrap(), b[key].as_f64().unwrap());
                assert!((a - b).abs() < 1e-3 * a.abs().max(0.1), "{name} {key}: {a} and {b}");
            }
            assert!(a.get("sampling/sampler_kl_k3").is_none() && b["sampling/sampler_kl_k3"].as_f64().unwrap() < 1e-4);
        }
        let log = log.lock().unwrap();
        let asked: Vec<&Value> =
            log.iter().filter(|(path, _)| path.ends_with("completions")).map(|(_, body)| body).collect();
        let distinct = |key: &str| asked.iter().map(|body| body[key].to_string()).collect::<BTreeSet<_>>().len();
        assert_eq!((asked.len(), distinct("seed"), distinct("prompt")), (16, 16, 4), "{name}");
    }
}

#[test]
fn openais_engine_sends_openais_parameters_alone() {
    let (url, log) = server(|_, _, _| Deed::Answer);
    let own = run_on(KEYS, record).unwrap();
    let served = run_on(&format!("{KEYS}{}", section(&[&url]).replace("vllm", "openai")), record).unwrap();
    assert_same(&own, &served);
    for (_, body) in log.lock().unwrap().iter().filter(|(path, _)| path.ends_with("completions")) {
        assert!(["top_k", "min_p", "repetition_penalty", "ignore_eos"].iter().all(|key| body.get(key).is_none()));
    }
}

#[test]
fn a_server_that_cannot_sample_from_the_actor_is_refused_with_what_to_do() {
    type Wrong = fn(&str) -> Deed;
    let cases: [(Wrong, &[&str]); 5] = [
        (
            |path| if path.ends_with("completions") { Deed::WithoutAdapter } else { Deed::Answer },
            &["nats per token", "max_mismatch", "logprobs_mode"],
        ),
        (|_| Deed::Without("token_ids"), &["no choices[0].token_ids", "return_token_ids"]),
        (|_| Deed::Without("logprobs"), &["token_logprobs"]),
        (
            |_| Deed::Reply(reply("404 Not Found", "{\"detail\":\"Not Found\"}")),
            &["VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"],
        ),
        (
            |path| if path.ends_with("completions") { Deed::Reply(reply("200 OK", "<html>")) } else { Deed::Answer },
            &["not JSON", "retries"],
        ),
    ];
    for (wrong, said) in cases {
        let (url, _) = server(move |_, path, _| wrong(path));
        let error = format!("{:#}", run_on(&format!("{KEYS}{}", section(&[&url])), record).unwrap_err());
        assert!(said.iter().all(|said| error.contains(said)), "{said:?}: {error}");
    }
}

#[test]
fn an_adapter_that_vllm_cannot_take_ends_the_run_at_once_with_what_to_do() {
    // The reply of vLLM 0.32.0.
    let said = "Call to add_lora method failed: Worker failed with error 'LoRA rank 8 is greater than max_lora_rank 4.', please check \
                the stack trace above for the root cause";
    let (url, log) = server(|_, _, _| Deed::Reply(fault("500 Internal Server Error", said)));
    let error = format!("{:#}", run_on(&format!("{KEYS}{}", section(&[&url])), record).unwrap_err());
    assert!(error.contains("LoRA rank 8 is greater than max_lora_rank 4."), "{error}");
    assert!(error.contains("--max-lora-rank 8") && !error.contains("retries"), "{error}");
    assert_eq!(log.lock().unwrap().len(), 1, "no other try would end otherwise");
}

#[test]
fn a_run_whose_server_dies_or_serves_other_weights_is_kept_and_resumed_ends_with_the_same_weights() {
    let here = |path: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join(path).display().to_string();
    let dir = tempfile::tempdir().unwrap();
    let lines: Vec<String> = (0..12).map(|i| record(i).to_string()).collect();
    fs::write(dir.path().join("data.jsonl"), lines.join("\n")).unwrap();
    let (url, _) = server(|_, _, _| Deed::Answer);
    let text = format!(
        "[base]\npath = {:?}\n[data]\npath = {:?}\neval_rows = 4\n[ppo]\nadapter = {:?}\nbatch_size = 4\ntotal_episodes = 12\n\
         response_length = 12\n{}{}",
        here("src/quickstart/assets/base"),
        dir.path().join("data.jsonl").display().to_string(),
        here("adapters/quickstart/sft"),
        KEYS.replace("REWARD", &format!("{:?}", here("adapters/quickstart/reward"))),
        section(&[&url]),
    );
    let file = dir.path().join("run.toml");
    fs::write(&file, text).unwrap();
    let run = |out: &str, resume: Option<&str>, url: &str| {
        let sets = [format!("ppo.rollout.urls=[{url:?}]")];
        let config = config::load(&file, &sets).unwrap();
        let options = RunOptions { resume: resume.map(Into::into), ..RunOptions::default() };
        run::stage(Stage::Ppo, &config, &dir.path().join(out), &options)
    };
    run("whole", None, &url).unwrap();
    let of = |out: &str| {
        let read = |name: &str| fs::read(dir.path().join(out).join(name)).unwrap();
        (read("actor/adapter_model.safetensors"), read("critic/adapter_model.safetensors"), read("samples.jsonl"))
    };
    type Wrong = fn() -> Deed;
    let cases: [(&str, Wrong, &str); 2] =
        [("other", || Deed::WithoutAdapter, "max_mismatch"), ("dead", || Deed::Reply(String::new()), "retries")];
    for (out, wrong, said) in cases {
        // The second version's samples are not the actor's.
        let loads = AtomicUsize::new(0);
        let (bad, _) = server(move |_, path, _| {
            if path.ends_with("/load_lora_adapter") {
                loads.fetch_add(1, Ordering::SeqCst);
            }
            match path.ends_with("completions") && loads.load(Ordering::SeqCst) > 1 {
                true => wrong(),
                false => Deed::Answer,
            }
        });
        let error = format!("{:#}", run(out, None, &bad).unwrap_err());
        assert!(error.contains(said) && error.contains("kept in"), "{error}");
        let (good, log) = server(|_, _, _| Deed::Answer);
        run(out, Some("latest"), &good).unwrap();
        assert!(of("whole") == of(out), "{out}");
        let asked = log.lock().unwrap().iter().filter(|(path, _)| path.ends_with("completions")).count();
        assert_eq!(asked, 8, "{out}: two of three rollouts");
    }
}

#[test]
fn what_an_engine_lacks_is_said_before_anything_runs() {
    let refusal = |keys: &str, more: &str| {
        let error = run_on(&format!("reward_adapter = REWARD\n{more}\n[ppo.rollout]\n{keys}"), record).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        format!("{error:#}")
    };
    let vllm = "engine = \"vllm\"\nurls = [\"http://127.0.0.1:9/v1\"]\n";
    let with = |keys: &str| format!("{vllm}{keys}");
    for (keys, more, said) in [
        ("engine = \"vllm\"".to_owned(), "", "needs urls"),
        (
            "engine = \"vllm\"\nurls = [\"http://127.0.0.1:9/v1\", \"http://127.0.0.1:99999/v1\"]".to_owned(),
            "",
            "[ppo.rollout] urls = \"http://127.0.0.1:99999/v1\": its port",
        ),
        ("engine = \"openai\"\nurls = [\"http://:9/v1\"]".to_owned(), "", "it has no host"),
        ("urls = [\"http://127.0.0.1:9/v1\"]".to_owned(), "", "set engine = \"vllm\""),
        (with(""), "temperature = 0.7", "logprobs_mode = \"processed_logprobs\""),
        (with("logprobs_mode = \"processed_logprobs\""), "top_k = 5", "top_k = 0"),
        (with("").replace("vllm", "openai"), "top_k = 5", "has no top_k = 5"),
        (with("server_adapter_dir = \"/x\""), "", "adapter_dir"),
        (with("server = [\"llama-server\"]"), "", "set urls in its place"),
        (with("api_key_env = \"FOURFOLD_NO_SUCH_KEY\""), "", "export FOURFOLD_NO_SUCH_KEY="),
        (with("max_mismatch = 0.0"), "", "max_mismatch = 0"),
        (with("retires = 2"), "", "did you mean \"retries\"?"),
    ] {
        let found = refusal(&keys, more);
        assert!(found.contains(said), "{keys} {more}: {found}");
    }
}
