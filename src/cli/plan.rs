//! `plan`: the memory of a stage by phase and category, computed from headers and shapes without loading weights; the same
//! training with other arrangements of the roles; and changes that make it smaller, with their cost. Read planner/plan.rs
//! for the computation.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use super::data::only_stage;
use super::{print_json, say};
use crate::cli::data;
use crate::config;
use crate::config::{ByteSize, Config, DeviceChoice, Stage};
use crate::data::examples::objectives::{Objective as Kind, PromptExample, RankedExample, SftExample, UnpairedExample};
use crate::data::examples::{Examples, Ids};
use crate::data::stream::cache::Stored;
use crate::data::{Prepared, Subset, prepare};
use crate::device::select::{CONTEXT_BYTES, WORKSPACE_BYTES};
use crate::host::meter;
use crate::host::meter::Phase;
use crate::host::{LimitSource, beside_heap_bytes};
use crate::invalid;
use crate::model::adapter::{Adapter, LoraConfig};
use crate::model::block::Recompute;
use crate::model::config::DecoderConfig;
use crate::model_files::FileContents;
use crate::ops::weight::StorageDType;
use crate::planner::arrangements::Arrangement;
use crate::planner::changes::Change;
use crate::planner::dry;
use crate::planner::dry::OnDevice;
use crate::planner::passes;
use crate::planner::plan;
use crate::planner::plan::{Budget, Plan};
use crate::planner::sim_allocator::{Bytes, MemoryCategory};
use crate::planner::simulate::shape::{Branches, Network};
use crate::planner::simulate::stages::{StageShape, Work};
use crate::run::check_base_path;
use crate::tokenizer::Tokenizer;

#[derive(Args)]
pub(super) struct Arguments {
    /// The TOML file of a stage; or --base and --phase, for the defaults of a stage.
    #[arg(required_unless_present = "base")]
    config: Option<PathBuf>,
    /// Instead of a file: a model directory, a .gguf file or a config.json.
    #[arg(long, conflicts_with = "config", requires = "phase")]
    base: Option<PathBuf>,
    /// For which stage; else the one whose section the file has.
    #[arg(long, value_enum)]
    phase: Option<data::Stage>,
    /// Changes one key: --set ppo.micro_batch_size=2
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Where the bases would lie: cpu, or cuda, for which no card is needed; else what the config says (auto is the CPU here).
    #[arg(long, value_name = "DEVICE", value_parser = |text: &str| text.parse::<DeviceChoice>())]
    device: Option<DeviceChoice>,
    /// What the run may take of that device's memory, or of the machine's on the CPU, such as 8GiB; else [memory]
    /// device_limit or limit, else what is free on the CPU.
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| text.parse::<ByteSize>())]
    memory: Option<ByteSize>,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Arguments) -> Result<()> {
    let config = config(args)?.on(args.device);
    let stage = match args.phase {
        Some(stage) => stage.of_config(),
        None => only_stage(&config)?.of_config(),
    };
    let source = Source::open(stage, &config)?;
    let section = if stage == Stage::Reward { config.reward_base() } else { &config.base };
    let on_device = [section.device(), config.reward_base().device()].into_iter().any(dry::is_device);
    let limit = args.memory.filter(|_| !on_device).or(config.memory.limit).map(|limit| limit.0);
    // This machine may be another than the one with the device.
    let budget =
        if on_device { limit.map(|room| Budget { room, bound: LimitSource::Asked }) } else { Budget::of(limit) };
    let room = args.memory.or(config.memory.device_limit).map(|size| size.0.saturating_sub(dry::BESIDE));
    let shapes = |config: &Config| source.job(stage, config, room);
    let plan = plan::plan(stage, &config, budget, &shapes)?;
    let fits = plan.fits(budget, None);
    let change = if fits { None } else { plan::smallest_change(stage, &config, budget, &shapes)? };
    let choices = plan::choices(stage, &config, &shapes, &plan)?;
    let kto = source.kto_lengths(&config)?;
    let shown = Shown { stage, config: &config, source: &source, plan: &plan, budget, fits, change, choices, kto };
    if args.json { print_json(&shown.json()) } else { say(&shown.table()) }
}

