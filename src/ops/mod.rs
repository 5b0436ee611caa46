//! The operations: one folder per operation, `mod.rs` with formula, types, checks and the one dispatch per direction,
//! `cpu.rs` with the CPU implementation, `gpu.rs` and `gpu.cu` with a device's. Operations depend on tensors
//! and stored weights; they do not depend on layers, adapters or configuration.
//!
//! Read `weight.rs` (frozen matrices), `linear/mod.rs` (with LoRA and DoRA), `embedding/mod.rs`, then `norm`, `rope`,
//! `columns`, `activation`, `attention`, `logprobs`, `kl`, and the small ones: `rows`, `score`, `sample`.
//! `storage` holds the storage types, `cpu` the support that all CPU kernels share.

pub mod activation;
pub mod attention;
pub mod columns;
pub mod cpu;
pub mod embedding;
pub mod kl;
pub mod launch;
pub mod linear;
pub mod logprobs;
pub mod norm;
pub mod rope;
pub mod rows;
pub mod sample;
pub mod score;
pub mod storage;
pub mod weight;

#[cfg(test)]
mod gradcheck;
