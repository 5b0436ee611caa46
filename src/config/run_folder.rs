//! The mark by which the folder of a run is known: the first line of the settings that are written there. It does not depend on a
//! stage. Read `run/output.rs` for what else such a folder holds.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// The file with the settings of a run.
pub const RESOLVED: &str = "config.toml";

/// Files that every command writes beside its settings; the first is that of a finished run.
pub const RUN_FILES: [&str; 5] = ["summary.json", "metrics.jsonl", "samples.jsonl", "about.json", "report.html"];

const MARK: &str = "# fourfold ";
const MEANING: &str = ": the settings of this run, every default written out";

/// The first line of the settings of a run of the command `by`.
pub fn mark(by: &str) -> String {
    format!("{MARK}{by}{MEANING}")
}

/// Whether a folder is that of a run of any command.
pub fn is_run(dir: &Path) -> bool {
    let mut first = String::new();
    let read = File::open(dir.join(RESOLVED)).and_then(|file| BufReader::new(file).read_line(&mut first));
    read.is_ok() && first.starts_with(MARK) && first.trim_end().ends_with(MEANING)
}
