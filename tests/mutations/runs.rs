//! What a run finds in its own folder after somebody or something was there, and what its reward sources answer.

use std::cell::RefCell;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use fourfold::model::adapter::{Adapter, LinearShapes, LoraConfig};
use fourfold::model::generate::{FinishReason, Response};
use fourfold::report::{Figures, Positions, Report};
use fourfold::reward::source::command::CommandReward;
use fourfold::reward::source::http::HttpReward;
use fourfold::reward::source::retry::RetryPolicy;
use fourfold::reward::source::{RewardInputs, RewardSource};
use fourfold::train::adamw::AdamWConfig;
use fourfold::train::fingerprint::RunFingerprint;
use fourfold::train::guard::Guard;
use fourfold::train::learner::Learner;
use fourfold::train::lock;
use fourfold::train::progress::Progress;
use fourfold::train::store;
use fourfold::train::store::Store;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::campaign::{Reader, Specimen, campaign};
use crate::mutate::Form;

fn progress() -> Progress {
    let adapter = Adapter::init(LoraConfig { r: 2, ..LoraConfig::default() }, LinearShapes::llama(1, 4, 4, 4, 8), 3);
    Progress::new(Learner::new(adapter.unwrap().to_trainable(), AdamWConfig::default(), 0.0).unwrap())
}

fn origin() -> RunFingerprint {
    let mut origin = RunFingerprint {
        stage: "sft".into(),
        config: "seed = 1\n[sft]\nlearning_rate = 0.1\n".into(),
        ..RunFingerprint::default()
    };
    origin.add("base", "A".into());
    origin
}

/// Sizes and sums in manifest.json made those of the files that are there.
fn mend(dir: &Path) {
    let path = dir.join("checkpoint-7/manifest.json");
    let Ok(mut manifest) = serde_json::from_slice::<Value>(&fs::read(&path).unwrap()) else { return };
    for name in ["state.json", "state.safetensors"] {
        let bytes = fs::read(dir.join("checkpoint-7").join(name)).unwrap();
        if manifest["files"][name].is_object() {
            let sum = format!("{:x}", Sha256::digest(&bytes));
            manifest["files"][name] = json!({"bytes": bytes.len(), "sha256": sum});
        }
    }
    fs::write(&path, manifest.to_string()).unwrap();
}

#[test]
fn checkpoints_are_gone_on_from_or_passed_over() {
    campaign("runs::checkpoints_are_gone_on_from_or_passed_over", || {
        let dir = tempfile::tempdir().unwrap();
        let mut snapshot = progress().snapshot().unwrap();
        Guard::default().save(&mut snapshot).unwrap();
        snapshot.put_rows("logprobs", &[vec![-1.5, -0.25], vec![], vec![-3.0]]).unwrap();
        snapshot.put("kl_coef", &0.05).unwrap();
        let path = Store::at(dir.path())
            .write(7, &snapshot, Positions { metrics: 10, samples: 0, events: 0 }, &origin())
            .unwrap();
        let names = ["manifest.json", "state.json", "state.safetensors"];
        let files = || names.map(|name| (format!("checkpoint-7/{name}"), fs::read(path.join(name)).unwrap())).to_vec();
        let forms = [Form::Json, Form::Json, Form::Safetensors];
        let specimens = forms.into_iter().enumerate().map(|(target, form)| Specimen { files: files(), target, form });
        let read = |dir: &Path, _: &str| {
            let found = store::read(&dir.join("checkpoint-7"))?;
            origin().changes(&found.manifest.origin)?;
            origin().check_inputs(&found.manifest.origin)?;
            progress().load(&found.snapshot)?;
            Guard::default().load(&found.snapshot)?;
            found.snapshot.rows("logprobs")?;
            found.snapshot.get::<f64>("kl_coef").map(drop)
        };
        // A damaged one is passed over, by its reason: no error of the user's.
        Reader { mend: Some(mend), codes: &[1, 2], ..Reader::new(specimens.collect(), read) }
    });
}

#[test]
fn metrics_of_a_run_are_gone_on_with() {
    campaign("runs::metrics_of_a_run_are_gone_on_with", || {
        let line = |i: usize| format!("{}\n", json!({"stage": "sft", "step": i, "loss": 1.0 / i as f64}));
        let text: String = (1..20).map(line).collect();
        let length = text.len() as u64;
        let specimens =
            ["metrics.jsonl", "samples.jsonl"].map(|name| Specimen::file(name, text.clone(), Form::JsonLines));
        Reader::new(specimens.into(), move |dir, name| {
            let mut report = Report::go_on(dir, Positions { metrics: length, samples: length, events: 0 })?;
            let before = fs::read(dir.join(name))?;
            // Whatever was there, what is written from now on are whole lines after whole lines.
            anyhow::ensure!(
                before.is_empty() || before.len() as u64 == length || before.ends_with(b"\n"),
                "half a line is left"
            );
            report.step(21, &Figures::new(), &[])?;
            report.positions().map(drop)
        })
    });
}

