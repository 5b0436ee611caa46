//! `serve`: the server over the embedded base and the shipped adapters, asked over HTTP as clients ask it. `text.rs` has what is
//! generated, `together.rs` requests that run at once, `faults.rs` what is refused, `scores.rs` rewards, `program.rs` the command.

mod faults;
mod program;
mod scores;
mod text;
mod together;

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use fourfold::model_files::ModelFiles;
use fourfold::quickstart::base::BASE;
use fourfold::run::Model;
use fourfold::serve::engine::Limits;
use fourfold::serve::{Options, Running, Server};
use serde_json::Value;
use ureq::Agent;

/// Whoever waits longer for an answer waits in vain.
const PATIENCE: Duration = Duration::from_secs(120);

/// A shipped adapter.
fn shipped(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("adapters/quickstart").join(name)
}

/// The embedded base, on the CPU in f32.
fn model() -> Model {
    let (config, generation) = (BASE.config, BASE.generation_config);
    let files = ModelFiles::from_embedded(config, generation, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
    Model::of(files.unwrap()).unwrap()
}

fn options() -> Options {
    Options {
        name: "base".into(),
        key: None,
        limits: Limits { max_batch: 16, max_queue: 2048 },
        max_body: 1 << 20,
        raw_logprobs: true,
    }
}

/// A server with the shipped adapters `sft`, `actor` and `reward`.
fn served(options: Options) -> (Running, Client) {
    let key = options.key.clone();
    let server = Server::new(model(), options).unwrap();
    for name in ["sft", "actor", "reward"] {
        server.load(name, &shipped(name)).unwrap();
    }
    let running = server.spawn(TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
    let client = Client::new(format!("http://{}", running.address), key);
    (running, client)
}

/// A client of a server.
#[derive(Clone)]
struct Client {
    agent: Agent,
    url: String,
    key: Option<String>,
}

impl Client {
    fn new(url: String, key: Option<String>) -> Self {
        let config = Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false).proxy(None);
        Self { agent: config.build().into(), url, key }
    }

    /// Status, headers and body of an answer to a body of any kind.
    fn send(&self, path: &str, body: &[u8], kind: &str) -> ureq::http::Response<ureq::Body> {
        let mut request = self.agent.post(format!("{}{path}", self.url)).header("content-type", kind);
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        request.send(body).unwrap()
    }

    /// Status and text of an answer.
    fn raw(&self, path: &str, body: &[u8]) -> (u16, String) {
        let mut answer = self.send(path, body, "application/json");
        (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
    }

    /// Status and object of an answer.
    fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.raw(path, body.to_string().as_bytes());
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// The object of an answer that is a success.
    fn ok(&self, path: &str, body: &Value) -> Value {
        let (status, value) = self.post(path, body);
        assert_eq!(status, 200, "{path} {body}: {value}");
        value
    }

    fn get(&self, path: &str) -> (u16, Value) {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut answer = request.call().unwrap();
        let status = answer.status().as_u16();
        (status, serde_json::from_str(&answer.body_mut().read_to_string().unwrap()).unwrap())
    }

    /// The chunks of a stream, without `[DONE]`, which ends it.
    fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let answer = self.send(path, body.to_string().as_bytes(), "application/json");
        assert_eq!(answer.status().as_u16(), 200, "{path} {body}");
        assert!(answer.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream"));
        let lines = BufReader::new(answer.into_body().into_reader()).lines().map(Result::unwrap);
        let mut data: Vec<String> = lines.filter(|line| !line.is_empty()).collect();
        assert_eq!(data.pop().as_deref(), Some("data: [DONE]"));
        data.iter().map(|line| serde_json::from_str(line.strip_prefix("data: ").unwrap()).unwrap()).collect()
    }

    /// (running, waiting) sequences.
    fn load(&self) -> (u64, u64) {
        let (status, health) = self.get("/health");
        assert_eq!((status, &health["status"]), (200, &"ok".into()));
        (health["running"].as_u64().unwrap(), health["waiting"].as_u64().unwrap())
    }
}

/// The numbers of a list of whole numbers.
fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap_or_else(|| panic!("{value}")).iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// The numbers of a list.
fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap_or_else(|| panic!("{value}")).iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

/// Token ids of some prompts of the quickstart's task.
fn prompts(count: usize) -> Vec<Vec<u32>> {
    let model = model();
    let rows = fourfold::quickstart::task::prompts(7, count, fourfold::quickstart::task::Split::HeldOut);
    let encode = |text: &str| model.checkpoint.tokenizer().encode(text, fourfold::tokenizer::SpecialTokens::None);
    rows.iter().map(|row| encode(&row.prompt).unwrap()).collect()
}
