//! `plan`: the memory of a stage by phase and category, computed from headers and shapes without loading weights; the same
//! training with other arrangements of the roles; and changes that make it smaller, with their cost. Read planner/plan.rs
//! for the computation, and run/plan_inputs.rs for what it reads.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};

use super::completed::DeviceValue;
use super::data::only_stage;
use super::{print_json, say};
use crate::cli::data;
use crate::config;
use crate::config::{ByteSize, Config, Dequantising, DeviceChoice, Offload, Stage};
use crate::device::select::{CONTEXT_BYTES, WORKSPACE_BYTES};
use crate::error::counted;
use crate::host::LimitSource;
use crate::host::meter::Phase;
use crate::invalid;
use crate::planner::arrangements::Arrangement;
use crate::planner::changes::Change;
use crate::planner::dry;
use crate::planner::dry::DevicePlan;
use crate::planner::plan;
use crate::planner::plan::{Budget, Plan};
use crate::planner::sim_allocator::{Bytes, MemoryCategory};
use crate::run::{PlanInputs, absent_adapters, memory_beside, refusals, with_members};
use crate::{note, warning};

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
    #[arg(long, value_name = "DEVICE", value_parser = DeviceValue, hide_possible_values = true)]
    device: Option<DeviceChoice>,
    /// What the run may take of that device's memory, or of the machine's on the CPU, such as 8GiB; else [memory]
    /// device_limit or limit, else what is free on the CPU. A plan that does not fit a limit that was named, here or in
    /// [memory], ends with exit code 2.
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| text.parse::<ByteSize>())]
    memory: Option<ByteSize>,
    /// Plans one of so many ranks, as `mpirun -n N` starts them, 1024 at most; else a run of one process.
    #[arg(long, value_name = "N", default_value = "1", allow_negative_numbers = true,
          value_parser = clap::value_parser!(u16).range(1..=1024))]
    ranks: u16,
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
    let ranks = usize::from(args.ranks);
    if ranks > 1 && stage == Stage::Distill {
        return Err(invalid!("--ranks {ranks}: distill trains in one process; leave --ranks out"));
    }
    let config = with_members(stage, &config)?.of_ranks(stage, ranks);
    let idle = config.idle_keys(stage);
    idle.iter().for_each(|idle| warning!("plan: warning: {idle}"));
    let config = config.read_by(stage);
    let bases = [
        ("base", Some(&config.base)),
        ("reward_base", config.reward_base.as_ref()),
        ("teacher", config.teacher.as_ref()),
    ];
    for (name, _) in bases.iter().filter(|(_, base)| base.is_some_and(is_idle_offload)) {
        warning!("plan: warning: [{name}] offload has no effect on the CPU; --device cuda plans it for a card");
    }
    // A section that names none has what [base] says.
    if config.base.dequantise() != Dequantising::Auto && !bases.iter().any(|(_, base)| base.is_some_and(is_on_card)) {
        warning!("plan: warning: [base] dequantise has no effect on the CPU; --device cuda plans it for a card");
    }
    let source = PlanInputs::open(stage, &config, ranks)?;
    let refused = refusals(stage, &config, source.lengths(stage)?);
    refused.iter().for_each(|text| warning!("plan: warning: {text}"));
    for (key, path) in absent_adapters(stage, &config).iter().filter(|(_, path)| path != Path::new(NO_ADAPTER)) {
        let (path, name) = (path.display(), stage.name());
        note!(
            "plan: {key} = \"{path}\" is not there yet: it is planned in the shape of [lora], and `fourfold {name}` will refuse to start \
             without it"
        );
    }
    let section = if stage == Stage::Reward { config.reward_base() } else { &config.base };
    let on_device = [section.device(), config.second_base(stage).device()].into_iter().any(dry::is_device);
    let limit = args.memory.filter(|_| !on_device).or(config.memory.limit).map(|limit| limit.0);
    // This machine may be another than the one with the device.
    let budget =
        if on_device { limit.map(|room| Budget { room, bound: LimitSource::Asked }) } else { Budget::of(limit) };
    let device_limit = args.memory.or(config.memory.device_limit).map(|size| size.0);
    let room = device_limit.map(|size| size.saturating_sub(dry::BESIDE));
    let shapes = |config: &Config| source.job(stage, config, room);
    let plan = plan::plan(stage, &config, budget, &shapes)?;
    let fits = plan.fits(budget);
    let change = if fits { None } else { plan::smallest_change(stage, &config, budget, &shapes)? };
    let choices = plan::choices(stage, &config, &shapes, &plan)?;
    let kto = source.kto_lengths(&config)?;
    let (config, source) = (&config, &source);
    let beside = config.rollouts(stage).ok().and_then(memory_beside);
    let plan = &plan;
    let shown = Shown { stage, ranks, config, source, plan, budget, device_limit, fits, change, choices, kto, beside };
    if args.json {
        print_json(&shown.json())?
    } else {
        say(&shown.table())?
    }
    let named = [args.memory, config.memory.limit, config.memory.device_limit].iter().any(Option::is_some);
    if named && !fits {
        let (stage, needs) = (stage.name(), plan.needs());
        return Err(invalid!("the {stage} stage does not fit the memory that was named; it needs {needs}"));
    }
    Ok(())
}

