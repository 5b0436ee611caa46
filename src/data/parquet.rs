//! Parquet -> JSON objects, a row at a time, nested lists and structs included; pages are read as they come, so memory is
//! a page a column. Snappy, gzip, zstd, LZ4 or nothing. Knows no format. Read formats.rs next.
//!
//! The file is somebody's bytes and the reader a library that panics on some damaged ones: sizes are checked before they
//! are allocated, and a panic becomes an error.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, Length};
use parquet::file::serialized_reader::SerializedFileReader;
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::Place;
use super::bounded::MAX_RECORD_BYTES;
use super::read::{Found, Take};
use crate::error::unless_it_panics;
use crate::invalid;

/// Rows decoded ahead, a column: enough to pay for the call, few enough to be small.
const ROWS_AHEAD: usize = 64;
/// Lists in structs in lists: nobody's data is deeper.
const MAX_DEPTH: usize = 24;

/// Hands every row to `take` until it answers false.
///
/// # Errors
/// A file that is cut, damaged, encrypted or of an unknown compression.
pub(super) fn rows(path: &Path, take: &mut Take) -> Result<()> {
    let shown = path.display();
    let damaged = |error: ParquetError| invalid!("{shown}: is no readable Parquet file: {error}");
    let file: Arc<Path> = path.into();
    let source = Checked::open(path).map_err(|error| invalid!("{shown}: {error}"))?;
    let reader = guarded(|| SerializedFileReader::new(source)).map_err(damaged)?;
    let schema = reader.metadata().file_metadata().schema_descr().root_schema();
    if depth(schema, MAX_DEPTH) > MAX_DEPTH {
        return Err(invalid!("{shown}: columns are nested more than {MAX_DEPTH} deep"));
    }
    let mut rows =
        guarded(|| Ok(RowIter::from_file_into(Box::new(reader)).with_batch_size(ROWS_AHEAD))).map_err(damaged)?;
    let mut record = 0;
    loop {
        let at = |error: ParquetError| invalid!("{shown}, row {}: is no readable Parquet file: {error}", record + 1);
        let Some(row) = guarded(|| rows.next().transpose()).map_err(at)? else { return Ok(()) };
        record += 1;
        let place = Place { file: file.clone(), record, line: None };
        if !take(place, object(row.into_columns()).map(|object| Found::Json(Value::Object(object))))? {
            return Ok(());
        }
    }
}

fn depth(schema: &Type, limit: usize) -> usize {
    match schema.is_group() && limit > 0 {
        true => 1 + schema.get_fields().iter().map(|field| depth(field, limit - 1)).max().unwrap_or(0),
        false => 1,
    }
}

fn object(columns: Vec<(String, Field)>) -> Result<Map<String, Value>, String> {
    let mut object = Map::new();
    for (name, field) in columns {
        let value = value(field).map_err(|fault| format!("column {name:?}: {fault}"))?;
        object.insert(name, value);
    }
    Ok(object)
}

fn value(field: Field) -> Result<Value, String> {
    let float = |number: f64| Number::from_f64(number).map_or(Value::Null, Value::Number);
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(flag) => flag.into(),
        Field::Byte(number) => number.into(),
        Field::Short(number) => number.into(),
        Field::Int(number) => number.into(),
        Field::Long(number) => number.into(),
        Field::UByte(number) => number.into(),
        Field::UShort(number) => number.into(),
        Field::UInt(number) => number.into(),
        Field::ULong(number) => number.into(),
        Field::Float16(number) => float(number.to_f64()),
        Field::Float(number) => float(number.into()),
        Field::Double(number) => float(number),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => {
            std::str::from_utf8(bytes.data()).map_err(|error| format!("is not UTF-8: {error}"))?.into()
        }
        Field::Group(row) => Value::Object(object(row.into_columns())?),
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().cloned().map(value).collect::<Result<_, _>>()?)
        }
        Field::MapInternal(map) => {
            let mut object = Map::new();
            for (key, item) in map.entries() {
                let key = match key {
                    Field::Str(text) => text.clone(),
                    other => other.to_string(),
                };
                object.insert(key, value(item.clone())?);
            }
            Value::Object(object)
        }
        // Dates and decimals are read by no format; as text they can still be shown.
        other => other.to_string().into(),
    })
}

/// A file that refuses to be read past its end, or to give a page that says it is larger than any record may be.
struct Checked {
    file: File,
    length: u64,
}

impl Checked {
    fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Ok(Self { file, length })
    }

    fn at(&self, start: u64) -> std::io::Result<BufReader<File>> {
        let mut file = self.file.try_clone()?;
        file.seek(SeekFrom::Start(start))?;
        Ok(BufReader::new(file))
    }
}

impl Length for Checked {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Checked {
    type T = BufReader<File>;

    /// The library calls this where a page begins.
    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        let mut head = Vec::with_capacity(16);
        self.at(start)?.take(16).read_to_end(&mut head)?;
        if let Some(size) = page_size(&head).filter(|&size| size > MAX_RECORD_BYTES) {
            return Err(ParquetError::General(format!(
                "a page says it has {size} bytes, and {} MiB are the most",
                MAX_RECORD_BYTES >> 20
            )));
        }
        Ok(self.at(start)?)
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<bytes::Bytes> {
        if start.checked_add(length as u64).is_none_or(|end| end > self.length) {
            return Err(ParquetError::EOF(format!("{length} bytes at {start} reach past its end at {}", self.length)));
        }
        let mut buffer = vec![0; length];
        self.at(start)?.read_exact(&mut buffer)?;
        Ok(buffer.into())
    }
}

/// The uncompressed size in a page's header: in Thrift's compact encoding its second field, after the page's type.
fn page_size(head: &[u8]) -> Option<u64> {
    const INT32_NEXT_FIELD: u8 = 0x15;
    let mut bytes = head.iter().copied();
    let mut field = || {
        (bytes.next()? == INT32_NEXT_FIELD).then_some(())?;
        let mut number = 0u64;
        for shift in (0..35).step_by(7) {
            let byte = bytes.next()?;
            number |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    };
    field()?;
    // Zigzag: what is negative there is refused by the library.
    field().map(|size| size >> 1)
}

/// Runs what may panic on damaged bytes; the panic is an error then and prints nothing.
fn guarded<T>(run: impl FnOnce() -> parquet::errors::Result<T>) -> parquet::errors::Result<T> {
    unless_it_panics(run).unwrap_or_else(|| Err(ParquetError::General("its pages are damaged".to_owned())))
}
