//! `init`: a commented config for a stage over a base, from the base's headers, a look into the data and a plan of the memory.
//! Weights are not loaded. It does not depend on a stage's loop.
//!
//! - `look.rs`: records -> their number, kinds and lengths
//! - `propose.rs`: what was seen -> values, each with its reason
//! - `fit.rs`: values -> values that fit the memory
//! - `document.rs`: values -> the text
//!
//! Read `look.rs` next.

mod document;
mod fit;
mod look;
mod propose;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::{Value, json};

use self::document::{Document, grouped};
use self::fit::{Fitted, Fitter};
use self::look::{Lengths, Seen, look};
use self::propose::{Asked, Bases, propose};
use super::completed::DeviceValue;
use super::data;
use crate::config;
use crate::config::{ByteSize, DeviceChoice, Stage};
use crate::device::select::select;
use crate::invalid;
use crate::model::adapter::Adapter;
use crate::model_files::FileContents;
use crate::ops::weight::ComputeDtype;
use crate::planner::plan;
use crate::planner::simulate::shape::Network;
use crate::run::{Wanted, check_adapter_path, check_base_path, is_settings, members, quoted};
use crate::tokenizer::Tokenizer;

#[derive(Args)]
pub(super) struct Init {
    /// The stage to be configured.
    #[arg(value_enum)]
    stage: data::Stage,
    /// The base: a Hugging Face folder or a .gguf file.
    #[arg(long, value_name = "MODEL")]
    base: PathBuf,
    /// Another base for the reward model and the critic; for reward, ppo, grpo and rloo.
    #[arg(long, value_name = "MODEL")]
    reward_base: Option<PathBuf>,
    /// The model that is distilled; for distill.
    #[arg(long, value_name = "MODEL")]
    teacher: Option<PathBuf>,
    /// Files, patterns or folders of records, whose lengths are measured.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    data: Vec<PathBuf>,
    /// What the run may take of the machine's memory, or of the card's, such as 8GiB; else what is free.
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| text.parse::<ByteSize>())]
    memory: Option<ByteSize>,
    /// Where the base will lie: cpu, cuda or cuda:N; else a card if there is one here that can be used. A card is asked only
    /// for its free memory: with --memory none need be here.
    #[arg(long, value_name = "DEVICE", value_parser = DeviceValue, hide_possible_values = true)]
    device: Option<DeviceChoice>,
    /// The adapter to start from, or the folder of the run that trained it.
    #[arg(long, value_name = "RUN_OR_DIR")]
    adapter: Option<PathBuf>,
    /// The reward model's adapter, or the folder of the reward run, of which an ensemble's members all count; for ppo, grpo and
    /// rloo.
    #[arg(long, value_name = "RUN_OR_DIR")]
    reward_adapter: Option<PathBuf>,
    /// The file to write; else the config goes to stdout.
    #[arg(long, value_name = "CONFIG.toml")]
    out: Option<PathBuf>,
    /// Replaces the file if there is one.
    #[arg(long)]
    overwrite: bool,
    /// One JSON object on stdout: the config's text, what was measured, and the plan.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Init) -> Result<()> {
    if let Some(out) = args.out.as_ref().filter(|out| out.is_dir()) {
        return Err(invalid!(
            "--out {} is a folder; name a file, such as {}",
            out.display(),
            out.join(format!("{}.toml", args.stage.of_config().name())).display()
        ));
    }
    if let Some(out) = args.out.as_ref().filter(|out| is_settings(out)) {
        return Err(invalid!(
            "--out {}: it is the settings of a run, by which its folder is known; give another --out",
            out.display()
        ));
    }
    if let Some(out) = args.out.as_ref().filter(|out| out.exists() && !args.overwrite) {
        return Err(invalid!("{} is there already; give another --out, or --overwrite to replace it", out.display()));
    }
    args.out.as_deref().map_or(Ok(()), super::check_folder_of)?;
    let asked = asked(args)?;
    let opened = Opened::of(&asked)?;
    asked.check_adapters(&opened)?;
    let seen = match &asked.data[..] {
        [] => None,
        paths => Some(look(asked.stage, paths, &opened.trained().tokenizer)?),
    };
    let bases = opened.bases(asked.stage);
    // The planner opens what it needs again, and counts what is held then as the run's.
    drop(opened);
    let room = asked.room()?;
    let document = propose(&asked, &bases, seen.as_ref());
    let fitter = Fitter { asked: &asked, bases: &bases, seen: seen.as_ref(), room };
    let mut fitted = fitter.fit(document)?;
    let named = args.out.as_deref().unwrap_or(Path::new("CONFIG.toml"));
    fitted.document.head = head(&asked, seen.as_ref(), &fitted, named);
    let text = fitted.document.text()?;
    config::from_text(&text, "the proposed config")?;
    if let Some(out) = &args.out {
        fs::write(out, &text).map_err(|error| invalid!("{} cannot be written: {error}", out.display()))?;
    }
    if args.json {
        super::print_json(&report(&asked, seen.as_ref(), &fitted, args.out.as_deref(), &text))?;
    } else if args.out.is_none() {
        super::say(&text)?;
    }
    let written =
        args.out.as_ref().map_or_else(|| "save it, then".to_owned(), |out| format!("{} is written;", out.display()));
    let [first, second] = commands(asked.stage, named);
    crate::tell!("init: {written} `{first}` shows what it trains on, and `{second}` runs it");
    Ok(())
}

