//! What a hub answers: its list of a repository's files, and the files, as whole HTTP answers.

use std::cell::RefCell;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use fourfold::model_files::hub::{Hub, RepoKind};
use serde_json::json;

use crate::campaign::{Reader, Specimen, campaign};
use crate::mutate::Form;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn whole(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
}

/// The answers to a request for the list and to one for a file.
#[derive(Default)]
struct Answers {
    list: Vec<u8>,
    file: Vec<u8>,
}

/// Plays the hub; every answer ends with the connection.
fn serve(answers: Arc<Mutex<Answers>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
            let first = lines.next().unwrap_or_default();
            lines.take_while(|line| !line.is_empty()).for_each(drop);
            let answers = answers.lock().unwrap();
            stream.write_all(if first.contains("/api/") { &answers.list } else { &answers.file }).ok();
        }
    });
    endpoint
}

/// Every file below a folder.
fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn list() -> String {
    let names = ["config.json", "data/train-0.jsonl", "README.md"].map(|name| json!({"rfilename": name}));
    json!({"id": "me/set", "sha": COMMIT, "siblings": names}).to_string()
}

#[test]
fn answers_of_a_hub_are_kept_in_the_cache_or_refused() {
    campaign("hub::answers_of_a_hub_are_kept_in_the_cache_or_refused", || {
        let body = list();
        let (a, b) = body.split_at(30);
        let chunked = format!(
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n{:x}\r\n{a}\r\n{:x}\r\n{b}\r\n0\r\n\r\n",
            a.len(),
            b.len()
        );
        let specimens = vec![
            Specimen::file("list", body.clone(), Form::Json),
            Specimen::file("list.http", whole(&body), Form::Text),
            Specimen::file("list.http", chunked, Form::Text),
            Specimen::file("file.http", whole("{\"text\": \"a\"}\n"), Form::Text),
            Specimen::file("refs/main", COMMIT, Form::Text),
        ];
        thread_local! { static SERVED: RefCell<Option<(Arc<Mutex<Answers>>, String)>> = const { RefCell::new(None) } }
        let read = |dir: &Path, name: &str| {
            let bytes = fs::read(dir.join(name))?;
            let mut now = Answers { list: whole(&list()).into_bytes(), file: whole("{}\n").into_bytes() };
            match name {
                // A body alone: what is wrong with it is in it.
                "list" => {
                    now.list = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", bytes.len()).into_bytes();
                    now.list.extend(&bytes);
                }
                "list.http" => now.list = bytes.clone(),
                "file.http" => now.file = bytes.clone(),
                _ => {}
            }
            let place = tempfile::tempdir()?;
            let cache = place.path().join("outer/cache");
            let offline = name == "refs/main";
            if offline {
                let repo = cache.join("datasets--me--set");
                fs::create_dir_all(repo.join("snapshots").join(COMMIT))?;
                fs::create_dir_all(repo.join("refs"))?;
                fs::write(repo.join("refs/main"), &bytes)?;
            }
            let found = SERVED.with_borrow_mut(|served| {
                let (answers, endpoint) = served.get_or_insert_with(|| {
                    let answers = Arc::default();
                    (Arc::clone(&answers), serve(answers))
                });
                *answers.lock().unwrap() = now;
                let hub = Hub { endpoint: endpoint.clone(), cache: cache.clone(), token: None, offline };
                hub.fetch(RepoKind::Dataset, "me/set", "main", &|name| !name.ends_with(".md"))
            });
            let outside = files(place.path()).into_iter().find(|path| !path.starts_with(&cache));
            assert!(outside.is_none(), "written outside of the cache: {outside:?}");
            let folder = found?;
            assert!(folder.starts_with(&cache) && folder.is_dir(), "{}", folder.display());
            Ok(())
        };
        // A hub that does not answer as one is no error of the user's.
        Reader { codes: &[1, 2], ..Reader::new(specimens, read) }
    });
}
