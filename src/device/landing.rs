//! Memory that is filled, and copied to the host, beside the order of work: a `Landing` is a buffer of the device, a `HostCopy` is
//! what the host keeps for it. While the device computes, the next copy is on its way. It does not depend on operations. Read
//! `machine.rs` beside it for the rules of lanes, `model/stream.rs` for the layers of a network that pass through, and
//! `model/inputs.rs` for the blocks' inputs.

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
                format!(
                    "{bytes} bytes of pinned host memory; keep fewer layers on the host with [base] offload, or set checkpoint = \
                     \"block\""
                )
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
        // SAFETY: promised by the caller.
        unsafe { self.start_fill(from, from.bytes)? };
        self.buffer.device().count(|work| work.streamed += from.bytes);
        Ok(())
    }

    /// As [`Landing::fill`], with the first `bytes` of what `spill` has copied.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn fill_back(&self, from: &HostCopy, bytes: usize) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { self.start_fill(from, bytes)? };
        self.buffer.device().count(|work| work.spilled += bytes);
        Ok(())
    }

    /// # Safety
    /// As for [`Landing::fill`].
    unsafe fn start_fill(&self, from: &HostCopy, bytes: usize) -> Result<()> {
        self.check(from, bytes)?;
        let Some(memory) = &from.memory else { return Ok(()) };
        // SAFETY: pinned memory that lives long enough, as the caller promises, and that nobody writes to while `from` is
        // shared; the buffer is alive until `Drop` has waited.
        unsafe { self.buffer.device().machine().fill(self.lane, &memory.as_bytes()[..bytes], self.buffer.address()) }
    }

    /// Starts a copy of the buffer's first `bytes` to the host, once the work before the last `release` is done. `arrive` comes
    /// before the next work that writes to the buffer.
    ///
    /// # Errors
    /// If it does not fit, or the copy cannot be started.
    ///
    /// # Safety
    /// Until this buffer is dropped, `to` lives, and nothing but the buffers of the same device uses it.
    pub unsafe fn spill(&self, to: &mut HostCopy, bytes: usize) -> Result<()> {
        self.check(to, bytes)?;
        let device = self.buffer.device();
        if let Some(memory) = &mut to.memory {
            // SAFETY: promised by the caller; the buffer is alive until `Drop` has waited.
            unsafe { device.machine().spill(self.lane, self.buffer.address(), &mut memory.as_bytes_mut()[..bytes])? };
        }
        device.count(|work| work.spilled += bytes);
        Ok(())
    }

    fn check(&self, host: &HostCopy, bytes: usize) -> Result<()> {
        let (buffer, host) = (self.buffer.bytes(), host.bytes);
        ensure!(
            bytes <= buffer.min(host),
            "{bytes} bytes between a buffer of {buffer} and a copy of {host} on the host"
        );
        Ok(())
    }

    /// Work that is issued from now on sees the last fill, and may overwrite what the last spill read.
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
        // It waits for the last copy, so that neither side's memory is given back during a copy.
        self.buffer.device().machine().close_lane(self.lane);
    }
}
