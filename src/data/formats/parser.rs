//! [`Parser`]: raw records of one file -> [`Record`](crate::data::Record)s, with the source's column names, preset and format
//! applied.
//!
//! Under `format = "auto"` the first records decide the format of the whole file ([`Parser::decide`]): that of most of them,
//! so that a bad first record does not make every good one bad. This file does not depend on `files`. Read
//! `data/formats/detect.rs` next.

use serde_json::Value;

use crate::config::{Compat, Format, Preset, Source, Tags};
use crate::data::formats::columns::{Columns, is_missing};
use crate::data::formats::detect::detect;
use crate::data::formats::fault::kind_of;
use crate::data::formats::{presets, rename};
use crate::data::record::{Hole, Object, Parsed, RawRecord, Record, Remarked, Text};

/// The number of records that decide a file's format.
pub(crate) const FIRST: usize = 16;
/// Bytes of the records that decide a file's format: fewer records decide if they are long.
pub(crate) const FIRST_BYTES: usize = 1 << 20;

/// Parses the records of one file of a source.
pub(crate) struct Parser<'s> {
    source: &'s Source,
    tags: Tags,
    shape: Shape,
    /// Whether transcripts stay verbatim instead of being split into turns.
    verbatim: bool,
    /// How the format was decided, where the first records are not all of one; the first record gets it as a remark.
    decided: Option<String>,
}

/// How a file's records are read.
#[derive(Clone, Copy, PartialEq)]
enum Shape {
    Format(Format),
    Preset(Preset),
}

impl<'s> Parser<'s> {
    /// A parser for one file of `source`, which is one of [`crate::config::Data::all_sources`].
    pub(crate) fn new(source: &'s Source, compat: Option<Compat>) -> Self {
        let shape = match source.preset {
            Some(preset) => Shape::Preset(preset),
            None => Shape::Format(source.format.unwrap_or_default()),
        };
        let tags = source.tags.clone().unwrap_or_default();
        Self { source, tags, shape, verbatim: compat.is_some(), decided: None }
    }

    /// Whether the first records still have to decide the format.
    pub(crate) fn is_undecided(&self) -> bool {
        self.shape == Shape::Format(Format::Auto)
    }

