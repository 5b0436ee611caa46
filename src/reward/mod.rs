//! The reward model: its losses, and the stage that trains an adapter with a scalar head by them.

pub mod loss;
pub mod train;
