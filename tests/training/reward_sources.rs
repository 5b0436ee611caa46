//! Reward sources outside the process: child processes and a local server that are slow, dead, incomplete or return invalid
//! scores; and PPO over several sources from a config file.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fourfold::config;
use fourfold::config::Stage;
use fourfold::error::exit_code;
use fourfold::model::generate::{FinishReason, Response};
use fourfold::reward::source::command::CommandReward;
use fourfold::reward::source::http::HttpReward;
use fourfold::reward::source::retry::{RetryPolicy, Troubles};
use fourfold::reward::source::{RewardInputs, RewardSource};
use fourfold::run;
use serde_json::{Value, json};

pub fn retry(retries: usize, fallback: Option<f32>) -> RetryPolicy {
    RetryPolicy { timeout: Duration::from_millis(400), retries, backoff: Duration::from_millis(5), fallback }
}

/// Scores `n` responses, whose texts are their numbers and whose records' numbers are 10 more.
pub fn ask(source: &dyn RewardSource, n: usize) -> anyhow::Result<Vec<f32>> {
    let prompts: Vec<Vec<u32>> = (0..n as u32).map(|i| vec![100 + i]).collect();
    let response = |i| Response { tokens: vec![i, 0], logprobs: vec![0.0; 2], finish: FinishReason::Stop };
    let responses: Vec<Response> = (0..n as u32).map(response).collect();
    let decode = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    let entries: Vec<usize> = (10..10 + n).collect();
    source.scores(&RewardInputs {
        prompts: &prompts,
        responses: &responses,
        entries: &entries,
        decode: &decode,
        known: &[],
    })
}

fn program(script: &str, policy: RetryPolicy) -> CommandReward<'static> {
    CommandReward::start(vec!["/bin/sh".into(), "-c".into(), script.into()], None, policy).unwrap()
}

