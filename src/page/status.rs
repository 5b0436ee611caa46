//! How a run stands, in a line: running with its share and the time left, finished, stopped, failed or killed; and its main
//! figures. It does not depend on a stage's mathematics.

use serde_json::Value;

use super::about::State;
use super::html::{escape, short, span};
use super::run_files::{RunFiles, Stage};
use crate::host::date::utc;

/// A state's class on the page, and its line.
pub(super) fn line(run: &RunFiles) -> (&'static str, String) {
    let stage = run.stages.last();
    let reached = stage
        .map_or_else(|| "before its first step".into(), |stage| format!("after step {} of {}", stage.step, stage.name));
    let Some(about) = &run.about else {
        let done = if run.summary.is_some() { "finished" } else { "not known to be finished" };
        return ("plain", format!("{done}, {reached}"));
    };
    let took = span(about.updated.saturating_sub(about.started) as f64);
    let at = utc(about.updated);
    match about.state {
        State::Finished => ("good", format!("finished {at}, {took} after its start")),
        State::Stopped => ("plain", format!("stopped {at}, {reached}; the command below resumes it")),
        State::Failed => ("bad", format!("ended with an error {at}, {reached}: {}", about.reason)),
        State::Running if !run.alive => {
            let last = stage.and_then(|s| s.time).map_or(at, |time| utc(time as u64));
            ("bad", format!("was killed {reached} (its last line is of {last}); the command below resumes it"))
        }
        State::Running => ("live", format!("running{}, as of {at}", progress(about.stages.last(), stage))),
    }
}

/// `: ppo, step 25 of 40, 62%, about 14 min left`.
fn progress(begun: Option<&(String, usize)>, logged: Option<&Stage>) -> String {
    let Some((name, steps)) = begun else { return ": starting".into() };
    let logged = logged.filter(|stage| stage.name == *name);
    let step = logged.map_or(0.0, |stage| stage.step);
    let percent = (100.0 * step / (*steps).max(1) as f64).floor();
    let left = logged.and_then(Stage::seconds_per_step).map(|seconds| seconds * (*steps as f64 - step).max(0.0));
    let left = left.map_or_else(String::new, |left| format!(", about {} left", span(left)));
    format!(", {percent}%{left}: {name}, step {step} of {steps}")
}

/// The run's main figures as HTML.
pub(super) fn figures(run: &RunFiles) -> String {
    let mut tiles: Vec<(String, String)> = vec![];
    if let Some(summary) = run.summary.as_ref().and_then(Value::as_object) {
        let number = |key: &str| summary.get(key).and_then(Value::as_f64);
        let pair = |before: &str, after: &str| Some(format!("{} → {}", short(number(before)?), short(number(after)?)));
        let share = |x: f64| format!("{:.1}%", 100.0 * x);
        let mean = |key: &str| summary.get(key)?.get("mean")?.as_f64();
        let score = mean("eval_score_before").zip(mean("eval_score_after"));
        let wins = summary.get("eval").and_then(|eval| {
            let of = |key: &str| eval.get(key).and_then(Value::as_f64);
            let interval = of("eval/win_rate_low").zip(of("eval/win_rate_high"));
            let interval = interval.map(|(low, high)| format!(" ({} to {})", share(low), share(high)));
            Some(format!("{}{}", share(of("eval/win_rate")?), interval.unwrap_or_default()))
        });
        let found = [
            ("held-out perplexity", pair("perplexity_before", "perplexity_after")),
            ("held-out accuracy", number("accuracy").map(share)),
            ("held-out score", score.map(|(a, b)| format!("{} → {}", short(a), short(b)))),
            ("wins against SFT", wins),
            ("KL", number("kl").map(|kl| format!("{} nats", short(kl)))),
            ("wall time", number("wall_s").map(span)),
            ("peak memory", number("peak_rss_mib").map(|mib| format!("{mib:.0} MiB"))),
        ];
        tiles.extend(found.into_iter().filter_map(|(name, value)| Some((name.into(), value?))));
    } else if let Some(stage) = run.stages.last() {
        let last = |key: &str| stage.column(key).and_then(|c| c.iter().rev().find_map(|p| p.1));
        for key in [
            "objective/scores",
            "eval/score",
            "eval/win_rate",
            "objective/kl",
            "loss",
            "eval_perplexity",
            "eval_accuracy",
        ] {
            tiles.extend(last(key).map(|value| (key.to_owned(), short(value))));
        }
    }
    if tiles.is_empty() {
        return String::new();
    }
    let tiles = tiles
        .iter()
        .map(|(name, value)| format!("<div class=tile><span>{}</span><b>{}</b></div>", escape(name), escape(value)));
    format!("<div class=tiles>{}</div>", tiles.collect::<String>())
}
