//! A GGUF model in several files, as llama.cpp's `llama-gguf-split` writes them: which tensors go into which file.
//!
//! The first file holds all metadata, the others only what makes them parts; llama.cpp opens the first and finds the rest. It
//! does not depend on the model. Read `gguf_container.rs` for one file, `model_files/gguf/split.rs` for the reader.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::gguf_architecture::Keys;
use super::gguf_container::{Entry, KeyValue, write};
use crate::invalid;
use crate::model_files::gguf::split::{MAX_PARTS, PartName};

/// The files of a model: the range of the tensor table that each holds.
pub(super) struct Parts {
    /// Name of each file, in order.
    names: Vec<String>,
    ranges: Vec<Range<usize>>,
}

impl Parts {
    /// Divides a table into files of at most `most` bytes of tensors, one tensor at least. `None` for `most` is one file, which
    /// has the name of `out`; several files have it with their number.
    ///
    /// # Errors
    /// If there would be more files than names.
    pub(super) fn new(table: &[Entry], most: Option<usize>, out: &Path) -> Result<Self> {
        let name = out.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let (mut ranges, mut start, mut filled): (Vec<Range<usize>>, usize, usize) = (vec![], 0, 0);
        for (i, entry) in table.iter().enumerate() {
            let size = entry.size().unwrap_or(0);
            if i > start && most.is_some_and(|most| filled.saturating_add(size) > most) {
                ranges.push(start..i);
                (start, filled) = (i, 0);
            }
            filled = filled.saturating_add(size);
        }
        ranges.push(start..table.len());
        let count = ranges.len();
        if count > MAX_PARTS {
            return Err(invalid!("--max-shard-size would make {count} files; {MAX_PARTS} is the most"));
        }
        let prefix = name.strip_suffix(".gguf").unwrap_or(&name);
        let names = match count {
            1 => vec![name],
            _ => (1..=count).map(|number| PartName::of(prefix, number, count)).collect(),
        };
        Ok(Self { names, ranges })
    }

    /// The files' paths beside `out`, in order; the first is the one to open.
    pub(super) fn paths(&self, out: &Path) -> Vec<PathBuf> {
        self.names.iter().map(|name| out.with_file_name(name)).collect()
    }

    /// Writes the files into `dir`. `data` returns the bytes of the tensor at an index of the table.
    ///
    /// # Errors
    /// Those of [`write`].
    pub(super) fn write(
        &self,
        dir: &Path,
        keys: &Keys,
        table: &[Entry],
        mut data: impl FnMut(usize) -> Result<Vec<u8>>,
    ) -> Result<()> {
        let count = self.ranges.len();
        for (no, (name, range)) in self.names.iter().zip(&self.ranges).enumerate() {
            let mut own = if no == 0 { keys.clone() } else { vec![] };
            if count > 1 {
                let small = |n: usize| KeyValue::U16(u16::try_from(n).unwrap_or(u16::MAX));
                let all = KeyValue::I32(i32::try_from(table.len()).unwrap_or(i32::MAX));
                own.push(("split.no".into(), small(no)));
                own.push(("split.count".into(), small(count)));
                own.push(("split.tensors.count".into(), all));
            }
            write(&dir.join(name), &own, &table[range.clone()], |i| data(range.start + i))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::weight::StorageDType;

    #[test]
    fn parts_hold_at_most_the_bytes_that_were_asked_for_and_one_tensor_at_least() {
        let entry = |n: usize| Entry { name: "t".into(), shape: vec![n], dtype: StorageDType::F32 };
        let table = [entry(10), entry(5), entry(100), entry(1), entry(1)];
        let ranges = |most| {
            let parts = Parts::new(&table, most, Path::new("dir/m.gguf")).unwrap();
            (parts.ranges.clone(), parts.paths(Path::new("dir/m.gguf")))
        };
        let (split, paths) = ranges(Some(60));
        assert_eq!(split, [0..2, 2..3, 3..5]);
        assert_eq!(paths[0], Path::new("dir/m-00001-of-00003.gguf"));
        for one in [None, Some(1 << 20)] {
            let (whole, paths) = ranges(one);
            assert_eq!((whole.len(), &whole[0], &paths[..]), (1, &(0..5), &[PathBuf::from("dir/m.gguf")][..]));
        }
        assert_eq!(ranges(Some(1)).0.len(), 5);
    }
}
