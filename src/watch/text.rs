//! The facts of a run as text, for a pipe, a log or a terminal that is not taken over. It does not depend on a terminal.

use std::fmt::Write;

use super::facts::{Facts, Pace, last};
use super::visible::wrapped;
use crate::error::counted;
use crate::page::html::short;

/// Columns of a text.
const WIDTH: usize = 96;

/// The text, with a line break at its end.
pub(super) fn render(facts: &Facts) -> String {
    let mut out = format!("{} ({}): {}\n", facts.name, facts.command, facts.sentence);
    let place = [
        facts.base.as_ref().map(|base| format!("base {base}")),
        facts.device.as_ref().map(|device| format!("on {device}")),
        Some(format!("in {}", facts.run)),
    ];
    let _ = writeln!(out, "{}", place.into_iter().flatten().collect::<Vec<_>>().join(", "));
    if let Some(line) = &facts.resume {
        let _ = writeln!(out, "to resume it: {line}");
    }
    facts.problems.iter().for_each(|line| paragraph(&mut out, line, ""));
    curves(&mut out, facts);
    phases(&mut out, &facts.pace);
    for notice in &facts.notices {
        let (count, first, last) = notice.steps;
        let when = if facts.is_current(notice) { "warning" } else { "earlier warning" };
        let line = format!(
            "{when}: {}: {} (in {} of {}, from {first} to {last})",
            notice.name,
            notice.text,
            counted(count, "step"),
            notice.stage
        );
        paragraph(&mut out, &line, "");
    }
    if let Some(sample) = facts.samples.first() {
        let _ = writeln!(out, "\nnewest sample: {}", sample.line());
        paragraph(&mut out, &sample.prompt, "  > ");
        paragraph(&mut out, &sample.response, "  ");
    }
    out
}

/// Wrapped lines behind an indent.
fn paragraph(out: &mut String, text: &str, indent: &str) {
    for line in wrapped(text, WIDTH - indent.len()) {
        let _ = writeln!(out, "{}", format!("{indent}{line}").trim_end());
    }
}

/// The last values of the newest stage's main charts.
fn curves(out: &mut String, facts: &Facts) {
    let Some(group) = facts.groups.first() else { return };
    let rows: Vec<(&str, &str, f64, f64)> = group
        .figures
        .iter()
        .flat_map(|figure| figure.curves.iter().map(|curve| (figure.title.as_str(), curve)))
        .filter_map(|(title, curve)| last(&curve.points).map(|(step, value)| (title, curve.name.as_str(), value, step)))
        .collect();
    let widest = |of: fn(&(&str, &str, f64, f64)) -> usize| rows.iter().map(of).max().unwrap_or(0);
    let (titles, names) = (widest(|row| row.0.chars().count()), widest(|row| row.1.chars().count()));
    let _ = writeln!(out, "\n{}", group.stage);
    for (title, name, value, step) in &rows {
        let _ = writeln!(out, "  {title:<titles$}  {name:<names$}  {:>10}  at step {step}", short(*value));
    }
}

fn phases(out: &mut String, pace: &[Pace]) {
    if pace.is_empty() {
        return;
    }
    let head = ["phase", "tokens/s", "seconds", "planned, MiB", "measured, MiB"];
    let row = |cells: [&str; 5]| {
        format!("  {:<10} {:>10} {:>9} {:>13} {:>14}", cells[0], cells[1], cells[2], cells[3], cells[4])
    };
    let _ = writeln!(out, "\n{}", row(head));
    for pace in pace {
        let number = |x: Option<f64>| x.map_or_else(String::new, short);
        let mib = |x: Option<f64>| x.map_or_else(String::new, |x| format!("{x:.1}"));
        let cells = [number(pace.tokens_per_second), number(pace.seconds), mib(pace.planned), mib(pace.measured)];
        let _ = writeln!(out, "{}", row([&pace.phase, &cells[0], &cells[1], &cells[2], &cells[3]]).trim_end());
    }
}
