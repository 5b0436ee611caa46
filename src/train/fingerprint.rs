//! The fingerprint of a run: its settings, and digests of everything that it read. A resumed run must have the same.
//!
//! It does not depend on a stage. Read `store.rs` next.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::config::Config;
use crate::data::examples::{Example, Examples};
use crate::invalid;
use crate::model::adapter::Adapter;
use crate::ops::cpu;
use crate::tokenizer::Tokenizer;

/// Keys that do not change the training: what is written how often, where to, on which machine, and how much memory it
/// takes. A base's
/// path is among them because its fingerprint is compared, and so are the paths of data and adapters.
const HARMLESS: &[&str] = &[
    "output_dir",
    "report_to",
    "base.path",
    "reward_base.path",
    "base.device",
    "base.offload",
    "reward_base.device",
    "reward_base.offload",
    "teacher.path",
    "teacher.device",
    "teacher.offload",
    "data.path",
    "*.adapter",
    "*.teacher_adapter",
    "*.reward_adapter",
    "*.logging_steps",
    "*.save_samples",
    "*.checkpoint",
    "*.eval_steps",
    "*.rollout.urls",
    "*.rollout.api_key_env",
    "*.rollout.adapter_dir",
    "*.rollout.server_adapter_dir",
    "*.rollout.max_mismatch",
    "*.rollout.concurrency",
    "*.rollout.timeout_seconds",
    "*.rollout.retries",
    "checkpoint.*",
    "memory.*",
];

/// A run's settings and digests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFingerprint {
    /// The stage's name.
    pub stage: String,
    /// The resolved config.
    pub config: String,
    /// What was read, by what it is for the user: `base`, `tokenizer`, `data`.
    pub digests: BTreeMap<String, String>,
}

/// Settings that differ between two runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Lines such as `ppo.kl_coef: 0.05 -> 0.1`, of keys that change the mathematics.
    pub mathematics: Vec<String>,
    /// Of keys that do not.
    pub harmless: Vec<String>,
}

impl RunFingerprint {
    /// Of a stage; digests are added.
    ///
    /// # Errors
    /// If the config has no form in TOML.
    pub fn new(stage: &str, config: &Config) -> Result<Self> {
        Ok(Self { stage: stage.into(), config: config.to_toml()?, digests: BTreeMap::new() })
    }

    /// Adds a digest.
    pub fn add(&mut self, of: &str, digest: String) {
        self.digests.insert(of.into(), digest);
    }

    /// Refuses to resume with other inputs than `then`'s, naming what differs.
    ///
    /// # Errors
    /// If a digest differs or one side has none.
    pub fn check_inputs(&self, then: &RunFingerprint) -> Result<()> {
        let names = self.digests.keys().chain(then.digests.keys().filter(|k| !self.digests.contains_key(*k)));
        let none = String::from("none");
        let differing: Vec<String> = names
            .filter_map(|name| {
                let (now, was) = (self.digests.get(name), then.digests.get(name));
                let text = |d: Option<&String>| d.unwrap_or(&none).clone();
                (now != was).then(|| format!("{name} was {}, now {}", text(was), text(now)))
            })
            .collect();
        if differing.is_empty() {
            return Ok(());
        }
        Err(invalid!(
            "this run cannot be resumed on other inputs: {}; give those it began with, or start anew in another folder",
            differing.join("; ")
        ))
    }

    /// The settings that differ from `then`'s.
    ///
    /// # Errors
    /// If the former config cannot be read.
    pub fn changes(&self, then: &RunFingerprint) -> Result<Changes> {
        let keys = |text: &str| -> Result<BTreeMap<String, String>> {
            let table: toml::Table = text.parse().context("the config in the checkpoint")?;
            let mut flat = BTreeMap::new();
            flatten("", &toml::Value::Table(table), &mut flat);
            Ok(flat)
        };
        let (now, was) = (keys(&self.config)?, keys(&then.config)?);
        let mut changes = Changes::default();
        let all = now.keys().chain(was.keys().filter(|k| !now.contains_key(*k)));
        for key in all.filter(|key| now.get(*key) != was.get(*key)) {
            let unset = String::from("unset");
            let line = format!("{key}: {} -> {}", was.get(key).unwrap_or(&unset), now.get(key).unwrap_or(&unset));
            // The CPU has no products in f16, so that a run which moves there computes in the nearest type above it.
            let is = |of: &BTreeMap<String, String>, key: &str, value: &str| of.get(key).is_some_and(|v| v == value);
            let moved = key.strip_suffix("compute_dtype").is_some_and(|section| {
                is(&now, &format!("{section}device"), "\"cpu\"") && is(&was, key, "\"f16\"") && is(&now, key, "\"f32\"")
            });
            match moved || is_harmless(key) {
                true => changes.harmless.push(line),
                false => changes.mathematics.push(line),
            }
        }
        Ok(changes)
    }
}

/// The keys of a TOML table by their paths, each with its value as TOML writes it.
pub fn flatten(at: &str, value: &toml::Value, into: &mut BTreeMap<String, String>) {
    match value.as_table() {
        Some(table) => {
            for (key, value) in table {
                let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                flatten(&path, value, into);
            }
        }
        None => {
            into.insert(at.into(), value.to_string());
        }
    }
}

fn is_harmless(key: &str) -> bool {
    let tail = key.split_once('.').map_or("", |(_, tail)| tail);
    let head = key.split_once('.').map_or(key, |(head, _)| head);
    HARMLESS.iter().any(|pattern| match (pattern.strip_prefix("*."), pattern.strip_suffix(".*")) {
        (Some(end), _) => tail == end,
        (_, Some(start)) => head == start,
        _ => key == *pattern,
    })
}

