//! A memory plan: what a stage takes in each phase, what a limit leaves, and the changes that would make it fit.
//!
//! It does not depend on a tokenizer: a [`Shapes`] translates a config into the shapes of its tensors. Read
//! `simulate/stages.rs` for the shapes, and `cli/plan.rs` for the table.

use anyhow::Result;

use crate::config::{Config, Quantize, RecomputeSetting, Stage};
use crate::data::examples::batch_sampler::BatchSize;
use crate::data::examples::{Example, Examples};
use crate::device::{Device, DeviceChoice};
use crate::host::limits::{LimitSource, available, available_bytes, own_rss_bytes};
use crate::host::meter::Phase;
use crate::invalid;
use crate::model::adapter::Adapter;
use crate::model::base::Base;
use crate::model::block::Recompute;
use crate::planner::dry;
use crate::planner::dry::{DevicePlan, OnDevice};
use crate::planner::sim_allocator::{Bytes, MemoryCategory};
use crate::planner::simulate::shape::{Branches, Network};
use crate::planner::simulate::stages::{Pass, StageShape, Supervised, Work};

/// Translates a config into shapes; called again for each change that is tried.
pub type Shapes<'a> = dyn Fn(&Config) -> Result<StageShape> + 'a;

/// The memory that a run may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Bytes that are the process's own: all but mapped files.
    pub room: usize,
    /// The source of the limit.
    pub bound: LimitSource,
}

impl Budget {
    /// `limit`, or the memory that is free beside what this process holds already; `None` if the system reports no
    /// limit.
    pub fn of(limit: Option<usize>) -> Option<Self> {
        match limit {
            Some(room) => Some(Self { room, bound: LimitSource::Asked }),
            None => {
                let (free, bound) = available()?;
                Some(Self { room: free + own_rss_bytes().unwrap_or(0), bound })
            }
        }
    }

    /// Whether a run with this peak can go through. Mapped files do not count: the system drops their pages where it
    /// must. What the machine has free is a moment's figure and a plan is within 5%, so only what surely does not fit
    /// does not.
    pub fn fits(&self, peak: &Bytes) -> bool {
        let own = peak.own();
        if self.bound == LimitSource::Asked { own <= self.room } else { own - own / 20 <= self.room }
    }

    fn text(&self) -> String {
        let room = text(self.room);
        match self.bound {
            LimitSource::Asked => format!("[memory] limit is {room}"),
            LimitSource::Machine => format!("there are {room} for it"),
            LimitSource::Group => format!("the control group (cgroup) around it leaves {room} for it"),
            LimitSource::Addresses => format!("the limit on address space (ulimit -v) leaves {room} for it"),
            LimitSource::Private => format!("the limit on private memory (ulimit -d) leaves {room} for it"),
        }
    }

    /// Whether the mapped files stay in memory beside it, too: else the base is read from the disk again in every pass.
    pub fn is_comfortable(&self, peak: &Bytes) -> bool {
        // Of an address space the mapped files have taken their part, in memory or not.
        let needed = if self.bound == LimitSource::Addresses { peak.own() } else { peak.total() };
        needed <= self.room
    }
}

/// The memory plan of a stage.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The highest sum of each phase.
    pub phases: [(Phase, Bytes); Phase::ALL.len()],
    /// The activations that blocks recompute.
    pub checkpoint: Recompute,
    /// The shapes that were simulated.
    pub job: StageShape,
    /// The memory of each device that bases lie on.
    pub devices: Vec<DevicePlan>,
}

impl Plan {
    /// The plan of shapes as they are.
    ///
    /// # Errors
    /// Those of passes on a device that counts.
    pub fn of(job: StageShape) -> Result<Self> {
        Ok(Self { phases: job.walk(), checkpoint: job.checkpoint, devices: dry::walk(&job)?, job })
    }

    /// Whether host and devices have room for it, with a reserve of one part in `reserve`.
    pub fn fits(&self, budget: Option<Budget>, reserve: Option<usize>) -> bool {
        let spare = |room: usize| reserve.map_or(0, |part| room / part);
        let host = budget.map(|budget| Budget { room: budget.room - spare(budget.room), ..budget });
        host.is_none_or(|host| host.fits(&self.peak().1))
            && self.devices.iter().all(|device| device.fits(device.room.map_or(0, spare)))
    }

