//! Values that JSON has no place for: NaN and infinite numbers, as Python's `json` and pandas write them.
//!
//! They are read as null, as pandas means them: missing. So a column that nobody reads does no harm, and where one is needed
//! the record's fault names it ([`Hole`]). This file does not depend on `formats`. Read `data/files/read.rs` next.

use std::cell::RefCell;
use std::io::Read;
use std::rc::Rc;

use serde_json::Value;

use crate::data::files::json_limits;
use crate::data::record::{Hole, RawRecord};

/// A record and the holes that its reader found in it.
pub(crate) fn record(value: Value, holes: Vec<Hole>) -> RawRecord {
    if holes.is_empty() { RawRecord::Json(value) } else { RawRecord::Holed(value, holes) }
}

/// Parses one JSON value in which numbers may be NaN or infinite. Columns are the keys at nesting level `level`.
///
/// # Errors
/// Those of [`json_limits::from_str`].
pub(crate) fn from_str(text: &str, level: usize) -> serde_json::Result<(Value, Vec<Hole>)> {
    let error = match json_limits::from_str(text) {
        Ok(value) => return Ok((value, vec![])),
        Err(error) => error,
    };
    let (mut filter, mut filtered) = (Filter::new(level), Vec::with_capacity(text.len()));
    text.bytes().for_each(|byte| filter.push(byte, &mut filtered));
    filter.flush(&mut filtered);
    let holes = filter.found.take();
    match std::str::from_utf8(&filtered) {
        Ok(filtered) if !holes.is_empty() => json_limits::from_str(filtered).map(|value| (value, holes)),
        _ => Err(error),
    }
}

/// The most bytes of a column's name that are kept for messages.
const NAME: usize = 64;

/// Replaces the words NaN, Infinity and -Infinity outside of strings by null.
struct Filter {
    level: usize,
    depth: usize,
    in_string: bool,
    is_escaped: bool,
    /// The latest string at `level`, and the latest that was a key.
    string: Vec<u8>,
    key: Vec<u8>,
    /// A minus and letters that are held back until it is clear what they are.
    minus: bool,
    word: Vec<u8>,
    found: Rc<RefCell<Vec<Hole>>>,
}

impl Filter {
    fn new(level: usize) -> Self {
        Self {
            level,
            depth: 0,
            in_string: false,
            is_escaped: false,
            string: vec![],
            key: vec![],
            minus: false,
            word: vec![],
            found: Rc::default(),
        }
    }

    /// Takes the next byte, and appends what is now clear to `out`.
    fn push(&mut self, byte: u8, out: &mut Vec<u8>) {
        /// Longer than each of the words.
        const WORD: usize = 9;
        if self.in_string {
            out.push(byte);
            let is_end = byte == b'"' && !self.is_escaped;
            self.is_escaped = byte == b'\\' && !self.is_escaped;
            if is_end {
                self.in_string = false;
            } else if self.depth == self.level && self.string.len() < NAME {
                self.string.push(byte);
            }
            return;
        }
        let goes_on = !self.word.is_empty() && self.word.len() < WORD && byte.is_ascii_alphabetic();
        if goes_on || (self.word.is_empty() && matches!(byte, b'N' | b'I')) {
            self.word.push(byte);
            return;
        }
        self.flush(out);
        match byte {
            b'-' => {
                self.minus = true;
                return;
            }
            b'"' => {
                self.in_string = true;
                if self.depth == self.level {
                    self.string.clear();
                }
            }
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            b':' if self.depth == self.level => self.key.clone_from(&self.string),
            _ => {}
        }
        out.push(byte);
    }

    /// Appends what was held back.
    fn flush(&mut self, out: &mut Vec<u8>) {
        let what = match (self.minus, &self.word[..]) {
            (false, b"NaN") => Some("NaN"),
            (false, b"Infinity") => Some("Infinity"),
            (true, b"Infinity") => Some("-Infinity"),
            _ => None,
        };
        match what {
            Some(what) => {
                Hole::add(&mut self.found.borrow_mut(), &String::from_utf8_lossy(&self.key), what);
                out.extend(b"null");
            }
            None => {
                out.extend(self.minus.then_some(b'-'));
                out.extend(&self.word);
            }
        }
        self.minus = false;
        self.word.clear();
    }
}

/// A reader of JSON text without NaN and infinite numbers. It reads byte by byte, so that the holes found are those of the
/// elements parsed so far.
pub(crate) struct Filtered<R> {
    input: R,
    filter: Filter,
    ready: Vec<u8>,
    at: usize,
}

impl<R: Read> Filtered<R> {
    /// The reader, and the holes found, which the caller takes after each record.
    pub(crate) fn new(input: R, level: usize) -> (Self, Rc<RefCell<Vec<Hole>>>) {
        let filter = Filter::new(level);
        let found = filter.found.clone();
        (Self { input, filter, ready: vec![], at: 0 }, found)
    }
}

impl<R: Read> Read for Filtered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.at == self.ready.len() {
            self.ready.clear();
            self.at = 0;
            let mut byte = [0];
            if self.input.read(&mut byte)? == 1 {
                self.filter.push(byte[0], &mut self.ready);
                continue;
            }
            self.filter.flush(&mut self.ready);
            if self.ready.is_empty() {
                return Ok(0);
            }
        }
        let count = buffer.len().min(self.ready.len() - self.at);
        buffer[..count].copy_from_slice(&self.ready[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn words_for_missing_numbers_are_null_with_their_column_and_all_other_text_is_unchanged() {
        let text = r#"{"a \" NaN": [1, NaN, {"b": -Infinity}], "c": "NaN", "d": -1.5, "e": Infinity, "f": NaN}"#;
        let (value, holes) = from_str(text, 1).unwrap();
        assert_eq!(value, json!({"a \" NaN": [1, null, {"b": null}], "c": "NaN", "d": -1.5, "e": null, "f": null}));
        let found: Vec<_> = holes.iter().map(|hole| (hole.column.as_str(), hole.what)).collect();
        assert_eq!(found, [("a \\\" NaN", "NaN"), ("e", "Infinity"), ("f", "NaN")]);
        for bad in [
            "{\"a\": Nan}",
            "{\"a\": -NaN}",
            "{\"a\": Infinityy}",
            "{\"a\": NaN",
            "N",
            "-",
            "{\"a\": InfinityInfinity}",
        ] {
            assert!(from_str(bad, 1).is_err(), "{bad}");
        }
        for text in ["[{\"a\":-1,\"b\":\"-N\\\\\"},null,true,-0.5e-3 ]", "", " ", "-"] {
            let mut read = String::new();
            Filtered::new(text.as_bytes(), 2).0.read_to_string(&mut read).unwrap();
            assert_eq!(read, text);
        }
    }
}
