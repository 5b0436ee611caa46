//! Reward models behind vLLM and SGLang: each dialect's request and reply, the replies that are wrong, and PPO on the quickstart's
//! reward adapter behind a server, which equals PPO on the adapter itself. The server is a thread that speaks as theirs do; it does
//! not test the servers themselves.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use fourfold::data::stream::columns::{Columns, RecordColumns};
use fourfold::error::exit_code;
use fourfold::model::batch::Batch;
use fourfold::model::roles::ValueModel;
use fourfold::model_files::ModelFiles;
use fourfold::quickstart::base::BASE;
use fourfold::reward::source::RewardSource;
use fourfold::reward::source::retry::Troubles;
use fourfold::reward::source::served::{Dialect, ServedReward, ServedRules, TEMPLATE};
use fourfold::run::Model;
use serde_json::{Map, Value, json};

use super::reward_sources::{ask, ok, retry, run_on, server, status};

fn rules(dialect: Dialect, template: Option<&str>) -> ServedRules {
    let template = template.map(str::to_owned);
    ServedRules { dialect, model: "rm".into(), template, index: None, request: Map::new(), pad: None }
}

fn served(url: &str, rules: ServedRules, retries: usize, fallback: Option<f32>) -> ServedReward<'static> {
    ServedReward::new(url.into(), None, rules, None, retry(retries, fallback)).unwrap()
}

/// The entries of a reply, the last one first, as servers that finish them in another order may send them.
fn data(key: &str, values: impl IntoIterator<Item = Value>) -> Value {
    let entries = values.into_iter().enumerate().map(|(index, value)| json!({ "index": index, key: value }));
    let entries: Vec<Value> = entries.collect::<Vec<_>>().into_iter().rev().collect();
    json!({ "id": "x", "object": "list", "created": 1, "model": "rm", "data": entries, "usage": { "total_tokens": 9 } })
}

/// What the dialect's server replies: half the number that the response begins with. `ask` makes the i-th prompt token 100 + i
/// and its response the tokens i and 0, of which 0 ends it.
fn reply(dialect: Dialect, body: &Value) -> Value {
    let half = |value: &Value| match value {
        Value::Array(ids) if ids.len() == 3 => ids[1].as_f64().unwrap() / 2.0,
        Value::Array(ids) => ids[0].as_f64().unwrap() / 2.0,
        text => text.as_str().unwrap().rsplit(' ').next().unwrap().parse::<f64>().unwrap() / 2.0,
    };
    let list = |key: &str| body[key].as_array().unwrap().iter().map(half).collect::<Vec<f64>>();
    match dialect {
        Dialect::Classify => data("probs", list("input").into_iter().map(|x| json!([x]))),
        Dialect::Pooling => data("data", list("input").into_iter().map(|x| json!([[9.0], [x]]))),
        Dialect::Score => data("score", list("text_2").into_iter().map(Value::from)),
        Dialect::SglangClassify => {
            let key = if body.get("text").is_some() { "text" } else { "input_ids" };
            list(key).into_iter().map(|x| json!({ "embedding": [x], "meta_info": { "prompt_tokens": 3 } })).collect()
        }
        Dialect::SglangScore => {
            let scores: Vec<Value> = list("items").into_iter().map(|x| json!([x])).collect();
            json!({ "scores": scores, "object": "scoring", "model": "rm" })
        }
    }
}

#[test]
fn each_dialect_sends_what_its_server_reads_and_the_scores_keep_their_order() {
    let spaced = Some("{{ prompt }} {{ response }}");
    let ids = json!([[100, 0, 0], [101, 1, 0]]);
    for (dialect, template, want) in [
        (Dialect::Classify, None, json!({ "input": ids, "model": "rm", "use_activation": false })),
        (Dialect::Pooling, None, json!({ "input": ids, "model": "rm", "use_activation": false })),
        (Dialect::Classify, spaced, json!({ "input": ["100 0", "101 1"], "model": "rm", "use_activation": false })),
        (
            Dialect::Score,
            None,
            json!({ "text_1": ["100", "101"], "text_2": ["0", "1"], "model": "rm", "use_activation": false }),
        ),
        (Dialect::SglangClassify, None, json!({ "input_ids": ids, "model": "rm" })),
        (Dialect::SglangClassify, spaced, json!({ "text": ["100 0", "101 1"], "model": "rm" })),
        (Dialect::SglangScore, None, json!({ "query": [101], "items": [[1, 0]], "model": "rm" })),
        (Dialect::SglangScore, Some(TEMPLATE), json!({ "query": "101", "items": ["1"], "model": "rm" })),
    ] {
        let last = Arc::new(Mutex::new(Value::Null));
        let heard = last.clone();
        let (url, _) = server(move |_, body| {
            *heard.lock().unwrap() = body.clone();
            ok(&reply(dialect, body).to_string())
        });
        let source = served(&url, rules(dialect, template), 0, None);
        assert_eq!(ask(&source, 2).unwrap(), [0.0, 0.5], "{dialect:?}");
        assert_eq!(*last.lock().unwrap(), want, "{dialect:?}");
        let many: Vec<f32> = (0..600).map(|i| i as f32 / 2.0).collect();
        assert_eq!(ask(&source, 600).unwrap(), many, "{dialect:?}: several requests");
        assert_eq!(source.troubles(), Troubles::default());
    }
}

