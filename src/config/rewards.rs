//! The sections `[[ppo.reward]]` and `[ppo.gold]`: sources of scores besides, or instead of, `reward_adapter`.
//!
//! Read `ppo.rs` before this file and `reward_rules.rs` after it.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use toml::Table;

use super::json_schema::JsonSchema as Checked;
use crate::invalid;

/// The column that `math` reads unless it names one.
pub const ANSWER: &str = "answer";

/// What gives the scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardKind {
    /// Reward adapters over `[reward_base]`: one, or an ensemble.
    #[default]
    Adapter,
    /// A program: JSON lines on its stdin and stdout.
    Command,
    /// An endpoint that speaks `api`: scores by `POST {"prompts", "responses", "record_ids", "columns"}`, answered by
    /// `{"scores"}`, or a reward model behind vLLM or SGLang.
    Http,
    /// A language model behind an OpenAI-compatible endpoint, asked about each response by a template.
    Judge,
    /// 1 where `pattern` is found in the response, else 0.
    Regex,
    /// 1 where the response is one JSON value, else 0.
    JsonValid,
    /// 1 where the response has `min_tokens` to `max_tokens` tokens, else 0.
    Length,
    /// 1 where the response is the one that its record gives (the completion of a prompt_completion record), else 0.
    Exact,
    /// 1 where the final answer of the response equals the one in a column of its record, else 0.
    Math,
    /// 1 where the response, or the last fenced block in it, is JSON that satisfies `schema`, else 0.
    JsonSchema,
}

impl RewardKind {
    pub(super) const ALL: [Self; 10] = [
        Self::Adapter,
        Self::Command,
        Self::Http,
        Self::Judge,
        Self::Regex,
        Self::JsonValid,
        Self::Length,
        Self::Exact,
        Self::Math,
        Self::JsonSchema,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Adapter => "adapter",
            Self::Command => "command",
            Self::Http => "http",
            Self::Judge => "judge",
            Self::Regex => "regex",
            Self::JsonValid => "json_valid",
            Self::Length => "length",
            Self::Exact => "exact",
            Self::Math => "math",
            Self::JsonSchema => "json_schema",
        }
    }

    /// The keys that it reads beside `kind`, `name` and `weight`.
    pub(super) fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Adapter => &["adapters", "aggregate", "std_coef"],
            Self::Command => &["command", "timeout_seconds", "retries", "fallback_score"],
            Self::Http => &[
                "url",
                "api",
                "api_key_env",
                "model",
                "input",
                "template",
                "score_index",
                "request",
                "timeout_seconds",
                "retries",
                "fallback_score",
            ],
            Self::Judge => &[
                "url",
                "api_key_env",
                "model",
                "template",
                "min_score",
                "max_score",
                "request",
                "concurrency",
                "input_price",
                "output_price",
                "pattern",
                "timeout_seconds",
                "retries",
                "fallback_score",
            ],
            Self::Regex | Self::Exact => &["pattern"],
            Self::JsonValid => &[],
            Self::Length => &["min_tokens", "max_tokens"],
            Self::Math => &["column"],
            Self::JsonSchema => &["schema"],
        }
    }

    /// Whether the source gets the columns of the records.
    pub fn reads_columns(self) -> bool {
        matches!(self, Self::Command | Self::Http | Self::Judge | Self::Math)
    }
}

/// What an `http` endpoint speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardApi {
    /// `POST {"prompts", "responses", "record_ids", "columns"}`, answered by `{"scores"}`: a service of one's own.
    #[default]
    Fourfold,
    /// vLLM's `/classify` and SGLang's `/v1/classify`.
    Classify,
    /// vLLM's `/pooling`.
    Pooling,
    /// vLLM's `/score` and `/v1/score`: the texts of prompt and response as a pair.
    Score,
    /// SGLang's `/classify`.
    SglangClassify,
    /// SGLang's `/v1/score`: the probability of a label's token after prompt and response.
    SglangScore,
}

impl RewardApi {
    /// Whether it reads whole sequences, of which `input` says how they are sent.
    pub(super) fn needs_input(self) -> bool {
        !matches!(self, Self::Fourfold | Self::Score)
    }

