//! Progress on stderr of work that takes longer than two seconds: one line that is written over in a terminal, and a line
//! now and then elsewhere. It does not depend on a stage.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use crate::report::quiet;

/// Without a terminal, a line at most this often.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// In a terminal.
const EVERY: Duration = Duration::from_millis(200);
/// Work that takes less has no progress.
const PATIENCE: Duration = Duration::from_secs(2);

/// The progress of one piece of work.
pub(crate) struct Progress {
    what: String,
    amount: fn(usize) -> String,
    began: Instant,
    shown: Option<Instant>,
}

impl Progress {
    /// `amount` is how much of the work is written: bytes, records.
    pub(crate) fn new(what: String, amount: fn(usize) -> String) -> Self {
        Self { what, amount, began: Instant::now(), shown: None }
    }

    /// `done` of `all` is done.
    pub(crate) fn show(&mut self, done: usize, all: usize) {
        let (now, terminal) = (Instant::now(), std::io::stderr().is_terminal());
        let every = if terminal { EVERY } else { LINE_EVERY };
        if quiet::is_set() || now - self.began < PATIENCE || self.shown.is_some_and(|at| now - at < every) {
            return;
        }
        self.shown = Some(now);
        let share = done as f64 / all.max(1) as f64;
        let left = (now - self.began).as_secs_f64() * (1.0 / share.max(1e-9) - 1.0);
        let (done, all, percent) = ((self.amount)(done), (self.amount)(all), 100.0 * share);
        let left = if share > 0.0 { format!(", about {left:.0} s left") } else { String::new() };
        let line = format!("{}: {done} of {all}, {percent:.0}%{left}", self.what);
        match terminal {
            true => eprint!("\r{line:<78}"),
            false => eprintln!("{line}"),
        }
    }

    /// All of it is done.
    pub(crate) fn finish(self, all: usize) {
        if self.shown.is_some() {
            let start = if std::io::stderr().is_terminal() { "\r" } else { "" };
            let seconds = self.began.elapsed().as_secs_f64();
            let line = format!("{}: {} in {seconds:.1} s", self.what, (self.amount)(all));
            eprintln!("{start}{line:<78}");
        }
    }
}
