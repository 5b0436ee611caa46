//! The network: one frozen base, and small adapters over it.

pub mod adapter;
pub mod base;
pub mod batch;
pub mod block;
pub mod config;
pub mod generate;
pub mod lora;
pub mod roles;

#[cfg(test)]
mod oracle;
