//! Valid bytes -> bytes that are nearly valid, by a seed. It does not depend on a reader, only on the kind of file, so that
//! edits reach past the first check of a header.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use fourfold::rng::SplitMix64;
use serde_json::{Map, Value, json};

/// What bytes are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Form {
    /// Numbers of any width, little-endian lengths among them.
    Binary,
    /// Lines of text with numbers and quoted strings: TOML, CSV, templates.
    Text,
    /// One JSON value.
    Json,
    /// A JSON value a line.
    JsonLines,
    /// A length, a JSON header of that length, numbers.
    Safetensors,
    /// Gzipped text or JSON.
    Gzip,
}

/// Nothing grows past this: the claim is about small files that make a reader do much.
const LONGEST: usize = 1 << 20;

/// One to three edits of `bytes`; `other` is a second valid file to splice with.
pub fn mutate(rng: &mut SplitMix64, bytes: &[u8], other: &[u8], form: Form) -> Vec<u8> {
    let mut out = bytes.to_vec();
    for _ in 0..1 + rng.below(3) {
        out = edit(rng, &out, other, form);
        out.truncate(LONGEST);
    }
    out
}

fn edit(rng: &mut SplitMix64, bytes: &[u8], other: &[u8], form: Form) -> Vec<u8> {
    let structured = rng.below(3) > 0;
    match form {
        Form::Json if structured => edit_json(rng, bytes),
        Form::JsonLines if structured => edit_line(rng, bytes),
        Form::Safetensors if structured => edit_header(rng, bytes),
        Form::Gzip if structured => edit_inside(rng, bytes, other),
        Form::Binary | Form::Safetensors | Form::Gzip => edit_bytes(rng, bytes, other),
        Form::Text | Form::Json | Form::JsonLines => match rng.below(3) {
            0 => edit_bytes(rng, bytes, other),
            _ => edit_text(rng, bytes, other),
        },
    }
    .unwrap_or_else(|| edit_bytes(rng, bytes, other).unwrap_or_default())
}

/// A range of at most `most` bytes.
fn range(rng: &mut SplitMix64, length: usize, most: usize) -> std::ops::Range<usize> {
    let from = rng.below(length);
    let size = 1 + rng.below(most.min(length - from));
    from..from + size
}

const NUMBERS: [u64; 18] = [
    0,
    1,
    2,
    7,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0x7FFF,
    0xFFFF,
    0x10000,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    1 << 40,
    0x7FFF_FFFF_FFFF_FFFF,
    1 << 63,
    u64::MAX,
];

/// Flips, runs, cuts, copies, lengths, splices; `None` where there is nothing to edit.
fn edit_bytes(rng: &mut SplitMix64, bytes: &[u8], other: &[u8]) -> Option<Vec<u8>> {
    if bytes.is_empty() {
        return Some(other[..other.len().min(64)].to_vec());
    }
    let mut out = bytes.to_vec();
    match rng.below(11) {
        0 => (0..1 + rng.below(8)).for_each(|_| {
            let at = rng.below(out.len());
            out[at] ^= 1 << rng.below(8);
        }),
        1 => {
            let at = rng.below(out.len());
            out[at] = NUMBERS[rng.below(7)] as u8;
        }
        2 => {
            let (run, fill) = (range(rng, out.len(), 64), rng.next_u64() as u8);
            let random = rng.below(2) == 0;
            for byte in &mut out[run] {
                *byte = if random { rng.next_u64() as u8 } else { fill };
            }
        }
        3 => out.truncate(rng.below(out.len())),
        4 => drop(out.drain(range(rng, bytes.len(), 256))),
        5 => {
            let copied = bytes[range(rng, bytes.len(), 512)].to_vec();
            let (at, times) = (rng.below(out.len() + 1), if rng.below(20) == 0 { 200 } else { 1 + rng.below(3) });
            out.splice(at..at, copied.repeat(times));
        }
        6 | 7 => {
            // A length or an offset, made another one.
            let width = [1, 2, 4, 8][rng.below(4)].min(out.len());
            let at = rng.below(out.len() - width + 1);
            let at = if rng.below(2) == 0 { at / width * width } else { at };
            let mut old = [0; 8];
            old[..width].copy_from_slice(&out[at..at + width]);
            let old = u64::from_le_bytes(old);
            let new = match rng.below(5) {
                0 => old.wrapping_add(1),
                1 => old.wrapping_sub(1),
                2 => old.wrapping_mul(2 + rng.next_u64() % 1000),
                3 => out.len() as u64,
                _ => NUMBERS[rng.below(NUMBERS.len())],
            };
            out[at..at + width].copy_from_slice(&new.to_le_bytes()[..width]);
        }
        8 if !other.is_empty() => {
            out.truncate(rng.below(out.len() + 1));
            out.extend(&other[rng.below(other.len())..]);
        }
        9 => {
            let (a, b) = (range(rng, out.len(), 64), rng.below(out.len()));
            let moved: Vec<u8> = out.drain(a).collect();
            let at = b.min(out.len());
            out.splice(at..at, moved);
        }
        _ => {
            let at = rng.below(out.len() + 1);
            let new: Vec<u8> = (0..1 + rng.below(16)).map(|_| rng.next_u64() as u8).collect();
            out.splice(at..at, new);
        }
    }
    Some(out)
}

