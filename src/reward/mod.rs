//! The reward model: its losses, the stage that trains an adapter with a scalar head, and the sources of PPO's scores.
//!
//! Read `loss.rs` next.

pub mod dschat;
pub mod loss;
pub mod source;
pub mod train;
