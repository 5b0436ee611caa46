//! What a plan of a stage is computed from: the headers of its bases, the shapes of its adapters, and the lengths of its
//! examples. Weights are not loaded, and a configuration alone can stand for a base.
//!
//! It does not depend on a stage's loop. Read `planner/plan.rs` for the plan, and `cli/plan.rs` and `cli/init/mod.rs` for who
//! asks.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use super::foreseen::{Lengths, longest_prompt};
use super::{check_base_path, lora_config, placement};
use crate::config;
use crate::config::{Config, Stage};
use crate::data::examples::objectives::{Objective, PromptExample, RankedExample, SftExample, UnpairedExample};
use crate::data::examples::{Example, Examples, Ids};
use crate::data::stream::cache::Stored;
use crate::data::{Prepared, Subset, prepare};
use crate::host::{beside_heap_bytes, give_back_all_freed, meter};
use crate::invalid;
use crate::model::adapter::{Adapter, LoraConfig};
use crate::model::block::Recompute;
use crate::model::config::DecoderConfig;
use crate::model_files::FileContents;
use crate::ops::weight::StorageDType;
use crate::planner::dry;
use crate::planner::dry::OnDevice;
use crate::planner::passes;
use crate::planner::simulate::shape::{Branches, Network};
use crate::planner::simulate::stages::StageShape;
use crate::planner::simulate::work::Work;
use crate::tokenizer::Tokenizer;

/// The examples, if there are any.
enum Data {
    Sft(Prepared<SftExample>),
    Ranked(Prepared<RankedExample>),
    Judged(Prepared<UnpairedExample>),
    Prompts(Prepared<PromptExample>),
    /// Lengths are the longest that the config allows; a comparison has this many responses.
    Full(usize),
}

/// A base section's model: headers of model files, or a configuration alone.
enum Headers {
    Whole(Box<FileContents>),
    Bare(Box<DecoderConfig>, StorageDType),
}

impl Headers {
    fn open(path: &Path) -> Result<Self> {
        let bare = |file: &Path| -> Result<Self> {
            let name = file.display().to_string();
            let text = std::fs::read_to_string(file).map_err(|e| invalid!("{name} cannot be read: {e}"))?;
            let config = DecoderConfig::from_hf(&text, None, &name)?;
            let json: Value = serde_json::from_str(&text).map_err(|e| invalid!("{name} is not JSON: {e}"))?;
            let dtype = json.get("torch_dtype").or_else(|| json.get("dtype")).and_then(Value::as_str);
            let stored = match dtype {
                Some("bfloat16") => StorageDType::BF16,
                Some("float16") => StorageDType::F16,
                _ => StorageDType::F32,
            };
            Ok(Self::Bare(Box::new(config), stored))
        };
        if path.extension().is_some_and(|e| e == "json") {
            return bare(path);
        }
        let weights = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"];
        if path.join("config.json").is_file() && !weights.iter().any(|file| path.join(file).exists()) {
            return bare(&path.join("config.json"));
        }
        Ok(Self::Whole(Box::new(FileContents::open(path)?)))
    }

    fn network(&self, section: &config::Base, name: &str) -> Result<Network> {
        let (quantise, compute) = (section.quantize.map(config::Quantize::stored), section.compute_dtype());
        let net = match self {
            Self::Whole(contents) => Network::of(contents, quantise, compute),
            Self::Bare(config, stored) => Network::planned((**config).clone(), *stored, quantise, compute),
        };
        placement::kv_cache_type(section.kv_cache_type(), section.device().is_device())
            .with_context(|| format!("[{name}]"))?;
        Ok(net?.of_device_keys(section))
    }

    fn config(&self) -> &DecoderConfig {
        match self {
            Self::Whole(contents) => &contents.config,
            Self::Bare(config, _) => config,
        }
    }

    fn tokenizer(&self) -> Result<Option<Tokenizer>> {
        match self {
            Self::Whole(contents) => contents.read_tokenizer().map(Some),
            Self::Bare(..) => Ok(None),
        }
    }
}

