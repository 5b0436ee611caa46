//! The thread pool of the CPU kernels. One caller at a time distributes its items; a helper that has not started in
//! time is not awaited, so a busy machine slows a run in proportion and not by whole time slices. It does not depend on
//! the rest of the crate. Read `mod.rs` beside it for `parallel`, its only caller.
//!
//! Alternatives were slower: rayon's join takes 14 microseconds, and a spinning barrier waits for every thread at every
//! operation; with one other process on two cores the barrier made the quickstart four times slower.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread::Thread;

/// Polls before an idle helper sleeps: some tens of microseconds, longer than the pauses between operations.
const SPINS_BEFORE_SLEEP: u32 = 20_000;
/// Polls before a caller that waits for a helper's last items yields its core.
const SPINS_BEFORE_YIELD: u32 = 2_000;
/// Set in `Shared::state` while a job accepts helpers; the lower bits count the helpers that have entered.
const OPEN: u64 = 1 << 63;

/// A job by address. It is valid while `state` is open or counts helpers.
#[derive(Clone, Copy)]
struct Job {
    run: unsafe fn(*const (), Range<usize>),
    data: *const (),
    items: usize,
    chunk: usize,
}

struct Shared {
    /// OPEN while helpers may enter, plus the number of those that have entered.
    state: AtomicU64,
    /// The next item that no thread has taken.
    cursor: AtomicUsize,
    /// Counts jobs, so that a helper enters each at most once.
    generation: AtomicU64,
    job: std::cell::UnsafeCell<Job>,
    /// Whether a helper has panicked; the caller panics then, too.
    panicked: AtomicBool,
    /// Whether each helper sleeps.
    asleep: Vec<AtomicBool>,
    handles: OnceLock<Vec<Thread>>,
}

// SAFETY: `job` is written by the one caller that holds `Pool::caller`, while the state is closed and counts no helper;
// helpers read it only after they have entered an open state (an acquire that follows the caller's release).
unsafe impl Sync for Shared {}
// SAFETY: the addresses in `job` are only used under the rule above.
unsafe impl Send for Shared {}

struct Pool {
    shared: &'static Shared,
    caller: Mutex<()>,
}

/// # Safety
/// `data` is the address of a live `F`.
unsafe fn call<F: Fn(Range<usize>) + Sync>(data: *const (), range: Range<usize>) {
    // SAFETY: guaranteed by the caller.
    unsafe { (*data.cast::<F>())(range) }
}

impl Shared {
    /// Takes chunks until all are taken.
    fn work(&self, job: Job) {
        loop {
            let start = self.cursor.fetch_add(job.chunk, Ordering::Relaxed);
            if start >= job.items {
                return;
            }
            // SAFETY: the job is live: this thread is the caller, or is counted in `state`, which the caller awaits.
            unsafe { (job.run)(job.data, start..job.items.min(start + job.chunk)) };
        }
    }

    /// Adds this helper to the job, if the job still accepts any.
    fn enter(&self) -> bool {
        let mut state = self.state.load(Ordering::Relaxed);
        while state & OPEN != 0 {
            match self.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
        false
    }

    fn help(&self, me: usize) {
        let mut last = 0;
        let mut spins = 0;
        loop {
            let generation = self.generation.load(Ordering::Acquire);
            if generation != last {
                last = generation;
                spins = 0;
                if self.enter() {
                    // SAFETY: entered, so the job is live until this thread leaves.
                    let job = unsafe { *self.job.get() };
                    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.work(job)));
                    if outcome.is_err() {
                        self.panicked.store(true, Ordering::Relaxed);
                    }
                    self.state.fetch_sub(1, Ordering::Release);
                }
                continue;
            }
            spins += 1;
            if spins < SPINS_BEFORE_SLEEP {
                std::hint::spin_loop();
                continue;
            }
            spins = 0;
            self.asleep[me].store(true, Ordering::SeqCst);
            if self.generation.load(Ordering::SeqCst) == last {
                std::thread::park();
            }
            self.asleep[me].store(false, Ordering::Relaxed);
        }
    }
}

