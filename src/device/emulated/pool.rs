//! Threads of this process that share the emulated machine's work. They live as long as the process, because each keeps
//! the stacks on which it runs kernels. It does not depend on kernels. Read `compile.rs` beside it next.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread;

use super::super::lock;

/// One call of `parallel`.
struct Job {
    /// The next index that nobody has taken.
    next: AtomicU64,
    count: u64,
    stop: AtomicBool,
    /// Workers that may still use `work`.
    inside: Mutex<u64>,
    left: Condvar,
    /// The caller's closure. It is alive as long as the job is in the list or a worker is inside.
    work: &'static (dyn Fn(u64) -> bool + Sync),
}

impl Job {
    fn run(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.count {
                break;
            }
            if !(self.work)(index) {
                self.stop.store(true, Ordering::Relaxed);
            }
        }
    }
}

struct Pool {
    jobs: Mutex<Vec<Arc<Job>>>,
    arrived: Condvar,
    workers: usize,
}

fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    static STARTED: OnceLock<()> = OnceLock::new();
    let pool = POOL.get_or_init(|| {
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        Pool { jobs: Mutex::default(), arrived: Condvar::new(), workers: cores - 1 }
    });
    STARTED.get_or_init(|| {
        for _ in 0..pool.workers {
            // Without the thread, the callers do the work alone.
            thread::Builder::new().name("emulated".into()).spawn(|| pool.serve()).ok();
        }
    });
    pool
}

impl Pool {
    fn serve(&self) {
        let mut jobs = lock(&self.jobs);
        loop {
            let Some(job) = jobs.iter().find(|job| job.next.load(Ordering::Relaxed) < job.count).cloned() else {
                jobs = self.arrived.wait(jobs).unwrap_or_else(std::sync::PoisonError::into_inner);
                continue;
            };
            // Entered while the list is locked: the caller has not taken the job out yet, so it will wait.
            *lock(&job.inside) += 1;
            drop(jobs);
            job.run();
            *lock(&job.inside) -= 1;
            job.left.notify_all();
            jobs = lock(&self.jobs);
        }
    }
}

/// Calls `work` with 0, 1, .. `count` - 1 on all cores, or on this thread only if `alone`, until all are done or one of
/// the calls returns false. `work` does not panic.
pub(super) fn parallel(count: u64, alone: bool, work: &(dyn Fn(u64) -> bool + Sync)) {
    if alone || count <= 1 || pool().workers == 0 {
        (0..count).all(work);
        return;
    }
    let pool = pool();
    // SAFETY: only the lifetime changes. The job leaves the list and all workers leave the job before this function
    // returns, so nobody calls the closure afterwards.
    let work =
        unsafe { std::mem::transmute::<&(dyn Fn(u64) -> bool + Sync), &'static (dyn Fn(u64) -> bool + Sync)>(work) };
    let job = Arc::new(Job {
        next: AtomicU64::new(0),
        count,
        stop: AtomicBool::new(false),
        inside: Mutex::new(0),
        left: Condvar::new(),
        work,
    });
    lock(&pool.jobs).push(job.clone());
    pool.arrived.notify_all();
    job.run();
    lock(&pool.jobs).retain(|other| !Arc::ptr_eq(other, &job));
    let mut inside = lock(&job.inside);
    while *inside > 0 {
        inside = job.left.wait(inside).unwrap_or_else(std::sync::PoisonError::into_inner);
    }
}
