//! Data: files, tables, folders and hub data sets become records, and records become token sequences.

mod chat_styles;
mod chat_tokens;
#[path = "../support/encoders.rs"]
mod encoders;
mod ends;
mod formats;
#[cfg(feature = "hub")]
mod hub;
mod pipeline;
mod score;
mod sources;
#[path = "../support/mod.rs"]
mod support;
