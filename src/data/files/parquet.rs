//! Parquet -> JSON objects, a row at a time, nested lists and structs included; pages are read as they come, so memory is
//! a page a column. Snappy, gzip, zstd, LZ4 or nothing. Knows no format. Read formats.rs next.
//!
//! The file is somebody's bytes and the reader a library that panics on some damaged ones: sizes are checked before they
//! are allocated, and a panic becomes an error.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};
use parquet::file::reader::{ChunkReader, FileReader, Length};
use parquet::file::serialized_reader::SerializedFileReader;
use parquet::record::Field;
use parquet::record::reader::RowIter;
use serde_json::{Map, Number, Value};

use crate::data::Place;
use crate::data::files::json_limits::MAX_RECORD_BYTES;
use crate::data::files::parquet_footer;
use crate::data::files::read::{Found, Take};
use crate::error::unless_it_panics;
use crate::host::allocator::within;
use crate::invalid;

/// Rows decoded ahead, a column: enough to pay for the call, few enough to be small.
const ROWS_AHEAD: usize = 64;
/// Bytes of pages that may be unpacked at once, beside as many as the file has: one or two a column. A page of zeros is a
/// thousandth of its size while it is packed.
const MAX_PAGES: u64 = 32 << 20;
/// Bytes that one row may take beside that: a long text that a dictionary holds once can stand in it any number of times.
const MAX_ROW: usize = 48 << 20;

