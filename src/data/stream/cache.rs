//! The cache file of tokenised examples: written once in constant memory, then mapped into memory.
//!
//! Its name is the hash of everything that its content depends on, so a stale file is never read. Layout,
//! little-endian: magic (16 bytes), key (32), number of examples, number of words, longest sequence, bytes of the
//! report (u64 each), SHA-256 of all other bytes (32); then the examples' u32 words, an index of 24 bytes per example,
//! and the report as JSON. This file does not depend on the record types or the tokenizer. Read
//! `data/stream/pipeline.rs` next.

use std::borrow::Cow;
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use memmap2::{Advice, Mmap};
use sha2::{Digest, Sha256};

use crate::data::examples::objectives::Report;
use crate::data::examples::{Example, Examples, PromptExample, RankedExample, SftExample, UnpairedExample};
use crate::data::record::PairLabel;

/// Names the layout. Increase the digit when the layout or the making of examples changes: every cache is then stale.
const MAGIC: &[u8; 16] = b"fourfold-tokens3";
const HEADER: usize = 16 + 32 + 4 * 8 + 32;
/// Bytes of an example's index entry: its first word (u64), its group (u64), its number of words and of tokens (u32
/// each).
const INDEX_ENTRY: usize = 24;

/// The hash of everything that a cache's content depends on.
pub type Key = [u8; 32];

/// An example that a cache file can hold, as 32-bit words.
pub trait Stored: Sized {
    /// Appends the example's words.
    fn write(&self, words: &mut Vec<u32>);

    /// Reads an example from its words; None if they are not a valid example.
    fn read(words: &[u32]) -> Option<Self>;
}

/// Appends the number of items, then the items.
fn put(words: &mut Vec<u32>, items: &[u32]) {
    words.push(items.len() as u32);
    words.extend_from_slice(items);
}

/// Reads what [`put`] appended.
fn take<'w>(words: &mut &'w [u32]) -> Option<&'w [u32]> {
    let (&length, rest) = words.split_first()?;
    let (items, rest) = rest.split_at_checked(length as usize)?;
    *words = rest;
    Some(items)
}

/// The words: the tokens, then the run lengths of the loss mask, beginning with a run of false.
impl Stored for SftExample {
    fn write(&self, words: &mut Vec<u32>) {
        put(words, &self.tokens);
        let mut current = false;
        let mut run = 0;
        for &mark in &self.loss_mask {
            if mark != current {
                words.push(run);
                (current, run) = (mark, 0);
            }
            run += 1;
        }
        words.push(run);
    }

    fn read(mut words: &[u32]) -> Option<Self> {
        let tokens = take(&mut words)?.to_vec();
        let mut loss_mask = Vec::with_capacity(tokens.len());
        for (number, &run) in words.iter().enumerate() {
            let to = loss_mask.len().checked_add(run as usize).filter(|&to| to <= tokens.len())?;
            loss_mask.resize(to, number % 2 == 1);
        }
        (loss_mask.len() == tokens.len()).then_some(Self { tokens, loss_mask })
    }
}

/// The words: the label, the prompt, then each response.
impl Stored for RankedExample {
    fn write(&self, words: &mut Vec<u32>) {
        words.extend(self.label.to_words());
        put(words, &self.prompt);
        self.responses.iter().for_each(|response| put(words, response));
    }

    fn read(mut words: &[u32]) -> Option<Self> {
        let (&label, rest) = words.split_first_chunk()?;
        words = rest;
        let prompt = take(&mut words)?.to_vec();
        let mut responses = vec![];
        while !words.is_empty() {
            responses.push(take(&mut words)?.to_vec());
        }
        Some(Self { prompt, responses, label: PairLabel::from_words(label) })
    }
}

/// The words: the prompt, the response, then the label.
impl Stored for UnpairedExample {
    fn write(&self, words: &mut Vec<u32>) {
        put(words, &self.prompt);
        put(words, &self.response);
        words.push(self.desirable.into());
    }

    fn read(mut words: &[u32]) -> Option<Self> {
        let (prompt, response) = (take(&mut words)?.to_vec(), take(&mut words)?.to_vec());
        let &[desirable] = words else { return None };
        Some(Self { prompt, response, desirable: desirable == 1 })
    }
}

/// Appends a text: its number of bytes, then the bytes, four per word.
fn put_text(words: &mut Vec<u32>, text: &str) {
    words.push(text.len() as u32);
    words.extend(text.as_bytes().chunks(4).map(|bytes| {
        let mut word = [0; 4];
        word[..bytes.len()].copy_from_slice(bytes);
        u32::from_le_bytes(word)
    }));
}

