//! One operation per folder: formula, checks, forward, tensors saved for backward, backward. The operations depend on
//! tensors and stored weights; they do not depend on layers, adapters or configuration.
//!
//! Read `weight` (frozen matrices), `linear` (with LoRA and DoRA), `embedding`, then `norm`, `rope`, `columns`, `activation`,
//! `attention`, `logprobs`, `kl`. `storage` holds the stored types, `cpu` the machinery that all CPU kernels share.

pub mod activation;
pub mod attention;
pub mod columns;
pub mod cpu;
pub mod embedding;
pub mod kl;
pub mod linear;
pub mod logprobs;
pub mod norm;
pub mod rope;
pub mod storage;
pub mod weight;

#[cfg(test)]
mod gradcheck;
