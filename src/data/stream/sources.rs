//! The sources of `[data]` as one stream of records: one after the other, or mixed by weight. Constant memory: nothing
//! is held but what the readers have in hand. Knows no tokenizer. Read read.rs next.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Builder, Scope};

use anyhow::{Context, Result};

use crate::config::{Compat, Data, MixStrategy, Source};
use crate::data::Place;
use crate::data::files::find::{Files, files};
use crate::data::files::read;
use crate::data::formats::{Parser, Record};
use crate::invalid;
use crate::rng::{SplitMix64, derive};

/// A record or what is wrong with it, where it stands; answers whether to go on.
pub(crate) type Take<'t> = dyn FnMut(Place, Result<Record, String>) -> Result<bool> + 't;

/// Records that a mixed source reads ahead.
const AHEAD: usize = 64;
/// The stream of draws that mixes sources.
const MIXING: u64 = 0x6d69_7869_6e67;

/// Every source with its files found.
pub(crate) struct Sources {
    sources: Vec<(Source, Files)>,
    mix: MixStrategy,
    seed: u64,
    compat: Option<Compat>,
}

/// Finds the files of every source.
///
/// # Errors
/// A path that is not there, or stands for no file that can be read.
pub(crate) fn open(config: &Data) -> Result<Sources> {
    let mut sources = Vec::new();
    for source in config.all_sources() {
        let files = files(&source)?;
        sources.push((source, files));
    }
    Ok(Sources { sources, mix: config.mix_strategy(), seed: config.seed, compat: config.compat })
}

impl Sources {
    /// All files that are read.
    pub(crate) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.sources.iter().flat_map(|(_, files)| &files.files)
    }

    /// Files of the folders and patterns that are not read.
    pub(crate) fn ignored(&self) -> impl Iterator<Item = &PathBuf> {
        self.sources.iter().flat_map(|(_, files)| &files.ignored)
    }

    /// Hands every record to `take` until it answers false. The order is the same for the same files and seed.
    ///
    /// # Errors
    /// A file that cannot be read or holds no record; an error of `take`.
    pub(crate) fn stream(&self, take: &mut Take) -> Result<()> {
        match self.mix {
            MixStrategy::Concat => {
                for (source, files) in &self.sources {
                    if !read_source(source, &files.files, self.compat, take)? {
                        break;
                    }
                }
                Ok(())
            }
            MixStrategy::InterleaveUnder | MixStrategy::InterleaveOver => self.interleave(take),
        }
    }

    fn interleave(&self, take: &mut Take) -> Result<()> {
        let weights: Vec<f64> = self.sources.iter().map(|(source, _)| source.weight.unwrap_or(1.0)).collect();
        let mut rng = SplitMix64::new(derive(self.seed, &[MIXING]));
        // Each reader pushes; a thread and a short channel make of it one that can be pulled from.
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
                        // A source gives at least one record, or an error.
                        match readers[drawn].recv() {
                            Ok(item) => item?,
                            Err(_) => return Ok(()),
                        }
                    }
                };
                if !take(place, record)? {
                    return Ok(());
                }
            }
        })
    }
}

type Item = Result<(Place, Result<Record, String>)>;

/// A source read on a thread of its own, which ends when the receiver is dropped.
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
            // The receiver may be gone by now: then nobody asks.
            let _ = sender.send(Err(error));
        }
    });
    thread.context(crate::data::stream::pipeline::NO_THREAD)?;
    Ok(receiver)
}

/// The source whose share of [0, 1) holds `at`.
fn draw(weights: &[f64], at: f64) -> usize {
    let mut left = at * weights.iter().sum::<f64>();
    for (index, weight) in weights.iter().enumerate() {
        if left < *weight {
            return index;
        }
        left -= weight;
    }
    weights.len() - 1
}

/// Reads one source; answers whether `take` wants more.
fn read_source(source: &Source, files: &[PathBuf], compat: Option<Compat>, take: &mut Take) -> Result<bool> {
    let room = source.max_rows.unwrap_or(usize::MAX);
    let (mut usable, mut more) = (0, true);
    for file in files {
        if usable >= room || !more {
            break;
        }
        let mut parser = Parser::new(source, compat);
        let mut seen = false;
        read::records(file, &mut |place, found| {
            seen = true;
            let record = found.and_then(|found| parser.record(found));
            usable += usize::from(record.is_ok());
            more = take(place, record)?;
            Ok(more && usable < room)
        })?;
        if !seen {
            return Err(invalid!("{}: holds no record; remove it from [data] path or fill it", file.display()));
        }
    }
    Ok(more)
}
