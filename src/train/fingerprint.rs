//! The fingerprint of a run: its settings, and digests of everything that it read. A resumed run must have the same.
//!
//! It does not depend on a stage. Read `store.rs` next.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use toml::{Table, Value};

use crate::config::{Config, RewardKind};
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
    "base.dequantise",
    "reward_base.device",
    "reward_base.offload",
    "reward_base.dequantise",
    "teacher.path",
    "teacher.device",
    "teacher.offload",
    "teacher.dequantise",
    "data.path",
    "data.sources.path",
    "*.adapter",
    "*.teacher_adapter",
    "*.reward_adapter",
    "*.logging_steps",
    "*.save_samples",
    "*.checkpoint",
    "*.eval_steps",
    "*.per_device_eval_batch_size",
    "*.rollout.urls",
    "*.rollout.server",
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

/// Those of a source of the reward, `[[ppo.reward]]` and `[ppo.gold]`: where it is, what it costs, how long it is waited for, and
/// what a response counts that it gave no score, which is the way on where it fails.
const HARMLESS_OF_A_SOURCE: &[&str] = &[
    "name",
    "url",
    "api_key_env",
    "concurrency",
    "input_price",
    "output_price",
    "timeout_seconds",
    "retries",
    "fallback_score",
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
        let table =
            |text: &str| -> Result<Value> { Ok(Value::Table(text.parse().context("the config in the checkpoint")?)) };
        let (now, mut was) = (table(&self.config)?, table(&then.config)?);
        leave_out_unread(&self.stage, &mut was);
        let mut all = BTreeMap::new();
        differences("", Some(&was), Some(&now), &mut all);
        let mut changes = Changes::default();
        for (key, line) in all {
            match moved_to_the_cpu(&key, &was, &now) || is_harmless(&key) {
                true => changes.harmless.push(line),
                false => changes.mathematics.push(line),
            }
        }
        Ok(changes)
    }
}

/// Leaves out what earlier versions wrote of a run's settings although nothing reads it: keys of a source of the reward that are
/// for another kind, and checkpoints of other stages.
fn leave_out_unread(stage: &str, config: &mut Value) {
    let Some(config) = config.as_table_mut() else { return };
    let has_rollouts = ["ppo", "grpo", "rloo"].contains(&stage);
    if stage != "distill" {
        config.remove("teacher");
    }
    if stage != "reward" && !has_rollouts {
        config.remove("reward_base");
    }
    let Some(section) = config.get_mut(stage).filter(|_| has_rollouts).and_then(Value::as_table_mut) else { return };
    for (_, value) in section.iter_mut().filter(|(key, _)| ["reward", "gold"].contains(&key.as_str())) {
        let sources = match value {
            Value::Array(all) => all.iter_mut().filter_map(Value::as_table_mut).collect(),
            one => Vec::from_iter(one.as_table_mut()),
        };
        for source in sources {
            let kind = source.get("kind").cloned().and_then(|kind| kind.try_into::<RewardKind>().ok());
            source.retain(|key, _| kind.is_none_or(|kind| kind.reads(key)));
        }
    }
}

/// Whether a type of products changed because the base moved: the CPU has none in f16, so that a run which moves there computes in
/// the nearest type above it.
fn moved_to_the_cpu(key: &str, was: &Value, now: &Value) -> bool {
    let Some(section) = key.strip_suffix(".compute_dtype") else { return false };
    let is = |of: &Value, key: &str, value: &str| {
        of.get(section).and_then(|of| of.get(key)).and_then(Value::as_str) == Some(value)
    };
    is(now, "device", "cpu") && is(was, "compute_dtype", "f16") && is(now, "compute_dtype", "f32")
}

/// The lines of the keys that differ, by key: tables key by key, and arrays of tables entry by entry, as
/// `ppo.reward[0].score_index: 1 -> 0`. An entry that one side lacks is a line as a whole.
fn differences(at: &str, was: Option<&Value>, now: Option<&Value>, into: &mut BTreeMap<String, String>) {
    if was == now {
        return;
    }
    let is_table = |of: Option<&Value>| of.is_none_or(Value::is_table);
    if is_table(was) && is_table(now) {
        let keys = [was, now].into_iter().flatten().filter_map(Value::as_table).flat_map(Table::keys);
        for key in keys.collect::<BTreeSet<_>>() {
            let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
            differences(&path, was.and_then(|of| of.get(key)), now.and_then(|of| of.get(key)), into);
        }
        return;
    }
    let text = |value: Option<&Value>| value.map_or_else(|| "unset".to_owned(), Value::to_string);
    if let (Some(was), Some(now)) = (entries(was), entries(now))
        && was.len() + now.len() > 0
    {
        for i in 0..was.len().max(now.len()) {
            let path = format!("{at}[{i}]");
            match (was.get(i), now.get(i)) {
                (Some(was), Some(now)) => differences(&path, Some(was), Some(now), into),
                (was, now) => {
                    into.insert(path.clone(), format!("{path}: {} -> {}", text(was), text(now)));
                }
            }
        }
        return;
    }
    into.insert(at.into(), format!("{at}: {} -> {}", text(was), text(now)));
}

/// An array of tables, where nothing is an empty one.
fn entries(of: Option<&Value>) -> Option<&[Value]> {
    let Some(of) = of else { return Some(&[]) };
    of.as_array().map(Vec::as_slice).filter(|all| all.iter().all(Value::is_table))
}

