//! A base model, adapters over it, and the roles they play.

pub mod chat_template;
pub mod checkpoint;
pub mod config;
pub mod gguf;
pub mod gguf_tokenizer;
pub mod tokenizer;
