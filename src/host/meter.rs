//! A memory meter: an allocator that wraps another and counts the bytes held, their peak, and the peak and the time of each
//! phase of a run. It costs two atomic operations per allocation; a training step of SmolLM2-135M makes some ten thousand.
//! It does not depend on the model. Read planner/plan.rs for the predictions that are compared with it.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

static CURRENT: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// An allocator that counts the bytes that pass through it. Only the global allocator of a process should count.
pub struct Counting<A>(pub A);

fn took(bytes: usize) {
    let now = CURRENT.fetch_add(bytes, Relaxed) + bytes;
    if now > PEAK.load(Relaxed) {
        PEAK.fetch_max(now, Relaxed);
    }
}

fn gave(bytes: usize) {
    CURRENT.fetch_sub(bytes, Relaxed);
}

// SAFETY: every call goes to the wrapped allocator unchanged; the counting touches no memory of it.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Counting<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's duty.
        let address = unsafe { self.0.alloc(layout) };
        if !address.is_null() {
            took(layout.size());
        }
        address
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's duty.
        let address = unsafe { self.0.alloc_zeroed(layout) };
        if !address.is_null() {
            took(layout.size());
        }
        address
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        gave(layout.size());
        // SAFETY: the caller's duty.
        unsafe { self.0.dealloc(address, layout) };
    }

    unsafe fn realloc(&self, address: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller's duty.
        let new = unsafe { self.0.realloc(address, layout, new_size) };
        if !new.is_null() {
            took(new_size);
            gave(layout.size());
        }
        new
    }
}

/// Bytes held now; 0 if the process's allocator does not count.
pub fn current() -> usize {
    CURRENT.load(Relaxed)
}

/// A part of a run with a peak of its own. All steps of one kind share a phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs)]
pub enum Phase {
    #[default]
    Load,
    Rollout,
    Scoring,
    Update,
    Step,
    Evaluation,
    Save,
}

impl Phase {
    /// All phases, in the order of a run.
    pub const ALL: [Self; 7] =
        [Self::Load, Self::Rollout, Self::Scoring, Self::Update, Self::Step, Self::Evaluation, Self::Save];

    /// The phase's name in tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Rollout => "rollout",
            Self::Scoring => "scoring",
            Self::Update => "update",
            Self::Step => "step",
            Self::Evaluation => "evaluation",
            Self::Save => "save",
        }
    }
}

struct Peaks {
    now: Phase,
    since: Option<Instant>,
    peaks: [usize; Phase::ALL.len()],
    spent: [Duration; Phase::ALL.len()],
}

static PEAKS: Mutex<Peaks> = Mutex::new(Peaks {
    now: Phase::Load,
    since: None,
    peaks: [0; Phase::ALL.len()],
    spent: [Duration::ZERO; Phase::ALL.len()],
});

/// Ends the running phase's count and begins `next`'s; returns the phase that ran.
fn turn(next: Phase) -> Phase {
    let mut peaks = PEAKS.lock().unwrap_or_else(PoisonError::into_inner);
    let now = peaks.now;
    let peak = &mut peaks.peaks[now as usize];
    *peak = (*peak).max(PEAK.load(Relaxed));
    PEAK.store(CURRENT.load(Relaxed), Relaxed);
    let time = Instant::now();
    let ran = peaks.since.map_or(Duration::ZERO, |since| time - since);
    peaks.spent[now as usize] += ran;
    (peaks.now, peaks.since) = (next, Some(time));
    now
}

/// While the guard lives, allocations count towards `phase`; afterwards the surrounding phase continues.
#[must_use = "a phase lasts as long as the value lives"]
pub struct Within(Phase);

/// Begins a phase.
pub fn within(phase: Phase) -> Within {
    Within(turn(phase))
}

impl Drop for Within {
    fn drop(&mut self) {
        turn(self.0);
    }
}

/// Peak bytes of each phase since [`restart`]; 0 for a phase that did not run.
pub fn peaks() -> [(Phase, usize); Phase::ALL.len()] {
    let now = PEAKS.lock().unwrap_or_else(PoisonError::into_inner).now;
    turn(now);
    let peaks = PEAKS.lock().unwrap_or_else(PoisonError::into_inner).peaks;
    Phase::ALL.map(|phase| (phase, peaks[phase as usize]))
}

/// Time that each phase ran since [`restart`], without the phases inside it.
pub fn spent() -> [(Phase, Duration); Phase::ALL.len()] {
    let now = PEAKS.lock().unwrap_or_else(PoisonError::into_inner).now;
    turn(now);
    let spent = PEAKS.lock().unwrap_or_else(PoisonError::into_inner).spent;
    Phase::ALL.map(|phase| (phase, spent[phase as usize]))
}

/// Resets all peaks and times; each count starts from what is held now.
pub fn restart() {
    let mut peaks = PEAKS.lock().unwrap_or_else(PoisonError::into_inner);
    (peaks.peaks, peaks.spent, peaks.since) = (Default::default(), Default::default(), Some(Instant::now()));
    PEAK.store(CURRENT.load(Relaxed), Relaxed);
}
