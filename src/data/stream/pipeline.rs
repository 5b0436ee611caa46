//! [`prepare`]: `[data]` -> the training and held-out examples of an objective, for files of any size.
//!
//! One thread reads, all cores tokenise, and the examples go into memory or a cache file in the order of the records,
//! independent of the threads' timing. This file does not depend on `model` or on training code. Read
//! `data/stream/ids.rs` next.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::config::{Data, EvalSize, Paths};
use crate::data::examples::encoder::ModelEncoder;
use crate::data::examples::objectives::{Encoding, Objective, Outcome, RawText, Report, for_each};
use crate::data::examples::{Example, Examples, SftExample};
use crate::data::files::read::bytes_read;
use crate::data::record::{Entry, Place, Record, Skipped, Text};
use crate::data::stream::cache::{Cache, Key, Stored, Writer};
use crate::data::stream::scan::{input_files, scan};
use crate::data::stream::sources::NO_THREAD;
use crate::data::stream::split::{group, split};
use crate::invalid;
use crate::report::progress::{Progress, Unit};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat_template::Message;

/// Bytes of all data files below which examples stay in memory: that is faster than a cache lookup and leaves no file.
pub(crate) const IN_MEMORY_BYTES: u64 = 16 << 20;

/// A subset of a list of examples, which may be in memory or in a cache file.
#[derive(Clone)]
pub struct Subset<T: Example> {
    all: Arc<dyn Examples<T> + Send + Sync>,
    rows: Vec<u32>,
}

impl<T: Example> Subset<T> {
    /// A copy of the examples in memory.
    ///
    /// # Errors
    /// Those of [`Examples::get`].
    pub fn to_vec(&self) -> Result<Vec<T>> {
        (0..self.len()).map(|row| self.get(row).map(Cow::into_owned)).collect()
    }
}

impl<T: Example> Examples<T> for Subset<T> {
    fn len(&self) -> usize {
        self.rows.len()
    }

    fn get(&self, index: usize) -> Result<Cow<'_, T>> {
        self.all.get(self.rows[index] as usize)
    }

    fn tokens(&self, index: usize) -> usize {
        self.all.tokens(self.rows[index] as usize)
    }

    fn longest_sequence(&self) -> usize {
        self.all.longest_sequence()
    }
}

/// The examples of an objective.
pub struct Prepared<T: Example> {
    /// Training examples.
    pub train: Subset<T>,
    /// Held-out examples, for evaluation.
    pub held_out: Subset<T>,
    /// Number of prompts of all examples, each of which is in one of the two; counted where rows are held out.
    pub prompts: Option<usize>,
    /// Counts of the records read, truncated and dropped.
    pub report: Report,
    /// The cache file, if there is one.
    pub cache: Option<PathBuf>,
    /// Files in the folders and patterns that were not read.
    pub ignored: Vec<PathBuf>,
}

/// The examples of `[data]` for objective `T`, split by `seed`; `completion_only` as for [`Encoding::new`].
///
/// # Errors
/// Files, records or a template that cannot be used; a cache folder that cannot be written; no example is left.
pub fn prepare<T: Objective + Stored>(
    data: &Data,
    tokenizer: &Tokenizer,
    seed: u64,
    completion_only: bool,
) -> Result<Prepared<T>> {
    let name = format!("{} {completion_only}", T::NAME);
    let unsplit = cached(data, tokenizer, seed, &name, &|sink| encode::<T>(data, tokenizer, completion_only, sink))?;
    unsplit.split(data.eval_size(), seed)
}

