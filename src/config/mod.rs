//! The configuration: one TOML file per experiment, read into a checked [`Config`].
//!
//! The file is parsed, `--set` changes are written into it, it is read into structs that refuse unknown keys, `~` and
//! `$VAR` in paths are expanded, and the ranges are checked. Relative paths are relative to the current directory. It
//! does not depend on a model or data: no file that a path names is opened. The keys are documented on the structs:
//! read `schema.rs`, `stages.rs` and `ppo.rs` next.

mod checkpoint;
mod describe;
mod distill;
mod dpo;
mod dschat;
mod ensembles;
mod expand;
mod group;
mod idle;
pub mod json_schema;
mod keys;
mod located;
mod memory;
mod optimisation;
mod overrides;
mod paths;
mod ppo;
mod ppo_rules;
mod ptx;
mod ranges;
mod report_to;
mod reward_rules;
mod rewards;
mod rollout;
mod run_folder;
mod schema;
mod sources;
mod stage;
mod stages;
mod synonyms;
mod trl;
mod unknown;
mod url;
mod validate;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::invalid;
pub(crate) use located::from_value;
use unknown::Written;

pub use checkpoint::{CheckpointConfig, Guard};
pub use describe::{key_path, known_keys};
pub use distill::Distill;
pub use dpo::{Dpo, DpoLoss, Kto};
pub use ensembles::REWARD_ADAPTER;
pub(crate) use group::GroupKeys;
pub use group::{GroupLoss, Grpo, Rloo};
pub use keys::{Key, keys, keys_of_section};
pub use memory::{ByteSize, Memory};
pub use optimisation::{Optimisation, Optimised, Supervised, SupervisedKeys};
pub use paths::Paths;
pub use ppo::{
    AdvantageEstimator, Aggregation, CriticStart, ImportanceSamplingCorrection, ImportanceSamplingLevel, KlEstimator,
    KlIn, LossType, Origin, PolicyLoss, Ppo, ScaleRewards, WhitenRewards,
};
pub use ptx::Ptx;
pub use report_to::ReportTo;
pub use rewards::{ANSWER, ColumnsRead, EnsembleScore, RewardApi, RewardInput, RewardKind, RewardPart};
pub use rollout::{Engine, LogprobsMode, RolloutEngine};
pub use run_folder::{RESOLVED, RUN_FILES, is_run, mark};
pub use schema::{
    Base, COMPUTE_DTYPE_ON_CARDS, Compat, ComputeDtype, Data, Dequantising, DeviceChoice, EvalSize, Format, Given,
    InitLoraWeights, KvCacheType, Lora, MultiTurn, Offload, OnBadRecord, Quantize, TargetModules, Template, Truncation,
};
pub use sources::{ColumnNames, MixStrategy, Preset, Source, Tags};
pub use stage::Stage;
pub use stages::{LrScheduler, MOST_MEMBERS, RecomputeSetting, Reward, RewardLoss, Sft};

/// A whole file. Sections of stages that do not run may be absent.
#[derive(Clone, Debug, PartialEq, Deserialize, JsonSchema, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Seed of every random number: initial adapters, shuffles, sampling. Default 0.
    #[serde(default)]
    pub seed: u64,
    /// `"dschat"`: DeepSpeed-Chat's behaviour in every section that can have it, its LoRA (scale 1/r, its first
    /// factors) and its values for the keys that the file leaves open. Absent = none; a section's own `compat` is for
    /// that section.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compat: Option<Compat>,
    /// Folder a run writes to. Default `runs/<stage>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_dir: Option<PathBuf>,
    /// Which files of another program a run writes beside its own. Default `tensorboard` (transformers: every program
    /// that is installed).
    #[serde(default)]
    pub report_to: ReportTo,
    /// The policy's frozen checkpoint. Required.
    pub base: Base,
    /// The reward model's and the critic's frozen checkpoint; absent = the policy's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_base: Option<Base>,
    /// The teacher's frozen checkpoint, for `[distill]`; absent = the policy's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<Base>,
    /// The shape of new adapters.
    #[serde(default)]
    pub lora: Lora,
    /// When the state of a run is saved.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// What is done about steps that go wrong.
    #[serde(default)]
    pub guard: Guard,
    /// How much memory a run may take.
    #[serde(default)]
    pub memory: Memory,
    /// The records; read it with [`Config::data`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Data>,
    /// Supervised fine-tuning; read it with [`Config::sft`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sft: Option<Sft>,
    /// Reward modelling; read it with [`Config::reward`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward: Option<Reward>,
    /// Direct preference optimisation; read it with [`Config::dpo`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dpo: Option<Dpo>,
    /// Kahneman-Tversky optimisation; read it with [`Config::kto`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kto: Option<Kto>,
    /// On-policy distillation; read it with [`Config::distill`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<Distill>,
    /// PPO; read it with [`Config::ppo`]. The settings made from `[grpo]` or `[rloo]`, where the file has one of those.
    #[serde(default, skip_serializing_if = "is_made")]
    pub ppo: Option<Ppo>,
    /// Group relative policy optimisation; read it with [`Config::ppo`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpo: Option<Grpo>,
    /// REINFORCE with the other responses as the baseline; read it with [`Config::ppo`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rloo: Option<Rloo>,
}

