//! The sources of `[data]` as one stream of records: one source after the other, or interleaved by weight.
//!
//! Memory is constant: only the records that the readers are working on. This file does not depend on the tokenizer.
//! Read `data/stream/scan.rs` next.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, Scope};

use anyhow::{Context, Result};

use crate::config::{Compat, Data, MixStrategy, Source};
use crate::data::files::find::{Files, files};
use crate::data::files::read;
use crate::data::formats::parser::{FIRST, FIRST_BYTES, Parser};
use crate::data::formats::presets::train_split;
use crate::data::record::{Place, RawRecord, Remarked};
use crate::invalid;
use crate::rng::{SplitMix64, derive};

/// Receives each record, or its fault, with its place; returns whether to read on.
pub(crate) type RecordSink<'s> = dyn FnMut(Place, Result<Remarked, String>) -> Result<bool> + 's;

/// Number of records that each interleaved source reads ahead.
const AHEAD: usize = 64;
/// The random stream that interleaves sources.
const MIXING: u64 = 0x6d69_7869_6e67;

/// The message where a thread cannot be started.
pub(crate) const NO_THREAD: &str =
    "no thread can be started: memory or the number of processes is limited too narrowly";

/// All sources with their files.
pub(crate) struct Sources {
    sources: Vec<(Source, Files)>,
    mix: MixStrategy,
    seed: u64,
    compat: Option<Compat>,
}

/// Finds the files of every source.
///
/// # Errors
/// A path that does not exist, or has no file that can be read.
pub(crate) fn open(config: &Data) -> Result<Sources> {
    let mut sources = Vec::new();
    for source in config.all_sources() {
        let files = files(&source, source.preset.map(train_split))?;
        sources.push((source, files));
    }
    Ok(Sources { sources, mix: config.mix_strategy(), seed: config.seed, compat: config.compat })
}

impl Sources {
    /// All files that are read.
    pub(crate) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.sources.iter().flat_map(|(_, files)| &files.files)
    }

    /// Files in the folders and patterns that are not read.
    pub(crate) fn ignored(&self) -> impl Iterator<Item = &PathBuf> {
        self.sources.iter().flat_map(|(_, files)| &files.ignored)
    }

    /// Passes every record to `sink` until it returns false. The order is the same for the same files and seed.
    ///
    /// # Errors
    /// A file that cannot be read or has no record; an error of `sink`.
    pub(crate) fn stream(&self, sink: &mut RecordSink) -> Result<()> {
        match self.mix {
            MixStrategy::Concat => {
                for (source, files) in &self.sources {
                    if !read_source(source, &files.files, self.compat, sink)? {
                        break;
                    }
                }
                Ok(())
            }
            MixStrategy::InterleaveUnder | MixStrategy::InterleaveOver => self.interleave(sink),
        }
    }

    fn interleave(&self, sink: &mut RecordSink) -> Result<()> {
        let weights: Vec<f64> = self.sources.iter().map(|(source, _)| source.weight.unwrap_or(1.0)).collect();
        let mut rng = SplitMix64::new(derive(self.seed, &[MIXING]));
        // A reader pushes its records; with a thread and a bounded channel they can be pulled.
        std::thread::scope(|scope| {
            let start = |(source, files)| spawn(scope, source, files, self.compat);
            let mut readers = self.sources.iter().map(|(s, f)| start((s, f))).collect::<Result<Vec<_>>>()?;
            let mut ended = vec![false; readers.len()];
            loop {
                let drawn = draw(&weights, rng.uniform());
                let (place, record) = match readers[drawn].recv() {
                    Ok(item) => item?,
                    Err(_) if self.mix == MixStrategy::InterleaveUnder => return Ok(()),
                    Err(_) => {
                        ended[drawn] = true;
                        if ended.iter().all(|&ended| ended) {
                            return Ok(());
                        }
                        readers[drawn] = start((&self.sources[drawn].0, &self.sources[drawn].1))?;
                        // A source yields at least one record or an error.
                        match readers[drawn].recv() {
                            Ok(item) => item?,
                            Err(_) => return Ok(()),
                        }
                    }
                };
                if !sink(place, record)? {
                    return Ok(());
                }
            }
        })
    }
}

