//! The GGUF container: header, metadata and tensor table of a memory-mapped file.
//!
//! Files are untrusted, so every count and offset is checked against the file's size. It does not depend on the network or on
//! names of tensors. Read `contents.rs` next.
//!
//! Layout (versions 2 and 3, little-endian): magic, version, tensor count, key count; the keys; the tensor table;
//! padding to `general.alignment`; the data. Source: ggml's docs/gguf.md.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::invalid;
use crate::model_files::tensor_table::map;
use crate::ops::weight::{Bytes, StorageDType};

pub(crate) mod split;

/// One metadata value. Integers of every width become 64-bit ones.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    Bools(Vec<bool>),
}

/// One entry of the tensor table.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    /// The name in the file: `blk.0.attn_q.weight`.
    pub name: String,
    /// Outermost dimension first, as in Hugging Face's files (GGUF has the reverse order).
    pub shape: Vec<usize>,
    /// Type of its numbers.
    pub dtype: StorageDType,
    /// Its bytes, from the start of the file.
    pub range: Range<usize>,
    /// Index of the file that holds it, among the parts of a split model; 0 otherwise.
    pub part: usize,
}

/// A parsed GGUF file, or all parts of a split one. The bytes of its tensors stay memory-mapped.
pub struct Gguf {
    name: String,
    /// The bytes of each part; one for a model that is not split.
    bytes: Vec<Bytes>,
    /// The path of each part, if it was opened by its path.
    files: Vec<PathBuf>,
    version: u32,
    metadata: BTreeMap<String, Value>,
    /// Type and value of each key as bytes of the file, in the file's order.
    places: Vec<(String, Range<usize>)>,
    tensors: Vec<GgufTensor>,
}

/// The most dimensions of a tensor in ggml.
const MAX_DIMS: u32 = 4;
/// The most bytes of a key in the format; names of tensors are far shorter.
const MAX_NAME: usize = 65_535;

impl Gguf {
    /// Opens a file, and with any part of a split model all of its parts.
    ///
    /// # Errors
    /// Those of [`Gguf::parse`]; if a file cannot be read, or a part is missing or belongs elsewhere.
    pub fn open(path: &Path) -> Result<Self> {
        split::join(Self::parse(map(path)?, &path.display().to_string())?, path)
    }

    /// Reads header, metadata and tensor table of `bytes`; `name` is the file's name in error messages.
    ///
    /// # Errors
    /// If it is not a GGUF file of version 2 or 3, is cut off, has a tensor of a type that cannot be unpacked, or has tensors
    /// outside of the file or overlapping.
    pub fn parse(bytes: Bytes, name: &str) -> Result<Self> {
        let mut cursor = Cursor { data: bytes.get(), at: 0, file: name };
        if cursor.take(4, "magic")? != b"GGUF" {
            return Err(invalid!("{name} is not a GGUF file: it does not begin with the four letters GGUF"));
        }
        let version = cursor.u32("version")?;
        if !(2..=3).contains(&version) {
            let hint = if (2..=3).contains(&version.swap_bytes()) { " (the file is big-endian)" } else { "" };
            return Err(invalid!("{name} is GGUF version {version}{hint}; versions 2 and 3, little-endian, are read"));
        }
        let tensor_count = cursor.u64("tensor count")?;
        let key_count = cursor.u64("key count")?;
        // Smallest possible entries: a key has 8 + 4 + 1 bytes, a table entry 8 + 4 + 8 + 4 + 8.
        cursor.expect_room(key_count, 13, "metadata keys")?;
        cursor.expect_room(tensor_count, 32, "tensors")?;

        let (mut metadata, mut places) = (BTreeMap::new(), Vec::new());
        for _ in 0..key_count {
            let key = cursor.string(MAX_NAME, "metadata key")?;
            let start = cursor.at;
            let kind = cursor.u32(&key)?;
            let value = cursor.value(kind, &key)?;
            places.push((key.clone(), start..cursor.at));
            if metadata.insert(key.clone(), value).is_some() {
                return Err(invalid!("{name}: the metadata key {key} occurs twice"));
            }
        }
        let tensors = read_table(&mut cursor, tensor_count, &metadata)?;
        let name = name.to_owned();
        Ok(Self { name, bytes: vec![bytes], files: vec![], version, metadata, places, tensors })
    }

