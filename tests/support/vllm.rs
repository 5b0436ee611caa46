//! A server that speaks vLLM's completions and adapter endpoints over the quickstart's base: it samples with this program's own
//! generation, so that a run through it can be compared with one without. What it does not do as vLLM is said by the test.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use fourfold::model::generate::{FinishReason, SamplingParams, generate};
use fourfold::model::roles::Policy;
use fourfold::model_files::ModelFiles;
use fourfold::quickstart::base::BASE;
use fourfold::run::Model;
use serde_json::{Value, json};

/// What is done with a request.
pub enum Deed {
    /// What vLLM does.
    Answer,
    /// The responses are sampled from the bare base.
    WithoutAdapter,
    /// What vLLM does, with so much added to each log-probability, nats.
    Shifted(f64),
    /// A whole HTTP response, or part of one, then the connection is closed.
    Reply(String),
    /// vLLM's reply without this key of its choice.
    Without(&'static str),
}

/// Paths and bodies of all requests.
pub type Log = Arc<Mutex<Vec<(String, Value)>>>;

/// Starts a server. `deed(n, path, body)`: what it does with its n-th request. Returns its address and its log.
pub fn server(deed: impl Fn(usize, &str, &Value) -> Deed + Send + Sync + 'static) -> (String, Log) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let (log, adapters, deed) = (Log::default(), Arc::new(Mutex::new(HashMap::new())), Arc::new(deed));
    let heard = log.clone();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (log, adapters, deed) = (log.clone(), adapters.clone(), deed.clone());
            thread::spawn(move || serve(stream, &log, &adapters, &*deed));
        }
    });
    (url, heard)
}

/// A JSON or text reply.
pub fn reply(status: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

/// An error as vLLM words it.
pub fn fault(status: &str, message: &str) -> String {
    reply(status, &json!({ "error": { "message": message, "type": "BadRequestError" } }).to_string())
}

/// Path and body of a request; no body is null. `None` if the connection is closed before it is whole.
pub fn request(stream: &TcpStream) -> Option<(String, Value)> {
    let mut reader = BufReader::new(stream);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first).ok()?;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return None;
        }
        if let Some(n) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = n.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
    Some((first.split(' ').nth(1)?.to_owned(), body))
}

fn serve(
    mut stream: TcpStream,
    log: &Log,
    adapters: &Mutex<HashMap<String, PathBuf>>,
    deed: &dyn Fn(usize, &str, &Value) -> Deed,
) {
    let Some((path, body)) = request(&stream) else { return };
    let number = {
        let mut log = log.lock().unwrap();
        log.push((path.clone(), body.clone()));
        log.len() - 1
    };
    let text = match deed(number, &path, &body) {
        Deed::Reply(text) => text,
        Deed::Answer => answer(&path, &body, adapters, &How::default()),
        Deed::WithoutAdapter => answer(&path, &body, adapters, &How { bare: true, ..How::default() }),
        Deed::Shifted(shift) => answer(&path, &body, adapters, &How { shift, ..How::default() }),
        Deed::Without(left_out) => answer(&path, &body, adapters, &How { left_out, ..How::default() }),
    };
    let _ = stream.write_all(text.as_bytes());
}

/// What a completion is other than vLLM's.
#[derive(Default)]
struct How {
    bare: bool,
    shift: f64,
    left_out: &'static str,
}

fn answer(path: &str, body: &Value, adapters: &Mutex<HashMap<String, PathBuf>>, how: &How) -> String {
    let name = |key: &str| body[key].as_str().unwrap_or_default().to_owned();
    match path {
        "/v1/load_lora_adapter" => {
            let (name, folder) = (name("lora_name"), PathBuf::from(name("lora_path")));
            if !folder.join("adapter_config.json").exists() {
                return fault("404 Not Found", &format!("Loading lora {name} failed: No adapter found"));
            }
            match adapters.lock().unwrap().insert(name.clone(), folder) {
                None => reply("200 OK", &format!("Success: LoRA adapter '{name}' added successfully.")),
                Some(_) => fault("400 Bad Request", &format!("The lora adapter '{name}' has already been loaded.")),
            }
        }
        "/v1/unload_lora_adapter" => {
            let name = name("lora_name");
            match adapters.lock().unwrap().remove(&name) {
                Some(_) => reply("200 OK", &format!("Success: LoRA adapter '{name}' removed successfully.")),
                None => fault("404 Not Found", &format!("The lora adapter '{name}' cannot be found.")),
            }
        }
        "/v1/completions" => match adapters.lock().unwrap().get(&name("model")).cloned() {
            Some(folder) => reply("200 OK", &completion(body, &folder, how).to_string()),
            None => fault("404 Not Found", &format!("The model `{}` does not exist.", name("model"))),
        },
        _ => reply("404 Not Found", "{\"detail\":\"Not Found\"}"),
    }
}

fn completion(body: &Value, folder: &Path, how: &How) -> Value {
    let parts = (BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
    let files = ModelFiles::from_embedded(BASE.config, parts.0, parts.1, parts.2, parts.3).unwrap();
    let model = Model::of(files).unwrap();
    let adapter = (!how.bare).then(|| model.adapter(folder).unwrap());
    let ids = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let sampling = SamplingParams {
        temperature: body["temperature"].as_f64().unwrap(),
        top_k: body["top_k"].as_i64().unwrap_or(0).max(0) as usize,
        top_p: body["top_p"].as_f64().unwrap(),
        max_new_tokens: body["max_tokens"].as_u64().unwrap() as usize,
        stop: match &body["stop_token_ids"] {
            Value::Null => model.checkpoint.tokenizer().eos_ids().to_vec(),
            stop => ids(stop),
        },
    };
    let prompt = ids(&body["prompt"]);
    let seed = body["seed"].as_i64().unwrap() as u64;
    let policy = Policy::new(&model.base, adapter.as_ref());
    let response = generate(policy, std::slice::from_ref(&prompt), &[seed], &sampling, |_, _| {}).unwrap().remove(0);
    let logprobs: Vec<f64> = response.logprobs.iter().map(|&logprob| f64::from(logprob) + how.shift).collect();
    let mut choice = json!({
        "index": 0,
        "text": model.checkpoint.tokenizer().decode(&response.tokens).unwrap(),
        "token_ids": response.tokens,
        "prompt_token_ids": prompt,
        "logprobs": { "token_logprobs": logprobs, "tokens": [], "top_logprobs": [], "text_offset": [] },
        "finish_reason": if response.finish == FinishReason::Stop { "stop" } else { "length" },
        "stop_reason": null,
    });
    choice.as_object_mut().unwrap().remove(how.left_out);
    json!({ "id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": [choice] })
}
