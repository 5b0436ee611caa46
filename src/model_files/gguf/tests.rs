//! Tests of the GGUF reader on valid and damaged bytes. The writer is also used by tests of other readers.

use crate::model_files::gguf::*;
use std::sync::Arc;

/// An independent writer of GGUF bytes, so that the reader is not tested against the program's own writer.
#[derive(Default)]
pub(crate) struct Writer {
    keys: Vec<u8>,
    key_count: u64,
    table: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

impl Writer {
    fn key(mut self, name: &str, kind: u32, value: &[u8]) -> Self {
        self.keys.extend([text(name), kind.to_le_bytes().to_vec(), value.to_vec()].concat());
        self.key_count += 1;
        self
    }

    pub(crate) fn u32(self, name: &str, value: u32) -> Self {
        self.key(name, 4, &value.to_le_bytes())
    }

    pub(crate) fn f32(self, name: &str, value: f32) -> Self {
        self.key(name, 6, &value.to_le_bytes())
    }

    pub(crate) fn bool(self, name: &str, value: bool) -> Self {
        self.key(name, 7, &[u8::from(value)])
    }

    pub(crate) fn string(self, name: &str, value: &str) -> Self {
        self.key(name, 8, &text(value))
    }

    pub(crate) fn strings(self, name: &str, values: &[&str]) -> Self {
        let mut list = [&8u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        list.extend(values.iter().flat_map(|v| text(v)));
        self.key(name, 9, &list)
    }

    pub(crate) fn i32s(self, name: &str, values: &[i32]) -> Self {
        let mut list = [&5u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        list.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        self.key(name, 9, &list)
    }

    pub(crate) fn f32s(self, name: &str, values: &[f32]) -> Self {
        let mut list = [&6u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        list.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        self.key(name, 9, &list)
    }

    /// A tensor; `shape` has the outermost dimension first.
    pub(crate) fn tensor(mut self, name: &str, shape: &[usize], kind: u32, bytes: &[u8]) -> Self {
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        let offset = self.data.len() as u64;
        self.data.extend(bytes);
        self.entry(name, shape, kind, offset)
    }

    pub(crate) fn f32_tensor(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, shape, 0, &bytes)
    }

    /// An entry of the table without data.
    pub(crate) fn entry(mut self, name: &str, shape: &[usize], kind: u32, offset: u64) -> Self {
        self.table.extend(text(name));
        self.table.extend((shape.len() as u32).to_le_bytes());
        self.table.extend(shape.iter().rev().flat_map(|&d| (d as u64).to_le_bytes()));
        self.table.extend([&kind.to_le_bytes()[..], &offset.to_le_bytes()].concat());
        self.tensor_count += 1;
        self
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend(self.tensor_count.to_le_bytes());
        out.extend(self.key_count.to_le_bytes());
        out.extend(self.keys);
        out.extend(self.table);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(self.data);
        out
    }
}

fn parse(bytes: Vec<u8>) -> Result<Gguf> {
    Gguf::parse(Bytes::new(Arc::new(bytes)), "x.gguf")
}

fn refusal(bytes: Vec<u8>) -> String {
    parse(bytes).err().expect("must be refused").to_string()
}

fn small() -> Writer {
    Writer::default()
        .string("general.architecture", "llama")
        .u32("n", 7)
        .f32("eps", 1e-5)
        .bool("yes", true)
        .strings("words", &["a", "", "ccc"])
        .i32s("kinds", &[1, -3])
        .f32s("scores", &[0.5, -2.0])
        .f32_tensor("a.weight", &[2, 3], &[1., 2., 3., 4., 5., 6.])
        .f32_tensor("b.weight", &[1], &[9.])
}

#[test]
fn metadata_and_tensors_are_read_as_written() {
    let g = parse(small().finish()).unwrap();
    assert_eq!(g.version(), 3);
    assert_eq!(g.string("general.architecture").unwrap(), Some("llama"));
    assert_eq!((g.unsigned("n").unwrap(), g.boolean("yes").unwrap()), (Some(7), Some(true)));
    assert_eq!(g.float("eps").unwrap(), Some(1e-5));
    assert_eq!(g.strings("words").unwrap().unwrap(), ["a", "", "ccc"]);
    assert_eq!(g.integers("kinds").unwrap().unwrap(), [1, -3]);
    assert_eq!(g.floats("scores").unwrap().unwrap(), [0.5, -2.0]);
    assert!(g.unsigned("yes").is_err() && g.unsigned("absent").unwrap().is_none());
    let b = g.tensor("b.weight").unwrap();
    assert_eq!(g.tensor_bytes(b).unwrap().get(), 9f32.to_le_bytes());
    assert_eq!(g.tensor("a.weight").unwrap().shape, [2, 3]);
}

#[test]
fn version_2_is_read_like_version_3() {
    let mut bytes = small().finish();
    bytes[4] = 2;
    let (two, three) = (parse(bytes).unwrap(), parse(small().finish()).unwrap());
    assert_eq!((two.version(), three.version()), (2, 3));
    assert!(two.raw_values().eq(three.raw_values()) && two.raw_values().count() == 7);
    let tensors = |g: &Gguf| -> Vec<_> {
        g.tensors().iter().map(|t| (t.name.clone(), g.tensor_bytes(t).unwrap().get().to_vec())).collect()
    };
    assert_eq!(tensors(&two), tensors(&three));
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let whole = small().finish();
    for len in 0..whole.len() {
        assert!(parse(whole[..len].to_vec()).is_err(), "cut at {len} of {}", whole.len());
    }
}

#[test]
fn damage_to_any_header_byte_does_not_panic() {
    let whole = small().finish();
    for at in 0..whole.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= flip;
            let _ = parse(bytes);
        }
    }
}

#[test]
fn wrong_magic_version_and_byte_order_have_distinct_errors() {
    let mut bytes = small().finish();
    bytes[4] = 1;
    assert!(refusal(bytes.clone()).contains("version 1"));
    bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
    assert!(refusal(bytes.clone()).contains("big-endian"));
    bytes[0] = b'X';
    assert!(refusal(bytes).contains("not a GGUF"));
}

#[test]
fn huge_counts_are_refused_before_anything_is_allocated() {
    for at in [8, 16] {
        let mut bytes = small().finish();
        bytes[at..at + 8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
        assert!(refusal(bytes).contains("has room for"));
    }
    let list = [&8u32.to_le_bytes()[..], &u64::MAX.to_le_bytes()].concat();
    assert!(refusal(Writer::default().key("words", 9, &list).finish()).contains("elements of words"));
    let long = u64::MAX.to_le_bytes();
    assert!(refusal(Writer::default().key("word", 8, &long).finish()).contains("word"));
}

#[test]
fn tensors_outside_overlapping_unaligned_or_overflowing_are_refused() {
    let base = || Writer::default().f32_tensor("a", &[8], &[0.; 8]);
    assert!(refusal(base().entry("b", &[8], 0, 0).finish()).contains("share bytes"));
    assert!(refusal(base().entry("b", &[8], 0, 4).finish()).contains("alignment"));
    assert!(refusal(base().entry("b", &[8], 0, 64).finish()).contains("truncated"));
    assert!(refusal(base().entry("b", &[8], 0, u64::MAX - 31).finish()).contains("truncated"));
    assert!(refusal(base().entry("b", &[usize::MAX, 4], 0, 32).finish()).contains("overflows"));
    assert!(refusal(base().entry("b", &[33], 8, 32).finish()).contains("block of 32"));
    assert!(refusal(base().entry("b", &[0], 0, 32).finish()).contains("dimension"));
    assert!(refusal(base().entry("b", &[1; 5], 0, 32).finish()).contains("5 dimensions"));
    assert!(refusal(base().entry("b", &[256], 23, 32).finish()).contains("iq4_xs"));
    assert!(refusal(base().f32_tensor("a", &[8], &[0.; 8]).finish()).contains("twice"));
    assert!(refusal(base().u32("general.alignment", 24).finish()).contains("power of two"));
}
