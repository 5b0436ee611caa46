//! A run that another process trains, in the terminal: its state, its curves, its pace and its newest samples, from the files
//! in its folder alone.
//!
//! The same facts are a full screen that follows the run, a text, or a JSON object. Nothing is written into the run's folder.
//! It does not depend on data, on a model or on a tokenizer. Read `facts.rs` for what is shown, `screen.rs` for where,
//! `terminal.rs` for the keys, and `page/run_files.rs` for what is read.

mod chart;
mod facts;
mod panels;
mod screen;
mod terminal;
#[cfg(test)]
mod tests;
mod text;
mod visible;

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

use crate::page::run_files::RunFiles;
use crate::page::status::Standing;
use facts::Facts;

pub use terminal::{follow, is_possible};
pub(crate) use visible::in_a_line;

/// Time between two looks at the run's files.
const EVERY: Duration = Duration::from_millis(500);

/// A run whose files are read again and again.
struct Watched {
    run: RunFiles,
    /// Whether the process lived when the files were last read.
    was_alive: bool,
}

impl Watched {
    fn open(path: &Path) -> Result<Self> {
        let run = RunFiles::read_early(path)?;
        Ok(Self { was_alive: run.alive, run })
    }

    /// Reads what is new. A run gives its lock back a moment before it writes how it ended, so that it counts as alive until
    /// the second look after that.
    fn refresh(&mut self) -> Result<()> {
        self.run.refresh()?;
        let alive = self.run.alive;
        self.run.alive |= self.was_alive;
        self.was_alive = alive;
        Ok(())
    }
}

/// The facts of a run now.
fn once(path: &Path) -> Result<Facts> {
    let mut watched = Watched::open(path)?;
    if Standing::of(&watched.run) == Standing::Killed {
        // It may be about to write how it ended.
        std::thread::sleep(EVERY);
        watched.refresh()?;
    }
    Ok(Facts::of(&watched.run))
}

/// A summary of the run in `path` as text.
///
/// # Errors
/// If there is no run in it, or its files cannot be read.
pub fn text(path: &Path) -> Result<String> {
    Ok(text::render(&once(path)?))
}

/// The same facts as a JSON object.
///
/// # Errors
/// Those of [`text`].
pub fn json(path: &Path) -> Result<Value> {
    Ok(once(path)?.to_json())
}