#[test]
fn responses_to_one_prompt_are_one_request_of_sglangs_score() {
    use fourfold::model::generate::{FinishReason, Response};
    use fourfold::reward::source::RewardInputs;
    let (url, asked) = server(|_, body| {
        let base = body["query"][0].as_f64().unwrap();
        let scores: Vec<Value> =
            body["items"].as_array().unwrap().iter().map(|item| json!([base + item[0].as_f64().unwrap()])).collect();
        ok(&json!({ "scores": scores }).to_string())
    });
    let response = |i| Response { tokens: vec![i], logprobs: vec![0.0], finish: FinishReason::Length };
    let inputs = RewardInputs {
        prompts: &[vec![10], vec![20], vec![10], vec![20], vec![10]],
        responses: &[1, 2, 3, 4, 5].map(response),
        entries: &[],
        decode: &|_| String::new(),
        known: &[],
    };
    let source = served(&url, rules(Dialect::SglangScore, None), 0, None);
    assert_eq!(source.scores(&inputs).unwrap(), [11.0, 22.0, 13.0, 24.0, 15.0]);
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[test]
fn a_server_that_recovers_is_asked_again_and_each_failure_is_counted() {
    let (url, asked) = server(|n, body| match n {
        0 => status("500 Internal Server Error"),
        1 => None,
        2 => ok("<html>Bad gateway</html>"),
        3 => ok(&json!({ "object": "error", "message": "engine is dead", "code": 500 }).to_string()),
        4 => ok(&data("probs", [json!([1])]).to_string()),
        5 => ok(&json!({ "data": [{ "index": 1, "probs": [1] }, { "index": 1, "probs": [2] }] }).to_string()),
        6 => ok("{\"data\": [{\"index\": 0, \"probs\": [NaN]}]}"),
        7 => ok(&data("embedding", [json!([1]), json!([2])]).to_string()),
        // The connection is closed without a reply, and in the middle of one.
        8 => Some(String::new()),
        9 => Some("HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{\"data\": [".into()),
        10 => ok(&data("probs", [json!([1]), json!([null])]).to_string()),
        _ => ok(&reply(Dialect::Classify, body).to_string()),
    });
    let source = served(&url, rules(Dialect::Classify, None), 11, None);
    assert_eq!(ask(&source, 2).unwrap(), [0.0, 0.5]);
    assert_eq!(asked.load(Ordering::SeqCst), 12);
    assert_eq!(source.troubles(), Troubles { failed_tries: 10, bad_scores: 1, fallbacks: 0 });
    let resumed = served(&url, rules(Dialect::Classify, None), 0, None);
    resumed.restore(&source.state());
    assert_eq!(resumed.metrics(), source.metrics());
}

#[test]
fn what_no_further_try_mends_stops_at_once_with_the_servers_own_words() {
    let not_found = json!({ "error": { "message": "The model `rm` does not exist.", "type": "NotFoundError" } });
    let body = not_found.to_string();
    let reply = format!("HTTP/1.1 404 Not Found\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
    let (url, asked) = server(move |_, _| Some(reply.clone()));
    let message = ask(&served(&url, rules(Dialect::Pooling, None), 5, None), 2).unwrap_err().to_string();
    for said in ["reward model rm at http://", "404", "The model `rm` does not exist."] {
        assert!(message.contains(said), "{said}: {message}");
    }
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    let (url, asked) = server(|_, _| ok(&data("probs", [json!([0.2, 0.8]), json!([0.3, 0.7])]).to_string()));
    let message = ask(&served(&url, rules(Dialect::Classify, None), 5, None), 2).unwrap_err().to_string();
    assert!(message.contains("2 numbers per response") && message.contains("score_index"), "{message}");
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    let second = ServedRules { index: Some(1), ..rules(Dialect::Classify, None) };
    assert_eq!(ask(&served(&url, second, 0, None), 2).unwrap(), [0.8, 0.7]);
    let (url, _) = server(|_, _| ok("{}"));
    let source = served(&url, rules(Dialect::Score, None), 1, Some(-1.0));
    assert_eq!(ask(&source, 2).unwrap(), [-1.0, -1.0]);
    assert_eq!(source.troubles(), Troubles { failed_tries: 2, bad_scores: 0, fallbacks: 2 });
}

#[test]
fn a_template_reads_columns_and_further_keys_replace_ours() {
    let (url, _) = server(|_, body| {
        assert_eq!(
            (body["input"].clone(), body["use_activation"].clone()),
            (json!(["Q p A 0", "Q q A 1"]), json!(true))
        );
        ok(&data("probs", [json!([0.5]), json!([0.25])]).to_string())
    });
    let record = |id: &str, prompt: &str| RecordColumns {
        id: id.into(),
        columns: json!({ "prompt": prompt }).as_object().unwrap().clone(),
    };
    let known = Columns::from([(10, record("a", "p")), (11, record("b", "q"))]);
    let rules = ServedRules {
        request: json!({ "use_activation": true }).as_object().unwrap().clone(),
        ..rules(Dialect::Classify, Some("Q {{ columns.prompt }} A {{ response }}"))
    };
    let source = ServedReward::new(url, None, rules, Some(&known), retry(0, None)).unwrap();
    assert_eq!(ask(&source, 2).unwrap(), [0.5, 0.25]);
}

#[test]
fn ppo_on_a_served_reward_adapter_equals_ppo_on_the_adapter() {
    let (url, asked) = server(|_, body| {
        let parts = (BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
        let files = ModelFiles::from_embedded(BASE.config, parts.0, parts.1, parts.2, parts.3).unwrap();
        let model = Model::of(files).unwrap();
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters/quickstart/reward");
        let adapter = model.adapter(&folder).unwrap();
        let sequences: Vec<Vec<u32>> = serde_json::from_value(body["input"].clone()).unwrap();
        assert_eq!(body["model"], "quickstart-reward");
        let scores = ValueModel::new(&model.base, &adapter).unwrap().scores(&Batch::new(&sequences).unwrap()).unwrap();
        ok(&data("probs", scores.into_iter().map(|score| json!([score]))).to_string())
    });
    let run = |part: String| {
        let keys = format!(
            "eval_prompts = 2\nadvantage_estimator = \"rloo\"\nnum_generations = 2\n[[ppo.reward]]\nname = \"rm\"\n{part}"
        );
        run_on(&keys, |i| json!({ "prompt": format!("How is dish {i}?") })).unwrap()
    };
    let (_, direct, of_direct) = run("kind = \"adapter\"\nadapters = [REWARD]".into());
    let (_, through, of_through) = run(format!(
        "kind = \"http\"\napi = \"classify\"\ninput = \"ids\"\nmodel = \"quickstart-reward\"\nurl = \"{url}\"\ntimeout_seconds = 30.0"
    ));
    assert!(asked.load(Ordering::SeqCst) >= 4, "two evaluations and two rollouts");
    assert_eq!(of_direct, of_through, "the very samples and scores");
    for (a, b) in direct.iter().zip(&through) {
        assert_eq!(b["rewards/rm/failed_tries"], 0);
        for key in ["objective/scores", "policy/approxkl_avg", "loss/policy_avg", "eval/score", "rewards/rm/mean"] {
            assert_eq!(a[key], b[key], "{key}");
        }
    }
    assert_eq!(direct.len(), 2);
}

#[test]
fn what_an_api_lacks_or_does_not_read_is_said_before_anything_runs() {
    let refusal = |keys: &str| {
        let keys =
            format!("reward_adapter = REWARD\n[[ppo.reward]]\nkind = \"http\"\nurl = \"http://127.0.0.1:9/\"\n{keys}");
        let error = run_on(&keys, |i| json!({ "prompt": format!("How is dish {i}?") })).unwrap_err();
        assert_eq!(exit_code(&error), 2, "{error:#}");
        format!("{error:#}")
    };
    for (keys, said) in [
        ("model = \"rm\"", "api = \"fourfold\": model is for a reward model behind vLLM or SGLang"),
        ("api = \"classify\"", "needs input = \"ids\""),
        ("api = \"sglang_score\"\ninput = \"ids\"", "needs request = { label_token_ids = [N] }"),
        ("api = \"score\"\ninput = \"ids\"", "vLLM reads pairs as text alone"),
        ("api = \"pooling\"\ninput = \"ids\"\ntemplate = \"{{ response }}\"", "it needs input = \"text\""),
        ("api = \"pooling\"\ninput = \"text\"\ntemplate = \"{{ prompt }}\"", "does not show the response"),
        ("api = \"classify\"\ninput = \"tokens\"", "ids"),
        ("api = \"clasify\"", "classify"),
        ("api = \"classify\"\ninput = \"ids\"\nrequest = { input = \"x\" }", "[[ppo.reward]] request = { input = … }"),
        ("api = \"classify\"\ninput = \"ids\"\napi_key_env = \"FOURFOLD_NO_SUCH_KEY\"", "export FOURFOLD_NO_SUCH_KEY="),
        ("api = \"classify\"\ninput = \"ids\"\ncolumn = \"a\"", "does not read column"),
    ] {
        let found = refusal(keys);
        assert!(found.contains(said), "{keys}: {found}");
    }
}
