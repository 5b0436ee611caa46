//! A reward by a program of the user's, in any language: it is started once, without a shell, reads a JSON object a line
//! on stdin and answers each with one on stdout. Its stderr is ours. Read patience.rs for what happens when it fails.
//!
//! In: `{"id": 17, "prompt": "…", "response": "…"}`. Out, in the same order: `{"score": 0.5}`, with `"id"` where the program
//! likes to be checked. What the program writes must be flushed after each line.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};

use super::{Answers, RewardSource};
use crate::invalid;
use crate::report::Figures;
use crate::reward::source::retry::{Failure, Patience, Troubles, excerpt, score_of};

/// No line that a program writes is longer; past it the program is taken to be broken.
const LONGEST_LINE: u64 = 1 << 20;
/// A program that is told to end has this long before it is killed.
const FAREWELL: Duration = Duration::from_millis(300);

/// A program that scores.
pub struct CommandReward {
    argv: Vec<String>,
    patience: Patience,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    running: Option<Running>,
    next_id: u64,
    troubles: Troubles,
}

impl CommandReward {
    /// Starts the program. `argv`: its name and arguments, no shell between.
    ///
    /// # Errors
    /// If there is no such program.
    pub fn start(argv: Vec<String>, patience: Patience) -> Result<Self> {
        let running = Running::start(&argv).map_err(|fault| invalid!("reward command {argv:?}: {fault}"))?;
        let state = State { running: Some(running), ..State::default() };
        Ok(Self { argv, patience, state: RefCell::new(state) })
    }

    /// What went wrong so far.
    pub fn troubles(&self) -> Troubles {
        self.state.borrow().troubles
    }
}

impl RewardSource for CommandReward {
    fn scores(&self, answers: &Answers<'_>) -> Result<Vec<f32>> {
        let mut state = self.state.borrow_mut();
        let State { running, next_id, troubles } = &mut *state;
        let count = answers.responses.len();
        let name = format!("reward command {:?}", self.argv[0]);
        self.patience.scores(&name, count, troubles, || {
            let first = *next_id;
            *next_id += count as u64;
            let result = match running {
                Some(program) => program.ask(answers, first, self.patience.timeout),
                None => Running::start(&self.argv)
                    .map_err(Failure::Passing)
                    .and_then(|fresh| running.insert(fresh).ask(answers, first, self.patience.timeout)),
            };
            if result.is_err() {
                *running = None; // a fresh one has no stale line in its pipes
            }
            result
        })
    }

    fn figures(&self) -> Figures {
        self.troubles().figures()
    }

    fn state(&self) -> Value {
        json!({ "next_id": self.state.borrow().next_id, "troubles": self.troubles().figures() })
    }

    fn restore(&self, state: &Value) {
        let mut ours = self.state.borrow_mut();
        ours.next_id = state["next_id"].as_u64().unwrap_or(0);
        ours.troubles = Troubles::of(&state["troubles"]);
    }
}

/// A started program and the two threads that move its lines.
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
        let (answers, from) = channel();
        let running = Self { child, to: Some(to), from };
        let starting = |error| format!("a thread for its pipes cannot be started: {error}");
        thread::Builder::new().spawn(move || write_lines(stdin, &lines)).map_err(starting)?;
        thread::Builder::new().spawn(move || read_lines(stdout, &answers)).map_err(starting)?;
        Ok(running)
    }

    /// One line out and one line in for each answer. `wait`: the longest for each line in.
    fn ask(&mut self, answers: &Answers<'_>, first: u64, wait: Duration) -> Result<Vec<Option<f32>>, Failure> {
        match self.from.try_recv() {
            Ok(Ok(line)) => {
                return Err(Failure::Passing(format!("it wrote a line that nobody asked for: {}", excerpt(&line))));
            }
            Ok(Err(fault)) => return Err(Failure::Passing(fault)),
            Err(TryRecvError::Disconnected) => return Err(Failure::Passing("it has ended".into())),
            Err(TryRecvError::Empty) => {}
        }
        for (i, (prompt, response)) in answers.prompts.iter().zip(answers.responses).enumerate() {
            let line = json!({
                "id": first + i as u64,
                "prompt": (answers.decode)(prompt),
                "response": answers.text(response),
            });
            // A closed channel is a program that ended; reading says so.
            let _ = self.to.as_ref().map(|to| to.send(format!("{line}\n")));
        }
        let mut scores = Vec::with_capacity(answers.responses.len());
        for i in 0..answers.responses.len() as u64 {
            let line = match self.from.recv_timeout(wait) {
                Ok(Ok(line)) => line,
                Ok(Err(fault)) => return Err(Failure::Passing(fault)),
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = wait.as_secs_f64();
                    return Err(Failure::Passing(format!("no answer within {seconds} s ({i} answers came before)")));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Failure::Passing(format!("it ended after {i} of {} answers", answers.responses.len())));
                }
            };
            let value: Option<Value> = serde_json::from_str(&line).ok();
            if let Some(id) = value.as_ref().and_then(|v| v.get("id"))
                && id.as_u64() != Some(first + i)
            {
                return Err(Failure::Passing(format!("it answered {id} where {} was to be answered", first + i)));
            }
            scores.push(value.as_ref().and_then(|v| score_of(v.get("score").unwrap_or(v))));
        }
        Ok(scores)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.to = None; // its stdin ends, which a program takes as the end
        let started = Instant::now();
        while started.elapsed() < FAREWELL {
            match self.child.try_wait() {
                Ok(None) => thread::sleep(Duration::from_millis(5)),
                _ => return,
            }
        }
        // It may have ended meanwhile; either way it is gone after this.
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

fn read_lines(stdout: ChildStdout, answers: &Sender<Result<String, String>>) {
    let mut stdout = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        let found = match stdout.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(n) if n as u64 == LONGEST_LINE => Err("it wrote a line of more than a MiB".into()),
            Ok(_) => Ok(String::from_utf8_lossy(&line).into_owned()),
            Err(error) => Err(format!("reading from it: {error}")),
        };
        let broken = found.is_err();
        if answers.send(found).is_err() || broken {
            return;
        }
    }
}
