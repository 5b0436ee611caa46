//! RLHF on one machine.
pub mod config;
pub mod data;
pub mod error;
pub mod ops;
pub mod rng;