    /// Bytes that a saving is measured by: of the devices, or of the host if there are none.
    pub fn size(&self) -> usize {
        match self.devices.is_empty() {
            true => self.peak().1.total(),
            false => self.devices.iter().map(|device| device.peak().1).sum(),
        }
    }

    /// The bytes that must be there, in words.
    pub fn needs(&self) -> String {
        let host = text(self.peak().1.own());
        let devices: Vec<String> =
            self.devices.iter().map(|d| format!("{} of {}", text(d.peak().1), d.device)).collect();
        if devices.is_empty() { host } else { format!("{} and {host} of the host", devices.join(" and ")) }
    }

    /// The phase with the highest memory, and its bytes.
    pub fn peak(&self) -> (Phase, Bytes) {
        self.phases.into_iter().max_by_key(|(_, bytes)| bytes.own()).unwrap_or_default()
    }
}

/// A change of settings that needs less.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// Keys and values, as `--set` takes them.
    pub set: Vec<(String, String)>,
    /// The cost of the change, in words.
    pub costs: String,
    /// The changed config.
    pub config: Config,
}

impl Change {
    /// `ppo.micro_batch_size=2 ppo.checkpoint="block"`.
    pub fn text(&self) -> String {
        self.set.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
    }
}

/// The `checkpoint` key of a stage's section.
pub fn asked(stage: Stage, config: &Config) -> RecomputeSetting {
    config.optimisation(stage).map(|keys| keys.checkpoint).unwrap_or_default()
}

fn with_checkpoint(stage: Stage, config: &Config, checkpoint: RecomputeSetting) -> Config {
    let mut config = config.clone();
    config.set_checkpoint(stage, checkpoint);
    config
}

/// The part of the room that is left free where there is a choice: the memory of the process beside its heap differs from run
/// to run.
const RESERVE: usize = 32;

/// The plan of a config. `checkpoint = "auto"` keeps as much of the activations as lets the whole stay in memory,
/// mapped base included, and recomputes the rest.
///
/// # Errors
/// Those of `shapes`.
pub fn plan(stage: Stage, config: &Config, budget: Option<Budget>, shapes: &Shapes<'_>) -> Result<Plan> {
    let job = shapes(config)?;
    let with = |checkpoint| Plan::of(StageShape { checkpoint, ..job.clone() });
    match asked(stage, config) {
        RecomputeSetting::None => with(Recompute::Off),
        RecomputeSetting::Mlp => with(Recompute::Mlp),
        RecomputeSetting::Block => with(Recompute::Block),
        RecomputeSetting::Auto => {
            for checkpoint in [Recompute::Off, Recompute::Mlp] {
                let plan = with(checkpoint)?;
                let on_host = budget.is_none_or(|budget| budget.is_comfortable(&plan.peak().1));
                if on_host && plan.fits(None, Some(RESERVE)) {
                    return Ok(plan);
                }
            }
            with(Recompute::Block)
        }
    }
}

/// The activations that blocks recompute under a `checkpoint` key. `auto` saves as many as fit into free memory during
/// a training pass of `tokens` tokens over an open base. For callers without a [`Plan`] of the whole run: quickstart,
/// benchmarks and tests.
pub fn resolve(setting: RecomputeSetting, base: &Base, adapter: &Adapter, tokens: usize) -> Recompute {
    match setting {
        RecomputeSetting::None => Recompute::Off,
        RecomputeSetting::Mlp => Recompute::Mlp,
        RecomputeSetting::Block => Recompute::Block,
        RecomputeSetting::Auto => largest_that_fits(base, adapter, tokens),
    }
}

/// The most tokens that one batch of these examples can have.
pub fn largest_batch<T: Example>(batch: BatchSize, examples: &(impl Examples<T> + ?Sized)) -> usize {
    let longest = (0..examples.len()).map(|i| examples.tokens(i)).max().unwrap_or(0);
    match batch {
        BatchSize::Examples(count) => longest * count,
        BatchSize::Tokens(most) => longest.max(most),
    }
}