/// Blocks of `length` tokens for the ptx mixture of PPO (its pretraining loss): the texts at `paths`, each with an end
/// token, are joined in order and cut. The incomplete last block is dropped and counted. DeepSpeed-Chat does the same
/// without end tokens. All other settings are those of `data`.
///
/// # Errors
/// Those of [`prepare`]; a record without text; less text than one block.
pub fn ptx_blocks(
    paths: &Paths,
    data: &Data,
    tokenizer: &Tokenizer,
    seed: u64,
    length: usize,
) -> Result<Prepared<SftExample>> {
    let data = Data { path: paths.clone(), sources: vec![], max_rows: None, ..data.clone() };
    let data = &data;
    let unsplit = cached(data, tokenizer, seed, &format!("ptx {length}"), &|sink| {
        let mut rest: Vec<u32> = vec![];
        let mut blocks = 0;
        let mut report = encode::<RawText>(data, tokenizer, false, &mut |RawText(tokens), group| {
            rest.extend(tokens);
            let whole = rest.len() / length * length;
            for block in rest[..whole].chunks(length) {
                let loss_mask = (0..length).map(|at| at > 0).collect();
                sink(SftExample { tokens: block.to_vec(), loss_mask }, group)?;
                blocks += 1;
            }
            rest.drain(..whole);
            Ok(())
        })?;
        if !rest.is_empty() {
            report.dropped.insert(format!("tokens at the end, short of a block of {length}"), rest.len());
        }
        report.kept = blocks;
        report.check()?;
        Ok(report)
    })?;
    unsplit.split(EvalSize::Rows(0), seed)
}

/// All examples, before the split.
struct Unsplit<T: Example> {
    all: Arc<dyn Examples<T> + Send + Sync>,
    groups: Vec<u64>,
    report: Report,
    cache: Option<PathBuf>,
    ignored: Vec<PathBuf>,
}

impl<T: Example> Unsplit<T> {
    fn split(self, eval: EvalSize, seed: u64) -> Result<Prepared<T>> {
        let (train, held_out, prompts) = split(self.groups.into_iter(), eval, seed)?;
        let subset = |rows| Subset { all: self.all.clone(), rows };
        let (train, held_out) = (subset(train), subset(held_out));
        let Self { report, cache, ignored, .. } = self;
        Ok(Prepared { train, held_out, prompts, report, cache, ignored })
    }
}

/// Receives each example with its group.
type ExampleSink<'s, T> = dyn FnMut(T, u64) -> Result<()> + 's;

/// The examples that `make` passes to its sink: in memory, or in a cache file, which is made unless a valid one exists.
fn cached<T: Example + Stored + Send + Sync + 'static>(
    data: &Data,
    tokenizer: &Tokenizer,
    seed: u64,
    name: &str,
    make: &dyn Fn(&mut ExampleSink<T>) -> Result<Report>,
) -> Result<Unsplit<T>> {
    let (files, ignored) = input_files(data)?;
    let before = states(&files)?;
    if data.cache_dir.is_none() && before.iter().map(|state| state.0).sum::<u64>() < IN_MEMORY_BYTES {
        let (mut all, mut groups) = (vec![], vec![]);
        let report = make(&mut |example, group| {
            all.push(example);
            groups.push(group);
            Ok(())
        })?;
        return Ok(Unsplit { all: Arc::new(all), groups, report, cache: None, ignored });
    }
    let folder = cache_folder(data)?;
    let refused = |e: std::io::Error| invalid!("{}: {e}; name another folder in [data] cache_dir", folder.display());
    fs::create_dir_all(&folder).map_err(refused)?;
    let key = key(data, &files, tokenizer, seed, name)?;
    let path = folder.join(format!("{}.tokens", hex(&key)));
    let opened = |cache: Cache<T>| {
        let (groups, report) = (cache.groups().collect(), cache.report().clone());
        Unsplit { all: Arc::new(cache), groups, report, cache: Some(path.clone()), ignored: ignored.clone() }
    };
    // One process makes the file and others wait for it. On a file system without locks each process makes its own
    // file, and the last rename wins: the content is the same.
    let lock = File::create(path.with_extension("lock")).map_err(refused)?;
    let _ = lock.lock();
    match Cache::open(&path, &key) {
        Ok(cache) => return Ok(opened(cache)),
        Err(error) if path.exists() => crate::tell!("data: {}: {error}; the cache is rebuilt", path.display()),
        Err(_) => {}
    }
    let mut writer = Writer::create(&path, key)?;
    let report = make(&mut |example, group| writer.push(&example, group))?;
    if states(&files)? != before {
        bail!("a data file changed while it was read; start again when it is complete");
    }
    writer.finish(&report)?;
    Ok(opened(Cache::open(&path, &key)?))
}