/// The two commands to go on with.
fn commands(stage: Stage, config: &Path) -> [String; 2] {
    let file = quoted(&config.display().to_string());
    [format!("fourfold data {file}"), format!("fourfold {} {file}", stage.name())]
}

/// The arguments, with folders of runs resolved to their adapters.
fn asked(args: &Init) -> Result<Asked> {
    let stage = args.stage.of_config();
    if args.reward_base.is_some() && stage != Stage::Reward && !stage.has_rollouts() {
        return Err(invalid!(
            "--reward-base is for reward, ppo, grpo and rloo, and {} has one base; leave it out",
            stage.name()
        ));
    }
    if args.teacher.is_some() != (stage == Stage::Distill) {
        return Err(match stage {
            Stage::Distill => {
                invalid!("distill needs --teacher, the model that is distilled: a folder or a .gguf file")
            }
            _ => invalid!("--teacher is for distill; leave it out"),
        });
    }
    if args.reward_adapter.is_some() && !stage.has_rollouts() {
        return Err(invalid!(
            "--reward-adapter is for ppo, grpo and rloo, and {} has no reward model; leave it out",
            stage.name()
        ));
    }
    if args.reward_adapter.is_none() && stage.has_rollouts() {
        return Err(invalid!(
            "{0} needs --reward-adapter, the folder of a run of the reward stage; `fourfold init reward` configures one. Rules, programs \
             and endpoints are not proposed here: `fourfold keys {0}.reward` has their keys",
            stage.name()
        ));
    }
    let place = match args.device.unwrap_or_default() {
        DeviceChoice::Auto => select(DeviceChoice::Auto)?.choice,
        named => named,
    };
    Ok(Asked {
        stage,
        base: args.base.clone(),
        second_base: args.reward_base.clone().or_else(|| args.teacher.clone()),
        data: args.data.clone(),
        memory: args.memory,
        device: args.device.filter(|&device| device != DeviceChoice::Auto),
        place,
        adapter: args.adapter.as_deref().map(|path| started_from(path, stage)).transpose()?,
        reward_adapters: match &args.reward_adapter {
            Some(path) => members_in(path, "--reward-adapter")?,
            None => vec![],
        },
    })
}

/// The adapter that a stage starts from.
fn started_from(path: &Path, stage: Stage) -> Result<PathBuf> {
    let wanted = if stage == Stage::Reward { Wanted::Any } else { Wanted::Policy };
    adapter_in(path, &["adapter", "actor"], wanted, "--adapter")
}

/// The adapter that a path means: itself, or one by these names in a run's folder.
fn adapter_in(path: &Path, names: &[&str], wanted: Wanted, option: &str) -> Result<PathBuf> {
    let candidates = std::iter::once(path.to_path_buf()).chain(names.iter().map(|name| path.join(name)));
    if let Some(found) = candidates.into_iter().find(|path| is_adapter(path)) {
        return Ok(found);
    }
    check_adapter_path(path, wanted).context(option.to_owned())?;
    Err(invalid!("{option} {}: there is no adapter_config.json; give an adapter's folder, or a run's", path.display()))
}

