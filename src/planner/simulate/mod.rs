//! What every operation takes and gives back, in the order in which it does: the same functions as in `ops` and `model`,
//! over sizes alone. A number here that the code does not bear out is a fault, which tests/memory_planner.rs finds.
//! shape.rs describes a network; ops.rs, block.rs and network.rs walk it; stages.rs has a file's worth of each stage.

pub mod block;
pub mod network;
pub mod ops;
pub mod shape;
pub mod stages;
