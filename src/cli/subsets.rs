//! The accuracy of `score` by a column of the records, as RewardBench has it by `subset`. It does not depend on the model. Read
//! `score.rs` for where the scores come from.

use std::collections::BTreeSet;

use anyhow::Result;
use serde_json::{Value, json};

use crate::config::Data;
use crate::data::stream::columns::{Columns, columns};
use crate::invalid;
use crate::report::number;
use crate::reward::train as reward;
use crate::stats::{Share, mean};
use crate::watch::in_a_line;

/// The column that RewardBench's files have.
const USUAL: &str = "subset";

/// The column by whose values the accuracy is broken down.
pub(super) fn column(by: Option<&str>) -> &str {
    by.unwrap_or(USUAL)
}

/// What each of `entries` holds in the column `by`, or else in `subset` if the first of them has that: `None` without either.
/// `entries`: the records' numbers among all usable ones, ascending.
///
/// # Errors
/// If the files cannot be read, or a record lacks the column `by`.
pub(super) fn names(data: &Data, entries: &[usize], by: Option<&str>) -> Result<Option<Vec<String>>> {
    let read = |wanted: &[usize]| columns(data, &wanted.iter().copied().collect::<BTreeSet<_>>());
    let column = column(by);
    let value =
        |found: &Columns, entry: &usize| found.get(entry).and_then(|record| record.columns.get(column)).cloned();
    if by.is_none() {
        let Some(first) = entries.first() else { return Ok(None) };
        if value(&read(&[*first])?, first).is_none() {
            return Ok(None);
        }
    }
    let found = read(entries)?;
    let name = |entry: &usize| match value(&found, entry) {
        Some(Value::String(text)) => Ok(text),
        None | Some(Value::Null) if by.is_none() => Ok("(none)".to_owned()),
        None | Some(Value::Null) => {
            let record = found.get(entry).map_or(Value::Null, |record| record.id.clone());
            Err(invalid!(
                "--by {column}: record {record} has no such column; name one that every record has, or leave --by out"
            ))
        }
        Some(other) => Ok(other.to_string()),
    };
    entries.iter().map(name).collect::<Result<_>>().map(Some)
}

/// The comparisons of one subset.
pub(super) struct Subset {
    name: String,
    pairs: usize,
    accuracy: Share,
}

/// Accuracy of each subset, in the order in which they first appear; those without a comparison are left out. `names` and
/// `scores`: one per record, best response first.
///
/// # Errors
/// If a score is NaN or infinite.
pub(super) fn accuracies(names: &[String], scores: &[Vec<f32>]) -> Result<Vec<Subset>> {
    let mut groups: Vec<(&str, Vec<Vec<f32>>)> = vec![];
    for (name, scores) in names.iter().zip(scores).filter(|(_, scores)| scores.len() > 1) {
        match groups.iter_mut().find(|(known, _)| known == name) {
            Some((_, group)) => group.push(scores.clone()),
            None => groups.push((name, vec![scores.clone()])),
        }
    }
    let subset = |(name, scores): (&str, Vec<Vec<f32>>)| {
        let found = reward::summarise(&scores)?;
        let (name, pairs) = (name.to_owned(), found.pairs);
        Ok(Subset { name, pairs, accuracy: Share::of(found.accuracy, pairs) })
    };
    groups.into_iter().map(subset).collect()
}

/// The mean of the subsets' accuracies, in which a small one counts as much as a large one; NaN without any.
pub(super) fn mean_accuracy(subsets: &[Subset]) -> f64 {
    mean(&subsets.iter().map(|subset| subset.accuracy.rate).collect::<Vec<_>>())
}

/// One object per subset: name, pairs, accuracy and its 95% interval.
pub(super) fn to_json(subsets: &[Subset]) -> Value {
    let one = |subset: &Subset| {
        let Share { rate, low, high } = subset.accuracy;
        json!({ "subset": subset.name, "pairs": subset.pairs, "accuracy": number(rate), "low": number(low), "high": number(high) })
    };
    subsets.iter().map(one).collect()
}

