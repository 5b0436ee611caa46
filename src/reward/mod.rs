//! The reward model: its losses, the stage that trains an adapter with a scalar head by them, and where PPO's scores come
//! from.

pub mod dschat;
pub mod loss;
pub mod source;
pub mod train;
