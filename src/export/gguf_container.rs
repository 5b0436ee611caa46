//! Writes the GGUF container, version 3: keys, tensor table, padded data.
//!
//! Tensors are written one at a time, so that one is in memory. Source: ggml's docs/gguf.md. It does not depend on the model.
//! Read `model_files/gguf.rs` for the reader.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};

use crate::invalid;
use crate::ops::weight::StorageDType;

/// A metadata value, of the type that llama.cpp expects for the key.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub enum KeyValue {
    U16(u16),
    I32(i32),
    U32(u32),
    F32(f32),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    Bools(Vec<bool>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// Type and value as bytes of another file.
    Raw(Vec<u8>),
}

impl KeyValue {
    fn encode(&self, out: &mut Vec<u8>) {
        let kind = |out: &mut Vec<u8>, id: u32| out.extend(id.to_le_bytes());
        let list = |out: &mut Vec<u8>, id: u32, len: usize| {
            out.extend(9u32.to_le_bytes());
            out.extend(id.to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        };
        match self {
            Self::U16(v) => {
                kind(out, 2);
                out.extend(v.to_le_bytes());
            }
            Self::I32(v) => {
                kind(out, 5);
                out.extend(v.to_le_bytes());
            }
            Self::U32(v) => {
                kind(out, 4);
                out.extend(v.to_le_bytes());
            }
            Self::F32(v) => {
                kind(out, 6);
                out.extend(v.to_le_bytes());
            }
            Self::Bool(v) => {
                kind(out, 7);
                out.push(u8::from(*v));
            }
            Self::String(text) => {
                kind(out, 8);
                string(out, text);
            }
            Self::Strings(texts) => {
                list(out, 8, texts.len());
                texts.iter().for_each(|text| string(out, text));
            }
            Self::Bools(values) => {
                list(out, 7, values.len());
                out.extend(values.iter().map(|&v| u8::from(v)));
            }
            Self::I32s(values) => {
                list(out, 5, values.len());
                values.iter().for_each(|v| out.extend(v.to_le_bytes()));
            }
            Self::F32s(values) => {
                list(out, 6, values.len());
                values.iter().for_each(|v| out.extend(v.to_le_bytes()));
            }
            Self::Raw(bytes) => out.extend(bytes),
        }
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A row of the tensor table.
#[derive(Clone, Debug)]
pub struct Entry {
    /// ggml's name: `blk.0.attn_q.weight`.
    pub name: String,
    /// Outermost dimension first, as Hugging Face writes it.
    pub shape: Vec<usize>,
    /// Type of its numbers.
    pub dtype: StorageDType,
}

impl Entry {
    /// Bytes of its data; `None` if its type cannot store the shape.
    pub(super) fn size(&self) -> Option<usize> {
        let (cols, rows) = self.shape.split_last()?;
        rows.iter().try_fold(self.dtype.bytes_for(*cols)?, |size, &n| size.checked_mul(n))
    }
}

/// ggml's default of `general.alignment`.
const ALIGNMENT: usize = 32;

/// Writes a file. `data` returns the bytes of the tensor at an index of the table.
///
/// # Errors
/// If a tensor cannot be stored in its type, `data` fails or returns another number of bytes, or writing fails.
pub fn write(
    path: &Path,
    keys: &[(String, KeyValue)],
    table: &[Entry],
    mut data: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let mut head = b"GGUF".to_vec();
    head.extend(3u32.to_le_bytes());
    head.extend((table.len() as u64).to_le_bytes());
    head.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        string(&mut head, key);
        value.encode(&mut head);
    }
    let (mut sizes, mut at) = (vec![], 0usize);
    for entry in table {
        let Some((size, id)) = entry.size().zip(entry.dtype.to_ggml()) else {
            return Err(invalid!("{} of shape {:?} cannot be {}", entry.name, entry.shape, entry.dtype.name()));
        };
        string(&mut head, &entry.name);
        head.extend((entry.shape.len() as u32).to_le_bytes());
        entry.shape.iter().rev().for_each(|&n| head.extend((n as u64).to_le_bytes()));
        head.extend(id.to_le_bytes());
        head.extend((at as u64).to_le_bytes());
        sizes.push(size);
        at = (at + size).next_multiple_of(ALIGNMENT);
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
    let failed = || format!("writing {}", path.display());
    let mut file = BufWriter::new(File::create(path).with_context(failed)?);
    file.write_all(&head).with_context(failed)?;
    for (i, (entry, &size)) in table.iter().zip(&sizes).enumerate() {
        let mut bytes = data(i).with_context(|| entry.name.clone())?;
        anyhow::ensure!(bytes.len() == size, "{}: {} bytes instead of {size}", entry.name, bytes.len());
        bytes.resize(size.next_multiple_of(ALIGNMENT), 0);
        file.write_all(&bytes).with_context(failed)?;
    }
    let file = file.into_inner().map_err(std::io::IntoInnerError::into_error).with_context(failed)?;
    file.sync_all().with_context(failed)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model_files::gguf::{Gguf, Value};
    use crate::ops::weight::Bytes;

    #[test]
    fn written_keys_and_tensors_are_read_back_equal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        let keys = [
            ("general.architecture", KeyValue::String("llama".into())),
            ("a.u16", KeyValue::U16(65_535)),
            ("a.i32", KeyValue::I32(-2)),
            ("a.u32", KeyValue::U32(7)),
            ("a.f32", KeyValue::F32(0.5)),
            ("a.bool", KeyValue::Bool(true)),
            ("a.strings", KeyValue::Strings(vec!["é".into(), String::new()])),
            ("a.bools", KeyValue::Bools(vec![true, false])),
            ("a.i32s", KeyValue::I32s(vec![-1, 2])),
            ("a.f32s", KeyValue::F32s(vec![1.5])),
        ];
        let keys: Vec<_> = keys.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
        let entry = |name: &str, shape: &[usize], dtype| Entry { name: name.into(), shape: shape.to_vec(), dtype };
        let table = [entry("one", &[3], StorageDType::F32), entry("two", &[2, 32], StorageDType::Q8_0)];
        write(&path, &keys, &table, |i| Ok(vec![i as u8 + 1; [12, 68][i]])).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let read = Gguf::parse(Bytes::new(Arc::new(bytes)), "a.gguf").unwrap();
        assert_eq!((read.unsigned("a.u16").unwrap(), read.unsigned("a.u32").unwrap()), (Some(65_535), Some(7)));
        assert_eq!(read.get("a.i32"), Some(&Value::Signed(-2)));
        assert_eq!(read.float("a.f32").unwrap(), Some(0.5));
        assert_eq!(read.get("a.bool"), Some(&Value::Bool(true)));
        assert_eq!(read.get("a.bools"), Some(&Value::Bools(vec![true, false])));
        assert_eq!(read.strings("a.strings").unwrap().unwrap(), ["é", ""]);
        assert_eq!(read.integers("a.i32s").unwrap().unwrap(), [-1, 2]);
        assert_eq!(read.floats("a.f32s").unwrap().unwrap(), [1.5]);
        for (i, tensor) in read.tensors().iter().enumerate() {
            assert_eq!((&tensor.name, &tensor.shape, tensor.dtype), (&table[i].name, &table[i].shape, table[i].dtype));
            let bytes = read.tensor_bytes(tensor).unwrap();
            assert!(bytes.get().len() == [12, 68][i] && bytes.get().iter().all(|&b| b == i as u8 + 1));
        }
        // Raw keys of another file are written unchanged.
        let copied: Vec<_> =
            read.raw_values().map(|(key, bytes)| (key.to_string(), KeyValue::Raw(bytes.to_vec()))).collect();
        let second = dir.path().join("b.gguf");
        write(&second, &copied, &table, |i| Ok(vec![i as u8 + 1; [12, 68][i]])).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&second).unwrap());
    }

    #[test]
    fn a_tensor_of_another_size_or_type_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        let table = |shape: &[usize], dtype| [Entry { name: "t".into(), shape: shape.to_vec(), dtype }];
        assert!(write(&path, &[], &table(&[2, 33], StorageDType::Q8_0), |_| Ok(vec![])).is_err());
        assert!(write(&path, &[], &table(&[64], StorageDType::NF4), |_| Ok(vec![0; 36])).is_err());
        assert!(write(&path, &[], &table(&[2], StorageDType::F32), |_| Ok(vec![0; 7])).is_err());
    }
}
