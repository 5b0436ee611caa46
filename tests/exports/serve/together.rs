//! Requests that run at once: none changes another's tokens, none is lost, adapters come and go, and a client that hangs up takes
//! nothing along.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fourfold::model::generate::SamplingParams;
use fourfold::serve::Stop;
use fourfold::serve::engine::{Engine, Event, Generation, Limits, Refused};
use serde_json::{Value, json};

use super::{Client, Options, ids, model, numbers, options, prompts, served, shipped};

/// A request by ids with a seed of its own; some are greedy.
fn body(model: &str, prompt: &[u32], i: usize) -> Value {
    let (temperature, top_k, top_p) = [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.7, 12, 0.9)][i % 3];
    json!({
        "model": model, "prompt": prompt, "seed": i, "max_tokens": 24 + i % 9, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "logprobs": i % 2, "return_token_ids": true,
    })
}

/// Tokens and log-probabilities.
fn found(answer: &Value) -> (Vec<u32>, Vec<f32>) {
    let choice = &answer["choices"][0];
    (ids(&choice["token_ids"]), numbers(&choice["logprobs"]["token_logprobs"]))
}

#[test]
fn a_request_gets_the_tokens_that_it_gets_alone() {
    let (_running, client) = served(options());
    let prompts = prompts(9);
    let names = ["base", "actor", "sft"];
    let all: Vec<Value> = prompts.iter().enumerate().map(|(i, prompt)| body(names[i / 2 % 3], prompt, i)).collect();
    let alone: Vec<_> = all.iter().map(|body| found(&client.ok("/v1/completions", body))).collect();
    assert!(alone.iter().any(|(tokens, _)| tokens.len() > 20), "several steps");
    let together: Vec<_> = thread::scope(|scope| {
        let asked: Vec<_> = all.iter().map(|body| scope.spawn(|| found(&client.ok("/v1/completions", body)))).collect();
        asked.into_iter().map(|one| one.join().unwrap()).collect()
    });
    for (i, (alone, together)) in alone.iter().zip(&together).enumerate() {
        assert_eq!(alone.0, together.0, "{i}");
        let apart = alone.1.iter().zip(&together.1).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(apart < 1e-4, "{i}: {apart}");
    }
}

#[test]
fn many_clients_for_some_seconds_lose_nothing_while_adapters_come_and_go() {
    let (running, client) = served(options());
    let prompts = prompts(8);
    let names = ["base", "actor", "sft"];
    let want: Vec<Vec<_>> = names
        .iter()
        .map(|name| (0..8).map(|i| found(&client.ok("/v1/completions", &body(name, &prompts[i], i))).0).collect())
        .collect();
    let (began, asked) = (Instant::now(), AtomicUsize::new(0));
    let is_over = |least: usize, done: usize| done >= least && began.elapsed() > Duration::from_secs(3);
    thread::scope(|scope| {
        for i in 0..64 {
            let (client, prompts, want, asked) = (client.clone(), &prompts, &want, &asked);
            scope.spawn(move || {
                for round in 0.. {
                    let (name, p) = ((i + round) % 3, (i * 5 + round) % 8);
                    let mut body = body(names[name], &prompts[p], p);
                    let tokens = match round % 2 {
                        0 => found(&client.ok("/v1/completions", &body)).0,
                        _ => {
                            body["stream"] = true.into();
                            let chunks = client.stream("/v1/completions", &body);
                            chunks.iter().flat_map(|chunk| ids(&chunk["choices"][0]["token_ids"])).collect()
                        }
                    };
                    assert_eq!(tokens, want[name][p], "{} {p}", names[name]);
                    asked.fetch_add(1, Ordering::Relaxed);
                    if is_over(3, round) {
                        return;
                    }
                }
            });
        }
        // An adapter under a new name per version, as a trainer pushes them.
        for version in 0.. {
            let name = format!("v{version}");
            let load = json!({ "lora_name": name, "lora_path": shipped("actor") });
            assert!(client.ok("/v1/load_lora_adapter", &load).as_str().unwrap().starts_with("Success"));
            assert_eq!(found(&client.ok("/v1/completions", &body(&name, &prompts[2], 2))).0, want[1][2]);
            client.ok("/v1/unload_lora_adapter", &json!({ "lora_name": name }));
            assert_eq!(client.post("/v1/completions", &body(&name, &prompts[2], 2)).0, 404);
            if is_over(3, version) {
                break;
            }
        }
    });
    assert!(asked.load(Ordering::Relaxed) >= 64 * 4);
    // The last answer may be here before its sequence is counted out.
    assert!(idle_within(&client, Duration::from_secs(10)));
    assert!(!running.end(Stop::Finish).unwrap(), "nothing was given up");
}

