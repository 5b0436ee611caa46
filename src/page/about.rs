//! What a run says of itself beside its metrics: about.json, with how it was started, on what, how far it shall go and how it
//! ended. It does not depend on a stage.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::write_atomically;

/// The file's name in a run's folder.
pub(super) const NAME: &str = "about.json";
/// The form of the files that this program writes and reads.
pub(super) const FORMAT: u32 = 1;

/// How a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The process trains; if it is gone, it was killed.
    #[default]
    Running,
    /// The run is over.
    Finished,
    /// A signal stopped the run.
    Stopped,
    /// The run ended with an error.
    Failed,
}

/// The description of a run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct About {
    /// Form of the run's files, counted up where a reader of the former form would misread them.
    pub format: u32,
    /// Name and version of the program.
    pub program: String,
    /// The command that resumes the run.
    pub resume: String,
    /// When the run began, seconds since 1970 (UTC); a resumed run keeps it.
    pub started: u64,
    /// How the run stands.
    pub state: State,
    /// Why it stopped or failed.
    pub reason: String,
    /// When the state was written, seconds since 1970 (UTC).
    pub updated: u64,
    /// Process id of the run.
    pub process: u32,
    /// Each stage with its number of steps, in the order in which they began.
    pub stages: Vec<(String, usize)>,
    /// The machine, in words.
    pub machine: BTreeMap<String, String>,
    /// Digests of what was read.
    pub fingerprints: BTreeMap<String, String>,
    /// Peak memory of each phase, MiB: planned, and measured by the allocator.
    pub memory: BTreeMap<String, PhaseMemory>,
    /// What stages found that no step's metrics hold.
    pub facts: Map<String, Value>,
}

/// Peak memory of a phase in MiB.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PhaseMemory {
    /// By the planner.
    pub planned: Option<f64>,
    /// By the allocator.
    pub measured: Option<f64>,
}

impl About {
    /// The description of a run that begins now on this machine.
    pub fn new(resume: &str, device: &str) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let machine = [
            ("system", format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH)),
            ("cores", threads.to_string()),
            ("device", device.to_owned()),
        ];
        Self {
            format: FORMAT,
            program: concat!("fourfold ", env!("CARGO_PKG_VERSION")).into(),
            resume: resume.into(),
            process: std::process::id(),
            machine: machine.map(|(name, text)| (name.to_owned(), text)).into(),
            ..Self::default()
        }
    }

    pub(super) fn read(run: &Path) -> Result<Option<Self>> {
        let path = run.join(NAME);
        match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map(Some).with_context(|| format!("reading {}", path.display()))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
        }
    }

    pub(super) fn write(&self, run: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).context("writing about.json")?;
        write_atomically(&run.join(NAME), &format!("{text}\n"))
    }
}