/// The adapters that a path means: those of all members where it is the folder of a run that trained an ensemble.
fn members_in(path: &Path, option: &str) -> Result<Vec<PathBuf>> {
    match &members(path).context(option.to_owned())?[..] {
        [_] => adapter_in(path, &["adapter"], Wanted::RewardModel, option).map(|found| vec![found]),
        all => Ok(all.to_vec()),
    }
}

fn is_adapter(path: &Path) -> bool {
    path.join("adapter_config.json").is_file()
}

impl Asked {
    /// What a device has for weights and passes, in bytes; `None` on the CPU.
    fn room(&self) -> Result<Option<usize>> {
        if !self.is_on_device() {
            return Ok(None);
        }
        if let Some(memory) = self.memory {
            return Ok(Some(memory.0.saturating_sub(crate::planner::dry::BESIDE)));
        }
        let there = select(self.place).and_then(|selected| selected.device.map_or(Ok(None), |device| device.room()));
        there.map_err(|error| {
            invalid!(
                "--device {} without --memory, and no card to ask here ({error:#}); give --memory, such as 24GiB",
                self.place
            )
        })
    }

    /// Checks that the adapters are over these bases.
    fn check_adapters(&self, opened: &Opened) -> Result<()> {
        if let Some(path) = &self.adapter {
            let start = Adapter::load(path, opened.trained().contents.config.shapes()).context("--adapter")?;
            if start.head().is_some() && self.stage != Stage::Reward {
                let instead = match self.stage.has_rollouts() {
                    true => ", and a reward model's as --reward-adapter",
                    false => "",
                };
                return Err(invalid!(
                    "--adapter {} has a score head, so it is a reward model's or a critic's, and {} starts from one that writes text; give \
                     that of an SFT, DPO or KTO run{instead}",
                    path.display(),
                    self.stage.name()
                ));
            }
        }
        for path in &self.reward_adapters {
            let scorer = opened.reward.as_ref().unwrap_or(&opened.policy);
            let reward = Adapter::load(path, scorer.contents.config.shapes()).context("--reward-adapter")?;
            if reward.head().is_none() {
                return Err(invalid!(
                    "--reward-adapter {} has no scalar head, so it is no reward model; give a run of the reward stage, and the adapter to \
                     start from as --adapter",
                    path.display()
                ));
            }
        }
        Ok(())
    }
}

/// A base's headers and tokenizer.
struct Model {
    contents: FileContents,
    network: Network,
    tokenizer: Tokenizer,
}

impl Model {
    fn open(path: &Path) -> Result<Self> {
        check_base_path(path)?;
        let contents = FileContents::open(path)?;
        let network = Network::of(&contents, None, ComputeDtype::F32)?;
        let tokenizer = contents.read_tokenizer()?;
        Ok(Self { contents, network, tokenizer })
    }

    /// `llama of 0.9 M parameters in bf16 for up to 256 tokens.`
    fn about(&self) -> String {
        let mut types: Vec<&str> = self.network.dtypes.values().map(|dtype| dtype.name()).collect();
        types.sort_unstable();
        types.dedup();
        let config = &self.contents.config;
        let millions = self.network.parameters() as f64 / 1e6;
        let size = if millions < 1000.0 { format!("{millions:.1} M") } else { format!("{:.2} B", millions / 1e3) };
        format!(
            "{} with {size} parameters, stored as {}, for up to {} tokens.",
            config.names().model_type,
            types.join(", "),
            grouped(config.max_position_embeddings)
        )
    }

    fn is_dense(&self) -> bool {
        self.network.dtypes.values().any(|dtype| dtype.is_dense())
    }
}

/// The bases of a stage.
struct Opened {
    policy: Model,
    reward: Option<Model>,
    /// Whether the reward model's base is the one that is trained.
    trains_reward: bool,
}

impl Opened {
    fn of(asked: &Asked) -> Result<Self> {
        let policy = Model::open(&asked.base).context("--base")?;
        let other = asked.second_base.as_deref().map(Model::open).transpose();
        let other = other.context(if asked.stage == Stage::Distill { "--teacher" } else { "--reward-base" })?;
        Ok(Self { policy, reward: other, trains_reward: asked.stage == Stage::Reward })
    }

    /// The base of the adapter that the stage trains.
    fn trained(&self) -> &Model {
        self.reward.as_ref().filter(|_| self.trains_reward).unwrap_or(&self.policy)
    }

