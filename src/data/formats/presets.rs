//! DeepSpeed-Chat's dataset classes as a table: per public data set, the columns of prompt and responses, the rule for
//! the better response, the edits of the texts, and the names of the splits.
//!
//! The rules are those of microsoft/DeepSpeedExamples, DeepSpeed-Chat, `raw_datasets.py`. There every prompt is `"
//! Human: " + question + " Assistant:"` and every response begins with a space; here that is the template
//! `human_assistant`, and a record holds the turns, so that another template can be used as well. This file does not
//! depend on `files`. Read `data/examples/mod.rs` next.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value;

use crate::config::Preset;
use crate::data::formats::dialogue::ranked;
use crate::data::formats::fault::kind_of;
use crate::data::formats::rename::value_at;
use crate::data::formats::transcript::{is_transcript, turns};
use crate::data::record::{Object, Parsed, Record, Text};
use crate::tokenizer::chat_template::Message;

/// How a data set is split into training and evaluation records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Splits {
    /// The data set has both splits, under these names.
    Named {
        /// The split to train on.
        train: &'static str,
        /// The split to evaluate on.
        eval: &'static str,
    },
    /// The data set has only `train`; nine tenths are for training: `data_split = "9,1"` with the name `train_eval`.
    NineToOne,
}

/// How markers and spaces frame a prompt and its responses.
#[derive(Clone, Copy, PartialEq)]
enum Frame {
    /// `" Human: " + question + " Assistant:"` and `" " + response`, as one turn each.
    Turns,
    /// The columns hold the texts with their markers.
    Verbatim,
    /// The columns hold the texts with their markers; a space goes in front of each text.
    Spaced,
    /// The prompt lacks its last marker.
    Unmarked,
    /// The prompt has its markers; the response lacks the space after the last one.
    Marked,
}

/// A change to a column's text.
#[derive(Clone, Copy, PartialEq)]
enum Edit {
    /// The text stays as it is.
    None,
    /// Removes citation marks such as `[1]` and `(2)`, with the space before them.
    WithoutCitations,
    /// Keeps the text after the last `Assistant:`.
    AfterLastMarker,
    /// Replaces `USER` and `ASSISTANT` by `Human` and `Assistant`.
    VicunaMarkers,
}

/// The columns of the responses, by name or path.
#[derive(Clone, Copy)]
enum Responses {
    /// One response.
    One(&'static str),
    /// A better and a worse response.
    Pair { chosen: &'static str, rejected: &'static str },
    /// Two responses; the first is better unless its score is lower.
    ByScore { responses: [&'static str; 2], scores: [&'static str; 2] },
    /// Two responses; the first is better if the label is 1.
    ByLabel { responses: [&'static str; 2], label: &'static str },
}

/// One row of the table.
struct Recipe {
    preset: Preset,
    prompt: &'static str,
    responses: Responses,
    frame: Frame,
    /// Edits of the prompt and of the responses.
    edits: [Edit; 2],
    splits: Splits,
}

const fn recipe(preset: Preset, prompt: &'static str, responses: Responses, splits: Splits) -> Recipe {
    Recipe { preset, prompt, responses, frame: Frame::Turns, edits: [Edit::None; 2], splits }
}

const fn named(eval: &'static str) -> Splits {
    Splits::Named { train: "train", eval }
}

const CHOSEN_REJECTED: Responses = Responses::Pair { chosen: "chosen", rejected: "rejected" };
const PASSAGES: Responses =
    Responses::Pair { chosen: "positive_passages.0.text", rejected: "negative_passages.0.text" };
const WEBGPT: Responses = Responses::ByScore { responses: ["answer_0", "answer_1"], scores: ["score_0", "score_1"] };
const SHP: Responses = Responses::ByLabel { responses: ["human_ref_A", "human_ref_B"], label: "labels" };
const CITED: [Edit; 2] = [Edit::None, Edit::WithoutCitations];

#[rustfmt::skip]
const RECIPES: [Recipe; 16] = {
    use Responses::One;
    use Splits::NineToOne;
    [
        Recipe { frame: Frame::Verbatim, ..recipe(Preset::RmStatic, "prompt", CHOSEN_REJECTED, named("test")) },
        Recipe { frame: Frame::Verbatim, ..recipe(Preset::FullHhRlhf, "prompt", CHOSEN_REJECTED, named("test")) },
        recipe(Preset::SyntheticInstruct, "prompt", CHOSEN_REJECTED, NineToOne),
        Recipe { frame: Frame::Unmarked, edits: [Edit::None, Edit::AfterLastMarker],
                 ..recipe(Preset::RlhfReward, "prompt", CHOSEN_REJECTED, named("test")) },
        Recipe { edits: CITED, ..recipe(Preset::Webgpt, "question.full_text", WEBGPT, NineToOne) },
        recipe(Preset::Shp, "history", SHP, named("validation")),
        Recipe { frame: Frame::Marked, edits: [Edit::VicunaMarkers, Edit::None],
                 ..recipe(Preset::SharegptVicuna, "prompt", One("label"), named("test")) },
        recipe(Preset::ZhihuKol, "INSTRUCTION", One("RESPONSE"), NineToOne),
        recipe(Preset::MiraclZh, "query", PASSAGES, named("dev")),
        recipe(Preset::MiraclJa, "query", PASSAGES, named("dev")),
        recipe(Preset::Hc3Chinese, "question", One("human_answers.0"), NineToOne),
        recipe(Preset::MkqaChinese, "queries.zh_cn", One("answers.zh_cn.0.text"), NineToOne),
        recipe(Preset::MkqaJapanese, "queries.ja", One("answers.ja.0.text"), NineToOne),
        recipe(Preset::QgJaquad, "question", One("sentence"), named("validation")),
        recipe(Preset::QagJaquad, "questions.0", One("paragraph"), named("validation")),
        Recipe { frame: Frame::Spaced, ..recipe(Preset::LocalJson, "prompt", CHOSEN_REJECTED, named("eval")) },
    ]
};

fn of(preset: Preset) -> &'static Recipe {
    // Every preset has its row: tests/data/sources/public_sets.rs reads each.
    RECIPES.iter().find(|recipe| recipe.preset == preset).unwrap_or(&RECIPES[0])
}

/// The splits of a preset's data set.
pub fn splits(preset: Preset) -> Splits {
    of(preset).splits
}

/// The name of the split that a preset trains on.
pub fn train_split(preset: Preset) -> &'static str {
    match splits(preset) {
        Splits::Named { train, .. } => train,
        Splits::NineToOne => "train",
    }
}