#[test]
fn an_adapter_that_is_unloaded_finishes_what_it_began() {
    let (_running, client) = served(options());
    let load = json!({ "lora_name": "new", "lora_path": shipped("actor") });
    client.ok("/v1/load_lora_adapter", &load);
    let (status, again) = client.post("/v1/load_lora_adapter", &load);
    assert!(status == 400 && again["error"]["message"].as_str().unwrap().contains("already"), "{again}");
    let (_, models) = client.get("/v1/models");
    let names: Vec<&str> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["base", "actor", "new", "reward", "sft"]);
    assert_eq!((&models["data"][2]["parent"], &models["data"][2]["max_model_len"]), (&json!("base"), &json!(256)));
    let prompt = prompts(1).remove(0);
    let mut body = json!({
        "model": "new", "prompt": prompt, "seed": 1, "max_tokens": 200, "ignore_eos": true, "return_token_ids": true,
    });
    let want = ids(&client.ok("/v1/completions", &body)["choices"][0]["token_ids"]);
    body["stream"] = true.into();
    // The first chunk is read before the adapter goes.
    let mut answer =
        client.send("/v1/completions", body.to_string().as_bytes(), "application/json").into_body().into_reader();
    let mut begun = [0; 40];
    answer.read_exact(&mut begun).unwrap();
    client.ok("/v1/unload_lora_adapter", &json!({ "lora_name": "new" }));
    assert_eq!(client.post("/v1/unload_lora_adapter", &json!({ "lora_name": "new" })).0, 404);
    let mut rest = String::new();
    answer.read_to_string(&mut rest).unwrap();
    let text = format!("{}{rest}", String::from_utf8(begun.to_vec()).unwrap());
    let chunks = text.split("\n\n").filter_map(|line| line.strip_prefix("data: {"));
    let chunks: Vec<Value> = chunks.map(|chunk| serde_json::from_str(&format!("{{{chunk}")).unwrap()).collect();
    let tokens: Vec<u32> = chunks.iter().flat_map(|chunk| ids(&chunk["choices"][0]["token_ids"])).collect();
    assert_eq!(tokens, want);
    // Loaded again, another adapter may take its name; in place, it takes the name of one that is there.
    client.ok("/v1/load_lora_adapter", &json!({ "lora_name": "new", "lora_path": shipped("sft") }));
    client.ok(
        "/v1/load_lora_adapter",
        &json!({ "lora_name": "new", "lora_path": shipped("actor"), "load_inplace": true }),
    );
    body["stream"] = false.into();
    assert_eq!(ids(&client.ok("/v1/completions", &body)["choices"][0]["token_ids"]), want);
}

/// Waits until nothing runs and nothing waits.
fn idle_within(client: &Client, most: Duration) -> bool {
    let began = Instant::now();
    while began.elapsed() < most {
        if client.load() == (0, 0) {
            return true;
        }
        thread::sleep(Duration::from_millis(5));
    }
    false
}

#[test]
fn a_client_that_hangs_up_frees_its_sequences() {
    let limits = Limits { max_batch: 2, max_queue: 2048 };
    let (running, client) = served(Options { limits, ..options() });
    let prompt = prompts(1).remove(0);
    let long = |n: usize| json!({ "prompt": prompt, "n": n, "max_tokens": 200, "ignore_eos": true });
    let began = Instant::now();
    client.ok("/v1/completions", &long(4));
    let of_two = began.elapsed() / 2;
    for stream in [true, false] {
        // Enough for a hundred times as long, and at least for twenty seconds.
        let n = ((20.0 / of_two.as_secs_f64()) as usize * 2).clamp(200, 1000);
        let mut body = long(n);
        body["stream"] = stream.into();
        let body = body.to_string();
        let mut socket = TcpStream::connect(running.address).unwrap();
        let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length:";
        socket.write_all(format!("{head} {}\r\n\r\n{body}", body.len()).as_bytes()).unwrap();
        if stream {
            let mut some = [0; 400];
            socket.read_exact(&mut some).unwrap();
            assert!(some.starts_with(b"HTTP/1.1 200"));
        }
        while client.load().0 == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(client.load().1 > 100, "many wait");
        drop(socket);
        assert!(idle_within(&client, of_two * 20), "stream: {stream}");
    }
    // Everybody else is served as before.
    client.ok("/v1/completions", &long(1));
}

