//! Recorded work: the launches of a step, kept by the machine as one piece and issued again with one call. On a card it is a
//! CUDA graph, which takes the driver a quarter of the time of the launches one by one.
//!
//! While a closure is recorded, its launches run as always and are written down with their arguments. What it allocates
//! stays with the recording, so that the addresses remain its own; a matrix that is given back within the closure is used
//! again there. What changes from step to step lies in inputs, which the caller writes before each replay. Work that cannot
//! be written down (copies, matrix products) makes the closure run without a recording. It does not depend on operations.
//! Read `machine.rs` beside it for what machines do.

use std::sync::{Arc, Mutex};
use std::thread::{self, ThreadId};

use anyhow::Result;

use super::machine::{Launch, Recorded};
use super::{Device, Matrix, lock};

/// What a device records, and the inputs that a step reads.
#[derive(Default)]
pub(super) struct State {
    recorder: Option<Recorder>,
    inputs: Vec<Input>,
    /// The machine has refused a recording once.
    is_refused: bool,
}

struct Recorder {
    thread: ThreadId,
    launches: Vec<Recorded>,
    pool: Arc<Pool>,
    is_fit: bool,
}

/// An input under the name by which operations ask for it.
struct Input {
    thread: ThreadId,
    name: &'static str,
    values: Vec<u32>,
    matrix: Matrix,
}

/// Memory of a recording: allocated while the closure ran, given back when the recording and the last matrix are gone.
#[derive(Debug)]
pub(super) struct Pool {
    device: Device,
    blocks: Mutex<Blocks>,
}

/// Address and bytes of every block, and of those that no matrix uses.
#[derive(Debug, Default)]
struct Blocks {
    all: Vec<(u64, usize)>,
    unused: Vec<(u64, usize)>,
    /// There is no recording: blocks go back to the device one by one.
    is_disbanded: bool,
}

impl Pool {
    /// An unused block of exactly this size.
    pub(super) fn take(&self, bytes: usize) -> Option<u64> {
        let unused = &mut lock(&self.blocks).unused;
        let at = unused.iter().rposition(|block| block.1 == bytes)?;
        Some(unused.swap_remove(at).0)
    }

    pub(super) fn add(&self, address: u64, bytes: usize) {
        lock(&self.blocks).all.push((address, bytes));
    }

    pub(super) fn give_back(&self, address: u64, bytes: usize) {
        let blocks = &mut *lock(&self.blocks);
        blocks.unused.push((address, bytes));
        if blocks.is_disbanded {
            self.free_unused(blocks);
        }
    }

    fn disband(&self) {
        let blocks = &mut *lock(&self.blocks);
        blocks.is_disbanded = true;
        self.free_unused(blocks);
    }

    fn free_unused(&self, blocks: &mut Blocks) {
        for (address, bytes) in blocks.unused.drain(..) {
            blocks.all.retain(|block| block.0 != address);
            self.device.give_back(address, bytes);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (address, bytes) in std::mem::take(&mut lock(&self.blocks).all) {
            self.device.give_back(address, bytes);
        }
    }
}

/// Launches that can be issued again. The memory of their arguments has to be alive at each replay: the recording keeps what
/// was allocated within it, the caller the rest.
#[derive(Debug)]
pub struct Recording {
    id: u64,
    launches: usize,
    pool: Arc<Pool>,
}

impl Recording {
    /// How many launches it issues.
    pub fn launches(&self) -> usize {
        self.launches
    }

    /// Issues the launches again, with the arguments that they had.
    ///
    /// # Safety
    /// All matrices that the recorded closure used, beside those that it made, still exist.
    ///
    /// # Errors
    /// If the machine fails.
    pub unsafe fn replay(&self) -> Result<()> {
        let device = &self.pool.device;
        device.count(|work| work.replays += 1);
        // SAFETY: what the closure made is in the pool; the caller promises the rest.
        unsafe { device.0.machine.replay(self.id) }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.pool.device.0.machine.forget(self.id);
    }
}

/// Inputs are withdrawn when it is dropped.
pub struct Inputs(Device);

impl Drop for Inputs {
    fn drop(&mut self) {
        let me = thread::current().id();
        let withdrawn: Vec<Input> = lock(&self.0.0.graph).inputs.extract_if(.., |input| input.thread == me).collect();
        drop(withdrawn);
    }
}

/// The end of a recording, also of one that fails.
struct Stop<'a>(&'a Device);