fn largest_that_fits(base: &Base, start: &Adapter, tokens: usize) -> Recompute {
    let Ok(policy) = Network::of_base(base) else { return Recompute::Off };
    let free = available_bytes();
    let on_device = base.place().map(|device| on_device(device, start));
    if free.is_none() && on_device.is_none() {
        return Recompute::Off;
    }
    let pass = Pass { lengths: vec![tokens], targets: tokens };
    let work = Supervised { step: vec![pass], reference: vec![], evaluation: None, scorer: false, steps: 3 };
    let standing = policy.owned + policy.mapped + policy.vectors();
    let job = StageShape {
        policy,
        scorer: None,
        branches: Branches::of_adapter(start),
        reward: Branches::of_adapter(start),
        checkpoint: Recompute::Off,
        work: Work::Supervised(work),
        data: 0,
        process: 0,
        threads: crate::ops::cpu::pool::threads(),
        on_device,
    };
    let fits = |&checkpoint: &Recompute| {
        let Ok(plan) = Plan::of(StageShape { checkpoint, ..job.clone() }) else { return false };
        let on_host = free.is_none_or(|free| plan.peak().1.total().saturating_sub(standing) <= free);
        on_host && plan.fits(None, Some(RESERVE))
    };
    Recompute::ALL.into_iter().find(fits).unwrap_or(Recompute::Block)
}

/// A base on an open device, with an adapter over it. The device's name does not matter here.
fn on_device(device: &Device, start: &Adapter) -> OnDevice {
    let (choice, room) = (DeviceChoice::Cuda(0), device.room().ok().flatten());
    OnDevice {
        policy: choice,
        scorer: choice,
        start: start.clone(),
        reward: start.clone(),
        rooms: room.map(|room| (choice, room)).into_iter().collect(),
    }
}

/// The smallest change with which the stage fits, tried from the cheapest on; `None` where none does.
///
/// # Errors
/// Those of `shapes`.
pub fn smallest_change(
    stage: Stage,
    config: &Config,
    budget: Option<Budget>,
    shapes: &Shapes<'_>,
) -> Result<Option<(Change, Plan)>> {
    for change in changes(stage, config) {
        let plan = plan(stage, &change.config, budget, shapes)?;
        if plan.fits(budget, Some(RESERVE)) {
            return Ok(Some((change, plan)));
        }
    }
    Ok(None)
}

/// The changes to choose from, the cheapest first, with the plan of each: smaller micro-batches, recomputation, fewer
/// responses at once, and so on. A change that saves no memory over a cheaper one is left out.
///
/// # Errors
/// Those of `shapes`.
pub fn choices(stage: Stage, config: &Config, shapes: &Shapes<'_>) -> Result<Vec<(Change, Plan)>> {
    let auto = asked(stage, config) == RecomputeSetting::Auto;
    let kept = if auto { with_checkpoint(stage, config, RecomputeSetting::None) } else { config.clone() };
    let mut all = vec![];
    let mut least = plan(stage, &kept, None, shapes)?.size();
    for change in changes(stage, &kept) {
        let plan = plan(stage, &change.config, None, shapes)?;
        // A saving of less than 1% does not count.
        if plan.size() < least - least / 100 {
            least = plan.size();
            all.push((change, plan));
        }
    }
    Ok(all)
}

/// A key that can be made smaller, as a stage's section has it.
struct Knob {
    stage: Stage,
    value: usize,
    set: fn(Stage, &mut Config, usize) -> Vec<(String, String)>,
}

fn pair(key: &str, value: impl ToString) -> (String, String) {
    (key.to_owned(), value.to_string())
}

/// The key that sets the size of a micro-batch.
fn micro_batch(stage: Stage, config: &Config) -> Option<Knob> {
    let Some(keys) = config.supervised(stage) else {
        let value = config.ppo().ok()?.micro_batch_size;
        return Some(Knob { stage, value, set: set_micro_batch });
    };
    Some(match keys.max_tokens_per_batch {
        Some(value) => Knob { stage, value, set: set_tokens },
        None => Knob { stage, value: keys.per_device_train_batch_size, set: set_batch },
    })
}

fn set_micro_batch(_: Stage, config: &mut Config, size: usize) -> Vec<(String, String)> {
    if let Some(ppo) = &mut config.ppo {
        ppo.micro_batch_size = size;
    }
    vec![pair("ppo.micro_batch_size", size)]
}

fn set_tokens(stage: Stage, config: &mut Config, size: usize) -> Vec<(String, String)> {
    if let Some(section) = config.supervised_mut(stage) {
        section.set_tokens(size);
    }
    vec![pair(&format!("{}.max_tokens_per_batch", stage.name()), size)]
}