/// The size and modification time of each file.
fn states(files: &[PathBuf]) -> Result<Vec<(u64, Option<SystemTime>)>> {
    let state = |file: &PathBuf| fs::metadata(file).map(|about| (about.len(), about.modified().ok()));
    files.iter().map(|file| state(file).map_err(|e| invalid!("{}: {e}", file.display()))).collect()
}

/// The folder for cache files: `cache_dir`, or one in the user's cache folder.
fn cache_folder(data: &Data) -> Result<PathBuf> {
    let env = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || env("XDG_CACHE_HOME").or_else(|| Some(env("HOME")?.join(".cache")));
    let folder = data.cache_dir.clone().or_else(|| Some(home()?.join("fourfold/tokens")));
    folder.ok_or_else(|| invalid!("no HOME is set to keep tokenised data in; name a folder in [data] cache_dir"))
}

/// SHA-256 of everything that the examples depend on. The split is not included: it is computed at every start from the
/// groups in the cache.
fn key(data: &Data, files: &[PathBuf], tokenizer: &Tokenizer, seed: u64, name: &str) -> Result<Key> {
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(name.as_bytes());
    part(&seed.to_le_bytes()); // the seed interleaves several sources
    let settings =
        Data { path: Paths::List(vec![]), eval_fraction: None, eval_rows: None, cache_dir: None, ..data.clone() };
    part(&serde_json::to_vec(&settings)?);
    part(&tokenizer.fingerprint());
    if tokenizer.chat_template().is_some_and(|template| template.contains("strftime_now")) {
        // Such a template writes the current date into every dialogue.
        let days = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |t| t.as_secs() / 86_400);
        part(&days.to_le_bytes());
    }
    let bytes = states(files)?.iter().map(|state| state.0 as usize).sum();
    let mut progress = Progress::new("comparing the data with the cache", bytes, Unit::Bytes);
    for file in files {
        part(file.file_name().unwrap_or_default().as_encoded_bytes()); // the ending determines the file type
        part(&digest(file, &mut progress)?);
    }
    Ok(hash.finalize().into())
}

/// SHA-256 of a file.
fn digest(file: &Path, progress: &mut Progress) -> Result<[u8; 32]> {
    let failed = |e: std::io::Error| invalid!("{}: {e}", file.display());
    let mut open = File::open(file).map_err(failed)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 18]);
    loop {
        match open.read(&mut buffer).map_err(failed)? {
            0 => return Ok(hash.finalize().into()),
            read => {
                hash.update(&buffer[..read]);
                progress.add(read);
            }
        }
    }
}

fn hex(key: &Key) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Maximum number of batches per thread between the reader and the sink; it bounds the memory of batches that wait for
/// a slow one.
const AHEAD: usize = 4;
/// Bytes of text that complete a batch for a thread.
const BATCH_BYTES: usize = 128 << 10;
/// Maximum number of records per batch.
const BATCH_RECORDS: usize = 256;

/// A usable record, or one that was skipped.
type Scanned = Result<Entry, Skipped>;
/// A record's place, group, remarks and examples.
type Encoded<T> = (Place, u64, Vec<String>, Result<Outcome<T>>);

