//! The records that data files hold, once read: [`Record`] and its [`Text`]s, where each stands ([`Place`]), and what a
//! reader passes on ([`RawRecord`]).
//!
//! Every other file of `data/` builds on these types. This file does not depend on `files`, `formats`
//! or the model. Read `data/files/read.rs` next.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use serde_json::{Map, Value};

use crate::tokenizer::chat_template::{Message, bytes_of};

/// A text as given, or a dialogue that a template renders to text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Text {
    /// A text that is used as it is, unless `[data] template` asks for turns.
    Verbatim(String),
    /// The turns of a dialogue, never empty.
    Dialogue(Vec<Message>),
}

/// What raters said about a pair of responses beside which is the better one. The numbers are kept as their bits, so that examples
/// can be compared and stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairLabel {
    chosen_probability: u32,
    margin: u32,
}

impl Default for PairLabel {
    /// The chosen response is the better one, by no margin.
    fn default() -> Self {
        Self::new(1.0, 0.0)
    }
}

impl PairLabel {
    /// `chosen_probability`: share of raters, 0 to 1, who prefer the chosen response; 1/2 is a tie. `margin`: by how much its score
    /// should be higher at least.
    pub fn new(chosen_probability: f32, margin: f32) -> Self {
        Self { chosen_probability: chosen_probability.to_bits(), margin: margin.to_bits() }
    }

    /// Share of raters, 0 to 1, who prefer the chosen response.
    pub fn chosen_probability(self) -> f32 {
        f32::from_bits(self.chosen_probability)
    }

    /// By how much the chosen response's score should be higher at least.
    pub fn margin(self) -> f32 {
        f32::from_bits(self.margin)
    }

    /// Both numbers as words.
    pub fn to_words(self) -> [u32; 2] {
        [self.chosen_probability, self.margin]
    }

    /// Reads what [`PairLabel::to_words`] wrote.
    pub fn from_words([chosen_probability, margin]: [u32; 2]) -> Self {
        Self { chosen_probability, margin }
    }

    /// What there is of each response, chosen first, with that of the preferred one first; `None` for a tie.
    pub fn preferred_first<T>(self, mut of_each: Vec<T>) -> Option<Vec<T>> {
        let probability = self.chosen_probability();
        if probability < 0.5 {
            of_each.reverse();
        }
        (probability != 0.5).then_some(of_each)
    }
}

/// One training record, in the terms of TRL's dataset types.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A text, or a conversation whose assistant turns are all trained on.
    LanguageModeling(Text),
    /// A prompt and one response to train on.
    PromptCompletion {
        /// The prompt; a dialogue ends with the user's turn.
        prompt: Text,
        /// The response; a dialogue exactly where `prompt` is one.
        completion: Text,
    },
    /// A prompt and two or more different responses, best first; a preference has two.
    Ranked {
        /// The prompt; a dialogue ends with the user's turn.
        prompt: Text,
        /// The responses; dialogues exactly where `prompt` is one.
        responses: Vec<Text>,
        /// What the record says about a pair beside its order.
        label: PairLabel,
    },
    /// A prompt and a response that was labelled desirable or undesirable.
    Unpaired {
        /// The prompt; a dialogue ends with the user's turn.
        prompt: Text,
        /// The response; a dialogue exactly where `prompt` is one.
        completion: Text,
        /// The label: true = desirable.
        label: bool,
    },
    /// A prompt without a response.
    PromptOnly(Text),
}

impl Record {
    /// The record's type as messages name it, after TRL.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::LanguageModeling(_) => "language_modeling",
            Self::PromptCompletion { .. } => "prompt_completion",
            Self::Ranked { responses, .. } if responses.len() == 2 => "preference",
            Self::Ranked { .. } => "ranked",
            Self::Unpaired { .. } => "unpaired",
            Self::PromptOnly(_) => "prompt_only",
        }
    }

    /// The record's texts: the prompt, if there is one, comes first.
    pub fn texts(&self) -> Vec<&Text> {
        match self {
            Self::LanguageModeling(text) | Self::PromptOnly(text) => vec![text],
            Self::PromptCompletion { prompt, completion } | Self::Unpaired { prompt, completion, .. } => {
                vec![prompt, completion]
            }
            Self::Ranked { prompt, responses, .. } => std::iter::once(prompt).chain(responses).collect(),
        }
    }

    /// The first turn of the record's dialogue, which carries the template's variables; `None` if it begins with a text.
    pub(crate) fn first_turn_mut(&mut self) -> Option<&mut Message> {
        let (Self::LanguageModeling(text)
        | Self::PromptOnly(text)
        | Self::PromptCompletion { prompt: text, .. }
        | Self::Unpaired { prompt: text, .. }
        | Self::Ranked { prompt: text, .. }) = self;
        match text {
            Text::Dialogue(turns) => turns.first_mut(),
            Text::Verbatim(_) => None,
        }
    }
}

/// A record as its reader parsed it, with the remarks of [`Entry`].
pub(crate) type Remarked = (Record, Vec<String>);

/// A record's position in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The file's path, as named or found.
    pub file: Arc<Path>,
    /// Record number in the file, from 1.
    pub record: usize,
    /// Line number, from 1, where each record is a line.
    pub line: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}, line {line}", self.file.display()),
            None => write!(f, "{}, record {}", self.file.display(), self.record),
        }
    }
}

/// A record and its position.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The record's position, for messages.
    pub place: Place,
    /// The record itself.
    pub record: Record,
    /// What is to be counted and reported of the record: columns that nothing reads.
    pub remarks: Vec<String>,
}

/// A record that was skipped because it cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The record's position.
    pub place: Place,
    /// The reason why the record cannot be used.
    pub fault: String,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.fault)
    }
}

/// A record as its file holds it, before its columns are interpreted.
pub(crate) enum RawRecord {
    /// A JSON value, which should be an object.
    Json(Value),
    /// The same, with values that were read as null because JSON has no place for them.
    Holed(Value, Vec<Hole>),
    /// A line of a text file.
    Line(String),
}

impl RawRecord {
    /// Number of bytes of the record's texts, about.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Json(value) | Self::Holed(value, _) => bytes_of(std::iter::once(value)),
            Self::Line(text) => text.len(),
        }
    }
}

/// A value of a record that was read as null.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hole {
    /// The column that it is in.
    pub(crate) column: String,
    /// What is there: `NaN`.
    pub(crate) what: &'static str,
}

impl Hole {
    /// Adds a hole; one per column is enough for a message.
    pub(crate) fn add(holes: &mut Vec<Self>, column: &str, what: &'static str) {
        if holes.iter().all(|hole| hole.column != column) {
            holes.push(Self { column: column.to_owned(), what });
        }
    }

    /// A record's fault, and the holes that may be its reason.
    pub(crate) fn explain(fault: &str, holes: &[Self]) -> String {
        let one = |hole: &Self| format!("column {:?} holds {}, which is read as null", hole.column, hole.what);
        let named: Vec<String> = holes.iter().take(3).map(one).collect();
        format!("{fault}; {}", named.join(", "))
    }
}

/// Receives each raw record, or the reason why its bytes are not one; returns whether to read on.
pub(crate) type RawSink<'s> = dyn FnMut(Place, Result<RawRecord, String>) -> Result<bool> + 's;

/// A parsed value, or a sentence that names the column and what is wrong with it.
pub(crate) type Parsed<T> = Result<T, String>;
/// The columns of one record.
pub(crate) type Object = Map<String, Value>;
