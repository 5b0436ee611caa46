//! The reward model's stage.

pub mod loss;
