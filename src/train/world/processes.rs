//! Processes under MPI as ranks. Only the thread that trains calls MPI. It does not depend on a stage. Read `mod.rs` next.

use anyhow::{Context, Result};
use mpi::Threading;
use mpi::point_to_point::{Destination, Source};
use mpi::topology::{Communicator, SimpleCommunicator};

use super::{Ranks, World};

/// MPI counts elements in 31 bits.
const PART: usize = 1 << 30;

/// This process among all that MPI started. A failed call ends all of them, as MPI does unless told otherwise.
struct Process;

impl Ranks for Process {
    fn rank(&self) -> usize {
        SimpleCommunicator::world().rank() as usize
    }

    fn size(&self) -> usize {
        SimpleCommunicator::world().size() as usize
    }

    fn send(&self, to: usize, message: &[u8]) -> Result<()> {
        let world = SimpleCommunicator::world();
        let other = world.process_at_rank(to as i32);
        other.send(&(message.len() as u64));
        message.chunks(PART).for_each(|part| other.send(part));
        Ok(())
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>> {
        let world = SimpleCommunicator::world();
        let other = world.process_at_rank(from as i32);
        let mut length = 0u64;
        other.receive_into(&mut length);
        let mut message = vec![0u8; length as usize];
        message.chunks_mut(PART).for_each(|part| {
            other.receive_into(part);
        });
        Ok(message)
    }
}

/// Starts MPI.
///
/// # Errors
/// If it runs already.
pub(super) fn start() -> Result<World> {
    let (universe, _) = mpi::initialize_with_threading(Threading::Funneled).context("MPI was started twice")?;
    // It would end MPI where it is dropped; `end` does.
    std::mem::forget(universe);
    Ok(World::of(Process))
}

/// Ends MPI, once all ranks do.
pub(super) fn end() {
    // SAFETY: MPI runs, and nothing calls it after this.
    unsafe { mpi::ffi::MPI_Finalize() };
}

/// Ends all ranks with an exit code.
pub(super) fn abort(code: i32) -> ! {
    SimpleCommunicator::world().abort(code)
}
