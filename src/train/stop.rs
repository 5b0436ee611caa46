//! Requests to stop: SIGINT, SIGTERM and SIGHUP (a closed terminal) set a flag that the training loops read between two
//! micro-batches.
//!
//! A process has one set of signals, so there is one flag. It does not depend on a stage.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use anyhow::{Context, Error, Result};

use crate::error::Interrupted;
#[cfg(unix)]
use crate::report::quiet;

static REQUESTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// The exit code of a run that was stopped, as a shell reports SIGINT.
pub const EXIT_CODE: i32 = 130;

/// What the first signal prints at once.
#[cfg(unix)]
const TOLD: &str = "\nstopping after this step; a second signal ends the process at once, without saving\n";

/// Whether a signal is ignored, as `nohup` has it for SIGHUP.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    // SAFETY: a null action changes nothing, and all zeros are a valid value of the struct that the call fills.
    unsafe {
        let mut now: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &raw mut now) == 0 && now.sa_sigaction == libc::SIG_IGN
    }
}

/// The signals that ask for an end and are not ignored.
#[cfg(unix)]
fn stopping() -> impl Iterator<Item = i32> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|&signal| !is_ignored(signal))
}

/// Whether no command listens for SIGTERM, and for SIGHUP, yet, so that one ends the process by itself.
static UNHEARD: LazyLock<[Arc<AtomicBool>; 2]> = LazyLock::new(|| [true, true].map(|is| Arc::new(AtomicBool::new(is))));

/// Has SIGTERM and SIGHUP end the process with [`EXIT_CODE`] until a command listens for them itself; a signal that is ignored
/// stays so. SIGINT keeps the system's action, by which a shell ends its loop, too.
///
/// # Errors
/// If the system refuses the handlers.
pub fn end_by_default() -> Result<()> {
    #[cfg(unix)]
    for signal in stopping() {
        use signal_hook::consts::{SIGHUP, SIGTERM};
        use signal_hook::flag::register_conditional_shutdown;
        let Some(of) = [SIGTERM, SIGHUP].iter().position(|known| *known == signal) else { continue };
        register_conditional_shutdown(signal, EXIT_CODE, UNHEARD[of].clone()).context("handling signals")?;
    }
    Ok(())
}

/// Leaves SIGTERM, and SIGHUP too or not, to the command, which has handlers of its own by now.
pub fn heard(hangup: bool) {
    let [terminate, hang_up] = &*UNHEARD;
    terminate.store(false, Ordering::Relaxed);
    hang_up.fetch_and(!hangup, Ordering::Relaxed);
}

/// Installs the handlers, once per process: the first SIGINT, SIGTERM or SIGHUP says so and sets the flag, and a second one
/// ends the process at once; a signal that is ignored stays so. A write beyond the file size limit then fails like a write to a
/// full disk, instead of killing the process.
///
/// # Errors
/// If the system refuses the handlers.
pub fn listen() -> Result<()> {
    // A second set of handlers would take the first signal for the second.
    static LISTENING: AtomicBool = AtomicBool::new(false);
    if LISTENING.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    #[cfg(unix)]
    {
        use signal_hook::consts::SIGXFSZ;
        use signal_hook::flag::{register, register_conditional_shutdown};
        for signal in stopping() {
            // In this order: the first signal finds the flag unset, passes the shutdown by, and sets it.
            register_conditional_shutdown(signal, EXIT_CODE, REQUESTED.clone()).context("handling signals")?;
            let requested = REQUESTED.clone();
            // A step may take minutes, and whoever sees nothing happen presses again.
            let told = move || {
                if !requested.load(Ordering::Relaxed) && !quiet::is_set() {
                    // SAFETY: write may be called in a signal handler, with bytes that live for ever.
                    unsafe { libc::write(libc::STDERR_FILENO, TOLD.as_ptr().cast(), TOLD.len()) };
                }
            };
            // SAFETY: the action reads two flags and calls write, all of which a signal handler may do.
            unsafe { signal_hook::low_level::register(signal, told) }.context("handling signals")?;
            register(signal, REQUESTED.clone()).context("handling signals")?;
        }
        register(SIGXFSZ, Arc::default()).context("handling signals")?;
    }
    heard(true);
    Ok(())
}

/// Has the first SIGINT, SIGTERM or SIGHUP set `flag`, and a second one end the process at once; a signal that is ignored stays so.
///
/// # Errors
/// If the system refuses the handlers.
pub fn to_flag(flag: &Arc<AtomicBool>) -> Result<()> {
    #[cfg(unix)]
    for signal in stopping() {
        use signal_hook::flag::{register, register_conditional_shutdown};
        register_conditional_shutdown(signal, EXIT_CODE, flag.clone()).context("handling signals")?;
        register(signal, flag.clone()).context("handling signals")?;
    }
    heard(true);
    Ok(())
}

/// Ends what comes before the first step, such as planning, once the process has been asked to stop.
///
/// # Errors
/// That the run was stopped, if it was.
pub fn check() -> Result<()> {
    match requested() {
        true => Err(Error::new(Interrupted("stopped before the first step; nothing was made".into()))),
        false => Ok(()),
    }
}

/// Whether the process has been asked to stop.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}
