//! The network: one frozen base, and small adapters over it. It does not depend on files, configuration of runs, data or
//! stages.
//!
//! Read `base` (frozen weights), `adapter` (trained weights), `block` (forward and backward of one layer), `roles` (policy
//! and value model as views), `readers` (several of them in one pass), `decoding` and `generate`.

pub mod adapter;
pub mod base;
pub mod batch;
pub mod block;
pub mod config;
pub mod decoding;
mod embeddings;
pub mod generate;
pub mod init;
pub mod inputs;
pub mod kv_cache;
pub mod readers;
pub mod roles;
pub mod stream;

#[cfg(test)]
pub(crate) mod gradcheck;
