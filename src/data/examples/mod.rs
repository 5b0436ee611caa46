//! Training examples: records rendered to text and encoded to token sequences for each objective, and their batches.
//!
//! A stage reads [`Examples`] without regard to where they are stored: in memory or in a mapped cache file. These files
//! do not depend on `files` or `formats`. Read `data/examples/example.rs` next.

pub mod batch_sampler;
mod compat;
pub mod dschat;
pub mod encoder;
mod example;
pub mod objectives;
mod render;
mod report;
mod sequence;

pub use example::{
    Example, Examples, Ids, PassSize, PromptExample, RankedExample, SftExample, UnpairedExample, passes, pick,
};
