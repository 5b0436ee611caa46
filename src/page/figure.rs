//! A figure: curves over steps, drawn by `plotters` as SVG, with the values behind them for the page's script. It does not
//! depend on what the curves are of.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use serde_json::{Value, json};

use super::html::{escape, short};
use super::thin::{Point, thin};

/// Size of the drawing in its own units; the page scales it.
const SIZE: (u32, u32) = (440, 240);
/// Curves that have a colour of their own.
pub(super) const COLOURS: usize = 8;

/// A curve of a figure.
#[derive(Clone, Debug, Default)]
pub(crate) struct Curve {
    pub name: String,
    pub points: Vec<Point>,
    /// (step, lower end, upper end) of a band around it.
    pub band: Vec<(f64, f64, f64)>,
    /// The colour's number.
    pub colour: usize,
    /// A constant that is drawn through, such as a target.
    pub is_rule: bool,
}

/// A figure with its text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figure {
    /// The name by which the page links to it.
    pub id: String,
    pub title: String,
    pub note: String,
    pub curves: Vec<Curve>,
    /// The horizontal axis; empty = step.
    pub x: &'static str,
}

/// A figure as HTML, and what the page's script reads of it.
pub(crate) struct Drawn {
    pub html: String,
    pub data: Value,
}

// The drawing's colours, by which the page's classes are found again: `styled` replaces them.
const fn line_colour(i: usize) -> RGBColor {
    RGBColor(1, 2, 16 + (i % COLOURS) as u8)
}
const fn band_colour(i: usize) -> RGBColor {
    RGBColor(1, 3, 16 + (i % COLOURS) as u8)
}
const GRID: RGBColor = RGBColor(1, 4, 16);

impl Figure {
    /// Whether there is anything to draw.
    pub fn is_empty(&self) -> bool {
        self.curves.iter().all(|curve| curve.is_rule || curve.points.iter().all(|p| p.1.is_none()))
    }

    /// Draws it with at most about `2 * stretches` points per curve.
    ///
    /// # Errors
    /// Only if the library fails.
    pub fn draw(&self, stretches: usize) -> Result<Drawn> {
        let curves: Vec<Curve> = self
            .curves
            .iter()
            .map(|curve| {
                let step = curve.band.len().div_ceil(stretches).max(1);
                let band = curve.band.iter().step_by(step).chain(curve.band.last().filter(|_| step > 1));
                Curve { points: thin(&curve.points, stretches), band: band.copied().collect(), ..curve.clone() }
            })
            .collect();
        let known = || curves.iter().flat_map(|c| c.points.iter().filter_map(|p| Some((p.0, p.1?))));
        let bands = || curves.iter().flat_map(|c| c.band.iter());
        let xs = spread(known().map(|p| p.0), 0.0);
        let ys = spread(known().map(|p| p.1).chain(bands().flat_map(|b| [b.1, b.2])), 0.06);
        let longest = [ys.0, ys.1].map(|y| label(y, ys).len()).into_iter().max().unwrap_or(0) as i32;
        let mut svg = String::new();
        let frame = {
            let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            let mut chart = ChartBuilder::on(&root)
                .margin(4)
                .margin_right(14)
                .x_label_area_size(24)
                .y_label_area_size((longest * 9 + 12).clamp(40, 120))
                .build_cartesian_2d(xs.0..xs.1, ys.0..ys.1)
                .map_err(failed)?;
            chart
                .configure_mesh()
                .disable_x_mesh()
                .x_labels(6)
                .y_labels(5)
                .x_label_formatter(&|x| label(*x, xs))
                .y_label_formatter(&|y| label(*y, ys))
                .label_style(("sans-serif", 17))
                .axis_style(GRID)
                .bold_line_style(GRID)
                .light_line_style(TRANSPARENT)
                .draw()
                .map_err(failed)?;
            for curve in curves.iter().filter(|curve| curve.band.len() > 1) {
                let upper = curve.band.iter().map(|b| (b.0, b.2));
                let around: Vec<_> = upper.chain(curve.band.iter().rev().map(|b| (b.0, b.1))).collect();
                let band = Polygon::new(around, band_colour(curve.colour));
                chart.draw_series(std::iter::once(band)).map_err(failed)?;
            }
            for curve in &curves {
                let style = line_colour(curve.colour).stroke_width(if curve.is_rule { 1 } else { 2 });
                for part in curve.points.split(|p| p.1.is_none()) {
                    let part: Vec<(f64, f64)> = part.iter().filter_map(|p| Some((p.0, p.1?))).collect();
                    match part[..] {
                        [] => {}
                        [one] => {
                            let dot = Circle::new(one, 3, line_colour(curve.colour).filled());
                            chart.draw_series(std::iter::once(dot)).map_err(failed)?;
                        }
                        _ => {
                            let path = PathElement::new(part, style);
                            chart.draw_series(std::iter::once(path)).map_err(failed)?;
                        }
                    }
                }
            }
            let (x, y) = chart.plotting_area().get_pixel_range();
            root.present().map_err(failed)?;
            [x.start, x.end, y.start, y.end]
        };
        let data = json!({
            "h": self.x,
            "f": frame,
            "x": [xs.0, xs.1],
            "y": [ys.0, ys.1],
            "s": curves.iter().map(|curve| json!({
                "n": curve.name,
                "c": curve.colour % COLOURS,
                "p": curve.points.iter().map(|p| [compact(p.0), p.1.map_or(Value::Null, compact)]).collect::<Vec<_>>(),
            })).collect::<Vec<_>>(),
        });
        Ok(Drawn { html: self.html(&styled(svg)), data })
    }