/// Whether there are no settings of PPO's loop, or such as another section holds.
fn is_made(ppo: &Option<Ppo>) -> bool {
    ppo.as_ref().is_none_or(|ppo| ppo.origin != Origin::Ppo)
}

impl Config {
    /// The folder a stage writes to.
    pub fn output_dir(&self, stage: Stage) -> PathBuf {
        self.output_dir.clone().unwrap_or_else(|| Path::new("runs").join(stage.name()))
    }

    /// The reward model's checkpoint: `[reward_base]`, or the policy's.
    pub fn reward_base(&self) -> &Base {
        self.reward_base.as_ref().unwrap_or(&self.base)
    }

    /// The teacher's checkpoint: `[teacher]`, or the policy's.
    pub fn teacher(&self) -> &Base {
        self.teacher.as_ref().unwrap_or(&self.base)
    }

    /// The checkpoint that a stage reads beside the one that it trains over; the same one where it has none of its own.
    pub fn second_base(&self, stage: Stage) -> &Base {
        if stage == Stage::Distill { self.teacher() } else { self.reward_base() }
    }

    /// All bases on one device, as `--device` says.
    #[must_use]
    pub fn on(mut self, device: Option<DeviceChoice>) -> Self {
        if device.is_some() {
            self.base.device = device;
            self.reward_base.iter_mut().chain(&mut self.teacher).for_each(|base| base.device = device);
        }
        self
    }

    /// `[data]`.
    ///
    /// # Errors
    /// The section is absent.
    pub fn data(&self) -> Result<&Data> {
        let missing = || invalid!("the section [data] is missing; add it with path = \"…\", or --set data.path=…");
        self.data.as_ref().ok_or_else(missing)
    }

    /// `[sft]`, or its defaults.
    pub fn sft(&self) -> Sft {
        self.sft.clone().unwrap_or_default()
    }

    /// `[reward]`, or its defaults.
    pub fn reward(&self) -> Reward {
        self.reward.clone().unwrap_or_default()
    }

    /// `[dpo]`, or its defaults.
    pub fn dpo(&self) -> Dpo {
        self.dpo.clone().unwrap_or_default()
    }

    /// `[kto]`, or its defaults.
    pub fn kto(&self) -> Kto {
        self.kto.clone().unwrap_or_default()
    }

    /// `[distill]`, or its defaults.
    pub fn distill(&self) -> Distill {
        self.distill.clone().unwrap_or_default()
    }

    /// The settings of PPO's loop: `[ppo]`, or what `[grpo]` or `[rloo]` mean.
    ///
    /// # Errors
    /// The section is absent.
    pub fn ppo(&self) -> Result<&Ppo> {
        self.ppo.as_ref().ok_or_else(|| missing(Stage::Ppo))
    }

    /// The settings of PPO's loop for one of the stages that it runs, from that stage's own section.
    ///
    /// # Errors
    /// The section is absent, or the file has the one of another of these stages.
    pub fn rollouts(&self, stage: Stage) -> Result<&Ppo> {
        match &self.ppo {
            Some(ppo) if ppo.origin.stage() == stage => Ok(ppo),
            Some(ppo) => Err(invalid!(
                "the section [{}] is missing, and the file has [{}]: run `fourfold {1}`",
                stage.name(),
                ppo.origin.name()
            )),
            None => Err(missing(stage)),
        }
    }

    /// These settings as those of all ranks together: `per_device_train_batch_size` of `[grpo]` and `[rloo]` is per rank, so
    /// that an optimizer step and a rollout have as many passes more, which the ranks share. `batch_size` of `[ppo]` is that of all
    /// already.
    #[must_use]
    pub fn of_ranks(&self, stage: Stage, ranks: usize) -> Self {
        let mut all = self.clone();
        if ranks > 1 {
            all.change_group(stage, |keys| keys.set_ranks(ranks));
        }
        all
    }

