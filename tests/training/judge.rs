//! Reward sources and the records' columns: programs and services get every column of the record and its id; a judging
//! language model behind an OpenAI-compatible endpoint is asked by a template, read by a rule, retried, and its cost counted.
//! The endpoint is a local server; it does not test any real service.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use fourfold::data::stream::columns::{Columns, RecordColumns};
use fourfold::error::exit_code;
use fourfold::reward::source::RewardSource;
use fourfold::reward::source::command::CommandReward;
use fourfold::reward::source::http::HttpReward;
use fourfold::reward::source::judge::{Judge, PATTERN, Rules, Spent, TEMPLATE};
use fourfold::reward::source::retry::Troubles;
use regex::Regex;
use serde_json::{Map, Value, json};

use super::reward_sources::{ask, ok, retry, run_on, server, status};

fn rules(template: &str) -> Rules {
    Rules {
        model: "grader".into(),
        template: template.into(),
        pattern: Regex::new(PATTERN).unwrap(),
        range: (1.0, 10.0),
        request: Map::new(),
        concurrency: NonZeroUsize::new(3).unwrap(),
        prices: (2.0, 10.0),
    }
}

/// A completion with this text and 30 + 5 tokens.
fn says(text: &str) -> Option<String> {
    let message = json!({ "role": "assistant", "content": text });
    let usage = json!({ "prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35 });
    ok(&json!({ "choices": [{ "index": 0, "message": message }], "usage": usage }).to_string())
}

fn question(body: &Value) -> &str {
    body["messages"][0]["content"].as_str().unwrap()
}

/// Columns of records 10 and 11, the first two that [`ask`] asks about.
fn columns() -> Columns {
    let record =
        |id: &str, columns: Value| RecordColumns { id: id.into(), columns: columns.as_object().unwrap().clone() };
    Columns::from([
        (10, record("d.jsonl:11", json!({ "prompt": "p", "answer": "forty", "level": 2 }))),
        (11, record("own", json!({ "id": "own", "prompt": "q", "answer": "two", "tags": ["x"] }))),
    ])
}

#[test]
fn a_program_gets_every_column_of_the_record_and_its_id() {
    let dir = tempfile::tempdir().unwrap();
    let heard = dir.path().join("heard.jsonl");
    let script = format!("while read -r line; do printf '%s\\n' \"$line\" >> {}; echo 1; done", heard.display());
    let known = columns();
    let program = CommandReward::start(vec!["sh".into(), "-c".into(), script], Some(&known), retry(0, None)).unwrap();
    ask(&program, 3).unwrap();
    let text = std::fs::read_to_string(heard).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (line, entry) in lines.iter().zip([10, 11]) {
        assert_eq!(line["columns"], Value::from(known[&entry].columns.clone()));
        assert_eq!(line["record_id"], known[&entry].id);
    }
    assert_eq!((lines[0]["id"].as_u64(), lines[1]["id"].as_u64()), (Some(0), Some(1)), "the requests' own numbers");
    assert!(lines[2].get("columns").is_none() && lines[2].get("record_id").is_none(), "an unknown record");
}

#[test]
fn a_service_gets_every_column_as_a_list_with_one_value_per_response() {
    let heard = Arc::new(Mutex::new(Value::Null));
    let into = heard.clone();
    let (url, _) = server(move |_, body| {
        *into.lock().unwrap() = body.clone();
        ok("{\"scores\": [1, 2]}")
    });
    let known = columns();
    assert_eq!(ask(&HttpReward::new(url.clone(), None, Some(&known), retry(0, None)), 2).unwrap(), [1.0, 2.0]);
    let body = heard.lock().unwrap().clone();
    assert_eq!(body["record_ids"], json!(["d.jsonl:11", "own"]));
    let want = json!({
        "prompt": ["p", "q"], "answer": ["forty", "two"], "level": [2, null], "id": [null, "own"], "tags": [null, ["x"]],
    });
    assert_eq!(body["columns"], want);
    ask(&HttpReward::new(url, None, None, retry(0, None)), 2).unwrap();
    assert_eq!(heard.lock().unwrap().as_object().unwrap().keys().collect::<Vec<_>>(), ["prompts", "responses"]);
}

#[test]
fn a_judge_is_asked_by_the_template_and_its_scores_keep_the_order_of_the_responses() {
    let (url, asked) = server(|_, body| {
        assert_eq!((body["model"].as_str(), body["temperature"].as_f64()), (Some("grader"), Some(0.0)));
        let (prompt, response) = question(body).split_once(" -> ").unwrap();
        assert_eq!(prompt.parse::<usize>().unwrap(), 100 + response.parse::<usize>().unwrap());
        // The first ones are the slowest.
        let number: u64 = response.parse().unwrap();
        thread::sleep(Duration::from_millis(40 / (number + 1)));
        says(&format!("Because of 9 reasons.\nScore: {}.5", number + 1))
    });
    let judge = Judge::new(&url, None, rules("{{ prompt }} -> {{ response }}"), None, retry(0, None)).unwrap();
    assert_eq!(ask(&judge, 7).unwrap(), [1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]);
    assert_eq!(asked.load(Ordering::SeqCst), 7);
    let (spent, troubles) = judge.counts();
    assert_eq!(spent, Spent { requests: 7, prompt_tokens: 210, completion_tokens: 35, uncounted: 0 });
    assert_eq!(troubles, Troubles::default());
    let metrics = judge.metrics();
    assert_eq!(metrics["cost"].as_f64().unwrap(), (210.0 * 2.0 + 35.0 * 10.0) / 1e6);
    // A resumed run goes on counting.
    let resumed = Judge::new(&url, None, rules(TEMPLATE), None, retry(0, None)).unwrap();
    resumed.restore(&judge.state());
    assert_eq!(resumed.metrics(), metrics);
}

#[test]
fn no_more_requests_are_open_at_once_than_the_config_allows() {
    let (open, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let seen = most.clone();
    let (url, _) = server(move |_, _| {
        seen.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(30));
        open.fetch_sub(1, Ordering::SeqCst);
        says("Score: 3")
    });
    let judge = Judge::new(&url, None, rules(TEMPLATE), None, retry(0, None)).unwrap();
    assert_eq!(ask(&judge, 12).unwrap(), [3.0; 12]);
    assert_eq!(most.load(Ordering::SeqCst), 3);
}

#[test]
fn a_judge_that_gives_no_score_is_asked_again_alone_and_each_failure_is_counted() {
    let tries = Arc::new(Mutex::new(BTreeMap::<String, usize>::new()));
    let (url, asked) = server(move |_, body| {
        let response = question(body).to_owned();
        let mut tries = tries.lock().unwrap();
        let tried = tries.entry(response.clone()).or_default();
        *tried += 1;
        match (response.as_str(), *tried) {
            ("0", 1) => status("503 Service Unavailable"),
            ("0", 2) => says("I would rather not say."),
            ("1", 1) => says("Score: 11"),
            ("1", 2) => ok("{\"choices\": []}"),
            ("2", 1) => ok("{\"choices\": [{\"message\": {\"content\": \"Score: 4\"}}]}"),
            (_, _) => says("Score: 5"),
        }
    });
    let judge = Judge::new(&url, None, rules("{{ response }}"), None, retry(2, None)).unwrap();
    assert_eq!(ask(&judge, 4).unwrap(), [5.0, 5.0, 4.0, 5.0]);
    assert_eq!(asked.load(Ordering::SeqCst), 8);
    let (spent, troubles) = judge.counts();
    assert_eq!(troubles, Troubles { failed_tries: 2, bad_scores: 2, fallbacks: 0 });
    // A refused request costs nothing; the two replies without usage have no known cost.
    assert_eq!(spent, Spent { requests: 8, prompt_tokens: 150, completion_tokens: 25, uncounted: 2 });
}

#[test]
fn a_judge_that_stays_silent_stops_the_run_or_gives_the_fallback_score() {
    let (url, _) = server(|_, _| says("No grade today."));
    let with = |fallback| Judge::new(&url, None, rules(TEMPLATE), None, retry(1, fallback)).unwrap();
    let message = ask(&with(None), 2).unwrap_err().to_string();
    for said in ["judge grader at http://", "no score from 1 to 10 in its reply \"No grade today.\"", "fallback_score"]
    {
        assert!(message.contains(said), "{said}: {message}");
    }
    let judge = with(Some(2.5));
    assert_eq!(ask(&judge, 2).unwrap(), [2.5, 2.5]);
    assert_eq!(judge.counts().1, Troubles { failed_tries: 0, bad_scores: 4, fallbacks: 2 });
    let (url, asked) = server(|_, _| status("401 Unauthorized"));
    let judge =
        Judge::new(&url, None, Rules { concurrency: NonZeroUsize::MIN, ..rules(TEMPLATE) }, None, retry(5, None));
    let message = ask(&judge.unwrap(), 4).unwrap_err().to_string();
    assert!(message.contains("401") && asked.load(Ordering::SeqCst) == 1, "a wrong key is not tried again: {message}");
}

#[test]
fn the_template_reads_columns_and_the_request_takes_further_keys() {
    let (url, _) = server(|_, body| {
        assert_eq!((body["temperature"].as_f64(), body["seed"].as_u64()), (Some(1.0), Some(7)));
        says(if question(body) == "0: forty" { "Score: 9" } else { "Score: 1" })
    });
    let known = columns();
    let request = json!({ "temperature": 1, "seed": 7 }).as_object().unwrap().clone();
    let rules = Rules { request, ..rules("{{ response }}: {{ columns.answer }}") };
    let judge = Judge::new(&url, None, rules.clone(), Some(&known), retry(0, None)).unwrap();
    assert_eq!(ask(&judge, 2).unwrap(), [9.0, 1.0]);
    // The third record is unknown, and a column that a record lacks is no empty text.
    let error = ask(&judge, 3).unwrap_err();
    assert!(exit_code(&error) == 2 && error.to_string().contains("for prompt 2"), "{error}");
    let lacking = Rules { template: "{{ response }}{{ columns.tags }}".into(), ..rules };
    let judge = Judge::new(&url, None, lacking, Some(&known), retry(0, None)).unwrap();
    let error = ask(&judge, 1).unwrap_err();
    assert!(exit_code(&error) == 2 && error.to_string().contains("for record \"d.jsonl:11\""), "{error}");
}

#[test]
fn ppo_trains_on_a_judge_and_a_program_that_read_the_records_columns() {
    let (url, _) = server(|_, body| {
        // The template shows the record's dish, and the prompt asks about it.
        let (dish, prompt) = question(body).split_once('|').unwrap();
        assert!(prompt.contains(&format!("dish {dish}?")), "{body}");
        says(&format!("Score: {}", 1 + dish.parse::<usize>().unwrap() % 3))
    });
    let keys = format!(
        r#"eval_prompts = 2
num_generations = 2
advantage_estimator = "rloo"
[[ppo.reward]]
kind = "judge"
url = "{url}"
model = "grader"
template = "{{{{ columns.dish }}}}|{{{{ prompt }}}}{{{{ response }}}}"
request = {{ temperature = 0.5, max_tokens = 20 }}
input_price = 1.0
[[ppo.reward]]
kind = "command"
command = ["/bin/sh", "-c", "while read -r line; do case $line in *columns*dish*) echo 2;; *) echo 0;; esac; done"]
"#
    );
    let (_, metrics, samples) = run_on(&keys, |i| json!({ "prompt": format!("How is dish {i}?"), "dish": i })).unwrap();
    let last = metrics.last().unwrap();
    assert_eq!(last["rewards/command/mean"], 2.0, "{last}");
    // Two prompts before training and two rollouts of four.
    assert_eq!(last["rewards/judge/requests"], 10, "{last}");
    assert_eq!(last["rewards/judge/cost"].as_f64().unwrap(), 300.0 / 1e6, "{last}");
    for sample in samples {
        let text = sample["prompt"].as_str().unwrap();
        let dish: usize = text.trim_end().trim_end_matches('?').rsplit(' ').next().unwrap().parse().unwrap();
        assert_eq!(sample["score"], json!((1 + dish % 3 + 2) as f64), "{sample}");
    }
}

#[test]
fn what_a_judge_lacks_is_said_before_anything_runs() {
    let refusal = |keys: &str| {
        let keys = format!("reward_adapter = REWARD\n[[ppo.reward]]\nkind = \"judge\"\n{keys}");
        let error = run_on(&keys, |i| json!({ "prompt": format!("How is dish {i}?") })).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        format!("{error:#}")
    };
    let with = |more: &str| refusal(&format!("url = \"http://127.0.0.1:9/v1\"\nmodel = \"grader\"\n{more}"));
    assert!(refusal("model = \"grader\"").contains("needs url"));
    assert!(refusal("url = \"http://127.0.0.1:9/v1\"").contains("needs model"));
    if !cfg!(feature = "hub") {
        assert!(refusal("url = \"https://x\"\nmodel = \"grader\"").contains("only plain http"));
    }
    assert!(with("template = \"Grade it.\"").contains("does not show the response"));
    assert!(with("template = \"{{ response }}{{ gold }}\"").contains("{{ columns.gold }}"));
    assert!(with("min_score = 5\nmax_score = 1").contains("no score is from min_score = 5 to max_score = 1"));
    assert!(with("concurrency = 0").contains("concurrency"));
    assert!(with("request = { messages = [] }").contains("[[ppo.reward]] request = { messages = … }"));
    assert!(with("input_price = -1.0").contains("input_price = -1 is out of range"));
    assert!(with("api_key_env = \"FOURFOLD_NO_SUCH_KEY\"").contains("export FOURFOLD_NO_SUCH_KEY="));
}