    /// Name of the file in error messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The paths of the opened files: of a split model all parts, in order.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The container's version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Whether it says that it is an adapter and no model.
    pub fn is_adapter(&self) -> bool {
        self.string("general.type").is_ok_and(|kind| kind == Some("adapter"))
    }

    /// All tensors, in the order of their data, part by part.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The bytes of one tensor of this file.
    pub fn tensor_bytes(&self, tensor: &GgufTensor) -> Option<Bytes> {
        self.bytes.get(tensor.part)?.slice(tensor.range.clone())
    }

    /// The tensor of this name in the file.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.iter().find(|t| t.name == name)
    }

    /// A metadata value as stored.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// (key, type and value as bytes of the file, the first of a split model), for copying them to another file.
    pub fn raw_values(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let first = self.bytes.first().map(Bytes::get).unwrap_or_default();
        self.places.iter().map(move |(key, range)| (key.as_str(), &first[range.clone()]))
    }

    fn wrong_kind(&self, key: &str, want: &str) -> anyhow::Error {
        invalid!("{}: the metadata key {key} is not {want}", self.name)
    }

    /// A string, if the key exists.
    ///
    /// # Errors
    /// If its value is of another type.
    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(self.wrong_kind(key, "a string")),
        }
    }

    /// A non-negative integer, if the key exists.
    ///
    /// # Errors
    /// If its value is of another type.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(v)) => Ok(Some(*v)),
            Some(Value::Signed(v)) if *v >= 0 => Ok(Some(v.unsigned_abs())),
            Some(_) => Err(self.wrong_kind(key, "a non-negative integer")),
        }
    }

    /// A floating-point number, if the key exists.
    ///
    /// # Errors
    /// If its value is of another type.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(v)) => Ok(Some(*v)),
            Some(_) => Err(self.wrong_kind(key, "a floating-point number")),
        }
    }

    /// A boolean, if the key exists.
    ///
    /// # Errors
    /// If its value is of another type.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(*v)),
            Some(_) => Err(self.wrong_kind(key, "true or false")),
        }
    }

    /// A list of strings, if the key exists.
    ///
    /// # Errors
    /// If its value is of another type.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Strings(v)) => Ok(Some(v)),
            Some(_) => Err(self.wrong_kind(key, "a list of strings")),
        }
    }

    /// A list of integers, if the key exists.
    ///
    /// # Errors
    /// If its value is of another type.
    pub fn integers(&self, key: &str) -> Result<Option<&[i64]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Integers(v)) => Ok(Some(v)),
            Some(_) => Err(self.wrong_kind(key, "a list of integers")),
        }
    }

    /// A list of floating-point numbers, if the key exists.
    ///
    /// # Errors
    /// If its value is of another type.
    pub fn floats(&self, key: &str) -> Result<Option<&[f32]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Floats(v)) => Ok(Some(v)),
            Some(_) => Err(self.wrong_kind(key, "a list of floating-point numbers")),
        }
    }
}

