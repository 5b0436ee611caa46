//! What a run's folder holds, read for its page and for `watch`: metrics.jsonl as columns by stage, samples, settings,
//! summary, about.json.
//!
//! Files are read line by line, and again only from where they were read to. What is cut off, empty or of a newer version is
//! reported in one line each, and the rest is shown. It does not depend on a stage. Read `tail.rs` for a file that grows.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::Value;

use super::about::{About, FORMAT, State};
use super::samples::Samples;
use super::tail::Tail;
use super::thin::Point;
use crate::error::counted;
use crate::invalid;
use crate::report::{Metrics, clocks};
use crate::stats::Histogram;
use crate::train::lock;
use crate::train::store::Store;

const METRICS: &str = "metrics.jsonl";

/// A run's files.
pub(crate) struct RunFiles {
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
    /// Whether there is a checkpoint to resume from.
    pub has_checkpoint: bool,
    /// What was wrong with the files, a line each.
    pub problems: Vec<String>,
    metrics: Tail,
    samples_file: Tail,
    /// Lines of metrics.jsonl, and those without stage and step.
    count: usize,
    foreign: usize,
}

/// The lines of one stage.
#[derive(Default)]
pub(crate) struct Stage {
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
        let mut run = Self::unread(path);
        if !path.join(METRICS).is_file() && !matches!(About::read(path), Ok(Some(_))) {
            return Err(no_run(path));
        }
        run.refresh()?;
        Ok(run)
    }

    /// The same, also for a run that has its folder and has written nothing else yet.
    ///
    /// # Errors
    /// If there is no run in it.
    pub fn read_early(path: &Path) -> Result<Self> {
        let is_begun = lock::is_held(path) || settings_of(path).is_some_and(|(by, _)| !by.is_empty());
        if !is_begun {
            return Self::read(path);
        }
        let mut run = Self::unread(path);
        run.refresh()?;
        Ok(run)
    }

    fn unread(path: &Path) -> Self {
        let whole = path.canonicalize().unwrap_or_else(|_| path.into());
        let name = whole.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into());
        Self {
            path: path.into(),
            name,
            about: None,
            stages: vec![],
            samples: Samples::default(),
            settings: None,
            summary: None,
            alive: false,
            has_checkpoint: false,
            problems: vec![],
            metrics: Tail::of(path.join(METRICS)),
            samples_file: Tail::of(path.join("samples.jsonl")),
            count: 0,
            foreign: 0,
        }
    }

    /// Reads what was written since. What was read of a run that was resumed from an earlier step, or that another one
    /// replaced, is forgotten.
    ///
    /// # Errors
    /// If a file is there and cannot be read.
    pub fn refresh(&mut self) -> Result<()> {
        if !self.metrics.is_continued() || !self.samples_file.is_continued() {
            *self = Self::unread(&self.path);
        }
        self.problems.clear();
        self.about = About::read(&self.path).unwrap_or_else(|error| {
            self.problems.push(format!("{error:#}; the page does not know how the run was started and how it ended"));
            None
        });
        if let Some(about) = self.about.as_ref().filter(|about| about.format > FORMAT) {
            self.problems.push(format!(
                "{} was written by {}, a newer version (form {} of a run's files, and this program knows form {FORMAT}): \
                 the page shows what it knows of it",
                self.path.display(),
                about.program,
                about.format
            ));
        }
        self.settings = settings_of(&self.path).and_then(|(by, text)| match text.parse::<toml::Table>() {
            Ok(table) => Some((by, table)),
            Err(error) => {
                self.problems.push(format!("{}: {}", self.path.join("config.toml").display(), error.message()));
                None
            }
        });
        let summary = std::fs::read(self.path.join("summary.json")).ok();
        self.summary = summary.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        self.alive = match (&self.about, self.path.join(lock::NAME).exists()) {
            (Some(about), _) if about.process == std::process::id() => true,
            (_, true) => lock::is_held(&self.path),
            (Some(about), false) => Path::new("/proc").join(about.process.to_string()).exists(),
            (None, false) => false,
        };
        self.has_checkpoint = !Store::at(self.path.join("checkpoints")).is_empty();
        self.read_metrics()?;
        let samples = &mut self.samples;
        self.samples_file.read(|line| samples.add(line))?;
        self.report_lines();
        Ok(())
    }

    /// The command that goes on with a run which has not finished, where one is known: from its newest checkpoint, or from its
    /// start where a process died before its first.
    pub fn resuming(&self) -> Option<String> {
        let about = self.about.as_ref().filter(|about| about.resume.ends_with(" --resume"))?;
        let died = matches!(about.state, State::Running | State::Failed) && !self.alive;
        let from = if died && !self.has_checkpoint { " --from-start" } else { "" };
        Some(format!("{}{from}", about.resume))
    }

    /// Differs from that of an earlier moment if anything was written since.
    pub fn stamp(&self) -> impl PartialEq + use<> {
        let written = |name: &str| std::fs::metadata(self.path.join(name)).and_then(|about| about.modified()).ok();
        let files = ["about.json", "config.toml", "summary.json"].map(written);
        (self.metrics.bytes(), self.samples_file.bytes(), files, self.alive, self.problems.clone())
    }

    /// Model files that the run trains over: the reward model's of a reward run.
    pub fn base(&self) -> Option<&str> {
        let (by, settings) = self.settings.as_ref()?;
        let base = |section: &str| settings.get(section)?.get("path")?.as_str();
        let section = if by == "reward" { "reward_base" } else { "base" };
        base(section).or_else(|| base("base"))
    }

    fn read_metrics(&mut self) -> Result<()> {
        let Self { metrics, stages, count, foreign, .. } = self;
        metrics.read(|line| {
            *count += 1;
            let place = line.get("stage").and_then(Value::as_str).zip(line.get("step").and_then(Value::as_f64));
            let Some((name, step)) = place else {
                *foreign += 1;
                return;
            };
            if stages.iter().all(|stage| stage.name != name) {
                stages.push(Stage { name: name.into(), ..Stage::default() });
            }
            stages.iter_mut().filter(|stage| stage.name == name).for_each(|stage| stage.add(step, line));
        })?;
        Ok(())
    }

    /// What was wrong with the lines of both files.
    fn report_lines(&mut self) {
        let path = self.metrics.path().display().to_string();
        let is_running = self.about.as_ref().is_some_and(|about| about.state == State::Running) && self.alive;
        let (count, foreign) = (self.count, self.foreign);
        let mut problems = vec![];
        for file in [&self.metrics, &self.samples_file] {
            // The process that trains may be writing it.
            if file.is_cut() && !is_running {
                problems.push(format!(
                    "{}: the last line is cut off, as a crash or a full disk leaves it; it is left out",
                    file.path().display()
                ));
            }
            if let (broken @ 1.., first) = file.broken() {
                let path = file.path().display();
                problems.push(match broken {
                    1 => format!("{path}: line {first} is no JSON object; it is left out"),
                    _ => format!(
                        "{path}: {broken} lines are no JSON objects, line {first} is the first; they are left out"
                    ),
                });
            }
        }
        if foreign > 0 {
            problems.push(format!(
                "{path}: {foreign} of {} {} no stage and step, as a newer version or another program may write {}",
                counted(count, "line"),
                if foreign == 1 { "has" } else { "have" },
                if foreign == 1 { "it; it is left out" } else { "them; they are left out" }
            ));
        }
        if count == 0 && !is_running && !(self.about.is_none() && self.alive) {
            problems.push(format!("{path} has no line: no step of the run was logged"));
        }
        self.problems.extend(problems);
    }
}