    /// `[grpo]` or `[rloo]`, whichever the stage has.
    pub(crate) fn group_mut(&mut self, stage: Stage) -> Option<&mut dyn GroupKeys> {
        match stage {
            Stage::Grpo => self.grpo.as_mut().map(|section| section as &mut dyn GroupKeys),
            Stage::Rloo => self.rloo.as_mut().map(|section| section as &mut dyn GroupKeys),
            _ => None,
        }
    }

    /// Changes `[grpo]` or `[rloo]`, and with it the settings of PPO's loop; `None` for other stages.
    pub(crate) fn change_group<T>(&mut self, stage: Stage, change: impl FnOnce(&mut dyn GroupKeys) -> T) -> Option<T> {
        let changed = self.group_mut(stage).map(change);
        group::translate(self);
        changed
    }

    /// The optimisation keys of a stage's section, or their defaults; `None` for PPO without `[ppo]`, which has no
    /// defaults.
    pub fn optimisation(&self, stage: Stage) -> Option<Optimisation> {
        self.supervised(stage).map(|keys| keys.optimisation).or_else(|| self.ppo.as_ref().map(Ppo::optimisation))
    }

    /// The keys of a supervised stage's section, or their defaults; `None` for PPO.
    pub fn supervised(&self, stage: Stage) -> Option<SupervisedKeys> {
        match stage {
            Stage::Sft => Some(self.sft().supervised()),
            Stage::Reward => Some(self.reward().supervised()),
            Stage::Dpo => Some(self.dpo().supervised()),
            Stage::Kto => Some(self.kto().supervised()),
            Stage::Distill => Some(self.distill().supervised()),
            Stage::Ppo | Stage::Grpo | Stage::Rloo => None,
        }
    }

    /// A supervised stage's section, made with its defaults where it is absent; `None` for PPO.
    pub fn supervised_mut(&mut self, stage: Stage) -> Option<&mut dyn Supervised> {
        match stage {
            Stage::Sft => Some(self.sft.get_or_insert_default()),
            Stage::Reward => Some(self.reward.get_or_insert_default()),
            Stage::Dpo => Some(self.dpo.get_or_insert_default()),
            Stage::Kto => Some(self.kto.get_or_insert_default()),
            Stage::Distill => Some(self.distill.get_or_insert_default()),
            Stage::Ppo | Stage::Grpo | Stage::Rloo => None,
        }
    }

    /// `checkpoint` of a stage's section; the default without one.
    pub fn checkpoint(&self, stage: Stage) -> RecomputeSetting {
        self.optimisation(stage).map(|keys| keys.checkpoint).unwrap_or_default()
    }

    /// Sets `checkpoint` in a stage's section.
    pub fn set_checkpoint(&mut self, stage: Stage, checkpoint: RecomputeSetting) {
        if self.change_group(stage, |section| section.set_recompute(checkpoint)).is_some() {
            return;
        }
        match self.supervised_mut(stage) {
            Some(section) => section.set_checkpoint(checkpoint),
            None => self.ppo.iter_mut().for_each(|ppo| ppo.set_checkpoint(checkpoint)),
        }
    }