/// Reads the tensor table and checks that all tensors are inside the file, aligned and not overlapping.
fn read_table(cursor: &mut Cursor<'_>, count: u64, metadata: &BTreeMap<String, Value>) -> Result<Vec<GgufTensor>> {
    let file = cursor.file;
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::Unsigned(a)) if a.is_power_of_two() && (1..=1 << 20).contains(a) => *a as usize,
        Some(other) => return Err(invalid!("{file}: general.alignment = {other:?} is no power of two up to 1048576")),
    };
    let mut tensors = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..count {
        let name = cursor.string(MAX_NAME, "tensor name")?;
        let dims = cursor.u32(&name)?;
        if dims == 0 || dims > MAX_DIMS {
            return Err(invalid!("{file}: tensor {name} has {dims} dimensions; 1 to {MAX_DIMS} are possible"));
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            let dim = usize::try_from(cursor.u64(&name)?).unwrap_or(0);
            if dim == 0 {
                return Err(invalid!("{file}: tensor {name} has a dimension that is 0 or too large"));
            }
            shape.push(dim);
        }
        let (kind, offset) = (cursor.u32(&name)?, cursor.u64(&name)?);
        let dtype = StorageDType::from_ggml(kind).ok_or_else(|| {
            invalid!(
                "{file}: tensor {name} is stored as ggml type {kind}{}, which is not read here; requantise the model \
                 to one of q8_0, q6_k, q5_k, q4_k, q4_1, q4_0, bf16, f16 or f32",
                unread_type_name(kind)
            )
        })?;
        let size = shape[1..]
            .iter()
            .try_fold(dtype.bytes_for(shape[0]), |row, &dim| Some(row?.checked_mul(dim)))
            .flatten()
            .ok_or_else(|| {
                let block = dtype.block().0;
                invalid!(
                    "{file}: tensor {name} of shape {shape:?} has a size that overflows or rows that are no multiple \
                     of {}'s block of {block}",
                    dtype.name()
                )
            })?;
        shape.reverse();
        if !names.insert(name.clone()) {
            return Err(invalid!("{file}: tensor {name} occurs twice in the table"));
        }
        let start = usize::try_from(offset).ok().filter(|o| o % alignment == 0).ok_or_else(|| {
            invalid!("{file}: tensor {name} begins at {offset}, which is no multiple of the alignment {alignment}")
        })?;
        // Offsets are from the start of the data, which is known after the last entry of the table.
        tensors.push((GgufTensor { name, shape, dtype, range: 0..0, part: 0 }, start, size));
    }
    let data = cursor.at.next_multiple_of(alignment);
    let mut tensors: Vec<GgufTensor> = tensors
        .into_iter()
        .map(|(mut tensor, start, size)| {
            let range = data.checked_add(start).and_then(|start| Some(start..start.checked_add(size)?));
            tensor.range = range.filter(|r| r.end <= cursor.data.len()).ok_or_else(|| {
                invalid!(
                    "{file}: tensor {} needs {size} bytes from {start} on, and the file ends before that; it is \
                     truncated, fetch it again",
                    tensor.name
                )
            })?;
            Ok(tensor)
        })
        .collect::<Result<_>>()?;
    tensors.sort_by_key(|t| (t.range.start, t.range.end));
    for pair in tensors.windows(2) {
        if pair[1].range.start < pair[0].range.end {
            return Err(invalid!("{file}: tensors {} and {} share bytes", pair[0].name, pair[1].name));
        }
    }
    Ok(tensors)
}

/// Name of a ggml type that is not supported, for error messages.
fn unread_type_name(kind: u32) -> &'static str {
    match kind {
        9 => " (q8_1)",
        15 => " (q8_k)",
        16 => " (iq2_xxs)",
        17 => " (iq2_xs)",
        18 => " (iq3_xxs)",
        19 => " (iq1_s)",
        20 => " (iq4_nl)",
        21 => " (iq3_s)",
        22 => " (iq2_s)",
        23 => " (iq4_xs)",
        24..=27 => " (an integer type)",
        28 => " (f64)",
        29 => " (iq1_m)",
        34 => " (tq1_0)",
        35 => " (tq2_0)",
        39 => " (mxfp4)",
        _ => "",
    }
}

