//! What an answer means: a number, a list of answers, or a text. It does not depend on where the answer stood: read
//! `extract.rs` for that, and `number.rs` for what is read as a number.

use std::sync::LazyLock;

use regex::{Captures, Regex};

use super::number::{Rational, number};

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// A number, without its unit.
    Number {
        value: Rational,
        /// Whether a percent sign stood after it.
        is_percent: bool,
    },
    /// Items in order between these brackets: a tuple, point, interval or matrix row.
    Tuple(char, char, Vec<Value>),
    /// Items in any order: between braces, or without brackets.
    Set(Vec<Value>),
    /// Anything else, in one spelling.
    Text(String),
}

impl Value {
    /// The meaning of an answer's text.
    pub(super) fn of(text: &str) -> Self {
        let text = plain(text);
        // An answer is short; brackets in brackets without end are none.
        if text.len() > LONGEST { Self::Text(text) } else { parse(&text) }
    }

    /// Whether two answers are equal: numbers as rationals (a percentage equals its number with or without the sign: 50% equals
    /// 50 and 1/2), tuples item by item, sets if every item of the one is one of the other, texts in one spelling.
    pub(super) fn equals(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Number { value: a, is_percent: x }, Self::Number { value: b, is_percent: y }) => {
                let (percent, bare) = if *x { (*a, *b) } else { (*b, *a) };
                let hundredth = || Rational::power_of_ten(-2).and_then(|hundredth| percent.times(hundredth));
                a == b || (x != y && hundredth() == Some(bare))
            }
            (Self::Tuple(open, close, a), Self::Tuple(start, end, b)) => {
                open == start && close == end && a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.equals(b))
            }
            (Self::Set(a), Self::Set(b)) => {
                let within = |a: &[Self], b: &[Self]| a.iter().all(|item| b.iter().any(|other| item.equals(other)));
                within(a, b) && within(b, a)
            }
            (Self::Text(a), Self::Text(b)) => a == b,
            _ => false,
        }
    }
}

/// Bytes of the longest answer that is taken apart.
const LONGEST: usize = 1000;

/// Units that a number may have without a space. Other words need a space and three letters.
const UNITS: &str = "km|cm|mm|nm|ft|in|yd|mi|kg|mg|lb|lbs|oz|ml|mL|dl|cl|hr|hrs|min|mins|sec|secs|ms|am|pm|mph|kmh|kph|Hz|kHz|MHz|\
                     kW|kWh|kJ|kN|Pa|kPa|eV|mol|rad|deg|sq|cc";
/// Units that need a space: without it they are the names of variables.
const LETTERS: &str = "m|g|s|h|l|L|N|J|W|V|K|C|F|A";

static SPACES: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\\[ ;:]|~|\\quad\b|\\qquad\b|\s+").expect("a valid pattern"));
static DROPPED: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"\\[,!]|\\(?:left|right|displaystyle|bigl?|bigr?)\b|\\[()\[\]]|\\?[$€£]|\^\s*\{?\s*\\circ\s*\}?|\\degrees?\b|°|[`*]{2,}|`",
    )
    .expect("a valid pattern")
});
static FRAC: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\\[dtc]frac\b").expect("a valid pattern"));
static WORDS: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
        .expect("a valid pattern")
});
static NAME: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^[A-Za-z](?:\([A-Za-z]\))?\s*(?:=|\\in\b)\s*([^=]+)$").expect("a valid pattern"));
static UNIT: LazyLock<Regex> = LazyLock::new(|| {
    let word = format!(r"(?:{UNITS}|{LETTERS}|[A-Za-z]{{3,}}|of|a|an|per|to)");
    let power = r"(?:\s*\^\s*\{?[23]\}?|[²³])?";
    Regex::new(&format!(
        r"^(.*[\d}}.])(?:\s*(?:{UNITS}){power}(?:\s*/\s*(?:{UNITS}|{LETTERS}){power})?|(?:\s+{word}{power}\.?|\s*/\s*{word}{power})+)$"
    ))
    .expect("a valid pattern")
});
static PERCENT: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^(.*?)\s*(?:\\?%|\bpercent)$").expect("a valid pattern"));
/// Words after a number that are no unit: they change its value, or join it with another.
static FUNCTION: LazyLock<Regex> = LazyLock::new(|| {
    let operations = "sin|cos|tan|cot|csc|log|exp|sqrt|and|or|squared|cubed|factorial|plus|minus|over|mod|choose";
    let numbers = "half|halves|thirds?|tenths?|dozens?|(?:hundred|thousand|million|billion|trillion)(?:s|ths?)?";
    Regex::new(&format!(r"(?i)\b(?:{operations}|{numbers})\b")).expect("a valid pattern")
});
static THOUSANDS: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"^[-+]?\s?\d{1,3}(?:,\d{3})+(?:\.\d+)?\b").expect("a valid pattern"));
static BETWEEN: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\s+(?:and|or)\s+").expect("a valid pattern"));
static ROOT: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\\sqrt\s*(\w)").expect("a valid pattern"));
static SHORT_FRAC: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\\frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\w))").expect("a valid pattern"));
static SHORT_INDEX: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"([\^_])\{(\w)\}").expect("a valid pattern"));

