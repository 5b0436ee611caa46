//! Replays the allocations and frees of every operation, in the program's order, using shapes only: the same functions as
//! in `ops` and `model`. A size that differs from the code's is a fault, which the planner's tests find. shape.rs describes
//! a network; ops.rs, block.rs and network.rs replay its passes; stages.rs replays the phases of each stage, of which
//! work.rs has the passes.

pub mod block;
pub mod network;
pub mod ops;
pub mod shape;
pub mod stages;
pub mod work;