    /// Whether sequences are sent as one text each, which a template may give.
    pub(super) fn reads_template(self) -> bool {
        matches!(self, Self::Classify | Self::Pooling | Self::SglangClassify)
    }
}

/// How sequences are sent to a reward model behind a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardInput {
    /// The policy's token ids, the end of the response among them: for a reward model with the policy's tokenizer.
    Ids,
    /// Text, without special tokens but those that a template or the server adds.
    Text,
}

/// How the scores of an ensemble of reward models become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EnsembleScore {
    /// Their mean less `std_coef` times their deviation: where they disagree, a response scores lower.
    #[default]
    MeanMinusStd,
    /// Their mean.
    Mean,
    /// The lowest: the policy is optimised for the worst case.
    Min,
}

/// One `[[ppo.reward]]`. The reward of a response is the sum of all of them and of `reward_adapter`, each times its
/// weight.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardPart {
    /// What gives the scores. Default `adapter`.
    pub kind: RewardKind,
    /// What its figures are called by. Default: the kind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What its scores are multiplied by. Default 1.0.
    pub weight: f64,
    /// The weight in the run's last iteration: from `weight` in the first it goes there in a straight line, and evaluations
    /// have it throughout. Absent = `weight` in all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_end: Option<f64>,
    /// `adapter`: folders of reward adapters over the one base. Several are an ensemble, whose scores `aggregate` makes one.
    pub adapters: Vec<PathBuf>,
    /// `adapter`: how an ensemble's scores become one (arXiv:2310.02743). Default `mean_minus_std`.
    #[serde(skip_serializing_if = "is_usual")]
    pub aggregate: EnsembleScore,
    /// `adapter`: how much an ensemble's disagreement costs. Default 1.0 (arXiv:2310.02743 tries 0.1 to 1).
    pub std_coef: f64,
    /// `command`: the program and its arguments, run without a shell.
    pub command: Vec<String>,
    /// `http`: the address, `http://host:port/path`. `judge`: the API's, `http://host:port/v1`, with or without
    /// `/chat/completions`. `https://` needs a build with the feature `hub`.
    pub url: String,
    /// `http`, `judge`: the environment variable that holds the bearer token; absent = none is sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_env: Option<String>,
    /// `http`: what the endpoint speaks. Default `fourfold`; the others are reward models behind vLLM or SGLang, whose scores are
    /// the numbers before any softmax or sigmoid (vLLM's `use_activation = false`) unless `request` says otherwise.
    #[serde(skip_serializing_if = "is_own")]
    pub api: RewardApi,
    /// `http`: how prompt and response reach a reward model. `ids` are the policy's tokens, so it needs the same tokenizer; `text`
    /// is tokenised by the server. Every `api` but `fourfold` and `score` needs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input: Option<RewardInput>,
    /// `http`: which of the numbers that a reward model returns for a response is its score, from 0; absent = it returns one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score_index: Option<usize>,
    /// `judge`: the judging model's name. `http`: the served reward model's; absent = the server's own choice.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub model: String,
    /// `judge`: the question, a Jinja template over `prompt`, `response` and the record's `columns`. Absent = a grade from
    /// 1 to 10. `http` with `input = "text"`: the text that a reward model reads. Absent = the prompt and the response.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// `judge`: smallest valid score; a reply with another counts as one without a score. Absent = 1 without a template,
    /// else no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_score: Option<f64>,
    /// `judge`: largest valid score. Absent = 10 without a template, else no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_score: Option<f64>,
    /// `judge`: more keys of the request, such as `{ temperature = 1, max_tokens = 256, seed = 1 }`. Default none; the
    /// temperature is 0. `http`: those of a reward model's server, such as `{ label_token_ids = [9891], apply_softmax = true }`.
    /// The texts that are asked about and the model are not among them.
    #[serde(skip_serializing_if = "Table::is_empty")]
    #[schemars(with = "std::collections::BTreeMap<String, serde_json::Value>")]
    pub request: Table,
    /// `judge`: requests at once; absent = 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<NonZeroUsize>,
    /// `judge`: cost of a million tokens of question, for the metric `cost`; absent = 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_price: Option<f64>,
    /// `judge`: cost of a million tokens of reply; absent = 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output_price: Option<f64>,
    /// `regex`: what to find. `exact`: where in the response to look, the first group of the last match. `judge`: the score
    /// in the reply, the first group of the last match; absent = the number after the last "score".
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// `math`: the column with the right answer, or with a solution in which `\boxed{}` or `####` marks it; absent = `answer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// `json_schema`: a JSON schema as text, in `'''`. It may have the keywords that `configs/features.md` lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    /// `length`: no fewer tokens. Default 1.
    pub min_tokens: usize,
    /// `length`: no more tokens; absent = no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
    /// `command`: longest wait for the next line; `http`, `judge`: for the whole reply. Default 60.
    pub timeout_seconds: f64,
    /// `command`, `http`, `judge`: tries after a failed one, half a second later and then twice as long each time. Default 3.
    pub retries: usize,
    /// `command`, `http`, `judge`: the score of a response that got none after all tries, counted in the metrics; absent = the
    /// run stops.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback_score: Option<f64>,
}