    /// The resolved config as TOML, every default written out; `load` reads it back to an equal config.
    ///
    /// # Errors
    /// A number TOML cannot hold.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).context("writing the resolved config as TOML")
    }

    /// The paths that a run of `stage` reads, each with the key that names it.
    pub(crate) fn inputs(&self, stage: Stage) -> Vec<(String, PathBuf)> {
        let written = ["output_dir", " cache_dir", " adapter_dir"];
        let is_read = |key: &str| {
            let section = key.trim_start_matches('[').split([']', '.']).next();
            let is_own =
                ["base", "reward_base", "teacher", "data", stage.name()].iter().any(|own| section == Some(own));
            is_own && !written.iter().any(|name| key.ends_with(name))
        };
        let mut own = self.clone();
        own.paths_mut().into_iter().filter(|(key, _)| is_read(key)).map(|(key, path)| (key, path.clone())).collect()
    }

    /// Every path of the config and the key that names it.
    fn paths_mut(&mut self) -> Vec<(String, &mut PathBuf)> {
        let mut paths: Vec<(&str, &mut PathBuf)> = vec![("[base] path", &mut self.base.path)];
        paths.extend(self.output_dir.as_mut().map(|path| ("output_dir", path)));
        paths.extend(self.reward_base.as_mut().map(|base| ("[reward_base] path", &mut base.path)));
        paths.extend(self.teacher.as_mut().map(|base| ("[teacher] path", &mut base.path)));
        if let Some(data) = &mut self.data {
            paths.extend(data.path.as_mut_slice().iter_mut().map(|path| ("[data] path", path)));
            paths.extend(data.cache_dir.as_mut().map(|path| ("[data] cache_dir", path)));
            for source in &mut data.sources {
                paths.extend(source.path.as_mut_slice().iter_mut().map(|path| ("[[data.sources]] path", path)));
            }
        }
        paths.extend(self.sft.as_mut().and_then(|sft| sft.adapter.as_mut()).map(|path| ("[sft] adapter", path)));
        paths.extend(self.reward.as_mut().and_then(|rm| rm.adapter.as_mut()).map(|path| ("[reward] adapter", path)));
        paths.extend(self.dpo.as_mut().and_then(|dpo| dpo.adapter.as_mut()).map(|path| ("[dpo] adapter", path)));
        paths.extend(self.kto.as_mut().and_then(|kto| kto.adapter.as_mut()).map(|path| ("[kto] adapter", path)));
        if let Some(distill) = &mut self.distill {
            paths.extend(distill.adapter.as_mut().map(|path| ("[distill] adapter", path)));
            paths.extend(distill.teacher_adapter.as_mut().map(|path| ("[distill] teacher_adapter", path)));
        }
        if let Some(ppo) = &mut self.ppo {
            paths.extend(ppo.adapter.as_mut().map(|path| ("[ppo] adapter", path)));
            let main = ppo.reward_adapter.as_mut_slice();
            paths.extend(main.iter_mut().map(|path| ("[ppo] reward_adapter", path)));
            let parts = ppo.reward.iter_mut().chain(&mut ppo.gold);
            paths.extend(parts.flat_map(|part| &mut part.adapters).map(|path| ("[[ppo.reward]] adapters", path)));
            let texts = ppo.ptx.iter_mut().flat_map(|ptx| ptx.path.as_mut_slice());
            paths.extend(texts.map(|path| ("[ppo.ptx] path", path)));
            let folder = ppo.rollout.as_mut().and_then(|rollout| rollout.adapter_dir.as_mut());
            paths.extend(folder.map(|path| ("[ppo.rollout] adapter_dir", path)));
        }
        let mut paths: Vec<(String, &mut PathBuf)> =
            paths.into_iter().map(|(key, path)| (key.to_owned(), path)).collect();
        if let Some(grpo) = &mut self.grpo {
            paths.extend(grpo.paths().into_iter().map(|(key, path)| (format!("[grpo] {key}"), path)));
        }
        if let Some(rloo) = &mut self.rloo {
            paths.extend(rloo.paths().into_iter().map(|(key, path)| (format!("[rloo] {key}"), path)));
        }
        paths
    }

    /// Expands `~` and `$VAR` in every path.
    fn expand_paths(&mut self) -> Result<()> {
        for (key, path) in self.paths_mut() {
            if let Some(text) = path.to_str() {
                let expanded = expand::expand(text, |name| std::env::var(name).ok());
                *path = expanded.map_err(|error| invalid!("{key}: {error}"))?.into();
            }
        }
        Ok(())
    }
}

/// Reads a config file and the `--set section.key=value` changes to it.
///
/// # Errors
/// An unreadable file, bad TOML, an unknown key or value, a wrong type, an unset variable in a path, a value out of
/// range. Every message names the file (or the `--set`) and the key.
pub fn load(path: &Path, set: &[String]) -> Result<Config> {
    let file = path.display();
    let endings = ["gguf", "safetensors", "bin"];
    if path.join("config.json").exists() || path.extension().is_some_and(|e| endings.iter().any(|known| e == *known)) {
        return Err(invalid!("{file} is a model, not a config; give a TOML file with [base] path = \"{file}\""));
    }
    match path.extension().and_then(|ending| ending.to_str()).filter(|_| path.is_file()) {
        Some("jsonl" | "parquet" | "csv" | "tsv") => {
            return Err(invalid!(
                "{file} holds records, not a config; `fourfold init STAGE --base MODEL --data {file}` writes a config for them"
            ));
        }
        Some("json" | "yaml" | "yml") => {
            return Err(invalid!(
                "{file} is no config: that is a TOML file; `fourfold init STAGE --base MODEL` writes one"
            ));
        }
        _ => {}
    }
    let settings = path.join("config.toml");
    if settings.is_file() {
        return Err(invalid!("{file} is a folder; did you mean {}?", settings.display()));
    }
    let text =
        std::fs::read_to_string(path).map_err(|error| invalid!("{file}: {error}; give the path of a TOML file"))?;
    checked(&text, &file.to_string(), set)
}

