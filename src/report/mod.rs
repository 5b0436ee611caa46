//! What a run logs: metrics.jsonl, samples.jsonl and TensorBoard's event file in its folder, progress and a line of metrics on
//! stderr. Stdout stays free for `--json`. It does not depend on any stage. Read lines.rs for the files, clocks.rs for the
//! columns of time, events/mod.rs for TensorBoard's.

pub mod clocks;
mod events;
mod lines;
pub mod progress;
pub mod quiet;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use clocks::Clocks;
use events::Events;
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
    /// Bytes of TensorBoard's event file; 0 in checkpoints of before it was written.
    #[serde(default)]
    pub events: u64,
}

/// What follows a run beside its files, as a page does. Its failures are reported once and end no run.
pub trait Follower: Send {
    /// A stage of so many steps begins.
    ///
    /// # Errors
    /// If what the follower writes cannot be written.
    fn stage(&mut self, stage: &str, steps: usize) -> Result<()>;

    /// A line of metrics was written.
    ///
    /// # Errors
    /// As for [`Follower::stage`].
    fn step(&mut self, metrics: &Metrics) -> Result<()>;

    /// Something was found that belongs to no step.
    ///
    /// # Errors
    /// As for [`Follower::stage`].
    fn fact(&mut self, name: &str, fact: &Value) -> Result<()>;
}

/// Removes TensorBoard's files of the run in `dir`.
///
/// # Errors
/// If one cannot be removed.
pub fn remove_events(dir: &Path) -> Result<()> {
    Events::remove(dir)
}

/// TensorBoard's files of the run in `dir`, named relative to it.
pub fn events_of(dir: &Path) -> Vec<PathBuf> {
    events::files(dir).iter().filter_map(|path| Some(path.strip_prefix(dir).ok()?.to_path_buf())).collect()
}

/// Where a stage's metrics go.
pub struct Report {
    metrics: Option<Lines>,
    samples: Option<Lines>,
    /// `None` once it could not be written: TensorBoard's view is no reason to end a run.
    events: Option<Events>,
    /// Where a run that is resumed without them left them, so that a later resume with them goes on there.
    events_left_at: u64,
    bar: ProgressBar,
    stage: &'static str,
    /// Steps of the stage.
    steps: usize,
    last_line: Option<Instant>,
    clocks: Clocks,
    follower: Option<Box<dyn Follower>>,
    has_complained: bool,
    has_warnings: bool,
}

/// Without a terminal, a line of metrics at most this often, and one for the last step.
const LINE_EVERY: Duration = Duration::from_secs(2);
/// The bar; the metrics behind it are cut at the terminal's width.
const BAR: &str = "{prefix:>7} {bar:12} {pos}/{len} {elapsed} eta {eta}  {wide_msg}";
/// Columns that the bar leaves to the metrics in a terminal of 80, beside 99,999 steps and two times of hours.
const BESIDE_BAR: usize = 30;

impl Report {
    /// Into `dir`/metrics.jsonl, `dir`/samples.jsonl and `dir`/tb/, all begun anew. The events begin with the settings in
    /// `dir`/config.toml, where there are some.
    ///
    /// # Errors
    /// If the files cannot be made.
    pub fn to_dir(dir: &Path) -> Result<Self> {
        Self::open(dir, None, true)
    }

    /// Into the same files after their first bytes, as many as `positions` says; what came after is cut off.
    ///
    /// # Errors
    /// If the files cannot be opened and cut.
    pub fn go_on(dir: &Path, positions: Positions) -> Result<Self> {
        Self::open(dir, Some(positions), true)
    }

