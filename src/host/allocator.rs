//! The binary's allocator: mimalloc, with a clear error where the system refuses memory (Rust's default is an abort without
//! advice), and a memory limit while untrusted input (such as a chat template) is processed. It does not depend on any
//! other file.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;

use mimalloc::MiMalloc;

thread_local! {
    /// Bytes that this thread may still allocate under a limit, and the message that is printed when it asks for more.
    static LEFT: Cell<Option<(usize, &'static str)>> = const { Cell::new(None) };
    /// Whether [`within`] limits nothing on this thread.
    static UNLIMITED: Cell<bool> = const { Cell::new(false) };
}

/// The global allocator of `fourfold`.
pub struct Allocator;

/// Runs a function that may hold at most `bytes`. With [`Allocator`] as the global allocator the process ends with `said`
/// as its message and exit code 2 when the function asks for more; with another allocator nothing is limited.
pub fn within<T>(bytes: usize, said: &'static str, run: impl FnOnce() -> T) -> T {
    /// Restores the limit before, also when a panic unwinds.
    struct Ends(Option<(usize, &'static str)>);
    impl Drop for Ends {
        fn drop(&mut self) {
            LEFT.set(self.0);
        }
    }
    let _ends = Ends(LEFT.replace(Some((bytes, said)).filter(|_| !UNLIMITED.get())));
    run()
}

/// Runs a function in which [`within`] limits nothing: for a server, which must not end when one request asks for much and which
/// bounds the size of requests instead.
pub fn without_limits<T>(run: impl FnOnce() -> T) -> T {
    /// Restores what was before, also when a panic unwinds.
    struct Ends(bool);
    impl Drop for Ends {
        fn drop(&mut self) {
            UNLIMITED.set(self.0);
        }
    }
    let _ends = Ends(UNLIMITED.replace(true));
    run()
}

fn take(bytes: usize) {
    // A thread that is ending has no limit any more.
    let Ok(Some((left, said))) = LEFT.try_with(Cell::get) else { return };
    match left.checked_sub(bytes) {
        Some(left) => LEFT.set(Some((left, said))),
        None => end(2, &[b"error: ", said.as_bytes()]),
    }
}

fn give(bytes: usize) {
    if let Ok(Some((left, said))) = LEFT.try_with(Cell::get) {
        LEFT.set(Some((left.saturating_add(bytes), said)));
    }
}

/// The system refused memory: prints the message without allocating.
#[cold]
fn exhausted(bytes: usize) -> ! {
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut rest = bytes;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    end(
        1,
        &[
            b"error: out of memory: the system refused ",
            &digits[at..],
            b" bytes more; free some, raise the limit (ulimit -v), or let the run take less: smaller micro-batches, \
              shorter sequences, checkpoint = \"block\", a quantised base. A run that has checkpoints goes on with --resume",
        ],
    )
}

#[cold]
fn end(code: i32, parts: &[&[u8]]) -> ! {
    use std::io::Write;
    // std's handle is not used, because this thread may hold its lock.
    #[cfg(unix)]
    {
        use std::os::fd::FromRawFd;
        // SAFETY: descriptor 2 is stderr; ManuallyDrop leaves it open.
        let mut stderr = std::mem::ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(2) });
        for part in parts.iter().copied().chain([&b"\n"[..]]) {
            let _ = stderr.write_all(part);
        }
        // SAFETY: ends the process at once, without the handlers that might allocate.
        unsafe { libc::_exit(code) }
    }
    #[cfg(not(unix))]
    {
        let mut stderr = std::io::stderr();
        for part in parts.iter().copied().chain([&b"\n"[..]]) {
            let _ = stderr.write_all(part);
        }
        std::process::exit(code)
    }
}

fn checked(at: *mut u8, bytes: usize) -> *mut u8 {
    if at.is_null() {
        exhausted(bytes);
    }
    at
}

// SAFETY: every call goes to mimalloc as it came; a null never reaches the caller, and nothing here unwinds.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise is ours.
        checked(unsafe { MiMalloc.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise is ours.
        checked(unsafe { MiMalloc.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        take(size);
        // SAFETY: the caller's promise is ours.
        let new = checked(unsafe { MiMalloc.realloc(at, layout, size) }, size);
        give(layout.size());
        new
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        give(layout.size());
        // SAFETY: the caller's promise is ours.
        unsafe { MiMalloc.dealloc(at, layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_allowance_ends_with_its_work() {
        assert_eq!(LEFT.get(), None);
        let inside = within(100, "too much", || {
            take(60);
            give(20);
            LEFT.get()
        });
        assert_eq!((inside, LEFT.get()), (Some((60, "too much")), None));
        let unlimited = without_limits(|| within(100, "too much", || LEFT.get()));
        assert_eq!((unlimited, UNLIMITED.get()), (None, false));
        let panicked = std::panic::catch_unwind(|| within(100, "too much", || panic!("on purpose")));
        assert!(panicked.is_err() && LEFT.get().is_none());
    }
}