fn is_on_card(base: &config::Base) -> bool {
    dry::is_device(base.device())
}

/// Whether a base that lies on the CPU asks for layers that a card does not keep.
fn is_idle_offload(base: &config::Base) -> bool {
    base.offload() != Offload::None && !dry::is_device(base.device())
}

/// A path under which no adapter can lie, so that the reward model is planned with the shape of `[lora]`.
const NO_ADAPTER: &str = "/dev/null/adapter";

/// The config of a file, or the defaults over a base.
fn config(args: &Arguments) -> Result<Config> {
    match (&args.config, &args.base) {
        (Some(file), _) => config::load(file, &args.set).map_err(|error| {
            let is_model = file.is_dir() || file.extension().is_some_and(|ending| ending == "gguf" || ending == "json");
            let hint = || invalid!("plan wants a config, or --base {} with --phase sft, reward, …", file.display());
            if is_model { hint().context(error.to_string()) } else { error }
        }),
        (None, base) => {
            // JSON's string is TOML's; and PPO's section has to name a reward model.
            let path = base.as_deref().unwrap_or(Path::new("")).display().to_string();
            // Lengths may be set without data.
            let placeholder = "data.path=[\"none\"]".to_owned();
            let mut set = vec![format!("base.path={}", serde_json::to_string(&path)?), placeholder];
            if let Some(stage) = args.phase.map(data::Stage::of_config).filter(|stage| stage.has_rollouts()) {
                set.push(format!("{}.reward_adapter={NO_ADAPTER}", stage.name()));
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

/// The contents of the output.
struct Shown<'s> {
    stage: Stage,
    /// Ranks of the run, of which one is planned.
    ranks: usize,
    config: &'s Config,
    source: &'s PlanInputs,
    plan: &'s Plan,
    budget: Option<Budget>,
    /// Bytes that a device may be taken of, where that was named.
    device_limit: Option<usize>,
    fits: bool,
    change: Option<(Change, Plan)>,
    choices: Vec<(Change, Plan)>,
    /// KTO's longest sequence, and its longest prompt with another's response.
    kto: Option<(usize, usize)>,
    /// What a server that the run starts takes beside it, and the bytes of its model file where they are known.
    beside: Option<(String, Option<u64>)>,
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
            Stage::Distill => self.config.distill().per_device_train_batch_size,
            Stage::Ppo | Stage::Grpo | Stage::Rloo => self.config.ppo().map_or(0, |ppo| ppo.micro_batch_size),
        }
    }

    fn json(&self) -> Value {
        let (phase, peak) = self.plan.peak();
        let ran = self.plan.phases.iter().filter(|(_, bytes)| bytes.total() > 0);
        let change = |(change, plan): &(Change, Plan)| {
            let set: serde_json::Map<String, Value> =
                change.set.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect();
            let devices: usize = plan.devices.iter().map(DevicePlan::total).sum();
            json!({
                "set": set, "costs": change.costs, "own": plan.peak().1.own(), "total": plan.peak().1.total(),
                "device": devices,
            })
        };
        json!({
            "stage": self.stage.name(),
            "ranks": self.ranks,
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
                    "roles_share": device.sharing.name(),
                    "dequantise": self.plan.dequantised_on(device.device).map(|(name, how)| (name, how.into()))
                        .collect::<serde_json::Map<String, Value>>(),
                    "peak": {"phase": phase.name(), "bytes": peak},
                    "context": CONTEXT_BYTES,
                    "workspace": WORKSPACE_BYTES,
                    "total": device.total(),
                    "room": device.whole_room(self.device_limit),
                });
                (device.device.to_string(), of)
            }).collect::<serde_json::Map<_, _>>(),
            "offload": {
                "layers": self.plan.job.policy.offload.layers(),
                "second_base": self.plan.job.scorer.as_ref().map(|net| net.offload.layers()),
                "pinned": self.plan.job.pinned(),
            },
            "rollout_server": self.beside.as_ref().map(|(text, bytes)| json!({"model_bytes": bytes, "note": text})),
            "arrangements": Arrangement::ALL.map(|of| {
                let (phase, bytes) = of.peak(self.plan);
                json!({"name": of.name(), "phase": phase.name(), "bytes": classes(&bytes)})
            }),
        })
    }

    fn table(&self) -> String {
        let mut out = String::new();
        let lengths = match self.source.examples() {
            Some(n) => format!("lengths of {}", counted(n, "example")),
            None => "every sequence as long as [data] allows".into(),
        };
        let _ = writeln!(
            out,
            "{}: MiB by phase{}, {lengths}; checkpoint = {}, {} per pass\n",
            self.stage.name(),
            if self.ranks > 1 { format!(" of one of {} ranks", self.ranks) } else { String::new() },
            self.plan.checkpoint.name(),
            counted(self.micro_batch(), "example")
        );
        if let Some((own, mismatched)) = self.kto {
            let _ = writeln!(
                out,
                "longest sequence {own} tokens, longest prompt with another's response (the KL term) {mismatched}\n"
            );
        }
        let shown: Vec<MemoryCategory> =
            MemoryCategory::ALL.into_iter().filter(|&c| self.plan.phases.iter().any(|(_, b)| b.of(c) > 0)).collect();
        // Weights on a card are a column here alone.
        let roles = Arrangement::ALL.map(|of| (of.name(), of.peak(self.plan).1));
        let of_roles: Vec<MemoryCategory> = MemoryCategory::ALL
            .into_iter()
            .filter(|&c| shown.contains(&c) || roles.iter().any(|(_, bytes)| bytes.of(c) > 0))
            .collect();
        let head = |shown: &[MemoryCategory]| -> Vec<Cow<'_, str>> {
            shown.iter().map(|c| Cow::Borrowed(c.name())).chain([Cow::Borrowed("all")]).collect()
        };
        let line = |out: &mut String, name: &str, cells: &[Cow<'_, str>]| {
            let _ = write!(out, "{name:<24}");
            for cell in cells {
                let _ = write!(out, "{cell:>11}");
            }
            out.push('\n');
        };
        let cells = |shown: &[MemoryCategory], bytes: &Bytes| -> Vec<Cow<'_, str>> {
            let all = shown.iter().map(|&c| bytes.of(c)).chain([bytes.total()]);
            all.map(|b| Cow::Owned(format!("{:.1}", b as f64 / f64::from(1 << 20)))).collect()
        };
        line(&mut out, "phase", &head(&shown));
        for (phase, bytes) in self.plan.phases.iter().filter(|(_, bytes)| bytes.total() > 0) {
            line(&mut out, Phase::name(*phase), &cells(&shown, bytes));
        }
        out.push('\n');
        line(&mut out, "roles, at the peak", &head(&of_roles));
        for (name, bytes) in &roles {
            line(&mut out, name, &cells(&of_roles, bytes));
        }
        if !self.plan.devices.is_empty() {
            out += "(weights on a card are in these rows, its passes are not)\n";
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
            if let Some(room) = device.whole_room(self.device_limit) {
                let verdict = if device.fits(0) { "it fits" } else { "it does not fit" };
                let _ = writeln!(out, "room: {}; {verdict}", plan::text(room));
            }
        }
        for line in self.plan.offloaded().into_iter().chain(self.plan.dequantised()) {
            let _ = writeln!(out, "{line}");
        }
        if let Some((text, _)) = &self.beside {
            let _ = writeln!(out, "\n{text}");
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
            let _ = writeln!(out, "{:>10}  {}  ({})", plan::text(plan.total()), change.text(), change.costs);
        }
        out
    }
}
