//! RLHF on one machine.
pub mod cli;
pub mod config;
pub mod data;
pub mod error;
pub mod export;
pub mod inspect;
pub mod memory;
pub mod model;
pub mod ops;
pub mod ppo;
pub mod quickstart;
pub mod report;
pub mod reward;
pub mod rng;
pub mod run;
pub mod sft;
pub mod train;
