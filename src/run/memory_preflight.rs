//! The memory preflight: whether a stage fits, decided before its folder is touched.
//!
//! It asks the planner with the opened bases, adapters and examples, and keeps what the planner chose. Read
//! `planner/plan.rs` next.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};

use crate::config;
use crate::config::{Config, RecomputeSetting, Stage};
use crate::host::give_back_all_freed;
use crate::host::meter;
use crate::model::adapter::Adapter;
use crate::model::block::Recompute;
use crate::model_files::ModelFiles as Files;
use crate::planner::dry;
use crate::planner::dry::OnDevice;
use crate::planner::plan;
use crate::planner::plan::Plan;
use crate::planner::sim_allocator::MemoryCategory;
use crate::planner::simulate::shape::{Branches, Network};
use crate::planner::simulate::stages::StageShape;
use crate::planner::simulate::work::Work;
use crate::report::number;
use crate::run::Model;
use crate::run::offload::policy_section;
use crate::train::session::Session;

/// Refuses a base that is quantised as it opens and would not even lie in memory, before it is opened.
///
/// # Errors
/// If it does not fit, or its files cannot be read.
pub(crate) fn check_base(section: &config::Base, config: &Config, of: &str) -> Result<()> {
    if section.quantize.is_none() || dry::is_device(section.device()) {
        return Ok(());
    }
    let Some(budget) = plan::Budget::of(config.memory.limit.map(|limit| limit.0)) else { return Ok(()) };
    let net = Network::of_section(&Files::open(&section.path)?, section)?;
    plan::admit_base(&net, budget, of)
}

/// The opened bases and adapters of a stage.
pub(crate) struct Parts<'p> {
    pub stage: Stage,
    /// The base that is trained over: the policy's.
    pub policy: &'p Model,
    /// The reward model's base, or the teacher's, if it is another.
    pub scorer: Option<&'p Model>,
    /// The adapter that training starts from.
    pub start: &'p Adapter,
    /// The reward model's adapter, or the teacher's.
    pub reward: Option<&'p Adapter>,
}

impl Parts<'_> {
    fn sections<'c>(&self, config: &'c Config) -> (&'c config::Base, &'c config::Base) {
        (policy_section(self.stage, config), config.second_base(self.stage))
    }

    fn networks(&self, config: &Config) -> Result<(Network, Option<Network>)> {
        let (policy, scorer) = self.sections(config);
        let other = self.scorer.map(|model| Network::of_section(&model.checkpoint, scorer)).transpose()?;
        Ok((Network::of_section(&self.policy.checkpoint, policy)?, other))
    }

    /// Where the bases lie; `None` if both lie on the CPU.
    fn on_device(&self, config: &Config, policy: &config::Base) -> Result<Option<OnDevice>> {
        let (policy, scorer) = (policy.device(), config.second_base(self.stage).device());
        let mut rooms = BTreeMap::new();
        let limit = config.memory.device_limit.map(|limit| limit.0.saturating_sub(dry::BESIDE));
        for (choice, model) in [(policy, Some(self.policy)), (scorer, self.scorer)] {
            if let Some(device) = model.and_then(|model| model.base.place()) {
                rooms.extend(limit.map_or_else(|| device.room(), |limit| Ok(Some(limit)))?.map(|room| (choice, room)));
            }
        }
        if ![policy, scorer].into_iter().any(dry::is_device) {
            return Ok(None);
        }
        let reward = match self.reward {
            Some(reward) => reward.clone(),
            None => self.start.clone(),
        };
        let reward = if reward.head().is_some() { reward } else { reward.with_head(0)? };
        Ok(Some(OnDevice { policy, scorer, start: self.start.clone(), reward, rooms }))
    }

    /// Asks the planner; `work` computes a config's passes.
    ///
    /// # Errors
    /// If the stage does not fit.
    pub fn admit(&self, config: &Config, work: impl Fn(&Config) -> Result<Work>) -> Result<MemoryPreflight> {
        let branches = Branches::of_adapter(self.start);
        let with_head = |branches: Branches| branches.with_head();
        let reward = self.reward.map_or_else(|| with_head(branches.clone()), Branches::of_adapter);
        give_back_all_freed();
        // The rest of the heap, beside bases and adapters, is tokenizer and examples.
        let (policy, scorer) = self.networks(config)?;
        let mut known =
            branches.bytes(&policy) + self.reward.map_or(0, |_| reward.bytes(scorer.as_ref().unwrap_or(&policy)));
        // What a device holds, the host does not.
        let held = |net: &Network, model: &Model| match model.base.place() {
            Some(_) => net.vectors(),
            None => net.owned + net.vectors(),
        };
        known +=
            held(&policy, self.policy) + scorer.as_ref().zip(self.scorer).map_or(0, |(net, model)| held(net, model));
        let data = meter::current().saturating_sub(known);
        // Once: what the plans themselves take of the process is free again before the run, and all are compared.
        let process = crate::host::beside_heap_bytes();
        let shapes = |config: &Config| {
            let (policy, scorer) = self.networks(config)?;
            Ok(StageShape {
                on_device: self.on_device(config, policy_section(self.stage, config))?,
                policy,
                scorer,
                branches: branches.clone(),
                reward: reward.clone(),
                checkpoint: Recompute::Off,
                work: work(config)?,
                data,
                process,
                threads: crate::ops::cpu::pool::threads(),
            })
        };
        let plan = plan::admit(self.stage, config, &shapes)?;
        let nets = [(Some(self.policy), Some(&plan.job.policy)), (self.scorer, plan.job.scorer.as_ref())];
        for (model, net) in nets.into_iter().filter_map(|(model, net)| model.zip(net)) {
            model.base.set_dequantise(plan.dequantise(net));
        }
        Ok(MemoryPreflight { asked: config.checkpoint(self.stage), plan })
    }
}