/// Reads what [`put_text`] appended.
fn take_text(words: &mut &[u32]) -> Option<String> {
    let (&length, rest) = words.split_first()?;
    let (text, rest) = rest.split_at_checked((length as usize).div_ceil(4))?;
    *words = rest;
    let mut bytes: Vec<u8> = text.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.truncate(length as usize);
    String::from_utf8(bytes).ok()
}

/// The words: the record's number, the tokens, the text, and the reference answer if there is one.
impl Stored for PromptExample {
    fn write(&self, words: &mut Vec<u32>) {
        // The split limits the number of examples to u32 as well.
        words.push(self.entry as u32);
        put(words, &self.tokens);
        put_text(words, &self.text);
        self.answer.iter().for_each(|answer| put_text(words, answer));
    }

    fn read(mut words: &[u32]) -> Option<Self> {
        let (&entry, rest) = words.split_first()?;
        words = rest;
        let (tokens, text) = (take(&mut words)?.to_vec(), take_text(&mut words)?);
        let answer = match words {
            [] => None,
            _ => Some(take_text(&mut words)?),
        };
        Some(Self { tokens, text, answer, entry: entry as usize })
    }
}

/// Writes a cache file under a temporary name and renames it when it is complete.
pub struct Writer {
    path: PathBuf,
    temporary: PathBuf,
    key: Key,
    payload: BufWriter<File>,
    index: BufWriter<File>,
    hash: Sha256,
    examples: u64,
    words: u64,
    longest: u64,
    buffer: Vec<u32>,
    bytes: Vec<u8>,
}

/// `path` with a suffix that no other process and no other writer uses.
fn beside(path: &Path, what: &str) -> PathBuf {
    static WRITERS: AtomicUsize = AtomicUsize::new(0);
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.{}.{what}", std::process::id(), WRITERS.fetch_add(1, Ordering::Relaxed)));
    name.into()
}

impl Writer {
    /// A writer for a new cache file at `path`.
    ///
    /// # Errors
    /// The temporary files cannot be created.
    pub fn create(path: &Path, key: Key) -> Result<Self> {
        let open = |path: &Path| {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
            file.with_context(|| format!("making {}", path.display()))
        };
        let (temporary, index) = (beside(path, "tmp"), beside(path, "index"));
        let mut payload = BufWriter::with_capacity(1 << 20, open(&temporary)?);
        payload.write_all(&[0; HEADER])?;
        let index_file = open(&index)?;
        // Only this handle needs the index file: without a name it is freed when the process ends in any way.
        fs::remove_file(&index).with_context(|| format!("removing {}", index.display()))?;
        Ok(Self {
            path: path.into(),
            temporary,
            key,
            payload,
            index: BufWriter::with_capacity(1 << 18, index_file),
            hash: Sha256::new(),
            examples: 0,
            words: 0,
            longest: 0,
            buffer: vec![],
            bytes: vec![],
        })
    }

    /// Appends an example and its group.
    ///
    /// # Errors
    /// The file cannot be written, for example because the disk is full.
    pub fn push<T: Example + Stored>(&mut self, example: &T, group: u64) -> Result<()> {
        self.buffer.clear();
        example.write(&mut self.buffer);
        self.bytes.clear();
        self.bytes.extend(self.buffer.iter().flat_map(|word| word.to_le_bytes()));
        self.hash.update(&self.bytes);
        let written = self.payload.write_all(&self.bytes);
        written.with_context(|| format!("writing {}", self.temporary.display()))?;
        let mut entry = [0; INDEX_ENTRY];
        entry[..8].copy_from_slice(&self.words.to_le_bytes());
        entry[8..16].copy_from_slice(&group.to_le_bytes());
        entry[16..20].copy_from_slice(&(self.buffer.len() as u32).to_le_bytes());
        entry[20..].copy_from_slice(&u32::try_from(example.tokens())?.to_le_bytes());
        self.index.write_all(&entry).with_context(|| format!("writing the index of {}", self.path.display()))?;
        self.words += self.buffer.len() as u64;
        self.examples += 1;
        self.longest = self.longest.max(example.longest_sequence() as u64);
        Ok(())
    }

