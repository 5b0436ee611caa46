//! Files of models: a base's files (a Hugging Face directory, a GGUF file, or bytes compiled in) and PEFT adapters.
//!
//! They are one room, so that nothing in `model` depends on a file format. The room does not depend on the configuration of
//! runs, on data or on stages. Reading order: `resolve` (a name -> a path), `files` ([`ModelFiles`]: what was opened), `load`
//! (-> a frozen base), `contents` and `tensor_table` (how tensors are found), `unread` (tensors that nothing reads), `gguf` with
//! `gguf_config` and `gguf_tokenizer` (llama.cpp's container), `peft` (adapters), `hub` (downloads), `inspect` (a description for
//! people), `convert` (commands for files that are not read).

mod contents;
pub(crate) mod convert;
mod files;
pub mod gguf;
pub mod gguf_config;
pub mod gguf_tokenizer;
#[cfg(feature = "hub")]
pub mod hub;
pub mod inspect;
mod load;
pub mod peft;
pub mod resolve;
mod tensor_table;
mod unread;

pub(crate) use contents::FileContents;
pub use files::ModelFiles;
pub use load::assemble;
pub(crate) use tensor_table::map;

#[cfg(test)]
pub(crate) mod tests;