impl Stop<'_> {
    fn take(&self) -> Option<Recorder> {
        lock(&self.0.0.graph).recorder.take()
    }
}

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

impl Device {
    /// Runs `work` and records its launches. The recording is `None` if some of the work cannot be issued again, if another
    /// thread records, or after an error of the machine, which is reported once.
    ///
    /// # Errors
    /// Those of `work`.
    pub fn record<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, Option<Recording>)> {
        let pool = Arc::new(Pool { device: self.clone(), blocks: Mutex::default() });
        let (thread, of_recorder) = (thread::current().id(), Arc::clone(&pool));
        let recorder = Recorder { thread, launches: vec![], pool: of_recorder, is_fit: true };
        if let Some(unused) = self.start(recorder) {
            drop(unused);
            return Ok((work()?, None));
        }
        let stop = Stop(self);
        let result = work()?;
        let Some(recorder) = stop.take().filter(|recorder| recorder.is_fit) else {
            pool.disband();
            return Ok((result, None));
        };
        let launches = recorder.launches.len();
        match self.0.machine.record(recorder.launches) {
            Ok(id) => Ok((result, Some(Recording { id, launches, pool }))),
            Err(error) => {
                pool.disband();
                self.stop_recording(&error);
                Ok((result, None))
            }
        }
    }

    /// Begins to record; the recorder back, if that cannot be.
    fn start(&self, recorder: Recorder) -> Option<Recorder> {
        let can_record = self.can_record();
        let mut state = lock(&self.0.graph);
        if state.recorder.is_some() || !can_record {
            return Some(recorder);
        }
        state.recorder = Some(recorder);
        None
    }

    /// Nothing is recorded on this device any more; the reason is reported the first time.
    pub fn stop_recording(&self, error: &anyhow::Error) {
        let was_refused = std::mem::replace(&mut lock(&self.0.graph).is_refused, true);
        if !was_refused {
            crate::tell!("{}: the launches of a step are issued one by one, which is slower: {error:#}", self.name());
        }
    }

    /// Whether recordings are possible, as far as is known. While launches are timed, each is issued by itself.
    pub fn can_record(&self) -> bool {
        !self.is_profiled() && !lock(&self.0.graph).is_refused
    }

    /// Where operations of this thread that ask for `values` under a name find them, until the result is dropped.
    pub fn provide(&self, inputs: Vec<(&'static str, Vec<u32>, Matrix)>) -> Inputs {
        let thread = thread::current().id();
        let inputs = inputs.into_iter().map(|(name, values, matrix)| Input { thread, name, values, matrix });
        lock(&self.0.graph).inputs.extend(inputs);
        Inputs(self.clone())
    }

    /// `values` on the device, (1, len): the input of this name, or as [`Device::indices`].
    ///
    /// # Errors
    /// If device memory is out or the copy fails.
    pub fn input(&self, name: &'static str, values: &[u32]) -> Result<Matrix> {
        let me = thread::current().id();
        let is_it = |input: &&Input| input.thread == me && input.name == name && input.values == values;
        let found = lock(&self.0.graph).inputs.iter().find(is_it).map(|input| input.matrix.clone());
        found.map_or_else(|| self.indices(values), Ok)
    }

    /// The memory of the recording that is under way on this thread.
    pub(super) fn recording_pool(&self) -> Option<Arc<Pool>> {
        let state = lock(&self.0.graph);
        state.recorder.as_ref().filter(|r| r.thread == thread::current().id()).map(|r| Arc::clone(&r.pool))
    }

    /// Writes a launch down, if this thread records.
    pub(super) fn note(&self, launch: &Launch<'_>) {
        let mut state = lock(&self.0.graph);
        if let Some(recorder) = state.recorder.as_mut().filter(|r| r.thread == thread::current().id()) {
            recorder.launches.push(Recorded::of(launch));
        }
    }

    /// Work that is no launch: what this thread records cannot be issued again.
    pub(super) fn note_other_work(&self) {
        let mut state = lock(&self.0.graph);
        if let Some(recorder) = state.recorder.as_mut().filter(|r| r.thread == thread::current().id()) {
            recorder.is_fit = false;
        }
    }
}
