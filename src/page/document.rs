//! The whole page: header, warnings, curves, samples, memory, settings, machine and commands of a run, or the curves of
//! several; small enough to open at once. It does not depend on where it is written. Read `catalogue.rs` for the charts.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::Result;
use serde_json::{Map, Value};

use super::catalogue::{CHARTS, Entry, NO_CURVE, is_bound, matches};
use super::figure::{COLOURS, Curve, Figure};
use super::html::{escape, json_in_script, short, table};
use super::run_files::{RunFiles, Stage};
use super::thin::Point;
use super::{MARK, compare, settings, status};
use crate::config::{Grpo, Rloo, from_value};
use crate::error::counted;
use crate::ppo::metrics::OF_ACTOR;
use crate::stats::Histogram;

/// The most bytes of a page.
const MOST: usize = 2_000_000;
/// Stretches into which curves are thinned: the first with which the page is small enough.
const STRETCHES: [usize; 4] = [240, 120, 60, 30];

/// The page, with as many points as fit.
///
/// # Errors
/// Only if the drawing library fails.
pub(super) fn fitting(runs: &[RunFiles]) -> Result<String> {
    let mut text = String::new();
    for stretches in STRETCHES {
        text = document(runs, stretches)?;
        if text.len() <= MOST {
            break;
        }
    }
    Ok(text)
}

fn document(runs: &[RunFiles], stretches: usize) -> Result<String> {
    let mut data = Map::new();
    let mut draw = |figures: &[Figure]| -> Result<String> {
        let mut out = String::from("<div class=grid>");
        for figure in figures {
            let drawn = figure.draw(stretches)?;
            out += &drawn.html;
            data.insert(figure.id.clone(), drawn.data);
        }
        Ok(out + "</div>")
    };
    let (title, body) = match runs {
        [run] => (title(run), single(run, &mut draw)?),
        runs => ("runs compared".into(), several(runs, &mut draw)?),
    };
    Ok(format!(
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>{MARK}<meta name=viewport \
         content=\"width=device-width,initial-scale=1\"><meta name=color-scheme content=\"light dark\">\
         <meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'; script-src \
         'unsafe-inline'\"><title>{}</title><style>{}</style></head>\n<body>{body}<div id=tip role=status></div>\
         <script type=\"application/json\" id=curves>{}</script><script>{}</script></body></html>\n",
        escape(&title),
        include_str!("page.css"),
        json_in_script(&Value::Object(data)),
        include_str!("page.js")
    ))
}

fn title(run: &RunFiles) -> String {
    let by = run.settings.as_ref().map_or("run", |(by, _)| by);
    format!("{by} · {}", run.name)
}

/// Draws figures, and keeps what the page's script reads of them.
type Draw<'a> = dyn FnMut(&[Figure]) -> Result<String> + 'a;

fn single(run: &RunFiles, draw: &mut Draw<'_>) -> Result<String> {
    let mut out = format!("<header>{}{}</header><main>", head(run, &title(run)), status::figures(run));
    out += &problems(run);
    out += &warnings(run);
    for stage in &run.stages {
        let figures = [figures(run, stage), distributions(run, stage)].concat();
        if !figures.is_empty() {
            let _ = write!(out, "<section><h2>Curves of {}</h2>{}</section>", escape(&stage.name), draw(&figures)?);
        }
    }
    let samples = run.samples.html();
    if !samples.is_empty() {
        let _ = write!(out, "<section id=samples><h2>Samples</h2>{samples}</section>");
    }
    out += &memory(run);
    out += &settings::html(run);
    out += &machine(run);
    out += "<section id=commands><h2>Commands</h2>";
    for (what, command) in settings::commands(run) {
        let _ = write!(out, "<p class=say>To {}:</p><pre>{}</pre>", escape(&what), escape(&command));
    }
    Ok(out + "</section></main>")
}