/// The response's number, which `ask` makes its text, as the score.
const HONEST: &str = r#"while read -r line; do
    response=${line##*\"response\":\"}
    echo "{\"score\": ${response%%\"*}.5}"
done"#;

#[test]
fn a_command_runs_across_rollouts_and_scores_each_response_in_order() {
    let counts = format!("n=$((n + 1)); echo $n >&2; {HONEST}");
    let source = program(&counts, retry(0, None));
    assert_eq!(
        ask(&source, 3).unwrap(),
        [0.5, 1.5, 2.5],
        "end tokens are left off, prompts are not mistaken for responses"
    );
    assert_eq!(ask(&source, 40).unwrap()[39], 39.5);
    assert_eq!(source.troubles(), Troubles::default());
}

#[test]
fn more_responses_than_a_pipe_holds_do_not_deadlock() {
    // 4000 lines of 60 bytes and as many back: both pipes are fuller than the 64 KiB that a kernel keeps.
    let source =
        program("while read -r line; do echo '{\"score\": 1, \"note\": \"0123456789012345\"}'; done", retry(0, None));
    assert_eq!(ask(&source, 4000).unwrap(), vec![1.0; 4000]);
}

#[test]
fn a_slow_command_fails_after_its_timeout_and_retries() {
    let started = Instant::now();
    let source = program("sleep 60", retry(1, None));
    let message = ask(&source, 2).unwrap_err().to_string();
    assert!(message.contains("no reply within 0.4 s") && message.contains("fallback_score"), "{message}");
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(source.troubles().failed_tries, 2);
}

#[test]
fn a_command_that_dies_is_restarted_and_one_that_stays_dead_is_reported() {
    // The first process dies after one reply; the second finds the mark and continues.
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("mark").display().to_string();
    let script = format!(
        "if [ -e {mark} ]; then {HONEST}; else touch {mark}; read -r line; echo '{{\"score\": 7}}'; exit 3; fi"
    );
    let source = program(&script, retry(2, None));
    assert_eq!(ask(&source, 3).unwrap(), [0.5, 1.5, 2.5]);
    assert_eq!(source.troubles().failed_tries, 1);
    let dead = program("exit 1", retry(1, Some(-2.0)));
    assert_eq!(ask(&dead, 2).unwrap(), [-2.0, -2.0]);
    assert_eq!(dead.troubles(), Troubles { failed_tries: 2, bad_scores: 0, fallbacks: 2 });
}

#[test]
fn invalid_output_of_a_command_is_counted_as_a_bad_score() {
    for nonsense in ["not json", "{\"score\": \"high\"}", "{\"score\": NaN}", "{}", "1e400", ""] {
        let script = format!("while read -r line; do echo '{nonsense}'; done");
        let source = program(&script, retry(1, None));
        let message = ask(&source, 2).unwrap_err().to_string();
        assert!(message.contains("2 of 2 scores are not finite numbers"), "{nonsense:?}: {message}");
        let source = program(&script, retry(0, Some(0.25)));
        assert_eq!(ask(&source, 2).unwrap(), [0.25, 0.25]);
        assert_eq!(source.troubles(), Troubles { failed_tries: 0, bad_scores: 2, fallbacks: 2 });
    }
    // A bare number is as good as an object.
    assert_eq!(ask(&program("while read -r l; do echo 3; done", retry(0, None)), 1).unwrap(), [3.0]);
}

#[test]
fn extra_replies_and_a_wrong_id_do_not_shift_the_scores_of_the_next_rollout() {
    let source = program("while read -r line; do echo 1; echo 2; done", retry(0, None));
    let first = ask(&source, 1).unwrap();
    assert_eq!(first, [1.0]);
    thread::sleep(Duration::from_millis(100));
    assert!(ask(&source, 1).unwrap_err().to_string().contains("a line without a request"));
    let source = program("while read -r line; do echo '{\"id\": 99, \"score\": 1}'; done", retry(0, None));
    assert!(ask(&source, 1).unwrap_err().to_string().contains("it replied with id 99 instead of 0"));
}

#[test]
fn a_missing_program_is_a_user_error() {
    let error = CommandReward::start(vec!["/no/such/judge".into()], None, retry(0, None)).err().unwrap();
    assert_eq!(exit_code(&error), 2);
    assert!(error.to_string().contains("/no/such/judge cannot be started"), "{error}");
}

/// A server on a free port that replies to the n-th request with `reply(n, body)`: a whole HTTP response, or nothing.
pub fn server(reply: impl Fn(usize, &Value) -> Option<String> + Send + Sync + 'static) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/score", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let (count, reply) = (asked.clone(), Arc::new(reply));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (count, reply) = (count.clone(), reply.clone());
            thread::spawn(move || serve(stream, &count, &*reply));
        }
    });
    (url, asked)
}

fn serve(mut stream: TcpStream, count: &AtomicUsize, reply: &dyn Fn(usize, &Value) -> Option<String>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut length = 0;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if let Some(n) = line.to_lowercase().strip_prefix("content-length:") {
            length = n.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    match reply(count.fetch_add(1, Ordering::SeqCst), &serde_json::from_slice(&body).unwrap()) {
        Some(text) => {
            let _ = stream.write_all(text.as_bytes());
        }
        None => thread::sleep(Duration::from_secs(5)),
    }
}

pub fn ok(body: &str) -> Option<String> {
    Some(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len()))
}

pub fn status(line: &str) -> Option<String> {
    Some(format!("HTTP/1.1 {line}\r\nContent-Length: 4\r\nConnection: close\r\n\r\noops"))
}

#[test]
fn an_endpoint_receives_prompts_and_responses_and_its_scores_keep_their_order() {
    let (url, asked) = server(|_, body| {
        let texts = body["responses"].as_array().unwrap();
        assert_eq!(body["prompts"].as_array().unwrap().len(), texts.len());
        let scores: Vec<f64> = texts.iter().map(|t| t.as_str().unwrap().parse::<f64>().unwrap() / 2.0).collect();
        ok(&json!({ "scores": scores }).to_string())
    });
    let source = HttpReward::new(url, None, None, retry(0, None));
    assert_eq!(ask(&source, 3).unwrap(), [0.0, 0.5, 1.0]);
    assert_eq!(ask(&source, 1).unwrap(), [0.0]);
    assert_eq!((asked.load(Ordering::SeqCst), source.troubles()), (2, Troubles::default()));
}

