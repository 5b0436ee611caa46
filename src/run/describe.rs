//! A run's folder in words and figures: its stage, base, adapters, state and best figures. It serves the command `inspect`
//! and does not depend on a stage's code. Read `output.rs` for what a folder holds.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::output;
use crate::error::counted;
use crate::host::date::utc_of;
use crate::model_files::inspect::inspect;
use crate::train::store::Store;
use crate::train::{former, lock};

/// The figures that tell runs of a stage apart, and whether more is better.
const FIGURES: &[(&str, bool)] = &[
    ("loss", false),
    ("eval_loss", false),
    ("accuracy", true),
    ("eval_accuracy", true),
    ("rewards/margins", true),
    ("eval_rewards/accuracies", true),
    ("eval_rewards/margins", true),
    ("objective/scores", true),
    ("eval/score", true),
    ("eval/gold", true),
    ("eval/win_rate", true),
];

/// Describes the folder of a run; `None` if `dir` is none.
///
/// # Errors
/// If one of its adapters cannot be read.
pub fn describe(dir: &Path) -> Result<Option<Value>> {
    let Some(stage) = output::stage_of(dir) else { return Ok(None) };
    let mut adapters = Map::new();
    for name in output::adapters_of(stage) {
        let path = dir.join(name);
        // What lacks its weights is told of beside the state.
        if path.join("adapter_config.json").is_file() && path.join("adapter_model.safetensors").is_file() {
            let found = inspect(&path)?;
            let keys = ["r", "lora_alpha", "parameters", "bytes"].map(|key| (key.to_owned(), found[key].clone()));
            let mut about: Map<String, Value> = keys.into_iter().collect();
            about.insert("path".into(), path.display().to_string().into());
            about.insert("head".into(), (found["head"].as_array().is_some_and(|head| !head.is_empty())).into());
            adapters.insert((*name).to_owned(), about.into());
        }
    }
    let figures = figures(dir);
    let summary: Option<Value> =
        fs::read(dir.join(output::SUMMARY)).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let missing = summary.as_ref().map_or_else(Vec::new, |summary| output::missing(dir, stage, summary));
    let state = state(dir, &adapters, &missing, summary.is_some());
    let mut described = json!({
        "path": dir.display().to_string(),
        "kind": "run",
        "stage": stage,
        "base": output::base_of(dir),
        "state": state,
        "last_step": figures.last_step,
        "adapters": adapters,
        "best": figures.best,
    });
    if figures.damaged > 0 {
        described["damaged_lines"] = figures.damaged.into();
    }
    if let Some(mut summary) = summary {
        if let Some(summary) = summary.as_object_mut() {
            summary.retain(|_, value| value.is_number() || value.is_string());
        }
        described["summary"] = summary;
    }
    Ok(Some(described))
}

/// Finished, in use, or stopped, and when. `missing`: files that a finished run had. `is_read`: whether its summary could be read.
fn state(dir: &Path, adapters: &Map<String, Value>, missing: &[PathBuf], is_read: bool) -> String {
    if let Some(owner) = lock::owner(dir) {
        return format!("running: {owner}");
    }
    let time =
        |path: &Path| fs::metadata(path).and_then(|about| about.modified()).map_or_else(|_| String::new(), utc_of);
    if former::is_left(dir) {
        return format!(
            "ended before its first step: the run before it is in {}, and goes back when the next run begins here",
            dir.join(former::NAME).display()
        );
    }
    let summary = dir.join(output::SUMMARY);
    if summary.exists() {
        let lacks = missing.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ");
        let lacks = if lacks.is_empty() { lacks } else { format!(", but without {lacks}") };
        let unread = if is_read { "" } else { ", but its summary.json cannot be read" };
        return format!("finished {}{lacks}{unread}", time(&summary));
    }
    match Store::at(dir.join(output::CHECKPOINTS)).newest() {
        Ok((Some(found), _)) => format!(
            "not finished: the newest checkpoint is {}, after {}, of {}; --resume goes on from it",
            found.path.display(),
            counted(found.manifest.step, "step"),
            time(&found.path)
        ),
        _ if adapters.is_empty() => "not finished: there is no checkpoint to go on from".into(),
        _ => "not finished: there is an adapter and no summary".into(),
    }
}

struct Figures {
    last_step: Value,
    best: Map<String, Value>,
    damaged: usize,
}

/// The last step of metrics.jsonl, and of each figure the best value with its step. Lines that are no JSON are counted.
fn figures(dir: &Path) -> Figures {
    let text = fs::read(dir.join("metrics.jsonl")).unwrap_or_default();
    let mut found = Figures { last_step: Value::Null, best: Map::new(), damaged: 0 };
    let is_several = output::stage_of(dir) == Some("quickstart");
    for line in text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        let Ok(Value::Object(line)) = serde_json::from_slice::<Value>(line) else {
            found.damaged += 1;
            continue;
        };
        found.last_step = line.get("step").cloned().unwrap_or_default();
        for (name, more_is_better) in FIGURES {
            let Some(value) = line.get(*name).and_then(Value::as_f64) else { continue };
            let name = match line.get("stage").and_then(Value::as_str).filter(|_| is_several) {
                Some(stage) => format!("{stage} {name}"),
                None => (*name).to_owned(),
            };
            let is_better = |best: &Value| match best["value"].as_f64() {
                Some(best) if *more_is_better => value > best,
                Some(best) => value < best,
                None => true,
            };
            if found.best.get(&name).is_none_or(is_better) {
                found.best.insert(name, json!({"value": value, "step": found.last_step}));
            }
        }
    }
    found
}
