//! A reward source that runs a program of the user's, in any language: it is started once, without a shell, reads one JSON
//! object per line from stdin and replies to each with one line on stdout. Its stderr is the trainer's stderr. It does not
//! depend on the model. Read `retry.rs` for how failures are handled.
//!
//! Input: `{"id": 17, "prompt": "…", "response": "…"}`, and where the record is known `"record_id"` and `"columns": {…}`, every
//! column of the record that the prompt is from. Output, in the same order: `{"score": 0.5}`, optionally with `"id"`, which is
//! then checked. The program must flush its output after each line.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};

use super::{RewardInputs, RewardSource};
use crate::data::stream::columns::Columns;
use crate::invalid;
use crate::report::Metrics;
use crate::reward::source::retry::{Failure, RetryPolicy, Troubles, excerpt, score_of};

/// Maximum length of a line of output; a longer line is an error.
const LONGEST_LINE: u64 = 1 << 20;
/// Time for the program to exit after its stdin is closed, before it is killed.
const EXIT_TIMEOUT: Duration = Duration::from_millis(300);

/// A running reward program.
pub struct CommandReward<'w> {
    argv: Vec<String>,
    columns: Option<&'w Columns>,
    retry: RetryPolicy,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    running: Option<Running>,
    next_id: u64,
    troubles: Troubles,
}

impl<'w> CommandReward<'w> {
    /// Starts the program. `argv`: its name and arguments, without a shell. `columns`: those of the records, if known.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn start(argv: Vec<String>, columns: Option<&'w Columns>, retry: RetryPolicy) -> Result<Self> {
        let running = Running::start(&argv).map_err(|fault| invalid!("reward command {argv:?}: {fault}"))?;
        let state = State { running: Some(running), ..State::default() };
        Ok(Self { argv, columns, retry, state: RefCell::new(state) })
    }

    /// Failures so far.
    pub fn troubles(&self) -> Troubles {
        self.state.borrow().troubles
    }
}

impl RewardSource for CommandReward<'_> {
    fn scores(&self, inputs: &RewardInputs<'_>) -> Result<Vec<f32>> {
        let mut state = self.state.borrow_mut();
        let State { running, next_id, troubles } = &mut *state;
        let count = inputs.responses.len();
        let name = format!("reward command {:?}", self.argv[0]);
        self.retry.scores(&name, count, troubles, || {
            let first = *next_id;
            *next_id += count as u64;
            let ask = |program: &mut Running| program.ask(inputs, self.columns, first, self.retry.timeout);
            let result = match running {
                Some(program) => ask(program),
                None => {
                    Running::start(&self.argv).map_err(Failure::Passing).and_then(|fresh| ask(running.insert(fresh)))
                }
            };
            if result.is_err() {
                *running = None; // a new process has no stale line in its pipes
            }
            result
        })
    }

    fn metrics(&self) -> Metrics {
        self.troubles().metrics()
    }

    fn state(&self) -> Value {
        json!({ "next_id": self.state.borrow().next_id, "troubles": self.troubles().metrics() })
    }

    fn restore(&self, state: &Value) {
        let mut ours = self.state.borrow_mut();
        ours.next_id = state["next_id"].as_u64().unwrap_or(0);
        ours.troubles = Troubles::of(&state["troubles"]);
    }
}

/// A started program and the channels of the two threads that write and read its lines.
struct Running {
    child: Child,
    to: Option<Sender<String>>,
    from: Receiver<Result<String, String>>,
}

impl Running {
    fn start(argv: &[String]) -> Result<Self, String> {
        let [program, arguments @ ..] = argv else { return Err("names no program".into()) };
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("{program} cannot be started: {error}"))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(format!("{program} has no pipes"));
        };
        let (to, lines) = channel();
        let (replies, from) = channel();
        let running = Self { child, to: Some(to), from };
        let starting = |error| format!("a thread for its pipes cannot be started: {error}");
        thread::Builder::new().spawn(move || write_lines(stdin, &lines)).map_err(starting)?;
        thread::Builder::new().spawn(move || read_lines(stdout, &replies)).map_err(starting)?;
        Ok(running)
    }

    /// Sends one line per response and reads one line for each. `timeout`: the longest wait for a line.
    fn ask(
        &mut self,
        inputs: &RewardInputs<'_>,
        columns: Option<&Columns>,
        first: u64,
        timeout: Duration,
    ) -> Result<Vec<Option<f32>>, Failure> {
        match self.from.try_recv() {
            Ok(Ok(line)) => {
                return Err(Failure::Passing(format!("it wrote a line without a request: {}", excerpt(&line))));
            }
            Ok(Err(fault)) => return Err(Failure::Passing(fault)),
            Err(TryRecvError::Disconnected) => return Err(Failure::Passing("it has ended".into())),
            Err(TryRecvError::Empty) => {}
        }
        for (i, (prompt, response)) in inputs.prompts.iter().zip(inputs.responses).enumerate() {
            let mut line = json!({
                "id": first + i as u64,
                "prompt": (inputs.decode)(prompt),
                "response": inputs.text(response),
            });
            if let Some(record) = columns.and_then(|columns| inputs.record(columns, i)) {
                line["record_id"] = record.id.clone();
                line["columns"] = record.columns.clone().into();
            }
            // If the program has ended, reading reports it.
            let _ = self.to.as_ref().map(|to| to.send(format!("{line}\n")));
        }
        let mut scores = Vec::with_capacity(inputs.responses.len());
        for i in 0..inputs.responses.len() as u64 {
            let line = match self.from.recv_timeout(timeout) {
                Ok(Ok(line)) => line,
                Ok(Err(fault)) => return Err(Failure::Passing(fault)),
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = timeout.as_secs_f64();
                    return Err(Failure::Passing(format!("no reply within {seconds} s ({i} replies came before)")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Failure::Passing(format!("it ended after {i} of {} replies", inputs.responses.len())));
                }
            };
            let value: Option<Value> = serde_json::from_str(&line).ok();
            if let Some(id) = value.as_ref().and_then(|v| v.get("id"))
                && id.as_u64() != Some(first + i)
            {
                return Err(Failure::Passing(format!("it replied with id {id} instead of {}", first + i)));
            }
            scores.push(value.as_ref().and_then(|v| score_of(v.get("score").unwrap_or(v))));
        }
        Ok(scores)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.to = None; // closes its stdin, on which a program exits
        let started = Instant::now();
        while started.elapsed() < EXIT_TIMEOUT {
            match self.child.try_wait() {
                Ok(None) => thread::sleep(Duration::from_millis(5)),
                _ => return,
            }
        }
        // Both fail if it has ended meanwhile, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_lines(mut stdin: ChildStdin, lines: &Receiver<String>) {
    for line in lines {
        if stdin.write_all(line.as_bytes()).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

fn read_lines(stdout: ChildStdout, replies: &Sender<Result<String, String>>) {
    let mut stdout = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        let found = match stdout.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(n) if n as u64 == LONGEST_LINE => Err("it wrote a line of more than 1 MiB".into()),
            Ok(_) => Ok(String::from_utf8_lossy(&line).into_owned()),
            Err(error) => Err(format!("reading from it: {error}")),
        };
        let broken = found.is_err();
        if replies.send(found).is_err() || broken {
            return;
        }
    }
}
