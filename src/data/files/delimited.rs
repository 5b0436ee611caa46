//! Comma- and tab-separated tables -> JSON objects, one row at a time. The first row names the columns.
//!
//! Every cell is a string, with three exceptions: a cell that holds a JSON list or object (as `messages` or `scores` in
//! a table must) is parsed, `true`/`True`/`false`/`False` in a column called `label` or `kto_tag` is a boolean, and an
//! empty cell is null. This file does not depend on `formats`. Read `data/formats/mod.rs` next.

use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use serde_json::{Map, Value};

use crate::data::files::json_limits;
use crate::data::files::json_limits::{MAX_RECORD_BYTES, RecordLimit};
use crate::data::record::{Place, RawRecord, RawSink};
use crate::invalid;

/// Passes every row to `sink` until it returns false.
///
/// # Errors
/// A file that cannot be read, a row larger than the limit, two columns of one name.
pub(crate) fn rows(path: &Path, input: Box<dyn BufRead>, delimiter: u8, sink: &mut RawSink) -> Result<()> {
    let file: Arc<Path> = path.into();
    let shown = path.display();
    let (input, remaining) = RecordLimit::new(input);
    let mut table = csv::ReaderBuilder::new().delimiter(delimiter).flexible(true).from_reader(input);
    let header = table.byte_headers().map_err(|error| invalid!("{shown}: {error}"))?;
    let mut names = Vec::with_capacity(header.len());
    for name in header {
        let name = std::str::from_utf8(name)
            .map_err(|_| invalid!("{shown}, line 1: is not UTF-8; save the table as UTF-8"))?
            .trim();
        if names.iter().any(|other| other == name) {
            return Err(invalid!("{shown}, line 1: two columns are called {name:?}"));
        }
        names.push(name.to_owned());
    }
    let mut row = csv::ByteRecord::new();
    let mut record = 0;
    loop {
        remaining.set(MAX_RECORD_BYTES);
        let line = usize::try_from(table.position().line()).unwrap_or(usize::MAX);
        match table.read_byte_record(&mut row) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => return Err(invalid!("{shown}, line {line}: {error}")),
        }
        record += 1;
        let line = row.position().map_or(line, |at| usize::try_from(at.line()).unwrap_or(usize::MAX));
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
    let mut object = Map::new();
    for (name, cell) in names.iter().zip(row) {
        let text = std::str::from_utf8(cell).map_err(|error| format!("column {name:?}: is not UTF-8: {error}"))?;
        object.insert(name.clone(), value(name, text)?);
    }
    Ok(RawRecord::Json(Value::Object(object)))
}

fn value(name: &str, text: &str) -> Result<Value, String> {
    let is_label = matches!(name, "label" | "kto_tag");
    Ok(match text {
        "" => Value::Null,
        "true" | "True" | "TRUE" if is_label => Value::Bool(true),
        "false" | "False" | "FALSE" if is_label => Value::Bool(false),
        _ if text.starts_with(['[', '{']) => {
            // Plain text may begin with a bracket too: it counts as JSON only if all of it parses.
            json_limits::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
        }
        _ => Value::String(text.to_owned()),
    })
}
