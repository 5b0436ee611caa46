//! Rules of the sources of a reward: what each kind needs, and which keys it reads, in a file and in what a run writes of its
//! settings. It does not depend on how a source scores. Read `rewards.rs` for the keys.

use anyhow::Result;
use serde::ser::Error as _;
use serde::{Serialize, Serializer};
use toml::{Table, Value};

use super::{Config, Origin, RewardApi, RewardInput, RewardKind, RewardPart, url};
use crate::invalid;

impl RewardPart {
    /// What a kind needs.
    pub(super) fn check(&self, origin: Origin) -> Result<()> {
        let (kind, section) = (self.kind.name(), origin.name());
        let needs = |what: &str| Err(invalid!("[[{section}.reward]] of kind = \"{kind}\" needs {what}"));
        match self.kind {
            RewardKind::Adapter if self.adapters.is_empty() => needs("adapters = [\"runs/reward/adapter\"]"),
            RewardKind::Command if self.command.iter().all(String::is_empty) => {
                needs("command = [\"program\", \"argument\"]")
            }
            RewardKind::Http | RewardKind::Judge if self.url.is_empty() => needs("url = \"http://host:port/path\""),
            RewardKind::Http => self.check_api(section),
            RewardKind::Judge if self.model.is_empty() => needs("model = \"the judging model's name\""),
            RewardKind::Judge if self.range().0 > self.range().1 => {
                let (low, high) = self.range();
                Err(invalid!("[[{section}.reward]] no score is from min_score = {low} to max_score = {high}"))
            }
            RewardKind::Regex if self.pattern.is_none() => needs("pattern = \"…\""),
            RewardKind::JsonSchema if self.schema.is_none() => needs("schema = '''{\"type\": \"object\"}'''"),
            RewardKind::Length if self.max_tokens.is_some_and(|max| max < self.min_tokens) => Err(invalid!(
                "[[{section}.reward]] max_tokens is less than min_tokens = {}; no response would pass",
                self.min_tokens
            )),
            _ => Ok(()),
        }?;
        if matches!(self.kind, RewardKind::Http | RewardKind::Judge) {
            url::check(&format!("[[{section}.reward]] url"), &self.url)?;
            self.check_request(section)?;
        }
        self.check_keys(section)?;
        self.json_schema().map_err(|error| invalid!("[[{section}.reward]] {error:#}"))?;
        if let Some(pattern) = &self.pattern
            && let Err(error) = regex::Regex::new(pattern)
        {
            return Err(invalid!("[[{section}.reward]] pattern = {pattern:?} is no regular expression: {error}"));
        }
        Ok(())
    }

    /// What an `api` needs and does not read.
    fn check_api(&self, section: &str) -> Result<()> {
        let api = serde_json::to_value(self.api)?;
        let says = |text: String| Err(invalid!("[[{section}.reward]] api = {api}: {text}"));
        if self.api == RewardApi::Fourfold {
            let keys = [
                ("model", !self.model.is_empty()),
                ("input", self.input.is_some()),
                ("template", self.template.is_some()),
                ("score_index", self.score_index.is_some()),
                ("request", !self.request.is_empty()),
            ];
            return match keys.iter().find(|(_, is_set)| *is_set) {
                Some((key, _)) => says(format!(
                    "{key} is for a reward model behind vLLM or SGLang; set api = \"classify\", \"pooling\", \"score\", \
                     \"sglang_classify\" or \"sglang_score\", or remove the key"
                )),
                None => Ok(()),
            };
        }
        if self.api.needs_input() && self.input.is_none() {
            return says(
                "it needs input = \"ids\" for a reward model with the policy's tokenizer, or input = \"text\" for one with another"
                    .into(),
            );
        }
        if self.api == RewardApi::Score && self.input == Some(RewardInput::Ids) {
            return says(
                "vLLM reads pairs as text alone; remove input, or use api = \"classify\" or \"pooling\"".into(),
            );
        }
        if self.template.is_some() && !(self.api.reads_template() && self.input == Some(RewardInput::Text)) {
            return says(
                "template gives the text of a sequence: it needs input = \"text\" and api = \"classify\", \"pooling\" or \
                 \"sglang_classify\""
                    .into(),
            );
        }
        if self.api == RewardApi::SglangScore && !self.request.contains_key("label_token_ids") {
            return says(
                "it needs request = { label_token_ids = [N] }, the token whose probability is the score".into(),
            );
        }
        Ok(())
    }

