//! What turns gradients into new weights.

pub mod adamw;
pub mod learner;
pub mod schedule;
pub mod settings;