fn parsed(text: &str, file: &str) -> Result<Table> {
    text.parse().map_err(|error: toml::de::Error| {
        // The parser shows the whole line that it stopped at, however long.
        let cut = |line: &str| match line.char_indices().nth(MOST_OF_A_LINE) {
            Some((at, _)) => format!("{}…", &line[..at]),
            None => line.to_owned(),
        };
        let lines: Vec<String> = error.to_string().trim().lines().map(cut).collect();
        invalid!("{file}: {}", lines.join("\n"))
    })
}

/// Characters of a line of a file that a message shows.
const MOST_OF_A_LINE: usize = 300;

/// The config of a text that is not in a file yet, called `name` in messages.
///
/// # Errors
/// As for [`load`].
pub fn from_text(text: &str, name: &str) -> Result<Config> {
    checked(text, name, &[])
}

/// A config without a file: every key at its default but those that `set` changes.
///
/// # Errors
/// As for [`load`].
pub fn from_defaults(set: &[String]) -> Result<Config> {
    checked("", "the defaults", set)
}

/// The config that the text of a file, called `file` in messages, and the changes to it make.
fn checked(text: &str, file: &str, set: &[String]) -> Result<Config> {
    let mut table = parsed(text, file)?;
    let mut changed = Vec::new();
    for text in set {
        changed.push((overrides::apply(&mut table, text)?, text));
    }
    let lora = table.get("lora").and_then(Value::as_table);
    let given = Given(lora.map(|keys| keys.keys().cloned().collect()).unwrap_or_default());
    dschat::fill(&mut table);
    ppo_rules::fill(&mut table);
    let written = Written { table, file, text, changed };
    let mut config = written.config()?;
    config.lora.given = given;
    if let Some(data) = &mut config.data {
        data.seed = config.seed;
    }
    if let Some(path) = config.distill.as_mut().and_then(|distill| distill.teacher_model_name_or_path.take()) {
        if config.teacher.is_some() {
            return Err(invalid!(
                "{file}: [distill] has teacher_model_name_or_path beside [teacher]; remove one of them"
            ));
        }
        config.teacher = Some(Base::at(path));
    }
    for other in config.reward_base.iter_mut().chain(&mut config.teacher) {
        other.device = other.device.or(config.base.device);
        other.dequantise = other.dequantise.or(config.base.dequantise);
    }
    if let Some(reward) = &mut config.reward_base {
        // Nothing is generated with a reward model, so the default that is written out makes no second base.
        reward.kv_cache_type = reward.kv_cache_type.filter(|written| *written != KvCacheType::Auto);
    }
    for other in config.reward_base.iter_mut().chain(&mut config.teacher) {
        // What is one base for both roles stays one.
        if (&other.path, other.device) == (&config.base.path, config.base.device) {
            other.kv_cache_type = other.kv_cache_type.or(config.base.kv_cache_type);
        }
    }
    config.expand_paths().map_err(|error| invalid!("{file}: {error}"))?;
    one_of_rollouts(&config).map_err(|error| invalid!("{file}: {error}"))?;
    group::translate(&mut config);
    reward_rules::check_written(&written.table, &config).map_err(|error| invalid!("{file}: {error}"))?;
    validate::validate(&config).map_err(|error| invalid!("{file}: {error}"))?;
    Ok(config)
}

/// A stage's section is not in the file.
fn missing(stage: Stage) -> anyhow::Error {
    invalid!("the section [{}] is missing; it needs at least reward_adapter = \"runs/reward/…\"", stage.name())
}

/// Checks that a file has one section of those whose stages PPO's loop runs.
fn one_of_rollouts(config: &Config) -> Result<()> {
    let there = [config.ppo.is_some(), config.grpo.is_some(), config.rloo.is_some()];
    let mut names = ["[ppo]", "[grpo]", "[rloo]"].into_iter().zip(there).filter(|(_, there)| *there);
    match (names.next(), names.next()) {
        (Some((first, _)), Some((second, _))) => {
            Err(invalid!("there are {first} and {second}; a file has one of [ppo], [grpo] and [rloo], so remove one"))
        }
        _ => Ok(()),
    }
}
