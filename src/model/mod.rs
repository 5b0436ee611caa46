//! The network: one frozen base, and small adapters over it. Knows no config file, no data, no stage.
//!
//! Read `base` (what is frozen), `adapter` (what trains), `block` (the pairs in order), `roles` (policy and scorer as
//! views), `generate`; then what opens files: `locate`, `checkpoint`, `config`, `gguf`, `tokenizer`, `peft`.

pub mod adapter;
pub mod base;
pub mod batch;
pub mod block;
pub mod branch;
mod byte_bpe;
pub mod chat_template;
pub mod checkpoint;
pub mod config;
pub mod dora;
mod ends;
pub mod generate;
pub mod gguf;
pub mod gguf_tokenizer;
pub mod gradients;
pub mod locate;
pub mod lora;
pub mod peft;
pub mod principal;
pub mod roles;
pub mod tokenizer;
mod trainable;

#[cfg(test)]
pub(crate) mod oracle;
