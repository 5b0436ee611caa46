//! From the sources of `[data]` to examples: mixing, tokenising on all cores, the cache file, and the held-out split.

pub mod cache;
pub mod ids;
pub mod pipeline;
pub mod sources;
pub mod split;