/// Tokenises every record of `data`, and passes examples and their groups to `sink` in the order of the records.
fn encode<T: Objective>(
    data: &Data,
    tokenizer: &Tokenizer,
    completion_only: bool,
    sink: &mut ExampleSink<T>,
) -> Result<Report> {
    if data.compat.is_some() && T::SHARE.is_some() {
        return encode_share(data, tokenizer, completion_only, sink);
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Encoding::new(&ModelEncoder::new(tokenizer)?, data, completion_only)?; // a wrong setting is reported once, and here
    let (to_workers, work) = sync_channel::<(usize, Vec<Scanned>)>(threads);
    let (to_sink, made) = sync_channel(threads);
    let (permits, allowed) = sync_channel(AHEAD * threads);
    for _ in 0..AHEAD * threads {
        permits.send(())?;
    }
    let (work, ended) = (Mutex::new(work), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let (ended, permits) = (&ended, &permits);
        // The builder returns an error where the system has no room for a thread; `Scope::spawn` would panic.
        let reader =
            Builder::new().spawn_scoped(scope, move || read(data, to_workers, allowed, ended)).context(NO_THREAD)?;
        for started in 0..threads {
            let (work, to_sink) = (&work, to_sink.clone());
            let thread = Builder::new().spawn_scoped(scope, move || {
                let _guard = WakeReaderOnPanic { ended, permits };
                tokenise::<T>(data, tokenizer, completion_only, work, to_sink);
            });
            if let Err(error) = thread {
                if started > 0 {
                    break; // the started threads do all the work
                }
                stop_reader(ended, permits);
                return Err(error).context(NO_THREAD);
            }
        }
        drop(to_sink);
        let bytes = input_files(data).and_then(|(files, _)| states(&files));
        let bytes = bytes.map_or(0, |states| states.iter().map(|state| state.0 as usize).sum());
        let result = collect(data, made, permits, sink, Progress::new("tokenising", bytes, Unit::Bytes));
        // After an error the workers have ended, and the reader may wait for a permit: it gets one and stops reading.
        stop_reader(ended, permits);
        let work = work.lock().unwrap_or_else(PoisonError::into_inner);
        while work.recv().is_ok() {}
        drop(work);
        let read = reader.join().unwrap_or_else(|_| bail!("the thread that reads the data panicked"));
        // A fault in a record precedes the one that ended the reading.
        let report = result?;
        read?;
        report.check()?;
        Ok(report)
    })
}

/// Stops the reader, which may be waiting for a permit.
fn stop_reader(ended: &AtomicBool, permits: &SyncSender<()>) {
    ended.store(true, Ordering::SeqCst);
    let _ = permits.try_send(()); // a full channel already has permits
}

/// Stops the reader when a worker panics: its batch is lost, so its permit would never return, and the run would hang.
struct WakeReaderOnPanic<'s> {
    ended: &'s AtomicBool,
    permits: &'s SyncSender<()>,
}

impl Drop for WakeReaderOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            stop_reader(self.ended, self.permits);
        }
    }
}

/// [`encode`] for an objective that gets only a share of the records: the share depends on the number of records, so
/// all of them are read first.
fn encode_share<T: Objective>(
    data: &Data,
    tokenizer: &Tokenizer,
    completion_only: bool,
    sink: &mut ExampleSink<T>,
) -> Result<Report> {
    let encoder = ModelEncoder::new(tokenizer)?;
    let encoding = Encoding::new(&encoder, data, completion_only)?;
    let (mut report, mut entries, mut sources) = (Report::default(), vec![], vec![]);
    for source in data.all_sources() {
        let before = entries.len();
        let max_rows = data.max_rows.map(|rows| rows - before);
        if max_rows == Some(0) {
            break;
        }
        scan(&Data { sources: vec![source], max_rows, ..data.clone() }, &mut |found| {
            match found {
                Ok(entry) => entries.push(entry),
                Err(skipped) => report.skip(&skipped),
            }
            Ok(true)
        })?;
        sources.push(entries.len() - before);
    }
    for_each(&entries, &sources, &encoding, &mut report, &mut |example, record| sink(example, group(record)))?;
    Ok(report)
}

/// Reads the records into batches; ends early, without an error, when the workers have ended.
fn read(
    data: &Data,
    to_workers: SyncSender<(usize, Vec<Scanned>)>,
    allowed: Receiver<()>,
    ended: &AtomicBool,
) -> Result<()> {
    let (mut number, mut batch, mut bytes) = (0, vec![], 0);
    let mut send = |batch: &mut Vec<Scanned>| {
        number += 1;
        let ended = || ended.load(Ordering::SeqCst);
        !ended() && allowed.recv().is_ok() && !ended() && to_workers.send((number - 1, std::mem::take(batch))).is_ok()
    };
    scan(data, &mut |found| {
        bytes += found.as_ref().map_or(0, |entry| text_bytes(&entry.record));
        batch.push(found);
        if bytes < BATCH_BYTES && batch.len() < BATCH_RECORDS {
            return Ok(true);
        }
        bytes = 0;
        Ok(send(&mut batch))
    })?;
    send(&mut batch);
    Ok(())
}

