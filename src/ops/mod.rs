//! One operation a file: formula, forward, what it keeps, backward.

pub mod weight;
