//! What the records of `--data` hold, by the program's own readers: their number and kinds, and the tokens that a sample of
//! them takes. It does not depend on the planner. Read `propose.rs` for what follows from it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;

use crate::config::{Data, Paths, Stage};
use crate::data::examples::encoder::ModelEncoder;
use crate::data::examples::objectives::{
    Encoding, Objective, Outcome, PromptExample, RankedExample, SftExample, UnpairedExample,
};
use crate::data::stream::pipeline::IN_MEMORY_BYTES;
use crate::data::stream::split::group;
use crate::data::{Entry, Record, Text, input_files, scan};
use crate::host::meter;
use crate::invalid;
use crate::rng::{SplitMix64, derive};
use crate::tokenizer::Tokenizer;

/// Records whose tokens are counted, drawn evenly from all of them.
const SAMPLE: usize = 4096;
/// The random stream that draws them.
const STREAM: u64 = 0x0069_6e69_7473;
/// Bytes of the heap per example whose tokens are in a cache file: its group, and its number in a subset, in growing lists.
const BYTES_OF_ROW: f64 = 32.0;
/// A length that no record reaches, so that nothing is dropped or cut.
const UNLIMITED: usize = u32::MAX as usize;

/// Lengths of records in tokens, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Lengths(Vec<usize>);

impl Lengths {
    pub(super) fn new(mut lengths: Vec<usize>) -> Self {
        lengths.sort_unstable();
        Self(lengths)
    }

    /// The least length that at least `percent` of the records do not exceed (the nearest rank); 0 without records.
    pub(super) fn percentile(&self, percent: usize) -> usize {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).copied().unwrap_or(0)
    }

    pub(super) fn longest(&self) -> usize {
        self.0.last().copied().unwrap_or(0)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// How many records have at most `most` tokens.
    pub(super) fn within(&self, most: usize) -> usize {
        self.0.partition_point(|&length| length <= most)
    }

    /// How many blocks of at most `most` tokens the texts are cut into.
    pub(super) fn blocks(&self, most: usize) -> usize {
        self.0.iter().map(|length| length.div_ceil(most.max(1))).sum()
    }
}

/// What was seen of the data.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    /// Usable records, in all files.
    pub(super) records: usize,
    /// Records by their kind, as TRL calls its dataset types; `(conversational)` where they are dialogues.
    pub(super) kinds: BTreeMap<String, usize>,
    /// Records whose tokens were counted: all, or a sample.
    pub(super) sampled: usize,
    /// Of the sampled records the longest sequence that the stage makes of each; a prompt for PPO.
    pub(super) lengths: Lengths,
    /// Of the sampled records the responses, where PPO's prompts come with some.
    pub(super) responses: Lengths,
    /// Examples per record.
    pub(super) per_record: f64,
    /// Responses of the largest comparison, 2 or more.
    pub(super) most_responses: usize,
    /// Unpaired records that are judged good, and those judged bad.
    pub(super) labels: [usize; 2],
    /// Whether every record is raw text, which is cut into blocks where it is too long.
    pub(super) is_raw_text: bool,
    /// Examples of the sampled records by prompt: the size of each group that the split keeps on one side, ascending.
    pub(super) groups: Vec<usize>,
    /// Bytes of the heap that the examples of all records will take.
    pub(super) bytes: usize,
    /// Whether the files are so small that a run keeps their tokens in memory.
    pub(super) is_small: bool,
}

/// Reads all records, and counts the tokens of a sample of them.
///
/// # Errors
/// A file that cannot be read; a record that cannot be used, or none; records that the stage cannot use.
pub(super) fn look(stage: Stage, paths: &[PathBuf], tokenizer: &Tokenizer) -> Result<Seen> {
    let data = Data {
        path: Paths::List(paths.to_vec()),
        max_length: UNLIMITED,
        max_prompt_length: UNLIMITED,
        ..Data::default()
    };
    let bytes = |file: &PathBuf| std::fs::metadata(file).map_or(0, |about| about.len());
    let is_small = input_files(&data)?.0.iter().map(bytes).sum::<u64>() < IN_MEMORY_BYTES;
    let mut seen = Seen { most_responses: 2, is_small, is_raw_text: true, ..Seen::default() };
    let (mut sample, mut rng): (Vec<Entry>, _) = (vec![], SplitMix64::new(derive(0, &[STREAM])));
    scan(&data, &mut |found| {
        let Ok(entry) = found else { return Ok(true) };
        seen.count(&entry.record);
        // Algorithm R: every record has the same chance to be in the sample.
        if sample.len() < SAMPLE {
            sample.push(entry);
        } else if let Some(place) = sample.get_mut(rng.below(seen.records)) {
            *place = entry;
        }
        Ok(true)
    })?;
    if seen.records == 0 {
        return Err(invalid!("--data holds no record"));
    }
    let encoder = ModelEncoder::new(tokenizer)?;
    let with = Encoding::new(&encoder, &data, true)?;
    match stage {
        Stage::Sft => seen.measure::<SftExample>(&sample, &with),
        Stage::Reward | Stage::Dpo => seen.measure::<RankedExample>(&sample, &with),
        Stage::Kto => seen.measure::<UnpairedExample>(&sample, &with),
        Stage::Distill | Stage::Ppo | Stage::Grpo | Stage::Rloo => {
            seen.measure::<PromptExample>(&sample, &with)?;
            seen.responses = Lengths::new(sample.iter().flat_map(|entry| responses(&entry.record, &with)).collect());
            Ok(())
        }
    }?;
    Ok(seen)
}