/// Sets the examples per micro-batch, with as many micro-batches per step as keep the step's examples.
fn set_batch(stage: Stage, config: &mut Config, size: usize) -> Vec<(String, String)> {
    let Some(section) = config.supervised_mut(stage) else { return vec![] };
    let keys = section.supervised();
    let accumulation = (keys.per_device_train_batch_size * keys.gradient_accumulation_steps).div_ceil(size);
    section.set_batch(size, accumulation);
    vec![
        pair(&format!("{}.per_device_train_batch_size", stage.name()), size),
        pair(&format!("{}.gradient_accumulation_steps", stage.name()), accumulation),
    ]
}

/// All changes that are tried, the cheapest first: smaller micro-batches cost next to nothing, recomputation half a
/// forward or a whole one, a quantised base some accuracy, shorter or fewer sequences another training.
fn changes(stage: Stage, config: &Config) -> Vec<Change> {
    let blank = Change { set: vec![], costs: String::new(), config: config.clone() };
    let recomputes: &[Recomputed] = match asked(stage, config) {
        RecomputeSetting::None => &RECOMPUTED,
        RecomputeSetting::Mlp => &RECOMPUTED[1..],
        RecomputeSetting::Block | RecomputeSetting::Auto => &[],
    };
    let mut cuts = halved(0.03, vec![(0.0, blank)], micro_batch(stage, config), |times| {
        format!("frozen weights are unpacked {times} times as often in updates")
    });
    if stage == Stage::Ppo {
        cuts = halved(0.05, cuts, at_once(config), |times| format!("answers are sampled in {times} turns"));
    }
    let least = cuts.last().map(|(_, change)| change.clone());
    let mut ladder: Vec<(f64, Change)> = vec![];
    for (price, cut) in cuts {
        if !cut.set.is_empty() {
            ladder.push((price, cut.clone()));
        }
        for recomputed in recomputes {
            ladder.push((recomputed.price + price, recomputing(stage, cut.clone(), recomputed)));
        }
    }
    ladder.sort_by(|(a, _), (b, _)| a.total_cmp(b));
    let least = least.map(|least| match recomputes.last() {
        Some(recomputed) => recomputing(stage, least, recomputed),
        None => least,
    });
    let mut all: Vec<Change> = ladder.into_iter().map(|(_, change)| change).collect();
    // On top of the last of them: changes that affect more than time.
    let mut last = least.unwrap_or(Change { set: vec![], costs: String::new(), config: config.clone() });
    for (quantize, name, costs) in [
        (Quantize::Q8_0, "q8_0", "weights of a dense base are rounded to 8.5 bits"),
        (Quantize::Q4K, "q4_k", "weights of a dense base are rounded to 4.5 bits"),
    ] {
        if config.base.quantize.is_none() || (config.base.quantize == Some(Quantize::Q8_0) && name == "q4_k") {
            let mut change = last.clone();
            change.config.base.quantize = Some(quantize);
            change.set.push(pair("base.quantize", name));
            change.costs = join(&change.costs, costs);
            if let Some(other) = &mut change.config.reward_base {
                other.quantize = Some(quantize);
                change.set.push(pair("reward_base.quantize", name));
            }
            all.push(change);
        }
    }
    if stage == Stage::Ppo {
        for _ in 0..6 {
            let Some(ppo) = &mut last.config.ppo else { break };
            ppo.response_length = ppo.response_length.div_ceil(2);
            let mut shorter = last.clone();
            shorter.set.push(pair("ppo.response_length", shorter.config.ppo().map_or(0, |ppo| ppo.response_length)));
            shorter.costs = join(&shorter.costs, "shorter answers");
            all.push(shorter);
        }
        return all;
    }
    for _ in 0..6 {
        let Some(data) = &mut last.config.data else { break };
        data.max_length = data.max_length.div_ceil(2);
        let mut shorter = last.clone();
        shorter.set.push(pair("data.max_length", last.config.data.as_ref().map_or(0, |data| data.max_length)));
        shorter.costs = join(&shorter.costs, "longer records are dropped or cut");
        all.push(shorter);
    }
    all
}