    /// As [`Report::go_on`] where there are positions, else as [`Report::to_dir`]; without `has_events`, TensorBoard's file
    /// is not written, and a run that begins removes a former run's.
    ///
    /// # Errors
    /// As for these two.
    pub fn open(dir: &Path, from: Option<Positions>, has_events: bool) -> Result<Self> {
        let lines = |name: &'static str, at: fn(Positions) -> u64| match from {
            Some(positions) => Lines::go_on(&dir.join(name), name, at(positions)),
            None => Lines::begin(&dir.join(name), name),
        };
        let (metrics, samples) = (lines(METRICS, |at| at.metrics)?, lines(SAMPLES, |at| at.samples)?);
        let events = match (has_events, from) {
            (true, Some(positions)) => Some(Events::go_on(dir, positions.events)?),
            (true, None) => Some(Events::begin(dir)?),
            (false, None) => Events::remove(dir).map(|()| None)?,
            (false, Some(_)) => None,
        };
        let events_left_at = from.filter(|_| !has_events).map_or(0, |positions| positions.events);
        Ok(Self { metrics: Some(metrics), samples: Some(samples), events, events_left_at, ..Self::silent() })
    }

    /// How far the files go, after everything in them has reached the disk.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn positions(&self) -> Result<Positions> {
        let of = |lines: &Option<Lines>| lines.as_ref().map_or(Ok(0), Lines::synced);
        let events = self.events.as_ref().map_or(Ok(self.events_left_at), Events::synced)?;
        Ok(Positions { metrics: of(&self.metrics)?, samples: of(&self.samples)?, events })
    }

    /// Writes nothing: for tests, and for users of the library who read the return values.
    pub fn silent() -> Self {
        Self {
            metrics: None,
            samples: None,
            events: None,
            events_left_at: 0,
            bar: ProgressBar::hidden(),
            stage: "",
            steps: 0,
            last_line: None,
            clocks: Clocks::default(),
            follower: None,
            has_complained: false,
            has_warnings: true,
        }
    }

    /// Keeps warnings and notes off stderr: what is measured on random weights would set each of them off.
    #[must_use]
    pub fn without_warnings(self) -> Self {
        Self { has_warnings: false, ..self }
    }

    /// Has `follower` follow the run.
    #[must_use]
    pub fn followed_by(mut self, follower: impl Follower + 'static) -> Self {
        self.follower = Some(Box::new(follower));
        self
    }

    /// Calls the follower; the first of its errors is reported, and the run goes on.
    fn follow(&mut self, call: impl FnOnce(&mut dyn Follower) -> Result<()>) {
        let Some(follower) = &mut self.follower else { return };
        let Err(error) = call(&mut **follower) else { return };
        if !std::mem::replace(&mut self.has_complained, true) {
            self.warn(&format!("{error:#}; training goes on"));
        }
    }

    /// Writes events; an error is reported, and the run goes on without them.
    fn log_events(&mut self, write: impl FnOnce(&mut Events) -> Result<()>) {
        let Some(Err(error)) = self.events.as_mut().map(write) else { return };
        self.events = None;
        self.warn(&format!("{error:#}; training goes on without them"));
    }

    /// Logs what belongs to no step, for the run's page and TensorBoard.
    pub fn fact(&mut self, name: &str, fact: &Value) {
        let last = self.steps;
        self.log_events(|events| events.fact(name, fact, last));
        self.follow(|follower| follower.fact(name, fact));
    }

    /// Starts a stage of `steps` steps.
    pub fn stage(&mut self, stage: &'static str, steps: usize) {
        self.bar.finish_and_clear();
        (self.stage, self.steps) = (stage, steps);
        self.last_line = None;
        self.clocks = Clocks::default();
        if self.metrics.is_none() {
            return;
        }
        // A hidden bar still counts.
        self.bar = progress::bar(steps as u64, BAR);
        self.bar.set_prefix(stage);
        self.bar.enable_steady_tick(Duration::from_millis(500));
        self.follow(|follower| follower.stage(stage, steps));
    }

    /// Counts tokens that were trained on or sampled in `time` since the last line, for that line's `tokens_per_second`.
    pub fn passed(&mut self, tokens: usize, time: Duration) {
        self.clocks.passed(tokens, time);
    }

    /// Logs one step's metrics: a line of metrics.jsonl with `stage` and `step` in front and the columns of [`clocks`]
    /// behind, and the chosen ones beside the bar.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn step(&mut self, step: usize, figures: &Figures, shown: &[&str]) -> Result<()> {
        if let Some(file) = &mut self.metrics {
            let mut line = json!({ "stage": self.stage, "step": step });
            if let Some(line) = line.as_object_mut() {
                line.extend(figures.iter().map(|(k, v)| (k.clone(), v.clone())));
                line.extend(self.clocks.lap());
            }
            file.push(&line)?;
            let text =
                shown.iter().filter_map(|&k| Some(format!("{k} {}", short(figures.get(k)?)))).collect::<Vec<_>>();
            let text = text.join("  ");
            // The first step of a resumed run is far from 0, and the time left is computed from here on.
            let resumed = self.bar.position() == 0 && step > 1;
            self.bar.set_position(step as u64);
            if resumed {
                self.bar.reset_eta();
            }
            self.bar.set_message(beside_bar(figures, shown));
            let due =
                self.last_line.is_none_or(|t| t.elapsed() >= LINE_EVERY) || self.bar.length() == Some(step as u64);
            if !std::io::stderr().is_terminal() && due && !quiet::is_set() {
                self.last_line = Some(Instant::now());
                crate::tell!("{:>7} {step}/{}  {text}", self.stage, self.bar.length().unwrap_or(0));
            }
            let stage = self.stage;
            self.log_events(|events| events.step(stage, step, figures));
            self.follow(|follower| follower.step(figures));
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
        let last = self.steps;
        self.log_events(|events| events.sample(sample, last));
        Ok(())
    }

    /// A line for people, unless they asked for quiet.
    pub fn note(&self, text: &str) {
        if !quiet::is_set() {
            self.warn(text);
        }
    }

    /// A line for people who asked for quiet, too.
    pub fn warn(&self, text: &str) {
        if self.metrics.is_some() && self.has_warnings {
            self.bar.suspend(|| crate::tell!("{text}"));
        }
    }

    /// Ends the stage's bar.
    pub fn done(&mut self) {
        self.bar.finish_and_clear();
        self.bar = ProgressBar::hidden();
    }
}

