//! A file of JSON lines that can be truncated to an earlier length. Every line is written at once, so that a crash leaves at
//! most the last one unfinished. It does not depend on the content.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// The file, open at its end.
pub(super) struct Lines {
    file: File,
    name: &'static str,
    bytes: u64,
}

impl Lines {
    /// An empty file; a former one of that name is lost.
    pub(super) fn begin(path: &Path, name: &'static str) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self { file, name, bytes: 0 })
    }

    /// The first `bytes` bytes of the file that is there. Where it is shorter than that, its last whole line is the end,
    /// and a warning on stderr names what is missing.
    pub(super) fn go_on(path: &Path, name: &'static str, bytes: u64) -> Result<Self> {
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = opened.with_context(|| format!("opening {}", path.display()))?;
        let length = file.metadata().with_context(|| format!("reading {}", path.display()))?.len();
        let keep = if length >= bytes { bytes } else { whole_lines(&mut file)? };
        if length < bytes {
            crate::tell!(
                "{}: {length} bytes, and the checkpoint was written after {bytes}: lines of before it are lost; going \
                 on after the last whole line, at byte {keep}",
                path.display()
            );
        }
        file.set_len(keep).and_then(|()| file.seek(SeekFrom::End(0))).with_context(|| format!("cutting {name}"))?;
        Ok(Self { file, name, bytes: keep })
    }

    pub(super) fn push(&mut self, value: &Value) -> Result<()> {
        let line = format!("{value}\n");
        self.file.write_all(line.as_bytes()).with_context(|| format!("writing {}", self.name))?;
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// The length, once all of it is on the disk.
    pub(super) fn synced(&self) -> Result<u64> {
        self.file.sync_data().with_context(|| format!("writing {}", self.name))?;
        Ok(self.bytes)
    }
}

/// The length of a file up to and with its last line break, read from the end in pieces.
fn whole_lines(file: &mut File) -> Result<u64> {
    const PIECE: u64 = 1 << 16;
    let mut end = file.seek(SeekFrom::End(0))?;
    let mut piece = vec![];
    while end > 0 {
        let start = end.saturating_sub(PIECE);
        file.seek(SeekFrom::Start(start))?;
        piece.clear();
        Read::by_ref(file).take(end - start).read_to_end(&mut piece)?;
        if let Some(at) = piece.iter().rposition(|&b| b == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn going_on_cuts_at_the_given_byte_or_where_bytes_are_missing_at_the_last_whole_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        let mut lines = Lines::begin(&path, "x.jsonl").unwrap();
        (1..4).for_each(|i| lines.push(&json!({ "step": i })).unwrap());
        let whole = std::fs::read(&path).unwrap();
        let line = whole.len() as u64 / 3;
        assert_eq!(lines.synced().unwrap(), 3 * line);
        drop(lines);
        // A checkpoint was written after two lines.
        Lines::go_on(&path, "x.jsonl", 2 * line).unwrap().push(&json!({"step": 3})).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        // The file lost the end of its second line, and the checkpoint tells of three.
        for left in [2 * line - 1, line + 1, line, line - 1, 0] {
            std::fs::write(&path, &whole[..left as usize]).unwrap();
            let kept = Lines::go_on(&path, "x.jsonl", 3 * line).unwrap().synced().unwrap();
            assert_eq!((kept, std::fs::metadata(&path).unwrap().len()), (left / line * line, left / line * line));
        }
    }
}
