//! TensorBoard's event file of a run, `tb/events.out.tfevents.*`: every metric as a scalar, the distributions as histograms,
//! samples as texts and the settings as hyperparameters. A resumed run goes on where its checkpoint was written, so it ends
//! with the events of a run never stopped, wall times aside; for that the clock columns are left out. It does not depend on
//! any stage. Read `record.rs` for the file's form, `proto.rs` for the messages.

mod proto;
mod record;

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use prost::Message;
use serde_json::Value;

use super::Metrics;
use super::clocks::{is_clock, now};
use proto::{Event, Summary, SummaryValue};

/// The folder's name within a run's.
const FOLDER: &str = "tb";
/// Samples of one step and kind that are written as texts.
const TEXTS: usize = 4;

/// The event file, open at its end.
pub(super) struct Events {
    file: File,
    bytes: u64,
    /// Kind and step of the last text, and how many of them there were.
    texts: (String, i64, usize),
}

impl Events {
    /// A new file for the run in `run`; those of a former run are removed. The settings are read from its config.toml.
    pub(super) fn begin(run: &Path) -> Result<Self> {
        Self::remove(run)?;
        let folder = run.join(FOLDER);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let path = folder.join(format!("events.out.tfevents.{:010}.fourfold", now() as u64));
        let file = File::create(&path).with_context(|| format!("making {}", path.display()))?;
        let mut events = Self { file, bytes: 0, texts: Default::default() };
        events.push(Event::version())?;
        let settings =
            fs::read_to_string(run.join("config.toml")).ok().and_then(|text| text.parse::<toml::Table>().ok());
        if let Some(settings) = settings {
            events.summary(0, vec![SummaryValue::hyperparameters(&settings, now())])?;
        }
        Ok(events)
    }

    /// Removes the files of a former run, and their folder if nothing else is in it.
    pub(super) fn remove(run: &Path) -> Result<()> {
        for path in files(run) {
            fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
        }
        let _ = fs::remove_dir(run.join(FOLDER)); // fails, rightly, where something is left in it
        Ok(())
    }

    /// The first `bytes` bytes of the file that is there, or its whole records where it is shorter. Without a file, as
    /// for a run of a version that wrote none, a new one.
    pub(super) fn go_on(run: &Path, bytes: u64) -> Result<Self> {
        let Some(path) = files(run).pop().filter(|_| bytes > 0) else { return Self::begin(run) };
        let opened = OpenOptions::new().read(true).write(true).open(&path);
        let mut file = opened.with_context(|| format!("opening {}", path.display()))?;
        let keep = record::whole(&mut file, bytes).with_context(|| format!("reading {}", path.display()))?;
        file.set_len(keep)
            .and_then(|()| file.seek(SeekFrom::End(0)))
            .with_context(|| format!("cutting {}", path.display()))?;
        Ok(Self { file, bytes: keep, texts: Default::default() })
    }

    /// The numbers and distributions of one step.
    pub(super) fn step(&mut self, stage: &str, step: usize, metrics: &Metrics) -> Result<()> {
        let mut values = vec![];
        for (key, value) in metrics.iter().filter(|(key, _)| !is_clock(key)) {
            match value {
                Value::Number(number) => {
                    let number = number.as_f64().unwrap_or(f64::NAN) as f32;
                    values.push(SummaryValue::scalar(format!("{stage}/{key}"), number));
                }
                // NaN or infinite: TensorBoard marks such a point.
                Value::Null => values.push(SummaryValue::scalar(format!("{stage}/{key}"), f32::NAN)),
                Value::Object(found) => {
                    let of = key.strip_prefix("histogram/").unwrap_or(key);
                    values.extend(SummaryValue::histogram(format!("{stage}/{of}"), found));
                }
                Value::Array(names) => values.push(SummaryValue::text(format!("{stage}/{key}"), &joined(names))),
                Value::String(text) => values.push(SummaryValue::text(format!("{stage}/{key}"), text)),
                Value::Bool(_) => {}
            }
        }
        self.summary(step as i64, values)
    }

    /// A sample as a text. `last` is the stage's last step.
    pub(super) fn sample(&mut self, sample: &Value, last: usize) -> Result<()> {
        let (kind, step) = match (&sample["evaluation"], &sample["iteration"]) {
            (Value::String(when), _) if when == "before" => ("held_out", 0),
            (Value::String(_), _) => ("held_out", last as i64),
            (Value::Number(step), _) => ("held_out", step.as_i64().unwrap_or(0)),
            (_, step) => ("rollout", step.as_i64().unwrap_or(0)),
        };
        let is_next = self.texts.0 == kind && self.texts.1 == step;
        self.texts = (kind.into(), step, if is_next { self.texts.2 + 1 } else { 1 });
        if self.texts.2 > TEXTS {
            return Ok(());
        }
        // Indented by four, markdown shows a text as it is.
        let block = |key: &str| {
            let text = sample[key].as_str().unwrap_or_default();
            format!("{key}:\n\n{}\n\n", text.lines().map(|line| format!("    {line}\n")).collect::<String>())
        };
        let numbers = ["score", "gold", "kl", "finish_reason"].into_iter().filter_map(|key| {
            let value = sample.get(key)?;
            Some(format!("{key} {}", value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
        });
        let numbers: Vec<String> = numbers.collect();
        let text = format!("{}{}{}", block("prompt"), block("response"), numbers.join(", "));
        self.summary(step, vec![SummaryValue::text(format!("samples/{kind}_{}", self.texts.2), &text)])
    }

    /// A distribution that belongs to the end of a stage.
    pub(super) fn fact(&mut self, name: &str, fact: &Value, last: usize) -> Result<()> {
        match (name.strip_prefix("histogram/"), fact.as_object()) {
            (Some(of), Some(found)) => {
                self.summary(last as i64, SummaryValue::histogram(of.to_owned(), found).into_iter().collect())
            }
            _ => Ok(()),
        }
    }

    /// The length, once all of it is on the disk.
    pub(super) fn synced(&self) -> Result<u64> {
        self.file.sync_data().context("writing TensorBoard's events")?;
        Ok(self.bytes)
    }

    fn summary(&mut self, step: i64, value: Vec<SummaryValue>) -> Result<()> {
        if value.is_empty() {
            return Ok(());
        }
        self.push(Event::of(step, Summary { value }))
    }

    fn push(&mut self, event: Event) -> Result<()> {
        let record = record::encode(&Event { wall_time: now(), ..event }.encode_to_vec());
        if let Err(error) = self.file.write_all(&record) {
            // Half a record would end every reader.
            let _ = self.file.set_len(self.bytes).and_then(|()| self.file.seek(SeekFrom::End(0)));
            return Err(error).context("writing TensorBoard's events");
        }
        self.bytes += record.len() as u64;
        Ok(())
    }
}

/// The run's own event files, oldest first.
pub(super) fn files(run: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(run.join(FOLDER)).into_iter().flatten().flatten();
    let is_ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("events.out.tfevents.") && name.ends_with(".fourfold")
    };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_ours).collect();
    files.sort();
    files
}

fn joined(names: &[Value]) -> String {
    names.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ")
}