/// The config of a file, or the defaults over a base.
fn config(args: &Arguments) -> Result<Config> {
    match (&args.config, &args.base) {
        (Some(file), _) => config::load(file, &args.set).map_err(|error| {
            let is_model = file.is_dir() || file.extension().is_some_and(|ending| ending == "gguf");
            let hint = || invalid!("plan wants a config, or --base {} with --phase sft, reward, …", file.display());
            if is_model { hint().context(error.to_string()) } else { error }
        }),
        (None, base) => {
            // JSON's string is TOML's; and PPO's section has to name a reward model, which need not be there.
            let path = base.as_deref().unwrap_or(Path::new("")).display().to_string();
            // Lengths may be set without data.
            let placeholder = "data.path=[\"none\"]".to_owned();
            let mut set = vec![format!("base.path={}", serde_json::to_string(&path)?), placeholder];
            if args.phase == Some(data::Stage::Ppo) {
                set.push("ppo.reward_adapter=runs/reward/adapter".into());
            }
            set.extend(args.set.iter().cloned());
            let mut config = config::from_defaults(&set)?;
            if let Some(data) = config.data.as_mut().filter(|data| data.path.as_slice() == [Path::new("none")]) {
                data.path = config::Paths::default();
            }
            Ok(config)
        }
    }
}

/// The examples, if there are any.
enum Data {
    Sft(Prepared<SftExample>),
    Ranked(Prepared<RankedExample>),
    Judged(Prepared<UnpairedExample>),
    Prompts(Prepared<PromptExample>),
    /// Lengths are the longest that the config allows.
    Full,
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

