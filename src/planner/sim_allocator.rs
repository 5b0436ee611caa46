//! The walk's allocator: it hands out nothing but sizes, each under a class, and remembers for every phase how high the
//! sum stood and of what it was made. What is taken is given back when its holder is dropped, as in the program itself.
//! Knows no shape. Read walk/ops.rs for who takes.

use std::cell::RefCell;
use std::rc::Rc;

use crate::host::meter::Phase;

/// What bytes are for: the columns of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryCategory {
    /// Frozen weights in memory of the process's own.
    Base,
    /// Frozen weights in mapped files: the system can drop their pages and read them again.
    Mapped,
    /// Weights of all adapters, copies included.
    Adapters,
    /// Their gradients.
    Gradients,
    /// AdamW's two means, and the guard's copy of them.
    Optimizer,
    /// Keys and values of generation.
    Cache,
    /// Inputs of blocks that are kept for the backward.
    Inputs,
    /// Everything inside of blocks: what is kept beside the input, and what lives for an operation.
    Blocks,
    /// Hidden states after the last block, logits, the head's sums.
    Head,
    /// Token ids, tokenizer, what a rollout knows of its answers.
    Data,
    /// What the process has beside its heap: program, stacks, the allocator's reserve.
    Process,
}

impl MemoryCategory {
    /// All, in the order of a table's columns.
    pub const ALL: [Self; 11] = [
        Self::Base,
        Self::Mapped,
        Self::Adapters,
        Self::Gradients,
        Self::Optimizer,
        Self::Cache,
        Self::Inputs,
        Self::Blocks,
        Self::Head,
        Self::Data,
        Self::Process,
    ];

    /// For tables and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Mapped => "mapped",
            Self::Adapters => "adapters",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer",
            Self::Cache => "kv cache",
            Self::Inputs => "inputs",
            Self::Blocks => "blocks",
            Self::Head => "head",
            Self::Data => "data",
            Self::Process => "process",
        }
    }
}

/// Bytes by class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes([usize; MemoryCategory::ALL.len()]);

impl Bytes {
    /// Of one class.
    pub fn of(&self, class: MemoryCategory) -> usize {
        self.0[class as usize]
    }

    /// Sets one class.
    pub fn set(&mut self, class: MemoryCategory, bytes: usize) {
        self.0[class as usize] = bytes;
    }

    /// What the allocator hands out: all but mapped files and the process's own.
    pub fn heap(&self) -> usize {
        self.own() - self.of(MemoryCategory::Process)
    }

    /// What the system cannot take back: all but mapped files.
    pub fn own(&self) -> usize {
        self.total() - self.of(MemoryCategory::Mapped)
    }

    /// Everything.
    pub fn total(&self) -> usize {
        self.0.iter().sum()
    }
}

struct Sums {
    now: Bytes,
    heap: usize,
    phase: Phase,
    peaks: [Bytes; Phase::ALL.len()],
}

/// The account of one walk.
#[derive(Clone)]
pub struct SimAllocator(Rc<RefCell<Sums>>);

impl SimAllocator {
    /// With what is there all along.
    pub fn new(standing: Bytes) -> Self {
        let mut peaks = [Bytes::default(); Phase::ALL.len()];
        peaks[Phase::Load as usize] = standing;
        Self(Rc::new(RefCell::new(Sums { now: standing, heap: standing.heap(), phase: Phase::Load, peaks })))
    }

    /// Takes so many bytes, until the holder is dropped.
    pub fn take(&self, class: MemoryCategory, bytes: usize) -> Allocation {
        self.0.borrow_mut().add(class, bytes);
        Allocation { ledger: self.clone(), class, bytes }
    }

    /// What is taken from now on counts as `phase`'s.
    pub fn enter(&self, phase: Phase) {
        let mut sums = self.0.borrow_mut();
        sums.phase = phase;
        sums.note();
    }

    /// The highest sum of each phase; nothing of a phase that did not run.
    pub fn peaks(&self) -> [(Phase, Bytes); Phase::ALL.len()] {
        let sums = self.0.borrow();
        Phase::ALL.map(|phase| (phase, sums.peaks[phase as usize]))
    }
}

impl Sums {
    fn add(&mut self, class: MemoryCategory, bytes: usize) {
        self.now.0[class as usize] += bytes;
        if class != MemoryCategory::Mapped && class != MemoryCategory::Process {
            self.heap += bytes;
        }
        self.note();
    }

    fn note(&mut self) {
        let peak = &mut self.peaks[self.phase as usize];
        if self.heap > peak.heap() || peak.total() == 0 {
            *peak = self.now;
        }
    }
}

/// Bytes that somebody holds.
pub struct Allocation {
    ledger: SimAllocator,
    class: MemoryCategory,
    bytes: usize,
}

impl Allocation {
    /// The same bytes under another class.
    pub fn becomes(&mut self, class: MemoryCategory) {
        let mut sums = self.ledger.0.borrow_mut();
        sums.now.0[self.class as usize] -= self.bytes;
        sums.now.0[class as usize] += self.bytes;
        self.class = class;
    }

    /// Gives all but `bytes` back, as a list that is cut and shrunk.
    pub fn shrink(&mut self, bytes: usize) {
        let mut sums = self.ledger.0.borrow_mut();
        sums.now.0[self.class as usize] -= self.bytes - bytes;
        sums.heap -= self.bytes - bytes;
        self.bytes = bytes;
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let mut sums = self.ledger.0.borrow_mut();
        sums.now.0[self.class as usize] -= self.bytes;
        if self.class != MemoryCategory::Mapped && self.class != MemoryCategory::Process {
            sums.heap -= self.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phases_peak_is_its_highest_sum_and_says_what_it_was_made_of() {
        let mut standing = Bytes::default();
        standing.set(MemoryCategory::Mapped, 1000);
        let ledger = SimAllocator::new(standing);
        let adapters = ledger.take(MemoryCategory::Adapters, 10);
        ledger.enter(Phase::Update);
        let mut x = ledger.take(MemoryCategory::Blocks, 100);
        drop(ledger.take(MemoryCategory::Head, 50));
        x.becomes(MemoryCategory::Inputs);
        drop(ledger.take(MemoryCategory::Gradients, 20));
        x.shrink(1);
        ledger.enter(Phase::Save);
        drop((adapters, x));
        let peaks = ledger.peaks();
        let of = |phase: Phase| peaks[phase as usize].1;
        assert_eq!((of(Phase::Update).heap(), of(Phase::Update).total()), (160, 1160));
        assert_eq!(
            (of(Phase::Update).of(MemoryCategory::Blocks), of(Phase::Update).of(MemoryCategory::Head)),
            (100, 50)
        );
        assert_eq!((of(Phase::Save).heap(), of(Phase::Load).heap(), of(Phase::Rollout).total()), (11, 10, 0));
        assert_eq!(ledger.0.borrow().heap, 0);
    }
}
