//! Data sets and bases of the hub are fetched, kept, resumed and read, from a server in this file that plays the hub.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};

use fourfold::config::{Data, Paths};
use fourfold::error::exit_code;
use fourfold::model_files::hub::{Hub, RepoKind, Token};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Answers as the hub does, one request a connection; a path in `cut` ends in its middle once.
struct Server {
    endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
    cut: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn new(names: &[&str]) -> Self {
        let lines = |name: &str| -> String { (0..200).map(|i| format!("{{\"text\": \"{name} {i}\"}}\n")).collect() };
        let files = names.iter().map(|name| (name.to_string(), lines(name).into_bytes())).collect();
        Self::serving("datasets", "/datasets", "me/set", files)
    }

    /// A repository of a kind with its files; `prefix` is what stands before a file's address.
    fn serving(kind: &str, prefix: &str, id: &str, contents: Vec<(String, Vec<u8>)>) -> Self {
        let siblings: Vec<_> = contents.iter().map(|(name, _)| serde_json::json!({"rfilename": name})).collect();
        let listing = serde_json::json!({"id": id, "sha": COMMIT, "siblings": siblings}).to_string().into_bytes();
        let list = |revision: &str| (format!("/api/{kind}/{id}/revision/{revision}"), listing.clone());
        let mut files = HashMap::from([list("main"), list("v1")]);
        for (name, bytes) in contents {
            files.insert(format!("{prefix}/{id}/resolve/{COMMIT}/{name}"), bytes);
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (asked, cut) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
        let server = Self { endpoint, asked: asked.clone(), cut: cut.clone() };
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &files, &asked, &cut);
            }
        });
        server
    }

    fn hub(&self, cache: &std::path::Path) -> Hub {
        Hub { endpoint: self.endpoint.clone(), cache: cache.to_owned(), token: None, offline: false }
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

fn answer(
    mut stream: TcpStream,
    files: &HashMap<String, Vec<u8>>,
    asked: &Mutex<Vec<String>>,
    cut: &Mutex<Vec<String>>,
) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let headers: HashMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned())))
        .collect();
    let range = headers.get("range").cloned().unwrap_or_default();
    let who = headers.get("authorization").cloned().unwrap_or_default();
    asked.lock().unwrap().push(format!("{path} {range} {who}").trim_end().to_owned());
    let head = |status: &str, length: usize| {
        format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")
    };
    let reply = match files.get(&path) {
        _ if path.contains("/private/") && who != "Bearer s3cret" => head("401 Unauthorized", 0).into_bytes(),
        None => head("404 Not Found", 0).into_bytes(),
        Some(body) => {
            let from: usize = range.strip_prefix("bytes=").and_then(|r| r.strip_suffix('-')?.parse().ok()).unwrap_or(0);
            let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
            let rest = &body[from..];
            let mut cut = cut.lock().unwrap();
            let sent = match cut.iter().position(|name| path.ends_with(name.as_str())) {
                Some(place) => {
                    cut.remove(place);
                    &rest[..rest.len() / 2]
                }
                None => rest,
            };
            [head(status, rest.len()).as_bytes(), sent].concat()
        }
    };
    let _ = stream.write_all(&reply);
}

fn is_lines(name: &str) -> bool {
    name.ends_with(".jsonl")
}

#[test]
fn the_files_of_a_commit_are_fetched_once_and_then_offline() {
    let server = Server::new(&["data/train-0.jsonl", "README.md", "test.jsonl"]);
    let cache = tempfile::tempdir().unwrap();
    let mut hub = server.hub(cache.path());
    let folder = hub.fetch(RepoKind::Dataset, "me/set", "main", &is_lines).unwrap();
    assert_eq!(folder, cache.path().join("datasets--me--set/snapshots").join(COMMIT));
    assert!(std::fs::read_to_string(folder.join("data/train-0.jsonl")).unwrap().ends_with("train-0.jsonl 199\"}\n"));
    assert!(folder.join("test.jsonl").exists() && !folder.join("README.md").exists());
    assert_eq!(server.asked().len(), 3);
    hub.fetch(RepoKind::Dataset, "me/set", "main", &is_lines).unwrap();
    assert_eq!(server.asked(), ["/api/datasets/me/set/revision/main"], "what is there is not fetched again");
    hub.offline = true;
    assert_eq!(hub.fetch(RepoKind::Dataset, "me/set", "main", &is_lines).unwrap(), folder);
    assert_eq!(hub.fetch(RepoKind::Dataset, "me/set", COMMIT, &is_lines).unwrap(), folder);
    let error = hub.fetch(RepoKind::Dataset, "me/set", "v2", &is_lines).unwrap_err();
    assert!(error.to_string().contains("HF_HUB_OFFLINE") && exit_code(&error) == 2, "{error}");
    assert!(server.asked().is_empty());
}