    /// Refuses keys of `request` that every request has by itself: what is asked, and of which model.
    fn check_request(&self, section: &str) -> Result<()> {
        let own: &[&str] = match (self.kind, self.api) {
            (RewardKind::Judge, _) => &["messages"],
            (_, RewardApi::Fourfold) => &[],
            (_, RewardApi::Classify | RewardApi::Pooling) => &["input"],
            (_, RewardApi::Score) => &["text_1", "text_2"],
            (_, RewardApi::SglangClassify) => &["input_ids", "text"],
            (_, RewardApi::SglangScore) => &["query", "items"],
        };
        let says = |text: String| Err(invalid!("[[{section}.reward]] request = {{ {text}"));
        if let Some(key) = own.iter().find(|key| self.request.contains_key(**key)) {
            return says(format!("{key} = … }} would replace what each request sends there itself; remove it"));
        }
        if self.request.contains_key("model") {
            return says("model = … } is what the key model is for; set that one, and remove it from request".into());
        }
        Ok(())
    }

    /// Refuses a key with another value than its default that this kind does not read.
    fn check_keys(&self, section: &str) -> Result<()> {
        let (written, usual) = (Table::try_from(self)?, Table::try_from(Self::default())?);
        let set = written.keys().filter(|key| written.get(*key) != usual.get(*key)).map(String::as_str);
        self.kind.check_keys(set, &format!("[[{section}.reward]]"))
    }
}

impl RewardKind {
    /// Whether a source of this kind reads a key.
    pub(crate) fn reads(self, key: &str) -> bool {
        ["kind", "name", "weight", "weight_end"].contains(&key) || self.keys().contains(&key)
    }

    /// Refuses a key that this kind does not read.
    fn check_keys<'k>(self, mut keys: impl Iterator<Item = &'k str>, at: &str) -> Result<()> {
        let Some(key) = keys.find(|key| !self.reads(key)) else { return Ok(()) };
        let readers: Vec<&str> =
            Self::ALL.into_iter().filter(|kind| kind.keys().contains(&key)).map(Self::name).collect();
        Err(invalid!(
            "{at} of kind = \"{}\" does not read {key}, which is for kind = {}; remove the key, or change the kind",
            self.name(),
            readers.iter().map(|kind| format!("\"{kind}\"")).collect::<Vec<_>>().join(" or ")
        ))
    }
}

/// Refuses keys of sources in a file that their kinds do not read, those with their default value, too. `table`: the file as it was
/// parsed; `config`: what was read of it.
pub(super) fn check_written(table: &Table, config: &Config) -> Result<()> {
    for section in ["ppo", "grpo", "rloo"] {
        let Some(written) = table.get(section).and_then(Value::as_table) else { continue };
        let Some(read) = config.ppo.as_ref().filter(|ppo| ppo.origin.name() == section) else { continue };
        let parts = written.get("reward").and_then(Value::as_array).into_iter().flatten();
        for (part, read) in parts.zip(&read.reward) {
            let keys = part.as_table().into_iter().flat_map(Table::keys);
            read.kind.check_keys(keys.map(String::as_str), &format!("[[{section}.reward]]"))?;
        }
        let gold = written.get("gold").and_then(Value::as_table);
        if let (Some(gold), Some(read)) = (gold, &read.gold) {
            read.kind.check_keys(gold.keys().map(String::as_str), &format!("[{section}.gold]"))?;
        }
    }
    Ok(())
}

/// The keys of a source in the order of their documentation, without those that its kind does not read: what a run writes of its
/// settings is read again.
struct Written<'p>(&'p RewardPart);

impl Serialize for Written<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let values = Table::try_from(self.0).map_err(S::Error::custom)?;
        let order = serde_json::to_value(self.0).map_err(S::Error::custom)?;
        let keys = order.as_object().into_iter().flat_map(serde_json::Map::keys).filter(|key| self.0.kind.reads(key));
        serializer.collect_map(keys.filter_map(|key| Some((key, values.get(key)?))))
    }
}

/// Writes sources, each with the keys that its kind reads.
pub(super) fn write_all<S: Serializer>(parts: &[RewardPart], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(parts.iter().map(Written))
}

/// Writes a source with the keys that its kind reads.
pub(super) fn write_one<S: Serializer>(part: &Option<RewardPart>, serializer: S) -> Result<S::Ok, S::Error> {
    part.as_ref().map(Written).serialize(serializer)
}