fn several(runs: &[RunFiles], draw: &mut Draw<'_>) -> Result<String> {
    let mut out = format!("<header><h1>{} compared</h1>", counted(runs.len(), "run"));
    for (i, (run, name)) in runs.iter().zip(compare::names(runs)).enumerate() {
        let _ = write!(out, "<div class=run><i class=\"k{}\"></i>{}</div>", i % COLOURS, head(run, &name));
    }
    out += "</header><main>";
    runs.iter().for_each(|run| out += &problems(run));
    let _ = write!(out, "<section><h2>What differs in their settings</h2>{}</section>", compare::differences(runs));
    for (stage, figures) in compare::figures(runs) {
        let _ = write!(out, "<section><h2>Curves of {}</h2>{}</section>", escape(&stage), draw(&figures)?);
    }
    Ok(out + "</main>")
}

fn head(run: &RunFiles, title: &str) -> String {
    let (class, line) = status::line(run);
    format!(
        "<h1>{}</h1><p class=\"status {class}\">{}</p><p class=say>{}</p>",
        escape(title),
        escape(&line),
        escape(&run.path.display().to_string())
    )
}

fn problems(run: &RunFiles) -> String {
    let lines = run.problems.iter().map(|line| format!("<p class=bad>{}</p>", escape(line)));
    lines.collect()
}

/// The warnings of the run, each with a link to its chart, and what the guard did.
fn warnings(run: &RunFiles) -> String {
    let items = status::notices(run).into_iter().map(|notice| {
        let link = notice.chart.map_or_else(String::new, |chart| {
            format!(" <a href=\"#{}\">{}</a>", id(&notice.stage, chart), escape(chart))
        });
        let (count, first, last) = notice.steps;
        format!(
            "<li><b>{}</b>: {} <span class=say>(in {} of {}, from {first} to {last})</span>{link}</li>",
            escape(&notice.name),
            escape(&notice.text),
            counted(count, "step"),
            escape(&notice.stage)
        )
    });
    match items.collect::<String>() {
        items if items.is_empty() => items,
        items => format!("<section id=warnings class=warn><h2>Warnings</h2><ul>{items}</ul></section>"),
    }
}

fn id(stage: &str, title: &str) -> String {
    let name: String =
        title.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect();
    format!("c-{stage}-{name}")
}

/// The columns of a stage, and the shares that are computed from them.
pub(super) fn derived(run: &RunFiles, stage: &Stage) -> Vec<(String, Vec<Point>)> {
    let mut columns = stage.columns.clone();
    // What is not trained has no value, which is no fault; a value that is missing later is one.
    let warmup = critic_warmup(run);
    for (_, points) in columns.iter_mut().filter(|(name, _)| warmup > 0.0 && OF_ACTOR.contains(&name.as_str())) {
        points.retain(|(step, value)| value.is_some() || *step > warmup);
    }
    // Stages with rollouts log how many of a rollout's responses ended.
    let batch = rollout_size(run).filter(|batch| *batch > 0.0);
    if let (Some(ended), Some(batch)) = (stage.column("val/num_eos_tokens"), batch) {
        let dropped = |step: f64| {
            let column = stage.column("val/dropped")?;
            column.iter().find(|p| p.0 == step)?.1
        };
        let share = |point: &Point| Some(point.1? / (batch - dropped(point.0).unwrap_or(0.0)).max(1.0));
        let shares: Vec<Point> = ended.iter().map(|p| (p.0, share(p))).collect();
        columns.push(("share truncated".into(), shares.iter().map(|p| (p.0, p.1.map(|s| 1.0 - s))).collect()));
        columns.push(("share ended".into(), shares));
    }
    columns
}

/// The first iterations in which only the critic trains; 0 without any.
fn critic_warmup(run: &RunFiles) -> f64 {
    setting(run, "ppo", "critic_warmup").unwrap_or(0.0)
}