const TEXTS: [&str; 34] = [
    "",
    "0",
    "-1",
    "1e308",
    "1e999",
    "-0.0",
    "NaN",
    "nan",
    "inf",
    "null",
    "true",
    "18446744073709551616",
    "99999999999999999999999999",
    "0.1",
    "\"",
    "\\",
    "\\ud800",
    "\\u0000",
    "\u{FEFF}",
    "\0",
    "\n",
    "\r\n",
    "[",
    "]",
    "{",
    "}",
    "[[[[[[[[",
    ",",
    ":",
    "{{",
    "{%",
    "é𝄞",
    "../../etc/passwd",
    "$HOME",
];

/// Numbers and quoted strings replaced by other ones, and the signs between them.
fn edit_text(rng: &mut SplitMix64, bytes: &[u8], other: &[u8]) -> Option<Vec<u8>> {
    let is_number = |b: u8| b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'e');
    let tokens: Vec<std::ops::Range<usize>> = {
        let mut found = vec![];
        let mut at = 0;
        while at < bytes.len() {
            let end = match bytes[at] {
                b'"' => bytes[at + 1..].iter().position(|&b| b == b'"').map_or(bytes.len(), |n| at + n + 2),
                b if b.is_ascii_digit() => at + bytes[at..].iter().take_while(|&&b| is_number(b)).count(),
                b if b.is_ascii_alphabetic() => at + bytes[at..].iter().take_while(|b| b.is_ascii_alphabetic()).count(),
                _ => at + 1,
            };
            if end > at + 1 || bytes[at].is_ascii_punctuation() || bytes[at].is_ascii_digit() {
                found.push(at..end);
            }
            at = end;
        }
        found
    };
    if tokens.is_empty() {
        return None;
    }
    let at = tokens[rng.below(tokens.len())].clone();
    let new = match rng.below(8) {
        0 => bytes[tokens[rng.below(tokens.len())].clone()].to_vec(),
        1 => b"x".repeat(1 << rng.below(17)),
        2 => TEXTS[rng.below(TEXTS.len())].repeat(1 << rng.below(10)).into_bytes(),
        3 if !other.is_empty() => other[range(rng, other.len(), 128)].to_vec(),
        4 => format!("\"{}\"", TEXTS[rng.below(TEXTS.len())]).into_bytes(),
        _ => TEXTS[rng.below(TEXTS.len())].as_bytes().to_vec(),
    };
    let mut out = bytes.to_vec();
    match rng.below(4) {
        0 => drop(out.splice(at.start..at.start, new)),
        _ => drop(out.splice(at, new)),
    }
    Some(out)
}

fn edit_json(rng: &mut SplitMix64, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut value: Value = serde_json::from_slice(bytes).ok()?;
    edit_value(rng, &mut value);
    serde_json::to_vec(&value).ok()
}

fn edit_line(rng: &mut SplitMix64, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut lines: Vec<Vec<u8>> = bytes.split(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
    let at = rng.below(lines.len());
    lines[at] = edit_json(rng, &lines[at])?;
    Some(lines.join(&b'\n'))
}

fn edit_header(rng: &mut SplitMix64, bytes: &[u8]) -> Option<Vec<u8>> {
    let length = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?) as usize;
    let (header, data) = bytes.get(8..)?.split_at_checked(length)?;
    let header = match rng.below(3) {
        0 => edit_text(rng, header, &[])?,
        _ => edit_json(rng, header)?,
    };
    Some([&(header.len() as u64).to_le_bytes()[..], &header, data].concat())
}

