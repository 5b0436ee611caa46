//! What a run's folder holds, read for its page: metrics.jsonl as columns by stage, samples, settings, summary, about.json.
//!
//! Files are read line by line. What is cut off, empty or of a newer version is reported in one line each, and the rest is
//! shown. It does not depend on a stage.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use super::about::{About, FORMAT, State};
use super::samples::Samples;
use super::thin::Point;
use crate::invalid;
use crate::report::{Metrics, clocks};
use crate::stats::Histogram;
use crate::train::lock;

/// A run's files.
pub(super) struct RunFiles {
    /// The folder.
    pub path: PathBuf,
    /// The last part of the folder's name.
    pub name: String,
    pub about: Option<About>,
    /// The stages in the order of their first lines.
    pub stages: Vec<Stage>,
    pub samples: Samples,
    /// The command that made the folder, and its resolved settings.
    pub settings: Option<(String, toml::Table)>,
    pub summary: Option<Value>,
    /// Whether the process that trains lives.
    pub alive: bool,
    /// What was wrong with the files, a line each.
    pub problems: Vec<String>,
}

/// The lines of one stage.
#[derive(Default)]
pub(super) struct Stage {
    pub name: String,
    /// Each column's points, in the order of the columns' first lines.
    pub columns: Vec<(String, Vec<Point>)>,
    index: HashMap<String, usize>,
    /// Distributions: by the column whose mean they have, (step, distribution).
    pub histograms: BTreeMap<String, Vec<(f64, Histogram)>>,
    /// Steps in which each warning applied.
    pub warnings: BTreeMap<String, Vec<f64>>,
    /// Steps that the guard skipped or rolled back, with the reason.
    pub guarded: Vec<(f64, String)>,
    /// The last step.
    pub step: f64,
    /// When its line was written, seconds since 1970 (UTC).
    pub time: Option<f64>,
}

impl Stage {
    /// A column's points.
    pub fn column(&self, key: &str) -> Option<&[Point]> {
        self.index.get(key).map(|&i| &self.columns[i].1[..])
    }

    /// Wall time per step over the last lines, seconds.
    pub fn seconds_per_step(&self) -> Option<f64> {
        let column = self.column(clocks::SECONDS)?;
        let last = &column[column.len().saturating_sub(50)..];
        let before = column.len().checked_sub(last.len() + 1).map_or(0.0, |i| column[i].0);
        let steps = last.last()?.0 - before;
        (steps > 0.0).then(|| last.iter().filter_map(|p| p.1).sum::<f64>() / steps)
    }

    fn add(&mut self, step: f64, line: &Metrics) {
        self.step = step;
        for (key, value) in line {
            match (key.as_str(), value) {
                ("stage" | "step" | "episode" | "skipped", _) => {}
                (clocks::TIME, time) => self.time = time.as_f64().or(self.time),
                ("warnings", Value::Array(names)) => {
                    let names = names.iter().filter_map(Value::as_str);
                    names.for_each(|name| self.warnings.entry(name.into()).or_default().push(step));
                }
                ("reason", Value::String(reason)) => self.guarded.push((step, reason.clone())),
                (key, Value::Object(_)) => {
                    if let (Some(of), Some(found)) = (key.strip_prefix("histogram/"), Histogram::from_json(value)) {
                        self.histograms.entry(of.into()).or_default().push((step, found));
                    }
                }
                (key, Value::Number(_) | Value::Null) => {
                    let at = match self.index.get(key) {
                        Some(&at) => at,
                        None => {
                            self.index.insert(key.into(), self.columns.len());
                            self.columns.push((key.into(), vec![]));
                            self.columns.len() - 1
                        }
                    };
                    self.columns[at].1.push((step, value.as_f64()));
                }
                _ => {}
            }
        }
    }
}

