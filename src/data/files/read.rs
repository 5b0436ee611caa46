//! A file -> raw records, one at a time, in constant memory: JSON arrays, JSON lines and plain text, each also gzipped;
//! tables are in delimited.rs and parquet.rs. Knows no column. Read formats.rs next.

use std::cell::Cell;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::Result;
use flate2::bufread::MultiGzDecoder;
use serde::de::{DeserializeSeed, Deserializer, Error as _, SeqAccess, Visitor};
use serde_json::Value;

use crate::data::Place;
use crate::data::files::find::{Kind, kind};
use crate::data::files::json_limits;
use crate::data::files::json_limits::{Allowance, Bounded, MAX_RECORD_BYTES};
use crate::data::files::{delimited, parquet};
use crate::invalid;

/// A record before its columns are looked at.
pub(crate) enum Found {
    /// A JSON value, which should be an object.
    Json(Value),
    /// A line of a text file.
    Line(String),
}

/// Takes a record, or what is wrong with its bytes; answers whether to go on.
pub(crate) type Take<'t> = dyn FnMut(Place, Result<Found, String>) -> Result<bool> + 't;

/// Hands every record of a file to `take` until it answers false.
pub(crate) fn records(path: &Path, take: &mut Take) -> Result<()> {
    let failed = |error: std::io::Error| invalid!("{}: {error}", path.display());
    let kind = kind(path);
    if kind == Some(Kind::Parquet) {
        return parquet::rows(path, take);
    }
    let mut raw = BufReader::new(File::open(path).map_err(failed)?);
    let is_gzip = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gz"));
    if is_gzip && !raw.fill_buf().map_err(failed)?.starts_with(&[0x1F, 0x8B]) {
        return Err(invalid!("{}: is not gzip, though its name ends in .gz", path.display()));
    }
    let mut input: Box<dyn BufRead> =
        if is_gzip { Box::new(BufReader::new(MultiGzDecoder::new(raw))) } else { Box::new(raw) };
    let start = input.fill_buf().map_err(failed)?;
    if start.starts_with(&[0xFF, 0xFE]) || start.starts_with(&[0xFE, 0xFF]) {
        return Err(invalid!("{}: is UTF-16; save it as UTF-8", path.display()));
    }
    if start.starts_with("\u{FEFF}".as_bytes()) {
        input.consume(3);
    }
    if let Some(Kind::Delimited(delimiter)) = kind {
        return delimited::rows(path, input, delimiter, take);
    }
    let is_text = kind == Some(Kind::Text);
    // The content decides between array and lines: files of JSON lines are often named .json.
    if !is_text && first_byte(&mut input).map_err(failed)? == Some(b'[') {
        array(path, input, take)
    } else {
        lines(path, input, is_text, take)
    }
}

/// The first byte that is no white space, left in place; only white space within the first buffer is passed over.
fn first_byte(input: &mut dyn BufRead) -> std::io::Result<Option<u8>> {
    Ok(input.fill_buf()?.iter().copied().find(|byte| !byte.is_ascii_whitespace()))
}

fn lines(path: &Path, mut input: Box<dyn BufRead>, is_text: bool, take: &mut Take) -> Result<()> {
    let file: Arc<Path> = path.into();
    let (mut line, mut record) = (0, 0);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        line += 1;
        let length = input.by_ref().take(MAX_RECORD_BYTES).read_until(b'\n', &mut bytes);
        let length = length.map_err(|error| invalid!("{}, line {line}: {error}", path.display()))?;
        if length == 0 {
            return Ok(());
        }
        if length as u64 == MAX_RECORD_BYTES && bytes.last() != Some(&b'\n') {
            return Err(invalid!("{}, line {line}: is longer than {} MiB", path.display(), MAX_RECORD_BYTES >> 20));
        }
        if bytes.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        record += 1;
        let found = match std::str::from_utf8(&bytes) {
            Err(error) => Err(format!("is not UTF-8 from byte {} of the line on", error.valid_up_to() + 1)),
            Ok(text) if is_text => Ok(Found::Line(text.trim_end_matches(['\r', '\n']).to_owned())),
            Ok(text) => json_limits::from_str(text.trim_end()).map(Found::Json).map_err(|error| {
                let what = error.to_string();
                // serde_json counts lines within this one line.
                let what = what.split(" at line ").next().unwrap_or_default();
                format!("is not a JSON object on one line: {what} at column {}", error.column())
            }),
        };
        if !take(Place { file: file.clone(), record, line: Some(line) }, found)? {
            return Ok(());
        }
    }
}

/// The elements of a JSON array, each handed on before the next is read.
struct Elements<'a, 't> {
    file: Arc<Path>,
    take: &'a mut Take<'t>,
    /// Bytes that may still be read for the element at hand.
    left: Rc<Cell<u64>>,
    /// How `take` ended the reading, which serde can only see as an error of its own.
    ended: &'a mut Option<Result<()>>,
}

impl<'de> DeserializeSeed<'de> for Elements<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Elements<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("a JSON array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        let mut record = 0;
        while let Some(value) = elements.next_element_seed(Bounded::default())? {
            record += 1;
            self.left.set(MAX_RECORD_BYTES);
            let place = Place { file: self.file.clone(), record, line: None };
            let end = match (self.take)(place, Ok(Found::Json(value))) {
                Ok(true) => continue,
                Ok(false) => Ok(()),
                Err(error) => Err(error),
            };
            *self.ended = Some(end);
            return Err(A::Error::custom("ended by the taker"));
        }
        Ok(())
    }
}

fn array(path: &Path, input: Box<dyn BufRead>, take: &mut Take) -> Result<()> {
    let mut ended = None;
    let (input, left) = Allowance::new(input);
    let mut json = serde_json::Deserializer::from_reader(BufReader::new(input));
    let elements = Elements { file: path.into(), take, left, ended: &mut ended };
    let read = elements.deserialize(&mut json).and_then(|()| json.end());
    match (ended, read) {
        (Some(end), _) => end,
        (None, Ok(())) => Ok(()),
        (None, Err(error)) if error.is_io() => Err(invalid!("{}: {error}", path.display())),
        (None, Err(error)) => Err(invalid!("{}: is not a JSON array: {error}", path.display())),
    }
}
