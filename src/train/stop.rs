//! "Please stop": SIGINT and SIGTERM as a flag that loops look at between two micro-batches. The process has one set of
//! signals, so there is one flag. Knows no loop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use anyhow::{Context, Result};

static REQUESTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// The exit code of a run that was stopped: a shell's for SIGINT.
pub const EXIT_CODE: i32 = 130;

/// From now on the first SIGINT or SIGTERM sets the flag, and a second one ends the process at once. A write beyond the
/// file size limit fails like one to a full disk, where the system's default is to kill the process.
///
/// # Errors
/// If the system refuses to have the signals handled.
pub fn listen() -> Result<()> {
    #[cfg(unix)]
    {
        use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
        use signal_hook::flag::{register, register_conditional_shutdown};
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag unset, passes the shutdown by, and sets it.
            register_conditional_shutdown(signal, EXIT_CODE, REQUESTED.clone()).context("handling signals")?;
            register(signal, REQUESTED.clone()).context("handling signals")?;
        }
        register(SIGXFSZ, Arc::default()).context("handling signals")?;
    }
    Ok(())
}

/// Has the process been asked to stop?
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}
