//! The screen: title, state, charts in as many columns as the window has room for, pace, warnings, a sample and the keys. It
//! does not depend on the terminal: a frame of any size is filled. Read `chart.rs` for a chart, `panels.rs` for the rest.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};

use super::facts::{Facts, Group};
use super::visible::wrapped;
use super::{chart, panels};
use crate::page::html::span;
use crate::page::status::Standing;

/// Windows with fewer rows have no table and no row for the groups' names.
const LOW: u16 = 20;
/// Windows with fewer columns have one column of charts.
const NARROW: u16 = 100;
/// Columns of a chart in wider windows, at least.
const CHART_WIDTH: u16 = 60;
/// Rows of a chart, at least.
const CHART_HEIGHT: u16 = 6;
/// Seconds from which the age of the last line is shown.
const OLD: f64 = 5.0;

/// What the reader has chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Choice {
    /// Stage and name of the group of charts; `None` is the newest stage's first.
    pub group: Option<(String, &'static str)>,
    /// Rows of charts that are scrolled past.
    pub scrolled: usize,
    /// The sample, counted from the newest.
    pub sample: usize,
}

impl Choice {
    /// The number of the group that is shown.
    pub(super) fn group_of(&self, groups: &[Group]) -> usize {
        let is_chosen = |group: &Group| self.group.as_ref().is_some_and(|(s, n)| group.stage == *s && group.name == *n);
        groups.iter().position(is_chosen).unwrap_or(0)
    }
}

/// Fills a frame. `now` is the time of day, seconds since 1970 (UTC). Returns the most rows of charts that can be scrolled
/// past.
pub(super) fn draw(frame: &mut Frame<'_>, facts: &Facts, choice: &Choice, now: f64) -> usize {
    let area = frame.area();
    let is_low = area.height < LOW;
    let state = state(facts, now, area.width, if is_low { 1 } else { 3 });
    let notes = panels::notes(facts, area.width);
    let notes_height = (notes.len() as u16).min(if is_low { u16::from(area.height > 12) } else { area.height / 8 });
    let bottom = match (is_low, facts.samples.is_empty()) {
        (true, _) => 3.min(area.height / 4),
        (false, true) => (facts.pace.len() as u16 + 2).min(area.height / 3),
        (false, false) => (area.height / 3).clamp(7, 16),
    };
    let [title_row, state_rows, tabs, charts, notes_rows, below, keys] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(state.len() as u16),
        Constraint::Length(u16::from(!is_low)),
        Constraint::Fill(1),
        Constraint::Length(notes_height),
        Constraint::Length(bottom),
        Constraint::Length(1),
    ])
    .areas(area);
    frame.render_widget(title(facts, area.width), title_row);
    lines(frame, state_rows, state);
    let shown = choice.group_of(&facts.groups);
    frame.render_widget(names(&facts.groups, shown), tabs);
    let most = match facts.groups.get(shown) {
        Some(group) => grid(frame, charts, group, choice.scrolled),
        None => {
            let line = Line::styled("no step is logged yet", Style::new().add_modifier(Modifier::DIM));
            frame.render_widget(line.centered(), charts);
            0
        }
    };
    lines(frame, notes_rows, notes);
    if is_low {
        let [pace, sample] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(below);
        frame.render_widget(Line::from(panels::pace_line(facts, pace.width)), pace);
        panels::sample(frame, sample, facts, choice.sample);
    } else if area.width >= NARROW {
        let [left, _, right] =
            Layout::horizontal([Constraint::Length(panels::PHASES), Constraint::Length(2), Constraint::Fill(1)])
                .areas(below);
        panels::phases(frame, left, facts);
        panels::sample(frame, right, facts, choice.sample);
    } else {
        let rows = (facts.pace.len() as u16 + 1).min(below.height / 2);
        let [upper, lower] = Layout::vertical([Constraint::Length(rows), Constraint::Fill(1)]).areas(below);
        panels::phases(frame, upper, facts);
        panels::sample(frame, lower, facts, choice.sample);
    }
    frame.render_widget(footer(facts, shown, is_low, most > 0), keys);
    most
}

fn lines(frame: &mut Frame<'_>, area: Rect, lines: Vec<Line<'_>>) {
    for (row, line) in area.rows().zip(lines) {
        frame.render_widget(line, row);
    }
}

