//! `[data]` -> examples for a stage, over files of any size: one thread reads, all cores tokenise, the examples go to
//! memory or into a cache file in the order of the records, whatever the threads do. Knows no stage and no model.
//! Read examples.rs for what a stage sees, cache.rs for the file.

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
use crate::data::examples::objectives::{Encoding, Objective, Outcome, RawText, Report, SftExample, each};
use crate::data::examples::{Example, Examples};
use crate::data::stream::cache::{Cache, Key, Stored, Writer};
use crate::data::stream::split::{group, split};
use crate::data::{Entry, ModelEncoder, Place, Record, Skipped, Text, input_files, scan};
use crate::invalid;
use crate::tokenizer::Tokenizer;

/// Files smaller than this in all are tokenised in memory: faster than to look a cache up, and nothing is left behind.
const IN_MEMORY: u64 = 16 << 20;

/// Rows of a list of examples that may lie in memory or in a file.
#[derive(Clone)]
pub struct Part<T: Example> {
    of: Arc<dyn Examples<T> + Send + Sync>,
    rows: Vec<u32>,
}

impl<T: Example> Part<T> {
    /// All of them in memory.
    ///
    /// # Errors
    /// As [`Examples::get`].
    pub fn to_vec(&self) -> Result<Vec<T>> {
        (0..self.len()).map(|row| self.get(row).map(Cow::into_owned)).collect()
    }
}

impl<T: Example> Examples<T> for Part<T> {
    fn len(&self) -> usize {
        self.rows.len()
    }

    fn get(&self, index: usize) -> Result<Cow<'_, T>> {
        self.of.get(self.rows[index] as usize)
    }

    fn tokens(&self, index: usize) -> usize {
        self.of.tokens(self.rows[index] as usize)
    }

    fn longest_sequence(&self) -> usize {
        self.of.longest_sequence()
    }
}

/// A stage's examples.
pub struct Prepared<T: Example> {
    /// To train on.
    pub train: Part<T>,
    /// To evaluate on.
    pub held_out: Part<T>,
    /// What became of the records.
    pub report: Report,
    /// The cache file, where there is one.
    pub cache: Option<PathBuf>,
    /// Files of the folders and patterns that were not read.
    pub ignored: Vec<PathBuf>,
}

/// Examples of `[data]` for a stage, split by `seed`; `completion_only` as for [`Encoding::new`].
///
/// # Errors
/// Files, records or a template that cannot be used; a cache folder that cannot be written; no example left.
pub fn prepare<T: Objective + Stored>(
    data: &Data,
    tokenizer: &Tokenizer,
    seed: u64,
    completion_only: bool,
) -> Result<Prepared<T>> {
    let what = format!("{} {completion_only}", T::NAME);
    let made = cached(data, tokenizer, seed, &what, &|sink| encode::<T>(data, tokenizer, completion_only, sink))?;
    made.split(data.eval_size(), seed)
}