/// Each of `from` with the knob at its value, half of it, a quarter, down to 1; `price` is what a halving costs.
fn halved(
    price: f64,
    from: Vec<(f64, Change)>,
    knob: Option<Knob>,
    costs: impl Fn(u32) -> String,
) -> Vec<(f64, Change)> {
    let Some(knob) = knob else { return from };
    let mut all = from.clone();
    let (mut size, mut halvings) = (knob.value, 0);
    while size > 1 && halvings < 24 {
        (size, halvings) = (size.div_ceil(2), halvings + 1);
        for (before, change) in &from {
            let mut change = change.clone();
            let set = (knob.set)(knob.stage, &mut change.config, size);
            change.set.extend(set);
            change.costs = join(&change.costs, &costs(1 << halvings));
            all.push((before + price * f64::from(halvings), change));
        }
    }
    all
}

/// The key that says how many prompts are answered at once.
fn at_once(config: &Config) -> Option<Knob> {
    Some(Knob {
        value: config.ppo().ok()?.at_once(),
        stage: Stage::Ppo,
        set: |_, config, size| {
            if let Some(ppo) = &mut config.ppo {
                ppo.local_rollout_forward_batch_size = Some(size);
            }
            vec![pair("ppo.local_rollout_forward_batch_size", size)]
        },
    })
}

/// A way to save less between forward and backward.
struct Recomputed {
    checkpoint: RecomputeSetting,
    name: &'static str,
    costs: &'static str,
    price: f64,
}

/// All, the cheapest first.
const RECOMPUTED: [Recomputed; 2] = [
    Recomputed {
        checkpoint: RecomputeSetting::Mlp,
        name: Recompute::Mlp.name(),
        costs: "half a forward more in every update",
        price: 0.2,
    },
    Recomputed {
        checkpoint: RecomputeSetting::Block,
        name: Recompute::Block.name(),
        costs: "one more forward in every update",
        price: 0.4,
    },
];

fn recomputing(stage: Stage, change: Change, by: &Recomputed) -> Change {
    let mut set = change.set;
    set.push(pair(&format!("{}.checkpoint", stage.name()), by.name));
    let costs = join(&change.costs, by.costs);
    Change { set, costs, config: with_checkpoint(stage, &change.config, by.checkpoint) }
}

fn join(one: &str, other: &str) -> String {
    if one.is_empty() { other.to_owned() } else { format!("{one}; {other}") }
}

/// `812 MiB`, `3.4 GiB`.
pub fn text(bytes: usize) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    match mib {
        m if m >= 10_000.0 => format!("{:.1} GiB", m / 1024.0),
        m if m >= 10.0 => format!("{m:.0} MiB"),
        m => format!("{m:.1} MiB"),
    }
}

/// The plan of a stage that is about to start.
///
/// # Errors
/// If it would not fit: the memory it needs, in which phase, the memory available, and the smallest change that fits.
pub fn admit(stage: Stage, config: &Config, shapes: &Shapes<'_>) -> Result<Plan> {
    let budget = Budget::of(config.memory.limit.map(|limit| limit.0));
    let plan = plan(stage, config, budget, shapes)?;
    if plan.fits(budget, None) {
        return Ok(plan);
    }
    let change = smallest_change(stage, config, budget, shapes)?;
    let (phase, peak) = plan.peak();
    let what = match budget.filter(|budget| !budget.fits(&peak)) {
        Some(budget) => too_much_of_the_host(stage, phase, &peak, budget),
        None => too_much_of_a_device(stage, &plan),
    };
    Err(refusal(&what, change.as_ref()))
}

/// Refuses a base that does not fit into memory by itself.
///
/// # Errors
/// If it cannot: the memory it takes, and the memory available.
pub fn admit_base(net: &Network, budget: Budget, of: &str) -> Result<()> {
    let mut peak = Bytes::default();
    peak.set(MemoryCategory::Base, net.owned + net.vectors());
    if budget.fits(&peak) {
        return Ok(());
    }
    let smaller = "quantize = \"q4_k\", or a GGUF file, which is mapped and not held";
    Err(invalid!(
        "[{of}] does not fit: quantised as it is asked for it takes {} of memory, and {}; take {smaller}",
        text(peak.own()),
        budget.text()
    ))
}

