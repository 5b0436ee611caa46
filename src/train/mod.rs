//! Training shared by all stages: the optimizer, the loop of the supervised stages, and everything that keeps a run
//! from being lost. Read `supervised.rs` next.

pub mod adamw;
pub mod checkpoint_manager;
pub mod fingerprint;
pub mod former;
pub mod guard;
pub mod learner;
pub mod lock;
pub mod progress;
pub mod schedule;
pub mod session;
pub mod settings;
pub mod snapshot;
pub mod stop;
pub mod store;
pub mod supervised;
pub mod world;