/// Closes the job and waits for the helpers that have entered, also when the caller's own part panics.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.0.state.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| {
        let helpers = candle_core::utils::get_num_threads().saturating_sub(1);
        let none = Job { run: call::<fn(Range<usize>)>, data: std::ptr::null(), items: 0, chunk: 1 };
        let shared: &'static Shared = Box::leak(Box::new(Shared {
            state: AtomicU64::new(0),
            cursor: AtomicUsize::new(0),
            generation: AtomicU64::new(0),
            job: std::cell::UnsafeCell::new(none),
            panicked: AtomicBool::new(false),
            asleep: (0..helpers).map(|_| AtomicBool::new(false)).collect(),
            handles: OnceLock::new(),
        }));
        let spawn = |me| std::thread::Builder::new().name(format!("kernel-{me}")).spawn(move || shared.help(me));
        // If the system refuses a thread, the caller does all work.
        let handles = (0..helpers).map_while(|me| spawn(me).ok().map(|h| h.thread().clone())).collect();
        shared.handles.set(handles).unwrap_or_else(|_| unreachable!("set once, here"));
        Pool { shared, caller: Mutex::new(()) }
    })
}

/// Threads that share the work, the caller included.
pub fn threads() -> usize {
    pool().shared.asleep.len() + 1
}

/// Runs `f` over parts of 0..items, each item once, on all free threads. While another call is in progress (a nested
/// one, or another thread's), the caller processes all items itself.
pub fn share(items: usize, f: impl Fn(Range<usize>) + Sync) {
    let pool = pool();
    let shared = pool.shared;
    let Ok(guard) = pool.caller.try_lock() else {
        return f(0..items);
    };
    if shared.asleep.is_empty() || items < 2 {
        drop(guard);
        return f(0..items);
    }
    // Eight chunks per thread: threads end evenly without contention at the cursor.
    let chunk = items.div_ceil(8 * (shared.asleep.len() + 1)).max(1);
    let job = Job { run: run_of(&f), data: (&raw const f).cast(), items, chunk };
    // SAFETY: the state is closed and empty (the last job's Close saw to it), and this thread holds `caller`.
    unsafe { *shared.job.get() = job };
    shared.cursor.store(0, Ordering::Relaxed);
    shared.state.store(OPEN, Ordering::Release);
    shared.generation.fetch_add(1, Ordering::SeqCst);
    for (asleep, handle) in shared.asleep.iter().zip(shared.handles.get().into_iter().flatten()) {
        if asleep.load(Ordering::SeqCst) {
            handle.unpark();
        }
    }
    {
        let _close = Close(shared);
        shared.work(job);
    }
    let panicked = shared.panicked.swap(false, Ordering::Relaxed);
    drop(guard);
    assert!(!panicked, "a kernel thread panicked; its message is printed above");
}

fn run_of<F: Fn(Range<usize>) + Sync>(_: &F) -> unsafe fn(*const (), Range<usize>) {
    call::<F>
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_item_is_done_once_under_many_callers_and_nesting() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for round in 0..500usize {
                        let n = round % 70;
                        let hits: Vec<AtomicU32> = (0..n).map(|_| AtomicU32::new(0)).collect();
                        share(n, |range| {
                            for i in range {
                                share(1, |inner| assert_eq!(inner, 0..1));
                                hits[i].fetch_add(1, Ordering::Relaxed);
                            }
                        });
                        assert!(hits.iter().all(|h| h.load(Ordering::Relaxed) == 1), "round {round}");
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_in_an_item_reaches_the_caller_and_the_pool_still_works() {
        for _ in 0..20 {
            let outcome = std::panic::catch_unwind(|| share(64, |range| assert!(!range.contains(&63), "expected")));
            assert!(outcome.is_err());
            let sum = AtomicUsize::new(0);
            share(100, |range| {
                sum.fetch_add(range.sum::<usize>(), Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }
}
