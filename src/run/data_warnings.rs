//! Warnings about what became of the records of `[data]`: many were dropped, or fewer than asked are held out. Each names
//! the key to change and what that would keep. It does not depend on a stage. Read `foreseen.rs` for what a stage will refuse.

use crate::config::{Data, EvalSize, Truncation};
use crate::data::Prepared;
use crate::data::examples::objectives::Report;
use crate::data::examples::{Example, Examples as _};
use crate::error::counted;

/// The share of dropped records above which there is a warning.
const DROPPED: f64 = 0.2;
/// The share of the records that a proposed limit keeps, if a limit can.
const KEPT: f64 = 0.95;

/// Warnings about what was made of the records and how it is split into training and held-out sequences; none where all is usual.
pub fn data_warnings<T: Example>(prepared: &Prepared<T>, data: &Data) -> Vec<String> {
    let (train, held_out) = (prepared.train.len(), prepared.held_out.len());
    let mut warnings = warnings_of(&prepared.report, data, [train, held_out], prepared.prompts);
    if let Some(first) = prepared.ignored.first() {
        let (count, first) = (prepared.ignored.len(), first.display());
        let are = if count == 1 { "is" } else { "are" };
        let of = counted(count, if prepared.ignored.iter().any(|path| path.is_dir()) { "path" } else { "file" });
        warnings.push(format!("[data] {of} {are} not read; the first: {first}"));
    }
    warnings
}

fn warnings_of(report: &Report, data: &Data, [train, held_out]: [usize; 2], prompts: Option<usize>) -> Vec<String> {
    let mut warnings = vec![];
    let dropped: usize = report.dropped.values().sum();
    if dropped as f64 > DROPPED * report.read as f64 {
        let percent = 100.0 * dropped as f64 / report.read as f64;
        let of = counted(report.read, "record");
        let mut text =
            format!("[data] {dropped} of {of} {} dropped ({percent:.0}%)", if dropped == 1 { "is" } else { "are" });
        for (limit, needed) in &report.needed {
            let (value, kept) = proposal(report.read - dropped, needed);
            text.push_str(&format!("; {limit} = {value} would keep {kept}"));
            if limit == "max_length" && data.truncation == Truncation::Drop {
                text.push_str(", or truncation = \"left\" those whose response fits");
            }
        }
        if let Some(first) = &report.first_bad {
            text.push_str(&format!("; on_bad_record = \"error\" stops at the first bad one: {first}"));
        }
        if report.needed.is_empty() && report.first_bad.is_none() {
            let reasons: Vec<String> = report.dropped.iter().map(|(reason, n)| format!("{n} {reason}")).collect();
            text.push_str(&format!(": {}", reasons.join(", ")));
        }
        warnings.push(text);
    }
    let all = train + held_out;
    let wanted = match (data.eval_rows, data.eval_fraction) {
        (Some(rows), _) => Some((rows, format!("eval_rows = {rows}"))),
        (None, Some(share)) => Some(((share * all as f64).round() as usize, format!("eval_fraction = {share}"))),
        (None, None) => None,
    };
    // A fraction of few sequences is one.
    let few = wanted.filter(|(rows, text)| {
        all > 1 && (*rows).min(all / 2) > 2 * held_out || held_out == 0 && all > 1 && !text.ends_with(" 0")
    });
    if let Some((_, asked)) = few {
        let held = if held_out == 0 { "none".to_owned() } else { held_out.to_string() };
        let of = prompts.map(|prompts| format!(" of {}", counted(prompts, "prompt"))).unwrap_or_default();
        warnings.push(format!(
            "[data] {asked} of {all} sequences{of}: {held} can be held out, since all sequences of one prompt stay on one side; set a \
             larger number, or give records with more prompts"
        ));
    }
    let asked = match data.eval_size() {
        EvalSize::Rows(rows) if rows > all / 2 => Some(format!("eval_rows = {rows}")),
        EvalSize::Fraction(share) if share > 0.5 && all > 1 => Some(format!("eval_fraction = {share}")),
        _ => None,
    };
    if let Some(asked) = asked {
        warnings.push(format!(
            "[data] {asked} of {all} sequences: {held_out} are held out and {train} trained on, since held-out rows never \
             outnumber training rows"
        ));
    }
    warnings
}

/// A limit and how many records it keeps: beside the `kept` ones, those that need no more tokens.
fn proposal(kept: usize, needed: &std::collections::BTreeMap<usize, usize>) -> (usize, usize) {
    let all = kept + needed.values().sum::<usize>();
    let wanted = (KEPT * all as f64).ceil() as usize;
    let mut sum = kept;
    let reaching = needed.iter().find(|(_, records)| {
        sum += **records;
        sum >= wanted
    });
    let longest = needed.keys().next_back().copied().unwrap_or(0);
    let tokens = reaching.map_or(longest, |(tokens, _)| *tokens);
    // A round number, unless the longest record is nearer.
    let value = tokens.next_multiple_of(64).min(longest);
    (value, kept + needed.range(..=value).map(|(_, records)| records).sum::<usize>())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn report(read: usize, needed: &[(usize, usize)]) -> Report {
        let dropped: usize = needed.iter().map(|(_, n)| n).sum();
        Report {
            read,
            kept: read - dropped,
            dropped: BTreeMap::from([("longer than max_length = 32".to_owned(), dropped)]),
            needed: BTreeMap::from([("max_length".to_owned(), needed.iter().copied().collect())]),
            ..Report::default()
        }
    }

    #[test]
    fn many_dropped_records_name_the_limit_that_keeps_nearly_all() {
        let data = Data { max_length: 32, ..Data::default() };
        // 9 records fit; 85 need 100 tokens, 6 need 900.
        let found = warnings_of(&report(100, &[(100, 85), (900, 6)]), &data, [9, 0], None);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("91 of 100 records are dropped (91%)"), "{found:?}");
        assert!(found[0].contains("max_length = 900 would keep 100"), "94 would miss the share: {found:?}");
        let found = warnings_of(&report(100, &[(100, 86), (900, 5)]), &data, [9, 0], None);
        assert!(found[0].contains("max_length = 128 would keep 95"), "{found:?}");
        assert!(found[0].contains("truncation = \"left\""), "{found:?}");
        assert_eq!(
            warnings_of(&report(100, &[(100, 20)]), &data, [76, 4], None),
            Vec::<String>::new(),
            "a fifth is usual"
        );
    }

    #[test]
    fn a_held_out_part_that_was_cut_is_said() {
        let data = Data { eval_rows: Some(6), ..Data::default() };
        let found = warnings_of(&report(7, &[]), &data, [4, 3], Some(2));
        assert!(found.len() == 1 && found[0].contains("eval_rows = 6 of 7 sequences: 3 are held out"), "{found:?}");
        let found = warnings_of(&report(14, &[]), &data, [14, 0], Some(1));
        let says = "eval_rows = 6 of 14 sequences of 1 prompt: none can be held out, since all sequences of one prompt";
        assert!(found.len() == 1 && found[0].contains(says), "{found:?}");
        assert!(warnings_of(&report(12, &[]), &data, [6, 6], Some(12)).is_empty());
    }

    #[test]
    fn bad_records_name_the_first() {
        let mut skipped = report(10, &[]);
        skipped.dropped = BTreeMap::from([("bad".to_owned(), 3)]);
        skipped.first_bad = Some("a.jsonl, line 2: no prompt".into());
        let found = warnings_of(&skipped, &Data::default(), [6, 1], Some(7));
        assert!(found[0].contains("a.jsonl, line 2: no prompt"), "{found:?}");
    }
}