/// The keys of a TOML table by their paths, each with its value as TOML writes it.
pub fn flatten(at: &str, value: &Value, into: &mut BTreeMap<String, String>) {
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
    let key = without_numbers(key);
    let key = key.as_str();
    let tail = key.split_once('.').map_or("", |(_, tail)| tail);
    let head = key.split_once('.').map_or(key, |(head, _)| head);
    let of_source = tail.strip_prefix("reward.").or_else(|| tail.strip_prefix("gold."));
    if of_source.is_some_and(|key| HARMLESS_OF_A_SOURCE.contains(&key)) {
        return true;
    }
    HARMLESS.iter().any(|pattern| match (pattern.strip_prefix("*."), pattern.strip_suffix(".*")) {
        (Some(end), _) => tail == end,
        (_, Some(start)) => head == start,
        _ => key == *pattern,
    })
}

/// A key with the numbers of entries left out: `ppo.reward.url` for `ppo.reward[0].url`. A whole entry keeps its own, as no pattern
/// of a key is meant for it.
fn without_numbers(key: &str) -> String {
    let part = |part: &str| match part.split_once('[') {
        Some((name, _)) => name.to_owned(),
        None => part.to_owned(),
    };
    if key.ends_with(']') { key.into() } else { key.split('.').map(part).collect::<Vec<_>>().join(".") }
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
            ["checkpoint.save_steps: unset -> 3", "output_dir: \"a\" -> unset", "sft.logging_steps: 1 -> 5"]
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
    fn sources_of_the_reward_are_compared_entry_by_entry_and_key_by_key() {
        let source = |more: &str| format!("[[grpo.reward]]\nkind = \"http\"\nweight = 1.0\n{more}\n");
        let regex = "[[grpo.reward]]\nkind = \"regex\"\npattern = \"a\"\n";
        let changes = |was: &str, now: &str| {
            let changes = origin(now).changes(&origin(was)).unwrap();
            (changes.mathematics, changes.harmless)
        };
        let lines = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
        let was = source("score_index = 1\nretries = 0\nurl = \"http://a\"\n[grpo.reward.request]\nseed = 1") + regex;
        // Where it is and how long it is waited for.
        let moved = was.replace("retries = 0", "retries = 1").replace("http://a", "http://b");
        let moved = moved.replacen("weight = 1.0", "weight = 1.0\nfallback_score = 0.0", 1);
        let want = [
            "grpo.reward[0].fallback_score: unset -> 0.0",
            "grpo.reward[0].retries: 0 -> 1",
            "grpo.reward[0].url: \"http://a\" -> \"http://b\"",
        ];
        assert_eq!(changes(&was, &moved), (vec![], lines(&want)));
        // What it is asked, and what is read of its reply.
        let other = was.replace("score_index = 1", "score_index = 0").replace("seed = 1", "seed = 2");
        let want = ["grpo.reward[0].request.seed: 1 -> 2", "grpo.reward[0].score_index: 1 -> 0"];
        assert_eq!(changes(&was, &other), (lines(&want), vec![]));
        let other = was.replace("pattern = \"a\"", "pattern = \"b\"");
        assert_eq!(changes(&was, &other).0, ["grpo.reward[1].pattern: \"a\" -> \"b\""]);
        // A whole entry, of one or of all.
        let added = "grpo.reward[1]: unset -> { kind = \"regex\", pattern = \"a\" }";
        assert_eq!(changes(&source(""), &(source("") + regex)), (lines(&[added]), vec![]));
        let removed = "grpo.reward[0]: { kind = \"regex\", pattern = \"a\" } -> unset";
        for without in ["", "[grpo]\nreward = []\n"] {
            assert_eq!(changes(regex, without), (lines(&[removed]), vec![]), "{without}");
        }
        // A table alone, and the stage that has the same name.
        let gold = |text: &str| format!("[ppo.gold]\n{text}\n[reward]\nseed = 1\n");
        let (mathematics, harmless) =
            changes(&gold("retries = 1\ncolumn = \"a\""), &gold("retries = 2\ncolumn = \"b\""));
        assert_eq!(
            (&mathematics[..], &harmless[..]),
            (&["ppo.gold.column: \"a\" -> \"b\"".to_owned()][..], &["ppo.gold.retries: 1 -> 2".to_owned()][..])
        );
        let sources = |path: &str, weight: &str| format!("[[data.sources]]\npath = {path:?}\nweight = {weight}\n");
        let (mathematics, harmless) = changes(&sources("a", "1.0"), &sources("b", "2.0"));
        assert_eq!(mathematics, ["data.sources[0].weight: 1.0 -> 2.0"]);
        assert_eq!(harmless, ["data.sources[0].path: \"a\" -> \"b\""]);
    }

    #[test]
    fn what_earlier_versions_wrote_and_nothing_reads_is_no_change() {
        let of = |stage: &str, config: &str| RunFingerprint { stage: stage.into(), ..origin(config) };
        let teacher = "[teacher]\npath = \"t\"\nquantize = \"q8_0\"\n";
        let sources = |more: &str| {
            format!(
                "[[grpo.reward]]\nkind = \"length\"\nmin_tokens = 1\n{more}[grpo.gold]\nkind = \"math\"\nweight = 1.0\n{more}"
            )
        };
        let then = of("grpo", &(sources("adapters = []\nretries = 3\nurl = \"\"\n") + teacher));
        assert_eq!(of("grpo", &sources("")).changes(&then).unwrap(), Changes::default());
        let other = sources("").replace("min_tokens = 1", "min_tokens = 2");
        let changes = of("grpo", &other).changes(&then).unwrap();
        assert_eq!(changes.mathematics, ["grpo.reward[0].min_tokens: 1 -> 2"]);
        let then = of("sft", &teacher.replace("teacher", "reward_base"));
        assert_eq!(of("sft", "").changes(&then).unwrap(), Changes::default());
        assert_eq!(of("distill", "").changes(&of("distill", teacher)).unwrap().mathematics.len(), 1, "it was read");
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
