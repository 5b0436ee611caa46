//! Parquet -> JSON objects, one row at a time, nested lists and structs included. Compression: Snappy, gzip, zstd, LZ4,
//! Brotli or none.
//!
//! Pages are read as they are needed, so memory is about one page per column. The file is untrusted, and the `parquet`
//! crate panics on some damaged files: sizes are checked before they are allocated, and a panic becomes an error. This
//! file does not depend on `formats`. Read `data/files/parquet_footer.rs` and `parquet_page.rs` next.

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

use crate::data::files::json_limits::MAX_RECORD_BYTES;
use crate::data::files::parquet_page::Page;
use crate::data::files::read::count_read;
use crate::data::files::{holes, parquet_footer, parquet_page};
use crate::data::record::{Hole, Place, RawSink};
use crate::error::unless_it_panics;
use crate::host::allocator::within;
use crate::invalid;

/// Rows decoded at once per column: enough to amortise the call, few enough to take little memory.
const ROWS_AHEAD: usize = 64;
/// Maximum bytes of decompressed pages at one time (one or two per column), in addition to the file's size. A page of
/// zeros compresses to a thousandth of its size.
const MAX_PAGE_BYTES: u64 = 32 << 20;
/// Maximum bytes of one row, in addition to twice the file's size: a row can repeat a long text of the dictionary any
/// number of times.
const MAX_ROW_BYTES: usize = 48 << 20;

/// Passes every row to `sink` until it returns false.
///
/// # Errors
/// A file that is cut, damaged, encrypted or of an unknown compression; an error of `sink`.
pub(crate) fn rows(path: &Path, sink: &mut RawSink) -> Result<()> {
    let shown = path.display();
    let damaged = |error: ParquetError| invalid!("{shown}: is not a readable Parquet file: {error}");
    let file: Arc<Path> = path.into();
    let source = CheckedFile::open(path).map_err(|error| invalid!("{shown}: {error}"))?;
    let (length, pages) = (source.length, source.pages.clone());
    if let Some(footer) = source.footer().map_err(|error| invalid!("{shown}: {error}"))? {
        parquet_footer::check(&footer).map_err(|fault| invalid!("{shown}: is not a readable Parquet file: {fault}"))?;
    }
    let max_bytes = usize::try_from(length).unwrap_or(usize::MAX).saturating_mul(2).saturating_add(MAX_ROW_BYTES);
    let reader = guarded(|| SerializedFileReader::new(source)).map_err(damaged)?;
    pages.lock().unwrap_or_else(PoisonError::into_inner).set_layout(reader.metadata());
    let mut rows =
        guarded(|| Ok(RowIter::from_file_into(Box::new(reader)).with_batch_size(ROWS_AHEAD))).map_err(damaged)?;
    let mut record = 0;
    loop {
        let at = |error: ParquetError| invalid!("{shown}, row {}: is not a readable Parquet file: {error}", record + 1);
        let row = within(max_bytes, ROW_TOO_LARGE, || guarded(|| rows.next().transpose())).map_err(at)?;
        let Some(row) = row else { return Ok(()) };
        record += 1;
        let place = Place { file: file.clone(), record, line: None };
        let (mut object, mut found) = (Map::new(), vec![]);
        for (name, field) in row.into_columns() {
            let value = Column { name: &name, holes: &mut found }.value(field);
            object.insert(name, value);
        }
        if !sink(place, Ok(holes::record(Value::Object(object), found)))? {
            return Ok(());
        }
    }
}

/// A column of a row: values of its fields as JSON, null where JSON has no place for one.
struct Column<'a> {
    name: &'a str,
    holes: &'a mut Vec<Hole>,
}

impl Column<'_> {
    fn hole(&mut self, what: &'static str) -> Value {
        Hole::add(self.holes, self.name, what);
        Value::Null
    }

    fn float(&mut self, number: f64) -> Value {
        let what = match number {
            _ if number.is_nan() => "NaN",
            f64::INFINITY => "Infinity",
            _ => "-Infinity",
        };
        Number::from_f64(number).map_or_else(|| self.hole(what), Value::Number)
    }

    fn value(&mut self, field: Field) -> Value {
        match field {
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
            Field::Float16(number) => self.float(number.to_f64()),
            Field::Float(number) => self.float(number.into()),
            Field::Double(number) => self.float(number),
            Field::Str(text) => text.into(),
            Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
                Ok(text) => text.into(),
                Err(_) => self.hole("bytes that are not UTF-8"),
            },
            Field::Group(row) => {
                Value::Object(row.into_columns().into_iter().map(|(name, field)| (name, self.value(field))).collect())
            }
            Field::ListInternal(list) => list.elements().iter().cloned().map(|field| self.value(field)).collect(),
            Field::MapInternal(map) => {
                let mut object = Map::new();
                for (key, item) in map.entries() {
                    let key = match key {
                        Field::Str(text) => text.clone(),
                        other => other.to_string(),
                    };
                    object.insert(key, self.value(item.clone()));
                }
                Value::Object(object)
            }
            // No data set format uses dates or decimals; as text they can still be shown in messages.
            other => other.to_string().into(),
        }
    }
}

/// The message with which the process ends where a row exceeds its memory limit.
const ROW_TOO_LARGE: &str = "a row of a Parquet file takes more memory than a record may; look at the files of [data] path, and \
    write those with repeated texts again without a dictionary";

