//! Data set formats: one JSON object -> a [`Record`](crate::data::Record), for TRL's dataset types, Alpaca, ShareGPT
//! with LLaMA-Factory's ranking, OpenAI messages, HH-RLHF transcripts and DeepSpeed-Chat's public data sets.
//!
//! An error is a sentence about a column; the caller puts the record's place in front. These files do not depend on
//! `files` or `examples`. Read `data/formats/parser.rs` next.

pub(crate) mod columns;
mod detect;
pub(crate) mod dialogue;
mod fault;
pub(super) mod parser;
pub mod presets;
mod rename;
mod transcript;