/// One spelling of what only looks different: spaces, signs, fractions, `\text`, dollar and degree signs.
fn plain(text: &str) -> String {
    let text = text.replace(['−', '–'], "-").replace("{,}", ",").replace("\\lbrace", "\\{").replace("\\rbrace", "\\}");
    let text = SPACES.replace_all(&text, " ");
    let text = DROPPED.replace_all(&text, "");
    let text = FRAC.replace_all(&text, "\\frac");
    let text = WORDS.replace_all(&text, |found: &Captures<'_>| format!(" {} ", found[1].trim()));
    let text = SPACES.replace_all(&text, " ");
    let text = text.trim().trim_matches('*').trim_end_matches(['.', ':', ';']).trim();
    text.to_owned()
}

fn parse(text: &str) -> Value {
    let text = NAME.captures(text).map_or(text, |named| named.get(1).map_or(text, |rest| rest.as_str())).trim();
    if let Some((open, inside, close)) = enclosed(text) {
        let items = split(inside, true);
        let values = || items.iter().map(|item| parse(item)).collect();
        match (open, close) {
            // Without the backslash TeX groups with braces.
            ('{', '}') if items.len() == 1 && !text.starts_with('\\') => return parse(inside.trim()),
            ('{', '}') => return Value::Set(values()),
            ('(', ')') if items.len() == 1 => return parse(inside.trim()),
            _ if items.len() > 1 => return Value::Tuple(open, close, values()),
            _ => {}
        }
    }
    if let Some(number) = quantity(text) {
        return number;
    }
    let items = split(text, false);
    if items.len() > 1 {
        return Value::Set(items.iter().map(|item| parse(item)).collect());
    }
    Value::Text(spelled(text))
}

/// A number with or without a percent sign or a unit.
fn quantity(text: &str) -> Option<Value> {
    if let Some(value) = number(text) {
        return Some(Value::Number { value, is_percent: false });
    }
    if let Some(percent) = PERCENT.captures(text) {
        return number(&percent[1]).map(|value| Value::Number { value, is_percent: true });
    }
    let measured = UNIT.captures(text).filter(|_| !FUNCTION.is_match(text))?;
    number(&measured[1]).map(|value| Value::Number { value, is_percent: false })
}

/// Opening bracket, content and closing bracket, if one pair of them is around all of the text.
fn enclosed(text: &str) -> Option<(char, &str, char)> {
    let (open, rest) = match text.strip_prefix("\\{") {
        Some(rest) => ('{', rest),
        None => (text.chars().next().filter(|c| "([{".contains(*c))?, &text[1..]),
    };
    let mut depth = 1usize;
    for (at, c) in rest.char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if depth == 0 {
            let is_last = at + 1 == rest.len();
            return is_last.then(|| (open, rest[..at].trim_end_matches('\\'), c));
        }
    }
    None
}

/// The items between commas and semicolons outside of brackets, and between "and" or "or". A comma within a number's thousands
/// separates nothing where the items' commas have a space, or where the whole is that number.
fn split(text: &str, is_enclosed: bool) -> Vec<&str> {
    let mut cuts = vec![];
    let mut depth = 0i64;
    for (at, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            ',' | ';' if depth == 0 => cuts.push(at),
            _ => {}
        }
    }
    let is_spaced = |at: usize| text[at + 1..].starts_with(' ');
    let pieces = |cuts: &[usize]| -> Vec<&str> {
        let starts = std::iter::once(0).chain(cuts.iter().map(|at| at + 1));
        let ends = cuts.iter().copied().chain([text.len()]);
        starts.zip(ends).map(|(start, end)| text[start..end].trim()).collect()
    };
    let spaced: Vec<usize> = cuts.iter().copied().filter(|&at| is_spaced(at)).collect();
    let by_spaces = pieces(&spaced);
    let is_thousands = |piece: &&str| !piece.contains(',') || THOUSANDS.is_match(piece);
    let by_commas = match by_spaces.iter().all(is_thousands) && (!spaced.is_empty() || !is_enclosed) {
        true => by_spaces,
        false => pieces(&cuts),
    };
    let words = by_commas.iter().flat_map(|piece| {
        let piece = piece.strip_prefix("and ").or_else(|| piece.strip_prefix("or ")).unwrap_or(piece);
        BETWEEN.split(piece)
    });
    words.map(str::trim).filter(|piece| !piece.is_empty()).collect()
}

/// A text without spaces, with TeX's short forms written out, and words in lower case: a single letter is a name, which has one.
fn spelled(text: &str) -> String {
    let text = SHORT_FRAC.replace_all(text, |found: &Captures<'_>| {
        let part = |braced, bare| found.get(braced).or_else(|| found.get(bare)).map_or("", |part| part.as_str());
        format!("\\frac{{{}}}{{{}}}", part(1, 2), part(3, 4))
    });
    let text = ROOT.replace_all(&text, "\\sqrt{$1}");
    let text = SHORT_INDEX.replace_all(&text, "$1$2");
    let is_words = text.chars().filter(|c| c.is_alphabetic()).count() > 1
        && text.chars().all(|c| c.is_alphabetic() || " -'".contains(c));
    let text = if is_words { text.to_lowercase() } else { text.into_owned() };
    text.split_whitespace().collect()
}