/// The command that made a folder, empty if config.toml does not say, and its resolved settings as text.
fn settings_of(run: &Path) -> Option<(String, String)> {
    let text = std::fs::read_to_string(run.join("config.toml")).ok()?;
    let by = text.lines().next().and_then(|l| l.strip_prefix("# fourfold ")).and_then(|l| l.split(':').next());
    Some((by.unwrap_or_default().to_owned(), text))
}

fn no_run(path: &Path) -> anyhow::Error {
    let shown = path.display();
    let is_run = |folder: &Path| folder.join(METRICS).is_file() || matches!(About::read(folder), Ok(Some(_)));
    let above = || path.ancestors().skip(1).take(3).find(|folder| is_run(folder));
    if let Some(run) = above().filter(|_| path.exists()) {
        let run = if run.as_os_str().is_empty() { Path::new(".") } else { run };
        return invalid!("{shown} is a part of a run; name its folder, {}", run.display());
    }
    if path.is_file() {
        return invalid!("{shown} is a file; name the folder of a run");
    }
    if !path.is_dir() {
        return invalid!("{shown}: there is no such folder; name the folder of a run");
    }
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut runs: Vec<String> =
        entries.filter(|folder| is_run(folder)).map(|folder| folder.display().to_string()).collect();
    runs.sort();
    match runs.as_slice() {
        [] => invalid!(
            "{shown} holds no run: it has neither metrics.jsonl nor about.json; name the folder that a stage wrote to (--out, or \
             output_dir of its config)"
        ),
        [run] => invalid!("{shown} is the folder around a run; did you mean {run}?"),
        [.., last] => invalid!("{shown} holds {} runs; name one of them, such as {last}", runs.len()),
    }
}
