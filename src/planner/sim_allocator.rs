//! A simulated allocator: it records sizes by category and the peak of each phase with its composition. An allocation ends
//! when its handle is dropped, as in the program itself. It does not depend on shapes or configuration. Read
//! simulate/ops.rs for the operations that allocate.

use std::cell::RefCell;
use std::rc::Rc;

use crate::host::meter::Phase;

/// The purpose of bytes: the columns of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryCategory {
    /// Frozen weights in memory of the process's own.
    Base,
    /// Frozen weights in mapped files: the system can drop their pages and read them again.
    Mapped,
    /// Weights of all adapters, copies included.
    Adapters,
    /// Gradients of the adapters.
    Gradients,
    /// AdamW's first and second moments, and the guard's copy of them.
    Optimizer,
    /// Keys and values of generation.
    Cache,
    /// Inputs of blocks that are kept for the backward.
    Inputs,
    /// Tensors inside of blocks: saved tensors beside the input, and buffers that live for one operation.
    Blocks,
    /// Hidden states after the last block, logits, the head's sums.
    Head,
    /// Token ids, the tokenizer, and the numbers of a rollout per response token.
    Data,
    /// Memory of the process beside its heap: program, stacks, the allocator's reserve.
    Process,
    /// Pinned memory with the layers of frozen weights that a device does not keep.
    Pinned,
}

impl MemoryCategory {
    /// All categories, in the order of a table's columns.
    pub const ALL: [Self; 12] = [
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
        Self::Pinned,
    ];

    /// Whether a device holds it, if passes run on one: weights and activations, and nothing that trains.
    pub const fn is_on_device(self) -> bool {
        matches!(self, Self::Base | Self::Mapped | Self::Cache | Self::Inputs | Self::Blocks | Self::Head)
    }

    /// The category's name in tables and JSON.
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
            Self::Pinned => "pinned",
        }
    }
}

/// Bytes by category.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes([usize; MemoryCategory::ALL.len()]);

impl Bytes {
    /// Bytes of one category.
    pub fn of(&self, class: MemoryCategory) -> usize {
        self.0[class as usize]
    }

    /// Sets the bytes of one category.
    pub fn set(&mut self, class: MemoryCategory, bytes: usize) {
        self.0[class as usize] = bytes;
    }

    /// Heap bytes: all categories but mapped files, the process's own and pinned memory, which the driver allocates.
    pub fn heap(&self) -> usize {
        self.own() - self.of(MemoryCategory::Process) - self.of(MemoryCategory::Pinned)
    }

    /// Bytes that the system cannot drop: all but mapped files.
    pub fn own(&self) -> usize {
        self.total() - self.of(MemoryCategory::Mapped)
    }

    /// The sum over all categories.
    pub fn total(&self) -> usize {
        self.0.iter().sum()
    }
}

struct Sums {
    now: Bytes,
    heap: usize,
    phase: Phase,
    peaks: [Bytes; Phase::ALL.len()],
    /// Whether passes run on a device, so that their memory is none of the host's.
    on_device: bool,
}

/// The allocations of one simulation.
#[derive(Clone)]
pub struct SimAllocator(Rc<RefCell<Sums>>);

impl SimAllocator {
    /// A simulation that starts with `standing` bytes. With `on_device`, bytes that lie on a device are not counted.
    pub fn new(mut standing: Bytes, on_device: bool) -> Self {
        if on_device {
            MemoryCategory::ALL.into_iter().filter(|c| c.is_on_device()).for_each(|class| standing.set(class, 0));
        }
        let mut peaks = [Bytes::default(); Phase::ALL.len()];
        peaks[Phase::Load as usize] = standing;
        Self(Rc::new(RefCell::new(Sums { now: standing, heap: standing.heap(), phase: Phase::Load, peaks, on_device })))
    }

    /// Allocates bytes until the handle is dropped.
    pub fn take(&self, class: MemoryCategory, bytes: usize) -> Allocation {
        let bytes = if class.is_on_device() && self.0.borrow().on_device { 0 } else { bytes };
        self.0.borrow_mut().add(class, bytes);
        Allocation { ledger: self.clone(), class, bytes }
    }

    /// Allocations from now on count towards `phase`.
    pub fn enter(&self, phase: Phase) {
        let mut sums = self.0.borrow_mut();
        sums.phase = phase;
        sums.note();
    }

    /// The peak of each phase that ran.
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

/// A handle to allocated bytes.
pub struct Allocation {
    ledger: SimAllocator,
    class: MemoryCategory,
    bytes: usize,
}

impl Allocation {
    /// Moves the same bytes to another category.
    pub fn becomes(&mut self, class: MemoryCategory) {
        let mut sums = self.ledger.0.borrow_mut();
        sums.now.0[self.class as usize] -= self.bytes;
        sums.now.0[class as usize] += self.bytes;
        self.class = class;
    }

    /// Frees all but `bytes`, as a truncated and shrunk list does.
    pub fn shrink(&mut self, bytes: usize) {
        let mut sums = self.ledger.0.borrow_mut();
        let bytes = bytes.min(self.bytes);
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
        let ledger = SimAllocator::new(standing, false);
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