impl RunFiles {
    /// Reads a run's folder.
    ///
    /// # Errors
    /// If there is no run in it.
    pub fn read(path: &Path) -> Result<Self> {
        let metrics = path.join("metrics.jsonl");
        let about = About::read(path);
        let settings = std::fs::read_to_string(path.join("config.toml")).ok();
        if !metrics.is_file() && !matches!(about, Ok(Some(_))) {
            return Err(match path.is_dir() {
                true => invalid!(
                    "{} holds no run: it has neither metrics.jsonl nor about.json; name the folder that a stage wrote to \
                     (--out, or output_dir of its config)",
                    path.display()
                ),
                false => invalid!("{}: there is no such folder; name the folder of a run", path.display()),
            });
        }
        let whole = path.canonicalize().unwrap_or_else(|_| path.into());
        let name = whole.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into());
        let mut problems = vec![];
        let about = about.unwrap_or_else(|error| {
            problems.push(format!("{error:#}; the page does not know how the run was started and how it ended"));
            None
        });
        if let Some(about) = about.as_ref().filter(|about| about.format > FORMAT) {
            problems.push(format!(
                "{} was written by {}, a newer version (form {} of a run's files, and this program knows form {FORMAT}): \
                 the page shows what it knows of it",
                path.display(),
                about.program,
                about.format
            ));
        }
        let settings = settings.and_then(|text| {
            let by = text.lines().next().and_then(|l| l.strip_prefix("# fourfold ")).and_then(|l| l.split(':').next());
            match text.parse::<toml::Table>() {
                Ok(table) => Some((by.unwrap_or_default().to_owned(), table)),
                Err(error) => {
                    problems.push(format!("{}: {}", path.join("config.toml").display(), error.message()));
                    None
                }
            }
        });
        let summary = std::fs::read(path.join("summary.json")).ok().and_then(|b| serde_json::from_slice(&b).ok());
        let alive = match (&about, path.join(lock::NAME).exists()) {
            (Some(about), _) if about.process == std::process::id() => true,
            (_, true) => lock::is_held(path),
            (Some(about), false) => Path::new("/proc").join(about.process.to_string()).exists(),
            (None, false) => false,
        };
        let mut run = Self {
            path: path.into(),
            name,
            about,
            stages: vec![],
            samples: Samples::default(),
            settings,
            summary,
            alive,
            problems,
        };
        run.read_metrics(&metrics)?;
        let mut samples = std::mem::take(&mut run.samples);
        run.lines(&path.join("samples.jsonl"), |line| {
            samples.add(line);
        })?;
        run.samples = samples;
        Ok(run)
    }

    fn read_metrics(&mut self, path: &Path) -> Result<()> {
        let (mut stages, mut count, mut foreign): (Vec<Stage>, usize, usize) = (vec![], 0, 0);
        self.lines(path, |line| {
            count += 1;
            let place = line.get("stage").and_then(Value::as_str).zip(line.get("step").and_then(Value::as_f64));
            let Some((name, step)) = place else {
                foreign += 1;
                return;
            };
            if stages.iter().all(|stage| stage.name != name) {
                stages.push(Stage { name: name.into(), ..Stage::default() });
            }
            stages.iter_mut().filter(|stage| stage.name == name).for_each(|stage| stage.add(step, line));
        })?;
        if foreign > 0 {
            self.problems.push(format!(
                "{}: {foreign} of {count} lines have no stage and step, as a newer version or another program may write \
                 them; they are left out",
                path.display()
            ));
        }
        let is_running = self.about.as_ref().is_some_and(|about| about.state == State::Running);
        if count == 0 && !(is_running && self.alive) {
            self.problems.push(format!("{} has no line: no step of the run was logged", path.display()));
        }
        self.stages = stages;
        Ok(())
    }

    /// Calls `add` with every line of a file of JSON lines. A file that is absent has no line.
    fn lines(&mut self, path: &Path, mut add: impl FnMut(&Metrics)) -> Result<()> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(invalid!("{}: {e}", path.display())),
        };
        let (mut reader, mut bytes, mut number, mut broken) = (BufReader::new(file), vec![], 0usize, vec![]);
        loop {
            bytes.clear();
            let read = reader.read_until(b'\n', &mut bytes).with_context(|| format!("reading {}", path.display()))?;
            if read == 0 {
                break;
            }
            number += 1;
            match serde_json::from_slice::<Metrics>(&bytes) {
                Ok(line) => add(&line),
                Err(_) if bytes.iter().all(u8::is_ascii_whitespace) => {}
                Err(_) => broken.push(number),
            }
        }
        let cut = broken.pop_if(|last| *last == number && !bytes_end_with_break(path));
        if cut.is_some() {
            // The process that trains may be writing it.
            let is_running = self.about.as_ref().is_some_and(|about| about.state == State::Running);
            if !(is_running && self.alive) {
                self.problems.push(format!(
                    "{}: the last line is cut off, as a crash or a full disk leaves it; it is left out",
                    path.display()
                ));
            }
        }
        if let Some(first) = broken.first() {
            self.problems.push(format!(
                "{}: {} lines are no JSON objects, line {first} is the first; they are left out",
                path.display(),
                broken.len()
            ));
        }
        Ok(())
    }
}

fn bytes_end_with_break(path: &Path) -> bool {
    use std::io::{Read, Seek, SeekFrom};
    let mut last = [0u8];
    let read = File::open(path).and_then(|mut file| {
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)
    });
    read.is_ok() && last == *b"\n"
}
