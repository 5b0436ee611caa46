//! A data set of the hub is fetched, kept, resumed and read, from a server in this file that plays the hub.
#![cfg(feature = "hub")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};

use fourfold::config::{Data, Paths};
use fourfold::error::exit_code;
use fourfold::hub::{Hub, RepoKind, Token};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Answers as the hub does, one request a connection; a path in `cut` ends in its middle once.
struct Server {
    endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
    cut: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn new(names: &[&str]) -> Self {
        let siblings: Vec<_> = names.iter().map(|name| serde_json::json!({"rfilename": name})).collect();
        let listing = serde_json::json!({"id": "me/set", "sha": COMMIT, "siblings": siblings}).to_string();
        let mut files = HashMap::from([("/api/datasets/me/set/revision/main".to_owned(), listing)]);
        for name in names {
            let lines: String = (0..200).map(|i| format!("{{\"text\": \"{name} {i}\"}}\n")).collect();
            files.insert(format!("/datasets/me/set/resolve/{COMMIT}/{name}"), lines);
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
    files: &HashMap<String, String>,
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
        _ if path.contains("/private/") && who != "Bearer s3cret" => head("401 Unauthorized", 0),
        None => head("404 Not Found", 0),
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
            head(status, rest.len()) + sent
        }
    };
    let _ = stream.write_all(reply.as_bytes());
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
        .args(["--ignored", "--exact", "in_a_process_of_its_own"])
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
