//! Memory: what the machine has (machine.rs), what the program holds (meter.rs), and what a run will hold, told from
//! shapes alone: a walk through every phase takes and gives back as many bytes as the operations do (walk/), plan.rs
//! chooses what fits; run/admission.rs refuses what does not.

pub mod jobs;
pub mod ledger;
mod machine;
pub mod meter;
pub mod plan;
pub mod walk;

pub use machine::{Bound, available_bytes, beside_heap_bytes, give_back_freed, keep_freed_memory, peak_rss_bytes};