#[test]
fn beyond_the_queue_requests_are_refused_and_the_end_finishes_or_cuts() {
    let limits = Limits { max_batch: 1, max_queue: 2 };
    let (running, client) = served(Options { limits, ..options() });
    let body = |n: usize| json!({ "prompt": [5, 6], "n": n, "max_tokens": 80, "ignore_eos": true, "seed": 0 });
    let first = {
        let client = client.clone();
        thread::spawn(move || client.post("/v1/completions", &body(12)))
    };
    while client.load().1 < 2 {
        assert!(!first.is_finished());
        thread::sleep(Duration::from_millis(1));
    }
    let (status, refused) = client.post("/v1/completions", &body(1));
    assert_eq!((status, &refused["error"]["type"]), (503, &json!("server_error")), "{refused}");
    let (status, _) = client.post("/score", &json!({ "prompts": ["a"], "responses": ["b"] }));
    assert_eq!(status, 503);
    // What runs is finished before the end.
    assert!(!running.end(Stop::Finish).unwrap());
    let (status, answer) = first.join().unwrap();
    assert_eq!((status, answer["choices"].as_array().unwrap().len()), (200, 12));
    assert_eq!(answer["usage"]["completion_tokens"], 12 * 80);
    let (running, client) = served(Options { limits, ..options() });
    let first = {
        let client = client.clone();
        thread::spawn(move || {
            client
                .agent
                .post(format!("{}/v1/completions", client.url))
                .header("content-type", "application/json")
                .send(body(1000).to_string().as_bytes())
                .map(drop)
        })
    };
    while client.load().0 == 0 {
        assert!(!first.is_finished());
        thread::sleep(Duration::from_millis(1));
    }
    assert!(running.end(Stop::Cut).unwrap(), "requests were given up");
    assert!(first.join().unwrap().is_err());
}

fn generation(prompt: &[u32], max_new_tokens: usize) -> Generation {
    let sampling = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens, stop: vec![] };
    Generation { adapter: None, prompt: prompt.into(), sampling, seed: 1, top: 0, raw_logprobs: true }
}

#[test]
fn the_engine_ends_what_is_cancelled_and_goes_on_after_a_fault_of_one_sequence() {
    let engine = Engine::start(Arc::new(model()), Limits { max_batch: 8, max_queue: 8 }).unwrap();
    // A token past the vocabulary fails its batch; the others of the batch are generated all the same.
    let (mut events, _cancel) = engine.generate([5u32, 9999, 7].map(|token| generation(&[token], 30)).into()).unwrap();
    let mut tokens = [0; 3];
    let mut ends = vec![];
    while let Some((i, event)) = events.blocking_recv() {
        match event {
            Event::Token { .. } => tokens[i] += 1,
            Event::Done(_) => ends.push((i, true)),
            Event::Failed(said) => {
                assert!(said.contains("9999") || said.contains("vocabulary") || said.contains("fault"), "{said}");
                ends.push((i, false));
            }
        }
    }
    ends.sort_unstable();
    assert_eq!((tokens, ends), ([30, 0, 30], vec![(0, true), (1, false), (2, true)]));
    // Events end without `Done` where a request was cancelled.
    let (mut events, cancel) = engine.generate((0..8).map(|_| generation(&[5], 250)).collect()).unwrap();
    assert!(matches!(events.blocking_recv(), Some((_, Event::Token { .. }))));
    cancel.flags().end(3);
    drop(cancel);
    let mut more = 0;
    while let Some((_, event)) = events.blocking_recv() {
        assert!(matches!(event, Event::Token { .. }));
        more += 1;
    }
    assert!(more < 8 * 249, "{more}");
    assert!(engine.is_running());
    engine.end(false);
    assert!(!engine.is_running());
    assert_eq!(engine.generate(vec![generation(&[5], 1)]).err(), Some(Refused::Ended));
}