    /// Completes the file and renames it to its path in one step: a reader sees the whole file or none.
    ///
    /// # Errors
    /// The file cannot be written, for example because the disk is full.
    pub fn finish(mut self, report: &Report) -> Result<()> {
        let result = self.complete(report);
        if result.is_err() {
            let _ = fs::remove_file(&self.temporary);
        }
        result.with_context(|| format!("writing {}", self.path.display()))
    }

    fn complete(&mut self, report: &Report) -> Result<()> {
        self.index.flush()?;
        let index = self.index.get_mut();
        index.seek(SeekFrom::Start(0))?;
        let mut buffer = vec![0; 1 << 18];
        loop {
            let read = index.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            self.hash.update(&buffer[..read]);
            self.payload.write_all(&buffer[..read])?;
        }
        let report = serde_json::to_vec(report)?;
        self.hash.update(&report);
        self.payload.write_all(&report)?;
        let mut header = [MAGIC.as_slice(), &self.key].concat();
        for number in [self.examples, self.words, self.longest, report.len() as u64] {
            header.extend(number.to_le_bytes());
        }
        // The hash covers the header too.
        self.hash.update(&header);
        header.extend(self.hash.finalize_reset());
        self.payload.seek(SeekFrom::Start(0))?;
        self.payload.write_all(&header)?;
        self.payload.flush()?;
        self.payload.get_ref().sync_all()?;
        fs::rename(&self.temporary, &self.path)?;
        // The folder's entry must reach the disk too; not every file system can open a folder.
        if let Some(folder) = self.path.parent().and_then(|folder| File::open(folder).ok()) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

/// An interrupted build leaves no file.
impl Drop for Writer {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.temporary);
    }
}

/// A mapped cache file.
#[derive(Debug)]
pub struct Cache<T> {
    path: PathBuf,
    map: Mmap,
    examples: usize,
    /// Offset of the index in the file.
    index: usize,
    longest: usize,
    report: Report,
    of: PhantomData<fn() -> T>,
}

/// The u64 at offset `at`.
fn number(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

impl<T: Example + Stored> Cache<T> {
    /// Opens the file and checks its key and its hash, for which the whole file is read once.
    ///
    /// # Errors
    /// The file is missing, incomplete, damaged or of another key: the caller makes a new one.
    pub fn open(path: &Path, key: &Key) -> Result<Self> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut header = [0; HEADER];
        file.read_exact(&mut header)?;
        ensure!(header.starts_with(MAGIC) && header[16..48] == *key, "it was made from other data or settings");
        let [examples, words, longest, report] = [48, 56, 64, 72].map(|at| number(&header, at));
        let index = words.checked_mul(4).and_then(|bytes| bytes.checked_add(HEADER as u64));
        let end = examples.checked_mul(INDEX_ENTRY as u64).and_then(|bytes| index?.checked_add(bytes));
        let whole = end.and_then(|end| end.checked_add(report)) == Some(size);
        ensure!(whole, "its size differs from its header");
        // Hashed with read calls, not through the map: the pages need not stay in memory.
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 18]);
        loop {
            let read = file.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hash.update(&buffer[..read]);
        }
        hash.update(&header[..80]);
        ensure!(hash.finalize()[..] == header[80..], "its content is damaged");
        // SAFETY: the file is never written again under any name: writers fill a new file and rename it over this one,
        // which leaves the mapped content unchanged.
        let map = unsafe { Mmap::map(&file)? };
        let _ = map.advise(Advice::Random);
        let (index, report) = (index.unwrap_or(0) as usize, report as usize);
        let report = serde_json::from_slice(&map[map.len() - report..])?;
        let (examples, longest) = (examples as usize, longest as usize);
        Ok(Self { path: path.into(), map, examples, index, longest, report, of: PhantomData })
    }

    /// The counts of the records from which the cache was made.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The group of each example, for the split.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = u64> + '_ {
        (0..self.examples).map(|row| number(&self.map, self.index + row * INDEX_ENTRY + 8))
    }

    /// The number of words and of tokens of an example.
    fn sizes(&self, row: usize) -> (usize, usize) {
        let both = number(&self.map, self.index + row * INDEX_ENTRY + 16);
        ((both & 0xFFFF_FFFF) as usize, (both >> 32) as usize)
    }
}

impl<T: Example + Stored> Examples<T> for Cache<T> {
    fn len(&self) -> usize {
        self.examples
    }

