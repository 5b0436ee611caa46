//! `offload = "auto"`, settled before a base is opened: the planner reads the headers of the bases and the lengths of the
//! examples, and takes as few layers from a device as let the whole run fit, or one of its ranks.
//!
//! It does not depend on a stage's loop. Read `planner/plan.rs` for the search, and `model/stream.rs` for the layers.

use anyhow::Result;

use super::PlanInputs;
use crate::config::{self, Config, Offload, Stage};
use crate::device::select;
use crate::planner::plan::{self, Budget};
use crate::planner::{dry, simulate::shape::Network};

/// The config with a number of layers for each base that says `"auto"`. Nothing is read where none does.
///
/// # Errors
/// Those of a plan: bases or records that cannot be used.
pub(super) fn chosen(stage: Stage, config: &Config, ranks: usize) -> Result<Config> {
    let mut config = config.clone();
    let asks = |section: &config::Base| section.offload() == Offload::Auto && dry::is_device(section.device());
    let used = [policy_section(stage, &config), config.second_base(stage)];
    if !used.into_iter().any(asks) {
        return Ok(config);
    }
    let mut room = config.memory.device_limit.map(|limit| limit.0.saturating_sub(dry::BESIDE));
    if room.is_none() {
        for section in used {
            if let Some(free) = select(section.device())?.device.map_or(Ok(None), |device| device.room())? {
                room = Some(room.map_or(free, |room| room.min(free)));
            }
        }
    }
    let of_all = config.of_ranks(stage, ranks);
    let inputs = PlanInputs::open(stage, &of_all, ranks)?;
    let budget = Budget::of(config.memory.limit.map(|limit| limit.0));
    let job = plan::plan(stage, &of_all, budget, &|config| inputs.job(stage, config, room))?.job;
    let layers = |net: &Network| net.offload.layers();
    let (policy, other) = (layers(&job.policy), layers(job.scorer.as_ref().unwrap_or(&job.policy)));
    let shared = job.scorer.is_none();
    let is_policys = |section: &config::Base| shared || section == policy_section(stage, &config);
    let take = |section: &config::Base| match (asks(section), is_policys(section)) {
        (false, _) => section.offload,
        (true, true) => Some(Offload::Chosen(policy)),
        (true, false) => Some(Offload::Chosen(other)),
    };
    let base = take(&config.base);
    let [reward_base, teacher] = [&config.reward_base, &config.teacher].map(|section| section.as_ref().map(take));
    config.base.offload = base;
    config.reward_base.iter_mut().zip(reward_base).for_each(|(section, offload)| section.offload = offload);
    config.teacher.iter_mut().zip(teacher).for_each(|(section, offload)| section.offload = offload);
    Ok(config)
}

/// The section of the base that is trained over.
pub(super) fn policy_section(stage: Stage, config: &Config) -> &config::Base {
    if stage == Stage::Reward { config.reward_base() } else { &config.base }
}