#[test]
fn a_broken_download_goes_on_where_it_ended() {
    let server = Server::new(&["a.jsonl"]);
    server.cut.lock().unwrap().push("a.jsonl".to_owned());
    let cache = tempfile::tempdir().unwrap();
    let hub = server.hub(cache.path());
    let error = hub.fetch(RepoKind::Dataset, "me/set", "main", &is_lines).unwrap_err();
    assert!(format!("{error:#}").contains("fetching a.jsonl of me/set"), "{error:#}");
    assert!(!cache.path().join("datasets--me--set/snapshots").join(COMMIT).join("a.jsonl").exists());
    let folder = hub.fetch(RepoKind::Dataset, "me/set", "main", &is_lines).unwrap();
    let lines = std::fs::read_to_string(folder.join("a.jsonl")).unwrap();
    let expected: String = (0..200).map(|i| format!("{{\"text\": \"a.jsonl {i}\"}}\n")).collect();
    assert_eq!(lines, expected);
    assert!(server.asked().last().unwrap().contains("bytes="), "the second half alone was asked for");
}

#[test]
fn no_name_of_the_server_leaves_the_cache_and_no_message_holds_the_token() {
    let server = Server::new(&["../../escaped.jsonl"]);
    let cache = tempfile::tempdir().unwrap();
    let mut hub = server.hub(&cache.path().join("hub"));
    let error = hub.fetch(RepoKind::Dataset, "me/set", "main", &is_lines).unwrap_err();
    assert!(error.to_string().contains("would be written elsewhere"), "{error}");
    for (id, revision) in [("../x", "main"), ("me/set", "../../x"), ("a/b/c", "main"), ("", "main")] {
        let error = hub.fetch(RepoKind::Dataset, id, revision, &is_lines).unwrap_err();
        assert!(error.to_string().contains("is no repository of the hub"), "{error}");
    }
    hub.token = Token::new("wr0ng");
    let error = hub.fetch(RepoKind::Model, "private/x", "main", &is_lines).unwrap_err();
    let shown = format!("{error:?} {hub:?}");
    assert!(shown.contains("set HF_TOKEN") && !shown.contains("wr0ng"), "{shown}");
    assert!(server.asked().last().unwrap().ends_with("Bearer wr0ng"));
    let error = hub.fetch(RepoKind::Model, "me/nothing", "main", &is_lines).unwrap_err();
    assert!(error.to_string().contains("no such repository") && exit_code(&error) == 2, "{error}");
}

#[test]
fn a_config_names_a_data_set_of_the_hub() {
    let server = Server::new(&["data/train-0.jsonl", "data/test-0.jsonl", "README.md"]);
    let cache = tempfile::tempdir().unwrap();
    // The environment belongs to the process, so another one reads it.
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "hub::in_a_process_of_its_own"])
        .env("HF_ENDPOINT", &server.endpoint)
        .env("HF_HUB_CACHE", cache.path())
        .env_remove("HF_HUB_OFFLINE")
        .status()
        .unwrap();
    assert!(status.success());
    assert!(!server.asked().iter().any(|path| path.contains("test-0")), "of the split asked for alone");
}

#[test]
#[ignore = "run by the test above"]
fn in_a_process_of_its_own() {
    let split = Some("train".to_owned());
    let data = Data { path: Paths::One("me/set".into()), split, ..Data::default() };
    assert_eq!(fourfold::data::load(&data).unwrap().entries.len(), 200);
}