    fn get(&self, row: usize) -> Result<Cow<'_, T>> {
        ensure!(row < self.examples, "example {row} of {}", self.examples);
        let from = (number(&self.map, self.index + row * INDEX_ENTRY) as usize).checked_mul(4).map(|at| at + HEADER);
        let bytes = from.and_then(|from| self.map[..self.index].get(from..from.checked_add(self.sizes(row).0 * 4)?));
        let words: Option<Vec<u32>> =
            bytes.map(|bytes| bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect());
        let example = words.and_then(|words| T::read(&words));
        example.map(Cow::Owned).with_context(|| format!("{}: example {row} is damaged", self.path.display()))
    }

    fn tokens(&self, row: usize) -> usize {
        self.sizes(row).1
    }

    fn longest_sequence(&self) -> usize {
        self.longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    fn random_tokens(rng: &mut SplitMix64, most: usize) -> Vec<u32> {
        (0..1 + rng.below(most)).map(|_| rng.below(50_000) as u32).collect()
    }

    fn sft(rng: &mut SplitMix64) -> SftExample {
        let tokens = random_tokens(rng, 30);
        SftExample { loss_mask: tokens.iter().map(|_| rng.below(3) == 0).collect(), tokens }
    }

    fn write<T: Example + Stored>(path: &Path, key: Key, examples: &[T]) {
        let mut writer = Writer::create(path, key).unwrap();
        for (i, example) in examples.iter().enumerate() {
            writer.push(example, i as u64 * 7).unwrap();
        }
        writer.finish(&Report { read: examples.len(), kept: examples.len(), ..Report::default() }).unwrap();
    }

    fn assert_round_trip<T: Example + Stored + PartialEq + std::fmt::Debug>(examples: &[T]) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        write(&path, [3; 32], examples);
        let cache = Cache::<T>::open(&path, &[3; 32]).unwrap();
        assert_eq!((cache.len(), cache.report().read), (examples.len(), examples.len()));
        for (row, example) in examples.iter().enumerate() {
            assert_eq!(&*cache.get(row).unwrap(), example);
            assert_eq!(Examples::tokens(&cache, row), example.tokens());
        }
        assert_eq!(Examples::<T>::longest_sequence(&cache), examples.longest_sequence());
        assert!(cache.groups().eq((0..examples.len() as u64).map(|i| i * 7)));
        assert!(cache.get(examples.len()).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no other file remains");
    }

    #[test]
    fn every_type_of_example_survives_a_round_trip() {
        let mut rng = SplitMix64::new(5);
        assert_round_trip(&(0..50).map(|_| sft(&mut rng)).collect::<Vec<_>>());
        let mut ranked = |k| RankedExample {
            prompt: random_tokens(&mut rng, 9),
            responses: (0..k).map(|_| random_tokens(&mut rng, 9)).collect(),
            label: PairLabel::new(0.25 * k as f32, -1.5),
        };
        assert_round_trip(&[2, 2, 5, 3].map(&mut ranked));
        let unpaired =
            [true, false].map(|desirable| UnpairedExample { prompt: vec![1], response: vec![2, 3], desirable });
        assert_round_trip(&unpaired);
        let texts = ["", "a", "ab", "four", "fünf!", "\n東京"];
        assert_round_trip(&texts.map(|text| PromptExample {
            tokens: vec![1, 2],
            text: text.to_owned(),
            answer: (text.len() % 2 == 0).then(|| format!("{text}!")),
            entry: 70_000 + text.len(),
        }));
        assert_round_trip::<SftExample>(&[]);
    }

    #[test]
    fn a_flipped_bit_a_cut_and_another_key_are_detected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let mut rng = SplitMix64::new(6);
        let examples: Vec<SftExample> = (0..8).map(|_| sft(&mut rng)).collect();
        write(&path, [3; 32], &examples);
        assert!(Cache::<SftExample>::open(&path, &[4; 32]).is_err());
        let whole = fs::read(&path).unwrap();
        let open = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            Cache::<SftExample>::open(&path, &[3; 32]).is_ok()
        };
        assert!(open(&whole));
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 8);
            assert!(!open(&damaged), "byte {at} of {}", whole.len());
        }
        for length in [0, 10, HEADER, whole.len() - 1] {
            assert!(!open(&whole[..length]), "{length} bytes");
        }
    }

    #[test]
    fn an_interrupted_build_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&folder.path().join("x"), [0; 32]).unwrap();
        writer.push(&example(), 0).unwrap();
        drop(writer);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    fn example() -> SftExample {
        SftExample { tokens: vec![1, 2], loss_mask: vec![false, true] }
    }
}