/// The planner's verdict on a stage that fits.
pub(crate) struct MemoryPreflight {
    asked: RecomputeSetting,
    /// What the run will hold in memory, and what its blocks recompute.
    pub plan: Plan,
}

impl MemoryPreflight {
    /// Reports what was decided, and returns it for the summary.
    pub fn report(&self, session: &mut Session) -> Value {
        let (phase, peak) = self.plan.peak();
        let checkpoint = self.plan.checkpoint.name();
        let why = match self.asked {
            RecomputeSetting::Auto => " (by memory)",
            RecomputeSetting::Offload if self.plan.checkpoint != Recompute::Offload => {
                " (on the CPU, the blocks' inputs are on the host anyway)"
            }
            _ => "",
        };
        let mapped = match peak.of(MemoryCategory::Mapped) {
            0 => String::new(),
            bytes => format!(" and {} of the base's mapped file", plan::text(bytes)),
        };
        session.report.note(&format!(
            "memory: {} of heap and stacks at most, in {}; resident memory (RSS) has the program{mapped} beside it; \
             checkpoint = {checkpoint}{why}",
            plan::text(peak.own()),
            phase.name()
        ));
        for device in &self.plan.devices {
            let (phase, bytes) = device.peak();
            session.report.note(&format!(
                "memory of {}: {} at most, in {}, {} of it for the frozen weights",
                device.device,
                plan::text(bytes),
                phase.name(),
                plan::text(device.base)
            ));
        }
        self.plan.offloaded().iter().chain(&self.plan.dequantised()).for_each(|line| session.report.note(line));
        let mib = |bytes: usize| number(bytes as f64 / f64::from(1 << 20));
        for (phase, bytes) in self.plan.phases.iter().filter(|(_, bytes)| bytes.own() > 0) {
            session.report.fact(&format!("memory/{}", phase.name()), &mib(bytes.own()));
        }
        let devices = self.plan.devices.iter().map(|device| (device.device.to_string(), mib(device.peak().1)));
        json!({
            "checkpoint": checkpoint,
            "device_mib": devices.collect::<serde_json::Map<_, _>>(),
            "peak_phase": phase.name(),
            "planned_mib": number(peak.own() as f64 / f64::from(1 << 20)),
            "mapped_mib": number(peak.of(MemoryCategory::Mapped) as f64 / f64::from(1 << 20)),
        })
    }
}