    fn bases(&self, stage: Stage) -> Bases {
        let all: Vec<&Model> = match stage {
            Stage::Reward => vec![self.trained()],
            _ => std::iter::once(&self.policy).chain(&self.reward).collect(),
        };
        let context = |model: &&Model| model.contents.config.max_position_embeddings;
        let other_tokens = self.reward.as_ref().filter(|_| stage.has_rollouts()).is_some_and(|reward| {
            let rows = |model: &Model| model.contents.config.vocab_size;
            let ids = rows(&self.policy).max(rows(reward)) as u32;
            (0..ids).any(|id| self.policy.tokenizer.token(id) != reward.tokenizer.token(id))
        });
        Bases {
            about: std::iter::once(&self.policy).chain(&self.reward).map(Model::about).collect(),
            context: all.iter().map(context).min().unwrap_or(0),
            is_dense: all.iter().any(|model| model.is_dense()),
            other_tokens,
        }
    }
}

/// What a plan for a device with `--memory` is based on.
const NO_CARD_ASKED: &str = "No card was asked: the plan is computed from shapes for the memory that was named, so that it can be \
                             made on another machine. `fourfold doctor` on the card's machine shows whether it can be used.";

/// The comment at the top of the file.
fn head(asked: &Asked, seen: Option<&Seen>, fitted: &Fitted, config: &Path) -> Vec<String> {
    let stage = asked.stage.name();
    let [first, second] = commands(asked.stage, config);
    let records = match seen {
        Some(seen) => format!("{} records", grouped(seen.records)),
        None => "no data yet".to_owned(),
    };
    let place = if asked.is_on_device() { asked.place.to_string() } else { "the CPU".into() };
    let of = asked.memory.map_or_else(|| "the memory that is free".to_owned(), |memory| memory.to_string());
    let lengths = match fitted.examples {
        Some(_) => "for these records",
        None => "with every sequence as long as it may be",
    };
    let mut head = vec![
        format!("{stage} over {}, proposed by `fourfold init` for {records}.", asked.base.display()),
        String::new(),
        format!("   {first}    shows what it trains on"),
        format!("   {second}    runs it"),
        String::new(),
        format!("Planned on {place}: {} of {of} at most, in {}, {lengths}.", fitted.plan.needs(), phase(&fitted.plan)),
    ];
    if asked.memory.is_some() && asked.is_on_device() {
        head.push(NO_CARD_ASKED.into());
    }
    if !fitted.is_comfortable {
        head.push(
            "The base does not stay in memory beside that and is read from its file in every pass, which is slow."
                .into(),
        );
    }
    head.push(format!("Keys that are not here have their defaults: `fourfold keys {stage}` prints them."));
    head
}

fn phase(plan: &plan::Plan) -> &'static str {
    plan.devices.first().map_or(plan.peak().0, |device| device.peak().0).name()
}

fn lengths(lengths: &Lengths) -> Value {
    json!({
        "p50": lengths.percentile(50), "p95": lengths.percentile(95), "p99": lengths.percentile(99),
        "longest": lengths.longest(),
    })
}

fn report(asked: &Asked, seen: Option<&Seen>, fitted: &Fitted, out: Option<&Path>, text: &str) -> Value {
    let set = |document: &Document| -> Value {
        let pairs = document.proposals.iter().map(|p| {
            let value = serde_json::to_value(&p.value).unwrap_or_default();
            (format!("{}.{}", p.section, p.key), value)
        });
        Value::Object(pairs.collect())
    };
    let named = out.unwrap_or(Path::new("CONFIG.toml"));
    let peak = fitted.plan.peak().1;
    json!({
        "stage": asked.stage.name(),
        "out": out.map(|out| out.display().to_string()),
        "config": text,
        "set": set(&fitted.document),
        "data": seen.map(|seen| json!({
            "records": seen.records,
            "kinds": seen.kinds,
            "sampled": seen.sampled,
            "tokens": lengths(&seen.lengths),
            "response_tokens": (seen.responses.len() > 0).then(|| lengths(&seen.responses)),
        })),
        "plan": {
            "phase": phase(&fitted.plan),
            "own": peak.own(),
            "total": peak.total(),
            "devices": fitted.plan.devices.iter().map(|device| {
                (device.device.to_string(), device.total().into())
            }).collect::<serde_json::Map<String, Value>>(),
            "comfortable": fitted.is_comfortable,
        },
        "next": commands(asked.stage, named),
    })
}
