//! Printing on stderr: whether it is for errors and warnings alone, as `--quiet` asks, and that a stderr which takes nothing (a
//! reader that is gone, a full disk, a closed terminal) ends no run: `eprintln!` would panic. It does not depend on what is
//! printed.

use std::fmt;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

static QUIET: AtomicBool = AtomicBool::new(false);
static MUTE: AtomicBool = AtomicBool::new(false);
static DIRECT: AtomicBool = AtomicBool::new(false);

/// What is printed goes past the capture of a test harness from now on. The program asks for it, its tests do not.
pub fn print_directly() {
    DIRECT.store(true, Ordering::Relaxed);
}

/// Prints on stderr; where it cannot be printed it is lost.
pub fn print(text: fmt::Arguments<'_>) {
    if !DIRECT.load(Ordering::Relaxed) {
        return eprint!("{text}");
    }
    let text = text.to_string();
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

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
            $crate::tell!($($arg)*);
        }
    };
}

/// Prints a line on stderr, whatever `--quiet` says. Unlike `eprintln!` it ends no run whose stderr takes nothing.
#[macro_export]
macro_rules! tell {
    ($($arg:tt)*) => {
        $crate::report::quiet::print(format_args!("{}\n", format_args!($($arg)*)))
    };
}

/// Prints a line for people on stderr that they can do without: dropped where they asked for quiet. Errors and warnings are
/// printed by `tell!`.
#[macro_export]
macro_rules! note {
    ($($arg:tt)*) => {
        if !$crate::report::quiet::is_set() {
            $crate::tell!($($arg)*);
        }
    };
}
