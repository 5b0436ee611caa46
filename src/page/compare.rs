//! Several runs on one page: a chart for each metric with a curve for each run over common axes, and what differs in their
//! settings. It does not depend on a stage.

use std::collections::BTreeSet;

use super::catalogue::{CHARTS, NO_CURVE, is_bound, matches};
use super::document::derived;
use super::figure::{Curve, Figure};
use super::html::table;
use super::run_files::RunFiles;
use super::settings::keys;

/// The runs' names, told apart where folders have the same.
pub(super) fn names(runs: &[RunFiles]) -> Vec<String> {
    let is_double = |name: &str| runs.iter().filter(|run| run.name == name).count() > 1;
    runs.iter()
        .map(|run| if is_double(&run.name) { run.path.display().to_string() } else { run.name.clone() })
        .collect()
}

/// (stage, its figures) in the order of the stages.
pub(super) fn figures(runs: &[RunFiles]) -> Vec<(String, Vec<Figure>)> {
    let mut stages: Vec<&str> = vec![];
    for stage in runs.iter().flat_map(|run| &run.stages) {
        if !stages.contains(&stage.name.as_str()) {
            stages.push(&stage.name);
        }
    }
    let names = names(runs);
    let mut all = vec![];
    for stage in stages {
        let of = |run: &RunFiles| run.stages.iter().find(|s| s.name == stage).map(|s| derived(run, s));
        let columns: Vec<_> = runs.iter().map(of).collect();
        let present: BTreeSet<&str> = columns.iter().flatten().flatten().map(|(key, _)| key.as_str()).collect();
        // In the catalogue's order, then whatever else there is.
        let mut order: Vec<&str> = vec![];
        for key in CHARTS.iter().flat_map(|chart| chart.keys) {
            order.extend(present.iter().filter(|column| matches(key, column)));
        }
        order.extend(present.iter().filter(|key| !CHARTS.iter().any(|c| c.keys.iter().any(|k| matches(k, key)))));
        let mut figures = vec![];
        for key in order.into_iter().filter(|key| !NO_CURVE.contains(key) && !is_bound(key)) {
            let curves = columns.iter().enumerate().filter_map(|(i, columns)| {
                let (_, points) = columns.as_ref()?.iter().find(|(name, _)| name == key)?;
                Some(Curve { name: names[i].clone(), points: points.clone(), colour: i, ..Curve::default() })
            });
            let id = format!("c-{stage}-{}", figures.len());
            let figure = Figure { id, title: key.into(), curves: curves.collect(), ..Figure::default() };
            figures.extend((!figure.is_empty()).then_some(figure));
        }
        all.push((stage.to_owned(), figures));
    }
    all
}

/// A table of the settings that differ between the runs.
pub(super) fn differences(runs: &[RunFiles]) -> String {
    let settings: Vec<_> =
        runs.iter().map(|run| run.settings.as_ref().map(|(_, table)| keys(table)).unwrap_or_default()).collect();
    let all: BTreeSet<&String> = settings.iter().flat_map(|keys| keys.keys()).collect();
    let mut rows = vec![[vec!["key".to_owned()], names(runs)].concat()];
    for key in all {
        let values: Vec<&str> = settings.iter().map(|keys| keys.get(key).map_or("not set", |value| value)).collect();
        if values.iter().any(|value| *value != values[0]) {
            rows.push([key.as_str()].into_iter().chain(values).map(str::to_owned).collect());
        }
    }
    match rows.len() {
        1 => "<p class=say>Their settings are equal.</p>".into(),
        _ => table(&rows),
    }
}
