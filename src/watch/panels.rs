//! What stands below the charts: pace and memory by phase, warnings, and a sample. It does not depend on the charts.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Row, Table};

use super::facts::{Facts, Pace};
use super::visible::wrapped;
use crate::error::counted;
use crate::page::html::short;

const BOLD: Style = Style::new().add_modifier(Modifier::BOLD);
const DIM: Style = Style::new().add_modifier(Modifier::DIM);

/// Columns of the table of phases.
pub(super) const PHASES: u16 = 56;

/// The pace in one line of at most `width` columns, for windows without room for a table.
pub(super) fn pace_line(facts: &Facts, width: u16) -> String {
    let mut line = String::new();
    for pace in &facts.pace {
        let rate = pace.tokens_per_second.map(|rate| format!("{} tok/s", short(rate)));
        let time = pace.seconds.filter(|_| pace.phase == "all").map(|seconds| format!("{} s per line", short(seconds)));
        let found: Vec<String> = rate.into_iter().chain(time).collect();
        let name = if pace.phase == "all" { "" } else { &pace.phase };
        if !found.is_empty() {
            let part = format!("{name} {}", found.join(", "));
            let longer = if line.is_empty() { part.trim().into() } else { format!("{line} · {}", part.trim()) };
            if longer.chars().count() > usize::from(width) && !line.is_empty() {
                break;
            }
            line = longer;
        }
    }
    line
}

/// Pace and memory by phase as a table.
pub(super) fn phases(frame: &mut Frame<'_>, area: Rect, facts: &Facts) {
    let right = |text: String| Cell::from(Line::from(text).right_aligned());
    let number = |x: Option<f64>| right(x.map_or_else(String::new, short));
    let mib = |x: Option<f64>| right(x.map_or_else(String::new, |x| format!("{x:.1}")));
    let row = |pace: &Pace| {
        Row::new([
            Cell::from(pace.phase.clone()),
            number(pace.tokens_per_second),
            number(pace.seconds),
            mib(pace.planned),
            mib(pace.measured),
        ])
    };
    let head = ["phase", "tokens/s", "seconds", "planned MiB", "measured MiB"];
    let head = head.into_iter().enumerate().map(|(i, name)| if i == 0 { Cell::from(name) } else { right(name.into()) });
    let widths = [10, 9, 9, 11, 12].map(Constraint::Length);
    let table = Table::new(facts.pace.iter().map(row), widths).header(Row::new(head).style(BOLD));
    frame.render_widget(table, area);
}

/// Warnings of now, then how the run ended and what is wrong with its files, then former warnings; in lines of a width.
pub(super) fn notes(facts: &Facts, width: u16) -> Vec<Line<'static>> {
    let mut notes: Vec<(Style, String)> = vec![];
    let say = |notice: &crate::page::status::Notice| {
        let (count, first, last) = notice.steps;
        format!(
            "{}: {} (in {} of {}, from {first} to {last})",
            notice.name,
            notice.text,
            counted(count, "step"),
            notice.stage
        )
    };
    let (now, before): (Vec<_>, Vec<_>) = facts.notices.iter().partition(|notice| facts.is_current(notice));
    notes.extend(now.into_iter().map(|notice| (Style::new().fg(Color::Yellow), say(notice))));
    notes.extend(facts.resume.iter().map(|line| (BOLD, format!("to resume it: {line}"))));
    notes.extend(facts.problems.iter().map(|line| (Style::new().fg(Color::Red), line.clone())));
    notes.extend(before.into_iter().map(|notice| (DIM, format!("earlier: {}", say(notice)))));
    let mut lines = vec![];
    for (style, text) in notes {
        lines.extend(wrapped(&text, usize::from(width)).into_iter().map(|line| Line::styled(line, style)));
    }
    lines
}

/// A sample: its figures, its prompt, of which the end is shown where it is long, and its response.
pub(super) fn sample(frame: &mut Frame<'_>, area: Rect, facts: &Facts, number: usize) {
    let Some(sample) = facts.samples.get(number) else {
        if facts.samples_read == 0 && area.height > 2 {
            frame.render_widget(Line::styled("no sample is written yet", DIM), area);
        }
        return;
    };
    let which = match number {
        0 => "newest sample".to_owned(),
        n => format!("sample {} of the newest {}", n + 1, facts.samples.len()),
    };
    let head = Line::from(vec![Span::styled(which, BOLD), Span::raw(format!(": {}", sample.line()))]);
    let rows = usize::from(area.height.saturating_sub(1));
    let width = usize::from(area.width);
    let (mut prompt, mut response) = (wrapped(&sample.prompt, width), wrapped(&sample.response, width));
    // The response gets what it needs, and at least two thirds of a room that is too small for both.
    let room = rows.saturating_sub(response.len()).max(rows / 3);
    if prompt.len() > room {
        prompt.drain(..prompt.len() - room);
        if let Some(first) = prompt.first_mut() {
            *first = format!("…{first}");
        }
    }
    let left = rows - prompt.len();
    if response.len() > left {
        response.truncate(left);
        if let Some(last) = response.last_mut() {
            last.push('…');
        }
    }
    let prompt = prompt.into_iter().map(|line| Line::styled(line, DIM));
    let lines: Vec<Line<'_>> =
        std::iter::once(head).chain(prompt).chain(response.into_iter().map(Line::from)).collect();
    let rows = Layout::vertical(vec![Constraint::Length(1); lines.len()]).split(area);
    for (line, row) in lines.into_iter().zip(rows.iter()).filter(|(_, row)| row.height > 0) {
        frame.render_widget(line, *row);
    }
}