impl Default for RewardPart {
    fn default() -> Self {
        Self {
            kind: RewardKind::Adapter,
            name: None,
            weight: 1.0,
            weight_end: None,
            adapters: Vec::new(),
            aggregate: EnsembleScore::MeanMinusStd,
            std_coef: 1.0,
            command: Vec::new(),
            url: String::new(),
            api_key_env: None,
            api: RewardApi::Fourfold,
            input: None,
            score_index: None,
            model: String::new(),
            template: None,
            min_score: None,
            max_score: None,
            request: Table::new(),
            concurrency: None,
            input_price: None,
            output_price: None,
            pattern: None,
            column: None,
            schema: None,
            min_tokens: 1,
            max_tokens: None,
            timeout_seconds: 60.0,
            retries: 3,
            fallback_score: None,
        }
    }
}

fn is_usual(score: &EnsembleScore) -> bool {
    *score == EnsembleScore::default()
}

fn is_own(api: &RewardApi) -> bool {
    *api == RewardApi::Fourfold
}

/// Which columns of a record are read beside those of its format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ColumnsRead {
    /// Columns by the names that they have in the file.
    Named(Vec<String>),
    /// Every column.
    All,
}

impl RewardPart {
    /// The columns that the source reads or is sent.
    pub fn columns_read(&self) -> ColumnsRead {
        match (self.kind, &self.column) {
            (RewardKind::Math, column) => ColumnsRead::Named(vec![column.as_deref().unwrap_or(ANSWER).to_owned()]),
            (kind, _) if kind.reads_columns() => ColumnsRead::All,
            _ => ColumnsRead::Named(vec![]),
        }
    }

