//! Token ids from a JSON file, for the command `logprobs`.
//!
//! The file holds token ids instead of text. They are parsed from the stream into one list, since a list per sequence would take
//! several times the file's size. This file does not depend on the tokenizer or the model.

use std::fmt;
use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::path::Path;

use anyhow::Result;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::invalid;

/// Sequences of token ids.
#[derive(Debug, Default)]
pub struct Sequences {
    /// The ids of all sequences, one after another.
    ids: Vec<u32>,
    /// Where each sequence ends in `ids`.
    ends: Vec<usize>,
}

impl Sequences {
    /// The sequences, in the file's order; none is empty.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.ids[start..end])
    }

    /// The sequence of this index.
    ///
    /// # Panics
    /// If there is none.
    pub fn get(&self, index: usize) -> &[u32] {
        &self.ids[self.range(index)]
    }

    /// As [`Sequences::get`], to be written to.
    ///
    /// # Panics
    /// If there is none.
    pub fn get_mut(&mut self, index: usize) -> &mut [u32] {
        let range = self.range(index);
        &mut self.ids[range]
    }

    fn range(&self, index: usize) -> Range<usize> {
        index.checked_sub(1).map_or(0, |before| self.ends[before])..self.ends[index]
    }

    /// Number of tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }
}

/// Deserialises a part of `{"input_ids": [[1, 2, ...], ...]}` into the sequences.
struct Into<'s>(&'s mut Sequences, Level);

#[derive(Clone, Copy)]
enum Level {
    File,
    List,
    Sequence,
}

impl<'de> DeserializeSeed<'de> for Into<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        match self.1 {
            Level::File => deserializer.deserialize_map(self),
            Level::List | Level::Sequence => deserializer.deserialize_seq(self),
        }
    }
}

impl<'de> Visitor<'de> for Into<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self.1 {
            Level::File => "an object",
            Level::List => "a list of sequences",
            Level::Sequence => "a list of token ids",
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        let mut is_there = false;
        while let Some(key) = entries.next_key::<String>()? {
            match key.as_str() {
                "input_ids" if is_there => return Err(A::Error::duplicate_field("input_ids")),
                "input_ids" => entries.next_value_seed(Into(&mut *self.0, Level::List))?,
                other => return Err(A::Error::unknown_field(other, &["input_ids"])),
            }
            is_there = true;
        }
        if is_there { Ok(()) } else { Err(A::Error::missing_field("input_ids")) }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        if let Level::Sequence = self.1 {
            while let Some(id) = items.next_element()? {
                self.0.ids.push(id);
            }
            self.0.ends.push(self.0.ids.len());
            return Ok(());
        }
        while items.next_element_seed(Into(&mut *self.0, Level::Sequence))?.is_some() {}
        Ok(())
    }
}

/// The sequences of `{"input_ids": [[1, 2, ...], ...]}`.
///
/// # Errors
/// The file cannot be read or has another form; a sequence has fewer than two tokens.
pub fn read(path: &Path) -> Result<Sequences> {
    let file = path.display();
    let open = || File::open(path).map_err(|e| invalid!("{file}: {e}"));
    // Exact capacities: a list that grows holds up to three times its size while it is moved.
    let (mut commas, mut lists) = (0, 0);
    let mut input = BufReader::new(open()?);
    let mut piece = [0; 1 << 14];
    loop {
        let read = input.read(&mut piece).map_err(|e| invalid!("{file}: {e}"))?;
        if read == 0 {
            break;
        }
        commas += piece[..read].iter().filter(|&&b| b == b',').count();
        lists += piece[..read].iter().filter(|&&b| b == b'[').count();
    }
    let mut sequences = Sequences { ids: Vec::with_capacity(commas + 1), ends: Vec::with_capacity(lists) };
    let mut json = serde_json::Deserializer::from_reader(BufReader::new(open()?));
    Into(&mut sequences, Level::File)
        .deserialize(&mut json)
        .and_then(|()| json.end())
        .map_err(|e| invalid!("{file}: {e}; expected {{\"input_ids\": [[1, 2, ...], ...]}}"))?;
    if sequences.ends.is_empty() || sequences.iter().any(|ids| ids.len() < 2) {
        return Err(invalid!("{file}: input_ids must hold sequences of at least two tokens"));
    }
    Ok(sequences)
}

/// Checks the sequences against a model's vocabulary size and context length.
///
/// # Errors
/// A sequence is longer than the context; a token id is not in the vocabulary.
pub fn check(path: &Path, input_ids: &Sequences, vocab: usize, context: usize) -> Result<()> {
    let file = path.display();
    if let Some((row, ids)) = input_ids.iter().enumerate().find(|(_, ids)| ids.len() > context) {
        let n = ids.len();
        return Err(invalid!(
            "{file}: input_ids[{row}] has {n} tokens, and the model's context is {context}; shorten it"
        ));
    }
    let outside = |ids: &[u32]| ids.iter().copied().find(|&id| id as usize >= vocab);
    match input_ids.iter().enumerate().find_map(|(row, ids)| Some((row, outside(ids)?))) {
        Some((row, id)) => Err(invalid!(
            "{file}: input_ids[{row}] holds {id}, past the vocabulary of {vocab}; encode with this model's tokenizer"
        )),
        None => Ok(()),
    }
}
