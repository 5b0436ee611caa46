//! RLHF on one machine.
pub mod config;
pub mod error;
pub mod model;
pub mod ops;
pub mod ppo;
pub mod reward;
pub mod rng;
pub mod train;
