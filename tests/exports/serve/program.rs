//! The command: what it binds, what it says, and how signals end it.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use serde_json::json;

use super::{Client, shipped};
use crate::support::Place;

/// A server in a process of its own.
struct Process {
    child: Child,
    said: BufReader<std::process::ChildStderr>,
    line: String,
    url: String,
}

impl Process {
    fn start(place: &Place, args: &[&str], key: Option<&str>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fourfold"));
        let fixed = ["serve", "--base", "base", "--port", "0", "--device", "cpu"];
        command.args([&fixed, args].concat()).current_dir(place.path("")).stderr(Stdio::piped());
        if let Some(key) = key {
            command.env("SERVE_KEY", key);
        }
        let mut child = command.spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        said.read_line(&mut line).unwrap();
        let url = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap_or_else(|| panic!("{line}"));
        Self { url: url.to_owned(), child, said, line }
    }

    /// Sends a signal; returns the exit code and the rest of what was said.
    #[cfg(unix)]
    fn end(mut self, signal: i32) -> (i32, String) {
        // SAFETY: the process is ours, and is waited for below.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
        let mut rest = String::new();
        self.said.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code().unwrap_or(-1), rest)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(unix)]
#[test]
fn one_line_says_what_is_served_and_signals_end_it() {
    let place = Place::new();
    let reward = format!("rm={}", shipped("reward").display());
    let actor = shipped("actor").display().to_string();
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let process = Process::start(&place, &["--adapter", &actor, "--adapter", &reward, "--max-batch", "4"], None);
        for said in ["http://127.0.0.1:", "answers for base with 2 adapters (actor, rm) on the CPU"] {
            assert!(process.line.contains(said), "{}", process.line);
        }
        let client = Client::new(process.url.clone(), None);
        let args = [
            "generate",
            "--base",
            "base",
            "--adapter",
            &actor,
            "--prompt",
            "How is the hotel?",
            "--seed",
            "4",
            "--json",
            "--device",
            "cpu",
        ];
        let ran = place.run_with(&args, "");
        let want: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        let messages = json!([{ "role": "user", "content": "How is the hotel?" }]);
        let body =
            json!({ "model": "actor", "messages": messages, "seed": 4, "max_tokens": 128, "return_token_ids": true });
        let answer = client.ok("/v1/chat/completions", &body);
        assert_eq!(answer["choices"][0]["token_ids"], want["token_ids"], "the command's own response");
        assert_eq!(answer["choices"][0]["message"]["content"], want["text"]);
        let (code, rest) = process.end(signal);
        assert!(code == 0 && rest.contains("serve: ended") && !rest.contains("panicked"), "{code} {rest}");
    }
}

#[test]
fn other_machines_are_let_in_with_a_key_alone() {
    let place = Place::new();
    let refused = |args: &[&str], said: &str| {
        let ran = place.run_with(&[&["serve", "--base", "base", "--device", "cpu"], args].concat(), "");
        assert!(ran.code == 2 && ran.stderr.contains(said), "{args:?}: {} {}", ran.code, ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    };
    refused(&["--host", "0.0.0.0", "--port", "0"], "needs a key");
    refused(&["--host", "::", "--port", "0"], "needs a key");
    refused(&["--api-key-env", "NO_SUCH_VARIABLE_HERE"], "NO_SUCH_VARIABLE_HERE: that variable is not set");
    refused(&["--host", "no such host"], "--host no such host");
    refused(&["--port", "0", "--adapter", "nowhere"], "--adapter nowhere: there is no such folder");
    let actor = shipped("actor").display().to_string();
    refused(&["--port", "0", "--adapter", &actor, "--adapter", &actor], "that name is taken");
    refused(&["--port", "0", "--adapter", &format!("base={actor}")], "that name is taken");
    refused(&["--port", "0", "--adapter", "base"], "is a model, not an adapter");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    refused(&["--port", &taken.local_addr().unwrap().port().to_string()], "--port");
    let process = Process::start(&place, &["--host", "0.0.0.0", "--api-key-env", "SERVE_KEY"], Some("k3y"));
    let url = process.url.replace("0.0.0.0", "127.0.0.1");
    assert_eq!(Client::new(url.clone(), None).get("/v1/models").0, 401);
    let (status, models) = Client::new(url, Some("k3y".into())).get("/v1/models");
    assert_eq!((status, &models["data"][0]["id"]), (200, &json!("base")));
    assert!(!process.line.contains("k3y"));
}
