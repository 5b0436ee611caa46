//! From the sources of `[data]` to training examples: mixing, tokenising on all cores, the cache file, the held-out
//! split.
//!
//! A training stage calls [`pipeline::prepare`] and gets its examples. Read `data/stream/sources.rs` next.

pub mod cache;
pub mod columns;
pub mod ids;
pub mod pipeline;
pub mod scan;
pub mod sources;
pub mod split;
