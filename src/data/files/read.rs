//! One file -> raw records, one at a time, in constant memory: JSON arrays, JSON lines and plain text, each also
//! gzipped.
//!
//! Tables are read by `delimited.rs` and `parquet.rs`. This file does not depend on `formats`. Read
//! `data/formats/mod.rs` next.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use flate2::bufread::MultiGzDecoder;
use serde::de::{DeserializeSeed, Deserializer, Error as _, SeqAccess, Visitor};

use crate::data::files::find::{FileType, file_type};
use crate::data::files::holes::Filtered;
use crate::data::files::json_limits::{LimitedValue, MAX_RECORD_BYTES, RecordLimit};
use crate::data::files::{delimited, holes, parquet};
use crate::data::record::{Hole, Place, RawRecord, RawSink};
use crate::invalid;

/// Bytes of data files that this process has read, for the progress of a run that reads one set of records at a time.
static BYTES_READ: AtomicUsize = AtomicUsize::new(0);

/// Number of bytes of data files read so far, by all that read some.
pub(crate) fn bytes_read() -> usize {
    BYTES_READ.load(Ordering::Relaxed)
}

/// Counts bytes of a data file as read.
pub(super) fn count_read(bytes: usize) {
    BYTES_READ.fetch_add(bytes, Ordering::Relaxed);
}

/// A data file whose bytes are counted as they are read.
struct CountedFile(File);

impl Read for CountedFile {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer).inspect(|&read| count_read(read))
    }
}

/// Passes every record of a file to `sink` until it returns false.
///
/// # Errors
/// A file that cannot be read, is UTF-16, or is not gzip despite its name; a line that is too long; an error of `sink`.
pub(crate) fn records(path: &Path, sink: &mut RawSink) -> Result<()> {
    let failed = |error: std::io::Error| invalid!("{}: {error}", path.display());
    let file_type = file_type(path);
    if file_type == Some(FileType::Parquet) {
        return parquet::rows(path, sink);
    }
    let mut raw = BufReader::new(CountedFile(File::open(path).map_err(failed)?));
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
    if let Some(FileType::Delimited(delimiter)) = file_type {
        return delimited::rows(path, input, delimiter, sink);
    }
    let is_text = file_type == Some(FileType::Text);
    // The content decides between array and lines: files of JSON lines are often named .json.
    if !is_text && first_byte(&mut input).map_err(failed)? == Some(b'[') {
        array(path, input, sink)
    } else {
        lines(path, input, is_text, sink)
    }
}

/// The first byte of the first buffer that is not white space; nothing is consumed.
fn first_byte(input: &mut dyn BufRead) -> std::io::Result<Option<u8>> {
    Ok(input.fill_buf()?.iter().copied().find(|byte| !byte.is_ascii_whitespace()))
}

fn lines(path: &Path, mut input: Box<dyn BufRead>, is_text: bool, sink: &mut RawSink) -> Result<()> {
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
            Ok(text) if is_text => Ok(RawRecord::Line(text.trim_end_matches(['\r', '\n']).to_owned())),
            Ok(text) => {
                holes::from_str(text.trim_end(), 1).map(|(value, found)| holes::record(value, found)).map_err(|error| {
                    let what = error.to_string();
                    // serde_json counts lines within this one line.
                    let what = what.split(" at line ").next().unwrap_or_default();
                    format!("is not a JSON object on one line: {what} at column {}", error.column())
                })
            }
        };
        if !sink(Place { file: file.clone(), record, line: Some(line) }, found)? {
            return Ok(());
        }
    }
}

/// Deserialises the elements of a JSON array, passing each to the sink before the next is read.
struct Elements<'a, 's> {
    file: Arc<Path>,
    sink: &'a mut RawSink<'s>,
    /// Bytes that may still be read for the current element.
    remaining: Rc<Cell<u64>>,
    /// NaN and infinite numbers of the current element.
    found: Rc<RefCell<Vec<Hole>>>,
    /// The sink's result where it stopped the reading: serde can only be stopped by an error of its own.
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
        while let Some(value) = elements.next_element_seed(LimitedValue::default())? {
            record += 1;
            self.remaining.set(MAX_RECORD_BYTES);
            let place = Place { file: self.file.clone(), record, line: None };
            let end = match (self.sink)(place, Ok(holes::record(value, self.found.take()))) {
                Ok(true) => continue,
                Ok(false) => Ok(()),
                Err(error) => Err(error),
            };
            *self.ended = Some(end);
            return Err(A::Error::custom("stopped by the sink"));
        }
        Ok(())
    }
}

fn array(path: &Path, input: Box<dyn BufRead>, sink: &mut RawSink) -> Result<()> {
    let mut ended = None;
    let (input, remaining) = RecordLimit::new(input);
    let (input, found) = Filtered::new(BufReader::new(input), 2);
    let mut json = serde_json::Deserializer::from_reader(input);
    let elements = Elements { file: path.into(), sink, remaining, found, ended: &mut ended };
    let read = elements.deserialize(&mut json).and_then(|()| json.end());
    match (ended, read) {
        (Some(end), _) => end,
        (None, Ok(())) => Ok(()),
        (None, Err(error)) if error.is_io() => Err(invalid!("{}: {error}", path.display())),
        (None, Err(error)) => Err(invalid!("{}: is not a JSON array: {error}", path.display())),
    }
}
