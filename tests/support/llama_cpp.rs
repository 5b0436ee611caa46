//! A program that speaks as llama.cpp's server does over the quickstart's base: it is started by a command line, reads the
//! GGUF-LoRA file of `--lora`, and samples with this program's own generation. The program is the test binary again, by its test
//! `stand_in`. What it does not do as llama.cpp does is said by the words of its command line.

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use fourfold::config::Lora;
use fourfold::export::{Source, gguf};
use fourfold::model::adapter::Adapter;
use fourfold::model::generate::{FinishReason, SamplingParams, generate};
use fourfold::model::roles::Policy;
use fourfold::model_files::ModelFiles;
use fourfold::quickstart::base::BASE;
use fourfold::run::Model;
use serde_json::{Value, json};

use crate::vllm::{reply, request};

/// The environment variable that makes a program of the test binary.
const LINE: &str = "FOURFOLD_TEST_LLAMA_SERVER";

/// The command line of the server, which notes how it was started and what it was asked in `folder`/journal. `words`: `--deed` with
/// one of
///
/// - `never`: it is never healthy;
/// - `exit`: it ends at once;
/// - `dies`: it ends at the first request for a response of its second start;
/// - `bare`: it samples from the base alone;
/// - `silent`: it reports no log-probability of every third token;
/// - `textual`: it returns no token ids;
/// - `slow`: it never replies to a request for a response of its second start;
///
/// and `--eog ID`, another token at which it ends a text.
pub fn command(folder: &Path, words: &[&str]) -> Vec<String> {
    let script = folder.join("llama-server.sh");
    let program = std::env::current_exe().unwrap();
    fs::write(
        &script,
        format!("{LINE}=\"$*\" exec {:?} llama_cpp::stand_in --exact --nocapture\n", program.display().to_string()),
    )
    .unwrap();
    let journal = folder.join("journal").display().to_string();
    let own = ["/bin/sh", script.to_str().unwrap(), "-m", "base.gguf", "--journal", &journal];
    own.iter().chain(words).map(|&word| word.to_owned()).collect()
}

/// What the servers of a folder noted: `{"start": [words], "adapter": hash of the file}` and `{"body": {…}}`.
#[allow(dead_code, reason = "not every test binary reads it")]
pub fn journal(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("journal")).unwrap_or_default();
    // The last line may not be whole yet.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Whether a process runs: not one that has ended and that nobody has waited for.
#[cfg(target_os = "linux")]
#[allow(dead_code, reason = "not every test binary reads it")]
pub fn lives(pid: &Value) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// The program that [`command`] starts; without its command line there is nothing to do.
#[test]
fn stand_in() {
    if let Ok(line) = std::env::var(LINE) {
        serve(&line.split(' ').map(str::to_owned).collect::<Vec<_>>());
    }
}

struct Server {
    model: Model,
    adapter: Adapter,
    deed: String,
    eog: Option<u32>,
    /// Starts so far, this one among them.
    starts: usize,
    journal: Mutex<fs::File>,
}

