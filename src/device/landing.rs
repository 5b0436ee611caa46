//! Memory that is filled beside the order of work: a `Landing` is a buffer of the device, a `HostCopy` is what the host keeps to
//! fill it with. While the device computes, the next copy is on its way. It does not depend on operations. Read `machine.rs`
//! beside it for the rules of lanes, and `model/stream.rs` for the layers of a network that pass through.

use anyhow::{Context, Result, ensure};

use super::{Device, Matrix, Pinned};
use crate::device::Element;

/// Bytes that the host keeps in pinned memory for a device. The dry machine counts them and holds none.
#[derive(Debug)]
pub struct HostCopy {
    bytes: usize,
    memory: Option<Pinned>,
}

impl HostCopy {
    /// The number of bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The bytes, to be overwritten; `None` on a machine that only counts.
    pub fn content(&mut self) -> Option<&mut [u8]> {
        self.memory.as_mut().map(Pinned::as_bytes_mut)
    }
}

/// A buffer of the device and the lane that it is filled through: `fill`, then `arrive`, then kernels that read it, then
/// `release`, then the next `fill`. Whoever leaves out a step reads undefined content; the emulated machine makes it NaN.
#[derive(Debug)]
pub struct Landing {
    lane: u64,
    buffer: Matrix,
}

impl Device {
    /// Pinned memory of the host, zero at first; `bytes` is a multiple of 4.
    ///
    /// # Errors
    /// If the host refuses so much pinned memory.
    pub fn host_copy(&self, bytes: usize) -> Result<HostCopy> {
        ensure!(bytes.is_multiple_of(size_of::<f32>()), "{bytes} bytes of pinned memory are no multiple of 4");
        let pinned = || {
            self.pinned(bytes / size_of::<f32>()).with_context(|| {
                format!("{bytes} bytes of pinned host memory; keep fewer layers on the host with [base] offload")
            })
        };
        let memory = (!self.is_dry()).then(pinned).transpose()?;
        Ok(HostCopy { bytes, memory })
    }

    /// A buffer of so many bytes that is filled beside the order of work.
    ///
    /// # Errors
    /// If device memory is out.
    pub fn landing(&self, bytes: usize) -> Result<Landing> {
        let buffer = self.matrix(Element::U8, 1, bytes)?;
        // After the allocation, which is part of the order of work.
        Ok(Landing { lane: self.machine().open_lane()?, buffer })
    }
}

impl Landing {
    /// The buffer, for views of it.
    pub fn buffer(&self) -> &Matrix {
        &self.buffer
    }

    /// Starts a copy of `from` to the start of the buffer, once the work before the last `release` is done.
    ///
    /// # Errors
    /// If it does not fit, or the copy cannot be started.
    ///
    /// # Safety
    /// `from` lives until this buffer is filled again and has arrived, or is dropped.
    pub unsafe fn fill(&self, from: &HostCopy) -> Result<()> {
        ensure!(from.bytes <= self.buffer.bytes(), "{} bytes for a buffer of {}", from.bytes, self.buffer.bytes());
        let device = self.buffer.device();
        if let Some(memory) = &from.memory {
            // SAFETY: pinned memory that lives long enough, as the caller promises, and that nobody writes to while `from` is
            // shared; the buffer is alive until `Drop` has waited.
            unsafe { device.machine().fill(self.lane, memory.as_bytes(), self.buffer.address())? };
        }
        device.count(|work| work.streamed += from.bytes);
        Ok(())
    }

    /// Work that is issued from now on sees the last fill.
    ///
    /// # Errors
    /// If the machine refuses.
    pub fn arrive(&self) -> Result<()> {
        self.buffer.device().machine().arrive(self.lane)
    }

    /// Work that was issued so far is the last to use the buffer before the next fill.
    ///
    /// # Errors
    /// If the machine refuses.
    pub fn release(&self) -> Result<()> {
        self.buffer.device().machine().release(self.lane)
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        // It waits for the last fill, so that neither side's memory is given back during a copy.
        self.buffer.device().machine().close_lane(self.lane);
    }
}
