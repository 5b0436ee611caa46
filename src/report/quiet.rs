//! Whether stderr is for errors and warnings alone, as `--quiet` asks. It does not depend on what is printed.

use std::sync::atomic::{AtomicBool, Ordering};

static QUIET: AtomicBool = AtomicBool::new(false);

/// Keeps progress and notes off stderr from now on, or no longer.
pub fn set(is_quiet: bool) {
    QUIET.store(is_quiet, Ordering::Relaxed);
}

/// Whether progress and notes are kept off stderr.
pub fn is_set() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Prints a line for people on stderr that they can do without: dropped where they asked for quiet. Errors and warnings are
/// printed by `eprintln!`.
#[macro_export]
macro_rules! note {
    ($($arg:tt)*) => {
        if !$crate::report::quiet::is_set() {
            eprintln!($($arg)*);
        }
    };
}