#[test]
fn an_endpoint_that_recovers_is_retried() {
    let (url, asked) = server(|n, _| match n {
        0 => status("503 Service Unavailable"),
        1 => None,
        2 => ok("<html>"),
        3 => ok("{\"scores\": [1]}"),
        4 => ok("{\"score\": 1}"),
        5 => ok("{\"scores\": [1, null]}"),
        _ => ok("{\"scores\": [1, 2]}"),
    });
    let source = HttpReward::new(url, None, None, retry(9, None));
    assert_eq!(ask(&source, 2).unwrap(), [1.0, 2.0]);
    assert_eq!(asked.load(Ordering::SeqCst), 7);
    assert_eq!(source.troubles(), Troubles { failed_tries: 5, bad_scores: 1, fallbacks: 0 });
}

#[test]
fn a_dead_or_wrong_endpoint_stops_the_run_or_gives_the_fallback_score() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port(); // closed again
    let dead = format!("http://127.0.0.1:{port}/");
    let message = ask(&HttpReward::new(dead.clone(), None, None, retry(1, None)), 1).unwrap_err().to_string();
    assert!(message.contains(&dead), "{message}");
    let source = HttpReward::new(dead, None, None, retry(1, Some(0.5)));
    assert_eq!(ask(&source, 2).unwrap(), [0.5, 0.5]);
    assert_eq!(source.troubles(), Troubles { failed_tries: 2, bad_scores: 0, fallbacks: 2 });
    let (url, asked) = server(|_, _| status("404 Not Found"));
    let message = ask(&HttpReward::new(url, None, None, retry(5, None)), 1).unwrap_err().to_string();
    assert!(message.contains("404") && asked.load(Ordering::SeqCst) == 1, "a wrong address is not retried: {message}");
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A short PPO run on the quickstart's base with these keys of `[ppo]` and the sections after it.
fn ppo(keys: &str) -> anyhow::Result<(Value, Vec<Value>, Vec<Value>)> {
    run_on(keys, |i| json!({ "prompt": format!("How is dish {i}?"), "completion": "It is good." }))
}

/// As [`ppo`], on twelve records: (summary, metrics, samples).
pub fn run_on(keys: &str, record: impl Fn(usize) -> Value) -> anyhow::Result<(Value, Vec<Value>, Vec<Value>)> {
    let dir = tempfile::tempdir()?;
    let records: Vec<String> = (0..12).map(|i| record(i).to_string()).collect();
    fs::write(dir.path().join("data.jsonl"), records.join("\n"))?;
    let path = |p: PathBuf| format!("{:?}", p.display().to_string());
    let text = format!(
        "[base]\npath = {}\n[data]\npath = {}\neval_rows = 4\n[ppo]\nadapter = {}\nbatch_size = 4\ntotal_episodes = 8\n\
         response_length = 12\n{}\n",
        path(here("src/quickstart/assets/base")),
        path(dir.path().join("data.jsonl")),
        path(here("adapters/quickstart/sft")),
        keys.replace("REWARD", &path(here("adapters/quickstart/reward"))),
    );
    let file = dir.path().join("run.toml");
    fs::write(&file, text)?;
    let out = dir.path().join("out");
    let config = config::load(&file, &[])?;
    let summary = run::stage(Stage::Ppo, &config, &out, &run::RunOptions::default())?;
    // The machine and its type of products are chosen when the run starts.
    let ran = run::placement::settled(&config, None)?;
    assert_eq!(config::load(&out.join("config.toml"), &[])?, ran, "what a run writes is what it ran");
    let lines = |name: &str| -> Vec<Value> {
        let text = fs::read_to_string(out.join(name)).unwrap();
        text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    };
    Ok((summary, lines("metrics.jsonl"), lines("samples.jsonl")))
}