/// The table in words, with a last line for the mean, and a column for each member of an ensemble: the same subsets by its own
/// scores.
pub(super) fn table(subsets: &[Subset], members: &[&[Subset]]) -> String {
    // A name is text of the records: none of it may be an instruction to the terminal.
    let names: Vec<String> = subsets.iter().map(|subset| in_a_line(&subset.name)).collect();
    let width = names.iter().map(|name| name.chars().count()).chain([6]).max().unwrap_or(6);
    let row = |of: &dyn Fn(usize, &[Subset]) -> String| -> String {
        members.iter().enumerate().map(|(number, member)| format!("  {:>9}", of(number, member))).collect()
    };
    let mut text = format!("{:width$}  {:>6}  accuracy  95% interval", "subset", "pairs");
    text += if members.is_empty() { "" } else { "  " };
    text += &format!("{}\n", row(&|number, _| format!("member {number}")));
    for (i, (name, Subset { pairs, accuracy, .. })) in names.iter().zip(subsets).enumerate() {
        let Share { rate, low, high } = accuracy;
        // Rounding errors of the interval at 0 and 1.
        let (low, high) = (low.max(0.0), high.min(1.0));
        text += &format!("{name:width$}  {pairs:>6}  {rate:>8.3}  {low:.3} to {high:.3}");
        text += &format!("{}\n", row(&|_, member| format!("{:.3}", member[i].accuracy.rate)));
    }
    text += &format!("{:width$}  {:>6}  {:>8.3}", "mean", "", mean_accuracy(subsets));
    let interval = if members.is_empty() { String::new() } else { " ".repeat(16) };
    text + &format!("{interval}{}\n", row(&|_, member| format!("{:.3}", mean_accuracy(member))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_counted_by_subset_and_the_mean_weighs_subsets_alike() {
        let names: Vec<String> = ["chat", "safety", "chat", "chat", "alone"].map(str::to_owned).into();
        let scores = [vec![2.0, 1.0], vec![0.0, 1.0], vec![1.0, 1.0], vec![3.0, 2.0, 4.0], vec![5.0]];
        let subsets = accuracies(&names, &scores).unwrap();
        // Chat: right, a tie (which is not right), and of three responses one pair in three.
        let found: Vec<_> = subsets.iter().map(|s| (s.name.as_str(), s.pairs, s.accuracy.rate)).collect();
        assert_eq!(found, [("chat", 5, 0.4), ("safety", 1, 0.0)]);
        assert_eq!(mean_accuracy(&subsets), 0.2);
        let table = table(&subsets, &[]);
        // Wilson's interval of 2 in 5 is 0.118 to 0.769.
        assert!(table.contains("chat         5     0.400  0.118 to 0.769\n"), "{table}");
        assert!(table.ends_with("mean               0.200\n"), "{table}");
        let steering = ["a\u{1b}[2Jb", "c\nd"].map(str::to_owned);
        let shown = super::table(&accuracies(&steering, &scores[..2]).unwrap(), &[]);
        assert!(shown.contains("a␛[2Jb") && shown.contains("c␊d") && !shown.contains('\u{1b}'), "{shown}");
        assert_eq!(shown.lines().count(), 4, "{shown}");
        // A member that has both comparisons of `chat` with two responses wrong.
        let other =
            accuracies(&names, &[vec![1.0, 2.0], vec![1.0, 0.0], vec![0.0, 1.0], vec![3.0, 2.0, 4.0], vec![5.0]]);
        let shown = super::table(&subsets, &[&subsets, &other.unwrap()]);
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0], "subset   pairs  accuracy  95% interval     member 0   member 1", "{shown}");
        assert_eq!(lines[1], "chat         5     0.400  0.118 to 0.769      0.400      0.200");
        assert_eq!(lines[3], "mean               0.200                      0.200      0.600");
        let json = to_json(&subsets);
        assert_eq!(
            (&json[0]["subset"], &json[0]["pairs"], &json[1]["accuracy"]),
            (&json!("chat"), &json!(5), &json!(0.0))
        );
        assert!((json[1]["high"].as_f64().unwrap() - 0.793_456_7).abs() < 1e-6, "{json}");
    }
}