impl Seen {
    fn count(&mut self, record: &Record) {
        self.records += 1;
        let is_dialogue = matches!(record.texts().first(), Some(Text::Dialogue(_)));
        let kind = if is_dialogue { format!("{} (conversational)", record.kind()) } else { record.kind().to_owned() };
        *self.kinds.entry(kind).or_default() += 1;
        self.is_raw_text &= matches!(record, Record::LanguageModeling(Text::Verbatim(_)));
        match record {
            Record::Ranked { responses, .. } => self.most_responses = self.most_responses.max(responses.len()),
            Record::Unpaired { label, .. } => self.labels[usize::from(!label)] += 1,
            _ => {}
        }
    }

    fn measure<T: Objective>(&mut self, sample: &[Entry], with: &Encoding) -> Result<()> {
        let before = meter::current();
        let (mut lengths, mut all) = (vec![], vec![]);
        let mut groups: BTreeMap<u64, usize> = BTreeMap::new();
        for Entry { place, record, .. } in sample {
            match T::of(record, with) {
                Ok(Outcome::Keep { examples, .. }) => {
                    *groups.entry(group(record)).or_default() += examples.len();
                    lengths.extend(examples.iter().map(T::longest_sequence).max());
                    all.extend(examples);
                }
                Ok(Outcome::Drop(_) | Outcome::TooLong { .. }) => {}
                Err(error) => return Err(invalid!("{place}: {error:#}{}", hint(record, with))),
            }
        }
        if all.is_empty() {
            return Err(match self.records {
                1 => invalid!("--data: its one record has nothing to train on"),
                records => invalid!("--data: none of {records} records has anything to train on"),
            });
        }
        let share = self.records as f64 / sample.len() as f64;
        let held = meter::current().saturating_sub(before) as f64 * share;
        self.sampled = sample.len();
        self.per_record = all.len() as f64 / sample.len() as f64;
        let rows = self.records as f64 * self.per_record;
        self.bytes = if self.is_small { held } else { rows * BYTES_OF_ROW } as usize;
        self.lengths = Lengths::new(lengths);
        self.groups = groups.into_values().collect();
        self.groups.sort_unstable();
        Ok(())
    }
}

/// The stages that can use a record, where there are some.
fn hint(record: &Record, with: &Encoding) -> String {
    let fits = [
        ("sft", SftExample::of(record, with).is_ok()),
        ("reward", RankedExample::of(record, with).is_ok()),
        ("dpo", RankedExample::of(record, with).is_ok()),
        ("kto", UnpairedExample::of(record, with).is_ok()),
        ("ppo", PromptExample::of(record, with).is_ok()),
    ];
    let names: Vec<&str> = fits.iter().filter(|(_, fits)| *fits).map(|(name, _)| *name).collect();
    if names.is_empty() { String::new() } else { format!("; such records fit: fourfold init {}", names.join(" or ")) }
}

/// Tokens of each response of a record that has some, its end token included.
fn responses(record: &Record, with: &Encoding) -> Vec<usize> {
    let learnt = |example: &SftExample| example.loss_mask.iter().filter(|&&learnt| learnt).count();
    match record {
        Record::Ranked { .. } => match RankedExample::of(record, with) {
            Ok(Outcome::Keep { examples, .. }) => {
                examples.iter().flat_map(|example| &example.responses).map(Vec::len).collect()
            }
            _ => vec![],
        },
        Record::Unpaired { .. } => match UnpairedExample::of(record, with) {
            Ok(Outcome::Keep { examples, .. }) => examples.iter().map(|example| example.response.len()).collect(),
            _ => vec![],
        },
        Record::PromptCompletion { .. } => match SftExample::of(record, with) {
            Ok(Outcome::Keep { examples, .. }) => examples.iter().map(learnt).collect(),
            _ => vec![],
        },
        Record::LanguageModeling(Text::Dialogue(turns)) => match turns.split_last() {
            // PPO answers the last user's turn.
            Some((last, before)) if last.role == "assistant" && !before.is_empty() => {
                let (prompt, completion) = (Text::Dialogue(before.to_vec()), Text::Dialogue(vec![last.clone()]));
                responses(&Record::PromptCompletion { prompt, completion }, with)
            }
            _ => vec![],
        },
        Record::LanguageModeling(Text::Verbatim(_)) | Record::PromptOnly(_) => vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_counted_by_hand() {
        // Twenty records: of 1 to 20 tokens, in any order.
        let lengths = Lengths::new((1..=20).rev().collect());
        assert_eq!([50, 95, 99, 100].map(|percent| lengths.percentile(percent)), [10, 19, 20, 20]);
        assert_eq!((lengths.longest(), lengths.within(19), lengths.len()), (20, 19, 20));
        let three = Lengths::new(vec![7, 5, 100]);
        assert_eq!([1, 33, 34, 50, 66, 67, 100].map(|percent| three.percentile(percent)), [5, 5, 7, 7, 7, 100, 100]);
        assert_eq!(three.blocks(10), 1 + 1 + 10);
        assert_eq!((Lengths::default().percentile(95), Lengths::default().longest()), (0, 0));
    }
}
