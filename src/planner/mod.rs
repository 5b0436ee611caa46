//! The memory planner: what a run will hold, computed from shapes alone before it starts. `passes` finds the largest
//! micro-batch of each stage, `simulate` replays the allocations of its passes on `sim_allocator`, and `plan` names the
//! smallest of the `changes` that fits. It stands above the stages; no training loop depends on it.

pub mod arrangements;
pub mod changes;
pub mod dry;
pub mod passes;
pub mod plan;
pub mod sim_allocator;
pub mod simulate;
