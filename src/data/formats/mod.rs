//! One JSON object -> a [`Record`], of one of the formats the field uses: TRL's dataset types, Alpaca, ShareGPT with
//! LLaMA-Factory's ranking, OpenAI messages, HH-RLHF transcripts. Knows no file and no tokenizer; a fault is a sentence
//! about a column, and mod.rs puts the place in front. Read columns.rs next.

mod columns;
mod dialogue;
pub mod presets;
mod rename;
mod transcript;

use serde_json::{Map, Value};

use super::Message;
use crate::config::{Compat, Format, Preset, Source, Tags};
use crate::data::files::read::Found;
use crate::data::formats::columns::Columns;
use crate::data::formats::dialogue::kind_of;
use crate::data::formats::transcript::is_transcript;

/// A text as given, or a dialogue that a template will make a text of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    /// Used as it is, unless `[data] template` asks for turns.
    Verbatim(String),
    /// Turns, never empty.
    Dialogue(Vec<Message>),
}

/// What a record offers to train on.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A text, or a conversation whose assistant turns are all to be learnt.
    LanguageModeling(Text),
    /// A prompt and one answer to learn.
    PromptCompletion {
        /// Ends with the user's turn where it is a dialogue.
        prompt: Text,
        /// A dialogue exactly where `prompt` is one.
        completion: Text,
    },
    /// A prompt and two or more different answers, best first; a preference is two.
    Ranked {
        /// Ends with the user's turn where it is a dialogue.
        prompt: Text,
        /// Dialogues exactly where `prompt` is one.
        answers: Vec<Text>,
    },
    /// A prompt and an answer that was judged good or bad.
    Unpaired {
        /// Ends with the user's turn where it is a dialogue.
        prompt: Text,
        /// A dialogue exactly where `prompt` is one.
        completion: Text,
        /// True = good.
        label: bool,
    },
    /// A prompt alone.
    PromptOnly(Text),
}

impl Record {
    /// What the record is called in messages: TRL's name of the type.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::LanguageModeling(_) => "language_modeling",
            Self::PromptCompletion { .. } => "prompt_completion",
            Self::Ranked { answers, .. } if answers.len() == 2 => "preference",
            Self::Ranked { .. } => "ranked",
            Self::Unpaired { .. } => "unpaired",
            Self::PromptOnly(_) => "prompt_only",
        }
    }
}

pub(crate) type Parsed<T> = Result<T, String>;
pub(crate) type Object = Map<String, Value>;

/// Reads the records of one file of a source; under `auto` the first one decides the format of all.
pub(crate) struct Parser<'s> {
    source: &'s Source,
    tags: Tags,
    format: Format,
    preset: Option<Preset>,
    /// Are transcripts kept as they stand, not cut into turns?
    verbatim: bool,
}

impl<'s> Parser<'s> {
    /// `source` as [`crate::config::Data::all_sources`] gives it.
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

    pub(crate) fn record(&mut self, found: Found) -> Parsed<Record> {
        let mut object = match found {
            Found::Line(text) => return Ok(Record::LanguageModeling(Text::Verbatim(text))),
            Found::Json(Value::Object(object)) => object,
            Found::Json(other) => {
                return Err(format!("expected a JSON object with columns, found {}", kind_of(&other)));
            }
        };
        if let Some(preset) = self.preset {
            return presets::record(preset, &object, self.verbatim);
        }
        if let Some(names) = &self.source.columns {
            object = rename::renamed(object, names)?;
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
                    return self.record(Found::Json(Value::Object(object)));
                }
            };
        }
        Columns { object: &object, tags: &self.tags, verbatim: self.verbatim }.record(self.format)
    }
}

pub(crate) fn detect(object: &Object) -> Parsed<Format> {
    let has = |key: &str| object.contains_key(key);
    let transcript = |key: &str| object.get(key).and_then(Value::as_str).is_some_and(is_transcript);
    Ok(if has("chosen") && has("rejected") {
        let implicit = !["prompt", "conversations", "messages", "instruction"].into_iter().any(has);
        match transcript("prompt") || (implicit && transcript("chosen") && transcript("rejected")) {
            true => Format::HhRlhf,
            false => Format::Preference,
        }
    } else if has("responses") {
        Format::Ranked
    } else if has("label") {
        Format::Unpaired
    } else if has("instruction") {
        let answered = ["output", "response", "completion"].into_iter().any(has);
        if answered { Format::Alpaca } else { Format::PromptOnly }
    } else if has("conversations") {
        Format::Sharegpt
    } else if has("prompt") {
        let answered = ["completion", "response", "output"].into_iter().any(has);
        if answered { Format::PromptCompletion } else { Format::PromptOnly }
    } else if has("messages") || has("text") {
        Format::LanguageModeling
    } else {
        let keys: Vec<&str> = object.keys().take(12).map(String::as_str).collect();
        return Err(format!(
            "the columns {keys:?} are of no known format; expected \"messages\", \"conversations\", \"text\", \"prompt\" \
             (with \"completion\", \"chosen\" and \"rejected\", or \"responses\"), or \"instruction\" and \"output\""
        ));
    })
}
