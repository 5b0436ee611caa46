//! A memory plan: what a stage takes in each phase, what a limit leaves, and the smallest change with which it fits.
//!
//! It does not depend on a tokenizer: a [`Shapes`] translates a config into the shapes of its tensors. Read
//! `simulate/stages.rs` for the shapes, `changes.rs` for the changes, and `cli/plan.rs` for the table.

use anyhow::Result;

use crate::config::{Config, Offload, RecomputeSetting, Stage};
use crate::data::examples::batch_sampler::BatchSize;
use crate::data::examples::{Example, Examples};
use crate::device::{Device, DeviceChoice};
use crate::error::counted;
use crate::host::limits::{LimitSource, available, available_bytes, own_rss_bytes};
use crate::host::meter::Phase;
use crate::invalid;
use crate::model::adapter::Adapter;
use crate::model::base::Base;
use crate::model::block::Recompute;
use crate::model::readers::Sharing;
use crate::ops::linear::gpu::Dequantising;
use crate::planner::changes::{Change, changes, with_checkpoint};
use crate::planner::dry;
use crate::planner::dry::{DevicePlan, OnDevice};
use crate::planner::sim_allocator::{Bytes, MemoryCategory};
use crate::planner::simulate::shape::{Branches, Network};
use crate::planner::simulate::stages::StageShape;
use crate::planner::simulate::work::{Pass, Supervised, Work};
use crate::train::stop;

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

    /// What is left of it for a plan that the next run, too, must fit: one part in [`RESERVE`] and at least [`VARIES`] less.
    fn less_reserve(self) -> Self {
        Self { room: self.room.saturating_sub((self.room / RESERVE).max(VARIES)), ..self }
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

    /// What the roles that score a rollout have in common where they read one base on a device.
    pub fn sharing(&self) -> Sharing {
        self.devices.first().map_or(Sharing::Apart, |device| device.sharing)
    }

    /// How a base of these shapes dequantises its weights on a device.
    pub fn dequantise(&self, net: &Network) -> Dequantising {
        match net.dequantise {
            Dequantising::Auto => self.devices.first().map_or(Dequantising::InTurn, |device| device.dequantise),
            named => named,
        }
    }

    /// The bases that lie on devices: what each is called, its device and its shapes.
    fn on_devices(&self) -> impl Iterator<Item = (&'static str, DeviceChoice, &Network)> {
        let of = |on: &OnDevice| {
            [("base", on.policy, Some(&self.job.policy)), ("second base", on.scorer, self.job.scorer.as_ref())]
        };
        let nets = self.job.on_device.as_ref().map(of).into_iter().flatten();
        nets.filter_map(|(name, choice, net)| Some((name, choice, net.filter(|_| dry::is_device(choice))?)))
    }

    /// How each base on a device dequantises its weights: `base` and `second_base`, where they lie there.
    pub fn dequantised_on(&self, device: DeviceChoice) -> impl Iterator<Item = (String, &'static str)> {
        let there = self.on_devices().filter(move |(_, choice, _)| *choice == device);
        there.map(|(name, _, net)| (name.replace(' ', "_"), self.dequantise(net).name()))
    }

    /// One line for each base on a device that has weights to dequantise: how it does, and whether its memory decided.
    pub fn dequantised(&self) -> Vec<String> {
        let line = |(name, choice, net): (&str, DeviceChoice, &Network)| {
            let why = if net.dequantise == Dequantising::Auto { " (by memory)" } else { "" };
            format!("{choice}: dequantise = {} for the {name}{why}", self.dequantise(net).name())
        };
        self.on_devices().filter(|(.., net)| net.has_to_dequantise()).map(line).collect()
    }

    /// Whether host and devices have room for it.
    pub fn fits(&self, budget: Option<Budget>) -> bool {
        budget.is_none_or(|host| host.fits(&self.peak().1)) && self.devices.iter().all(|device| device.fits(0))
    }

    /// Whether host and devices have room for it and, too, for what differs from run to run.
    pub fn fits_with_reserve(&self, budget: Option<Budget>) -> bool {
        budget.is_none_or(|host| host.less_reserve().fits(&self.peak().1))
            && self.devices.iter().all(|device| device.fits(device.room.unwrap_or(0) / RESERVE))
    }

    /// One line for each base of which a device does not keep all layers: how many, the pinned memory, and what it costs; and one
    /// for the inputs of blocks that wait on the host.
    pub fn offloaded(&self) -> Vec<String> {
        let Some(on) = &self.job.on_device else { return vec![] };
        let line = |(name, choice, net): (&str, DeviceChoice, &Network)| {
            let why =
                if matches!(net.offload, Offload::Chosen(_)) { ", the fewest with which the run fits" } else { "" };
            let decodes = match &self.job.work {
                Work::Rollouts(_) => true,
                Work::Supervised(work) => work.response.is_some(),
            };
            let costs = match decodes && name == "base" {
                true => {
                    "; each step of decoding copies them all, whatever the number of sequences, so generate all responses \
                     at once"
                }
                false => "",
            };
            format!(
                "offload: {} of {} of the {name} {} not kept by {choice}{why}: {} of pinned host memory, copied at every \
                 pass{costs}",
                net.offload.layers(),
                counted(net.config.num_hidden_layers, "layer"),
                if net.offload.layers() == 1 { "is" } else { "are" },
                text(net.pinned())
            )
        };
        let inputs = Some(self.job.host_inputs(on)).filter(|&bytes| bytes > 0).map(|bytes| {
            format!(
                "checkpoint = offload: the blocks' inputs wait in {} of pinned host memory between forward and backward",
                text(bytes)
            )
        });
        self.on_devices().filter(|(.., net)| net.offload.layers() > 0).map(line).chain(inputs).collect()
    }

    /// Bytes that a saving is measured by: of the devices without what is beside their allocations, which no change saves, or of
    /// the host if there are none.
    pub fn size(&self) -> usize {
        match self.devices.is_empty() {
            true => self.peak().1.total(),
            false => self.devices.iter().map(|device| device.peak().1).sum(),
        }
    }

    /// The bytes at the peak: of the devices, as they count them, or of the host if there are none.
    pub fn total(&self) -> usize {
        match self.devices.is_empty() {
            true => self.peak().1.total(),
            false => self.devices.iter().map(DevicePlan::total).sum(),
        }
    }

    /// The bytes that must be there, in words.
    pub fn needs(&self) -> String {
        let host = text(self.peak().1.own());
        let devices: Vec<String> =
            self.devices.iter().map(|d| format!("{} of {}", text(d.total()), d.device)).collect();
        if devices.is_empty() { host } else { format!("{} and {host} of the host", devices.join(" and ")) }
    }

    /// The phase with the highest memory, and its bytes.
    pub fn peak(&self) -> (Phase, Bytes) {
        self.phases.into_iter().max_by_key(|(_, bytes)| bytes.own()).unwrap_or_default()
    }
}