/// A file that fails on a read past its end, on a page that claims to be larger than a record may be, and on too many
/// bytes of pages at one time.
struct CheckedFile {
    file: File,
    length: u64,
    pages: Arc<Mutex<PageSizes>>,
}

/// Decompressed sizes of the pages in memory: per column the dictionary and the latest data page.
#[derive(Default)]
struct PageSizes {
    /// Start offset and column of each column chunk, sorted by offset.
    chunks: Vec<(u64, usize)>,
    /// Per column: the current chunk, and the bytes of its dictionary and of its data page.
    current: Vec<(usize, [u64; 2])>,
}

impl PageSizes {
    /// Takes the offsets of the column chunks from the file's metadata.
    fn set_layout(&mut self, metadata: &ParquetMetaData) {
        let groups = metadata.row_groups().iter();
        // Not byte_range(), which asserts that offsets are not negative: a wrong offset fails when it is read.
        let start = |chunk: &ColumnChunkMetaData| chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset());
        let starts = groups.flat_map(|group| group.columns().iter().map(start).enumerate());
        self.chunks = starts.map(|(column, start)| (start.max(0) as u64, column)).collect();
        self.chunks.sort_unstable();
        self.current = vec![(usize::MAX, [0; 2]); metadata.file_metadata().schema_descr().num_columns()];
    }

    /// Records the size of the page at offset `start`; returns the bytes of all pages in memory.
    fn add(&mut self, start: u64, page: Page) -> u64 {
        const DICTIONARY: u64 = 2;
        let chunk = self.chunks.partition_point(|&(begin, _)| begin <= start);
        let Some(&(_, column)) = chunk.checked_sub(1).and_then(|chunk| self.chunks.get(chunk)) else { return 0 };
        let Some((latest, sizes)) = self.current.get_mut(column) else { return 0 };
        if *latest != chunk {
            (*latest, *sizes) = (chunk, [0; 2]);
        }
        sizes[usize::from(page.kind != DICTIONARY)] = page.size;
        self.current.iter().map(|(_, sizes)| sizes[0].saturating_add(sizes[1])).fold(0, u64::saturating_add)
    }
}

/// A file that fails on repeated reads at its end. For a damaged page header that claims two billion elements, the
/// `parquet` crate skips them one by one, and a read of 0 bytes at the end counts as success.
struct EofLimit {
    file: File,
    /// Number of reads at the end of the file.
    reads_at_end: u32,
}

impl Read for EofLimit {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        /// A correct reader reads once or twice at the end.
        const MAX_READS_AT_END: u32 = 8;
        let read = self.file.read(buffer).inspect(|&read| count_read(read))?;
        if read == 0 && !buffer.is_empty() {
            self.reads_at_end += 1;
            if self.reads_at_end > MAX_READS_AT_END {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(read)
    }
}

impl CheckedFile {
    fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        Ok(Self { file, length, pages: Arc::default() })
    }

    /// The footer's bytes; None for an encrypted footer or a damaged file end, which the `parquet` crate reports.
    fn footer(&self) -> std::io::Result<Option<Vec<u8>>> {
        /// The file's last bytes: the footer's length (4) and the magic word `PAR1`.
        const END: u64 = 8;
        let Some(before) = self.length.checked_sub(END) else { return Ok(None) };
        let mut end = [0; END as usize];
        self.at(before)?.read_exact(&mut end)?;
        let (length, magic) = end.split_at(4);
        let length = u64::from(length.iter().rev().fold(0u32, |n, &byte| n << 8 | u32::from(byte)));
        let Some(start) = before.checked_sub(length).filter(|_| magic == b"PAR1") else { return Ok(None) };
        let mut footer = vec![0; length as usize];
        self.at(start)?.read_exact(&mut footer)?;
        Ok(Some(footer))
    }

    fn at(&self, start: u64) -> std::io::Result<BufReader<EofLimit>> {
        let mut file = self.file.try_clone()?;
        file.seek(SeekFrom::Start(start))?;
        Ok(BufReader::new(EofLimit { file, reads_at_end: 0 }))
    }
}

impl Length for CheckedFile {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for CheckedFile {
    type T = BufReader<EofLimit>;

    /// The `parquet` crate calls this at the start of each page, and before the layout is known at the end of the file.
    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        let has_pages = !self.pages.lock().unwrap_or_else(PoisonError::into_inner).chunks.is_empty();
        let page = if has_pages { parquet_page::page(self.at(start)?).map_err(ParquetError::General)? } else { None };
        if let Some(page) = page {
            if page.size > MAX_RECORD_BYTES {
                return Err(ParquetError::General(format!(
                    "a page claims to have {} bytes; the maximum is {} MiB",
                    page.size,
                    MAX_RECORD_BYTES >> 20
                )));
            }
            let in_memory = self.pages.lock().unwrap_or_else(PoisonError::into_inner).add(start, page);
            if in_memory > MAX_PAGE_BYTES.saturating_add(self.length) {
                return Err(ParquetError::General(format!(
                    "the pages of its columns would take {} MiB at once; write it again with smaller pages or fewer columns",
                    in_memory >> 20
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

/// Runs a call into the `parquet` crate; a panic becomes an error and prints nothing.
fn guarded<T>(run: impl FnOnce() -> parquet::errors::Result<T>) -> parquet::errors::Result<T> {
    unless_it_panics(run).unwrap_or_else(|| Err(ParquetError::General("its pages are damaged".to_owned())))
}
