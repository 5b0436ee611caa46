//! What every supervised stage (SFT, reward model, DPO, KTO) is given besides its examples and settings.

use crate::model::adapter::Adapter;
use crate::model::base::Base;
use crate::model::block::Recompute;

/// What a supervised stage trains from, besides its examples and its section of the config.
#[derive(Clone, Copy)]
pub struct Setup<'w> {
    /// The frozen base.
    pub base: &'w Base,
    /// The adapter that training starts from; a copy of it is trained.
    pub start: &'w Adapter,
    /// Activations that each block recomputes in the backward pass. It changes memory and time, never a result;
    /// [`crate::planner::plan::resolve`] finds it where a config says `auto`.
    pub recompute: Recompute,
    /// Seed of every random draw.
    pub seed: u64,
}
