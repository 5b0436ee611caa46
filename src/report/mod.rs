//! What a run logs: metrics.jsonl and samples.jsonl in its folder, progress and a line of metrics on stderr. Stdout stays
//! free for `--json`. It does not depend on any stage. Read lines.rs for the files.

mod lines;

use std::io::IsTerminal;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use lines::Lines;

/// Metrics of one step, in insertion order.
pub type Metrics = Map<String, Value>;
/// Former name of [`Metrics`].
pub type Figures = Metrics;

const METRICS: &str = "metrics.jsonl";
const SAMPLES: &str = "samples.jsonl";

/// Lengths of a run's files at some moment, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Positions {
    /// Bytes of metrics.jsonl.
    pub metrics: u64,
    /// Bytes of samples.jsonl.
    pub samples: u64,
}

/// Where a stage's metrics go.
pub struct Report {
    metrics: Option<Lines>,
    samples: Option<Lines>,
    bar: ProgressBar,
    stage: &'static str,
    last_line: Option<Instant>,
}

/// Without a terminal, a line of metrics at most this often, and one for the last step.
const LINE_EVERY: Duration = Duration::from_secs(2);

impl Report {
    /// Into `dir`/metrics.jsonl and `dir`/samples.jsonl, both begun anew.
    ///
    /// # Errors
    /// If the files cannot be made.
    pub fn to_dir(dir: &Path) -> Result<Self> {
        let open = |name: &'static str| Lines::begin(&dir.join(name), name);
        Ok(Self { metrics: Some(open(METRICS)?), samples: Some(open(SAMPLES)?), ..Self::silent() })
    }

    /// Into the same files after their first bytes, as many as `positions` says; what came after is cut off.
    ///
    /// # Errors
    /// If the files cannot be opened and cut.
    pub fn go_on(dir: &Path, positions: Positions) -> Result<Self> {
        let open = |name: &'static str, at| Lines::go_on(&dir.join(name), name, at);
        let (metrics, samples) = (open(METRICS, positions.metrics)?, open(SAMPLES, positions.samples)?);
        Ok(Self { metrics: Some(metrics), samples: Some(samples), ..Self::silent() })
    }

    /// How far the files go, after everything in them has reached the disk.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn positions(&self) -> Result<Positions> {
        let of = |lines: &Option<Lines>| lines.as_ref().map_or(Ok(0), Lines::synced);
        Ok(Positions { metrics: of(&self.metrics)?, samples: of(&self.samples)? })
    }

    /// Writes nothing: for tests, and for users of the library who read the return values.
    pub fn silent() -> Self {
        Self { metrics: None, samples: None, bar: ProgressBar::hidden(), stage: "", last_line: None }
    }

    /// Starts a stage of `steps` steps.
    pub fn stage(&mut self, stage: &'static str, steps: usize) {
        self.bar.finish_and_clear();
        self.stage = stage;
        self.last_line = None;
        if self.metrics.is_none() {
            return;
        }
        self.bar = ProgressBar::new(steps as u64);
        if let Ok(style) = ProgressStyle::with_template("{prefix:>7} {bar:28} {pos}/{len} {elapsed} eta {eta}  {msg}") {
            self.bar.set_style(style);
        }
        self.bar.set_prefix(stage);
        self.bar.enable_steady_tick(Duration::from_millis(500));
    }

    /// Logs one step's metrics: a line of metrics.jsonl with `stage` and `step` in front, and the chosen ones beside the bar.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn step(&mut self, step: usize, figures: &Figures, shown: &[&str]) -> Result<()> {
        if let Some(file) = &mut self.metrics {
            let mut line = json!({ "stage": self.stage, "step": step });
            if let Some(line) = line.as_object_mut() {
                line.extend(figures.iter().map(|(k, v)| (k.clone(), v.clone())));
            }
            file.push(&line)?;
            let text =
                shown.iter().filter_map(|&k| Some(format!("{k} {}", short(figures.get(k)?)))).collect::<Vec<_>>();
            let text = text.join("  ");
            self.bar.set_position(step as u64);
            self.bar.set_message(text.clone());
            let due =
                self.last_line.is_none_or(|t| t.elapsed() >= LINE_EVERY) || self.bar.length() == Some(step as u64);
            if !std::io::stderr().is_terminal() && due {
                self.last_line = Some(Instant::now());
                eprintln!("{:>7} {step}/{}  {text}", self.stage, self.bar.length().unwrap_or(0));
            }
        }
        Ok(())
    }

    /// Logs one sampled text with its metrics, as a line of samples.jsonl.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn sample(&mut self, sample: &Value) -> Result<()> {
        if let Some(file) = &mut self.samples {
            file.push(sample)?;
        }
        Ok(())
    }

    /// A line for people.
    pub fn note(&self, text: &str) {
        if self.metrics.is_some() {
            self.bar.suspend(|| eprintln!("{text}"));
        }
    }

    /// Ends the stage's bar.
    pub fn done(&mut self) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::hidden();
    }
}

/// Four significant digits of a number, anything else as JSON writes it.
fn short(value: &Value) -> String {
    match value.as_f64() {
        Some(x) if value.is_f64() && (x == 0.0 || (1e-3..1e5).contains(&x.abs())) => format!("{x:.3}"),
        Some(x) if value.is_f64() => format!("{x:.2e}"),
        _ => value.to_string(),
    }
}

/// A float as JSON: the number, or null where JSON has none (NaN, infinity).
pub fn number(x: f64) -> Value {
    serde_json::Number::from_f64(x).map_or(Value::Null, Value::Number)
}