/// Responses of one rollout.
fn rollout_size(run: &RunFiles) -> Option<f64> {
    let section = |name: &str| run.settings.as_ref()?.1.get(name).cloned();
    let grpo = || Some(from_value::<Grpo>(section("grpo")?)?.to_ppo().batch_size as f64);
    let rloo = || Some(from_value::<Rloo>(section("rloo")?)?.to_ppo().batch_size as f64);
    setting(run, "ppo", "batch_size").or_else(grpo).or_else(rloo)
}

fn setting(run: &RunFiles, section: &str, key: &str) -> Option<f64> {
    let value = run.settings.as_ref()?.1.get(section)?.get(key)?;
    value.as_float().or_else(|| value.as_integer().map(|i| i as f64))
}

/// The figures of a stage, by the catalogue and then every column that it does not know.
pub(crate) fn figures(run: &RunFiles, stage: &Stage) -> Vec<Figure> {
    let columns = derived(run, stage);
    let is_placed = |column: &str| CHARTS.iter().any(|c| c.keys.iter().any(|key| matches(key, column)));
    let mut figures = vec![];
    for Entry { title, keys, note, .. } in CHARTS {
        let mut curves: Vec<Curve> = vec![];
        for key in *keys {
            for (name, points) in columns.iter().filter(|(name, _)| matches(key, name)) {
                let band = band(stage, name);
                curves.push(Curve {
                    name: name.clone(),
                    points: points.clone(),
                    band,
                    colour: curves.len(),
                    ..Curve::default()
                });
            }
        }
        if *title == "KL to the reference" {
            curves.extend(target(run, stage, curves.len()));
        }
        let mut note = (*note).to_owned();
        let warmup = critic_warmup(run);
        if warmup > 0.0 && curves.iter().any(|curve| OF_ACTOR.contains(&curve.name.as_str())) {
            note += if note.is_empty() { "" } else { " " };
            note += &format!("The actor has no values up to step {warmup} (critic_warmup): only the critic trains.");
        }
        let figure = Figure { id: id(&stage.name, title), title: (*title).into(), note, curves, x: "" };
        figures.extend((!figure.is_empty()).then_some(figure));
    }
    for (name, points) in
        columns.iter().filter(|(name, _)| !is_placed(name) && !NO_CURVE.contains(&&name[..]) && !is_bound(name))
    {
        let curve = Curve { name: name.clone(), points: points.clone(), ..Curve::default() };
        let figure =
            Figure { id: id(&stage.name, name), title: name.clone(), curves: vec![curve], ..Figure::default() };
        figures.extend((!figure.is_empty()).then_some(figure));
    }
    figures
}

/// The 95% band of a column: of a mean by its distribution, of a win rate by its logged bounds.
fn band(stage: &Stage, column: &str) -> Vec<(f64, f64, f64)> {
    if column == "eval/win_rate" {
        let bounds = stage.column("eval/win_rate_low").zip(stage.column("eval/win_rate_high"));
        let (low, high) = bounds.unwrap_or_default();
        return low.iter().zip(high).filter_map(|(low, high)| Some((low.0, low.1?, high.1?))).collect();
    }
    let found = stage.histograms.get(column).map_or(&[][..], |found| found);
    found.iter().filter_map(|(step, found)| found.interval().map(|(low, high)| (*step, low, high))).collect()
}

/// The KL that the coefficient is adapted to.
fn target(run: &RunFiles, stage: &Stage, colour: usize) -> Option<Curve> {
    let adapts = run.settings.as_ref()?.1.get("ppo")?.get("adap_kl_ctrl")?.as_bool()?;
    let target = setting(run, "ppo", "target").filter(|_| adapts)?;
    let points = stage.column("objective/kl")?;
    let points = [points.first()?.0, points.last()?.0].map(|step| (step, Some(target)));
    Some(Curve { name: "target".into(), points: points.into(), colour, is_rule: true, ..Curve::default() })
}