    fn network(&self, section: &config::Base) -> Result<Network> {
        let (quantise, compute) = (section.quantize.map(config::Quantize::stored), section.compute_dtype());
        match self {
            Self::Whole(contents) => Network::of(contents, quantise, compute),
            Self::Bare(config, stored) => Network::planned((**config).clone(), *stored, quantise, compute),
        }
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

/// The inputs of a plan.
struct Source {
    policy: Headers,
    scorer: Option<Headers>,
    data: Data,
    /// LoRA layers of the trained adapter and of the reward model, if their files can be read.
    adapters: [Option<Adapter>; 2],
    /// Adapters of the same shapes as fresh ones, for the bases of both; made once, because no change that is tried touches
    /// them.
    fresh: [OnceCell<Adapter>; 2],
    held: usize,
    _tokenizer: Option<Tokenizer>,
}

impl Source {
    fn open(stage: Stage, config: &Config) -> Result<Self> {
        let section = if stage == Stage::Reward { config.reward_base() } else { &config.base };
        check_base_path(&section.path)?;
        let policy = Headers::open(&section.path)?;
        let other = config.reward_base.as_ref().filter(|base| stage == Stage::Ppo && **base != config.base);
        let scorer = other.map(|base| Headers::open(&base.path)).transpose()?;
        let tokenizer = policy.tokenizer()?;
        let data = match &tokenizer {
            Some(tokenizer) if has_data(config) => read(stage, config, tokenizer)?,
            _ => Data::Full,
        };
        let start = match stage {
            Stage::Sft => config.sft().adapter,
            Stage::Reward => config.reward().adapter,
            Stage::Dpo => config.dpo().adapter,
            Stage::Kto => config.kto().adapter,
            Stage::Ppo => config.ppo()?.adapter.clone(),
        };
        let reward = if stage == Stage::Ppo { Some(config.ppo()?.reward_adapter.clone()) } else { None };
        let open = |path: Option<PathBuf>, of: &Headers| -> Result<Option<Adapter>> {
            let there = path.filter(|path| path.join("adapter_config.json").is_file());
            there.map(|path| Adapter::load(&path, of.config().shapes())).transpose()
        };
        let adapters = [open(start, &policy)?, open(reward, scorer.as_ref().unwrap_or(&policy))?];
        Ok(Self {
            policy,
            scorer,
            data,
            adapters,
            fresh: Default::default(),
            held: meter::current(),
            _tokenizer: tokenizer,
        })
    }

    fn job(&self, stage: Stage, config: &Config, room: Option<usize>) -> Result<StageShape> {
        let section = if stage == Stage::Reward { config.reward_base() } else { &config.base };
        let policy = self.policy.network(section)?;
        let scorer = self.scorer.as_ref().map(|headers| headers.network(config.reward_base())).transpose()?;
        let [start, reward] = &self.adapters;
        let lora = crate::run::lora_config(&config.lora);
        let fresh = |net: &Network| Branches::of(&lora, net);
        let branches = start.as_ref().map(Branches::of_adapter).map_or_else(|| fresh(&policy), Ok)?;
        let of_reward = match reward {
            Some(reward) => Branches::of_adapter(reward),
            None if scorer.is_none() => branches.clone(),
            None => fresh(scorer.as_ref().unwrap_or(&policy))?,
        };
        let places = (section.device(), config.reward_base().device());
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
            process: beside_heap_bytes(),
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

    fn context(&self) -> usize {
        let of = |headers: &Headers| headers.config().max_position_embeddings;
        self.scorer.as_ref().map_or(usize::MAX, of).min(of(&self.policy))
    }

    fn work(&self, stage: Stage, config: &Config) -> Result<Work> {
        match (&self.data, stage) {
            (Data::Sft(data), _) => passes::sft(config, &data.train, &data.held_out),
            (Data::Ranked(data), Stage::Reward) => passes::reward(config, &data.train, &data.held_out),
            (Data::Ranked(data), _) => passes::dpo(config, &data.train.to_vec()?, &data.held_out.to_vec()?),
            (Data::Judged(data), _) => passes::kto(config, &data.train.to_vec()?, &data.held_out.to_vec()?),
            (Data::Prompts(data), _) => {
                let count = data.held_out.len().min(config.ppo()?.eval_prompts);
                let held_out: Vec<usize> = (0..count).map(|row| data.held_out.tokens(row)).collect();
                let asked = passes::Asked { held_out: &held_out, context: self.context(), other_tokens: false };
                passes::ppo(config, &Ids(&data.train), asked)
            }
            (Data::Full, stage) => passes::full_length(stage, config, self.context()),
        }
    }

    /// KTO's longest sequence, and its longest prompt with another's response.
    fn kto_lengths(&self, config: &Config) -> Result<Option<(usize, usize)>> {
        match &self.data {
            Data::Judged(data) => Ok(Some(passes::kto_lengths(config, &data.train.to_vec()?))),
            _ => Ok(None),
        }
    }

    /// How many examples the lengths are of.
    fn examples(&self) -> Option<usize> {
        fn of<T: crate::data::examples::Example>(train: &Subset<T>) -> Option<usize> {
            Some(train.len())
        }
        match &self.data {
            Data::Sft(data) => of(&data.train),
            Data::Ranked(data) => of(&data.train),
            Data::Judged(data) => of(&data.train),
            Data::Prompts(data) => of(&data.train),
            Data::Full => None,
        }
    }
}

fn has_data(config: &Config) -> bool {
    config.data.as_ref().is_some_and(|data| !data.path.as_slice().is_empty() || !data.sources.is_empty())
}

fn read(stage: Stage, config: &Config, tokenizer: &Tokenizer) -> Result<Data> {
    fn of<T: Kind + Stored>(config: &Config, tokenizer: &Tokenizer, completion_only: bool) -> Result<Prepared<T>> {
        prepare(config.data()?, tokenizer, config.seed, completion_only)
    }
    Ok(match stage {
        Stage::Sft => Data::Sft(of(config, tokenizer, config.sft().completion_only_loss)?),
        Stage::Reward | Stage::Dpo => Data::Ranked(of(config, tokenizer, true)?),
        Stage::Kto => Data::Judged(of(config, tokenizer, true)?),
        Stage::Ppo => Data::Prompts(of(config, tokenizer, true)?),
    })
}

/// The contents of the output.
struct Shown<'s> {
    stage: Stage,
    config: &'s Config,
    source: &'s Source,
    plan: &'s Plan,
    budget: Option<Budget>,
    fits: bool,
    change: Option<(Change, Plan)>,
    choices: Vec<(Change, Plan)>,
    /// KTO's longest sequence, and its longest prompt with another's response.
    kto: Option<(usize, usize)>,
}

/// Bytes of each category, of all, and of what cannot be dropped, in JSON.
fn classes(bytes: &Bytes) -> Value {
    let mut all: serde_json::Map<String, Value> =
        MemoryCategory::ALL.iter().map(|&class| (class.name().replace(' ', "_"), bytes.of(class).into())).collect();
    all.insert("own".into(), bytes.own().into());
    all.insert("total".into(), bytes.total().into());
    Value::Object(all)
}

impl Shown<'_> {
    fn micro_batch(&self) -> usize {
        match self.stage {
            Stage::Sft => self.config.sft().per_device_train_batch_size,
            Stage::Reward => self.config.reward().per_device_train_batch_size,
            Stage::Dpo => self.config.dpo().per_device_train_batch_size,
            Stage::Kto => self.config.kto().per_device_train_batch_size,
            Stage::Ppo => self.config.ppo().map_or(0, |ppo| ppo.micro_batch_size),
        }
    }

    fn json(&self) -> Value {
        let (phase, peak) = self.plan.peak();
        let ran = self.plan.phases.iter().filter(|(_, bytes)| bytes.total() > 0);
        let change = |(change, plan): &(Change, Plan)| {
            let set: serde_json::Map<String, Value> =
                change.set.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect();
            let devices: usize = plan.devices.iter().map(|device| device.peak().1).sum();
            json!({
                "set": set, "costs": change.costs, "own": plan.peak().1.own(), "total": plan.peak().1.total(),
                "device": devices,
            })
        };
        json!({
            "stage": self.stage.name(),
            "checkpoint": self.plan.checkpoint.name(),
            "micro_batch_size": self.micro_batch(),
            "lengths": if self.source.examples().is_some() { "data" } else { "longest" },
            "kto": self.kto.map(|(own, mismatched)| json!({"longest": own, "longest_mismatched": mismatched})),
            "phases": ran.map(|(phase, bytes)| (phase.name().to_owned(), classes(bytes))).collect::<serde_json::Map<_, _>>(),
            "peak": {"phase": phase.name(), "own": peak.own(), "total": peak.total()},
            "room": self.budget.map(|budget| budget.room),
            "fits": self.fits,
            "smallest_change": self.change.as_ref().map(change),
            "choices": self.choices.iter().map(change).collect::<Vec<_>>(),
            "devices": self.plan.devices.iter().map(|device| {
                let (phase, peak) = device.peak();
                let ran = device.phases.iter().filter(|(_, bytes)| *bytes > 0);
                let of = json!({
                    "phases": ran.map(|(phase, bytes)| (phase.name().to_owned(), (*bytes).into()))
                        .collect::<serde_json::Map<String, Value>>(),
                    "base": device.base,
                    "peak": {"phase": phase.name(), "bytes": peak},
                    "context": CONTEXT_BYTES,
                    "workspace": WORKSPACE_BYTES,
                    "total": peak + dry::BESIDE,
                    "room": device.room.map(|room| room + dry::BESIDE),
                });
                (device.device.to_string(), of)
            }).collect::<serde_json::Map<_, _>>(),
            "arrangements": Arrangement::ALL.map(|of| {
                let (phase, bytes) = of.peak(self.plan);
                json!({"name": of.name(), "phase": phase.name(), "bytes": classes(&bytes)})
            }),
        })
    }

    fn table(&self) -> String {
        let mut out = String::new();
        let lengths = match self.source.examples() {
            Some(n) => format!("lengths of {n} examples"),
            None => "every sequence as long as [data] allows".into(),
        };
        let _ = writeln!(
            out,
            "{}: MiB by phase, {lengths}; checkpoint = {}, {} sequences or examples a pass\n",
            self.stage.name(),
            self.plan.checkpoint.name(),
            self.micro_batch()
        );
        if let Some((own, mismatched)) = self.kto {
            let _ = writeln!(
                out,
                "longest sequence {own} tokens, longest prompt with another's response (the KL term) {mismatched}\n"
            );
        }
        let shown: Vec<MemoryCategory> =
            MemoryCategory::ALL.into_iter().filter(|&c| self.plan.phases.iter().any(|(_, b)| b.of(c) > 0)).collect();
        let head: Vec<Cow<'_, str>> =
            shown.iter().map(|c| Cow::Borrowed(c.name())).chain([Cow::Borrowed("all")]).collect();
        let line = |out: &mut String, name: &str, cells: &[Cow<'_, str>]| {
            let _ = write!(out, "{name:<24}");
            for cell in cells {
                let _ = write!(out, "{cell:>11}");
            }
            out.push('\n');
        };
        let cells = |bytes: &Bytes| -> Vec<Cow<'_, str>> {
            let all = shown.iter().map(|&c| bytes.of(c)).chain([bytes.total()]);
            all.map(|b| Cow::Owned(format!("{:.1}", b as f64 / f64::from(1 << 20)))).collect()
        };
        line(&mut out, "phase", &head);
        for (phase, bytes) in self.plan.phases.iter().filter(|(_, bytes)| bytes.total() > 0) {
            line(&mut out, Phase::name(*phase), &cells(bytes));
        }
        out.push('\n');
        line(&mut out, "roles, at the peak", &head);
        for of in Arrangement::ALL {
            line(&mut out, of.name(), &cells(&of.peak(self.plan).1));
        }
        for device in &self.plan.devices {
            let _ = writeln!(out, "\n{}: MiB by phase", device.device);
            let mib = |bytes: usize| Cow::Owned(format!("{:.1}", bytes as f64 / f64::from(1 << 20)));
            let columns = ["weights", "passes", "context", "cuBLAS", "all"].map(Cow::Borrowed);
            line(&mut out, "phase", &columns);
            for (phase, bytes) in device.phases.iter().filter(|(_, bytes)| *bytes > 0) {
                let cells =
                    [device.base, bytes - device.base, CONTEXT_BYTES, WORKSPACE_BYTES, bytes + dry::BESIDE].map(mib);
                line(&mut out, Phase::name(*phase), &cells);
            }
            if let Some(room) = device.room {
                let verdict = if device.fits(0) { "it fits" } else { "it does not fit" };
                let _ = writeln!(out, "room: {}; {verdict}", plan::text(room + dry::BESIDE));
            }
        }
        let (phase, peak) = self.plan.peak();
        let _ = writeln!(
            out,
            "\npeak: {} in {}, of which {} are mapped files that the system can drop",
            plan::text(peak.total()),
            phase.name(),
            plan::text(peak.of(MemoryCategory::Mapped))
        );
        if let Some(budget) = self.budget {
            let verdict = match (self.fits, budget.is_comfortable(&peak)) {
                (true, true) => "it fits",
                (true, false) => {
                    "it fits, but not with the whole base beside it, which is then read again in every pass"
                }
                (false, _) => "it does not fit",
            };
            let _ = writeln!(out, "room: {}; {verdict}", plan::text(budget.room));
        }
        if let Some((change, plan)) = &self.change {
            let needs = plan.needs();
            let _ = writeln!(out, "the smallest change that fits, in {needs}: {} ({})", change.text(), change.costs);
        } else if !self.fits {
            let _ = writeln!(out, "no smaller batch, shorter sequence or quantised base fits");
        }
        let _ = writeln!(out, "\nwhat would take less:");
        for (change, plan) in &self.choices {
            let _ = writeln!(out, "{:>10}  {}  ({})", plan::text(plan.size()), change.text(), change.costs);
        }
        out
    }
}
