//! What samples.jsonl says of each token of a response: its text, its log-ratio to the reference, its advantage and its
//! value, so that one sees where the reward lands. It does not depend on a tokenizer. Read `metrics.rs` for the samples.

use serde_json::{Map, Value};

use super::experience::Experience;
use crate::report::number;

/// Iterations of a run whose samples have details, about; the rest would fill the disk.
const ITERATIONS: usize = 40;

/// Whether the samples of an iteration (counted from 1) have details: of the first, the last, and some between.
pub fn is_due(iteration: usize, iterations: usize) -> bool {
    iteration == 1 || iteration == iterations || iteration.is_multiple_of(iterations.div_ceil(ITERATIONS).max(1))
}

/// `tokens`, `advantages`, with a reference `log_ratio` and with a critic `values` of the response `row`.
pub fn of(experience: &Experience, row: usize, decode: &dyn Fn(&[u32]) -> String) -> Map<String, Value> {
    let (rollout, response) = (&experience.rollout, &experience.rollout.responses[row]);
    let mut detail = Map::new();
    detail.insert("tokens".into(), texts(&response.tokens, decode).into());
    if let Some(reference) = rollout.ref_logprobs.get(row) {
        let log_ratio = response.logprobs.iter().zip(reference).map(|(a, b)| a - b);
        detail.insert("log_ratio".into(), log_ratio.map(rounded).collect());
    }
    detail.insert("advantages".into(), experience.advantages[row].iter().copied().map(rounded).collect());
    if let Some(values) = rollout.values.get(row) {
        detail.insert("values".into(), values.iter().copied().map(rounded).collect());
    }
    detail
}

/// Four significant digits.
fn rounded(x: f32) -> Value {
    number(format!("{x:.3e}").parse().unwrap_or(f64::NAN))
}

/// The text that each token adds. A character that several tokens make is the last one's; a special token has none.
fn texts(tokens: &[u32], decode: &dyn Fn(&[u32]) -> String) -> Vec<String> {
    let mut texts = vec![];
    // What is decoded begins a little before the new tokens, since a token's text depends on its neighbours.
    let (mut start, mut read) = (0, 0);
    let mut known = String::new();
    for end in 1..=tokens.len() {
        let text = decode(&tokens[start..end]);
        let is_whole = end == tokens.len() || !text.ends_with('\u{fffd}');
        match text.strip_prefix(&known).filter(|new| is_whole && !new.is_empty()) {
            Some(new) => {
                texts.push(new.to_owned());
                (start, read) = (read, end);
                known = decode(&tokens[start..read]);
            }
            None => texts.push(String::new()),
        }
    }
    texts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokens_texts_are_the_response_and_a_split_character_is_its_last_tokens() {
        let bytes = "Ab é👩\u{200d}💻 c".as_bytes();
        let tokens: Vec<u32> = bytes.iter().map(|&b| u32::from(b)).chain([999]).collect();
        // Bytes are tokens, and 999 is a special token; a space at the start is dropped, as by SentencePiece.
        let decode = |ids: &[u32]| {
            let bytes: Vec<u8> = ids.iter().filter(|&&id| id < 256).map(|&id| id as u8).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let found = texts(&tokens, &decode);
        assert_eq!(found.len(), tokens.len());
        assert_eq!(found.concat(), "Ab é👩\u{200d}💻 c");
        assert_eq!((found[3].as_str(), found[4].as_str(), found.last().unwrap().as_str()), ("", "é", ""));
    }

    #[test]
    fn a_long_run_has_about_forty_iterations_with_details() {
        for iterations in [1, 7, 40, 41, 2_000, 20_000] {
            let due = (1..=iterations).filter(|&i| is_due(i, iterations)).count();
            assert!(is_due(1, iterations) && is_due(iterations, iterations));
            assert!((iterations.min(20)..=42).contains(&due), "{iterations}: {due}");
        }
    }
}