    fn html(&self, svg: &str) -> String {
        let keys = self.curves.iter().map(|curve| {
            // Of a distribution, the last value is no result.
            let last = curve.points.iter().rev().find_map(|p| p.1).filter(|_| self.x.is_empty());
            let last = last.map_or_else(String::new, short);
            let name = escape(&curve.name);
            format!("<span class=key><i class=\"k{}\"></i>{name} <b>{last}</b></span>", curve.colour % COLOURS)
        });
        let missing: usize = self.curves.iter().map(|c| c.points.iter().filter(|p| p.1.is_none()).count()).sum();
        let gaps = match missing {
            0 => String::new(),
            1 => "<p class=bad>1 value is NaN or infinite: the gap in the curve.</p>".into(),
            n => format!("<p class=bad>{n} values are NaN or infinite: the gaps in the curve.</p>"),
        };
        let note =
            if self.note.is_empty() { String::new() } else { format!("<p class=say>{}</p>", escape(&self.note)) };
        format!(
            "<figure id=\"{id}\" data-c=\"{id}\" tabindex=0><figcaption><h3>{title}</h3><div class=keys>{keys}</div>\
             </figcaption>{svg}{gaps}{note}</figure>",
            id = escape(&self.id),
            title = escape(&self.title),
            keys = keys.collect::<String>(),
        )
    }
}