/// The inputs of a plan of one stage.
pub struct PlanInputs {
    policy: Headers,
    scorer: Option<Headers>,
    data: Data,
    /// LoRA layers of the trained adapter and of the reward model, if their files can be read.
    adapters: [Option<Adapter>; 2],
    /// Adapters of the same shapes as fresh ones, for the bases of both; made once, because no change that is tried touches
    /// them.
    fresh: [OnceCell<Adapter>; 2],
    /// Bytes of the heap that tokenizer and examples hold.
    held: usize,
    /// Bytes of the process beside its heap, taken once: every plan that is compared counts the same ones.
    process: usize,
    /// Ranks of a run, of which one is planned.
    ranks: usize,
    _tokenizer: Option<Tokenizer>,
}

impl PlanInputs {
    /// Opens what the config, with all members of an ensemble written out, names: bases, data and, where they are there
    /// already, adapters. Without data, or without a
    /// tokenizer to read it with, sequences are as long as `[data]` allows. The plan is that of one of `ranks` ranks, and the
    /// config that of all ([`Config::of_ranks`]).
    ///
    /// # Errors
    /// A base, an adapter or records that cannot be used; no `[ppo]` where it is asked for.
    pub fn open(stage: Stage, config: &Config, ranks: usize) -> Result<Self> {
        let inputs = Self::with(stage, config, |tokenizer| match tokenizer {
            Some(tokenizer) if has_data(config) => read(stage, config, tokenizer),
            _ => Ok(Data::Full(2)),
        })?;
        Ok(Self { ranks, ..inputs })
    }

    /// As [`PlanInputs::open`], with every sequence as long as `[data]` allows and `responses` in every comparison, whatever
    /// the records hold: no run of the config takes more. `bytes` are what its examples will take of the heap.
    ///
    /// # Errors
    /// A base or an adapter that cannot be used; no `[ppo]` where it is asked for.
    pub fn at_full_length(stage: Stage, config: &Config, responses: usize, bytes: usize) -> Result<Self> {
        let inputs = Self::with(stage, config, |_| Ok(Data::Full(responses)))?;
        Ok(Self { held: inputs.held + bytes, ..inputs })
    }

    fn with(stage: Stage, config: &Config, read: impl FnOnce(Option<&Tokenizer>) -> Result<Data>) -> Result<Self> {
        let section = if stage == Stage::Reward { config.reward_base() } else { &config.base };
        check_base_path(&section.path)?;
        let policy = Headers::open(&section.path)?;
        let second = Some(config.second_base(stage)).filter(|_| stage.has_rollouts() || stage == Stage::Distill);
        let other = second.filter(|base| **base != config.base);
        let scorer = other.map(|base| Headers::open(&base.path)).transpose()?;
        let tokenizer = policy.tokenizer()?;
        let data = read(tokenizer.as_ref())?;
        let start = match stage {
            Stage::Sft => config.sft().adapter,
            Stage::Reward => config.reward().adapter,
            Stage::Dpo => config.dpo().adapter,
            Stage::Kto => config.kto().adapter,
            Stage::Distill => config.distill().adapter,
            Stage::Ppo | Stage::Grpo | Stage::Rloo => config.rollouts(stage)?.adapter.clone(),
        };
        let reward = match stage {
            Stage::Distill => config.distill().teacher_adapter,
            _ if stage.has_rollouts() => config.rollouts(stage)?.reward_adapter.as_slice().first().cloned(),
            _ => None,
        };
        let open = |path: Option<PathBuf>, of: &Headers| -> Result<Option<Adapter>> {
            let there = path.filter(|path| path.join("adapter_config.json").is_file());
            there.map(|path| Adapter::load(&path, of.config().shapes())).transpose()
        };
        let adapters = [open(start, &policy)?, open(reward, scorer.as_ref().unwrap_or(&policy))?];
        // What reading a large tokenizer took is free again, and a run gives it back before it plans.
        give_back_all_freed();
        Ok(Self {
            policy,
            scorer,
            data,
            adapters,
            fresh: Default::default(),
            held: meter::current(),
            process: beside_heap_bytes(),
            ranks: 1,
            _tokenizer: tokenizer,
        })
    }