#[test]
fn locks_are_taken_whatever_they_say() {
    campaign("runs::locks_are_taken_whatever_they_say", || {
        let text = json!({"pid": 4711, "host": "one", "started": 1_700_000_000}).to_string();
        Reader::new(vec![Specimen::file("run.lock", text, Form::Json)], |dir, _| lock::lock(dir).map(drop))
    });
}

fn retry() -> RetryPolicy {
    RetryPolicy { timeout: Duration::from_secs(20), retries: 0, backoff: Duration::ZERO, fallback: None }
}

/// Three answers to judge.
fn ask(source: &dyn RewardSource) -> Result<()> {
    let prompts: Vec<Vec<u32>> = (0..3).map(|i| vec![100 + i]).collect();
    let response = |i| Response { tokens: vec![i, 0], logprobs: vec![0.0; 2], finish: FinishReason::Stop };
    let responses: Vec<Response> = (0..3).map(response).collect();
    let decode = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    let scores = source.scores(&RewardInputs {
        prompts: &prompts,
        responses: &responses,
        entries: &[],
        decode: &decode,
        known: &[],
    })?;
    anyhow::ensure!(scores.len() == 3 && scores.iter().all(|score| score.is_finite()), "scores that are none");
    Ok(())
}

#[test]
fn answers_of_a_reward_command_are_scores_or_faults() {
    campaign("runs::answers_of_a_reward_command_are_scores_or_faults", || {
        let specimens = [
            "{\"score\": 0.5}\n{\"score\": -1}\n{\"score\": 1e3}\n",
            "{\"id\": 0, \"score\": 1.5}\n{\"id\": 1, \"score\": 2}\n{\"id\": 2, \"score\": 3, \"why\": \"é\"}\n",
            "1\n2.5\n-3e-2\n",
        ];
        let specimens = specimens.map(|text| Specimen::file("answers", text, Form::JsonLines));
        let read = |dir: &Path, name: &str| {
            // It reads a question before it answers, as a judge does.
            let script = "read -r line; exec cat \"$0\"";
            let path = dir.join(name).display().to_string();
            ask(&CommandReward::start(vec!["/bin/sh".into(), "-c".into(), script.into(), path], None, retry())?)
        };
        // A source that is dead is no fault of the input.
        Reader { codes: &[1, 2], ..Reader::new(specimens.into(), read) }
    });
}

/// An answer that can be exchanged.
type Shared = Arc<Mutex<Vec<u8>>>;

/// Answers every request with what `answer` holds, and closes the connection.
fn serve(answer: Shared) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/score", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut length, mut line) = (0, String::new());
            while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
                line.clear();
            }
            let mut body = vec![0; length];
            if reader.read_exact(&mut body).is_ok() {
                stream.write_all(&answer.lock().unwrap()).ok();
            }
        }
    });
    url
}

#[test]
fn answers_of_a_reward_service_are_scores_or_faults() {
    campaign("runs::answers_of_a_reward_service_are_scores_or_faults", || {
        let body = "{\"scores\": [0.5, -1, 1e3]}";
        let plain = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let (a, b) = body.split_at(10);
        let chunked = format!(
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{a}\r\n{:x}\r\n{b}\r\n0\r\n\r\n",
            a.len(),
            b.len()
        );
        let until_closed = format!("HTTP/1.0 200 OK\r\n\r\n{body}");
        let specimens = [plain, chunked, until_closed].map(|text| Specimen::file("answer", text, Form::Text));
        thread_local! { static SERVED: RefCell<Option<(Shared, String)>> = const { RefCell::new(None) } }
        let read = |dir: &Path, name: &str| {
            SERVED.with_borrow_mut(|served| {
                let (answer, url) = served.get_or_insert_with(|| {
                    let answer = Shared::default();
                    (answer.clone(), serve(answer))
                });
                *answer.lock().unwrap() = fs::read(dir.join(name))?;
                ask(&HttpReward::new(url.clone(), None, None, retry()))
            })
        };
        Reader { codes: &[1, 2], ..Reader::new(specimens.into(), read) }
    });
}
