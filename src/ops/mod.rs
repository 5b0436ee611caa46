//! The operations: one folder per operation. Its `mod.rs` has formula, types, checks and the one dispatch per direction;
//! its module `cpu` (for example `linear/cpu.rs`) has the CPU implementation, and `gpu` with `gpu.cu` has that of a device.
//! Operations depend on tensors and stored weights; they do not depend on layers, adapters or configuration.
//!
//! Read `weight.rs` (frozen matrices), `linear/mod.rs` (with LoRA and DoRA), `embedding/mod.rs`, then `norm`, `rope`,
//! `columns`, `activation`, `attention`, `logprobs`, `kl`, `divergence`, and the small ones: `rows`, `score`, `sample`.
//! `storage` holds the storage types, `cpu` the support that all CPU kernels share.

pub mod activation;
pub mod attention;
pub mod columns;
pub mod cpu;
pub mod divergence;
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