    /// What its figures are called by.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(self.kind.name())
    }

    /// Smallest and largest valid score of a judge.
    pub fn range(&self) -> (f64, f64) {
        let usual = if self.template.is_some() { (f64::NEG_INFINITY, f64::INFINITY) } else { (1.0, 10.0) };
        (self.min_score.unwrap_or(usual.0), self.max_score.unwrap_or(usual.1))
    }

    /// The schema of a `json_schema`, if there is one.
    ///
    /// # Errors
    /// If it is no JSON, or no schema that can be checked.
    pub fn json_schema(&self) -> Result<Option<Checked>> {
        let Some(text) = &self.schema else { return Ok(None) };
        let json = serde_json::from_str(text).map_err(|error| invalid!("schema is no JSON: {error}"))?;
        Checked::new(json).map(Some).map_err(|error| invalid!("schema {error:#}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Origin;

    #[test]
    fn every_key_is_read_by_a_kind_and_no_kind_reads_one_that_is_not_there() {
        let full = RewardPart {
            name: Some("n".into()),
            weight_end: Some(2.0),
            aggregate: EnsembleScore::Min,
            api: RewardApi::Classify,
            input: Some(RewardInput::Ids),
            score_index: Some(0),
            api_key_env: Some("K".into()),
            model: "m".into(),
            template: Some("t".into()),
            min_score: Some(0.0),
            max_score: Some(1.0),
            request: Table::from_iter([("seed".to_owned(), 1.into())]),
            concurrency: NonZeroUsize::new(1),
            input_price: Some(1.0),
            output_price: Some(1.0),
            pattern: Some("p".into()),
            column: Some("c".into()),
            schema: Some("{}".into()),
            max_tokens: Some(2),
            fallback_score: Some(0.0),
            ..RewardPart::default()
        };
        let all = Table::try_from(&full).unwrap();
        let read: Vec<&str> = RewardKind::ALL.iter().flat_map(|kind| kind.keys()).copied().collect();
        for key in all.keys().filter(|key| !["kind", "name", "weight", "weight_end"].contains(&key.as_str())) {
            assert!(read.contains(&key.as_str()), "no kind reads {key}");
        }
        for key in read {
            assert!(all.contains_key(key), "there is no key {key}");
        }
    }

    #[test]
    fn a_request_may_have_more_keys_and_none_that_it_has_by_itself() {
        let part = |kind, api, key: &str| RewardPart {
            kind,
            api,
            url: "http://127.0.0.1:9/x".into(),
            model: "m".into(),
            input: (api != RewardApi::Fourfold).then_some(RewardInput::Text),
            request: Table::from_iter([("label_token_ids".to_owned(), 1.into()), (key.to_owned(), "x".into())]),
            ..RewardPart::default()
        };
        for (kind, api, own) in [
            (RewardKind::Judge, RewardApi::Fourfold, &["messages", "model"][..]),
            (RewardKind::Http, RewardApi::Classify, &["input", "model"]),
            (RewardKind::Http, RewardApi::Pooling, &["input", "model"]),
            (RewardKind::Http, RewardApi::Score, &["text_1", "text_2", "model"]),
            (RewardKind::Http, RewardApi::SglangClassify, &["input_ids", "text", "model"]),
            (RewardKind::Http, RewardApi::SglangScore, &["query", "items", "model"]),
        ] {
            for key in own {
                let error = part(kind, api, key).check(Origin::Grpo).unwrap_err();
                assert_eq!(crate::error::exit_code(&error), 2);
                let said = error.to_string();
                assert!(said.starts_with(&format!("[[grpo.reward]] request = {{ {key} = … }}")), "{api:?}: {said}");
            }
            // What has a default, and may be another.
            for key in ["temperature", "use_activation", "seed"] {
                part(kind, api, key).check(Origin::Grpo).unwrap();
            }
        }
    }

    #[test]
    fn a_service_has_an_address_that_can_be_one() {
        for kind in [RewardKind::Http, RewardKind::Judge] {
            let part = |url: &str| {
                let model = if kind == RewardKind::Judge { "m" } else { "" };
                RewardPart { kind, url: url.into(), model: model.into(), ..RewardPart::default() }.check(Origin::Rloo)
            };
            part("http://127.0.0.1:9/v1").unwrap();
            assert!(part("").unwrap_err().to_string().contains("needs url"));
            for url in ["http://127.0.0.1:99999/x", "http://:8917/x", "ftp://x"] {
                let said = part(url).unwrap_err().to_string();
                assert!(said.starts_with(&format!("[[rloo.reward]] url = {url:?}: ")), "{said}");
            }
        }
    }

    #[test]
    fn a_key_that_the_kind_does_not_read_is_refused_with_the_kinds_that_do() {
        let part = RewardPart { kind: RewardKind::JsonValid, retries: 5, ..RewardPart::default() };
        let message = part.check(Origin::Ppo).unwrap_err().to_string();
        assert!(message.contains("kind = \"json_valid\" does not read retries"), "{message}");
        assert!(message.contains("\"command\" or \"http\" or \"judge\""), "{message}");
        assert!(RewardPart { kind: RewardKind::JsonValid, ..RewardPart::default() }.check(Origin::Ppo).is_ok());
    }
}
