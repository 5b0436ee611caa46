//! What is refused, each with its status and a sentence: bodies, fields, keys, methods, sizes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use serde_json::{Value, json};

use super::{Client, Options, options, served, shipped};

#[test]
fn malformed_bodies_get_400_and_a_sentence() {
    let (_running, client) = served(options());
    let completion = |more: &str| format!("{{\"prompt\": \"a\", \"max_tokens\": 1{more}}}");
    let chat =
        |more: &str| format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"a\"}}], \"max_tokens\": 1{more}}}");
    let text = [
        (String::new(), "not JSON"),
        ("{".into(), "not JSON"),
        ("\u{0}\u{1}".into(), "not JSON"),
        ("[]".into(), "the body is a list"),
        ("null".into(), "the body is null"),
        ("{}".into(), "prompt: is missing"),
        (r#"{"prompt": 5}"#.into(), "prompt: expected"),
        (r#"{"prompt": []}"#.into(), "prompt: expected"),
        (r#"{"prompt": ""}"#.into(), "the prompt is empty"),
        (r#"{"prompt": [[]]}"#.into(), "the prompt is empty"),
        (r#"{"prompt": [1, -2]}"#.into(), "prompt: expected"),
        (r#"{"prompt": [1, 2.5]}"#.into(), "prompt: expected"),
        (r#"{"prompt": ["a", 5]}"#.into(), "prompt: expected"),
        (r#"{"prompt": [99999999999]}"#.into(), "prompt: expected"),
        (r#"{"prompt": [1024]}"#.into(), "token 1024, and the model has 1024"),
        (format!("{{\"prompt\": {:?}}}", vec![5; 256]), "leaves no room in the model's context of 256"),
        (format!("{{\"prompt\": {:?}, \"max_tokens\": 57}}", vec![5; 200]), "200 of the prompt leave 56, and 57 were"),
        (completion(", \"max_tokens\": 0"), "max_tokens: expected a whole number from 1"),
        (completion(", \"max_tokens\": 1.5"), "max_tokens"),
        (completion(", \"max_tokens\": 1e30"), "max_tokens"),
        (completion(", \"n\": 0"), "n: expected"),
        (completion(", \"n\": 100000000"), "n: expected"),
        (completion(", \"temperature\": -1"), "temperature: expected a number from 0"),
        (completion(", \"temperature\": \"hot\""), "temperature"),
        (completion(", \"temperature\": 1e400"), "not JSON"),
        (completion(", \"top_p\": 0"), "top_p: must be above 0"),
        (completion(", \"top_p\": 1.1"), "top_p"),
        (completion(", \"top_k\": -2"), "top_k"),
        (completion(", \"seed\": 1.5"), "seed"),
        (completion(", \"stop\": 5"), "stop: expected"),
        (completion(", \"stop\": [\"\"]"), "stop: holds an empty string"),
        (completion(", \"stop_token_ids\": [1024]"), "stop_token_ids: expected a list of token ids below 1024"),
        (completion(", \"logprobs\": 21"), "logprobs: expected a whole number from 0 to 20"),
        (completion(", \"logprobs\": true"), "logprobs"),
        (completion(", \"stream\": 1"), "stream: expected true or false"),
        (completion(", \"stream_options\": {\"include_usage\": true}"), "stream_options: needs"),
        (completion(", \"echo\": true"), "echo: is not supported"),
        (completion(", \"best_of\": 2"), "best_of: is not supported"),
        (completion(", \"suffix\": \"b\""), "suffix: is not supported"),
        (completion(", \"logit_bias\": {\"5\": 100}"), "logit_bias: is not supported"),
        (completion(", \"presence_penalty\": 0.1"), "presence_penalty: is not supported"),
        (completion(", \"frequency_penalty\": 1"), "frequency_penalty: is not supported"),
        (completion(", \"repetition_penalty\": 1.1"), "repetition_penalty: is not supported"),
        (completion(", \"min_p\": 0.1"), "min_p: is not supported"),
        (completion(", \"min_tokens\": 3"), "min_tokens: is not supported"),
        (completion(", \"prompt_logprobs\": 1"), "prompt_logprobs: is not supported"),
        (completion(", \"model\": \"reward\""), "writes no text"),
        (completion(", \"model\": 5"), "model: expected a string"),
    ];
    let dialogue = [
        ("{}".into(), "messages: is missing"),
        (r#"{"messages": "a"}"#.into(), "messages: expected a list"),
        (r#"{"messages": []}"#.into(), "messages: the list of messages is empty"),
        (r#"{"messages": [5]}"#.into(), "messages: turn 1"),
        (r#"{"messages": [{"role": "user"}]}"#.into(), "messages: turn 1"),
        (r#"{"messages": [{"role": "wizard", "content": "a"}]}"#.into(), "wizard"),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}"#.into(),
            "not text",
        ),
        (chat(", \"top_logprobs\": 3"), "top_logprobs: needs"),
        (chat(", \"logprobs\": 3"), "logprobs: expected true or false"),
        (chat(", \"tool_choice\": \"required\""), "tool_choice"),
        (chat(", \"tools\": \"none\""), "tools: expected a list"),
        (chat(", \"response_format\": {\"type\": \"json_object\"}"), "response_format: is not supported"),
        (chat(", \"max_completion_tokens\": 0"), "max_completion_tokens"),
        (format!("{{\"messages\": {}{}}}", "[".repeat(60), "]".repeat(60)), "nested more than 32"),
    ];
    let load = [
        ("{}".into(), "lora_name: is missing"),
        (r#"{"lora_name": "x"}"#.into(), "lora_path: is missing"),
        (r#"{"lora_name": "", "lora_path": "/"}"#.into(), "lora_name: expected a name"),
        (r#"{"lora_name": "base", "lora_path": "/"}"#.into(), "already been loaded"),
        (r#"{"lora_name": "x", "lora_path": "/"}"#.into(), ""),
        (format!("{{\"lora_name\": \"x\", \"lora_path\": {:?}}}", shipped("..").display().to_string()), ""),
    ];
    let score = [
        ("{}".into(), "expected \"prompts\" and \"responses\""),
        (r#"{"prompts": ["a", "b"], "responses": ["b", "c", "d"]}"#.into(), "2 prompts and 3 responses"),
        (r#"{"prompts": ["a"]}"#.into(), "responses: is missing"),
        (r#"{"prompts": ["a"], "responses": [""]}"#.into(), "the response is empty"),
        (r#"{"prompts": [5], "responses": ["b"]}"#.into(), "prompts: entry 0"),
        (r#"{"messages": [{"role": "user", "content": "a"}]}"#.into(), "an assistant's turn at the end"),
        (r#"{"model": "sft", "prompts": ["a"], "responses": ["b"]}"#.into(), "no score head"),
        (format!("{{\"prompt\": \"a\", \"response\": \"{}\"}}", "word ".repeat(300)), "the model's context 256"),
    ];
    let classify = [
        ("{}".into(), "input: expected"),
        (r#"{"input": []}"#.into(), "input: expected"),
        (r#"{"input": [[]]}"#.into(), "0 tokens"),
        (r#"{"input": [[2000]]}"#.into(), "token 2000"),
        (r#"{"input": [[1], "a", 5.5]}"#.into(), "input: expected"),
    ];
    let all: [(&str, &[(String, &str)]); 5] = [
        ("/v1/completions", &text),
        ("/v1/chat/completions", &dialogue),
        ("/v1/load_lora_adapter", &load),
        ("/score", &score),
        ("/classify", &classify),
    ];
    for (path, cases) in all {
        for (body, said) in cases {
            let (status, text) = client.raw(path, body.as_bytes());
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{path} {body}: {text}"));
            let error = &value["error"];
            let message = error["message"].as_str().unwrap_or_else(|| panic!("{path} {body}: {text}"));
            assert!(status == 400 && message.contains(said), "{path} {body}: {status} {text}");
            assert_eq!(error["type"], "invalid_request_error");
            assert!(error.get("param").is_some() && error.get("code").is_some());
        }
    }
    // Nothing of it has done any harm.
    client.ok("/v1/completions", &json!({ "prompt": "The" }));
    client.ok("/v1/chat/completions", &json!({ "messages": [{ "role": "user", "content": "a" }], "max_tokens": 3 }));
}

#[test]
fn what_is_not_there_is_404_and_a_wrong_method_405() {
    let (_running, client) = served(options());
    for (path, body, code) in [
        ("/v1/completions", json!({ "prompt": "a", "model": "nobody" }), json!("model_not_found")),
        (
            "/v1/chat/completions",
            json!({ "messages": [{ "role": "user", "content": "a" }], "model": "gpt-4" }),
            json!("model_not_found"),
        ),
        ("/score", json!({ "prompts": ["a"], "responses": ["b"], "model": "nobody" }), json!("model_not_found")),
        ("/v1/unload_lora_adapter", json!({ "lora_name": "nobody" }), json!("adapter_not_found")),
        ("/v1/load_lora_adapter", json!({ "lora_name": "x", "lora_path": "/no/such/folder" }), Value::Null),
        ("/v1/embeddings", json!({}), Value::Null),
        ("/", json!({}), Value::Null),
    ] {
        let (status, value) = client.post(path, &body);
        assert_eq!((status, &value["error"]["code"]), (404, &code), "{path}: {value}");
    }
    let answer = client.agent.get(format!("{}/v1/completions", client.url)).call().unwrap();
    assert_eq!((answer.status().as_u16(), answer.headers()["allow"].to_str().unwrap()), (405, "POST"));
    assert_eq!(client.post("/v1/models", &json!({})).0, 405);
    let (status, kind) = {
        let mut answer = client.send("/v1/completions", b"{\"prompt\": \"a\"}", "text/plain");
        (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
    };
    assert!(status == 415 && kind.contains("application/json"), "{kind}");
}

#[test]
fn a_body_that_is_too_large_is_refused_before_it_is_read() {
    let (running, client) = served(Options { max_body: 1000, ..options() });
    let long = json!({ "prompt": "a".repeat(2000) }).to_string();
    assert_eq!(client.raw("/v1/completions", long.as_bytes()).0, 413);
    // Without a length in its head, it is cut where it exceeds the limit.
    let mut socket = TcpStream::connect(running.address).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    socket.write_all(head.as_bytes()).unwrap();
    socket.write_all(format!("40\r\n{}\r\n", "a".repeat(64)).repeat(20).as_bytes()).unwrap();
    let mut answer = [0; 12];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
    client.ok("/v1/completions", &json!({ "prompt": "The" }));
}

#[test]
fn what_is_no_http_hurts_nobody() {
    let (running, client) = served(options());
    for bytes in [
        &b"\x16\x03\x01\x02\x00\x01"[..],
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"",
    ] {
        let mut socket = TcpStream::connect(running.address).unwrap();
        socket.write_all(bytes).unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        let mut answer = vec![];
        // A reset is an answer, too.
        let _ = socket.read_to_end(&mut answer);
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&answer));
    }
    client.ok("/v1/completions", &json!({ "prompt": "The" }));
}

#[test]
fn with_a_key_nothing_but_health_is_answered_without_it() {
    let (_running, client) = served(Options { key: Some("secret".into()), ..options() });
    client.ok("/v1/completions", &json!({ "prompt": "The" }));
    for key in [None, Some("wrong!"), Some("secre"), Some("")] {
        let stranger = Client { key: key.map(str::to_owned), ..client.clone() };
        assert_eq!(stranger.get("/health").0, 200);
        let (status, models) = stranger.get("/v1/models");
        assert_eq!((status, &models["error"]["code"]), (401, &json!("invalid_api_key")));
        assert_eq!(models["error"]["type"], "authentication_error");
        for path in ["/v1/completions", "/score", "/v1/load_lora_adapter", "/nothing"] {
            assert_eq!(stranger.post(path, &json!({})).0, 401, "{path}");
        }
    }
}