type Item = Result<(Place, Result<Remarked, String>)>;

/// Reads a source on its own thread, which ends when the receiver is dropped.
///
/// # Errors
/// The thread cannot be started.
fn spawn<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    source: &'env Source,
    files: &'env Files,
    compat: Option<Compat>,
) -> Result<Receiver<Item>> {
    let (sender, receiver) = sync_channel(AHEAD);
    let thread = Builder::new().spawn_scoped(scope, move || {
        let read = read_source(source, &files.files, compat, &mut |place, record| {
            Ok(sender.send(Ok((place, record))).is_ok())
        });
        if let Err(error) = read {
            // The receiver may be dropped by now; then the error does not matter.
            let _ = sender.send(Err(error));
        }
    });
    thread.context(NO_THREAD)?;
    Ok(receiver)
}

/// The index of the source whose interval of [0, 1) contains `at`; intervals are proportional to the weights.
fn draw(weights: &[f64], at: f64) -> usize {
    let mut rest = at * weights.iter().sum::<f64>();
    for (index, weight) in weights.iter().enumerate() {
        if rest < *weight {
            return index;
        }
        rest -= weight;
    }
    weights.len() - 1
}

/// Reads one source; returns whether to read on.
fn read_source(source: &Source, files: &[PathBuf], compat: Option<Compat>, sink: &mut RecordSink) -> Result<bool> {
    let (mut left, mut more) = (source.max_rows.unwrap_or(usize::MAX), true);
    for file in files {
        if left == 0 || !more {
            break;
        }
        let parser = Parser::new(source, compat);
        let waits = parser.is_undecided();
        let mut reading = FileReading { parser, waits, first: vec![], bytes: 0, left, more, sink: &mut *sink };
        let mut any = false;
        let read = read::records(file, &mut |place, raw| {
            any = true;
            reading.push(place, raw)
        });
        // The records of a short file still wait. They come before a fault that ends the file, and may be all that was asked for.
        if reading.first.is_empty() || reading.pass_first()? {
            read?;
        }
        (left, more) = (reading.left, reading.more);
        if !any {
            return Err(invalid!("{}: holds no record; remove it from [data] path or fill it", file.display()));
        }
    }
    Ok(more)
}

/// The records of one file on their way to a sink. The first ones wait until they have decided the file's format.
struct FileReading<'r, 's, 'k> {
    parser: Parser<'s>,
    waits: bool,
    first: Vec<(Place, Result<RawRecord, String>)>,
    /// Bytes of the records in `first`.
    bytes: usize,
    /// Number of usable records that may still be passed on.
    left: usize,
    /// Whether the sink wants more.
    more: bool,
    sink: &'r mut RecordSink<'k>,
}

impl FileReading<'_, '_, '_> {
    /// Takes the next record; returns whether to read on.
    fn push(&mut self, place: Place, raw: Result<RawRecord, String>) -> Result<bool> {
        if !self.waits {
            return self.pass_on(place, raw);
        }
        self.bytes += raw.as_ref().map_or(0, RawRecord::bytes);
        self.first.push((place, raw));
        if self.first.len() < FIRST && self.bytes < FIRST_BYTES { Ok(true) } else { self.pass_first() }
    }

    /// Decides the format and passes on the records that waited for it.
    fn pass_first(&mut self) -> Result<bool> {
        self.waits = false;
        let first = std::mem::take(&mut self.first);
        self.parser.decide(first.iter().filter_map(|(_, raw)| raw.as_ref().ok()));
        for (place, raw) in first {
            if !self.pass_on(place, raw)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn pass_on(&mut self, place: Place, raw: Result<RawRecord, String>) -> Result<bool> {
        let record = raw.and_then(|raw| self.parser.record(raw));
        self.left -= usize::from(record.is_ok());
        self.more = (self.sink)(place, record)?;
        Ok(self.more && self.left > 0)
    }
}
