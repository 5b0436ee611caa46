//! The stored types of frozen matrices: block layouts with dequantisation (`dtype`), and quantisation (`quantise`).

pub mod dtype;
pub mod quantise;
