//! A figure of a run's page as a chart of the terminal: a line with its title and the last values, and the curves over steps
//! with the page's ranges and labels. It does not depend on what the curves are of.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Chart, Dataset, GraphType};

use super::facts::last;
use crate::page::figure::{Curve, Figure, label, spread};
use crate::page::html::short;
use crate::page::thin::thin;

/// Colours of the curves, as terminals call them: each reader's theme decides what they are.
const COLOURS: [Color; 6] =
    [Color::Cyan, Color::Yellow, Color::Magenta, Color::Green, Color::LightRed, Color::LightBlue];
/// Rows from which the axis of steps has labels: below, they would leave the curves too little.
const LABELLED: u16 = 7;

fn style(curve: &Curve) -> Style {
    let style = Style::new().fg(COLOURS[curve.colour % COLOURS.len()]);
    if curve.is_rule { style.add_modifier(Modifier::DIM) } else { style }
}

/// A column's last part, and whether it is of an evaluation: `eval accuracies` for `eval_rewards/accuracies`.
pub(super) fn short_name(column: &str) -> String {
    let last = column.rsplit('/').next().unwrap_or(column);
    if column.starts_with("eval") && last != column { format!("eval {last}") } else { last.to_owned() }
}

/// The title and each curve's last value. Where the line is too short for the curves' names they lose their first parts, if
/// they differ without them.
fn caption(figure: &Figure, width: u16) -> Line<'_> {
    let names: Vec<String> = figure.curves.iter().map(|curve| short_name(&curve.name)).collect();
    let differ = names.iter().enumerate().all(|(i, name)| !names[..i].contains(name));
    let line = |is_short: bool| {
        let mut spans = vec![Span::styled(figure.title.as_str(), Style::new().add_modifier(Modifier::BOLD))];
        for (curve, short_name) in figure.curves.iter().zip(&names) {
            let name = if is_short { short_name } else { &curve.name };
            let value = last(&curve.points).map_or_else(|| "no number".into(), |(_, value)| short(value));
            let is_titled = figure.curves.len() == 1 && curve.name == figure.title;
            spans.push(Span::styled(if is_titled { "  ".into() } else { format!("  {name} ") }, style(curve)));
            spans.push(Span::styled(value, style(curve).add_modifier(Modifier::BOLD)));
        }
        let missing: usize = figure.curves.iter().map(|c| c.points.iter().filter(|p| p.1.is_none()).count()).sum();
        if missing > 0 {
            spans.push(Span::styled(format!("  {missing} NaN or infinite"), Style::new().fg(Color::Red)));
        }
        Line::from(spans)
    };
    let long = line(false);
    if long.width() <= usize::from(width) || !differ { long } else { line(true) }
}

/// Points that are joined, in the order of the curves: a gap where values are NaN or infinite.
fn parts(figure: &Figure, stretches: usize) -> Vec<(&Curve, Vec<(f64, f64)>)> {
    let mut parts = vec![];
    for curve in &figure.curves {
        for part in thin(&curve.points, stretches).split(|point| point.1.is_none()) {
            let part: Vec<(f64, f64)> = part.iter().filter_map(|(step, value)| Some((*step, (*value)?))).collect();
            parts.extend((!part.is_empty()).then_some((curve, part)));
        }
    }
    parts
}

/// The ranges of both axes; the page's.
pub(super) fn ranges(figure: &Figure) -> ((f64, f64), (f64, f64)) {
    let known = || figure.curves.iter().flat_map(|c| c.points.iter().filter_map(|p| Some((p.0, p.1?))));
    (spread(known().map(|p| p.0), 0.0), spread(known().map(|p| p.1), 0.06))
}

/// Draws a figure; nothing where there is no room for it.
pub(super) fn draw(frame: &mut Frame<'_>, area: Rect, figure: &Figure) {
    let [top, below] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(area);
    frame.render_widget(caption(figure, top.width), top);
    if below.height < 2 || below.width < 12 {
        return;
    }
    let (xs, ys) = ranges(figure);
    // A cell has two columns of dots.
    let parts = parts(figure, 2 * usize::from(below.width));
    let sets = parts.iter().map(|(curve, part)| {
        let kind = if part.len() > 1 { GraphType::Line } else { GraphType::Scatter };
        Dataset::default().marker(Marker::Braille).graph_type(kind).style(style(curve)).data(part)
    });
    // The ends of values are no round numbers and need a digit more than a page's labels between them; steps are whole.
    let axis = |range: (f64, f64), finer: f64, count: usize| {
        let at = |i: usize| range.0 + (range.1 - range.0) * i as f64 / (count - 1) as f64;
        let text = |x: f64| label(x, (range.0, range.0 + (range.1 - range.0) / finer));
        let labels = (0..count).map(|i| Line::from(if text(at(i)) == "-0" { "0".into() } else { text(at(i)) }));
        Axis::default().bounds([range.0, range.1]).labels(labels).style(Style::new().add_modifier(Modifier::DIM))
    };
    let x = match below.height + 1 >= LABELLED {
        true => axis(xs, 1.0, if below.width < 60 { 2 } else { 3 }),
        false => Axis::default().bounds([xs.0, xs.1]),
    };
    let y = axis(ys, 10.0, if below.height < 6 { 2 } else { 3 });
    frame.render_widget(Chart::new(sets.collect()).legend_position(None).x_axis(x).y_axis(y), below);
}