/// Number of bytes of a record's texts.
fn text_bytes(record: &Record) -> usize {
    let of = |text: &Text| match text {
        Text::Verbatim(text) => text.len(),
        Text::Dialogue(turns) => turns.iter().map(Message::bytes).sum(),
    };
    record.texts().into_iter().map(of).sum()
}

/// A batch's number and results.
type Batch<T> = (usize, Vec<Result<Encoded<T>, Skipped>>);

/// A worker: encodes batches until there are no more.
fn tokenise<T: Objective>(
    data: &Data,
    tokenizer: &Tokenizer,
    completion_only: bool,
    work: &Mutex<Receiver<(usize, Vec<Scanned>)>>,
    to_sink: SyncSender<Batch<T>>,
) {
    let Ok(encoder) = ModelEncoder::new(tokenizer) else { return };
    let Ok(encoding) = Encoding::new(&encoder, data, completion_only) else { return };
    loop {
        let next = work.lock().map(|work| work.recv());
        let Ok(Ok((number, batch))) = next else { return };
        let made = batch.into_iter().map(|found| {
            found.map(|Entry { place, record, mut remarks }| {
                remarks.extend(encoding.unread::<T>(&record));
                (place, group(&record), remarks, T::of(&record, &encoding))
            })
        });
        if to_sink.send((number, made.collect())).is_err() {
            return;
        }
    }
}

/// Passes the results to `sink` in the order of the batches' numbers.
fn collect<T: Objective>(
    data: &Data,
    made: Receiver<Batch<T>>,
    permits: &SyncSender<()>,
    sink: &mut ExampleSink<T>,
    mut progress: Progress,
) -> Result<Report> {
    let before = bytes_read();
    let mut report = Report::default();
    let (mut waiting, mut next, mut record) = (BTreeMap::new(), 0, 0);
    for (number, batch) in made {
        waiting.insert(number, batch);
        while let Some(batch) = waiting.remove(&next) {
            next += 1;
            progress.set(bytes_read() - before);
            let _ = permits.send(()); // there is room, since each batch took one; the reader may have ended
            for found in batch {
                match found {
                    Ok((place, group, remarks, made)) => {
                        report.remark(remarks);
                        for example in report.add(&place, made, data.on_bad_record)? {
                            sink(example.with_entry(record), group)?;
                        }
                        record += 1;
                    }
                    Err(skipped) => report.skip(&skipped),
                }
            }
        }
    }
    progress.finish();
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_files::ModelFiles;
    use crate::quickstart::base::BASE;

    /// An objective that panics.
    #[derive(Clone)]
    struct Panics;

    impl Example for Panics {
        fn tokens(&self) -> usize {
            0
        }

        fn numbers(&self, _: &mut dyn FnMut(&[u32])) {}
    }

    impl Objective for Panics {
        const NAME: &'static str = "panics";

        fn of(_: &Record, _: &Encoding) -> Result<Outcome<Self>> {
            panic!("an objective that panics")
        }
    }

    #[test]
    fn a_panic_of_a_worker_ends_the_reading_of_a_long_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("texts.jsonl");
        fs::write(&path, "{\"text\": \"a\"}\n".repeat(50_000)).unwrap();
        let parts = (BASE.config, BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
        let model_files = ModelFiles::from_embedded(parts.0, parts.1, parts.2, parts.3, parts.4).unwrap();
        let data = Data { path: Paths::One(path), ..Data::default() };
        let (done, ended) = sync_channel(1);
        std::thread::spawn(move || {
            let run = || encode::<Panics>(&data, model_files.tokenizer(), true, &mut |_, _| Ok(()));
            let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err();
            let _ = done.send(panicked);
        });
        let panicked = ended.recv_timeout(std::time::Duration::from_secs(20));
        assert_eq!(panicked, Ok(true), "the panic is propagated, and nothing hangs");
    }
}