/// The part of the room that is left free where there is a choice: the memory of the process beside its heap differs from run
/// to run.
pub const RESERVE: usize = 32;

/// What the process takes beside its heap differs from run to run by less than this, however little the run takes (0.54 MiB
/// over 180 runs): the next one, with the change or the memory that this one named, must fit.
pub const VARIES: usize = 1 << 20;

/// The plan of a config. `checkpoint = "auto"` keeps as much of the activations as lets the whole stay in memory,
/// mapped base included, and recomputes the rest. `offload = "auto"` takes as few layers from a device as let the rest fit, with
/// blocks recomputed, which costs less than copies.
///
/// # Errors
/// Those of `shapes`.
pub fn plan(stage: Stage, config: &Config, budget: Option<Budget>, shapes: &Shapes<'_>) -> Result<Plan> {
    stop::check()?;
    let plan = recomputing(stage, config, budget, shapes(config)?)?;
    let fits = |plan: &Plan| plan.fits_with_reserve(None);
    if fits(&plan) {
        return Ok(plan);
    }
    // All choices, the one with the fewest layers first: those of the policy's base, then those of the other one, too.
    let layers = |net: &Network| match net.offload {
        // The buffers take two layers' room.
        Offload::Auto => 3..=net.config.num_hidden_layers,
        Offload::None | Offload::Chosen(_) | Offload::Layers(_) => 0..=0,
    };
    let job = &plan.job;
    let (one, other) = (layers(&job.policy), job.scorer.as_ref().map(layers));
    let all = *one.end();
    let choices = one.map(|layers| (layers, 0)).chain(other.into_iter().flatten().map(|layers| (all, layers)));
    let choices: Vec<(usize, usize)> = choices.filter(|&choice| choice != (0, 0)).collect();
    let offloading = |&(policy, scorer): &(usize, usize)| {
        let take = |net: &mut Network, layers: usize| {
            if net.offload == Offload::Auto && layers > 0 {
                net.offload = Offload::Chosen(layers);
            }
        };
        let mut job = job.clone();
        take(&mut job.policy, policy);
        job.scorer.iter_mut().for_each(|net| take(net, scorer));
        Plan::of(job)
    };
    let Some(most) = choices.last() else { return Ok(plan) };
    let mut found = offloading(most)?;
    if !fits(&found) {
        return Ok(found);
    }
    // More layers take less, so that half of what is left is ruled out by each plan.
    let (mut low, mut high) = (0, choices.len() - 1);
    while low < high {
        let middle = usize::midpoint(low, high);
        stop::check()?;
        let tried = offloading(&choices[middle])?;
        if fits(&tried) {
            (high, found) = (middle, tried);
        } else {
            low = middle + 1;
        }
    }
    Ok(found)
}