/// Blocks of `length` tokens for the ptx mixture of PPO, from the texts at `paths`, each with its end token, joined in their
/// order and cut; what is left over at the end is dropped and counted, as in DeepSpeed-Chat (which puts no end token). Everything else is as `data`
/// says for the stage's own records.
///
/// # Errors
/// As for [`prepare`]; a record without text; less text than one block.
pub fn ptx_blocks(
    paths: &Paths,
    data: &Data,
    tokenizer: &Tokenizer,
    seed: u64,
    length: usize,
) -> Result<Prepared<SftExample>> {
    let data = Data { path: paths.clone(), sources: vec![], max_rows: None, ..data.clone() };
    let data = &data;
    let made = cached(data, tokenizer, seed, &format!("ptx {length}"), &|sink| {
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
    made.split(EvalSize::Rows(0), seed)
}

/// All examples, before the split.
struct Made<T: Example> {
    all: Arc<dyn Examples<T> + Send + Sync>,
    groups: Vec<u64>,
    report: Report,
    cache: Option<PathBuf>,
    ignored: Vec<PathBuf>,
}

impl<T: Example> Made<T> {
    fn split(self, eval: EvalSize, seed: u64) -> Result<Prepared<T>> {
        let (train, held_out) = split(self.groups.into_iter(), eval, seed)?;
        let part = |rows| Part { of: self.all.clone(), rows };
        let (train, held_out) = (part(train), part(held_out));
        Ok(Prepared { train, held_out, report: self.report, cache: self.cache, ignored: self.ignored })
    }
}

type Sink<'s, T> = dyn FnMut(T, u64) -> Result<()> + 's;

/// Runs `make` into memory, or into a cache file unless there is a good one already.
fn cached<T: Example + Stored + Send + Sync + 'static>(
    data: &Data,
    tokenizer: &Tokenizer,
    seed: u64,
    what: &str,
    make: &dyn Fn(&mut Sink<T>) -> Result<Report>,
) -> Result<Made<T>> {
    let (files, ignored) = input_files(data)?;
    let before = states(&files)?;
    if data.cache_dir.is_none() && before.iter().map(|state| state.0).sum::<u64>() < IN_MEMORY {
        let (mut all, mut groups) = (vec![], vec![]);
        let report = make(&mut |example, group| {
            all.push(example);
            groups.push(group);
            Ok(())
        })?;
        return Ok(Made { all: Arc::new(all), groups, report, cache: None, ignored });
    }
    let folder = cache_folder(data)?;
    let refused = |e: std::io::Error| invalid!("{}: {e}; name another folder in [data] cache_dir", folder.display());
    fs::create_dir_all(&folder).map_err(refused)?;
    let key = key(data, &files, tokenizer, seed, what)?;
    let path = folder.join(format!("{}.tokens", hex(&key)));
    let opened = |cache: Cache<T>| {
        let (groups, report) = (cache.groups().collect(), cache.report().clone());
        Made { all: Arc::new(cache), groups, report, cache: Some(path.clone()), ignored: ignored.clone() }
    };
    // One process makes it, others wait for it. Where a file system has no locks each makes its own, and the last one's
    // name stays: the content is the same.
    let lock = File::create(path.with_extension("lock")).map_err(refused)?;
    let _ = lock.lock();
    match Cache::open(&path, &key) {
        Ok(cache) => return Ok(opened(cache)),
        Err(error) if path.exists() => eprintln!("data: {}: {error}; made anew", path.display()),
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

/// Size and time of change.
fn states(files: &[PathBuf]) -> Result<Vec<(u64, Option<SystemTime>)>> {
    let state = |file: &PathBuf| fs::metadata(file).map(|about| (about.len(), about.modified().ok()));
    files.iter().map(|file| state(file).map_err(|e| invalid!("{}: {e}", file.display()))).collect()
}

fn cache_folder(data: &Data) -> Result<PathBuf> {
    let env = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = || env("XDG_CACHE_HOME").or_else(|| Some(env("HOME")?.join(".cache")));
    let folder = data.cache_dir.clone().or_else(|| Some(home()?.join("fourfold/tokens")));
    folder.ok_or_else(|| invalid!("no HOME is set to keep tokenised data in; name a folder in [data] cache_dir"))
}

/// SHA-256 of everything that examples follow from. The split is none of it: it is made at every start from the prompts'
/// hashes that the cache holds.
fn key(data: &Data, files: &[PathBuf], tokenizer: &Tokenizer, seed: u64, what: &str) -> Result<Key> {
    let mut hash = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(what.as_bytes());
    part(&seed.to_le_bytes()); // it mixes several sources
    let settings =
        Data { path: Paths::List(vec![]), eval_fraction: None, eval_rows: None, cache_dir: None, ..data.clone() };
    part(&serde_json::to_vec(&settings)?);
    part(&tokenizer.fingerprint());
    if tokenizer.chat_template().is_some_and(|template| template.contains("strftime_now")) {
        // Such a template writes today's date into every dialogue.
        let days = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |t| t.as_secs() / 86_400);
        part(&days.to_le_bytes());
    }
    for file in files {
        part(file.file_name().unwrap_or_default().as_encoded_bytes()); // its ending says what it is
        part(&digest(file)?);
    }
    Ok(hash.finalize().into())
}

fn digest(file: &Path) -> Result<[u8; 32]> {
    let failed = |e: std::io::Error| invalid!("{}: {e}", file.display());
    let mut open = File::open(file).map_err(failed)?;
    let (mut hash, mut some) = (Sha256::new(), vec![0; 1 << 18]);
    loop {
        match open.read(&mut some).map_err(failed)? {
            0 => return Ok(hash.finalize().into()),
            read => hash.update(&some[..read]),
        }
    }
}

fn hex(key: &Key) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Batches a thread that may be read before the oldest of them has reached the sink: what waits for a slow one is bounded.
const AHEAD: usize = 4;
/// Bytes of text that are handed to a thread at once, and the most records.
const BATCH_BYTES: usize = 128 << 10;
const BATCH_RECORDS: usize = 256;

/// Why a thread cannot be started.
pub(crate) const NO_THREAD: &str =
    "no thread can be started: memory or the number of processes is limited too narrowly";

type Found = Result<Entry, Skipped>;
/// What a record gives, with its group.
type Given<T> = (Place, u64, Result<Outcome<T>>);

/// Tokenises every record of `data`, and hands examples and their groups to `sink` in the records' order.
fn encode<T: Objective>(
    data: &Data,
    tokenizer: &Tokenizer,
    completion_only: bool,
    sink: &mut Sink<T>,
) -> Result<Report> {
    if data.compat.is_some() && T::PART.is_some() {
        return encode_split(data, tokenizer, completion_only, sink);
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    Encoding::new(&ModelEncoder::new(tokenizer)?, data, completion_only)?; // a wrong setting is said once, and here
    let (to_workers, work) = sync_channel::<(usize, Vec<Found>)>(threads);
    let (to_sink, made) = sync_channel(threads);
    let (leave, allowed) = sync_channel(AHEAD * threads);
    for _ in 0..AHEAD * threads {
        leave.send(())?;
    }
    let (work, ended) = (Mutex::new(work), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let (ended, leave) = (&ended, &leave);
        // A system without room for a thread says so here; `Scope::spawn` would panic.
        let reader =
            Builder::new().spawn_scoped(scope, move || read(data, to_workers, allowed, ended)).context(NO_THREAD)?;
        for started in 0..threads {
            let (work, to_sink) = (&work, to_sink.clone());
            let thread = Builder::new().spawn_scoped(scope, move || {
                let _wakes = WakesReader { ended, leave };
                tokenise::<T>(data, tokenizer, completion_only, work, to_sink);
            });
            if let Err(error) = thread {
                if started > 0 {
                    break; // those that there are do it all
                }
                wake(ended, leave);
                return Err(error).context(NO_THREAD);
            }
        }
        drop(to_sink);
        let result = collect(data, made, leave, sink);
        // After a fault the workers are gone, and the reader may wait for room: it gets some, and reads no further.
        wake(ended, leave);
        let work = work.lock().unwrap_or_else(PoisonError::into_inner);
        while work.recv().is_ok() {}
        drop(work);
        let read = reader.join().unwrap_or_else(|_| bail!("the thread that reads the data has failed"));
        // A fault in a record comes before the one that ended the reading.
        let report = result?;
        read?;
        report.check()?;
        Ok(report)
    })
}

/// Has the reader end, which may wait for leave to read on.
fn wake(ended: &AtomicBool, leave: &SyncSender<()>) {
    ended.store(true, Ordering::SeqCst);
    let _ = leave.try_send(()); // a full channel is leave enough
}

/// A thread that panics takes its batch with it: nobody would give leave again, and the panic would be a standstill.
struct WakesReader<'s> {
    ended: &'s AtomicBool,
    leave: &'s SyncSender<()>,
}

impl Drop for WakesReader<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            wake(self.ended, self.leave);
        }
    }
}

