//! What turns gradients into new weights, and what keeps a run from losing them.

pub mod adamw;
pub mod checkpoint_manager;
pub mod fingerprint;
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