    /// The shapes of `config`, which may differ from the one that was opened in what the planner changes: batches, lengths,
    /// quantisation. `room` is what a device has for weights and passes, in bytes.
    ///
    /// # Errors
    /// Sizes that overflow; examples that cannot be read.
    pub fn job(&self, stage: Stage, config: &Config, room: Option<usize>) -> Result<StageShape> {
        let section = if stage == Stage::Reward { config.reward_base() } else { &config.base };
        // A section that is absent stands for [base].
        let name = |other: &Option<config::Base>, name| if other.is_some() { name } else { "base" };
        let of_scorer = match stage {
            Stage::Distill => name(&config.teacher, "teacher"),
            _ => name(&config.reward_base, "reward_base"),
        };
        let policy = self.policy.network(section, if stage == Stage::Reward { of_scorer } else { "base" })?;
        let scorer =
            self.scorer.as_ref().map(|headers| headers.network(config.second_base(stage), of_scorer)).transpose()?;
        let [start, reward] = &self.adapters;
        let lora = lora_config(&config.lora);
        let fresh = |net: &Network| Branches::of(&lora, net);
        let branches = start.as_ref().map(Branches::of_adapter).map_or_else(|| fresh(&policy), Ok)?;
        let of_reward = match reward {
            Some(reward) => Branches::of_adapter(reward),
            None if scorer.is_none() => branches.clone(),
            None => fresh(scorer.as_ref().unwrap_or(&policy))?,
        };
        let places = (section.device(), config.second_base(stage).device());
        let on_device = match [places.0, places.1].into_iter().any(dry::is_device) {
            false => None,
            true => {
                let other = scorer.as_ref().unwrap_or(&policy);
                let start = self.adapter(0, &lora, &policy, config.seed)?;
                let reward = match reward {
                    None if scorer.is_none() => start.clone(),
                    _ => self.adapter(1, &lora, other, config.seed)?,
                };
                let reward = if reward.head().is_some() { reward } else { reward.with_head(0)? };
                let rooms = room.into_iter().flat_map(|room| [(places.0, room), (places.1, room)]).collect();
                Some(OnDevice { policy: places.0, scorer: places.1, start, reward, rooms })
            }
        };
        Ok(StageShape {
            work: self.work(stage, config)?,
            branches,
            reward: of_reward.with_head(),
            checkpoint: Recompute::Off,
            data: self.held,
            process: self.process,
            threads: crate::ops::cpu::pool::threads(),
            policy,
            scorer,
            on_device,
        })
    }

    /// The adapter of a file, or one of the same shapes as a fresh one.
    fn adapter(&self, of: usize, lora: &LoraConfig, net: &Network, seed: u64) -> Result<Adapter> {
        if let Some(given) = self.adapters[of].as_ref().or_else(|| self.fresh[of].get()) {
            return Ok(given.clone());
        }
        let fresh = Adapter::init(lora.clone(), net.config.shapes(), seed)?;
        Ok(self.fresh[of].get_or_init(|| fresh).clone())
    }

    /// The lengths by which a stage may be refused.
    ///
    /// # Errors
    /// Examples that cannot be read.
    pub fn lengths(&self, stage: Stage) -> Result<Lengths> {
        let prompt = match &self.data {
            Data::Sft(data) if stage == Stage::Distill => longest_prompt(data)?,
            Data::Prompts(data) if stage == Stage::Distill => longest_prompt(data)?,
            _ => 0,
        };
        Ok(Lengths { sequence: self.longest_sequence(), prompt, context: self.context() })
    }

    /// The longest sequence that both bases can take, in tokens.
    fn context(&self) -> usize {
        let of = |headers: &Headers| headers.config().max_position_embeddings;
        self.scorer.as_ref().map_or(usize::MAX, of).min(of(&self.policy))
    }