    /// Decides the format: the one as which most of the first records can be read. Where none can be read, the one that most
    /// have the columns of; of several, the one that comes first in the file.
    pub(crate) fn decide<'r>(&mut self, first: impl Iterator<Item = &'r RawRecord>) {
        let objects = first.filter_map(|raw| match raw {
            RawRecord::Json(Value::Object(object)) | RawRecord::Holed(Value::Object(object), _) => {
                self.renamed(object.clone()).ok()
            }
            _ => None,
        });
        let mut votes: Vec<(Shape, [usize; 2])> = vec![];
        let mut all = 0;
        for object in objects {
            all += 1;
            let Ok(shape) = self.detected(&object) else { continue };
            let readable = usize::from(self.read(shape, &object).is_ok());
            match votes.iter_mut().find(|(known, _)| *known == shape) {
                Some((_, counts)) => *counts = [counts[0] + readable, counts[1] + 1],
                None => votes.push((shape, [readable, 1])),
            }
        }
        // `max_by_key` takes the last of equals.
        let Some(&(shape, [_, count])) = votes.iter().rev().max_by_key(|(_, counts)| counts) else { return };
        self.shape = shape;
        if count < all {
            self.decided =
                Some(format!("file read as {}, the format of {count} of its first {all} records", name_of(shape)));
        }
    }

    /// Parses one raw record.
    ///
    /// # Errors
    /// The record has no known format, or a column is missing or wrong.
    pub(crate) fn record(&mut self, raw: RawRecord) -> Parsed<Remarked> {
        let object = match raw {
            RawRecord::Line(text) => return Ok((Record::LanguageModeling(Text::Verbatim(text)), vec![])),
            RawRecord::Holed(value, holes) => {
                return self.record(RawRecord::Json(value)).map_err(|fault| Hole::explain(&fault, &holes));
            }
            RawRecord::Json(Value::Object(object)) => self.renamed(object)?,
            RawRecord::Json(other) => {
                return Err(format!("expected a JSON object with columns, found {}", kind_of(&other)));
            }
        };
        if self.is_undecided() {
            self.shape = self.detected(&object)?;
        }
        if self.source.format.unwrap_or_default() != Format::Auto && self.source.preset.is_none() {
            return self.read_as_named(&object);
        }
        match (self.read(self.shape, &object), &self.decided) {
            (Ok((record, mut remarks)), Some(_)) => {
                remarks.extend(self.decided.take());
                Ok((record, remarks))
            }
            (Err(fault), _) if self.source.preset.is_none() => {
                // Whoever reads the fault has named no format.
                match self.detected(&object) {
                    Ok(own) if own == self.shape => Err(fault),
                    _ => Err(format!(
                        "{fault}; the file is read as {}, as most of its first records are",
                        name_of(self.shape)
                    )),
                }
            }
            (result, _) => result,
        }
    }

    /// A record read as the format that the config names.
    ///
    /// # Errors
    /// Those of [`Parser::record`]; if the record has the columns of another format, which is then named.
    fn read_as_named(&self, object: &Object) -> Parsed<Remarked> {
        let foreign = match self.shape {
            // Renamed columns have the names that the config gives them.
            Shape::Format(format) if self.source.columns.iter().all(|names| names.pairs().next().is_none()) => {
                Columns::new(object, &self.tags, self.verbatim).foreign(format)
            }
            _ => None,
        };
        foreign.map_or_else(|| self.read(self.shape, object), Err).map_err(|fault| {
            let named = name_of(self.shape);
            // Transcripts are told from comparisons by their text alone.
            let is_other = is_missing(&fault) || self.shape == Shape::Format(Format::HhRlhf);
            match self.detected(object) {
                Ok(own) if own == self.shape || !is_other => fault,
                Ok(own @ Shape::Format(_)) => format!(
                    "{fault}; these are columns of the format {0}, and format = {named}: set format = {0}, or remove the key",
                    name_of(own)
                ),
                Ok(own @ Shape::Preset(_)) => format!(
                    "{fault}; these are columns of the preset {}, and format = {named}: remove that key",
                    name_of(own)
                ),
                Err(_) => fault,
            }
        })
    }

    /// The columns of a record under fourfold's names.
    fn renamed(&self, mut object: Object) -> Parsed<Object> {
        if self.source.preset.is_some() {
            return Ok(object);
        }
        if let Some(names) = &self.source.columns {
            object = rename::apply(object, names)?;
        }
        if self.source.ranking == Some(false) {
            object.shift_remove("chosen");
            object.shift_remove("rejected");
        }
        Ok(object)
    }

    /// How an object is to be read, by its columns.
    fn detected(&self, object: &Object) -> Parsed<Shape> {
        Ok(match (detect(object), self.source.ranking) {
            (Ok(format @ (Format::HhRlhf | Format::Ranked | Format::Alpaca)), _) => Shape::Format(format),
            (Ok(_), Some(true)) => Shape::Format(Format::Preference),
            (Ok(format), _) => Shape::Format(format),
            (Err(fault), _) => Shape::Preset(presets::recognised(object).ok_or(fault)?),
        })
    }

    fn read(&self, shape: Shape, object: &Object) -> Parsed<Remarked> {
        match shape {
            Shape::Preset(preset) => Ok((presets::record(preset, object, self.verbatim)?, vec![])),
            Shape::Format(format) => Columns::new(object, &self.tags, self.verbatim).remarked(format),
        }
    }
}

/// The name of a format or preset in the config.
fn name_of(shape: Shape) -> String {
    let name = match shape {
        Shape::Format(format) => serde_json::to_value(format),
        Shape::Preset(preset) => serde_json::to_value(preset),
    };
    name.map(|name| name.to_string()).unwrap_or_default()
}