/// The plan of shapes with what the config's `checkpoint` recomputes.
fn recomputing(stage: Stage, config: &Config, budget: Option<Budget>, job: StageShape) -> Result<Plan> {
    let with = |checkpoint| Plan::of(StageShape { checkpoint, ..job.clone() });
    match config.checkpoint(stage) {
        RecomputeSetting::None => with(Recompute::Off),
        RecomputeSetting::Mlp => with(Recompute::Mlp),
        RecomputeSetting::Block => with(Recompute::Block),
        // On the CPU the inputs are on the host anyway.
        RecomputeSetting::Offload if job.on_device.is_none() => with(Recompute::Block),
        RecomputeSetting::Offload => with(Recompute::Offload),
        RecomputeSetting::Auto => {
            for checkpoint in [Recompute::Off, Recompute::Mlp] {
                let plan = with(checkpoint)?;
                let on_host = budget.is_none_or(|budget| budget.is_comfortable(&plan.peak().1));
                if on_host && plan.fits_with_reserve(None) {
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
        RecomputeSetting::Offload => Recompute::Offload,
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
    let work = Supervised { step: vec![pass], steps: 3, ..Supervised::default() };
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
        on_host && plan.fits_with_reserve(None)
    };
    Recompute::AUTO.into_iter().find(fits).unwrap_or(Recompute::Block)
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
    first_change(stage, config, budget, shapes, &mut |_, plan| plan.fits_with_reserve(budget))
}

/// The first change, from the cheapest on, that `accept` takes with its plan; `None` where it takes none.
///
/// # Errors
/// Those of `shapes`.
pub fn first_change(
    stage: Stage,
    config: &Config,
    budget: Option<Budget>,
    shapes: &Shapes<'_>,
    accept: &mut dyn FnMut(&Change, &Plan) -> bool,
) -> Result<Option<(Change, Plan)>> {
    for change in changes(stage, config) {
        let plan = plan(stage, &change.config, budget, shapes)?;
        if accept(&change, &plan) {
            return Ok(Some((change, plan)));
        }
    }
    Ok(None)
}

/// The changes to choose from, the cheapest first, with the plan of each: smaller micro-batches, recomputation, fewer
/// responses at once, and so on. Each takes less than `current`, the config's own plan, whose recomputation it starts from; a
/// change that saves no memory over a cheaper one is left out.
///
/// # Errors
/// Those of `shapes`.
pub fn choices(stage: Stage, config: &Config, shapes: &Shapes<'_>, current: &Plan) -> Result<Vec<(Change, Plan)>> {
    let kept = with_checkpoint(
        stage,
        config,
        match current.checkpoint {
            Recompute::Off => RecomputeSetting::None,
            Recompute::Mlp => RecomputeSetting::Mlp,
            Recompute::Block => RecomputeSetting::Block,
            Recompute::Offload => RecomputeSetting::Offload,
        },
    );
    let mut all = vec![];
    let mut least = current.size();
    for change in changes(stage, &kept) {
        // One is enough: it takes as much as is missing, and its plans are many.
        if change.is_offloaded() && all.iter().any(|(before, _): &(Change, Plan)| before.is_offloaded()) {
            continue;
        }
        let plan = plan(stage, &change.config, None, shapes)?;
        // A saving of less than 1% does not count.
        if plan.size() < least - least / 100 {
            least = plan.size();
            all.push((change, plan));
        }
    }
    Ok(all)
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
    if plan.fits(budget) {
        return Ok(plan);
    }
    let change = smallest_change(stage, config, budget, shapes)?;
    let (phase, peak) = plan.peak();
    let what = match budget.filter(|budget| !budget.fits(&peak)) {
        Some(budget) => too_much_of_the_host(stage, phase, &peak, budget),
        None => too_much_of_a_device(stage, &plan, config.memory.device_limit.map(|limit| limit.0)),
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

fn too_much_of_a_device(stage: Stage, plan: &Plan, limit: Option<usize>) -> String {
    let Some(device) = plan.devices.iter().find(|device| !device.fits(0)) else { return String::new() };
    format!(
        "{} does not fit: its {} would take {} of {}, {} of it for the frozen weights and {} for the context and cuBLAS, and there is \
         room for {}",
        stage.name(),
        device.peak().0.name(),
        text(device.total()),
        device.device,
        text(device.base),
        text(dry::BESIDE),
        text(device.whole_room(limit).unwrap_or(0))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_that_is_named_leaves_room_for_what_differs_from_run_to_run() {
        let peak = |own: usize| {
            let mut bytes = Bytes::default();
            bytes.set(MemoryCategory::Blocks, own);
            bytes
        };
        // One part in 32 of a small room is less than the process differs by; of a large one it is more.
        for (room, left) in [(16 << 20, 15 << 20), (3 << 30, (3 << 30) / 32 * 31), (1 << 19, 0)] {
            let budget = Budget { room, bound: LimitSource::Asked };
            assert!(budget.less_reserve().fits(&peak(left)), "{room}");
            assert!(!budget.less_reserve().fits(&peak(left + 1)), "{room}");
            assert!(budget.fits(&peak(room)), "what was asked for itself needs no reserve");
        }
    }
}
