//! Which part of a text is its final answer. It does not depend on what an answer means. Read `value.rs` next.

use std::sync::LazyLock;

use regex::Regex;

static PHRASE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"(?i)\b(?:the|final)\s+(?:final\s+|correct\s+)?answer\s*(?:is|:|=)\s*:?").expect("a valid pattern")
});

static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    let decimal = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)";
    let fraction = r"\\[dtc]?frac\s*\{\s*-?\d+\s*\}\s*\{\s*-?\d+\s*\}";
    let power = r"(?:[eE][-+]?\d+|\s*(?:\\times|\\cdot|×|\*)\s*10\s*\^\s*(?:\{\s*[-+]?\d+\s*\}|[-+]?\d+))";
    Regex::new(&format!(r"[-+−]?(?:\\?\$)?(?:{fraction}|{decimal}{power}?(?:/\d+)?)(?:\s?\\?%)?"))
        .expect("a valid pattern")
});

/// The final answer of a response: what the last complete `\boxed{…}` holds, else the rest of the line after the last `####`,
/// else the sentence after the last "the answer is", else the last number. `None` if there is none of them.
pub(super) fn final_answer(text: &str) -> Option<&str> {
    boxed(text).or_else(|| after_hashes(text)).or_else(|| after_phrase(text)).or_else(|| last_number(text))
}

/// The answer in a record's column: what the last `\boxed{…}` or `####` marks, as in MATH and GSM8K, else all of it.
pub(super) fn reference(text: &str) -> &str {
    boxed(text).or_else(|| after_hashes(text)).unwrap_or(text)
}

/// What the last complete `\boxed{…}` or `\fbox{…}` holds.
fn boxed(text: &str) -> Option<&str> {
    let mut starts: Vec<usize> =
        ["\\boxed", "\\fbox"].iter().flat_map(|name| text.match_indices(name).map(|(at, _)| at + name.len())).collect();
    starts.sort_unstable();
    starts.into_iter().rev().find_map(|start| {
        let rest = text[start..].trim_start();
        match rest.strip_prefix('{') {
            Some(inside) => inside.get(..closing(inside)?),
            // TeX: without braces, the next character or number.
            None => NUMBER.find(rest).filter(|found| found.start() == 0).map(|found| found.as_str()),
        }
    })
}

/// Where the brace that was opened before `text` is closed.
fn closing(text: &str) -> Option<usize> {
    let (mut depth, mut is_escaped) = (0usize, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '{' => depth += 1,
            '}' if depth == 0 => return Some(at),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

fn after_hashes(text: &str) -> Option<&str> {
    let rest = text.rsplit_once("####")?.1.trim_start_matches(['#', ':', ' ', '\n']);
    rest.lines().next().map(str::trim).filter(|line| !line.is_empty())
}

/// Up to the end of the line or of the sentence: a full stop, question or exclamation mark before a space or the end.
fn after_phrase(text: &str) -> Option<&str> {
    let start = PHRASE.find_iter(text).last()?.end();
    let line = text[start..].trim_start().lines().next()?;
    let ends = line.char_indices().find(|&(at, c)| {
        ".!?".contains(c) && line[at + c.len_utf8()..].chars().next().is_none_or(|next| !next.is_alphanumeric())
    });
    let sentence = line[..ends.map_or(line.len(), |(at, _)| at)].trim();
    (!sentence.is_empty()).then_some(sentence)
}

/// A sign counts unless it joins two terms, as in "5-3".
fn last_number(text: &str) -> Option<&str> {
    let found = NUMBER.find_iter(text).last()?;
    let joins = text[..found.start()]
        .trim_end()
        .chars()
        .next_back()
        .is_some_and(|before| before.is_alphanumeric() || ")}]".contains(before));
    let is_spaced = text[..found.start()].ends_with(' ');
    Some(match joins && !is_spaced {
        true => found.as_str().trim_start_matches(['-', '+', '−']),
        false => found.as_str(),
    })
}