/// The preset of an object, for the presets whose columns no other format has.
pub(crate) fn recognised(object: &Object) -> Option<Preset> {
    [Preset::Webgpt, Preset::Shp].into_iter().find(|&preset| {
        let columns: &[&str] = match of(preset).responses {
            Responses::ByScore { responses: [a, b], scores: [c, d] } => &[a, b, c, d],
            Responses::ByLabel { responses: [a, b], label } => &[a, b, label],
            _ => return false,
        };
        value_at(object, of(preset).prompt).is_some() && columns.iter().all(|column| object.contains_key(*column))
    })
}

/// A record of the preset's data set: a comparison, or a prompt with its response if there is no worse one. With
/// `verbatim`, texts that hold their markers stay as they are.
///
/// # Errors
/// A column is missing or wrong.
pub(crate) fn record(preset: Preset, object: &Object, verbatim: bool) -> Parsed<Record> {
    let recipe = of(preset);
    let text = |path: &str, edit: Edit| match value_at(object, path) {
        Some(Value::String(text)) if !text.trim().is_empty() => Ok(edited(text, edit)),
        None | Some(Value::Null | Value::String(_)) => Err(format!("column {path:?}: is empty or missing")),
        Some(other) => Err(format!("column {path:?}: expected a string, found {}", kind_of(other))),
    };
    let number = |path: &str| {
        let value = value_at(object, path).ok_or_else(|| format!("column {path:?} is missing"))?;
        let number = value.as_f64().or_else(|| value.as_str()?.trim().parse().ok());
        number.ok_or_else(|| format!("column {path:?}: expected a number, found {}", kind_of(value)))
    };
    let prompt = text(recipe.prompt, recipe.edits[0])?;
    let response = |path| text(path, recipe.edits[1]);
    let (best, worse) = match recipe.responses {
        Responses::One(column) => (response(column)?, None),
        // miracl has questions without a negative passage.
        Responses::Pair { chosen, rejected } => (
            response(chosen)?,
            match value_at(object, rejected) {
                None | Some(Value::Null) => None,
                Some(_) => Some(response(rejected)?),
            },
        ),
        Responses::ByScore { responses: [a, b], scores } => {
            let first = number(scores[0])? >= number(scores[1])?;
            if first { (response(a)?, Some(response(b)?)) } else { (response(b)?, Some(response(a)?)) }
        }
        Responses::ByLabel { responses: [a, b], label } => {
            if number(label)? == 1.0 {
                (response(a)?, Some(response(b)?))
            } else {
                (response(b)?, Some(response(a)?))
            }
        }
    };
    let prompt = match recipe.frame {
        Frame::Unmarked => format!("{prompt}Assistant:"),
        Frame::Spaced => format!(" {prompt}"),
        Frame::Turns | Frame::Verbatim | Frame::Marked => prompt,
    };
    let prompt = match recipe.frame {
        Frame::Turns => Text::Dialogue(vec![Message::new("user", prompt)]),
        Frame::Verbatim | Frame::Unmarked if !verbatim && is_transcript(&prompt) => {
            Text::Dialogue(open_turns(&prompt)?)
        }
        _ => Text::Verbatim(prompt),
    };
    let as_response = |text: String| match (&prompt, recipe.frame) {
        (Text::Dialogue(_), _) => Text::Dialogue(vec![Message::new("assistant", text.trim())]),
        (_, Frame::Spaced | Frame::Marked) => Text::Verbatim(format!(" {text}")),
        _ => Text::Verbatim(text),
    };
    let (best, worse) = (as_response(best), worse.map(as_response));
    match worse {
        Some(worse) => ranked(prompt, vec![("the better response", best), ("the worse response", worse)]),
        None => Ok(Record::PromptCompletion { prompt, completion: best }),
    }
}

/// The turns of a transcript without the empty last turn where the response goes.
fn open_turns(prompt: &str) -> Parsed<Vec<Message>> {
    let mut turns = turns(prompt)?;
    if turns.last().is_some_and(|turn| turn.role == "assistant" && turn.content.is_empty()) {
        turns.pop();
    }
    Ok(turns)
}

fn edited(text: &str, edit: Edit) -> String {
    static SPACED_CITATION: LazyLock<Regex> = LazyLock::new(|| Regex::new(r" [(\[].*?[)\]]").expect("a constant"));
    static CITATION: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"[(\[].*?[)\]]").expect("a constant"));
    match edit {
        Edit::None => text.to_owned(),
        Edit::WithoutCitations => CITATION.replace_all(&SPACED_CITATION.replace_all(text, ""), "").into_owned(),
        Edit::AfterLastMarker => text.rsplit("Assistant:").next().unwrap_or(text).to_owned(),
        Edit::VicunaMarkers => text.replace("USER", "Human").replace("ASSISTANT", "Assistant"),
    }
}