/// The newest distributions of scores, those of one evaluation in one figure.
fn distributions(run: &RunFiles, stage: &Stage) -> Vec<Figure> {
    let mut newest: BTreeMap<String, (String, Histogram)> = BTreeMap::new();
    for (of, found) in &stage.histograms {
        newest.extend(found.last().map(|(step, found)| (of.clone(), (format!("step {step}"), found.clone()))));
    }
    let facts = run.about.iter().flat_map(|about| &about.facts);
    for (name, fact) in facts {
        let of = name.strip_prefix("histogram/").and_then(|of| of.strip_prefix(&format!("{}/", stage.name)));
        newest.extend(of.zip(Histogram::from_json(fact)).map(|(of, found)| (of.to_owned(), ("the end".into(), found))));
    }
    let mut figures: Vec<Figure> = vec![];
    for (of, (when, found)) in newest {
        let (title, name) = titled(&stage.name, of);
        let mean = short(found.sum / found.num as f64);
        let count = counted(found.num, "response");
        let note = format!("{name}: {count} at {when}, mean {mean}.");
        let at = figures.iter().position(|figure| figure.title == title).unwrap_or_else(|| {
            figures.push(Figure { id: id(&stage.name, &title), title, x: "value", ..Figure::default() });
            figures.len() - 1
        });
        let figure = &mut figures[at];
        figure.curves.push(outline(&found, name, figure.curves.len()));
        figure.note += if figure.note.is_empty() { "" } else { " " };
        figure.note += &note;
    }
    figures
}

/// The title of a distribution's figure and its name there. The better and the worse responses share a figure.
fn titled(stage: &str, of: String) -> (String, String) {
    let Some(side) = ["chosen", "rejected"].into_iter().find(|side| of.ends_with(side)) else {
        return (format!("Distribution of {of}"), of);
    };
    match (stage, side) {
        ("kto", "chosen") => ("Rewards of desirable and undesirable".into(), "desirable".into()),
        ("kto", _) => ("Rewards of desirable and undesirable".into(), "undesirable".into()),
        ("dpo", side) => ("Rewards of chosen and rejected".into(), side.into()),
        _ => ("Scores of chosen and rejected".into(), of),
    }
}

/// A histogram as the outline of its bars over the values.
fn outline(found: &Histogram, name: String, colour: usize) -> Curve {
    let (mut points, mut band): (Vec<Point>, Vec<_>) = (vec![(found.min, Some(0.0))], vec![]);
    for (i, count) in found.counts.iter().enumerate() {
        let (from, to) = found.bin(i);
        for x in [from, to] {
            points.push((x, Some(*count as f64)));
            band.push((x, 0.0, *count as f64));
        }
    }
    points.push((found.max, Some(0.0)));
    Curve { name, points, band, colour, ..Curve::default() }
}

fn memory(run: &RunFiles) -> String {
    let memory = status::memory(run);
    if memory.is_empty() {
        return String::new();
    }
    let mut rows = vec![["phase", "planned, MiB", "measured, MiB"].map(str::to_owned).to_vec()];
    for (phase, memory) in memory {
        let mib = |x: Option<f64>| x.map_or_else(String::new, |x| format!("{x:.1}"));
        rows.push(vec![phase.into(), mib(memory.planned), mib(memory.measured)]);
    }
    format!(
        "<section id=memory><h2>Memory by phase</h2><p class=say>Planned: the peak of the process by shapes, mapped files \
         left out. Measured: the peak of the heap, known when the run ends.</p>{}</section>",
        table(&rows)
    )
}

fn machine(run: &RunFiles) -> String {
    let Some(about) = &run.about else { return String::new() };
    let mut rows = vec![["what", "value"].map(str::to_owned).to_vec()];
    rows.push(vec!["program".into(), about.program.clone()]);
    rows.extend(about.machine.iter().map(|(name, value)| vec![name.clone(), value.clone()]));
    rows.extend(about.fingerprints.iter().map(|(name, digest)| vec![format!("fingerprint of {name}"), digest.clone()]));
    format!("<section id=machine><h2>Machine and inputs</h2>{}</section>", table(&rows))
}