/// The same where the phase gets a share of the records only: which one follows from how many there are.
fn encode_split<T: Objective>(
    data: &Data,
    tokenizer: &Tokenizer,
    completion_only: bool,
    sink: &mut Sink<T>,
) -> Result<Report> {
    let encoder = ModelEncoder::new(tokenizer)?;
    let encoding = Encoding::new(&encoder, data, completion_only)?;
    let (mut report, mut entries, mut sources) = (Report::default(), vec![], vec![]);
    for source in data.all_sources() {
        let before = entries.len();
        let room = data.max_rows.map(|rows| rows - before);
        if room == Some(0) {
            break;
        }
        scan(&Data { sources: vec![source], max_rows: room, ..data.clone() }, &mut |found| {
            match found {
                Ok(entry) => entries.push(entry),
                Err(skipped) => report.skip(&skipped),
            }
            Ok(true)
        })?;
        sources.push(entries.len() - before);
    }
    each(&entries, &sources, &encoding, &mut report, &mut |example, record| sink(example, group(record)))?;
    Ok(report)
}

/// Cuts the records into batches; ends early, without an error, where nobody takes them any more.
fn read(
    data: &Data,
    to_workers: SyncSender<(usize, Vec<Found>)>,
    allowed: Receiver<()>,
    ended: &AtomicBool,
) -> Result<()> {
    let (mut number, mut batch, mut bytes) = (0, vec![], 0);
    let mut send = |batch: &mut Vec<Found>| {
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

fn text_bytes(record: &Record) -> usize {
    let of = |text: &Text| match text {
        Text::Verbatim(text) => text.len(),
        Text::Dialogue(turns) => turns.iter().map(|turn| turn.content.len()).sum(),
    };
    match record {
        Record::LanguageModeling(text) | Record::PromptOnly(text) => of(text),
        Record::PromptCompletion { prompt, completion } | Record::Unpaired { prompt, completion, .. } => {
            of(prompt) + of(completion)
        }
        Record::Ranked { prompt, answers } => of(prompt) + answers.iter().map(of).sum::<usize>(),
    }
}

type Batch<T> = (usize, Vec<Result<Given<T>, Skipped>>);

fn tokenise<T: Objective>(
    data: &Data,
    tokenizer: &Tokenizer,
    completion_only: bool,
    work: &Mutex<Receiver<(usize, Vec<Found>)>>,
    to_sink: SyncSender<Batch<T>>,
) {
    let Ok(encoder) = ModelEncoder::new(tokenizer) else { return };
    let Ok(encoding) = Encoding::new(&encoder, data, completion_only) else { return };
    loop {
        let next = work.lock().map(|work| work.recv());
        let Ok(Ok((number, batch))) = next else { return };
        let made = batch
            .into_iter()
            .map(|found| found.map(|Entry { place, record }| (place, group(&record), T::of(&record, &encoding))));
        if to_sink.send((number, made.collect())).is_err() {
            return;
        }
    }
}

/// Puts the batches back in order.
fn collect<T: Objective>(
    data: &Data,
    made: Receiver<Batch<T>>,
    leave: &SyncSender<()>,
    sink: &mut Sink<T>,
) -> Result<Report> {
    let mut report = Report::default();
    let (mut waiting, mut next, mut record) = (BTreeMap::new(), 0, 0);
    for (number, batch) in made {
        waiting.insert(number, batch);
        while let Some(batch) = waiting.remove(&next) {
            next += 1;
            let _ = leave.send(()); // there is room: each batch took one; nobody to hear it once all is read
            for found in batch {
                match found {
                    Ok((place, group, made)) => {
                        for example in report.take(&place, made, data.on_bad_record)? {
                            sink(example.of_record(record), group)?;
                        }
                        record += 1;
                    }
                    Err(skipped) => report.skip(&skipped),
                }
            }
        }
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_files::ModelFiles;
    use crate::quickstart::base::BASE;

    /// A phase that fails as no phase should.
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
            panic!("a phase that fails as no phase should")
        }
    }

    #[test]
    fn a_panic_of_a_thread_ends_the_reading_however_long_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("texts.jsonl");
        fs::write(&path, "{\"text\": \"a\"}\n".repeat(50_000)).unwrap();
        let parts = (BASE.config, BASE.generation_config, BASE.tokenizer, BASE.tokenizer_config, BASE.weights);
        let checkpoint = ModelFiles::from_embedded(parts.0, parts.1, parts.2, parts.3, parts.4).unwrap();
        let data = Data { path: Paths::One(path), ..Data::default() };
        let (told, ended) = sync_channel(1);
        std::thread::spawn(move || {
            let run = || encode::<Panics>(&data, checkpoint.tokenizer(), true, &mut |_, _| Ok(()));
            let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err();
            let _ = told.send(panicked);
        });
        let panicked = ended.recv_timeout(std::time::Duration::from_secs(20));
        assert_eq!(panicked, Ok(true), "it is told, and nothing stands still");
    }
}
