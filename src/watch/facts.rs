//! What is shown of a run, apart from how: its name, how it stands, the figures of each stage, pace and memory by phase,
//! warnings and samples. Texts are safe to print. It does not depend on a terminal. Read `screen.rs` or `text.rs` next.

use serde_json::{Map, Value, json};

use super::visible::{in_a_line, visible};
use crate::host::meter::Phase;
use crate::page::catalogue::GROUPS;
use crate::page::document::figures;
use crate::page::figure::Figure;
use crate::page::run_files::{RunFiles, Stage};
use crate::page::samples::Sample;
use crate::page::status::{self, Notice, Progress, Standing};
use crate::page::thin::Point;
use crate::report::clocks::{SECONDS, TOKENS_PER_SECOND};
use crate::train::former;

/// What is shown of a run.
pub(super) struct Facts {
    /// The folder.
    pub run: String,
    pub name: String,
    /// The command that trains.
    pub command: String,
    pub base: Option<String>,
    pub device: Option<String>,
    pub standing: Standing,
    /// How it stands, in a sentence.
    pub sentence: String,
    /// Why it stopped or failed.
    pub reason: String,
    /// The command that resumes the run, where one would.
    pub resume: Option<String>,
    pub at: Option<At>,
    /// When the last line was written, seconds since 1970 (UTC).
    pub last_line: Option<f64>,
    /// The newest stage first, and of it the main group.
    pub groups: Vec<Group>,
    /// Of the newest stage.
    pub pace: Vec<Pace>,
    pub notices: Vec<Notice>,
    pub problems: Vec<String>,
    /// Newest first.
    pub samples: Vec<Sample>,
    /// Samples that were read in all.
    pub samples_read: usize,
}

/// How far the newest stage is.
pub(super) struct At {
    pub stage: String,
    pub step: f64,
    pub steps: usize,
    pub percent: f64,
    pub seconds_left: Option<f64>,
}

/// Charts that are shown together.
pub(super) struct Group {
    pub stage: String,
    pub name: &'static str,
    pub figures: Vec<Figure>,
}

/// The last step of a phase, or of all.
pub(super) struct Pace {
    pub phase: String,
    pub tokens_per_second: Option<f64>,
    pub seconds: Option<f64>,
    /// Peak memory in MiB.
    pub planned: Option<f64>,
    pub measured: Option<f64>,
}

impl Facts {
    pub(super) fn of(run: &RunFiles) -> Self {
        let standing = Standing::of(run);
        let about = run.about.as_ref();
        let stage = run.stages.last();
        // Before its first step a run has replaced nothing: resuming would go on with the run before it.
        let resumes = matches!(standing, Standing::Stopped | Standing::Killed) && !former::is_left(&run.path);
        let resume = run.resuming().filter(|_| resumes);
        let sentence = status::sentence(run);
        Self {
            run: in_a_line(&run.path.display().to_string()),
            name: in_a_line(&run.name),
            command: in_a_line(run.settings.as_ref().map_or("run", |(by, _)| by)),
            base: run.base().map(in_a_line),
            device: about.and_then(|about| about.machine.get("device")).map(|name| in_a_line(name)),
            standing,
            sentence: in_a_line(&sentence),
            reason: visible(about.map_or("", |about| &about.reason)),
            resume: resume.map(|line| in_a_line(&line)),
            at: Progress::of(run).map(|at| At {
                stage: in_a_line(at.stage),
                step: at.step,
                steps: at.steps,
                percent: at.percent(),
                seconds_left: at.seconds_left.filter(|_| standing == Standing::Running),
            }),
            last_line: stage.and_then(|stage| stage.time),
            groups: run.stages.iter().rev().flat_map(|stage| groups(run, stage)).collect(),
            pace: pace(run, stage),
            notices: status::notices(run).into_iter().map(shown).collect(),
            problems: run.problems.iter().map(|line| in_a_line(line)).collect(),
            samples: run.samples.recent.iter().map(printable).collect(),
            samples_read: run.samples.count,
        }
    }

    /// The stage in whose last step a warning applies still.
    pub(super) fn is_current(&self, notice: &Notice) -> bool {
        self.at.as_ref().is_some_and(|at| at.stage == notice.stage && notice.steps.2 >= at.step)
    }

