//! What turns gradients into new weights.

pub mod adamw;
pub mod schedule;
