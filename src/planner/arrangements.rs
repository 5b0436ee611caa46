//! The same training with other arrangements of the four roles' weights, for comparison: four full models, LoRA over four
//! bases, over two and over one. Read `plan.rs` beside it for the plan that is rearranged.

use crate::host::meter::Phase;
use crate::ops::weight::StorageDType;
use crate::planner::plan::Plan;
use crate::planner::sim_allocator::{Bytes, MemoryCategory};
use crate::planner::simulate::shape::Network;
use crate::planner::simulate::work::Work;

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

    /// The plan's peak with this arrangement, weights on devices included. Activations, caches and data are the plan's own; four
    /// full models have their weights, gradients of actor and critic, and AdamW's means: all in f32 where the base is, else weights
    /// and gradients in 2 bytes a number and means and a master copy in f32 (mixed precision).
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
                bytes.set(MemoryCategory::Pinned, 0);
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
        let on_devices = plan.devices.iter().map(|device| device.base).sum();
        for (class, more) in
            [(MemoryCategory::Base, on_devices), (MemoryCategory::Mapped, 0), (MemoryCategory::Pinned, 0)]
        {
            bytes.set(class, copies * ((bytes.of(class) + more) / have));
        }
        bytes
    }
}

fn is_f32(net: &Network) -> bool {
    net.stored.first().is_some_and(|row| row[0] == StorageDType::F32)
}
