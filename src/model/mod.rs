//! The network: one frozen base, and small adapters over it.

pub mod adapter;
pub mod gradients;
pub mod lora;
pub mod peft;
