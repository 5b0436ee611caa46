//! One operation a file: formula, forward, what it keeps, backward. Knows tensors and stored weights; no layer,
//! no adapter, no configuration.
//!
//! Read `weight` (what is frozen), `tile` (the one multiply), `linear`, then norm, rope, columns, activation, attention,
//! head, divergence.

pub mod activation;
pub mod attention;
pub mod bf16;
pub mod columns;
pub mod cpu;
pub mod divergence;
mod few;
pub mod head;
pub mod linear;
mod linear_bf16;
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
