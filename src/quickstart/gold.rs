//! The gold rule: it labels the quickstart's preferences and scores its results, and PPO never uses it. It is a sum of parts,
//! so that a policy that exploits the learned reward shows in them. It does not depend on the model. Read `task.rs` next.

use std::collections::HashSet;

use serde::Serialize;

use super::grammar::{Polarity, grammar};
use super::task::Row;

/// The score of an answer: `total = 3 polarity + 2 aspect + 2 place + 2 form - repeats`, at most 9.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Gold {
    /// The weighted sum of the parts.
    pub total: f64,
    /// Mean over sentences of +1 (more praise than blame), -1 or 0; 0 without a sentence. In [-1, 1].
    pub polarity: f64,
    /// 1 if the first sentence names the asked aspect.
    pub aspect: u32,
    /// 1 if the answer names the asked place and no other place.
    pub place: u32,
    /// 1 if the answer is complete, ends with a full stop, and has 2 to 4 sentences and 12 to 40 words.
    pub form: u32,
    /// Number of repeated sentences and repeated judging words.
    pub repeats: u32,
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_ascii_alphabetic()).filter(|word| !word.is_empty())
}

/// Scores one answer. `ended`: it ended with the end token, not at the length limit. A sentence ends with a full stop; words
/// are runs of ASCII letters; names and words are case-sensitive.
pub fn gold(row: &Row, text: &str, ended: bool) -> Gold {
    let blank = [' ', '\n'];
    let mut sentences: Vec<&str> = text.split('.').map(|s| s.trim_matches(blank)).collect();
    sentences.pop(); // what follows the last full stop
    let judged: i32 = sentences.iter().map(|sentence| leaning(sentence)).sum();
    let polarity = if sentences.is_empty() { 0.0 } else { f64::from(judged) / sentences.len() as f64 };
    let aspect = u32::from(sentences.first().is_some_and(|first| words(first).any(|word| word == row.aspect)));
    let named = grammar().kinds.iter().flat_map(|kind| &kind.names).filter(|name| text.contains(name.as_str()));
    let place = u32::from(named.eq([row.name]));
    let well_formed = ended
        && text.trim_end_matches(blank).ends_with('.')
        && (2..=4).contains(&sentences.len())
        && (12..=40).contains(&words(text).count());
    let form = u32::from(well_formed);
    let judging = words(text).filter(|word| grammar().judges(word) != Polarity::Plain);
    let repeats = beyond_first(sentences.iter().copied()) + beyond_first(judging);
    let total =
        3.0 * polarity + 2.0 * f64::from(aspect) + 2.0 * f64::from(place) + 2.0 * f64::from(form) - f64::from(repeats);
    Gold { total, polarity, aspect, place, form, repeats }
}

/// Sign of the number of praising words minus that of blaming words.
fn leaning(sentence: &str) -> i32 {
    let balance: i32 = words(sentence)
        .map(|word| match grammar().judges(word) {
            Polarity::Good => 1,
            Polarity::Bad => -1,
            Polarity::Plain => 0,
        })
        .sum();
    balance.signum()
}

fn beyond_first<'a>(items: impl Iterator<Item = &'a str>) -> u32 {
    let mut seen = HashSet::new();
    items.filter(|item| !seen.insert(*item)).count() as u32
}
