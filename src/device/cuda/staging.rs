//! Uploads through pinned memory of our own. The driver copies pageable memory at a fraction of the link's speed and
//! makes the host wait for earlier work; from here it copies at full speed, and an upload returns as soon as its bytes
//! are in a buffer. It does not depend on matrices or kernels. Read `mod.rs` beside it for its use.

use std::collections::BTreeMap;

use anyhow::Result;
use cudarc::driver::{result, sys};

const BUFFERS: usize = 4;
const BYTES: usize = 4 << 20;
/// Pinned memory of the caller is copied from directly if it is at least as large.
const DIRECT: usize = 256 << 10;

struct Buffer {
    address: *mut u8,
    /// After the last copy from the buffer.
    event: sys::CUevent,
}

// SAFETY: the buffers are used under the lock that holds them.
unsafe impl Send for Buffer {}

/// The buffers, taken at the first upload, and the pinned memory that callers hold.
#[derive(Default)]
pub(super) struct Staging {
    buffers: Vec<Buffer>,
    next: usize,
    pinned: BTreeMap<usize, usize>,
}

impl Staging {
    /// Remembers pinned memory.
    pub fn pinned(&mut self, address: *mut u8, bytes: usize) {
        self.pinned.insert(address as usize, bytes);
    }

    /// Forgets it.
    pub fn not_pinned(&mut self, address: *mut u8) {
        self.pinned.remove(&(address as usize));
    }

    fn is_pinned(&self, from: &[u8]) -> bool {
        let start = from.as_ptr() as usize;
        let known = self.pinned.range(..=start).next_back();
        known.is_some_and(|(address, bytes)| start + from.len() <= address + bytes)
    }

    /// Returns when `from` may change.
    ///
    /// # Safety
    /// The context is bound, the stream is alive, and `to` has room.
    pub unsafe fn upload(&mut self, stream: sys::CUstream, from: &[u8], to: u64) -> Result<()> {
        if from.len() >= DIRECT && self.is_pinned(from) {
            // SAFETY: promised by the caller; the copy is over before `from` is given back.
            return unsafe {
                result::memcpy_htod_async(to, from, stream)?;
                Ok(result::stream::synchronize(stream)?)
            };
        }
        let mut to = to;
        for chunk in from.chunks(BYTES) {
            // SAFETY: promised by the caller; the buffer is not in use after the event, and has room for the chunk.
            unsafe {
                let buffer = self.buffer()?;
                result::event::synchronize(buffer.event)?;
                buffer.address.copy_from_nonoverlapping(chunk.as_ptr(), chunk.len());
                let staged = std::slice::from_raw_parts(buffer.address, chunk.len());
                result::memcpy_htod_async(to, staged, stream)?;
                result::event::record(buffer.event, stream)?;
            }
            to += chunk.len() as u64;
        }
        Ok(())
    }

    /// The buffers take turns.
    ///
    /// # Safety
    /// The context is bound.
    unsafe fn buffer(&mut self) -> Result<&Buffer> {
        if self.buffers.len() < BUFFERS {
            let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            // SAFETY: promised by the caller.
            match unsafe { result::malloc_host(BYTES, 0) } {
                Ok(address) => self.buffers.push(Buffer { address: address.cast(), event }),
                Err(error) => {
                    // SAFETY: nobody uses the event.
                    unsafe { result::event::destroy(event) }.ok();
                    if self.buffers.is_empty() {
                        return Err(error.into());
                    }
                }
            }
        }
        self.next = (self.next + 1) % self.buffers.len();
        Ok(&self.buffers[self.next])
    }

    /// Gives the buffers back when all copies are over. The context is bound.
    pub fn close(&mut self, stream: sys::CUstream) {
        // SAFETY: nothing uses the buffers after the stream is done.
        unsafe {
            result::stream::synchronize(stream).ok();
            for buffer in self.buffers.drain(..) {
                result::event::destroy(buffer.event).ok();
                result::free_host(buffer.address.cast()).ok();
            }
        }
    }
}