/// An axis' label with as many digits as tell it from the next. What is nothing beside the axis' range is 0, where sums of
/// steps leave a rounding.
pub(crate) fn label(x: f64, (low, high): (f64, f64)) -> String {
    let (size, step) = (low.abs().max(high.abs()), (high - low) / 5.0);
    if x.abs() < (high - low) * 1e-9 {
        return "0".into();
    }
    let digits = |of: f64| (of / step).log10().ceil().clamp(0.0, 9.0) as usize;
    if !(1e-3..1e6).contains(&size) {
        let digits = digits(size).min(4);
        return format!("{x:.digits$e}").replace(".0e", "e");
    }
    let digits = digits(1.0);
    let text = format!("{x:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("drawing a curve: {error}")
}

/// The least and the greatest value, `margin` of the range wider; wide enough for an axis to have labels.
pub(crate) fn spread(values: impl Iterator<Item = f64>, margin: f64) -> (f64, f64) {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
    // Beyond this, sums of the axis' labels are infinite.
    let (low, high) = (low.max(-1e300), high.min(1e300));
    let size = low.abs().max(high.abs());
    // Below the second bound, steps between labels underflow.
    if high - low <= (size * 1e-9).max(1e-290) {
        return if size < 1e-280 { (-0.05, 1.0) } else { (low - size * 0.1, high + size * 0.1) };
    }
    let more = (high - low) * margin;
    (low - more, high + more)
}

/// A number in JSON, whole ones without ".0".
fn compact(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { Value::from(x as i64) } else { Value::from(x) }
}

/// The drawing with the page's classes in place of its colours, so that light, dark and print each have their own, and
/// without its own size.
fn styled(svg: String) -> String {
    let hex = |c: RGBColor| format!("#{:02X}{:02X}{:02X}", c.0, c.1, c.2);
    let mut svg = svg;
    for i in 0..COLOURS {
        svg = svg.replace(&format!("stroke=\"{}\"", hex(line_colour(i))), &format!("class=\"l{i}\""));
        svg = svg.replace(&format!("fill=\"{}\"", hex(line_colour(i))), &format!("class=\"d{i}\""));
        svg = svg.replace(&format!("fill=\"{}\"", hex(band_colour(i))), &format!("class=\"b{i}\""));
    }
    svg = svg.replace(&format!("stroke=\"{}\"", hex(GRID)), "class=\"g\"");
    let size = format!("width=\"{}\" height=\"{}\" ", SIZE.0, SIZE.1);
    svg.replacen(&size, "role=\"img\" ", 1).replace("\n<", "<")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_has_its_curves_classes_and_every_value_it_was_given() {
        let points = vec![(1.0, Some(0.1)), (2.0, Some(-0.123_456_789_012_345)), (3.0, None), (4.0, Some(2.0))];
        let curve =
            Curve { name: "a <b>".into(), points, band: vec![(1.0, 0.0, 0.2), (4.0, 1.0, 3.0)], ..Curve::default() };
        let figure = Figure { id: "c1".into(), title: "T".into(), curves: vec![curve], ..Figure::default() };
        let Drawn { html, data } = figure.draw(100).unwrap();
        assert!(
            html.contains("class=\"l0\"") && html.contains("class=\"b0\"") && html.contains("class=\"d0\""),
            "{html}"
        );
        assert!(html.contains("a &lt;b&gt; <b>2</b>") && html.contains("1 value is NaN"), "{html}");
        assert!(!html.contains("#01") && !html.contains("width=\"440\""), "{html}");
        assert_eq!(data["s"][0]["p"].to_string(), "[[1,0.1],[2,-0.123456789012345],[3,null],[4,2]]");
    }

    #[test]
    fn labels_have_the_digits_that_tell_them_apart() {
        let labels = |range: (f64, f64)| [0.25, 0.5].map(|share| label(range.0 + share * (range.1 - range.0), range));
        assert_eq!(labels((0.0, 4.0)), ["1", "2"]);
        assert_eq!(labels((1.0, 1.000_000_4)), ["1.0000001", "1.0000002"]);
        assert_eq!(labels((0.0, 4e-7)), ["1e-7", "2e-7"]);
        assert_eq!(labels((0.0, 4e9)), ["1e9", "2e9"]);
        assert_eq!(label(1.7e-18, (-0.01, 0.01)), "0");
    }

    #[test]
    fn the_range_of_any_values_has_labels() {
        for values in [
            vec![],
            vec![0.0],
            vec![3.0, 3.0],
            vec![1e300, -1e300, f64::MAX],
            vec![1.0, 1.0 + 1e-15],
            vec![5e-324, 0.0],
        ] {
            let points = values.iter().enumerate().map(|(i, v)| (i as f64, Some(*v))).collect();
            let curve = Curve { points, ..Curve::default() };
            Figure { curves: vec![curve], ..Figure::default() }.draw(10).unwrap();
        }
    }
}