/// A digest of what every token id means.
pub fn digest_of_tokenizer(tokenizer: &Tokenizer, vocabulary: usize) -> String {
    let mut hash = Sha256::new();
    for id in 0..vocabulary as u32 {
        let token = tokenizer.token(id).unwrap_or_default();
        hash.update((token.len() as u64).to_le_bytes());
        hash.update(token);
    }
    format!("{vocabulary} tokens, sha256:{:.16}", format!("{:x}", hash.finalize()))
}

/// A digest of examples, each as numbers.
///
/// # Errors
/// If one cannot be read.
pub fn digest_of_examples<T: Example>(examples: &(impl Examples<T> + ?Sized)) -> Result<String> {
    let mut hash = Sha256::new();
    for index in 0..examples.len() {
        examples.get(index)?.numbers(&mut |numbers| {
            hash.update((numbers.len() as u64).to_le_bytes());
            numbers.iter().for_each(|n| hash.update(n.to_le_bytes()));
        });
    }
    Ok(format!("{} examples, sha256:{:.16}", examples.len(), format!("{:x}", hash.finalize())))
}

/// A digest of texts, each of which may be absent.
pub fn digest_of_texts<'t>(texts: impl IntoIterator<Item = Option<&'t str>>) -> String {
    let mut hash = Sha256::new();
    for text in texts {
        // No text is this long, so an absent text differs from an empty one.
        hash.update(text.map_or(u64::MAX, |text| text.len() as u64).to_le_bytes());
        hash.update(text.unwrap_or_default());
    }
    format!("sha256:{:.16}", format!("{:x}", hash.finalize()))
}

/// A digest of an adapter's numbers.
///
/// # Errors
/// Only if a tensor cannot be read.
pub fn digest_of_adapter(adapter: &Adapter) -> Result<String> {
    let mut hash = Sha256::new();
    for (name, tensor) in adapter.named_tensors() {
        hash.update(name);
        let values = tensor.contiguous()?;
        cpu::view(&values)?.iter().for_each(|x| hash.update(x.to_le_bytes()));
    }
    hash.update(adapter.head().map_or(0.0, |head| head.bias).to_le_bytes());
    Ok(format!("sha256:{:.16}", format!("{:x}", hash.finalize())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(config: &str) -> RunFingerprint {
        RunFingerprint { stage: "sft".into(), config: config.into(), digests: BTreeMap::new() }
    }

    #[test]
    fn changed_keys_are_sorted_by_whether_they_change_the_mathematics() {
        let then = origin("seed = 1\noutput_dir = \"a\"\n[sft]\nlearning_rate = 0.1\nlogging_steps = 1\n");
        let now = origin("seed = 1\n[sft]\nlearning_rate = 0.2\nlogging_steps = 5\n[checkpoint]\nsave_steps = 3\n");
        let changes = now.changes(&then).unwrap();
        assert_eq!(changes.mathematics, ["sft.learning_rate: 0.1 -> 0.2"]);
        assert_eq!(
            changes.harmless,
            ["checkpoint.save_steps: unset -> 3", "sft.logging_steps: 1 -> 5", "output_dir: \"a\" -> unset"]
        );
        assert_eq!(now.changes(&now).unwrap(), Changes::default());
        let on =
            |device: &str, dtype: &str| origin(&format!("[base]\ndevice = {device:?}\ncompute_dtype = {dtype:?}\n"));
        let mathematics = |now: RunFingerprint, then| now.changes(&then).unwrap().mathematics.len();
        assert_eq!(mathematics(on("cpu", "f32"), on("cuda:0", "f16")), 0);
        assert_eq!(mathematics(on("cpu", "f32"), on("cuda:0", "bf16")), 1);
        assert_eq!(mathematics(on("cuda:0", "f16"), on("cpu", "f32")), 1);
    }

    #[test]
    fn other_inputs_are_refused_by_name() {
        let (mut then, mut now) = (origin(""), origin(""));
        then.add("base", "A".into());
        now.add("base", "A".into());
        now.check_inputs(&then).unwrap();
        now.add("base", "B".into());
        now.add("reward base", "C".into());
        let message = now.check_inputs(&then).unwrap_err().to_string();
        assert!(message.contains("base was A, now B") && message.contains("reward base was none, now C"), "{message}");
    }

    #[test]
    fn a_digest_of_texts_depends_on_absence_and_on_boundaries() {
        let all = [
            digest_of_texts([Some("ab"), Some("c")]),
            digest_of_texts([Some("a"), Some("bc")]),
            digest_of_texts([Some(""), Some("abc")]),
            digest_of_texts([None, Some("abc")]),
        ];
        assert!((0..4).all(|i| (0..i).all(|j| all[i] != all[j])), "{all:?}");
        assert_eq!(all[0], digest_of_texts([Some("ab"), Some("c")]));
    }

    #[test]
    fn a_digest_of_examples_sees_where_one_ends_and_the_next_begins() {
        let digest = |all: &[Vec<u32>]| digest_of_examples(all).unwrap();
        assert_ne!(digest(&[vec![1, 2], vec![3]]), digest(&[vec![1], vec![2, 3]]));
        assert_eq!(digest(&[vec![1, 2], vec![3]]), digest(&[vec![1, 2], vec![3]]));
    }
}
