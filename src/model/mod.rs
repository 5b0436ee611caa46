//! The network: one frozen base, and small adapters over it. Knows no config file, no data, no stage.
//!
//! Read `base` (what is frozen), `adapter` (what trains), `block` (the pairs in order), `roles` (policy and scorer as
//! views), `generate`.

pub mod adapter;
pub mod base;
pub mod batch;
pub mod block;
pub mod config;
pub mod generate;
pub mod gradients;
pub mod lora;
pub mod peft;
pub mod roles;

#[cfg(test)]
mod oracle;
