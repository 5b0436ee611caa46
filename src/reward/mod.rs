//! The reward model: its losses (`loss.rs`), the stage that trains an adapter with a scalar head (`train.rs`), and the
//! reward sources of PPO (`source.rs`). Read `loss.rs` next.

pub mod center;
pub mod dschat;
pub mod ensemble;
pub mod length;
pub mod loss;
mod shown;
pub mod source;
pub mod train;
