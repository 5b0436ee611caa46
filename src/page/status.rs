//! How a run stands, in a line: running with its share and the time left, finished, stopped, failed or killed; its main
//! figures, its warnings and its memory. It does not depend on where they are shown.

use serde_json::Value;

use super::about::{PhaseMemory, State};
use super::catalogue::CHARTS;
use super::html::{escape, short, span};
use super::run_files::{RunFiles, Stage};
use crate::config::Origin;
use crate::host::date::utc;
use crate::host::meter::Phase;
use crate::ppo::warnings::Warning;

/// How a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The folder is there, and nothing is logged yet.
    Starting,
    Running,
    Finished,
    Stopped,
    Failed,
    Killed,
    /// The folder does not say whether the run is over.
    Unknown,
}

impl Standing {
    pub(crate) fn of(run: &RunFiles) -> Self {
        match &run.about {
            None if run.summary.is_some() => Self::Finished,
            None if run.alive && run.stages.is_empty() => Self::Starting,
            None => Self::Unknown,
            Some(about) => match about.state {
                State::Finished => Self::Finished,
                State::Stopped => Self::Stopped,
                State::Failed => Self::Failed,
                State::Running if !run.alive => Self::Killed,
                State::Running if about.stages.is_empty() => Self::Starting,
                State::Running => Self::Running,
            },
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Finished => "finished",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Killed => "killed",
            Self::Unknown => "unknown",
        }
    }
}

/// How far a run has come in the stage that it is in.
pub(crate) struct Progress<'r> {
    pub stage: &'r str,
    pub step: f64,
    pub steps: usize,
    /// By the pace of the last steps.
    pub seconds_left: Option<f64>,
}

impl<'r> Progress<'r> {
    /// `None` before a stage has begun.
    pub(crate) fn of(run: &'r RunFiles) -> Option<Self> {
        let (name, steps) = run.about.as_ref()?.stages.last()?;
        let logged = run.stages.last().filter(|stage| stage.name == *name);
        let step = logged.map_or(0.0, |stage| stage.step);
        let pace = logged.and_then(Stage::seconds_per_step);
        let seconds_left = pace.map(|seconds| seconds * (*steps as f64 - step).max(0.0));
        Some(Self { stage: name, step, steps: *steps, seconds_left })
    }

    pub(crate) fn percent(&self) -> f64 {
        (100.0 * self.step / self.steps.max(1) as f64).floor()
    }
}

/// A state's class on the page, and its line.
pub(super) fn line(run: &RunFiles) -> (&'static str, String) {
    let class = match Standing::of(run) {
        Standing::Finished if run.about.is_some() => "good",
        Standing::Starting | Standing::Running if run.about.is_some() => "live",
        Standing::Failed | Standing::Killed => "bad",
        _ => "plain",
    };
    let end = match (Standing::of(run), &run.about) {
        (Standing::Starting | Standing::Running, Some(about)) => format!(", as of {}", utc(about.updated)),
        (Standing::Stopped | Standing::Killed, Some(_)) if run.resuming().is_some() => {
            "; the command below resumes it".into()
        }
        _ => String::new(),
    };
    (class, sentence(run) + &end)
}

/// How a run stands: `running, 62%, about 14 min left: ppo, step 25 of 40`.
pub(crate) fn sentence(run: &RunFiles) -> String {
    let stage = run.stages.last();
    let reached = stage
        .map_or_else(|| "before its first step".into(), |stage| format!("after step {} of {}", stage.step, stage.name));
    let standing = Standing::of(run);
    let Some(about) = &run.about else {
        return match standing {
            Standing::Finished => format!("finished, {reached}"),
            Standing::Starting => "starting: nothing is logged yet".into(),
            _ => format!("not known to be finished, {reached}"),
        };
    };
    let took = span(about.updated.saturating_sub(about.started) as f64);
    let at = utc(about.updated);
    match standing {
        Standing::Finished => format!("finished {at}, {took} after its start"),
        Standing::Stopped => format!("stopped {at}, {reached}"),
        Standing::Failed => format!("ended with an error {at}, {reached}: {}", about.reason),
        Standing::Killed => {
            let last = stage.and_then(|s| s.time).map_or(at, |time| utc(time as u64));
            format!("was killed {reached} (its last line is of {last})")
        }
        Standing::Starting | Standing::Running | Standing::Unknown => match Progress::of(run) {
            None => "running: starting".into(),
            Some(progress) => {
                let left = progress.seconds_left.map(|left| format!(", about {} left", span(left)));
                let (percent, left) = (progress.percent(), left.unwrap_or_default());
                format!("running, {percent}%{left}: {}, step {} of {}", progress.stage, progress.step, progress.steps)
            }
        },
    }
}

/// A warning of a run, or what its guard did.
pub(crate) struct Notice {
    pub stage: String,
    pub name: String,
    pub text: String,
    /// Number of the steps that it applied in, the first and the last.
    pub steps: (usize, f64, f64),
    /// Title of the chart that shows its cause.
    pub chart: Option<&'static str>,
}

/// The warnings of a run, stage by stage.
pub(crate) fn notices(run: &RunFiles) -> Vec<Notice> {
    let mut notices = vec![];
    for stage in &run.stages {
        for (name, steps) in &stage.warnings {
            let warning: Option<Warning> = serde_json::from_value(Value::from(name.as_str())).ok();
            notices.push(Notice {
                stage: stage.name.clone(),
                name: name.clone(),
                text: warning.map(|warning| warning.text(Origin::of(&stage.name))).unwrap_or_default(),
                steps: (steps.len(), *steps.first().unwrap_or(&0.0), *steps.last().unwrap_or(&0.0)),
                chart: CHARTS.iter().find(|chart| chart.warnings.contains(&name.as_str())).map(|chart| chart.title),
            });
        }
        if let (Some((first, reason)), Some((last, _))) = (stage.guarded.first(), stage.guarded.last()) {
            notices.push(Notice {
                stage: stage.name.clone(),
                name: "guard".into(),
                text: format!("steps were skipped or rolled back; the first because: {reason}"),
                steps: (stage.guarded.len(), *first, *last),
                chart: None,
            });
        }
    }
    notices
}

/// Peak memory by phase, MiB, in the order of a run.
pub(crate) fn memory(run: &RunFiles) -> Vec<(&'static str, PhaseMemory)> {
    let known =
        run.about.iter().flat_map(|about| Phase::ALL.map(|phase| (phase.name(), about.memory.get(phase.name()))));
    known.filter_map(|(name, memory)| Some((name, *memory?))).collect()
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
        let accuracy = match summary.contains_key("ensemble") {
            true => "held-out accuracy of the ensemble",
            false => "held-out accuracy",
        };
        let found = [
            ("held-out perplexity", pair("perplexity_before", "perplexity_after")),
            (accuracy, number("accuracy").map(share)),
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