/// The stage, the base, the device and the folder; without the folders' names where the window is too narrow for them.
fn title(facts: &Facts, width: u16) -> Line<'_> {
    let stage = facts.at.as_ref().map_or(facts.command.as_str(), |at| &at.stage);
    let of = if stage == facts.command { String::new() } else { format!(" of {}", facts.command) };
    let line = |is_short: bool| {
        let mut spans = vec![Span::styled(format!("{stage}{of}"), Style::new().add_modifier(Modifier::BOLD))];
        let last = |path: &str| path.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned();
        let base = facts.base.as_ref().map(|base| if is_short { last(base) } else { base.clone() });
        spans.extend(base.map(|base| Span::raw(format!("  base {base}"))));
        spans.extend(facts.device.iter().map(|device| Span::raw(format!("  on {device}"))));
        if !is_short {
            spans.push(Span::styled(format!("  {}", facts.run), Style::new().add_modifier(Modifier::DIM)));
        }
        Line::from(spans)
    };
    let long = line(false);
    if long.width() <= usize::from(width) { long } else { line(true) }
}

/// How the run stands, and how old its last line is where one might wonder, in at most so many lines.
fn state(facts: &Facts, now: f64, width: u16, most: usize) -> Vec<Line<'static>> {
    let colour = match facts.standing {
        Standing::Starting | Standing::Running => Color::Cyan,
        Standing::Finished => Color::Green,
        Standing::Failed | Standing::Killed => Color::Red,
        Standing::Stopped | Standing::Unknown => Color::Yellow,
    };
    let age = facts.last_line.filter(|_| facts.standing == Standing::Running).map(|time| now - time);
    let age = age.filter(|age| *age >= OLD).map_or_else(String::new, |age| format!(" (last line {} ago)", span(age)));
    let text = format!("{}{age}", facts.sentence);
    let style = Style::new().fg(colour).add_modifier(Modifier::BOLD);
    wrapped(&text, usize::from(width)).into_iter().take(most).map(|row| Line::styled(row, style)).collect()
}

/// The groups' names, the shown one marked.
fn names(groups: &[Group], shown: usize) -> Line<'_> {
    let mut spans = vec![];
    for (i, group) in groups.iter().enumerate() {
        let style = if i == shown { Style::new().add_modifier(Modifier::REVERSED) } else { Style::new() };
        let is_first = i == 0 || groups[i - 1].stage != group.stage;
        if is_first {
            spans.push(Span::styled(format!("{}{}: ", if i == 0 { "" } else { "  " }, group.stage), Style::new()));
        }
        spans.push(Span::styled(format!(" {} ", group.name), style));
    }
    Line::from(spans)
}

/// Draws as many charts of a group as there is room for, and returns the number of rows that can be scrolled past.
fn grid(frame: &mut Frame<'_>, area: Rect, group: &Group, scrolled: usize) -> usize {
    let columns = if area.width < NARROW { 1 } else { (area.width / CHART_WIDTH).max(2) };
    let columns = usize::from(columns).min(group.figures.len()).max(1);
    let rows = group.figures.len().div_ceil(columns);
    let shown = rows.min(usize::from(area.height / CHART_HEIGHT)).max(1);
    let most = rows - shown;
    let places = Layout::vertical(vec![Constraint::Fill(1); shown]).split(area);
    let chosen = group.figures.chunks(columns).skip(scrolled.min(most));
    for (figures, place) in chosen.zip(places.iter()) {
        let cells = Layout::horizontal(vec![Constraint::Fill(1); columns]).spacing(2).split(*place);
        for (figure, cell) in figures.iter().zip(cells.iter()) {
            chart::draw(frame, *cell, figure);
        }
    }
    most
}

fn footer(facts: &Facts, shown: usize, is_low: bool, scrolls: bool) -> Line<'static> {
    let mut keys = vec!["q ends".to_owned()];
    if facts.groups.len() > 1 {
        let name = if is_low { format!(" ({})", facts.groups[shown].name) } else { String::new() };
        keys.push(format!("Tab ← → other curves{name}"));
    }
    keys.extend(scrolls.then(|| "↑ ↓ scroll".into()));
    keys.extend((facts.samples.len() > 1).then(|| "s next sample".into()));
    Line::styled(keys.join(" · "), Style::new().add_modifier(Modifier::DIM))
}
