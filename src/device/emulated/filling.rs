//! The emulated machine's buffers of downloads. They do not depend on the machine. Read `downloads.rs` above it for the order in
//! which they are filled and emptied.

use anyhow::{Result, ensure};

use super::POISON;
use crate::device::downloads::Buffers;

/// Buffers of downloads, small enough that tests use all of them. Copies are made at the last moment: until a buffer is waited for
/// it holds NaN where they go.
#[derive(Default)]
pub(super) struct Filling([FilledBuffer; 3]);

#[derive(Default)]
struct FilledBuffer {
    content: Vec<u8>,
    /// Where in the buffer, from where, and how many bytes.
    copies: Vec<(usize, u64, usize)>,
    is_marked: bool,
}

impl Buffers for Filling {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn capacity(&self) -> usize {
        1000
    }

    unsafe fn start(&mut self, buffer: usize, at: usize, from: u64, bytes: usize) -> Result<()> {
        let capacity = self.capacity();
        let FilledBuffer { content, copies, is_marked } = &mut self.0[buffer];
        ensure!(!*is_marked, "a buffer of downloads is filled again before it was emptied");
        ensure!(at + bytes <= capacity, "{bytes} bytes at {at} of a buffer of {capacity}");
        content.resize(capacity, POISON);
        content[at..at + bytes].fill(POISON);
        copies.push((at, from, bytes));
        Ok(())
    }

    fn mark(&mut self, buffer: usize) -> Result<()> {
        self.0[buffer].is_marked = true;
        Ok(())
    }

    fn wait(&mut self, buffer: usize) -> Result<*const u8> {
        let FilledBuffer { content, copies, is_marked } = &mut self.0[buffer];
        ensure!(std::mem::take(is_marked), "a buffer of downloads is waited for that was not marked");
        for (at, from, bytes) in copies.drain(..) {
            // SAFETY: whoever started the copy promised that so many bytes are there.
            unsafe { content[at..at + bytes].as_mut_ptr().copy_from_nonoverlapping(from as *const u8, bytes) };
        }
        Ok(content.as_ptr())
    }
}
