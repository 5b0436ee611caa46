//! RLHF on one machine.
pub mod config;
pub mod error;
pub mod model;
pub mod ops;
pub mod rng;
pub mod train;
