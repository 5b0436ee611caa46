//! What the process may take of the machine and what it takes: the allocator, a meter of bytes and time per phase, and
//! the limits that the system sets. It does not depend on any other room; everything stands on it.

pub mod allocator;
pub mod date;
pub mod limits;
pub mod meter;

pub use limits::{
    LimitSource, available_bytes, beside_heap_bytes, give_back_all_freed, give_back_freed, keep_freed_memory,
    peak_rss_bytes,
};