/// A read position in the file; every read is checked against its end.
struct Cursor<'a> {
    data: &'a [u8],
    at: usize,
    file: &'a str,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|&end| end <= self.data.len()).ok_or_else(|| {
            invalid!("{}: the file ends inside its header, at {what}; it is truncated, fetch it again", self.file)
        })?;
        let taken = &self.data[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Refuses a count whose entries, each of at least `least` bytes, cannot fit into the rest of the file.
    fn expect_room(&self, count: u64, least: u64, what: &str) -> Result<()> {
        let room = (self.data.len() - self.at) as u64 / least;
        if count > room {
            return Err(invalid!("{}: it announces {count} {what}, and has room for {room} at most", self.file));
        }
        Ok(())
    }

    fn string(&mut self, longest: usize, what: &str) -> Result<String> {
        let len = usize::try_from(self.u64(what)?).unwrap_or(usize::MAX);
        if len > longest {
            return Err(invalid!("{}: {what} is {len} bytes long; {longest} is the most", self.file));
        }
        let text = std::str::from_utf8(self.take(len, what)?);
        text.map(str::to_owned).map_err(|_| invalid!("{}: {what} is not UTF-8", self.file))
    }

    /// A value of GGUF type `kind` (`enum gguf_type`).
    fn value(&mut self, kind: u32, key: &str) -> Result<Value> {
        Ok(match kind {
            0 | 2 | 4 | 10 => Value::Unsigned(self.integer(kind, key)? as u64),
            1 | 3 | 5 | 11 => Value::Signed(self.integer(kind, key)?),
            6 | 12 => Value::Float(self.number(kind, key)?),
            7 => Value::Bool(self.boolean(key)?),
            8 => Value::String(self.string(usize::MAX, key)?),
            9 => self.list(key)?,
            _ => return Err(invalid!("{}: the metadata key {key} has the unknown type {kind}", self.file)),
        })
    }

    fn list(&mut self, key: &str) -> Result<Value> {
        let (kind, count) = (self.u32(key)?, self.u64(key)?);
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            _ => return Err(invalid!("{}: the list {key} has elements of the unread type {kind}", self.file)),
        };
        self.expect_room(count, least, &format!("elements of {key}"))?;
        // Collecting a range of u64 reserves no more than `expect_room` has checked.
        Ok(match kind {
            6 | 12 => Value::Floats((0..count).map(|_| Ok(self.number(kind, key)? as f32)).collect::<Result<_>>()?),
            7 => Value::Bools((0..count).map(|_| self.boolean(key)).collect::<Result<_>>()?),
            8 => Value::Strings((0..count).map(|_| self.string(usize::MAX, key)).collect::<Result<_>>()?),
            _ => Value::Integers((0..count).map(|_| self.integer(kind, key)).collect::<Result<_>>()?),
        })
    }

    /// A value of any integer type; a u64 keeps its bits.
    fn integer(&mut self, kind: u32, key: &str) -> Result<i64> {
        Ok(match kind {
            0 => i64::from(self.array::<1>(key)?[0]),
            1 => i64::from(i8::from_le_bytes(self.array(key)?)),
            2 => i64::from(u16::from_le_bytes(self.array(key)?)),
            3 => i64::from(i16::from_le_bytes(self.array(key)?)),
            4 => i64::from(u32::from_le_bytes(self.array(key)?)),
            5 => i64::from(i32::from_le_bytes(self.array(key)?)),
            _ => i64::from_le_bytes(self.array(key)?),
        })
    }

    fn number(&mut self, kind: u32, key: &str) -> Result<f64> {
        Ok(if kind == 6 {
            // Through decimal digits, so that 1e-5 stored as f32 becomes 1e-5 and not 9.999999747e-6.
            let stored = f32::from_le_bytes(self.array(key)?);
            stored.to_string().parse().unwrap_or(f64::from(stored))
        } else {
            f64::from_le_bytes(self.array(key)?)
        })
    }

    fn boolean(&mut self, key: &str) -> Result<bool> {
        match self.array::<1>(key)?[0] {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(invalid!("{}: the boolean {key} is {other}, neither 0 nor 1", self.file)),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
