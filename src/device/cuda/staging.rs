//! Copies through pinned memory of our own. The driver copies pageable memory at a fraction of the link's speed and
//! makes the host wait for earlier work; from here it copies at full speed. An upload returns as soon as its bytes are in a
//! buffer; of downloads one buffer is emptied while others are filled. It does not depend on matrices or kernels. Read `mod.rs`
//! beside it for its use.

use std::collections::BTreeMap;

use anyhow::Result;
use cudarc::driver::{result, sys};

use crate::device::downloads::{Buffers, through};
use crate::device::machine::Piece;

const BUFFERS: usize = 4;
const BYTES: usize = 4 << 20;
/// Pinned memory of the caller is copied from directly if it is at least as large, and so is what is downloaded if it is smaller.
pub(super) const DIRECT: usize = 256 << 10;

struct Buffer {
    address: *mut u8,
    /// After the last copy from the buffer.
    event: sys::CUevent,
}

// SAFETY: the buffers are used under the lock that holds them.
unsafe impl Send for Buffer {}

impl Buffer {
    /// # Safety
    /// The context is bound.
    unsafe fn new() -> Result<Self> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        // SAFETY: promised by the caller.
        match unsafe { result::malloc_host(BYTES, 0) } {
            Ok(address) => Ok(Self { address: address.cast(), event }),
            Err(error) => {
                // SAFETY: nobody uses the event.
                unsafe { result::event::destroy(event) }.ok();
                Err(error.into())
            }
        }
    }

    /// # Safety
    /// The context is bound, and no copy uses the buffer.
    unsafe fn free(self) {
        // SAFETY: promised by the caller.
        unsafe {
            result::event::destroy(self.event).ok();
            result::free_host(self.address.cast()).ok();
        }
    }
}

/// The buffers of downloads, taken at the first one. Apart from those of uploads: they are held while the host waits.
#[derive(Default)]
pub(super) struct Downloads(Vec<Buffer>);

impl Downloads {
    /// Waits for the work before, and copies.
    ///
    /// # Safety
    /// The context is bound, the stream is alive, and the pieces are memory of the card and of the host with so many bytes.
    pub unsafe fn download(&mut self, stream: sys::CUstream, pieces: &[Piece]) -> Result<()> {
        while self.0.len() < BUFFERS {
            // SAFETY: promised by the caller.
            match unsafe { Buffer::new() } {
                Ok(buffer) => self.0.push(buffer),
                Err(_) => break,
            }
        }
        if self.0.is_empty() {
            // The host gives no pinned memory: the driver copies by itself.
            for &Piece { from, to, bytes } in pieces {
                // SAFETY: promised by the caller; the bytes are initialised before they are a slice.
                unsafe {
                    to.write_bytes(0, bytes);
                    result::memcpy_dtoh_async(std::slice::from_raw_parts_mut(to, bytes), from, stream)?;
                }
            }
            // SAFETY: the stream is alive.
            return Ok(unsafe { result::stream::synchronize(stream) }?);
        }
        // SAFETY: promised by the caller.
        let copied = unsafe { through(&mut Filling { buffers: &self.0, stream }, pieces) };
        if copied.is_err() {
            // What was started must not reach buffers that are filled again.
            // SAFETY: as above.
            unsafe { result::stream::synchronize(stream) }.ok();
        }
        copied
    }

    /// Gives the buffers back. The context is bound.
    pub fn close(&mut self, stream: sys::CUstream) {
        // SAFETY: nothing uses the buffers after the stream is done.
        unsafe {
            result::stream::synchronize(stream).ok();
            self.0.drain(..).for_each(|buffer| buffer.free());
        }
    }
}

struct Filling<'b> {
    buffers: &'b [Buffer],
    stream: sys::CUstream,
}

impl Buffers for Filling<'_> {
    fn count(&self) -> usize {
        self.buffers.len()
    }

    fn capacity(&self) -> usize {
        BYTES
    }

    unsafe fn start(&mut self, buffer: usize, at: usize, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: promised by the caller; the buffer has room, and is read after its event alone.
        unsafe {
            let to = std::slice::from_raw_parts_mut(self.buffers[buffer].address.add(at), bytes);
            Ok(result::memcpy_dtoh_async(to, from, self.stream)?)
        }
    }

    fn mark(&mut self, buffer: usize) -> Result<()> {
        // SAFETY: the event and the stream are alive.
        Ok(unsafe { result::event::record(self.buffers[buffer].event, self.stream) }?)
    }

    fn wait(&mut self, buffer: usize) -> Result<*const u8> {
        let Buffer { address, event } = self.buffers[buffer];
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(event) }?;
        Ok(address)
    }
}

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

    /// Whether these bytes lie in pinned memory of the caller.
    pub fn is_pinned(&self, from: &[u8]) -> bool {
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
            // SAFETY: promised by the caller.
            match unsafe { Buffer::new() } {
                Ok(buffer) => self.buffers.push(buffer),
                Err(_) if !self.buffers.is_empty() => {}
                Err(error) => return Err(error),
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
            self.buffers.drain(..).for_each(|buffer| buffer.free());
        }
    }
}
