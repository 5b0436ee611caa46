//! What turns gradients into new weights.

pub mod adamw;
pub mod schedule;
pub mod learner;
pub mod settings;