#[test]
fn ppo_adds_up_an_adapter_a_command_and_rules_and_evaluates_by_gold() {
    let keys = r#"reward_adapter = REWARD
eval_prompts = 4
eval_every = 1
[[ppo.reward]]
kind = "command"
command = ["/bin/sh", "-c", "while read -r line; do echo 0.25; done"]
weight = 2.0
[[ppo.reward]]
kind = "length"
max_tokens = 5
[[ppo.reward]]
kind = "adapter"
name = "pair"
adapters = [REWARD, REWARD]
[[ppo.reward]]
kind = "exact"
pattern = "(?s)^(.*)$"
[ppo.gold]
kind = "regex"
pattern = "a"
"#;
    let (summary, metrics, samples) = ppo(keys).unwrap();
    let last = metrics.last().unwrap();
    let at = |key: &str| last[key].as_f64().unwrap_or_else(|| panic!("{key}: {last}"));
    let parts = at("rewards/reward_adapter/mean") + 2.0 * at("rewards/command/mean") + at("rewards/length/mean");
    let sum = parts + at("rewards/pair/mean") + at("rewards/exact/mean");
    assert_eq!(at("rewards/command/mean"), 0.25);
    // Evaluations call the sources too, after the rollout; the logged parts are those of the rollout.
    assert!((at("objective/scores") - sum).abs() < 1e-4, "{last}");
    // Two equal members never disagree.
    assert!((at("rewards/pair/mean") - at("rewards/reward_adapter/mean")).abs() < 1e-5);
    assert_eq!((at("rewards/pair/disagreement"), at("rewards/command/failed_tries")), (0.0, 0.0));
    for key in ["score", "gold", "kl", "length", "ended", "distinct_1", "distinct_2", "win_rate", "win_rate_low"] {
        assert!(last[format!("eval/{key}")].is_number(), "{key}: {last}");
        assert!(summary["eval"][format!("eval/{key}")].is_number(), "{key}: {summary}");
    }
    let golden: Vec<&Value> = samples.iter().filter(|s| s.get("evaluation").is_some()).collect();
    assert_eq!(golden.len(), 4 * 4, "before, after and after each of two iterations");
    for sample in golden {
        let found = sample["response"].as_str().unwrap().contains('a');
        assert_eq!(sample["gold"].as_f64().unwrap(), f64::from(u8::from(found)), "{sample}");
    }
}

#[test]
fn ppo_compares_answers_with_the_records_column_and_checks_a_schema() {
    let keys = r#"[[ppo.reward]]
kind = "math"
column = "solution"
[[ppo.reward]]
kind = "json_schema"
schema = '''{"type": "object"}'''
[[ppo.reward]]
kind = "math"
name = "second"
column = "level"
[ppo.gold]
kind = "math"
column = "solution"
"#;
    let record =
        |i: usize| json!({ "prompt": format!("How is dish {i}?"), "solution": format!("so #### {i}"), "level": i });
    let (_, metrics, _) = run_on(&format!("critic = \"own\"\neval_prompts = 4\n{keys}"), record).unwrap();
    let last = metrics.last().unwrap();
    for name in ["math", "json_schema", "second"] {
        assert_eq!(last[format!("rewards/{name}/mean")], 0.0, "the base writes no numbers: {last}");
    }
}

/// The quickstart's base with a tokenizer in which two frequent tokens have each other's ids.
fn base_with_other_tokens(dir: &Path) {
    for file in fs::read_dir(here("src/quickstart/assets/base")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), dir.join(file.file_name())).unwrap();
    }
    let path = dir.join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let (one, other) = (vocab["e"].clone(), vocab["Ġthe"].clone());
    vocab.insert("e".into(), other);
    vocab.insert("Ġthe".into(), one);
    fs::write(path, tokenizer.to_string()).unwrap();
}

