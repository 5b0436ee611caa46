//! Comma- and tab-separated tables -> JSON objects, one row at a time. The first row names the columns.
//!
//! Every cell is a string, with three exceptions: a cell that holds a JSON list or object (as `messages` or `scores` in
//! a table must) is parsed, `true`/`True`/`false`/`False` in a column called `label` or `kto_tag` is a boolean, and an
//! empty cell is null. This file does not depend on `formats`. Read `data/formats/mod.rs` next.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{BufRead, Read};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use anyhow::Result;
use serde_json::{Map, Value};

use crate::data::files::holes;
use crate::data::files::json_limits::{MAX_RECORD_BYTES, RecordLimit};
use crate::data::record::{Hole, Place, RawRecord, RawSink};
use crate::invalid;

/// Passes every row to `sink` until it returns false.
///
/// # Errors
/// A file that cannot be read, a row larger than the limit, two columns of one name.
pub(crate) fn rows(path: &Path, input: Box<dyn BufRead>, delimiter: u8, sink: &mut RawSink) -> Result<()> {
    let file: Arc<Path> = path.into();
    let shown = path.display();
    let (input, remaining) = RecordLimit::new(input);
    let (input, lines) = NumberedLines::new(input);
    let mut table = csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(input);
    let header = table.byte_headers().map_err(|error| invalid!("{shown}: {error}"))?;
    let first = lines.borrow_mut().of_row_after(0);
    let mut names = Vec::with_capacity(header.len());
    for name in header {
        let name = std::str::from_utf8(name)
            .map_err(|_| invalid!("{shown}, line {first}: is not UTF-8; save the table as UTF-8"))?
            .trim();
        if names.iter().any(|other| other == name) {
            return Err(invalid!("{shown}, line {first}: two columns are called {name:?}"));
        }
        names.push(name.to_owned());
    }
    let mut row = csv::ByteRecord::new();
    let mut record = 0;
    loop {
        remaining.set(MAX_RECORD_BYTES);
        let before = table.position().byte();
        lines.borrow_mut().begin_row(before);
        let read = table.read_byte_record(&mut row);
        let line = lines.borrow_mut().of_row_after(before);
        match read {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => return Err(invalid!("{shown}, line {line}: {error}")),
        }
        record += 1;
        let place = Place { file: file.clone(), record, line: Some(line) };
        if !sink(place, object(&names, &row))? {
            return Ok(());
        }
    }
}

fn object(names: &[String], row: &csv::ByteRecord) -> Result<RawRecord, String> {
    if row.len() != names.len() {
        return Err(format!(
            "has {} cells, but the first row names {} columns; quote cells that hold the delimiter or a line break",
            row.len(),
            names.len()
        ));
    }
    let (mut object, mut found) = (Map::new(), vec![]);
    for (name, cell) in names.iter().zip(row) {
        let text = std::str::from_utf8(cell).map_err(|error| format!("column {name:?}: is not UTF-8: {error}"))?;
        object.insert(name.clone(), value(name, text, &mut found));
    }
    Ok(holes::record(Value::Object(object), found))
}

fn value(name: &str, text: &str, found: &mut Vec<Hole>) -> Value {
    let is_label = matches!(name, "label" | "kto_tag");
    match text {
        "" => Value::Null,
        "true" | "True" | "TRUE" if is_label => Value::Bool(true),
        "false" | "False" | "FALSE" if is_label => Value::Bool(false),
        _ if text.starts_with(['[', '{']) => {
            // Plain text may begin with a bracket too: it counts as JSON only if all of it parses.
            match holes::from_str(text, 0) {
                Ok((value, holes)) => {
                    holes.iter().for_each(|hole| Hole::add(found, name, hole.what));
                    value
                }
                Err(_) => Value::String(text.to_owned()),
            }
        }
        _ => Value::String(text.to_owned()),
    }
}

/// Where the lines of a table begin that are not blank. The `csv` crate skips blank lines, and reports the position before
/// them as a row's.
#[derive(Default)]
struct Lines {
    /// (offset of the first byte, number from 1) of lines that are not blank; those that no row can begin at any more are left
    /// out.
    starts: VecDeque<(u64, usize)>,
    /// Offset behind the row before the one that is being read.
    row: u64,
    /// Bytes read, and line breaks among them.
    offset: u64,
    breaks: usize,
    /// Whether only line breaks were read since the last line break.
    is_blank: bool,
}

impl Lines {
    /// Declares that the next row begins at `offset` or, where blank lines follow, after them.
    fn begin_row(&mut self, offset: u64) {
        self.row = offset;
    }

    /// Number of the first line at or after `offset` that is not blank: the line of the row that was read from there.
    fn of_row_after(&mut self, offset: u64) -> usize {
        while self.starts.front().is_some_and(|&(start, _)| start < offset) {
            self.starts.pop_front();
        }
        self.starts.front().map_or(self.breaks + 1, |&(_, line)| line)
    }

    fn take(&mut self, bytes: &[u8]) {
        self.of_row_after(self.row);
        // The table's reader asks for more only when it has used up what it was given: of the lines so far, only the first of
        // the row in hand is still wanted. A quoted cell may have any number of them.
        self.starts.truncate(1);
        for &byte in bytes {
            match byte {
                b'\n' => (self.breaks, self.is_blank) = (self.breaks + 1, true),
                b'\r' => {}
                _ => {
                    if self.is_blank {
                        self.starts.push_back((self.offset, self.breaks + 1));
                    }
                    self.is_blank = false;
                }
            }
            self.offset += 1;
        }
    }
}

/// A reader that notes where lines begin.
struct NumberedLines<R> {
    input: R,
    lines: Rc<RefCell<Lines>>,
}

impl<R: Read> NumberedLines<R> {
    fn new(input: R) -> (Self, Rc<RefCell<Lines>>) {
        let lines = Rc::new(RefCell::new(Lines { is_blank: true, ..Lines::default() }));
        (Self { input, lines: lines.clone() }, lines)
    }
}

impl<R: Read> Read for NumberedLines<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.input.read(buffer)?;
        self.lines.borrow_mut().take(&buffer[..read]);
        Ok(read)
    }
}
