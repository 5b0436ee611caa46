//! The network: one frozen base, and small adapters over it.

pub mod adapter;
pub mod lora;