#[test]
fn a_reward_base_with_other_tokens_scores_and_the_critic_uses_the_policys_base() {
    let dir = tempfile::tempdir().unwrap();
    base_with_other_tokens(dir.path());
    let keys = |more: &str| {
        format!("reward_adapter = REWARD\n{more}\n[reward_base]\npath = {:?}\n", dir.path().display().to_string())
    };
    let error = ppo(&keys("")).unwrap_err();
    assert_eq!(exit_code(&error), 2);
    let message = format!("{error:#}");
    assert!(
        message.contains("reads other tokens than the policy") && message.contains("critic = \"actor\""),
        "{message}"
    );
    let (_, same, _) = ppo("reward_adapter = REWARD\ncritic = \"actor\"\n").unwrap();
    for more in ["critic = \"actor\"", "critic = \"own\"", "advantage_estimator = \"rloo\"\nnum_generations = 2"] {
        let (_, metrics, _) = ppo(&keys(more)).unwrap();
        let score = |lines: &[Value]| lines[0]["objective/scores"].as_f64().unwrap();
        assert!(score(&metrics).is_finite() && score(&metrics) != score(&same), "{more}: read in other tokens");
        let has_critic = metrics[0].get("loss/value_avg").is_some_and(Value::is_number);
        assert_eq!(has_critic, more.starts_with("critic"), "{more}: {}", metrics[0]);
    }
}

#[test]
fn missing_settings_of_a_source_are_reported_before_anything_runs() {
    let refusal = |keys: &str| {
        let error = ppo(keys).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        format!("{error:#}")
    };
    let with = |section: &str| refusal(&format!("reward_adapter = REWARD\n[[ppo.reward]]\n{section}"));
    assert!(refusal("").contains("needs reward_adapter") && refusal("").contains("[[ppo.reward]]"));
    assert!(with("kind = \"command\"").contains("needs command = ["));
    assert!(with("kind = \"command\"\ncommand = [\"/no/such\"]").contains("cannot be started"));
    assert!(with("kind = \"http\"\nurl = \"https://x\"").contains("only plain http"));
    assert!(with("kind = \"http\"").contains("needs url"));
    assert!(with("kind = \"http\"\nurl = \"ftp://x\"").contains("does not begin with http://"));
    assert!(with("kind = \"http\"\nurl = \"http://127.0.0.1:99999/x\"").contains("[[ppo.reward]] url = "));
    assert!(with("kind = \"regex\"").contains("needs pattern"));
    assert!(with("kind = \"regex\"\npattern = \"(\"").contains("is no regular expression"));
    assert!(with("kind = \"json_schema\"").contains("needs schema = "));
    assert!(with("kind = \"json_schema\"\nschema = '{'").contains("[[ppo.reward]] schema is no JSON"));
    let unknown = with("kind = \"json_schema\"\nschema = '''{\"properties\": {\"a\": {\"multipleOf\": 2}}}'''");
    assert!(unknown.contains("[[ppo.reward]] schema at /properties/a/multipleOf: the keyword is not"), "{unknown}");
    assert!(with("kind = \"json_valid\"\ncolumn = \"a\"").contains("which is for kind = \"math\""));
    let math = with("kind = \"math\"");
    assert!(math.contains("\"answer\"") && math.contains("data.jsonl:1\" has no such column"), "{math}");
    assert!(with("kind = \"length\"\nmin_tokens = 4\nmax_tokens = 3").contains("less than min_tokens = 4"));
    assert!(with("kind = \"adapter\"").contains("needs adapters"));
    assert!(with("kind = \"adapter\"\nadapters = [\"/no/such\"]").contains("/no/such"));
    assert!(with("kind = \"json_valid\"\nweight = nan").contains("weight = NaN is out of range"));
    let waits = with("kind = \"command\"\ncommand = [\"true\"]\ntimeout_seconds = 0");
    assert!(waits.contains("timeout_seconds = 0"), "{waits}");
    assert!(with("kind = \"jsonvalid\"").contains("did you mean \"json_valid\"?"));
    let twice = "kind = \"json_valid\"\n[[ppo.reward]]\nkind = \"json_valid\"";
    assert!(with(twice).contains("two [[ppo.reward]] are called \"json_valid\""));
    assert!(refusal("reward_adapter = REWARD\neval_every = 2").contains("eval_every = 2 evaluates nothing"));
}
