//! Preference optimisation without a reward model: DPO on comparisons, KTO on responses labelled desirable or
//! undesirable.
//!
//! The reference is the same base through the adapter that training started from. `loss.rs` holds the mathematics,
//! `responses.rs` reads log-probabilities, and `pairs.rs` and `kto.rs` are the two stages. Read `loss.rs` next.

pub mod kto;
pub mod loss;
pub mod pairs;
mod responses;

pub(crate) use responses::SCORING_TOKENS;
