//! The section `[[data.sources]]`, and what a source declares about its columns. The readers are in `data`; it does not
//! depend on them or on other data.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Data, Format, Paths};

/// `[[data.sources]]`: one of several origins of records, with a weight in the mixture. A key that is absent here is
/// taken from `[data]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// As `[data] path`. Required.
    pub path: Paths,
    /// How often this source is drawn from, against the weights of the others; above 0. Absent = 1 where any source has
    /// a weight. See `mix_strategy`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
    /// As `[data] format`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// As `[data] preset`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// As `[data] split`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// As `[data] revision`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// As `[data.columns]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<ColumnNames>,
    /// As `[data.tags]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tags: Option<Tags>,
    /// As `[data] ranking`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranking: Option<bool>,
    /// Reads no more than this many usable records of this source; absent = all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_rows: Option<usize>,
}

/// A public data set whose columns are known by its name: DeepSpeed-Chat's dataset classes. What each holds is the table
/// in `data::formats::presets`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[allow(missing_docs)] // the names say it
pub enum Preset {
    #[serde(rename = "Dahoas/rm-static")]
    RmStatic,
    #[serde(rename = "Dahoas/full-hh-rlhf")]
    FullHhRlhf,
    #[serde(rename = "Dahoas/synthetic-instruct-gptj-pairwise")]
    SyntheticInstruct,
    #[serde(rename = "yitingxie/rlhf-reward-datasets")]
    RlhfReward,
    #[serde(rename = "openai/webgpt_comparisons")]
    Webgpt,
    #[serde(rename = "stanfordnlp/SHP")]
    Shp,
    #[serde(rename = "pvduy/sharegpt_alpaca_oa_vicuna_format")]
    SharegptVicuna,
    #[serde(rename = "wangrui6/Zhihu-KOL")]
    ZhihuKol,
    #[serde(rename = "Cohere/miracl-zh-queries-22-12")]
    MiraclZh,
    #[serde(rename = "Cohere/miracl-ja-queries-22-12")]
    MiraclJa,
    #[serde(rename = "Hello-SimpleAI/HC3-Chinese")]
    Hc3Chinese,
    #[serde(rename = "mkqa-Chinese")]
    MkqaChinese,
    #[serde(rename = "mkqa-Japanese")]
    MkqaJapanese,
    #[serde(rename = "lmqg/qg_jaquad")]
    QgJaquad,
    #[serde(rename = "lmqg/qag_jaquad")]
    QagJaquad,
    #[serde(rename = "local/jsonfile")]
    LocalJson,
}

/// How several sources become one stream. The names of the last two are LLaMA-Factory's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MixStrategy {
    /// One source after the other. The default where no source has a weight.
    Concat,
    /// Each record is drawn from a source by weight; the stream ends where a source that is drawn has no more. No
    /// record comes twice. The default where a source has a weight.
    InterleaveUnder,
    /// As before, but a source that has no more begins again, until every source was read to its end once.
    InterleaveOver,
}

/// `[data.columns]`: what the file calls a column, for each that is not called as here. A dot goes into an object and a
/// number into a list: `prompt = "question.full_text"`, `completion = "answers.0"`. Other columns keep their names.
///
/// The keys are TRL's columns, and LLaMA-Factory's where it differs (`query` = `input`, `kto_tag` = `label`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ColumnNames {
    /// Raw text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// A prompt: text or messages; the instruction in Alpaca's format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Alpaca's input, set below the instruction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
    /// The response; Alpaca's output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response: Option<String>,
    /// The response, as TRL calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion: Option<String>,
    /// The better response.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen: Option<String>,
    /// The worse response.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejected: Option<String>,
    /// A list of responses, best first or with scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub responses: Option<String>,
    /// A list of numbers, one for each of `responses`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scores: Option<String>,
    /// Was the response judged good? true or false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// LLaMA-Factory's name of `label`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kto_tag: Option<String>,
    /// A conversation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub messages: Option<String>,
    /// The system prompt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Earlier rounds: a list of [user, assistant].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub history: Option<String>,
}

impl ColumnNames {
    /// (our name, the file's name) of every column that is named.
    pub fn pairs(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let all = [
            ("text", &self.text),
            ("prompt", &self.prompt),
            ("input", &self.query),
            ("response", &self.response),
            ("completion", &self.completion),
            ("chosen", &self.chosen),
            ("rejected", &self.rejected),
            ("responses", &self.responses),
            ("scores", &self.scores),
            ("label", &self.label),
            ("label", &self.kto_tag),
            ("messages", &self.messages),
            ("system", &self.system),
            ("history", &self.history),
        ];
        all.into_iter().filter_map(|(ours, theirs)| Some((ours, theirs.as_deref()?)))
    }
}

/// `[data.tags]`: how the turns of a conversation are written. Keys as in LLaMA-Factory's `dataset_info.json`. Absent =
/// both `{role, content}` with user, assistant, system, tool and `{from, value}` with human, gpt, system, observation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tags {
    /// The key of a turn's role.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role_tag: Option<String>,
    /// The key of a turn's text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_tag: Option<String>,
    /// What the user's role is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_tag: Option<String>,
    /// What the assistant's role is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub assistant_tag: Option<String>,
    /// What a tool's response is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observation_tag: Option<String>,
    /// What the assistant's call of a tool is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub function_tag: Option<String>,
    /// What the system's role is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_tag: Option<String>,
}

impl Tags {
    /// (the file's name of a role, ours) of every role that is named.
    pub fn roles(&self) -> impl Iterator<Item = (&str, &'static str)> {
        let all = [
            (&self.user_tag, "user"),
            (&self.assistant_tag, "assistant"),
            (&self.observation_tag, "tool"),
            (&self.function_tag, "assistant"),
            (&self.system_tag, "system"),
        ];
        all.into_iter().filter_map(|(theirs, ours)| Some((theirs.as_deref()?, ours)))
    }
}

impl Data {
    /// The sources, each with what it takes from `[data]`: those listed, or the one that `path` names.
    pub fn all_sources(&self) -> Vec<Source> {
        let one = || vec![Source { path: self.path.clone(), ..Source::default() }];
        let listed = if self.sources.is_empty() { one() } else { self.sources.clone() };
        let resolved = listed.into_iter().map(|source| Source {
            format: source.format.or(Some(self.format)),
            preset: source.preset.or(self.preset),
            split: source.split.or_else(|| self.split.clone()),
            revision: source.revision.or_else(|| self.revision.clone()),
            columns: source.columns.or_else(|| Some(self.columns.clone())),
            tags: source.tags.or_else(|| Some(self.tags.clone())),
            ranking: source.ranking.or(self.ranking),
            ..source
        });
        resolved.collect()
    }

    /// `mix_strategy`, or what the weights imply.
    pub fn mix_strategy(&self) -> MixStrategy {
        let weighed = self.sources.iter().any(|source| source.weight.is_some());
        self.mix_strategy.unwrap_or(if weighed { MixStrategy::InterleaveUnder } else { MixStrategy::Concat })
    }
}
