//! A file of JSON lines that another process appends to, read from where the last look ended. It does not depend on what the
//! lines hold. Read `run_files.rs` for what is made of them.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::invalid;
use crate::report::Metrics;

/// Bytes by which a file is known to be the one that was read: the end of a line, which holds the time of its writing.
const KNOWN_BY: usize = 256;

/// The file, and how far it was read.
pub(super) struct Tail {
    path: PathBuf,
    /// Bytes that were read.
    bytes: u64,
    /// The last of them.
    last: Vec<u8>,
    /// Lines that were read.
    lines: usize,
    /// Lines that are no JSON objects, and the first of them.
    broken: (usize, usize),
    /// Whether a line stands behind them whose end is not written yet.
    is_cut: bool,
}

impl Tail {
    /// The file at `path`, of which nothing is read yet; it may be absent.
    pub(super) fn of(path: PathBuf) -> Self {
        Self { path, bytes: 0, last: vec![], lines: 0, broken: (0, 0), is_cut: false }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that were read.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// The number of lines that are no JSON objects, and the number of the first.
    pub(super) fn broken(&self) -> (usize, usize) {
        self.broken
    }

    /// Whether the file still begins with what was read: not if it was cut, removed or written anew.
    pub(super) fn is_continued(&self) -> bool {
        let mut found = vec![0; self.last.len()];
        let start = self.bytes - self.last.len() as u64;
        self.bytes == 0
            || File::open(&self.path)
                .and_then(|mut file| {
                    file.seek(SeekFrom::Start(start))?;
                    file.read_exact(&mut found)
                })
                .is_ok_and(|()| found == self.last)
    }

    /// Calls `add` with every line that was written since the last call, and returns whether there was one. A line whose end
    /// is missing is read by a later call.
    ///
    /// # Errors
    /// If the file is there and cannot be read.
    pub(super) fn read(&mut self, mut add: impl FnMut(&Metrics)) -> Result<bool> {
        self.is_cut = false;
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(invalid!("{}: {e}", self.path.display())),
        };
        let reading = || format!("reading {}", self.path.display());
        file.seek(SeekFrom::Start(self.bytes)).with_context(reading)?;
        let (mut reader, mut bytes, before) = (BufReader::new(file), vec![], self.bytes);
        loop {
            bytes.clear();
            if reader.read_until(b'\n', &mut bytes).with_context(reading)? == 0 {
                return Ok(self.bytes > before);
            }
            // The break of a line that was read without it.
            let ends_last = bytes == b"\n" && self.last.last().is_some_and(|last| *last != b'\n');
            let line = serde_json::from_slice::<Metrics>(&bytes);
            let is_blank = bytes.iter().all(u8::is_ascii_whitespace);
            if line.is_err() && !is_blank && bytes.last() != Some(&b'\n') {
                self.is_cut = true;
                return Ok(self.bytes > before);
            }
            self.lines += usize::from(!ends_last);
            match line {
                Ok(line) => add(&line),
                Err(_) if is_blank => {}
                Err(_) => {
                    self.broken = (self.broken.0 + 1, if self.broken.0 == 0 { self.lines } else { self.broken.1 })
                }
            }
            self.bytes += bytes.len() as u64;
            self.last.clear();
            self.last.extend_from_slice(&bytes[bytes.len().saturating_sub(KNOWN_BY)..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    #[test]
    fn only_what_was_appended_is_read_and_an_unfinished_line_once_it_is_finished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        let mut tail = Tail::of(path.clone());
        let mut seen = vec![];
        let mut look = |tail: &mut Tail| {
            let is_new = tail.read(|line| seen.push(line["step"].as_u64().unwrap())).unwrap();
            (is_new, std::mem::take(&mut seen))
        };
        let append = |text: &str| {
            let file = fs::OpenOptions::new().create(true).append(true).open(&path);
            file.unwrap().write_all(text.as_bytes()).unwrap();
        };
        assert_eq!(look(&mut tail), (false, vec![]), "there is no file yet");
        append("{\"step\":1}\n{\"step\":2}\n{\"st");
        assert_eq!((look(&mut tail), tail.is_cut()), ((true, vec![1, 2]), true));
        assert_eq!(look(&mut tail), (false, vec![]));
        append("ep\":3}");
        assert_eq!((look(&mut tail), tail.is_cut()), ((true, vec![3]), false), "an object is whole without its break");
        append("\nno object\n{\"step\":5}\n");
        assert_eq!((look(&mut tail).1, tail.broken()), (vec![5], (1, 4)));
        assert!(tail.is_continued());
        // A resumed run cuts the file and goes on to the same length.
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("\"step\":5", "\"step\":6")).unwrap();
        assert!(!tail.is_continued());
        fs::remove_file(&path).unwrap();
        assert!(!tail.is_continued());
    }
}
