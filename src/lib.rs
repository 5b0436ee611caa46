//! RLHF on one machine.
pub mod error;
pub mod inspect;
pub mod model;
pub mod ops;
pub mod rng;
