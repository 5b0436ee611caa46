//! The quickstart: a synthetic task with a known gold rule and a tiny base inside the binary, so that all stages run in
//! minutes without a download. Read `task.rs` (data sets), `answer.rs` (texts), `gold.rs` (the rule), `base.rs`, `run.rs`.

pub mod answer;
pub mod base;
pub mod document;
pub mod gold;
pub mod grammar;
pub mod outcome;
pub mod run;
pub mod task;

pub use run::{check_free, run, run_on};
