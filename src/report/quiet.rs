//! Whether stderr is for errors and warnings alone, as `--quiet` asks. It does not depend on what is printed.

use std::sync::atomic::{AtomicBool, Ordering};

static QUIET: AtomicBool = AtomicBool::new(false);
static MUTE: AtomicBool = AtomicBool::new(false);

/// Keeps progress and notes off stderr from now on, or no longer.
pub fn set(is_quiet: bool) {
    QUIET.store(is_quiet, Ordering::Relaxed);
}

/// Whether progress and notes are kept off stderr.
pub fn is_set() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Keeps warnings off stderr, too: another rank of the run prints the same.
pub fn mute() {
    set(true);
    MUTE.store(true, Ordering::Relaxed);
}

/// Whether warnings are kept off stderr, too.
pub fn is_mute() -> bool {
    MUTE.load(Ordering::Relaxed)
}

/// Prints a warning on stderr, unless another rank does.
#[macro_export]
macro_rules! warning {
    ($($arg:tt)*) => {
        if !$crate::report::quiet::is_mute() {
            eprintln!($($arg)*);
        }
    };
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