    /// The object of `--json`.
    pub(super) fn to_json(&self) -> Value {
        let mut curves = Map::new();
        for group in &self.groups {
            let stage = curves.entry(group.stage.clone()).or_insert_with(|| json!({}));
            for curve in group.figures.iter().flat_map(|figure| &figure.curves) {
                if let Some((step, value)) = last(&curve.points).filter(|_| !curve.is_rule) {
                    stage[&curve.name] = json!({"step": step, "value": value});
                }
            }
        }
        let pace = self.pace.iter().map(|pace| {
            let row = json!({
                "tokens_per_second": pace.tokens_per_second,
                "seconds": pace.seconds,
                "planned_mib": pace.planned,
                "measured_mib": pace.measured,
            });
            (pace.phase.clone(), row)
        });
        let notices = self.notices.iter().map(|notice| {
            let (count, first, last) = notice.steps;
            json!({
                "stage": notice.stage, "name": notice.name, "text": notice.text, "steps": count, "first": first,
                "last": last, "now": self.is_current(notice),
            })
        });
        let sample = self.samples.first().map(|sample| {
            json!({
                "when": sample.when, "prompt": sample.prompt, "response": sample.response, "score": sample.score,
                "gold": sample.gold, "kl": sample.kl, "finish_reason": sample.finish,
            })
        });
        let at = self.at.as_ref();
        json!({
            "run": self.run,
            "command": self.command,
            "base": self.base,
            "device": self.device,
            "state": self.standing.name(),
            "line": self.sentence,
            "reason": Some(&self.reason).filter(|reason| !reason.is_empty()),
            "resume": self.resume,
            "stage": at.map(|at| &at.stage),
            "step": at.map(|at| at.step),
            "steps": at.map(|at| at.steps),
            "percent": at.map(|at| at.percent),
            "seconds_left": at.and_then(|at| at.seconds_left),
            "last_line": self.last_line,
            "curves": curves,
            "phases": pace.collect::<Map<_, _>>(),
            "warnings": notices.collect::<Value>(),
            "problems": self.problems,
            "samples": self.samples_read,
            "sample": sample,
        })
    }
}

/// The last value of a curve that is a number.
pub(super) fn last(points: &[Point]) -> Option<(f64, f64)> {
    points.iter().rev().find_map(|(step, value)| Some((*step, (*value)?)))
}

/// A stage's charts in their groups; those that belong to no group are the last one.
fn groups(run: &RunFiles, stage: &Stage) -> Vec<Group> {
    let mut figures = figures(run, stage);
    for figure in &mut figures {
        figure.title = in_a_line(&figure.title);
        figure.curves.iter_mut().for_each(|curve| curve.name = in_a_line(&curve.name));
    }
    let of = |name: &'static str, figures: Vec<Figure>| {
        (!figures.is_empty()).then(|| Group { stage: in_a_line(&stage.name), name, figures })
    };
    let titled = |title: &&str| figures.iter().find(|figure| figure.title == **title).cloned();
    let known = GROUPS.iter().filter_map(|(name, titles)| of(name, titles.iter().filter_map(titled).collect()));
    let is_known = |figure: &&Figure| GROUPS.iter().any(|(_, titles)| titles.contains(&figure.title.as_str()));
    let rest = figures.iter().filter(|figure| !is_known(figure)).cloned().collect();
    known.chain(of("other", rest)).collect()
}

/// The pace of the last step, all of it and by phase, beside the memory of the phases.
fn pace(run: &RunFiles, stage: Option<&Stage>) -> Vec<Pace> {
    let newest = |column: &str| stage.and_then(|stage| last(stage.column(column)?)).map(|(_, value)| value);
    let memory = status::memory(run);
    let whole = Pace {
        phase: "all".into(),
        tokens_per_second: newest(TOKENS_PER_SECOND),
        seconds: newest(SECONDS),
        planned: None,
        measured: None,
    };
    let phases = Phase::ALL.map(|phase| {
        let name = phase.name();
        let memory = memory.iter().find(|(phase, _)| *phase == name).map(|(_, memory)| *memory).unwrap_or_default();
        Pace {
            phase: name.into(),
            tokens_per_second: newest(&format!("{TOKENS_PER_SECOND}/{name}")),
            seconds: newest(&format!("{SECONDS}/{name}")),
            planned: memory.planned,
            measured: memory.measured,
        }
    });
    let is_known =
        |pace: &Pace| [pace.tokens_per_second, pace.seconds, pace.planned, pace.measured].iter().any(Option::is_some);
    std::iter::once(whole).chain(phases).filter(is_known).collect()
}

fn shown(notice: Notice) -> Notice {
    Notice { stage: in_a_line(&notice.stage), name: in_a_line(&notice.name), text: in_a_line(&notice.text), ..notice }
}

/// A sample whose texts are safe to print.
fn printable(sample: &Sample) -> Sample {
    let mut sample = sample.clone();
    sample.when = in_a_line(&sample.when);
    sample.prompt = visible(sample.prompt.trim_matches('\n'));
    sample.response = visible(&sample.response);
    sample.finish = in_a_line(&sample.finish);
    sample
}