    fn work(&self, stage: Stage, config: &Config) -> Result<Work> {
        match (&self.data, stage) {
            (Data::Sft(data), Stage::Distill) => passes::distill(config, &data.train, &data.held_out),
            (Data::Prompts(data), Stage::Distill) => passes::distill(config, &data.train, &data.held_out),
            (Data::Sft(data), _) => passes::sft(config, &data.train, &data.held_out, self.ranks),
            (Data::Ranked(data), Stage::Reward) => passes::reward(config, &data.train, &data.held_out, self.ranks),
            (Data::Ranked(data), _) => passes::dpo(config, &data.train.to_vec()?, &data.held_out.to_vec()?, self.ranks),
            (Data::Judged(data), _) => passes::kto(config, &data.train.to_vec()?, &data.held_out.to_vec()?, self.ranks),
            (Data::Prompts(data), _) => {
                let count = data.held_out.len().min(config.ppo()?.eval_prompts);
                let held_out: Vec<usize> = (0..count).map(|row| data.held_out.tokens(row)).collect();
                let (context, ranks) = (self.context(), self.ranks);
                let asked = passes::Asked { held_out: &held_out, context, other_tokens: false, ranks };
                passes::ppo(config, &Ids(&data.train), asked)
            }
            (Data::Full(responses), stage) => {
                passes::full_length(stage, config, self.context(), *responses, self.ranks)
            }
        }
    }

    /// KTO's longest sequence, and its longest prompt with another's response, in tokens; `None` for other stages and without
    /// data.
    ///
    /// # Errors
    /// Examples that cannot be read.
    pub fn kto_lengths(&self, config: &Config) -> Result<Option<(usize, usize)>> {
        match &self.data {
            Data::Judged(data) => Ok(Some(passes::kto_lengths(config, &data.train.to_vec()?))),
            _ => Ok(None),
        }
    }

    /// How many examples the lengths are of; `None` if they are the longest that the config allows.
    pub fn examples(&self) -> Option<usize> {
        fn of<T: Example>(train: &Subset<T>) -> Option<usize> {
            Some(train.len())
        }
        match &self.data {
            Data::Sft(data) => of(&data.train),
            Data::Ranked(data) => of(&data.train),
            Data::Judged(data) => of(&data.train),
            Data::Prompts(data) => of(&data.train),
            Data::Full(_) => None,
        }
    }
}

impl PlanInputs {
    /// Tokens of the longest training sequence; 0 without data.
    fn longest_sequence(&self) -> usize {
        match &self.data {
            Data::Sft(data) => data.train.longest_sequence(),
            Data::Ranked(data) => data.train.longest_sequence(),
            Data::Judged(data) => data.train.longest_sequence(),
            Data::Prompts(data) => data.train.longest_sequence(),
            Data::Full(_) => 0,
        }
    }
}

fn has_data(config: &Config) -> bool {
    config.data.as_ref().is_some_and(|data| !data.path.as_slice().is_empty() || !data.sources.is_empty())
}

fn read(stage: Stage, config: &Config, tokenizer: &Tokenizer) -> Result<Data> {
    fn of<T: Objective + Stored>(config: &Config, tokenizer: &Tokenizer, completion_only: bool) -> Result<Prepared<T>> {
        prepare(config.data()?, tokenizer, config.seed, completion_only)
    }
    Ok(match stage {
        Stage::Sft => Data::Sft(of(config, tokenizer, config.sft().completion_only_loss)?),
        Stage::Reward | Stage::Dpo => Data::Ranked(of(config, tokenizer, true)?),
        Stage::Kto => Data::Judged(of(config, tokenizer, true)?),
        Stage::Distill => {
            let about = || config.distill().about_records();
            match config.distill().samples_all() {
                true => Data::Prompts(of(config, tokenizer, true).with_context(about)?),
                false => Data::Sft(of(config, tokenizer, true).with_context(about)?),
            }
        }
        Stage::Ppo | Stage::Grpo | Stage::Rloo => Data::Prompts(of(config, tokenizer, true)?),
    })
}