/// Hands every row to `take` until it answers false.
///
/// # Errors
/// A file that is cut, damaged, encrypted or of an unknown compression.
pub(crate) fn rows(path: &Path, take: &mut Take) -> Result<()> {
    let shown = path.display();
    let damaged = |error: ParquetError| invalid!("{shown}: is no readable Parquet file: {error}");
    let file: Arc<Path> = path.into();
    let source = Checked::open(path).map_err(|error| invalid!("{shown}: {error}"))?;
    let (length, pages) = (source.length, source.pages.clone());
    if let Some(footer) = source.footer().map_err(|error| invalid!("{shown}: {error}"))? {
        parquet_footer::check(&footer).map_err(|fault| invalid!("{shown}: is no readable Parquet file: {fault}"))?;
    }
    let allowance = usize::try_from(length).unwrap_or(usize::MAX).saturating_mul(2).saturating_add(MAX_ROW);
    let reader = guarded(|| SerializedFileReader::new(source)).map_err(damaged)?;
    pages.lock().unwrap_or_else(PoisonError::into_inner).know(reader.metadata());
    let mut rows =
        guarded(|| Ok(RowIter::from_file_into(Box::new(reader)).with_batch_size(ROWS_AHEAD))).map_err(damaged)?;
    let mut record = 0;
    loop {
        let at = |error: ParquetError| invalid!("{shown}, row {}: is no readable Parquet file: {error}", record + 1);
        let row = within(allowance, TOO_MUCH, || guarded(|| rows.next().transpose())).map_err(at)?;
        let Some(row) = row else { return Ok(()) };
        record += 1;
        let place = Place { file: file.clone(), record, line: None };
        if !take(place, object(row.into_columns()).map(|object| Found::Json(Value::Object(object))))? {
            return Ok(());
        }
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

/// The process's last words where a row is too much.
const TOO_MUCH: &str = "a row of a Parquet file takes more memory than a record may; look at the files of [data] path, and \
    write those with repeated texts again without a dictionary";

/// A file that refuses to be read past its end, or to give a page that says it is larger than any record may be, or more of
/// them at once than there should be.
struct Checked {
    file: File,
    length: u64,
    pages: Arc<Mutex<Pages>>,
}

/// The pages that are unpacked now: of every column the last two, of which the first may be its dictionary.
#[derive(Default)]
struct Pages {
    /// Where each column chunk begins, and its column; by the beginning.
    chunks: Vec<(u64, usize)>,
    /// Of each column: the chunk that is read, its dictionary's bytes, its page's bytes.
    held: Vec<(usize, [u64; 2])>,
}

impl Pages {
    fn know(&mut self, metadata: &ParquetMetaData) {
        let groups = metadata.row_groups().iter();
        // byte_range() asserts that they are not negative; what is wrong about them is found where they are read.
        let start = |chunk: &ColumnChunkMetaData| chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset());
        let starts = groups.flat_map(|group| group.columns().iter().map(start).enumerate());
        self.chunks = starts.map(|(column, start)| (start.max(0) as u64, column)).collect();
        self.chunks.sort_unstable();
        self.held = vec![(usize::MAX, [0; 2]); metadata.file_metadata().schema_descr().num_columns()];
    }

    /// Counts a page that begins at `start`; the bytes that all of them have then.
    fn take(&mut self, start: u64, (kind, size): (u64, u64)) -> u64 {
        const DICTIONARY: u64 = 2;
        let chunk = self.chunks.partition_point(|&(begin, _)| begin <= start);
        let Some(&(_, column)) = chunk.checked_sub(1).and_then(|chunk| self.chunks.get(chunk)) else { return 0 };
        let Some((current, sizes)) = self.held.get_mut(column) else { return 0 };
        if *current != chunk {
            (*current, *sizes) = (chunk, [0; 2]);
        }
        sizes[usize::from(kind != DICTIONARY)] = size;
        self.held.iter().map(|(_, sizes)| sizes[0].saturating_add(sizes[1])).fold(0, u64::saturating_add)
    }
}

/// A file whose end is an error once it has been told: a page's header that says it has two thousand million of something is
/// skipped by the library one by one, past the end, where nothing is as good as read.
struct Ending {
    file: File,
    /// How often it was read at its end.
    asked: u32,
}

impl Read for Ending {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        /// Whoever reads to the end asks once or twice.
        const PATIENCE: u32 = 8;
        let read = self.file.read(buffer)?;
        if read == 0 && !buffer.is_empty() {
            self.asked += 1;
            if self.asked > PATIENCE {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(read)
    }
}

impl Checked {
    fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Ok(Self { file, length, pages: Arc::default() })
    }

    /// The footer's bytes, where the file's end says where they are and they are not encrypted; what else is wrong with it
    /// the library says.
    fn footer(&self) -> std::io::Result<Option<Vec<u8>>> {
        /// The footer's length and a word.
        const END: u64 = 8;
        let Some(before) = self.length.checked_sub(END) else { return Ok(None) };
        let mut end = [0; END as usize];
        self.at(before)?.read_exact(&mut end)?;
        let (length, word) = end.split_at(4);
        let length = u64::from(length.iter().rev().fold(0u32, |n, &byte| n << 8 | u32::from(byte)));
        let Some(start) = before.checked_sub(length).filter(|_| word == b"PAR1") else { return Ok(None) };
        let mut footer = vec![0; length as usize];
        self.at(start)?.read_exact(&mut footer)?;
        Ok(Some(footer))
    }

    fn at(&self, start: u64) -> std::io::Result<BufReader<Ending>> {
        let mut file = self.file.try_clone()?;
        file.seek(SeekFrom::Start(start))?;
        Ok(BufReader::new(Ending { file, asked: 0 }))
    }
}

impl Length for Checked {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Checked {
    type T = BufReader<Ending>;

    /// The library calls this where a page begins.
    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        /// Two fields take at most twelve; the rest is for a writer that is less brief.
        const HEAD: u64 = 64;
        let mut head = Vec::with_capacity(HEAD as usize);
        self.at(start)?.take(HEAD).read_to_end(&mut head)?;
        if let Some((kind, size)) = page_head(&head) {
            if size > MAX_RECORD_BYTES {
                return Err(ParquetError::General(format!(
                    "a page says it has {size} bytes, and {} MiB are the most",
                    MAX_RECORD_BYTES >> 20
                )));
            }
            let held = self.pages.lock().unwrap_or_else(PoisonError::into_inner).take(start, (kind, size));
            if held > MAX_PAGES.saturating_add(self.length) {
                return Err(ParquetError::General(format!(
                    "the pages of its columns would take {} MiB at once; write it again with smaller pages or fewer columns",
                    held >> 20
                )));
            }
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

/// A page's type and its uncompressed size: the 32-bit fields 1 and 2 of its header, in Thrift's compact encoding. A field
/// names its number as a step of 1 to 15 from the one before, or in full after a zero step; the order is free, and of two
/// that claim one number the later counts, as for the library. What is negative there is refused by the library.
fn page_head(head: &[u8]) -> Option<(u64, u64)> {
    const INT32: u8 = 5;
    let mut bytes = head.iter().copied();
    let (mut number, mut kind, mut size) = (0i16, None, None);
    // A header that goes on with another type of field, or past these bytes, has said what is known so far.
    while let Some(byte) = bytes.next().filter(|b| b & 0x0F == INT32) {
        let named = match byte >> 4 {
            0 => zigzag(&mut bytes).map(|full| full as i16),
            step => number.checked_add(step.into()),
        };
        let (Some(named), Some(value)) = (named, zigzag(&mut bytes)) else { break };
        let value = u64::from(value as u32);
        match named {
            1 => kind = Some(value),
            2 => size = Some(value),
            _ => {}
        }
        number = named;
    }
    Some((kind?, size?))
}

/// Seven bits a byte, the low ones first, up to a byte without its highest bit; the lowest of all is the sign.
fn zigzag(bytes: &mut impl Iterator<Item = u8>) -> Option<i64> {
    let mut number = 0u64;
    for shift in (0u32..).step_by(7) {
        let byte = bytes.next()?;
        number |= u64::from(byte & 0x7F).wrapping_shl(shift);
        if byte & 0x80 == 0 {
            break;
        }
    }
    Some((number >> 1) as i64 ^ -((number & 1) as i64))
}

/// Runs what may panic on damaged bytes; the panic is an error then and prints nothing.
fn guarded<T>(run: impl FnOnce() -> parquet::errors::Result<T>) -> parquet::errors::Result<T> {
    unless_it_panics(run).unwrap_or_else(|| Err(ParquetError::General("its pages are damaged".to_owned())))
}
