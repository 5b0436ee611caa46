//! The memory preflight: whether a stage fits, decided before its folder is touched.
//!
//! It asks the planner with the opened bases, adapters and examples, and keeps what the planner chose. Read
//! `planner/plan.rs` next.

use anyhow::Result;
use serde_json::{Value, json};

use crate::config;
use crate::config::{Config, RecomputeSetting, Stage};
use crate::host::give_back_freed;
use crate::host::meter;
use crate::model::adapter::Adapter;
use crate::model::block::Recompute;
use crate::model_files::ModelFiles as Files;
use crate::planner::plan;
use crate::planner::plan::Plan;
use crate::planner::sim_allocator::MemoryCategory;
use crate::planner::simulate::shape::{Branches, Network};
use crate::planner::simulate::stages::{StageShape, Work};
use crate::report::number;
use crate::run::Model;
use crate::train::session::Session;

/// Refuses a base that is quantised as it opens and would not even lie in memory, before it is opened.
///
/// # Errors
/// If it does not fit, or its files cannot be read.
pub(crate) fn check_base(section: &config::Base, config: &Config, of: &str) -> Result<()> {
    if section.quantize.is_none() {
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
    /// The reward model's base, if it is another.
    pub scorer: Option<&'p Model>,
    /// The adapter that training starts from.
    pub start: &'p Adapter,
    /// The reward model's adapter.
    pub reward: Option<&'p Adapter>,
}

impl Parts<'_> {
    fn sections<'c>(&self, config: &'c Config) -> (&'c config::Base, &'c config::Base) {
        let policy = if self.stage == Stage::Reward { config.reward_base() } else { &config.base };
        (policy, config.reward_base())
    }

    fn networks(&self, config: &Config) -> Result<(Network, Option<Network>)> {
        let (policy, scorer) = self.sections(config);
        let other = self.scorer.map(|model| Network::of_section(&model.checkpoint, scorer)).transpose()?;
        Ok((Network::of_section(&self.policy.checkpoint, policy)?, other))
    }

    /// Asks the planner; `work` computes a config's passes.
    ///
    /// # Errors
    /// If the stage does not fit.
    pub fn admit(&self, config: &Config, work: impl Fn(&Config) -> Result<Work>) -> Result<MemoryPreflight> {
        let branches = Branches::of_adapter(self.start);
        let with_head = |branches: Branches| branches.with_head();
        let reward = self.reward.map_or_else(|| with_head(branches.clone()), Branches::of_adapter);
        give_back_freed();
        // The rest of the heap, beside bases and adapters, is tokenizer and examples.
        let (policy, scorer) = self.networks(config)?;
        let mut known =
            branches.bytes(&policy) + self.reward.map_or(0, |_| reward.bytes(scorer.as_ref().unwrap_or(&policy)));
        known +=
            [Some(&policy), scorer.as_ref()].into_iter().flatten().map(|net| net.owned + net.vectors()).sum::<usize>();
        let data = meter::current().saturating_sub(known);
        let shapes = |config: &Config| {
            let (policy, scorer) = self.networks(config)?;
            Ok(StageShape {
                policy,
                scorer,
                branches: branches.clone(),
                reward: reward.clone(),
                checkpoint: Recompute::Off,
                work: work(config)?,
                data,
                process: crate::host::beside_heap_bytes(),
                threads: crate::ops::cpu::pool::threads(),
            })
        };
        let plan = plan::admit(self.stage, config, &shapes)?;
        Ok(MemoryPreflight { asked: plan::asked(self.stage, config), plan })
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
    pub fn report(&self, session: &Session) -> Value {
        let (phase, peak) = self.plan.peak();
        let checkpoint = self.plan.checkpoint.name();
        let auto = if self.asked == RecomputeSetting::Auto { " (by memory)" } else { "" };
        let mapped = match peak.of(MemoryCategory::Mapped) {
            0 => String::new(),
            bytes => format!(" and {} of mapped base", plan::text(bytes)),
        };
        session.report.note(&format!(
            "memory: {} at most, in {}{mapped}; checkpoint = {checkpoint}{auto}",
            plan::text(peak.own()),
            phase.name()
        ));
        json!({
            "checkpoint": checkpoint,
            "peak_phase": phase.name(),
            "planned_mib": number(peak.own() as f64 / f64::from(1 << 20)),
            "mapped_mib": number(peak.of(MemoryCategory::Mapped) as f64 / f64::from(1 << 20)),
        })
    }
}
