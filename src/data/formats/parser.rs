//! [`Parser`]: raw records of one file -> [`Record`]s, with the source's column names, preset and format applied.
//!
//! Under `format = "auto"` the first record decides the format of the whole file. This file does not depend on
//! `files`. Read `data/formats/detect.rs` next.

use serde_json::Value;

use crate::config::{Compat, Format, Preset, Source, Tags};
use crate::data::formats::columns::Columns;
use crate::data::formats::detect::detect;
use crate::data::formats::fault::kind_of;
use crate::data::formats::{presets, rename};
use crate::data::record::{Hole, Parsed, RawRecord, Record, Text};

/// Parses the records of one file of a source.
pub(crate) struct Parser<'s> {
    source: &'s Source,
    tags: Tags,
    format: Format,
    preset: Option<Preset>,
    /// Whether transcripts stay verbatim instead of being split into turns.
    verbatim: bool,
}

impl<'s> Parser<'s> {
    /// A parser for one file of `source`, which is one of [`crate::config::Data::all_sources`].
    pub(crate) fn new(source: &'s Source, compat: Option<Compat>) -> Self {
        let tags = source.tags.clone().unwrap_or_default();
        Self {
            source,
            tags,
            format: source.format.unwrap_or_default(),
            preset: source.preset,
            verbatim: compat.is_some(),
        }
    }

    /// Parses one raw record.
    ///
    /// # Errors
    /// The record has no known format, or a column is missing or wrong.
    pub(crate) fn record(&mut self, raw: RawRecord) -> Parsed<Record> {
        let mut object = match raw {
            RawRecord::Line(text) => return Ok(Record::LanguageModeling(Text::Verbatim(text))),
            RawRecord::Holed(value, holes) => {
                return self.record(RawRecord::Json(value)).map_err(|fault| Hole::explain(&fault, &holes));
            }
            RawRecord::Json(Value::Object(object)) => object,
            RawRecord::Json(other) => {
                return Err(format!("expected a JSON object with columns, found {}", kind_of(&other)));
            }
        };
        if let Some(preset) = self.preset {
            return presets::record(preset, &object, self.verbatim);
        }
        if let Some(names) = &self.source.columns {
            object = rename::apply(object, names)?;
        }
        if self.source.ranking == Some(false) {
            object.shift_remove("chosen");
            object.shift_remove("rejected");
        }
        if self.format == Format::Auto {
            self.format = match (detect(&object), self.source.ranking) {
                (Ok(Format::Preference | Format::HhRlhf | Format::Ranked), _) | (Ok(_), None | Some(false)) => {
                    detect(&object)?
                }
                (Ok(Format::Alpaca), Some(true)) => Format::Alpaca,
                (Ok(_), Some(true)) => Format::Preference,
                (Err(fault), _) => {
                    self.preset = Some(presets::recognised(&object).ok_or(fault)?);
                    return self.record(RawRecord::Json(Value::Object(object)));
                }
            };
        }
        Columns { object: &object, tags: &self.tags, verbatim: self.verbatim }.record(self.format)
    }
}