/// The embedded base's files, beside some that nobody asked for.
fn base_files(place: &crate::support::Place) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(place.path("base"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
        .collect();
    for name in ["README.md", "pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors"] {
        files.push((name.to_owned(), b"nobody wants this".to_vec()));
    }
    files
}

/// The program in the place's folder, with a hub of its own.
fn fourfold(place: &crate::support::Place, server: &Server, offline: bool, line: &str) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
    command.current_dir(place.path("")).env("HF_ENDPOINT", &server.endpoint).env("HF_HUB_CACHE", place.path("cache"));
    command.env_remove("HF_TOKEN").env("HF_HUB_OFFLINE", if offline { "1" } else { "0" });
    let output = command.args(line.split_whitespace()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

#[test]
fn a_base_of_the_hub_is_trained_over_merged_and_scored_by_its_id() {
    let place = crate::support::Place::new();
    let server = Server::serving("models", "", "me/model", base_files(&place));
    let run = |offline: bool, line: &str| fourfold(&place, &server, offline, line);
    let good = |offline: bool, line: &str| -> serde_json::Value {
        let (code, out, err) = run(offline, line);
        assert_eq!(code, 0, "{line}: {err}");
        serde_json::from_str(&out).unwrap()
    };
    // Breaks off in the middle of the weights; the next goes on there.
    server.cut.lock().unwrap().push("model.safetensors".to_owned());
    let (code, _, err) = run(false, "inspect hf://me/model");
    assert!(code != 0 && err.contains("start again to go on"), "{err}");
    server.asked();
    good(false, "inspect hf://me/model --json");
    let asked = server.asked();
    assert!(asked.iter().any(|a| a.contains("/model.safetensors bytes=")), "{asked:?}");
    assert!(!asked.iter().any(|a| ["README", "pytorch", "onnx", "consolidated"].iter().any(|n| a.contains(n))));
    // By its bare id, and of a revision; what is there is not fetched again.
    good(false, "generate --base me/model --prompt x --raw --max-new-tokens 2 --temperature 0 --json");
    good(false, "generate --base hf://me/model@v1 --prompt x --raw --max-new-tokens 2 --temperature 0 --json");
    let asked = server.asked();
    assert_eq!(asked, ["/api/models/me/model/revision/main", "/api/models/me/model/revision/v1"]);
    // Offline from here on: every stage and command that opens a base.
    good(true, "sft run.toml --set base.path=me/model --out out/sft --json");
    let pairs = "--set data.path=pairs.jsonl";
    good(true, &format!("reward run.toml {pairs} --set base.path=hf://me/model --out out/reward --json"));
    let ppo = "ppo run.toml --set data.path=prompts.jsonl --set base.path=me/model --set reward_base.path=me/model";
    good(true, &format!("{ppo} --out out/ppo --json"));
    good(true, "merge --base me/model --adapter out/sft/adapter --out merged --json");
    good(true, "score --base me/model --adapter out/reward/adapter --data pairs.jsonl --json");
    place.write("ids.json", "{\"input_ids\": [[5, 6, 7]]}");
    let hub = good(true, "logprobs --base me/model --tokens ids.json --json");
    assert_eq!(hub, good(true, "logprobs --base base --tokens ids.json --json"));
    assert!(server.asked().is_empty());
    let config = std::fs::read_to_string(place.path("out/sft/adapter/adapter_config.json")).unwrap();
    assert!(config.contains("\"base_model_name_or_path\": \"me/model\""), "{config}");
    // What cannot be had says why.
    let (code, _, err) = run(true, "inspect me/other");
    assert!(code == 2 && err.contains("HF_HUB_OFFLINE"), "{err}");
    let (code, _, err) = run(false, "inspect me/other");
    assert!(code == 2 && err.contains("no such repository"), "{err}");
}

#[test]
fn a_gguf_file_of_the_hub_is_named_by_its_file() {
    let place = crate::support::Place::new();
    place.train_sft_and_reward();
    let ran = place.run("merge --base base --adapter out/sft/adapter --format gguf --dtype q8_0 --out q8.gguf");
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    let files = ["q8.gguf", "q4.gguf"].map(|n| (n.to_owned(), std::fs::read(place.path("q8.gguf")).unwrap()));
    let server = Server::serving("models", "", "me/ggufs", files.to_vec());
    let (code, out, err) = fourfold(&place, &server, false, "inspect hf://me/ggufs/q8.gguf --json");
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("GGUF version 3"));
    assert!(!server.asked().iter().any(|a| a.contains("q4.gguf")), "only the file that was named");
    let (code, _, err) = fourfold(&place, &server, false, "inspect hf://me/ggufs");
    assert!(code == 2 && err.contains("none of the files wanted") && err.contains("/FILE.gguf"), "{err}");
}
