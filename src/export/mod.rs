//! What leaves: merged models, proven before they get their name.

pub mod merge;