/// The chosen metrics by the last part of their names, as many as a terminal of 80 columns has room for.
fn beside_bar(figures: &Figures, shown: &[&str]) -> String {
    let name = |key: &str| key.rsplit('/').next().unwrap_or(key).trim_end_matches("_avg").to_owned();
    let mut text = String::new();
    for part in shown.iter().filter_map(|&k| Some(format!("{} {}", name(k), short(figures.get(k)?)))) {
        if !text.is_empty() && text.len() + 2 + part.len() > BESIDE_BAR {
            break;
        }
        text += if text.is_empty() { "" } else { "  " };
        text += &part;
    }
    text
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

#[cfg(test)]
mod tests {
    use std::fmt::Debug;
    use std::io;
    use std::sync::{Arc, Mutex};

    use indicatif::{ProgressDrawTarget, TermLike};

    use super::*;

    /// A terminal of 80 columns that keeps what is written.
    #[derive(Clone, Debug, Default)]
    struct Terminal(Arc<Mutex<Vec<String>>>);

    impl TermLike for Terminal {
        fn width(&self) -> u16 {
            80
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, s: &str) -> io::Result<()> {
            self.write_str(s)
        }
        fn write_str(&self, s: &str) -> io::Result<()> {
            self.0.lock().unwrap().push(s.to_owned());
            Ok(())
        }
        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_bar_and_its_metrics_fit_80_columns() {
        let dir = tempfile::tempdir().unwrap();
        let terminal = Terminal::default();
        let mut report = Report::to_dir(dir.path()).unwrap();
        report.stage("reward", 99_999);
        report.bar.set_draw_target(ProgressDrawTarget::term_like(Box::new(terminal.clone())));
        let shown = ["objective/scores", "objective/kl", "policy/clipfrac_avg", "loss/value_avg"];
        let figures: Figures = shown.iter().map(|key| (key.to_string(), number(-12345.678))).collect();
        (99_000..99_010).for_each(|step| report.step(step, &figures, &shown).unwrap());
        report.bar.tick();
        let lines = terminal.0.lock().unwrap();
        let bars: Vec<&String> = lines.iter().filter(|line| line.contains("/99999")).collect();
        assert!(!bars.is_empty(), "{lines:?}");
        assert!(bars.iter().all(|line| line.trim_end().chars().count() <= 80), "{bars:?}");
        assert!(bars.last().unwrap().contains("scores -12345.678"), "{bars:?}");
        assert_eq!(beside_bar(&figures, &shown), "scores -12345.678");
    }

    #[test]
    fn events_that_a_resume_leaves_out_are_gone_on_from_by_one_with_them() {
        let dir = tempfile::tempdir().unwrap();
        let loss = Figures::from_iter([("loss".to_owned(), number(0.5))]);
        let step = |report: &mut Report, number: usize| {
            report.stage("sft", 9);
            report.step(number, &loss, &[]).unwrap();
            report.positions().unwrap()
        };
        let first = step(&mut Report::to_dir(dir.path()).unwrap(), 1);
        assert!(first.events > 0);
        let without = step(&mut Report::open(dir.path(), Some(first), false).unwrap(), 2);
        assert_eq!(without.events, first.events);
        let again = step(&mut Report::go_on(dir.path(), without).unwrap(), 3);
        // A step of the same metrics takes the same bytes.
        let file = std::fs::read_dir(dir.path().join("tb")).unwrap().next().unwrap().unwrap();
        assert_eq!(file.metadata().unwrap().len(), again.events);
        let other = tempfile::tempdir().unwrap();
        let mut whole = Report::to_dir(other.path()).unwrap();
        step(&mut whole, 1);
        assert_eq!(step(&mut whole, 3).events, again.events);
        assert_eq!(std::fs::read_to_string(dir.path().join(METRICS)).unwrap().lines().count(), 3);
    }

    #[test]
    fn lines_end_with_the_columns_of_time_which_are_all_that_differs_between_equal_runs() {
        let run = |pause: Duration| {
            let dir = tempfile::tempdir().unwrap();
            let mut report = Report::to_dir(dir.path()).unwrap();
            report.stage("sft", 2);
            for step in 1..3 {
                std::thread::sleep(pause);
                report.passed(10, Duration::from_millis(5));
                report.passed(20, Duration::from_millis(5));
                report.step(step, &Figures::from_iter([("loss".to_owned(), number(0.5))]), &[]).unwrap();
            }
            std::fs::read_to_string(dir.path().join(METRICS)).unwrap()
        };
        let (quick, slow) = (run(Duration::ZERO), run(Duration::from_millis(3)));
        let first: Value = serde_json::from_str(slow.lines().next().unwrap()).unwrap();
        assert_eq!(first["tokens_per_second"], 3000.0);
        assert!(first["seconds"].as_f64().unwrap() >= 0.003 && first["time"].as_f64().unwrap() > 1.7e9, "{first}");
        assert_eq!(clocks::without(&quick), clocks::without(&slow));
        assert_eq!(clocks::without(&slow).lines().next().unwrap(), r#"{"stage":"sft","step":1,"loss":0.5}"#);
    }
}
