//! Preference optimisation without a reward model: DPO on comparisons, KTO on responses labelled desirable or
//! undesirable.
//!
//! The reference is the same base through the adapter that training started from. `loss.rs` holds the mathematics,
//! `answers.rs` reads log-probabilities, and `pairs.rs` and `kto.rs` are the two stages. Read `loss.rs` next.

mod answers;
pub mod kto;
pub mod loss;
pub mod pairs;

pub(crate) use answers::SCORING_TOKENS;
pub(crate) use pairs::EVAL_BATCH;
