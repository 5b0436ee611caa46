//! The quickstart: a task with a known gold rule and a tiny base that ships inside the binary, so that all stages run
//! in minutes with nothing to download. Read task.rs (data sets), answer.rs (the texts), gold.rs (the rule), base.rs.

pub mod answer;
pub mod base;
pub mod document;
pub mod gold;
pub mod grammar;
pub mod outcome;
pub mod run;
pub mod task;

pub use run::run;
