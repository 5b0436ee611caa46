//! The sections `[[ppo.reward]]` and `[ppo.gold]`: sources of scores besides, or instead of, `reward_adapter`.
//!
//! Read `ppo.rs` before this file and `validate.rs` after it.

use std::path::PathBuf;

use anyhow::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::invalid;

/// What gives the scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardKind {
    /// Reward adapters over `[reward_base]`: one, or an ensemble.
    #[default]
    Adapter,
    /// A program: JSON lines on its stdin and stdout.
    Command,
    /// An endpoint: `POST {"prompts", "responses"}`, answered by `{"scores"}`.
    Http,
    /// 1 where `pattern` is found in the response, else 0.
    Regex,
    /// 1 where the response is one JSON value, else 0.
    JsonValid,
    /// 1 where the response has `min_tokens` to `max_tokens` tokens, else 0.
    Length,
    /// 1 where the response is the one that its record gives (the completion of a prompt_completion record), else 0.
    Exact,
}

impl RewardKind {
    fn name(self) -> &'static str {
        match self {
            Self::Adapter => "adapter",
            Self::Command => "command",
            Self::Http => "http",
            Self::Regex => "regex",
            Self::JsonValid => "json_valid",
            Self::Length => "length",
            Self::Exact => "exact",
        }
    }
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
    /// `adapter`: folders of reward adapters. Several are an ensemble: the mean of their scores less `std_coef` times
    /// their deviation.
    pub adapters: Vec<PathBuf>,
    /// `adapter`: how much an ensemble's disagreement costs. Default 1.0 (arXiv:2310.02743 tries 0.1 to 1).
    pub std_coef: f64,
    /// `command`: the program and its arguments, run without a shell.
    pub command: Vec<String>,
    /// `http`: the address, `http://host:port/path`.
    pub url: String,
    /// `regex`: what to find. `exact`: where in the response to look, the first group of the last match.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
    /// `length`: no fewer tokens. Default 1.
    pub min_tokens: usize,
    /// `length`: no more tokens; absent = no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
    /// `command`: longest wait for the next line; `http`: for the whole response. Default 60.
    pub timeout_seconds: f64,
    /// `command`, `http`: tries after a failed one, half a second later and then twice as long each time. Default 3.
    pub retries: usize,
    /// `command`, `http`: the score of a response that got none after all tries, counted in the metrics; absent = the
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
            adapters: Vec::new(),
            std_coef: 1.0,
            command: Vec::new(),
            url: String::new(),
            pattern: None,
            min_tokens: 1,
            max_tokens: None,
            timeout_seconds: 60.0,
            retries: 3,
            fallback_score: None,
        }
    }
}

impl RewardPart {
    /// What its figures are called by.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(self.kind.name())
    }

    /// What a kind needs.
    pub(super) fn check(&self) -> Result<()> {
        let kind = self.kind.name();
        let needs = |what: &str| Err(invalid!("[[ppo.reward]] of kind = \"{kind}\" needs {what}"));
        match self.kind {
            RewardKind::Adapter if self.adapters.is_empty() => needs("adapters = [\"runs/reward/adapter\"]"),
            RewardKind::Command if self.command.iter().all(String::is_empty) => {
                needs("command = [\"program\", \"argument\"]")
            }
            RewardKind::Http if self.url.starts_with("https://") => Err(invalid!(
                "[[ppo.reward]] url = {:?}: only plain http is spoken; put a local proxy before that endpoint",
                self.url
            )),
            RewardKind::Http if !self.url.starts_with("http://") => needs("url = \"http://host:port/path\""),
            RewardKind::Regex if self.pattern.is_none() => needs("pattern = \"…\""),
            RewardKind::Length if self.max_tokens.is_some_and(|max| max < self.min_tokens) => Err(invalid!(
                "[[ppo.reward]] max_tokens is less than min_tokens = {}; no response would pass",
                self.min_tokens
            )),
            _ => Ok(()),
        }?;
        if let Some(pattern) = &self.pattern
            && let Err(error) = regex::Regex::new(pattern)
        {
            return Err(invalid!("[[ppo.reward]] pattern = {pattern:?} is no regular expression: {error}"));
        }
        Ok(())
    }
}