fn serve(words: &[String]) {
    let of = |name: &str| words.iter().position(|word| word == name).map(|at| words[at + 1].clone());
    let deed = of("--deed").unwrap_or_default();
    if deed == "exit" {
        eprintln!("error: failed to load model 'base.gguf'");
        std::process::exit(1);
    }
    let (file, lora) = (of("--journal").unwrap(), of("--lora").unwrap());
    let parts = (BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
    let model = Model::of(ModelFiles::from_embedded(BASE.config, parts.0, parts.1, parts.2, parts.3).unwrap()).unwrap();
    // A GGUF-LoRA file does not say its rank.
    let of_rank = |r| {
        let shape = model.fresh_adapter(&Lora { r, ..Lora::default() }, 1).unwrap();
        let source = Source { files: &model.checkpoint, base: &model.base, adapter: &shape, prompts: &[], about: "" };
        gguf::read_lora(&source, Path::new(&lora)).ok()
    };
    let adapter = (1..=16).find_map(of_rank).unwrap();
    let bytes = fs::read(&lora).unwrap();
    let hash = bytes.iter().fold(5381u64, |hash, &byte| hash.wrapping_mul(33) ^ u64::from(byte));
    let mut journal = fs::OpenOptions::new().create(true).append(true).open(&file).unwrap();
    note(&mut journal, &json!({ "start": words, "pid": std::process::id(), "adapter": hash }));
    let starts = fs::read_to_string(&file).unwrap().lines().filter(|line| line.starts_with("{\"start\"")).count();
    let eog = of("--eog").map(|id| id.parse().unwrap());
    let listener = TcpListener::bind(format!("{}:{}", of("--host").unwrap(), of("--port").unwrap())).unwrap();
    let server = Arc::new(Server { model, adapter, deed, eog, starts, journal: journal.into() });
    for stream in listener.incoming().flatten() {
        let server = server.clone();
        thread::spawn(move || server.handle(stream));
    }
}

fn note(journal: &mut fs::File, what: &Value) {
    journal.write_all(format!("{what}\n").as_bytes()).unwrap();
}

impl Server {
    fn handle(&self, mut stream: TcpStream) {
        let Some((path, body)) = request(&stream) else { return };
        let text = match path.as_str() {
            "/health" if self.deed == "never" => {
                let error = json!({ "code": 503, "message": "Loading model", "type": "unavailable_error" });
                reply("503 Service Unavailable", &json!({ "error": error }).to_string())
            }
            "/health" => reply("200 OK", "{\"status\":\"ok\"}"),
            "/completion" => {
                note(&mut self.journal.lock().unwrap(), &json!({ "body": body }));
                if self.starts > 1 && self.deed == "dies" {
                    eprintln!("out of memory");
                    std::process::exit(9);
                }
                if self.starts > 1 && self.deed == "slow" {
                    thread::sleep(Duration::from_secs(3600));
                }
                reply("200 OK", &self.completion(&body).to_string())
            }
            _ => reply(
                "404 Not Found",
                "{\"error\":{\"code\":404,\"message\":\"File Not Found\",\"type\":\"not_found_error\"}}",
            ),
        };
        let _ = stream.write_all(text.as_bytes());
    }

    fn completion(&self, body: &Value) -> Value {
        let ends = self.model.checkpoint.tokenizer().eos_ids().iter().copied().chain(self.eog);
        let sampling = SamplingParams {
            temperature: body["temperature"].as_f64().unwrap(),
            top_k: body["top_k"].as_u64().unwrap() as usize,
            top_p: body["top_p"].as_f64().unwrap(),
            max_new_tokens: body["n_predict"].as_u64().unwrap() as usize,
            stop: ends.collect(),
        };
        let prompt: Vec<u32> = serde_json::from_value(body["prompt"].clone()).unwrap();
        let seed = body["seed"].as_u64().unwrap();
        let adapter = (self.deed != "bare").then_some(&self.adapter);
        let policy = Policy::new(&self.model.base, adapter);
        let response =
            generate(policy, std::slice::from_ref(&prompt), &[seed], &sampling, |_, _| {}).unwrap().remove(0);
        let all = response.tokens.iter().zip(&response.logprobs).enumerate();
        let reported = all.filter(|(i, _)| self.deed != "silent" || i % 3 != 2);
        let reported: Vec<Value> = reported
            .map(|(_, (id, logprob))| json!({ "id": id, "token": "", "bytes": [], "logprob": logprob, "top_logprobs": [] }))
            .collect();
        json!({
            "index": 0,
            "content": self.model.checkpoint.tokenizer().decode(&response.tokens).unwrap(),
            "tokens": if self.deed == "textual" { vec![] } else { response.tokens },
            "stop": true,
            "stop_type": if response.finish == FinishReason::Stop { "eos" } else { "limit" },
            "truncated": false,
            "tokens_evaluated": prompt.len(),
            "completion_probabilities": reported,
        })
    }
}
