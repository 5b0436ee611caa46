//! One operation a file: formula, forward, what it keeps, backward. Knows tensors and stored weights; no layer,
//! no adapter, no configuration.
//!
//! Read `weight` (what is frozen), `tile` (the one multiply), `linear` (with `dora`), `lookup`, then norm, rope, columns,
//! activation, attention, head, divergence.

pub mod activation;
pub mod attention;
pub mod bf16;
pub mod columns;
pub mod cpu;
pub mod divergence;
pub mod dora;
pub(crate) mod few;
pub mod head;
mod head_branch;
pub mod linear;
pub(crate) mod linear_bf16;
pub mod lookup;
pub mod norm;
pub mod pack;
pub mod pool;
pub mod quantise;
pub mod rope;
mod stored;
pub mod tile;
pub mod weight;

#[cfg(test)]
mod pairs;
