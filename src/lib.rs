//! RLHF on one machine.
pub mod error;
pub mod ops;
pub mod quickstart;
pub mod rng;