fn too_much_of_a_device(stage: Stage, plan: &Plan) -> String {
    let Some(device) = plan.devices.iter().find(|device| !device.fits(0)) else { return String::new() };
    let (phase, peak) = device.peak();
    format!(
        "{} does not fit: its {} would take {} of {}, {} of it for the frozen weights, and there is room for {}",
        stage.name(),
        phase.name(),
        text(peak),
        device.device,
        text(device.base),
        text(device.room.unwrap_or(0))
    )
}

fn too_much_of_the_host(stage: Stage, phase: Phase, peak: &Bytes, budget: Budget) -> String {
    let have = budget.text();
    let most = MemoryCategory::ALL
        .into_iter()
        .filter(|&c| c != MemoryCategory::Mapped)
        .max_by_key(|&c| peak.of(c))
        .unwrap_or(MemoryCategory::Base);
    format!(
        "{} does not fit: its {} would take {} of memory, {} of it for {}, and {have}",
        stage.name(),
        phase.name(),
        text(peak.own()),
        text(peak.of(most)),
        most.name()
    )
}

fn refusal(what: &str, change: Option<&(Change, Plan)>) -> anyhow::Error {
    match change {
        Some((change, plan)) => invalid!(
            "{what}; the smallest change that fits, in {}: --set {} ({})",
            plan.needs(),
            change.set.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(" --set "),
            change.costs
        ),
        None => {
            invalid!("{what}; no smaller batch, shorter sequence or quantised base fits either: take a smaller model")
        }
    }
}

/// What the same training takes with other arrangements of the four roles' weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// Four networks, two of them trained in full.
    FullModels,
    /// An adapter for each of four bases.
    FourBases,
    /// A base for actor and reference, one for critic and reward model.
    TwoBases,
    /// One base for all.
    OneBase,
}

impl Arrangement {
    /// All, the largest first.
    pub const ALL: [Self; 4] = [Self::FullModels, Self::FourBases, Self::TwoBases, Self::OneBase];

    /// For tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::FullModels => "four full models",
            Self::FourBases => "LoRA, four bases",
            Self::TwoBases => "LoRA, two shared bases",
            Self::OneBase => "LoRA, one shared base",
        }
    }

    /// The plan's peak with this arrangement. Activations, caches and data are the plan's own; four full models have
    /// their weights, gradients of actor and critic, and AdamW's means: all in f32 where the base is, else weights and
    /// gradients in 2 bytes a number and means and a master copy in f32 (mixed precision).
    pub fn peak(self, plan: &Plan) -> (Phase, Bytes) {
        let all = plan.phases.map(|(phase, bytes)| (phase, self.bytes(plan, bytes)));
        all.into_iter().max_by_key(|(_, bytes)| bytes.own()).unwrap_or_default()
    }

    fn bytes(self, plan: &Plan, mut bytes: Bytes) -> Bytes {
        if bytes.total() == 0 {
            return bytes;
        }
        let (roles, trained) = match &plan.job.work {
            Work::Rollouts(_) => (4, 2),
            Work::Supervised(_) => (1, 1),
        };
        let net = &plan.job.policy;
        let copies = match self {
            Self::FullModels => {
                let weights = |net: &Network| net.parameters() * if is_f32(net) { 4 } else { 2 };
                bytes.set(MemoryCategory::Mapped, 0);
                bytes.set(MemoryCategory::Base, roles * weights(net));
                bytes.set(MemoryCategory::Adapters, 0);
                bytes.set(MemoryCategory::Gradients, trained * weights(net));
                let means = if is_f32(net) { 8 } else { 12 };
                bytes.set(MemoryCategory::Optimizer, trained * net.parameters() * means);
                return bytes;
            }
            Self::FourBases => roles,
            Self::TwoBases => roles.min(2),
            Self::OneBase => 1,
        };
        // A second base that the config has is there already.
        let have = if plan.job.scorer.is_some() { 2 } else { 1 };
        let one = |class: MemoryCategory| bytes.of(class) / have;
        let (base, mapped) = (one(MemoryCategory::Base), one(MemoryCategory::Mapped));
        bytes.set(MemoryCategory::Base, copies * base);
        bytes.set(MemoryCategory::Mapped, copies * mapped);
        bytes
    }
}

fn is_f32(net: &Network) -> bool {
    use crate::ops::weight::StorageDType;
    net.stored.first().is_some_and(|row| row[0] == StorageDType::F32)
}