fn edit_inside(rng: &mut SplitMix64, bytes: &[u8], other: &[u8]) -> Option<Vec<u8>> {
    let unpacked = |bytes: &[u8]| {
        let mut inside = vec![];
        GzDecoder::new(bytes).take(LONGEST as u64).read_to_end(&mut inside).ok().map(|_| inside)
    };
    let (inside, other) = (unpacked(bytes)?, unpacked(other).unwrap_or_default());
    let form = if serde_json::from_slice::<Value>(&inside).is_ok() { Form::Json } else { Form::JsonLines };
    let edited = edit(rng, &inside, &other, form);
    let mut packed = GzEncoder::new(vec![], Compression::fast());
    packed.write_all(&edited).ok()?;
    packed.finish().ok()
}

/// The path to every node below a value.
fn nodes(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    let escaped = |key: &str| key.replace('~', "~0").replace('/', "~1");
    match value {
        // Of a long list, such as a vocabulary, some: the rest is like them.
        Value::Array(items) => {
            let step = items.len().div_ceil(16).max(1);
            items.iter().enumerate().step_by(step).for_each(|(i, v)| nodes(v, &format!("{at}/{i}"), found));
        }
        Value::Object(entries) => {
            let step = entries.len().div_ceil(64).max(1);
            entries.iter().step_by(step).for_each(|(k, v)| nodes(v, &format!("{at}/{}", escaped(k)), found));
        }
        _ => {}
    }
}

fn edit_value(rng: &mut SplitMix64, value: &mut Value) {
    let mut paths = vec![];
    nodes(value, "", &mut paths);
    let donor = value.pointer(&paths[rng.below(paths.len())]).cloned().unwrap_or_default();
    let path = &paths[rng.below(paths.len())];
    let Some(node) = value.pointer_mut(path) else { return };
    match (rng.below(12), &mut *node) {
        (0, Value::Object(entries)) if !entries.is_empty() => {
            let key = entries.keys().nth(rng.below(entries.len())).cloned().unwrap_or_default();
            entries.remove(&key);
        }
        (1, Value::Object(entries)) => drop(entries.insert(TEXTS[rng.below(TEXTS.len())].into(), donor)),
        (2, Value::Object(entries)) if !entries.is_empty() => {
            let key = entries.keys().nth(rng.below(entries.len())).cloned().unwrap_or_default();
            let moved = entries.remove(&key).unwrap_or_default();
            entries.insert(format!("{key}{}", ["x", "", "/../x", "\0"][rng.below(4)]), moved);
        }
        (0 | 1, Value::Array(items)) if !items.is_empty() => drop(items.remove(rng.below(items.len()))),
        (2 | 3, Value::Array(items)) if items.len() < 2000 => {
            let times = 1 << rng.below(12);
            items.extend(std::iter::repeat_n(donor, times.min(20_000 / (1 + items.len()))));
        }
        (0 | 1, Value::Number(number)) => {
            let n = number.as_f64().unwrap_or(0.0);
            let shifted = [n + 1.0, n - 1.0, -n, n * 2.0, n * 1e6, n / 2.0][rng.below(6)];
            *node = match shifted.fract() == 0.0 && shifted.abs() < 9e15 {
                true => json!(shifted as i64),
                false => json!(shifted),
            };
        }
        (2, Value::Number(number)) => *node = json!(number.to_string()),
        (0, Value::String(text)) => {
            let cut: String = text.chars().take(rng.below(1 + text.len())).collect();
            *node = json!(cut);
        }
        (1, Value::String(text)) => *node = json!(format!("{text}{}", TEXTS[rng.below(TEXTS.len())])),
        (2, Value::String(text)) => *node = json!(text.repeat(1 << rng.below(8))),
        (4, _) => *node = donor,
        (5, _) => *node = json!(NUMBERS[rng.below(NUMBERS.len())]),
        (6, _) => {
            *node =
                [json!(-1), json!(i64::MIN), json!(0.5), json!(1e308), json!(5e-324), json!(-0.0)][rng.below(6)].clone()
        }
        (7, _) => *node = json!(TEXTS[rng.below(TEXTS.len())]),
        (8, _) => *node = json!("x".repeat(1 << rng.below(17))),
        (9, _) => *node = [Value::Null, json!(true), json!(false), json!([]), json!({})][rng.below(5)].clone(),
        (10, _) => {
            let most = if rng.below(4) == 0 { 120 } else { 6 };
            for level in 0..1 + rng.below(most) {
                *node = match level % 2 {
                    0 => json!([node.take()]),
                    _ => Value::Object(Map::from_iter([("k".to_owned(), node.take())])),
                };
            }
        }
        _ => *node = json!([donor.clone(), donor]),
    }
}
