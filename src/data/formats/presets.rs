//! DeepSpeed-Chat's dataset classes as a table: where each public set has its prompt and answers, which answer is the
//! better one, what is cut out of them, and how its splits are called. Knows no file. Read formats.rs next.
//!
//! The mappings are those of microsoft/DeepSpeedExamples, DeepSpeed-Chat, `raw_datasets.py`. There every prompt is
//! `" Human: " + question + " Assistant:"` and every answer begins with a space; here that is the template
//! `human_assistant`, and a record holds the turns, so that another template can be used as well.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value;

use crate::config::Preset;
use crate::data::Message;
use crate::data::formats::dialogue::ranked;
use crate::data::formats::rename::at;
use crate::data::formats::transcript::{is_transcript, turns};
use crate::data::formats::{Object, Parsed, Record, Text};

/// How a set's splits for training and evaluation are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Splits {
    /// It has both, of these names.
    Named {
        /// The split to train on.
        train: &'static str,
        /// The split to evaluate on.
        eval: &'static str,
    },
    /// It has `train` alone, of which nine tenths are trained on: `data_split = "9,1"` with the name `train_eval`.
    NineToOne,
}

/// What frames a question and its answers.
#[derive(Clone, Copy, PartialEq)]
enum Frame {
    /// `" Human: " + question + " Assistant:"` and `" " + answer`: a turn each.
    Turns,
    /// The texts stand in the columns with their markers.
    Verbatim,
    /// The same, after a space each.
    Spaced,
    /// The prompt lacks its last marker.
    Unmarked,
    /// The prompt has its markers, and the answer lacks the space after the last.
    Marked,
}

#[derive(Clone, Copy, PartialEq)]
enum Edit {
    None,
    /// `[1]`, `(2)`: the marks of a browser's citations, with the space before them.
    WithoutCitations,
    /// What follows the last `Assistant:`.
    AfterLastMarker,
    /// `USER` and `ASSISTANT` are called `Human` and `Assistant`.
    VicunaMarkers,
}

/// Columns, by name or path.
#[derive(Clone, Copy)]
enum Answers {
    One(&'static str),
    Pair {
        chosen: &'static str,
        rejected: &'static str,
    },
    /// The first is better where its score is not lower.
    ByScore {
        answers: [&'static str; 2],
        scores: [&'static str; 2],
    },
    /// The first is better where the label is 1.
    ByLabel {
        answers: [&'static str; 2],
        label: &'static str,
    },
}

/// One row of the table.
struct Recipe {
    preset: Preset,
    prompt: &'static str,
    answers: Answers,
    frame: Frame,
    /// Of the prompt and of the answers.
    edits: [Edit; 2],
    splits: Splits,
}

const fn recipe(preset: Preset, prompt: &'static str, answers: Answers, splits: Splits) -> Recipe {
    Recipe { preset, prompt, answers, frame: Frame::Turns, edits: [Edit::None; 2], splits }
}

const fn named(eval: &'static str) -> Splits {
    Splits::Named { train: "train", eval }
}

const CHOSEN_REJECTED: Answers = Answers::Pair { chosen: "chosen", rejected: "rejected" };
const PASSAGES: Answers = Answers::Pair { chosen: "positive_passages.0.text", rejected: "negative_passages.0.text" };
const WEBGPT: Answers = Answers::ByScore { answers: ["answer_0", "answer_1"], scores: ["score_0", "score_1"] };
const SHP: Answers = Answers::ByLabel { answers: ["human_ref_A", "human_ref_B"], label: "labels" };
const CITED: [Edit; 2] = [Edit::None, Edit::WithoutCitations];

#[rustfmt::skip]
const RECIPES: [Recipe; 16] = {
    use Answers::One;
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
    // Every preset has its row: the test below walks them all.
    RECIPES.iter().find(|recipe| recipe.preset == preset).unwrap_or(&RECIPES[0])
}

/// How the set of that name is split.
pub fn splits(preset: Preset) -> Splits {
    of(preset).splits
}

/// The split of that set to train on.
pub fn train_split(preset: Preset) -> &'static str {
    match splits(preset) {
        Splits::Named { train, .. } => train,
        Splits::NineToOne => "train",
    }
}

/// The presets whose columns no other format has, so that a record shows its origin.
pub(crate) fn recognised(object: &Object) -> Option<Preset> {
    [Preset::Webgpt, Preset::Shp].into_iter().find(|&preset| {
        let columns: &[&str] = match of(preset).answers {
            Answers::ByScore { answers: [a, b], scores: [c, d] } => &[a, b, c, d],
            Answers::ByLabel { answers: [a, b], label } => &[a, b, label],
            _ => return false,
        };
        at(object, of(preset).prompt).is_some() && columns.iter().all(|column| object.contains_key(*column))
    })
}

/// A record of the set: a comparison, or a prompt with its answer where it has no worse one.
/// With `verbatim`, texts that hold their markers are kept as they stand.
pub(crate) fn record(preset: Preset, object: &Object, verbatim: bool) -> Parsed<Record> {
    let recipe = of(preset);
    let text = |path: &str, edit: Edit| match at(object, path) {
        Some(Value::String(text)) if !text.trim().is_empty() => Ok(edited(text, edit)),
        None | Some(Value::Null | Value::String(_)) => Err(format!("column {path:?}: is empty or missing")),
        Some(other) => {
            Err(format!("column {path:?}: expected a string, found {}", crate::data::formats::dialogue::kind_of(other)))
        }
    };
    let number = |path: &str| {
        let value = at(object, path).ok_or_else(|| format!("column {path:?} is missing"))?;
        let number = value.as_f64().or_else(|| value.as_str()?.trim().parse().ok());
        number.ok_or_else(|| {
            format!("column {path:?}: expected a number, found {}", crate::data::formats::dialogue::kind_of(value))
        })
    };
    let prompt = text(recipe.prompt, recipe.edits[0])?;
    let answer = |path| text(path, recipe.edits[1]);
    let (best, worse) = match recipe.answers {
        Answers::One(column) => (answer(column)?, None),
        // miracl has questions without a wrong passage.
        Answers::Pair { chosen, rejected } => (
            answer(chosen)?,
            match at(object, rejected) {
                None | Some(Value::Null) => None,
                Some(_) => Some(answer(rejected)?),
            },
        ),
        Answers::ByScore { answers: [a, b], scores } => {
            let first = number(scores[0])? >= number(scores[1])?;
            if first { (answer(a)?, Some(answer(b)?)) } else { (answer(b)?, Some(answer(a)?)) }
        }
        Answers::ByLabel { answers: [a, b], label } => {
            if number(label)? == 1.0 {
                (answer(a)?, Some(answer(b)?))
            } else {
                (answer(b)?, Some(answer(a)?))
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
    let as_answer = |text: String| match (&prompt, recipe.frame) {
        (Text::Dialogue(_), _) => Text::Dialogue(vec![Message::new("assistant", text.trim())]),
        (_, Frame::Spaced | Frame::Marked) => Text::Verbatim(format!(" {text}")),
        _ => Text::Verbatim(text),
    };
    let (best, worse) = (as_answer(best), worse.map(as_answer));
    match worse {
        Some(worse) => ranked(prompt, vec![("the better answer", best), ("the worse answer", worse)]),
        None => Ok(Record::PromptCompletion { prompt, completion: best }),
    }
}

/// The turns of a transcript up to where the answer stands.
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
