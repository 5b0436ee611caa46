//! Rewards over HTTP: those of `fourfold score` and of the adapter itself, in this program's own dialect and in vLLM's, as the
//! reward sources of PPO read them.

use std::time::Duration;

use fourfold::model::batch::Batch;
use fourfold::model::generate::{FinishReason, Response};
use fourfold::model::roles::ValueModel;
use fourfold::reward::source::http::HttpReward;
use fourfold::reward::source::retry::RetryPolicy;
use fourfold::reward::source::served::{Dialect, ServedReward, ServedRules};
use fourfold::reward::source::{RewardInputs, RewardSource};
use serde_json::{Map, json};

use super::{model, numbers, options, served, shipped};
use crate::support::Place;

const ANSWERS: [&str; 3] = [" The soup was good.", " It was bad and salty, and the room was cold.", " Yes."];

fn prompt(i: usize) -> String {
    format!("\n\nHuman: How was the soup, number {i}?\n\nAssistant:")
}

fn close(found: &[f32], want: &[f32]) -> bool {
    found.len() == want.len() && found.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-5)
}

#[test]
fn a_score_is_the_one_of_the_command() {
    let place = Place::new();
    let lines = (0..3).map(|i| format!("{}\n", json!({ "prompt": prompt(i), "completion": ANSWERS[i] })));
    place.write("texts.jsonl", lines.collect::<String>());
    let dialogue = |i: usize| json!([{ "role": "user", "content": "How was the soup?" }, { "role": "assistant", "content": ANSWERS[i] }]);
    place.write(
        "dialogues.jsonl",
        (0..3).map(|i| format!("{}\n", json!({ "messages": dialogue(i) }))).collect::<String>(),
    );
    let command = |file: &str| {
        let reward = shipped("reward").display().to_string();
        let ran = place.run_with(
            &["score", "--base", "base", "--adapter", &reward, "--data", file, "--device", "cpu", "--json"],
            "",
        );
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let found: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        found["scores"].as_array().unwrap().iter().flat_map(numbers).collect::<Vec<f32>>()
    };
    let (_running, client) = served(options());
    let prompts: Vec<String> = (0..3).map(prompt).collect();
    let want = command("texts.jsonl");
    assert!(want.len() == 3 && want[0] != want[1]);
    let answer = client.ok("/score", &json!({ "model": "reward", "prompts": prompts, "responses": ANSWERS }));
    assert!(close(&numbers(&answer["scores"]), &want), "{answer} {want:?}");
    for (i, entry) in answer["data"].as_array().unwrap().iter().enumerate() {
        assert_eq!((entry["index"].as_u64(), &entry["score"]), (Some(i as u64), &answer["scores"][i]));
    }
    // The only reward adapter needs no name; one pair needs no lists; vLLM's names are the same request.
    let one = client.ok("/score", &json!({ "prompt": prompts[1], "response": ANSWERS[1] }));
    assert!(close(&numbers(&one["scores"]), &want[1..2]));
    let theirs = client.ok("/v1/score", &json!({ "text_1": prompts, "text_2": ANSWERS, "use_activation": false }));
    assert_eq!(theirs["scores"], answer["scores"]);
    let many = client.ok("/score", &json!({ "prompts": [prompts[0]], "responses": ANSWERS }));
    assert!(close(&numbers(&many["scores"])[..1], &want[..1]));
    let want = command("dialogues.jsonl");
    let answer = client.ok("/score", &json!({ "messages": (0..3).map(dialogue).collect::<Vec<_>>() }));
    assert!(close(&numbers(&answer["scores"]), &want), "{answer} {want:?}");
    let answer = client.ok("/score", &json!({ "messages": dialogue(1) }));
    assert!(close(&numbers(&answer["scores"]), &want[1..2]));
}

#[test]
fn classify_is_vllms_and_both_reward_sources_read_the_server() {
    let (_running, client) = served(options());
    let model = model();
    let adapter = model.adapter(&shipped("reward")).unwrap();
    let tokenizer = model.checkpoint.tokenizer();
    let encode = |text: &str| tokenizer.encode(text, fourfold::tokenizer::SpecialTokens::None).unwrap();
    let prompts: Vec<Vec<u32>> = (0..3).map(|i| encode(&prompt(i))).collect();
    let response = |text: &&str| {
        let tokens = [encode(text), vec![tokenizer.eos_id().unwrap()]].concat();
        Response { logprobs: vec![0.0; tokens.len()], tokens, finish: FinishReason::Stop }
    };
    let responses: Vec<Response> = ANSWERS.iter().map(response).collect();
    let sequences: Vec<Vec<u32>> = prompts.iter().zip(&responses).map(|(p, r)| [&p[..], &r.tokens].concat()).collect();
    let want = ValueModel::new(&model.base, &adapter).unwrap().scores(&Batch::new(&sequences).unwrap()).unwrap();
    let answer = client.ok("/classify", &json!({ "model": "reward", "input": sequences, "use_activation": false }));
    let probs = |answer: &serde_json::Value| -> Vec<f32> {
        answer["data"].as_array().unwrap().iter().map(|entry| numbers(&entry["probs"])[0]).collect()
    };
    assert!(close(&probs(&answer), &want));
    assert_eq!((&answer["data"][1]["num_classes"], &answer["data"][1]["label"]), (&json!(1), &json!("LABEL_0")));
    let sigmoid = client.ok("/classify", &json!({ "model": "reward", "input": sequences[1] }));
    assert!(close(&probs(&sigmoid), &[1.0 / (1.0 + (-want[1]).exp())]));
    let text = client.ok("/classify", &json!({ "input": [prompt(0) + ANSWERS[0]], "use_activation": false }));
    let ids = [encode(&(prompt(0) + ANSWERS[0]))];
    assert!(close(
        &probs(&text),
        &ValueModel::new(&model.base, &adapter).unwrap().scores(&Batch::new(&ids).unwrap()).unwrap()
    ));
    // The sources of `[[ppo.reward]] kind = "http"`.
    let decode = |ids: &[u32]| tokenizer.decode(ids).unwrap();
    let inputs = RewardInputs { prompts: &prompts, responses: &responses, entries: &[], decode: &decode, known: &[] };
    let retry =
        || RetryPolicy { timeout: Duration::from_secs(60), retries: 0, backoff: Duration::ZERO, fallback: None };
    let rules = |dialect| ServedRules {
        dialect,
        model: "reward".into(),
        template: None,
        index: None,
        request: Map::new(),
        pad: None,
    };
    let at = |path: &str| format!("{}{path}", client.url);
    for (dialect, path) in [(Dialect::Classify, "/classify"), (Dialect::Score, "/score")] {
        let source = ServedReward::new(at(path), None, rules(dialect), None, retry()).unwrap();
        assert!(close(&source.scores(&inputs).unwrap(), &want), "{path}");
    }
    let source = HttpReward::new(at("/score"), None, None, retry());
    assert!(close(&source.scores(&inputs).unwrap(), &want));
}
